//! What a message or a reply is: a text, or parts. Parsed once, checked against its limits, kept as it came.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::attachment::{AttachmentId, FILE_NAME_CHARS_MAX, is_file_name, is_media_type};

/// A message or a reply: `{"text": …}` or `{"parts": […]}`, not both.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// A text.
    Text(TextContent),
    /// Several parts, in order.
    Parts(PartsContent),
}

/// `{"text": …}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TextContent {
    /// UTF-8.
    #[schema(min_length = 1)]
    pub text: String,
}

/// `{"parts": […]}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PartsContent {
    /// In order; at least one.
    #[schema(min_items = 1)]
    pub parts: Vec<Part>,
}

/// One part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Part {
    /// A text.
    Text {
        /// UTF-8.
        text: String,
    },
    /// Any JSON.
    Json {
        /// The value.
        data: Value,
    },
    /// Bytes with their media type.
    Blob {
        /// As in RFC 6838: `image/png`.
        #[schema(max_length = 127, pattern = "^[ -.0-~]+/[ -~]+$")]
        media_type: String,
        /// Standard alphabet, padded.
        #[schema(pattern = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$")]
        base64: String,
    },
    /// A file that was uploaded before. Of messages alone: a reply has none.
    Attachment {
        /// Which: `POST /v1/attachments` answers it.
        attachment_id: AttachmentId,
        /// What it is called. It means nothing here, and is no path.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(
            min_length = 1,
            max_length = 200,
            pattern = r"^[^/\\\u0000-\u001f\u007f-\u009f]*[^./\\\u0000-\u001f\u007f-\u009f][^/\\\u0000-\u001f\u007f-\u009f]*$"
        )]
        name: Option<String>,
    },
}

/// A message as parts, ready to be one with others: what is stored then is `whole` of the first, and `more` of each that comes after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joinable {
    /// `{"parts":[…]}`.
    pub whole: Bytes,
    /// What goes where the last two bytes of such a message are: a line break, its parts, and the two bytes.
    pub more: Bytes,
    /// How many parts it has.
    pub parts: u32,
}

/// What ends a message of parts.
const END: &str = "]}";

/// Between two messages: whoever reads the text alone sees lines.
const LINE_BREAK: &str = r#",{"type":"text","text":"\n"},"#;

impl Joinable {
    /// Of a message. `None`: it is no content.
    pub fn of(message: &[u8]) -> Option<Joinable> {
        let parts = match serde_json::from_slice(message).ok()? {
            Content::Text(TextContent { text }) => vec![Part::Text { text }],
            Content::Parts(PartsContent { parts }) => parts,
        };
        let list = serde_json::to_string(&parts).ok()?;
        let inner = list.strip_prefix('[')?.strip_suffix(']')?;
        Some(Joinable {
            whole: format!("{{\"parts\":[{inner}{END}").into(),
            more: format!("{LINE_BREAK}{inner}{END}").into(),
            parts: u32::try_from(parts.len()).ok()?,
        })
    }

    /// How many parts it adds to a message that it joins.
    pub fn adds(&self) -> u32 {
        self.parts + 1
    }

    /// The message with this one behind it. `message` must be the `whole` of another, with whatever joined it since.
    pub fn join(&self, message: &[u8]) -> Vec<u8> {
        let kept = message.len().saturating_sub(END.len());
        [&message[..kept], &self.more[..]].concat()
    }
}

/// How much memory a JSON text becomes, in values of a few dozen bytes: 1 for each, and 8 for an object. What is in strings is passed over. Nothing is
/// allocated for it, and what is no JSON has some weight, too.
pub fn json_weight(json: &str) -> usize {
    let (mut weight, mut in_string, mut escaped) = (1_usize, false, false);
    for byte in json.bytes() {
        if in_string {
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' => weight += 8,
            b'[' | b',' => weight += 1,
            _ => {}
        }
    }
    weight
}

/// The bounds of a content.
#[derive(Debug, Clone, Copy)]
pub struct ContentLimits {
    /// All texts and JSON together.
    pub text_bytes_max: usize,
    /// How many parts.
    pub parts_max: usize,
    /// Each blob, decoded.
    pub blob_bytes_max: usize,
}

/// Why a content is not one. The text says which bound and its value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidContent(pub String);

impl Content {
    /// How much it says, in bytes, near enough: of JSON parts nothing is known.
    pub fn bytes(&self) -> usize {
        match self {
            Content::Text(TextContent { text }) => text.len(),
            Content::Parts(PartsContent { parts }) => {
                let part = |part: &Part| match part {
                    Part::Text { text } => text.len(),
                    Part::Blob { base64, .. } => base64.len(),
                    Part::Json { .. } | Part::Attachment { .. } => 0,
                };
                parts.iter().map(part).sum()
            }
        }
    }

    /// A plain text.
    pub fn text(text: impl Into<String>) -> Content {
        Content::Text(TextContent { text: text.into() })
    }

    /// The texts joined; what a worker without an SDK reads on stdin.
    pub fn joined_text(&self) -> std::borrow::Cow<'_, str> {
        match self {
            Content::Text(content) => content.text.as_str().into(),
            Content::Parts(content) => content
                .parts
                .iter()
                .filter_map(|part| if let Part::Text { text } = part { Some(text.as_str()) } else { None })
                .collect::<String>()
                .into(),
        }
    }

    /// The files that it refers to, each once.
    pub fn attachments(&self) -> Vec<AttachmentId> {
        let Content::Parts(content) = self else { return Vec::new() };
        let ids = content.parts.iter().filter_map(|part| match part {
            Part::Attachment { attachment_id, .. } => Some(*attachment_id),
            _ => None,
        });
        let ids: BTreeSet<_> = ids.collect();
        ids.into_iter().collect()
    }

    /// Whether it has nothing in it.
    pub fn is_empty(&self) -> bool {
        match self {
            Content::Text(content) => content.text.is_empty(),
            Content::Parts(content) => {
                content.parts.iter().all(|part| matches!(part, Part::Text { text } if text.is_empty()))
            }
        }
    }

    /// Holds it against its limits.
    pub fn check(&self, limits: &ContentLimits) -> Result<(), InvalidContent> {
        let text_bytes = match self {
            Content::Text(content) => content.text.len(),
            Content::Parts(content) => check_parts(&content.parts, limits)?,
        };
        if text_bytes > limits.text_bytes_max {
            return Err(InvalidContent(format!(
                "the text has {text_bytes} bytes, the limit is {}",
                limits.text_bytes_max
            )));
        }
        if self.is_empty() {
            return Err(InvalidContent("it is empty; send at least one byte of text, or a part".to_owned()));
        }
        Ok(())
    }
}

/// The bytes of text and JSON in the parts.
fn check_parts(parts: &[Part], limits: &ContentLimits) -> Result<usize, InvalidContent> {
    if parts.len() > limits.parts_max {
        return Err(InvalidContent(format!("it has {} parts, the limit is {}", parts.len(), limits.parts_max)));
    }
    let mut text_bytes = 0;
    for (index, part) in parts.iter().enumerate() {
        match part {
            Part::Text { text } => text_bytes += text.len(),
            Part::Json { data } => text_bytes += data.to_string().len(),
            Part::Blob { media_type, base64 } => {
                if !is_media_type(media_type) {
                    return Err(InvalidContent(format!("part {index}: media_type is not a media type")));
                }
                if base64.len() / 4 * 3 > limits.blob_bytes_max + 2 {
                    let max = limits.blob_bytes_max;
                    return Err(InvalidContent(format!("part {index}: the blob is over the limit of {max} bytes")));
                }
                STANDARD
                    .decode(base64)
                    .map_err(|_| InvalidContent(format!("part {index}: not standard padded base64")))?;
            }
            Part::Attachment { name, .. } => {
                if name.as_deref().is_some_and(|name| !is_file_name(name)) {
                    return Err(InvalidContent(format!(
                        "part {index}: a name has 1 to {FILE_NAME_CHARS_MAX} characters, no slash, backslash or control character among them, \
                         and not dots alone"
                    )));
                }
            }
        }
    }
    Ok(text_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_text_weighs_what_its_values_take() {
        for (json, weight) in [
            ("1", 1),
            (r#""{[,""#, 1),
            (r#""\\\",{[""#, 1),
            (r#"["\\",{}]"#, 1 + 1 + 1 + 8),
            ("[1,2,3]", 1 + 1 + 2),
            (r#"{"a":{"b":[]}}"#, 1 + 8 + 8 + 1),
        ] {
            assert_eq!(json_weight(json), weight, "{json}");
        }
    }

    const LIMITS: ContentLimits = ContentLimits { text_bytes_max: 10, parts_max: 2, blob_bytes_max: 3 };

    fn parse(json: &str) -> Result<Content, String> {
        let content: Content = serde_json::from_str(json).map_err(|e| e.to_string())?;
        content.check(&LIMITS).map_err(|e| e.to_string())?;
        Ok(content)
    }

    #[test]
    fn messages_that_are_joined_are_one_message_of_lines() {
        let of = |message: &str| Joinable::of(message.as_bytes()).unwrap();
        let (first, second) = (
            of(r#"{ "text": "a\u0000é]}" }"#),
            of(r#"{"parts":[{"type":"json","data":[1]},{"type":"text","text":"c"}]}"#),
        );
        assert_eq!((first.parts, second.parts, second.adds()), (1, 2, 3));
        let joined = first.join(&second.join(&of(r#"{"text":"z"}"#).whole));
        let content: Content = serde_json::from_slice(&joined).unwrap();
        assert_eq!(content.joined_text(), "z\nc\na\0é]}");
        let Content::Parts(content) = content else { panic!("{content:?}") };
        assert_eq!(content.parts.len(), 1 + second.adds() as usize + first.adds() as usize);
        assert_eq!(Joinable::of(b"3"), None);
    }

    #[test]
    fn a_content_is_a_text_or_parts_and_never_both() {
        assert_eq!(parse(r#"{"text":"hi"}"#).unwrap().joined_text(), "hi");
        let parts =
            r#"{"parts":[{"type":"text","text":"a"},{"type":"blob","media_type":"image/png","base64":"AAAA"}]}"#;
        assert_eq!(parse(parts).unwrap().joined_text(), "a");
        for bad in [
            r#"{"text":""}"#,
            r#"{"text":"12345678901"}"#,
            r#"{"parts":[]}"#,
            r#"{"text":"a","parts":[]}"#,
            r#"{"parts":[{"type":"text","text":"a"},{"type":"text","text":"a"},{"type":"text","text":"a"}]}"#,
            r#"{"parts":[{"type":"blob","media_type":"image/png","base64":"AAAAAAAA"}]}"#,
            r#"{"parts":[{"type":"blob","media_type":"image/png","base64":"A"}]}"#,
            r#"{"parts":[{"type":"blob","media_type":"png","base64":"AAAA"}]}"#,
            r#"{"parts":[{"type":"exe"}]}"#,
            "{}",
            "3",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_attachment_is_named_by_its_bytes_and_called_by_no_path() {
        let id = AttachmentId([7; 32]);
        let part = |rest: &str| format!(r#"{{"type":"attachment","attachment_id":"{id}"{rest}}}"#);
        let message = |parts: &[String]| format!(r#"{{"parts":[{}]}}"#, parts.join(","));
        for good in ["", r#","name":"report.pdf""#] {
            let content = parse(&message(&[part(good)])).unwrap();
            assert_eq!((content.attachments(), content.is_empty()), (vec![id], false));
        }
        for bad in [r#","name":"../x""#, r#","name":"""#, r#","bytes":1"#, r#","media_type":"a/b""#] {
            assert!(parse(&message(&[part(bad)])).is_err(), "{bad}");
        }
        assert!(parse(r#"{"parts":[{"type":"attachment","attachment_id":"sha256-00"}]}"#).is_err());
        assert_eq!(parse(&message(&[part(""), part("")])).unwrap().attachments(), [id]);
    }
}
