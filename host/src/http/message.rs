//! A message as it comes in: checked against its limits, kept as it came. Pure.

use bytes::Bytes;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::body::unknown_field;
use super::problem::{Code, Problem};
use crate::attachment::AttachmentId;
use crate::content::{Content, ContentLimits, Part, PartsContent, TextContent};
use crate::limits::Limits;

/// [`Content`] has the same two shapes, but cannot say which field is wrong.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMessage {
    #[serde(default, deserialize_with = "present")]
    text: Option<String>,
    #[serde(default, deserialize_with = "present")]
    parts: Option<Vec<Part>>,
}

/// A field that is there is not null.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// The message's bytes, on their own: a slice of the body would keep the connection's whole buffer for as long as the turn lives. And what it
/// refers to.
pub fn read(raw: Option<&RawValue>, limits: &Limits) -> Result<(Bytes, Vec<AttachmentId>), Problem> {
    let raw = raw.ok_or_else(|| invalid("there is none; send {\"message\": {\"text\": …}}"))?;
    let message: RawMessage = serde_json::from_str(raw.get()).map_err(|error| {
        let text = error.to_string();
        // The position would be the message's, not the body's.
        let text = text.split(" at line ").next().unwrap_or(&text);
        unknown_field(text).unwrap_or_else(|| invalid(text))
    })?;
    let content = match (message.text, message.parts) {
        (Some(text), None) => Content::Text(TextContent { text }),
        (None, Some(parts)) => Content::Parts(PartsContent { parts }),
        (Some(_), Some(_)) => return Err(invalid("it has a text and parts; send one of them")),
        (None, None) => return Err(invalid("it has neither a text nor parts; send one of them")),
    };
    let limits = ContentLimits {
        text_bytes_max: limits.message_text_bytes_max,
        parts_max: limits.message_parts_max,
        blob_bytes_max: limits.message_blob_bytes_max,
    };
    content.check(&limits).map_err(|error| invalid(&error.0))?;
    Ok((Bytes::copy_from_slice(raw.get().as_bytes()), content.attachments()))
}

fn invalid(why: &str) -> Problem {
    Problem::new(Code::InvalidMessage, format!("the message is not valid: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(message: &str) -> Result<Bytes, (Code, String)> {
        let raw: &RawValue = serde_json::from_str(message).unwrap();
        read(Some(raw), &Limits::default())
            .map(|(message, _)| message)
            .map_err(|problem| (problem.code(), format!("{problem:?}")))
    }

    #[test]
    fn a_message_is_kept_as_it_came() {
        let message = r#"{ "text" : "h\u00e9" }"#;
        assert_eq!(check(message).unwrap(), message);
    }

    #[test]
    fn what_is_kept_is_a_content() {
        for good in [r#"{"text":"a"}"#, r#"{"parts":[{"type":"json","data":null}]}"#] {
            let kept = check(good).unwrap();
            serde_json::from_slice::<Content>(&kept).unwrap();
        }
    }

    #[test]
    fn what_is_wrong_with_a_message_is_said() {
        for (bad, code, says) in [
            (r#"{"text":""}"#, Code::InvalidMessage, "empty"),
            (r#"{"text":null}"#, Code::InvalidMessage, "expected a string"),
            (r#"{"text":"a","parts":null}"#, Code::InvalidMessage, "expected a sequence"),
            (r#"{"text":"a","parts":[]}"#, Code::InvalidMessage, "one of them"),
            ("{}", Code::InvalidMessage, "neither"),
            ("\"hello\"", Code::InvalidMessage, "expected struct"),
            (r#"{"text":"a","colour":"red"}"#, Code::UnknownField, "colour"),
            (r#"{"parts":[{"type":"exe"}]}"#, Code::InvalidMessage, "exe"),
            (r#"{"parts":[{"type":"text","text":"a","x":1}]}"#, Code::UnknownField, "x"),
            (r#"{"text":"\ud800"}"#, Code::InvalidMessage, "hex escape"),
        ] {
            let (got, text) = check(bad).unwrap_err();
            assert_eq!(got, code, "{bad}: {text}");
            assert!(text.contains(says), "{bad}: {text}");
        }
        let huge = format!(r#"{{"text":"{}"}}"#, "x".repeat(262_145));
        assert!(check(&huge).unwrap_err().1.contains("262144"));
        assert_eq!(read(None, &Limits::default()).unwrap_err().code(), Code::InvalidMessage);
    }
}
