//! Around every route: the request's id in and out, its span, its figures, the rendering of problems, and what happens when a handler panics.
//!
//! Nothing here looks at a body or at a query: messages are content, and content is in no log.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures_util::FutureExt as _;
use metrics::{Counter, Histogram};
use parking_lot::RwLock;
use tracing::Instrument as _;
use uuid::Uuid;

use super::Gateway;
use super::auth::{KeyEnds, RequestId};
use super::negotiate::is_loopback_host;
use super::problem::{Code, Problem};
use super::unread::Unread;

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Sent where the key that was used ends soon: its presence is the warning.
pub(super) const KEY_EXPIRES_AT: HeaderName = HeaderName::from_static("turnhouse-key-expires-at");

/// The outermost layer.
pub(super) async fn observe(State(gateway): State<Gateway>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    let method = known_method(request.method());
    let id = request_id(request.headers());
    // Made from visible ASCII, or by us.
    let id_text = id.to_str().unwrap_or_default();
    let span = tracing::debug_span!("request", request_id = id_text, method, route);

    let (mut request, unread) = Unread::watch(request);
    request.extensions_mut().insert(RequestId(id.clone()));
    let key_ends = KeyEnds::default();
    request.extensions_mut().insert(key_ends.clone());
    let foreign = gateway.host.config.loopback_only && !addressed_to_loopback(&request);
    let mut response = if foreign {
        let detail = "this host serves its own machine only: address it as localhost or 127.0.0.1 (the Host header names another)";
        Problem::new(Code::MalformedRequest, detail).into_response()
    } else if let Some(problem) = too_long(request.uri(), gateway.host.config.limits.url_bytes_max) {
        problem.into_response()
    } else {
        // A panic is ours, and one request's: the connection and its other requests go on.
        AssertUnwindSafe(next.run(request))
            .catch_unwind()
            .instrument(span)
            .await
            .unwrap_or_else(|_| Problem::internal("a handler panicked; the line before says where").into_response())
    };

    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        report(&problem, id_text, method, route);
        problem.write_headers(response.headers_mut());
        let body = problem.to_json(Some(id_text));
        response.headers_mut().remove(header::CONTENT_LENGTH);
        *response.body_mut() = Body::from(body);
    }
    response.headers_mut().insert(REQUEST_ID, id.clone());
    secure(response.headers_mut());
    if let Some(at) = key_ends.soon() {
        let at = HeaderValue::from_str(&at.rfc3339()).expect("digits and letters");
        response.headers_mut().insert(KEY_EXPIRES_AT, at);
    }
    unread.tell(&mut response);
    gateway.metrics.record(route, method, response.status(), began);
    response
}

/// What no route has room for.
fn too_long(uri: &Uri, bytes_max: usize) -> Option<Problem> {
    let bytes = uri.path_and_query().map_or(0, |both| both.as_str().len());
    (bytes > bytes_max).then(|| {
        let detail = format!("path and query have {bytes} bytes; this host takes at most {bytes_max}");
        Problem::new(Code::UriTooLong, detail)
    })
}

/// Whatever a browser makes of an answer: it guesses no type, keeps no copy, shows it in no frame, runs nothing of it, and tells no other page where it was.
fn secure(headers: &mut HeaderMap) {
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    let nothing = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    headers.insert(header::CONTENT_SECURITY_POLICY, nothing);
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
}

/// Logs what is ours to mend, once.
fn report(problem: &Problem, request_id: &str, method: &str, route: &str) {
    let code = problem.code().as_str();
    match problem.code().status() {
        StatusCode::INTERNAL_SERVER_ERROR => {
            let cause = problem.cause().unwrap_or("unknown");
            tracing::error!(request_id, method, route, code, cause, "request failed");
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            let cause = problem.cause().unwrap_or("none");
            tracing::warn!(request_id, method, route, code, cause, "request refused");
        }
        _ => tracing::debug!(request_id, method, route, code, "request refused"),
    }
}

/// The client's own, if it is harmless in a log; else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let harmless = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=128).contains(&bytes.len()) && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:/+=".contains(b))
    };
    headers.get(REQUEST_ID).filter(harmless).cloned().unwrap_or_else(|| {
        let mut buffer = Uuid::encode_buffer();
        let text = Uuid::now_v7().hyphenated().encode_lower(&mut buffer);
        HeaderValue::from_str(text).expect("hex and hyphens")
    })
}

/// HTTP/1.1 has the name in `Host`, HTTP/2 in `:authority`; both must be ours where both are there.
fn addressed_to_loopback(request: &Request) -> bool {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    hosts.all(|host| host.to_str().is_ok_and(is_loopback_host))
        && request.uri().authority().is_none_or(|authority| is_loopback_host(authority.as_str()))
}

/// A method as a label: clients can invent others.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

struct Series {
    method: &'static str,
    status: StatusCode,
    requests: Counter,
    seconds: Histogram,
}

/// The figures of each route, looked up once: the recorder's own registry hashes every label at every call.
#[derive(Default)]
pub(super) struct RouteMetrics(RwLock<HashMap<String, Vec<Series>>>);

impl RouteMetrics {
    fn record(&self, route: &str, method: &'static str, status: StatusCode, began: Instant) {
        let seconds = began.elapsed().as_secs_f64();
        let tell = |series: &Series| {
            series.requests.increment(1);
            series.seconds.record(seconds);
        };
        let matches = |series: &&Series| series.method == method && series.status == status;
        if let Some(series) = self.0.read().get(route).and_then(|all| all.iter().find(matches)) {
            return tell(series);
        }
        let series = Series {
            method,
            status,
            requests: metrics::counter!("turnhouse_http_requests_total", "route" => route.to_owned(), "method" => method, "status" => status.as_u16().to_string()),
            seconds: metrics::histogram!("turnhouse_http_request_duration_seconds", "route" => route.to_owned(), "method" => method),
        };
        tell(&series);
        self.0.write().entry(route.to_owned()).or_default().push(series);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_keeps_a_harmless_id_and_gets_one_otherwise() {
        let with = |value: &[u8]| {
            let value = HeaderValue::from_bytes(value).unwrap();
            request_id(&HeaderMap::from_iter([(REQUEST_ID, value)]))
        };
        assert_eq!(with(b"abc-1"), "abc-1");
        for bad in [&b""[..], b"a b", b"a\"b", b"\xff", &[b'a'; 129]] {
            let id = with(bad);
            assert!(Uuid::try_parse(id.to_str().unwrap()).is_ok(), "{id:?}");
        }
    }

    #[test]
    fn a_rebound_name_is_noticed_on_both_protocols() {
        let h1 = |host: &str| Request::builder().uri("/").header("host", host).body(Body::empty()).unwrap();
        let h2 = |uri: &str| Request::builder().uri(uri).body(Body::empty()).unwrap();
        assert!(addressed_to_loopback(&h1("127.0.0.1:8787")));
        assert!(!addressed_to_loopback(&h1("evil.example")));
        assert!(addressed_to_loopback(&h2("http://localhost:8787/")));
        assert!(!addressed_to_loopback(&h2("http://evil.example/")));
    }
}
