//! A tree of files on the host: how much it holds, and its removal.
//!
//! A guest nests directories as deep as its quota has entries, far deeper than one path can name. Both walks go from directory to directory by
//! descriptor, hold two of them at a time, do not recurse and follow no link. Nobody else may change the tree meanwhile. They block.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// What a tree holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Logical sizes of its files and of the targets of its symbolic links; a file of several names once.
    pub bytes: u64,
    /// Its files, directories and links; every name counts.
    pub files: u64,
}

/// Counts what is below `root`.
pub fn measure(root: impl AsFd) -> io::Result<Held> {
    let (mut held, mut seen) = (Held::default(), HashSet::new());
    let mut here = open(root, c".")?;
    let mut levels = vec![count(&here, &mut held, &mut seen)?];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.pop() {
            here = open(&here, &name)?;
            levels.push(count(&here, &mut held, &mut seen)?);
        } else {
            levels.pop();
            if !levels.is_empty() {
                here = open(&here, c"..")?;
            }
        }
    }
    Ok(held)
}

/// Adds the entries of one directory to `held`; answers its directories.
fn count(here: &OwnedFd, held: &mut Held, seen: &mut HashSet<(u64, u64)>) -> io::Result<Vec<CString>> {
    let mut directories = Vec::new();
    for name in names(here)? {
        let stat = match rustix::fs::statat(here, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Only where somebody else works in the directory, too: an author's own.
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error.into()),
        };
        held.files += 1;
        #[allow(clippy::unnecessary_cast, reason = "their widths differ between systems")]
        let (names, identity) = (stat.st_nlink as u64, (stat.st_dev as u64, stat.st_ino as u64));
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => directories.push(name),
            FileType::RegularFile | FileType::Symlink if names < 2 || seen.insert(identity) => {
                held.bytes = held.bytes.saturating_add(u64::try_from(stat.st_size).unwrap_or(0));
            }
            _ => {}
        }
    }
    Ok(directories)
}

/// Removes `root` and what is below it. That it is not there is fine.
pub fn remove(root: &Path) -> io::Result<()> {
    let mut here = match open(CWD, root) {
        Ok(here) => here,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut above = Vec::new();
    loop {
        if let Some(full) = clear(&here)? {
            here = open(&here, &full)?;
            above.push(full);
        } else if let Some(empty) = above.pop() {
            here = open(&here, c"..")?;
            rustix::fs::unlinkat(&here, &empty, AtFlags::REMOVEDIR)?;
        } else {
            return std::fs::remove_dir(root);
        }
    }
}

/// Removes what it can of one directory; the first of its directories that is not empty.
fn clear(here: &OwnedFd) -> io::Result<Option<CString>> {
    for name in names(here)? {
        match rustix::fs::unlinkat(here, &name, AtFlags::REMOVEDIR) {
            Ok(()) => continue,
            Err(Errno::NOTEMPTY | Errno::EXIST) => return Ok(Some(name)),
            Err(Errno::NOTDIR) => {}
            Err(error) => return Err(error.into()),
        }
        rustix::fs::unlinkat(here, &name, AtFlags::empty())?;
    }
    Ok(None)
}

fn names(here: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(here)? {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            names.push(CStr::to_owned(entry.file_name()));
        }
    }
    Ok(names)
}

fn open(from: impl AsFd, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(from, name, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use super::*;

    fn measured(root: &Path) -> Held {
        measure(File::open(root).unwrap()).unwrap()
    }

    #[test]
    fn a_tree_is_counted_by_names_and_its_files_by_contents() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        assert_eq!(measured(root.path()), Held::default());
        fs::write(path("a"), "12345").unwrap();
        fs::create_dir_all(path("d/e")).unwrap();
        fs::write(path("d/e/b"), "123").unwrap();
        symlink("nowhere", path("link")).unwrap();
        fs::hard_link(path("a"), path("d/again")).unwrap();
        assert_eq!(measured(root.path()), Held { bytes: 5 + 3 + 7, files: 6 });
        File::create(path("sparse")).unwrap().set_len(1 << 30).unwrap();
        assert_eq!(measured(root.path()).bytes, 15 + (1 << 30), "logical sizes, not blocks");
    }

    #[test]
    fn no_link_is_followed_out_of_the_tree() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("theirs"), "much more than a link").unwrap();
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree");
        fs::create_dir(&tree).unwrap();
        symlink(outside.path(), tree.join("out")).unwrap();
        assert_eq!(measured(&tree).files, 1);
        remove(&tree).unwrap();
        assert!(outside.path().join("theirs").exists());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_counted_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let name = CString::new("x".repeat(200)).unwrap();
        let mut here = open(CWD, &tree).unwrap();
        for _ in 0..500 {
            rustix::fs::mkdirat(&here, &name, Mode::RWXU).unwrap();
            here = open(&here, &name).unwrap();
        }
        rustix::fs::openat(&here, c"deep", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        drop(here);
        assert_eq!(measured(&tree).files, 501);
        remove(&tree).unwrap();
        assert!(!tree.exists());
        remove(&tree).unwrap();
    }

    #[test]
    fn a_wide_tree_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree");
        for number in 0..300 {
            fs::create_dir_all(tree.join(format!("{number}/in"))).unwrap();
            fs::write(tree.join(format!("{number}/in/file")), "x").unwrap();
        }
        remove(&tree).unwrap();
        assert!(!tree.exists());
    }
}
