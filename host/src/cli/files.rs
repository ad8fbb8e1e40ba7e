//! Files of the command line as attachments of a message: named as a host would name them; and, where there is none, read from this process' memory.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use turnhouse::attachment::{Attachment, AttachmentId, Pieces, is_file_name};
use turnhouse::content::{Content, Part, PartsContent};
use turnhouse::sandbox::{Attachments, PieceSource};

use super::{CliError, Result};

/// Files with what a message says of them.
pub struct Files(Vec<File>);

struct File {
    name: Option<String>,
    attachment: Attachment,
    pieces: Vec<Bytes>,
}

impl Files {
    /// Reads them, each of so many bytes at most.
    pub fn read(paths: &[PathBuf], bytes_max: usize) -> Result<Files> {
        paths.iter().map(|path| read(path, bytes_max)).collect::<Result<_>>().map(Files)
    }

    /// What is uploaded of each: its media type and its bytes.
    pub fn bodies(&self) -> impl Iterator<Item = (String, Bytes)> {
        self.0.iter().map(|file| (file.attachment.media_type.clone(), file.pieces.concat().into()))
    }

    /// The message with these beside it.
    pub fn beside(&self, message: Content) -> Content {
        if self.0.is_empty() {
            return message;
        }
        let mut parts = match message {
            Content::Text(text) if text.text.is_empty() => Vec::new(),
            Content::Text(text) => vec![Part::Text { text: text.text }],
            Content::Parts(content) => content.parts,
        };
        parts.extend(
            self.0.iter().map(|file| Part::Attachment { attachment_id: file.attachment.id, name: file.name.clone() }),
        );
        Content::Parts(PartsContent { parts })
    }

    /// What the worker may read.
    pub fn attachments(self) -> Attachments {
        let known = self.0.iter().map(|file| file.attachment.clone()).collect();
        Attachments::new(known, Arc::new(self))
    }
}

#[async_trait]
impl PieceSource for Files {
    async fn piece(&self, id: AttachmentId, piece: u32) -> Option<Bytes> {
        let file = self.0.iter().find(|file| file.attachment.id == id)?;
        file.pieces.get(piece as usize).cloned()
    }
}

fn read(path: &Path, bytes_max: usize) -> Result<File> {
    let mut bytes = Vec::new();
    // One byte more than allowed tells that it is too much.
    std::fs::File::open(path)
        .and_then(|file| file.take((bytes_max as u64).saturating_add(1)).read_to_end(&mut bytes))
        .map_err(|error| CliError::usage(format!("cannot read {}: {error}", path.display())))?;
    if bytes.len() > bytes_max {
        let text = format!("{} is over the limit of an attachment, {bytes_max} bytes", path.display());
        return Err(CliError::usage(text).help("a host's limit is limits.attachment_bytes_max"));
    }
    let mut pieces = Pieces::default();
    pieces.push(&bytes);
    let (attachment, pieces) = pieces.finish(media_type(path).to_owned());
    let name = path.file_name().and_then(|name| name.to_str()).filter(|name| is_file_name(name));
    Ok(File { name: name.map(str::to_owned), attachment, pieces })
}

/// What a client would say of a file of this name; a host takes its word.
fn media_type(path: &Path) -> &'static str {
    match path.extension().and_then(|extension| extension.to_str()).unwrap_or_default() {
        "txt" | "md" | "log" => "text/plain",
        "csv" => "text/csv",
        "html" => "text/html",
        "json" => "application/json",
        "pdf" => "application/pdf",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_part_beside_the_message() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.txt");
        std::fs::write(&path, "one two").unwrap();
        let files = Files::read(std::slice::from_ref(&path), 7).unwrap();
        assert_eq!(files.bodies().collect::<Vec<_>>(), [("text/plain".to_owned(), Bytes::from_static(b"one two"))]);
        let Content::Parts(content) = files.beside(Content::text("count")) else { panic!("it has parts") };
        assert_eq!(content.parts.len(), 2);
        let Part::Attachment { attachment_id, name } = &content.parts[1] else { panic!("no attachment") };
        assert_eq!(name.as_deref(), Some("report.txt"));
        let attachment = files.attachments().get(*attachment_id).cloned().unwrap();
        assert_eq!((attachment.media_type.as_str(), attachment.bytes), ("text/plain", 7));
        assert!(Files::read(&[path], 6).is_err());
    }
}
