//! What is said, in and out, and what a turn is told about itself: the JSON shapes of `input_read` and `reply`.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::base64;

/// One part of a message or a reply.
///
/// As JSON: `{"type":"text","text":…}`, `{"type":"json","data":…}`, `{"type":"blob","media_type":…,"base64":…}`,
/// `{"type":"attachment","attachment_id":…,"name":…,"media_type":…,"bytes":…}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Part {
    /// Text for people.
    Text {
        /// UTF-8.
        text: String,
    },
    /// Data for programs.
    Json {
        /// Any JSON value.
        data: serde_json::Value,
    },
    /// A file.
    Blob {
        /// Its type, such as `image/png`.
        media_type: String,
        /// Its bytes: standard alphabet, with padding. [`Part::blob`] makes it, [`Part::bytes`] reads it.
        base64: String,
    },
    /// A file that was uploaded before the message. [`Turn::attachment`](crate::Turn::attachment) reads it; a reply cannot have one.
    Attachment {
        /// What names it.
        attachment_id: String,
        /// What whoever sent it calls it. A name and no path: do not open a file by it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Its type, as whoever sent it said.
        #[serde(default)]
        media_type: String,
        /// How many bytes it has.
        #[serde(default)]
        bytes: u64,
    },
    /// A kind of part that this version does not know. It cannot be sent.
    #[serde(other, skip_serializing)]
    Unknown,
}

impl Part {
    /// A part of text.
    pub fn text(text: impl Into<String>) -> Part {
        Part::Text { text: text.into() }
    }

    /// A part of data.
    ///
    /// # Errors
    /// [`Error::Json`](crate::Error::Json) if the value cannot be JSON, such as a map whose keys are not strings.
    pub fn json(data: &impl Serialize) -> Result<Part, crate::Error> {
        Ok(Part::Json { data: serde_json::to_value(data)? })
    }

    /// A file of these bytes.
    ///
    /// ```
    /// use turnhouse_guest::Part;
    /// let part = Part::blob("text/plain", b"hello");
    /// assert_eq!(part.bytes().as_deref(), Some(&b"hello"[..]));
    /// ```
    pub fn blob(media_type: impl Into<String>, bytes: &[u8]) -> Part {
        Part::Blob { media_type: media_type.into(), base64: base64::encode(bytes) }
    }

    /// The bytes of a blob; `None` for every other part, and where the base64 is malformed.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            Part::Blob { base64, .. } => base64::decode(base64),
            _ => None,
        }
    }
}

/// A message or a reply: its parts in order.
///
/// As JSON `{"text":…}` where it is one text, else `{"parts":[…]}`; both are read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Wire", into = "Wire")]
pub struct Message {
    /// At least one in every message that a turn is given.
    pub parts: Vec<Part>,
}

impl Message {
    /// The text parts joined, with nothing between them; empty if there are none. What [`Turn::text`](crate::Turn::text) is for the message.
    pub fn text(&self) -> String {
        self.parts
            .iter()
            .filter_map(|part| match part {
                Part::Text { text } => Some(text.as_str()),
                _ => None,
            })
            .collect()
    }
}

impl From<&str> for Message {
    fn from(text: &str) -> Message {
        Message { parts: vec![Part::text(text)] }
    }
}

impl From<Vec<Part>> for Message {
    fn from(parts: Vec<Part>) -> Message {
        Message { parts }
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Wire {
    Parts { parts: Vec<Part> },
    Text { text: String },
}

impl From<Wire> for Message {
    fn from(wire: Wire) -> Message {
        match wire {
            Wire::Parts { parts } => Message { parts },
            Wire::Text { text } => Message { parts: vec![Part::Text { text }] },
        }
    }
}

impl From<Message> for Wire {
    fn from(message: Message) -> Wire {
        match <[Part; 1]>::try_from(message.parts) {
            Ok([Part::Text { text }]) => Wire::Text { text },
            Ok(parts) => Wire::Parts { parts: parts.into() },
            Err(parts) => Wire::Parts { parts },
        }
    }
}

/// What a turn is told about itself, but for its snapshot: [`Turn::input`](crate::Turn::input).
///
/// Its JSON has these names; what a host leaves out is `None`, empty or zero here, what it adds is ignored.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Input {
    /// This turn.
    pub turn_id: String,
    /// The conversation; a private turn may have none.
    pub conversation_id: Option<String>,
    /// The agent that this worker runs as.
    pub agent_id: String,
    /// What lets this turn write its conversation's snapshot; none in a private turn.
    pub run_id: Option<String>,
    /// 1 at first. Higher when a host was lost in an earlier attempt; what that attempt streamed is discarded by its readers.
    pub attempt: u32,
    /// Effects are skipped: their operations answer `{"dry_run": true}`. State and history are kept as usual.
    pub dry_run: bool,
    /// When this turn will be stopped, as milliseconds since 1970 (UTC), the clock that [`std::time::SystemTime::now`] reads.
    pub deadline_unix_ms: Option<u64>,
    /// Which run wrote the snapshot that this turn starts from; none where there is no snapshot.
    pub snapshot: Option<Origin>,
    /// The agent's environment, as its settings say.
    pub environment: BTreeMap<String, String>,
    /// What was sent.
    pub message: Message,
    /// Earlier messages and replies of completed turns, oldest first; empty unless the agent's settings ask for it.
    pub history: Vec<Past>,
}

impl Input {
    /// How long until the [deadline](Input::deadline_unix_ms): zero once it has passed, `None` where none is told. For a worker that would rather
    /// say less than be stopped.
    pub fn time_left(&self) -> Option<Duration> {
        let deadline = UNIX_EPOCH + Duration::from_millis(self.deadline_unix_ms?);
        Some(deadline.duration_since(SystemTime::now()).unwrap_or_default())
    }
}

/// Where a snapshot comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Origin {
    /// The run that wrote it.
    pub run_id: String,
    /// The worker that wrote it. It may have been another than this one.
    pub worker: String,
    /// That worker's version.
    pub version: u64,
}

/// One message or reply of an earlier turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Past {
    /// Who said it.
    pub role: Role,
    /// The turn that it belongs to.
    #[serde(default)]
    pub turn_id: String,
    /// What was said; in the JSON its `text` or `parts` stand beside `role`.
    #[serde(flatten)]
    pub message: Message,
}

/// Who said something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Role {
    /// Whoever talks to the agent: `"user"`.
    User,
    /// The agent, in a reply: `"agent"`.
    Agent,
    /// One that this version does not know.
    #[serde(other)]
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_from_its_text_or_its_parts() {
        let text: Message = serde_json::from_str(r#"{"text":"hi"}"#).unwrap();
        let parts: Message = serde_json::from_str(r#"{"parts":[{"type":"text","text":"hi"}]}"#).unwrap();
        assert_eq!(text, parts);
        assert_eq!(serde_json::to_string(&parts).unwrap(), r#"{"text":"hi"}"#);
    }

    #[test]
    fn a_part_of_an_unknown_kind_is_kept_as_unknown() {
        let message: Message =
            serde_json::from_str(r#"{"parts":[{"type":"hologram","x":1},{"type":"text","text":"hi"}]}"#).unwrap();
        assert_eq!(message.parts, [Part::Unknown, Part::text("hi")]);
        assert_eq!(message.text(), "hi");
    }

    #[test]
    fn an_input_with_fields_left_out_or_added_is_read() {
        let input: Input = serde_json::from_str(
            r#"{"turn_id":"t","agent_id":"a","attempt":1,"later":true,"message":{"text":"hi"},
                "history":[{"role":"user","turn_id":"s","text":"before"},{"role":"narrator","parts":[]}]}"#,
        )
        .unwrap();
        assert_eq!(input.conversation_id, None);
        assert_eq!(input.history[0].message.text(), "before");
        assert_eq!(input.history[1].role, Role::Other);
    }
}
