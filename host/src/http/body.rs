//! Request bodies: bounded in bytes and time, read once, parsed once, with errors that name the field.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::negotiate::content_type_is;
use super::problem::{Code, Problem};
use crate::attachment::Pieces;

/// How long a client may take to send a JSON body.
const JSON_BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client may take to send a module, or an attachment.
const MODULE_BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// How long it may send nothing of it. A body that trickles ends with its time; one that stands still need not be waited for so long.
const STALL_TIMEOUT: Duration = Duration::from_secs(15);

/// A JSON body's bytes, which are UTF-8.
#[derive(Debug, Clone)]
pub struct JsonBytes(Bytes);

impl JsonBytes {
    /// Reads `request`'s body, which must be JSON of at most `bytes_max` bytes.
    pub async fn read(headers: &HeaderMap, body: Body, bytes_max: usize) -> Result<JsonBytes, Problem> {
        if !content_type_is(headers, "application/json") {
            return Err(Problem::new(
                Code::UnsupportedMediaType,
                "this route reads JSON; send `Content-Type: application/json`",
            ));
        }
        let patience = Patience { whole: JSON_BODY_TIMEOUT, stall: STALL_TIMEOUT };
        let bytes = read(headers, body, bytes_max, patience, Code::BodyTooLarge).await?;
        JsonBytes::check(bytes)
    }

    fn check(bytes: Bytes) -> Result<JsonBytes, Problem> {
        match std::str::from_utf8(&bytes) {
            Ok(_) => Ok(JsonBytes(bytes)),
            Err(error) => {
                let at = error.valid_up_to();
                Err(Problem::new(Code::MalformedRequest, format!("the body is not UTF-8 at byte {at}; JSON is UTF-8")))
            }
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("checked when it was read")
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// Parses it. What does not fit is `misfit`, unless it is no JSON at all or an unknown field.
    pub fn parse<'a, T: serde::Deserialize<'a>>(&'a self, misfit: Code) -> Result<T, Problem> {
        serde_json::from_str(self.as_str()).map_err(|error| explain(&error, misfit))
    }

    /// Parses it, and names the path of what does not fit. Costs a second parse, of a body that is refused anyway.
    pub fn parse_named<T: DeserializeOwned>(&self, misfit: Code) -> Result<T, Problem> {
        serde_json::from_str(self.as_str()).map_err(|error| {
            let problem = explain(&error, misfit);
            if problem.code() != misfit {
                return problem;
            }
            let named = axum::Json::<T>::from_bytes(&self.0).err().map(|rejection| rejection.body_text());
            let text =
                named.as_deref().and_then(|text| text.split_once("target type: ")).map(|(_, text)| text.to_owned());
            text.map_or(problem, |text| Problem::new(misfit, text))
        })
    }
}

/// Reads a module: `application/wasm` of at most `bytes_max` bytes.
pub async fn read_module(request: Request, bytes_max: usize) -> Result<Bytes, Problem> {
    let (parts, body) = request.into_parts();
    if !content_type_is(&parts.headers, "application/wasm") {
        return Err(Problem::new(
            Code::UnsupportedMediaType,
            "this route reads a WebAssembly module; send `Content-Type: application/wasm`",
        ));
    }
    let patience = Patience { whole: MODULE_BODY_TIMEOUT, stall: STALL_TIMEOUT };
    read(&parts.headers, body, bytes_max, patience, Code::ModuleTooLarge).await
}

/// Reads an attachment of at most `bytes_max` bytes, and hashes it as it comes.
pub async fn read_attachment(request: Request, bytes_max: usize) -> Result<Pieces, Problem> {
    let (parts, body) = request.into_parts();
    let patience = Patience { whole: MODULE_BODY_TIMEOUT, stall: STALL_TIMEOUT };
    let mut pieces = Pieces::default();
    let each = |frame: Bytes| pieces.push(&frame);
    read_frames(&parts.headers, body, bytes_max, patience, Code::AttachmentTooLarge, each).await?;
    Ok(pieces)
}

/// How long a body is waited for.
#[derive(Debug, Clone, Copy)]
struct Patience {
    whole: Duration,
    stall: Duration,
}

async fn read(
    headers: &HeaderMap,
    body: Body,
    bytes_max: usize,
    patience: Patience,
    too_large: Code,
) -> Result<Bytes, Problem> {
    let mut frames = Vec::<Bytes>::new();
    read_frames(headers, body, bytes_max, patience, too_large, |frame| frames.push(frame)).await?;
    // Most bodies are one frame, which is theirs as it came.
    Ok(if frames.len() == 1 { frames.remove(0) } else { frames.concat().into() })
}

async fn read_frames(
    headers: &HeaderMap,
    body: Body,
    bytes_max: usize,
    patience: Patience,
    too_large: Code,
    mut each: impl FnMut(Bytes),
) -> Result<(), Problem> {
    let over = || Problem::new(too_large, format!("the body is over this host's limit of {bytes_max} bytes"));
    let late = |what: &str, time: Duration| {
        Problem::new(Code::MalformedRequest, format!("{what} within {} s; send it again", time.as_secs_f32()))
    };
    // A length that says so is refused before the body is read.
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > bytes_max as u64) {
        return Err(over());
    }
    let collected = async {
        let mut body = Limited::new(body, bytes_max);
        loop {
            match tokio::time::timeout(patience.stall, body.frame()).await {
                Ok(None) => return Ok(()),
                Ok(Some(Ok(frame))) => frame.into_data().into_iter().for_each(&mut each),
                Ok(Some(Err(error))) if error.is::<LengthLimitError>() => return Err(over()),
                Ok(Some(Err(_))) => {
                    return Err(Problem::new(Code::MalformedRequest, "the body broke off before its end"));
                }
                Err(_) => return Err(late("nothing more of the body came", patience.stall)),
            }
        }
    };
    let whole = tokio::time::timeout(patience.whole, collected).await;
    whole.unwrap_or_else(|_| Err(late("the body did not arrive", patience.whole)))
}

/// A JSON error as a problem.
pub fn explain(error: &serde_json::Error, misfit: Code) -> Problem {
    let text = error.to_string();
    if let Some(problem) = unknown_field(&text) {
        return problem;
    }
    match error.classify() {
        serde_json::error::Category::Data => Problem::new(misfit, text),
        _ => Problem::new(Code::MalformedRequest, format!("the body is not JSON: {text}")),
    }
}

/// serde says "unknown field `x`, expected …" and nothing more structured.
pub fn unknown_field(text: &str) -> Option<Problem> {
    let (_, rest) = text.split_once("unknown field `")?;
    let (name, expected) = rest.split_once('`')?;
    let name: String = name.chars().take(100).collect();
    let expected = expected.split(" at line ").next().unwrap_or_default();
    Some(Problem::new(Code::UnknownField, format!("unknown field `{name}`{expected}")).with("field", name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::AgentSettings;

    fn headers(content_type: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_TYPE, content_type.parse().unwrap())])
    }

    fn json(text: &str) -> JsonBytes {
        JsonBytes::check(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    #[tokio::test]
    async fn a_body_is_bounded_typed_and_utf_8() {
        let read = async |kind: &'static str, body: &'static [u8]| {
            JsonBytes::read(&headers(kind), Body::from(body), 8).await.map(|b| b.0).map_err(|p| p.code())
        };
        assert_eq!(read("application/json", b"{}").await, Ok(Bytes::from_static(b"{}")));
        assert_eq!(read("text/plain", b"{}").await, Err(Code::UnsupportedMediaType));
        assert_eq!(read("application/json", b"123456789").await, Err(Code::BodyTooLarge));
        assert_eq!(read("application/json", b"\"\xff\"").await, Err(Code::MalformedRequest));
        let mut lying = headers("application/json");
        lying.insert(header::CONTENT_LENGTH, "9000000000".parse().unwrap());
        let refused = JsonBytes::read(&lying, Body::from("{}"), 8).await.unwrap_err();
        assert_eq!(refused.code(), Code::BodyTooLarge);
    }

    #[tokio::test]
    async fn a_body_that_stands_still_or_trickles_is_not_waited_for() {
        let read_within = async |stall_ms: u64, whole_ms: u64| {
            let trickle = futures_util::stream::unfold((), async |()| {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Some((Ok::<_, std::io::Error>("x"), ()))
            });
            let patience = Patience { whole: Duration::from_millis(whole_ms), stall: Duration::from_millis(stall_ms) };
            let body = Body::from_stream(trickle);
            read(&HeaderMap::new(), body, usize::MAX, patience, Code::BodyTooLarge).await.unwrap_err()
        };
        for (problem, says) in
            [(read_within(1, 60_000).await, "nothing more"), (read_within(60_000, 100).await, "did not arrive")]
        {
            assert_eq!(problem.code(), Code::MalformedRequest);
            assert!(format!("{problem:?}").contains(says), "{problem:?}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let parse = |text: &str| json(text).parse_named::<AgentSettings>(Code::InvalidSetting).unwrap_err();
        let unknown = parse(r#"{"worker":"echo","limits":{"turn_timeout":1}}"#);
        assert_eq!(unknown.code(), Code::UnknownField);
        assert!(format!("{unknown:?}").contains("turn_timeout"), "{unknown:?}");
        let misfit = parse(r#"{"worker":"echo","limits":{"turn_timeout_ms":"long"}}"#);
        assert_eq!(misfit.code(), Code::InvalidSetting);
        assert!(format!("{misfit:?}").contains("limits.turn_timeout_ms"), "{misfit:?}");
        assert_eq!(parse("{").code(), Code::MalformedRequest);
        assert_eq!(parse("").code(), Code::MalformedRequest);
        assert_eq!(parse("[1]").code(), Code::InvalidSetting);
    }
}
