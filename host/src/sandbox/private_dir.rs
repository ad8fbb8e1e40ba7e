//! A guest's private directory: the one directory that it may see, preopened as `/`, and the count of what it holds.
//!
//! Whoever makes the job opens it ([`PrivateDir::open`]) and has seen to it that nobody else uses it meanwhile; on that the count rests. That
//! paths and links do not lead out of it is wasmtime-wasi's doing, which resolves every path below the directory's descriptor. The quota is
//! ours: `calls.rs` and `transfer.rs` stand before every function of WASI that can make a directory grow, and refuse before anything has
//! happened. A guest without a directory passes them by.
//!
//! File operations run on blocking threads and cannot be interrupted. When a guest is left in the middle of one, [`Leaving`] waits for its end,
//! so that whoever has awaited the guest's end knows that it writes nothing any more.

mod account;
mod calls;
mod transfer;
pub mod tree;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use wasmtime_wasi::filesystem::Descriptor;
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::runtime::spawn_blocking;
use wasmtime_wasi::{FsPerms, WasiCtxBuilder, WasiView as _};

pub use account::Quota;
use account::{Account, Growth, Over};
pub(super) use calls::add_to_linker;

use crate::limits::Limits;

/// Where a guest finds it. Programs that name their files relatively find them there, too: it is the working directory of C and Rust, and of
/// Go, which takes the first directory that it is given.
const GUEST_PATH: &str = "/";

/// Descriptors that a guest has from the start: its streams and its directory.
const FDS_GIVEN: usize = 4;

/// How often it is looked whether an operation that cannot be interrupted has ended.
const LEAVE_POLL: Duration = Duration::from_millis(1);

impl From<&Limits> for Quota {
    fn from(limits: &Limits) -> Quota {
        Quota { bytes_max: limits.private_dir_bytes_max, files_max: limits.private_dir_files_max }
    }
}

/// A directory that is open for one guest.
pub struct PrivateDir {
    root: Arc<File>,
    account: Account,
    /// With the directory preopened; `None` once the guest is made.
    wasi: Option<WasiCtxBuilder>,
    /// What the guest has opened, by descriptor.
    open: HashMap<u32, Open>,
    open_max: usize,
    /// wasmtime-wasi's handle of the directory itself.
    given: Option<Arc<File>>,
    /// A name was removed while files were open: some of them may have none any more.
    nameless: bool,
}

/// A file or directory that the guest has open.
struct Open {
    file: Arc<File>,
    regular: bool,
    append: bool,
}

impl PrivateDir {
    /// Opens and counts a directory of which nobody else makes use. Blocks.
    pub fn open(path: &Path, quota: Quota) -> io::Result<PrivateDir> {
        let root = Arc::new(File::open(path)?);
        let held = tree::measure(&*root)?;
        let mut wasi = WasiCtxBuilder::new();
        wasi.preopened_dir(path, GUEST_PATH, FsPerms::ReadWrite)
            .map_err(|error| io::Error::other(format!("{error:#}")))?;
        Ok(PrivateDir {
            root,
            account: Account::new(quota, held),
            wasi: Some(wasi),
            open: HashMap::new(),
            open_max: 0,
            given: None,
            nameless: false,
        })
    }

    /// What the guest's WASI is to be built from.
    pub(super) fn enter(&mut self, fds_max: usize) -> WasiCtxBuilder {
        self.open_max = fds_max.saturating_sub(FDS_GIVEN);
        self.wasi.take().unwrap_or_default()
    }

    /// To be awaited once the guest's state is dropped. `wasi` is the guest's.
    pub(super) fn leave(&self, wasi: &mut WasiP1Ctx) -> Leaving {
        Leaving(files(wasi).map(Arc::downgrade).collect())
    }

    /// A file of the guest's; `None` for anything else that a descriptor may be.
    fn regular(&self, fd: i32) -> Option<&Open> {
        self.open.get(&fd.cast_unsigned()).filter(|open| open.regular)
    }

    /// Before the guest opens anything: tells the directory's own handle from those that come.
    fn note_given(&mut self, wasi: &mut WasiP1Ctx) {
        if self.given.is_none() {
            self.given = files(wasi).next().cloned();
        }
    }

    /// After it has opened something: finds which file descriptor `fd` is.
    fn note_opened(&mut self, wasi: &mut WasiP1Ctx, fd: u32, append: bool) -> io::Result<()> {
        let known = |file: &Arc<File>| {
            self.given.iter().chain(self.open.values().map(|open| &open.file)).any(|known| Arc::ptr_eq(known, file))
        };
        let file = files(wasi).find(|file| !known(file)).cloned();
        let file = file.ok_or_else(|| io::Error::other("an opened file is not in WASI's table"))?;
        let regular = file.metadata()?.is_file();
        self.open.insert(fd, Open { file, regular, append });
        Ok(())
    }

    /// Bytes of open files that have no name any more: they go when they are closed.
    fn nameless_bytes(&self) -> u64 {
        if !self.nameless {
            return 0;
        }
        let mut seen = HashSet::new();
        let files = self.open.values().filter(|open| open.regular).filter_map(|open| open.file.metadata().ok());
        files.filter(|file| file.nlink() == 0 && seen.insert(file.ino())).map(|file| file.len()).sum()
    }

    fn admits(&self, growth: Growth) -> Result<(), Over> {
        self.account.admits(growth, self.nameless_bytes())
    }

    /// Whether the directory may grow so; counts it again before it refuses, where that may help.
    async fn admit(&mut self, growth: Growth) -> bool {
        let mut admitted = self.admits(growth);
        if admitted.is_err() && self.account.unsure() {
            let root = self.root.clone();
            match spawn_blocking(move || tree::measure(&*root)).await {
                Ok(held) => self.account.counted(held),
                Err(error) => tracing::warn!(%error, "a private directory could not be counted"),
            }
            admitted = self.admits(growth);
        }
        if let Err(over) = admitted {
            metrics::counter!("turnhouse_private_dir_refusals_total", "limit" => over.as_str()).increment(1);
        }
        admitted.is_ok()
    }
}

/// Every file and directory that a guest's WASI has open.
fn files(wasi: &mut WasiP1Ctx) -> impl Iterator<Item = &Arc<File>> {
    wasi.ctx().table.iter_mut().filter_map(|entry| match (*entry).downcast_ref::<Descriptor>()? {
        Descriptor::File(file) => Some(&file.file),
        Descriptor::Dir(dir) => Some(&dir.dir),
    })
}

/// Files of a guest that is gone. An operation that has begun holds its file until it has ended, and nothing else does.
#[derive(Default)]
pub(super) struct Leaving(Vec<Weak<File>>);

impl Leaving {
    /// Resolves when nothing is done to them any more.
    pub(super) async fn done(self) {
        while self.0.iter().any(|file| file.strong_count() > 0) {
            tokio::time::sleep(LEAVE_POLL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guest_has_left_once_no_operation_holds_a_file_of_its() {
        let (one, other) = (Arc::new(tempfile::tempfile().unwrap()), Arc::new(tempfile::tempfile().unwrap()));
        let mut done = Box::pin(Leaving([&one, &other].map(Arc::downgrade).into()).done());
        for operation in [one, other] {
            assert!(tokio::time::timeout(LEAVE_POLL * 20, &mut done).await.is_err());
            drop(operation);
        }
        done.await;
        Leaving::default().done().await;
    }
}
