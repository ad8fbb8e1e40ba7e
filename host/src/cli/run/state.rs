//! The file that stands for a conversation's snapshot. Replaced whole, or not at all.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;

use super::super::{CliError, Result};

/// A state file, read.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    bytes: Option<Bytes>,
}

impl StateFile {
    /// Reads it; one that does not exist is the beginning of a conversation.
    pub fn open(path: &Path, bytes_max: usize) -> Result<StateFile> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => Some(Bytes::from(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(CliError::usage(format!("cannot read {}: {error}", path.display()))),
        };
        let len = bytes.as_ref().map_or(0, Bytes::len);
        if len > bytes_max {
            return Err(CliError::usage(format!(
                "{} has {len} bytes; a snapshot has at most {bytes_max}",
                path.display()
            )));
        }
        Ok(StateFile { path: path.to_owned(), bytes })
    }

    /// What the turn starts from.
    pub fn bytes(&self) -> Option<Bytes> {
        self.bytes.clone()
    }

    /// Replaces it.
    pub fn write(&self, bytes: &[u8]) -> Result {
        let write = || -> std::io::Result<()> {
            let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let mut file = tempfile::NamedTempFile::new_in(directory.unwrap_or(Path::new(".")))?;
            file.write_all(bytes)?;
            file.as_file().sync_all()?;
            file.persist(&self.path)?;
            Ok(())
        };
        Ok(write().with_context(|| format!("cannot write the state to {}", self.path.display()))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_and_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let state = StateFile::open(&path, 4).unwrap();
        assert_eq!(state.bytes(), None);
        state.write(b"1234").unwrap();
        assert_eq!(StateFile::open(&path, 4).unwrap().bytes().as_deref(), Some(&b"1234"[..]));
        assert!(StateFile::open(&path, 3).is_err());
        assert!(StateFile::open(directory.path(), 3).is_err(), "a directory is no state");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
    }
}
