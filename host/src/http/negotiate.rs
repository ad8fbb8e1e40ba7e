//! What request headers ask for: `Accept`, `Prefer`, `Idempotency-Key`, `Last-Event-ID`, `Content-Type`, `Host`. Pure.

use axum::http::{HeaderMap, HeaderName, header};

use super::problem::{Code, Problem};
use crate::event::EventId;

/// RFC 7240.
pub const PREFER: HeaderName = HeaderName::from_static("prefer");
/// RFC 7240.
pub const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
/// draft-ietf-httpapi-idempotency-key-header.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Sent where the key had begun the turn already.
pub const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// WHATWG HTML, server-sent events.
pub const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// What a submission is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The turn's events.
    Events,
    /// A JSON resource.
    Json,
}

/// What `Accept` asks for: events only where it names them, and not behind JSON. No `Accept` is JSON.
pub fn answer(headers: &HeaderMap) -> Result<Answer, Problem> {
    let quality = Accepted::of(headers);
    match (quality.events, quality.json) {
        (Some(events), json) if events > 0 && events >= json.unwrap_or(0) => Ok(Answer::Events),
        (_, Some(json)) if json > 0 => Ok(Answer::Json),
        (None, None) if quality.any.is_none_or(|any| any > 0) && !quality.other => Ok(Answer::Json),
        (_, None) if quality.any.is_some_and(|any| any > 0) => Ok(Answer::Json),
        _ => Err(Problem::new(
            Code::NotAcceptable,
            "this route answers application/json or text/event-stream; name one of them in Accept",
        )),
    }
}

/// Whether events may be sent, on a route that sends nothing else.
pub fn accepts_events(headers: &HeaderMap) -> Result<(), Problem> {
    let quality = Accepted::of(headers);
    let nothing_said = quality == Accepted::default();
    if nothing_said || quality.events.or(quality.any).is_some_and(|q| q > 0) {
        return Ok(());
    }
    Err(Problem::new(Code::NotAcceptable, "this route answers text/event-stream; name it in Accept"))
}

/// The best quality, in thousandths, of each range that matters here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Accepted {
    events: Option<u16>,
    json: Option<u16>,
    any: Option<u16>,
    other: bool,
}

impl Accepted {
    fn of(headers: &HeaderMap) -> Accepted {
        let mut accepted = Accepted::default();
        for range in headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default();
            let quality = parts
                .find_map(|p| p.strip_prefix("q=").or_else(|| p.strip_prefix("Q=")))
                .map_or(1000, |q| q.parse::<f32>().map_or(0, |q| (q.clamp(0.0, 1.0) * 1000.0) as u16));
            let is = |name: &str| kind.eq_ignore_ascii_case(name);
            let slot = if is("text/event-stream") || is("text/*") {
                &mut accepted.events
            } else if is("application/json") || is("application/*") {
                &mut accepted.json
            } else if is("*/*") {
                &mut accepted.any
            } else {
                // A problem is not what anybody waits for, but who accepts it alone can be told one.
                accepted.other |= !kind.is_empty();
                continue;
            };
            *slot = (*slot).max(Some(quality));
        }
        accepted
    }
}

/// `Prefer: wait=N`: seconds. What is no number is not applied, as RFC 7240 has it.
pub fn wait_s(headers: &HeaderMap) -> Option<u64> {
    headers
        .get_all(PREFER)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|preference| preference.split(';').next()?.split_once('='))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("wait"))
        .and_then(|(_, value)| value.trim().trim_matches('"').parse().ok())
}

/// The `Idempotency-Key`, which is any visible ASCII of 1 to `bytes_max` characters.
pub fn idempotency_key(headers: &HeaderMap, bytes_max: usize) -> Result<Option<&str>, Problem> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(key) = keys.next() else { return Ok(None) };
    let text = key.to_str().ok().filter(|text| {
        (1..=bytes_max).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) && keys.next().is_none()
    });
    text.map(Some).ok_or_else(|| {
        Problem::new(
            Code::InvalidIdempotencyKey,
            format!("send one Idempotency-Key of 1 to {bytes_max} visible ASCII characters"),
        )
    })
}

/// The `Last-Event-ID`: where a stream goes on.
pub fn last_event_id(headers: &HeaderMap) -> Result<Option<EventId>, Problem> {
    let Some(value) = headers.get(LAST_EVENT_ID) else { return Ok(None) };
    // An EventSource that has seen no id yet sends none or an empty one.
    let text = value.to_str().unwrap_or("?").trim();
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|()| {
        Problem::new(
            Code::InvalidCursor,
            "Last-Event-ID is not an id of this stream; send one as it came, or none to start anew",
        )
    })
}

/// Whether `Content-Type` says `kind`, or JSON's `+json` where `kind` is `application/json`.
pub fn content_type_is(headers: &HeaderMap, kind: &str) -> bool {
    let Some(given) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let given = given.split(';').next().unwrap_or_default().trim();
    given.eq_ignore_ascii_case(kind)
        || (kind == "application/json" && given.starts_with("application/") && given.ends_with("+json"))
}

/// Whether a `Host` names this machine's loopback: what a page that rebinds its name to 127.0.0.1 cannot send.
pub fn is_loopback_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn accept_chooses_events_only_where_it_names_them() {
        for (accept, expected) in [
            (&[][..], Some(Answer::Json)),
            (&["*/*"], Some(Answer::Json)),
            (&["application/json"], Some(Answer::Json)),
            (&["application/problem+json, application/json"], Some(Answer::Json)),
            (&["text/event-stream"], Some(Answer::Events)),
            (&["TEXT/Event-Stream;q=0.5"], Some(Answer::Events)),
            (&["text/event-stream", "*/*"], Some(Answer::Events)),
            (&["application/json, text/event-stream"], Some(Answer::Events)),
            (&["application/json, text/event-stream;q=0.9"], Some(Answer::Json)),
            (&["text/event-stream;q=0"], None),
            (&["text/event-stream;q=0, */*"], Some(Answer::Json)),
            (&["application/json;q=0"], None),
            (&["application/xml"], None),
            (&["application/xml, */*;q=0.1"], Some(Answer::Json)),
        ] {
            assert_eq!(answer(&headers(header::ACCEPT, accept)).ok(), expected, "{accept:?}");
        }
        assert!(accepts_events(&HeaderMap::new()).is_ok());
        assert!(accepts_events(&headers(header::ACCEPT, &["*/*"])).is_ok());
        assert!(accepts_events(&headers(header::ACCEPT, &["application/json"])).is_err());
    }

    #[test]
    fn prefer_wait_is_read_among_others() {
        for (prefer, expected) in [
            (&["wait=30"][..], Some(30)),
            (&["respond-async, wait=5"], Some(5)),
            (&["respond-async", "Wait = \"7\"; strict"], Some(7)),
            (&["wait=0"], Some(0)),
            (&["wait=-1"], None),
            (&["wait=soon"], None),
            (&["wait"], None),
            (&["handling=lenient"], None),
            (&[], None),
        ] {
            assert_eq!(wait_s(&headers(PREFER, prefer)), expected, "{prefer:?}");
        }
    }

    #[test]
    fn an_idempotency_key_is_visible_ascii_and_one() {
        let key = |values: &[&str]| {
            idempotency_key(&headers(IDEMPOTENCY_KEY, values), 5).map(|k| k.map(str::to_owned)).map_err(|p| p.code())
        };
        assert_eq!(key(&[]), Ok(None));
        assert_eq!(key(&["7d1c"]), Ok(Some("7d1c".to_owned())));
        for bad in [&[""][..], &["123456"], &["a b"], &["a", "a"]] {
            assert_eq!(key(bad), Err(Code::InvalidIdempotencyKey), "{bad:?}");
        }
    }

    #[test]
    fn a_last_event_id_is_an_id_or_nothing() {
        let id = |value: &str| last_event_id(&headers(LAST_EVENT_ID, &[value])).map_err(|p| p.code());
        assert_eq!(id("1.10"), Ok(Some(EventId::At(1, 10))));
        assert_eq!(id("end"), Ok(Some(EventId::End)));
        assert_eq!(id(""), Ok(None));
        for bad in ["1", "1.x", "-1.0", "null", "1.2.3"] {
            assert_eq!(id(bad), Err(Code::InvalidCursor), "{bad}");
        }
    }

    #[test]
    fn a_json_body_says_so() {
        let is = |given: &str| content_type_is(&headers(header::CONTENT_TYPE, &[given]), "application/json");
        assert!(is("application/json") && is("application/json; charset=utf-8") && is("application/cloudevents+json"));
        assert!(!is("text/plain") && !is("application/x-www-form-urlencoded"));
        assert!(!content_type_is(&HeaderMap::new(), "application/json"));
    }

    #[test]
    fn only_loopback_names_are_loopback() {
        for good in [
            "localhost",
            "LOCALHOST:8787",
            "app.localhost:1",
            "127.0.0.1:8787",
            "127.9.9.9",
            "[::1]:8787",
            "localhost.",
        ] {
            assert!(is_loopback_host(good), "{good}");
        }
        for bad in [
            "",
            "example.org",
            "localhost.evil.org:8787",
            "127.0.0.1.evil.org",
            "10.0.0.1",
            "[2001:db8::1]:1",
            "0.0.0.0",
        ] {
            assert!(!is_loopback_host(bad), "{bad}");
        }
    }
}
