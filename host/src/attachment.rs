//! Files beside a message: what names them, what they are, how they are cut. Pure.

use std::fmt;
use std::str::FromStr;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::ids::InvalidId;

/// The size of a stored piece; only the last is smaller.
pub const PIECE_BYTES: usize = 256 * 1024;

/// The SHA-256 of an attachment's bytes: `sha256-` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^sha256-[0-9a-f]{64}$")]
pub struct AttachmentId(pub [u8; 32]);

impl AttachmentId {
    /// How long it is as text.
    pub const TEXT_BYTES: usize = PREFIX.len() + 64;

    /// From what a store keeps.
    pub fn from_slice(digest: &[u8]) -> Option<AttachmentId> {
        digest.try_into().ok().map(AttachmentId)
    }
}

const PREFIX: &str = "sha256-";

impl FromStr for AttachmentId {
    type Err = InvalidId;
    /// Lower-case alone: one attachment has one URL.
    fn from_str(text: &str) -> Result<AttachmentId, InvalidId> {
        let mut digest = [0; 32];
        let digits = text.strip_prefix(PREFIX).filter(|digits| !digits.bytes().any(|b| b.is_ascii_uppercase()));
        match digits.map(|digits| hex::decode_to_slice(digits, &mut digest)) {
            Some(Ok(())) => Ok(AttachmentId(digest)),
            _ => Err(InvalidId::of_attachment()),
        }
    }
}

impl TryFrom<String> for AttachmentId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<AttachmentId, InvalidId> {
        text.parse()
    }
}

impl From<AttachmentId> for String {
    fn from(id: AttachmentId) -> String {
        id.to_string()
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", hex::encode(self.0))
    }
}

impl fmt::Debug for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An attachment, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Which.
    pub id: AttachmentId,
    /// As whoever uploaded it said.
    pub media_type: String,
    /// How many bytes it has.
    pub bytes: u64,
}

/// An attachment's bytes as they are stored, made as they come: all of them are in memory once.
#[derive(Debug, Default)]
pub struct Pieces {
    whole: Vec<Bytes>,
    last: BytesMut,
    digest: Sha256,
    bytes: u64,
}

impl Pieces {
    /// What comes next of it.
    pub fn push(&mut self, mut more: &[u8]) {
        self.digest.update(more);
        self.bytes += more.len() as u64;
        while !more.is_empty() {
            let (now, later) = more.split_at(more.len().min(PIECE_BYTES - self.last.len()));
            self.last.extend_from_slice(now);
            if self.last.len() == PIECE_BYTES {
                self.whole.push(self.last.split().freeze());
            }
            more = later;
        }
    }

    /// What it is, and its pieces.
    pub fn finish(mut self, media_type: String) -> (Attachment, Vec<Bytes>) {
        if !self.last.is_empty() {
            self.whole.push(self.last.freeze());
        }
        let id = AttachmentId(self.digest.finalize().into());
        (Attachment { id, media_type, bytes: self.bytes }, self.whole)
    }
}

/// Whether this is a media type, as far as anybody here cares: `image/png`, with parameters.
pub fn is_media_type(text: &str) -> bool {
    text.len() <= 127
        && text.split_once('/').is_some_and(|(kind, name)| !kind.is_empty() && !name.is_empty())
        && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
}

/// A file's name means nothing here, and shall mean nothing to whoever takes it for a path.
pub fn is_file_name(text: &str) -> bool {
    text.chars().count() <= FILE_NAME_CHARS_MAX
        && text.chars().any(|c| c != '.')
        && !text.chars().any(|c| c.is_control() || c == '/' || c == '\\')
}

/// Characters of a file's name.
pub const FILE_NAME_CHARS_MAX: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn o4_an_id_has_one_spelling() {
        let id = AttachmentId([0xab; 32]);
        let text = id.to_string();
        assert_eq!((text.parse(), text.len()), (Ok(id), AttachmentId::TEXT_BYTES));
        for bad in [
            "",
            "sha256-",
            "sha256-ab",
            &text.to_uppercase(),
            &text.replace("ab", "AB"),
            &format!("{text}0"),
            &text[7..],
            "../etc",
        ] {
            assert!(bad.parse::<AttachmentId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pieces_are_the_bytes_however_they_came() {
        let bytes: Vec<u8> = (0..PIECE_BYTES * 2 + 5).map(|n| n as u8).collect();
        for step in [1_000_003, PIECE_BYTES, 65_537] {
            let mut pieces = Pieces::default();
            bytes.chunks(step).for_each(|chunk| pieces.push(chunk));
            let (attachment, pieces) = pieces.finish("a/b".to_owned());
            assert_eq!(attachment.bytes, bytes.len() as u64);
            assert_eq!(attachment.id.0[..], Sha256::digest(&bytes)[..]);
            assert_eq!(pieces.iter().map(Bytes::len).collect::<Vec<_>>(), [PIECE_BYTES, PIECE_BYTES, 5]);
            assert_eq!(pieces.concat(), bytes);
        }
        assert!(Pieces::default().finish("a/b".to_owned()).1.is_empty());
    }

    #[test]
    fn a_name_is_no_path() {
        for good in ["report.pdf", ".env", "Übersicht 1.txt", "a..b"] {
            assert!(is_file_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "..\\b", "a\nb", "a\0", "\u{85}", &"x".repeat(201)] {
            assert!(!is_file_name(bad), "{bad:?}");
        }
    }
}
