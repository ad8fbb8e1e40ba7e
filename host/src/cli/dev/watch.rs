//! Notices that a file has changed, by its time and length. Polling works on every file system, and a compiler's output changes seldom.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How often files are looked at.
pub const INTERVAL: Duration = Duration::from_millis(500);

/// What tells one content of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    len: u64,
}

/// A file that is followed.
#[derive(Debug, Clone)]
pub struct Watched {
    path: PathBuf,
    deployed: Option<Stamp>,
    /// Seen once; it counts when it is still the same at the next look: a linker writes in many steps.
    settling: Option<Stamp>,
}

impl Watched {
    /// Follows `path`.
    pub fn new(path: PathBuf) -> Watched {
        Watched { path, deployed: None, settling: None }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is there now is deployed. To be said before the file is read: a change while it is read is noticed after.
    pub fn deployed(&mut self) {
        self.deployed = self.stamp();
    }

    /// Whether it has changed and is whole. Says so once for each change.
    pub fn changed(&mut self) -> bool {
        let now = self.stamp();
        self.look(now)
    }

    fn look(&mut self, now: Option<Stamp>) -> bool {
        let settled = now.is_some() && now == self.settling;
        // One that is gone is being replaced; one that is empty is being written.
        self.settling = now.filter(|stamp| Some(*stamp) != self.deployed && stamp.len > 0 && !settled);
        if settled {
            self.deployed = now;
        }
        settled
    }

    fn stamp(&self) -> Option<Stamp> {
        let meta = std::fs::metadata(&self.path).ok().filter(std::fs::Metadata::is_file)?;
        Some(Stamp { modified: meta.modified().ok()?, len: meta.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(second: u64, len: u64) -> Option<Stamp> {
        Some(Stamp { modified: SystemTime::UNIX_EPOCH + Duration::from_secs(second), len })
    }

    fn watched() -> Watched {
        Watched { path: "w.wasm".into(), deployed: stamp(1, 10), settling: None }
    }

    #[test]
    fn a_change_is_told_once_when_it_has_settled() {
        let mut file = watched();
        assert!(!file.look(stamp(1, 10)), "nothing has changed");
        assert!(!file.look(stamp(2, 4)), "it may still be being written");
        assert!(!file.look(stamp(2, 20)), "it was");
        assert!(file.look(stamp(2, 20)));
        assert!(!file.look(stamp(2, 20)), "it is deployed");
    }

    #[test]
    fn a_file_that_is_gone_or_empty_is_being_replaced() {
        let mut file = watched();
        for now in [None, None, stamp(2, 0), stamp(2, 0)] {
            assert!(!file.look(now));
        }
        assert!(!file.look(stamp(3, 10)));
        assert!(file.look(stamp(3, 10)));
    }

    #[test]
    fn a_file_that_comes_back_as_it_was_is_no_change() {
        let mut file = watched();
        assert!(!file.look(stamp(2, 20)));
        assert!(!file.look(stamp(1, 10)));
        assert!(!file.look(stamp(1, 10)));
    }

    #[test]
    fn a_real_file_that_is_written_again_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = Watched::new(directory.path().join("w.wasm"));
        std::fs::write(file.path(), "one").unwrap();
        file.deployed();
        assert!(!file.changed());
        std::fs::write(file.path(), "longer").unwrap();
        assert!(!file.changed());
        assert!(file.changed());
    }
}
