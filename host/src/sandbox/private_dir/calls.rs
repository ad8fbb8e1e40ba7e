//! WASI's functions as a guest with a private directory meets them: quota, descriptors and paths are bounded, then wasmtime-wasi's own
//! function is called. `transfer.rs` has those that move bytes.
//!
//! Over quota is `dquot`, before anything has happened; too many descriptors is `mfile`. `fd_allocate` is not here: wasmtime-wasi refuses it
//! (`notsup`). What only frees (`path_unlink_file`, `path_remove_directory`, `path_rename` over something) is never refused.
//!
//! A count that goes down is believed only when the path names plainly what was looked at; otherwise the account is in doubt and the tree is
//! counted again before anything is refused.

use wasmtime::{AsContextMut as _, Caller, Linker};
use wasmtime_wasi::p1::types::{Errno, Fd, Filestat, Filetype, Lookupflags};
use wasmtime_wasi::p1::wasi_snapshot_preview1::{self as abi, WasiSnapshotPreview1 as _};
use wasmtime_wasi::p1::{WasiP1Ctx, types};
use wiggle::{GuestError, GuestMemory, GuestPtr};

use super::account::Growth;
use super::{Open, PrivateDir};
use crate::sandbox::guest::Guest;
use crate::sandbox::host_calls;

const WASI: &str = "wasi_snapshot_preview1";

/// What Linux takes, too. Without it, a path of megabytes would be walked component by component where the system offers no other way.
const PATH_BYTES_MAX: u32 = 4096;

const SUCCESS: i32 = 0;

const FOLLOW: i32 = Lookupflags::SYMLINK_FOLLOW.bits() as i32;
const CREAT: i32 = types::Oflags::CREAT.bits() as i32;
const TRUNC: i32 = types::Oflags::TRUNC.bits() as i32;
const APPEND: i32 = types::Fdflags::APPEND.bits() as i32;

const A_NAME: Growth = Growth { bytes: 0, files: 1 };

/// An errno for the guest, or its end.
pub(super) type Answer = wasmtime::Result<i32>;

/// One call of a guest that has a directory.
pub(super) struct Call<'c, 'm> {
    pub(super) wasi: &'c mut WasiP1Ctx,
    pub(super) memory: &'c mut GuestMemory<'m>,
    pub(super) dir: &'c mut PrivateDir,
}

macro_rules! stand_before {
    ($linker:ident: $($name:ident($($arg:ident: $ty:ty),*);)*) => {$(
        $linker.func_wrap_async(
            WASI,
            stringify!($name),
            |mut caller: Caller<'_, Guest>, ($($arg,)*): ($($ty,)*)| {
                Box::new(async move {
                    let (mut memory, guest) = enter(&mut caller)?;
                    let (wasi, memory) = (&mut guest.wasi, &mut memory);
                    match &mut guest.directory {
                        None => abi::$name(wasi, memory, $($arg),*).await,
                        Some(dir) => Call { wasi, memory, dir }.$name($($arg),*).await,
                    }
                })
            },
        )?;
    )*};
}

/// Puts ours before wasmtime-wasi's.
pub(in crate::sandbox) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    stand_before! { linker:
        fd_close(fd: i32);
        fd_renumber(from: i32, to: i32);
        fd_read(fd: i32, iovs: i32, count: i32, read: i32);
        fd_pread(fd: i32, iovs: i32, count: i32, at: i64, read: i32);
        fd_write(fd: i32, iovs: i32, count: i32, written: i32);
        fd_pwrite(fd: i32, iovs: i32, count: i32, at: i64, written: i32);
        fd_filestat_set_size(fd: i32, size: i64);
        path_open(fd: i32, lookup: i32, path: i32, len: i32, oflags: i32, rights: i64, inherited: i64, fdflags: i32, opened: i32);
        path_create_directory(fd: i32, path: i32, len: i32);
        path_remove_directory(fd: i32, path: i32, len: i32);
        path_unlink_file(fd: i32, path: i32, len: i32);
        path_rename(fd: i32, path: i32, len: i32, new_fd: i32, new_path: i32, new_len: i32);
        path_link(fd: i32, lookup: i32, path: i32, len: i32, new_fd: i32, new_path: i32, new_len: i32);
        path_symlink(target: i32, target_len: i32, fd: i32, path: i32, len: i32);
        path_readlink(fd: i32, path: i32, len: i32, buffer: i32, buffer_len: i32, read: i32);
        path_filestat_get(fd: i32, lookup: i32, path: i32, len: i32, stat: i32);
        path_filestat_set_times(fd: i32, lookup: i32, path: i32, len: i32, accessed: i64, modified: i64, flags: i32);
    }
    linker.func_wrap(WASI, "fd_fdstat_set_flags", |mut caller: Caller<'_, Guest>, fd: i32, flags: i32| -> Answer {
        let (mut memory, guest) = enter(&mut caller)?;
        let answer = abi::fd_fdstat_set_flags(&mut guest.wasi, &mut memory, fd, flags)?;
        if let Some(open) = guest.directory.as_mut().and_then(|dir| dir.open.get_mut(&fd.cast_unsigned()))
            && answer == SUCCESS
        {
            open.append = flags & APPEND != 0;
        }
        Ok(answer)
    })?;
    linker.allow_shadowing(false);
    Ok(())
}

/// As wasmtime-wasi's own functions begin.
fn enter<'a>(caller: &'a mut Caller<'_, Guest>) -> wasmtime::Result<(GuestMemory<'a>, &'a mut Guest)> {
    let fuel = caller.as_context_mut().hostcall_fuel();
    let (memory, guest) = host_calls::view(caller)?;
    guest.wasi.set_hostcall_fuel(fuel);
    Ok((GuestMemory::Unshared(memory), guest))
}

pub(super) fn refuse(errno: Errno) -> Answer {
    Ok(errno as i32)
}

/// A pointer that leads nowhere, or bytes that are no text: as wasmtime-wasi answers it.
pub(super) fn fault(error: GuestError) -> Answer {
    match types::Error::from(error).downcast() {
        Ok(errno) => refuse(errno),
        Err(end) => Err(end),
    }
}

fn too_long(len: i32) -> bool {
    len.cast_unsigned() > PATH_BYTES_MAX
}

pub(super) fn descriptor(fd: i32) -> Fd {
    Fd::from(fd.cast_unsigned())
}

impl Call<'_, '_> {
    async fn fd_close(self, fd: i32) -> Answer {
        let answer = abi::fd_close(self.wasi, self.memory, fd).await?;
        if answer == SUCCESS {
            self.dir.open.remove(&fd.cast_unsigned());
        }
        Ok(answer)
    }

    async fn fd_renumber(self, from: i32, to: i32) -> Answer {
        let answer = abi::fd_renumber(self.wasi, self.memory, from, to).await?;
        if answer == SUCCESS && from != to {
            self.dir.open.remove(&to.cast_unsigned());
            if let Some(open) = self.dir.open.remove(&from.cast_unsigned()) {
                self.dir.open.insert(to.cast_unsigned(), open);
            }
        }
        Ok(answer)
    }

    async fn fd_filestat_set_size(self, fd: i32, size: i64) -> Answer {
        let Some(file) = self.dir.regular(fd).map(|open| open.file.clone()) else {
            return abi::fd_filestat_set_size(self.wasi, self.memory, fd, size).await;
        };
        let Ok(before) = file.metadata().map(|file| file.len()) else { return refuse(Errno::Io) };
        let growth = Growth { bytes: size.cast_unsigned().saturating_sub(before), files: 0 };
        if !self.dir.admit(growth).await {
            return refuse(Errno::Dquot);
        }
        let answer = abi::fd_filestat_set_size(self.wasi, self.memory, fd, size).await?;
        self.dir.settle(&file, before, growth);
        Ok(answer)
    }

    #[allow(clippy::too_many_arguments)]
    async fn path_open(
        mut self,
        fd: i32,
        lookup: i32,
        path: i32,
        len: i32,
        oflags: i32,
        rights: i64,
        inherited: i64,
        fdflags: i32,
        opened: i32,
    ) -> Answer {
        if too_long(len) {
            return refuse(Errno::Nametoolong);
        }
        if self.dir.open.len() >= self.dir.open_max {
            return refuse(Errno::Mfile);
        }
        let (creates, truncates) = (oflags & CREAT != 0, oflags & TRUNC != 0);
        let before = match creates || truncates {
            true => self.stat(fd, lookup & FOLLOW != 0, path, len).await?,
            false => None,
        };
        let makes = creates && before.is_none();
        if makes && !self.dir.admit(A_NAME).await {
            return refuse(Errno::Dquot);
        }
        // Asking for anything makes wasmtime-wasi fill its table.
        let _ = self.wasi.fd_prestat_get(self.memory, descriptor(fd));
        self.dir.note_given(self.wasi);
        let answer =
            abi::path_open(self.wasi, self.memory, fd, lookup, path, len, oflags, rights, inherited, fdflags, opened)
                .await?;
        if answer != SUCCESS {
            // It may have been made before the rest failed.
            if makes {
                self.dir.account.grew(A_NAME);
            }
            if makes || truncates {
                self.dir.account.doubt();
            }
            return Ok(answer);
        }
        let number = match self.memory.read(GuestPtr::<u32>::new(opened.cast_unsigned())) {
            Ok(number) => number,
            Err(error) => return fault(error),
        };
        self.dir.note_opened(self.wasi, number, fdflags & APPEND != 0)?;
        if makes {
            self.dir.account.grew(A_NAME);
        }
        if let (true, Some(before)) = (truncates, before.filter(|before| before.size > 0)) {
            let now = self.wasi.fd_filestat_get(self.memory, Fd::from(number)).await;
            match now {
                Ok(now) if now.ino == before.ino => self.dir.account.resized(before.size, now.size),
                _ => self.dir.account.doubt(),
            }
        }
        Ok(answer)
    }

    async fn path_create_directory(self, fd: i32, path: i32, len: i32) -> Answer {
        if too_long(len) {
            return refuse(Errno::Nametoolong);
        }
        if !self.dir.admit(A_NAME).await {
            return refuse(Errno::Dquot);
        }
        let answer = abi::path_create_directory(self.wasi, self.memory, fd, path, len).await?;
        if answer == SUCCESS {
            self.dir.account.grew(A_NAME);
        }
        Ok(answer)
    }

    async fn path_remove_directory(self, fd: i32, path: i32, len: i32) -> Answer {
        if too_long(len) {
            return refuse(Errno::Nametoolong);
        }
        let answer = abi::path_remove_directory(self.wasi, self.memory, fd, path, len).await?;
        if answer == SUCCESS {
            self.dir.account.lost(0);
        }
        Ok(answer)
    }

    async fn path_unlink_file(mut self, fd: i32, path: i32, len: i32) -> Answer {
        if too_long(len) {
            return refuse(Errno::Nametoolong);
        }
        let before = self.stat(fd, false, path, len).await?;
        let answer = abi::path_unlink_file(self.wasi, self.memory, fd, path, len).await?;
        if answer == SUCCESS {
            let plain = self.names_plainly(path, len);
            self.dir.unnamed(before.filter(|_| plain));
        }
        Ok(answer)
    }

    async fn path_rename(mut self, fd: i32, path: i32, len: i32, new_fd: i32, new_path: i32, new_len: i32) -> Answer {
        if too_long(len) || too_long(new_len) {
            return refuse(Errno::Nametoolong);
        }
        let moved = self.stat(fd, false, path, len).await?;
        let replaced = self.stat(new_fd, false, new_path, new_len).await?;
        let answer = abi::path_rename(self.wasi, self.memory, fd, path, len, new_fd, new_path, new_len).await?;
        if answer != SUCCESS {
            return Ok(answer);
        }
        let plain = self.names_plainly(path, len) && self.names_plainly(new_path, new_len);
        match (moved, replaced) {
            (Some(moved), Some(replaced)) if plain => {
                // Two names of one file: nothing has happened.
                if moved.ino != replaced.ino {
                    self.dir.unnamed(Some(replaced));
                }
            }
            (Some(_), None) if plain => {}
            _ => {
                self.dir.nameless = true;
                self.dir.account.doubt();
            }
        }
        Ok(answer)
    }

    #[allow(clippy::too_many_arguments)]
    async fn path_link(
        self,
        fd: i32,
        lookup: i32,
        path: i32,
        len: i32,
        new_fd: i32,
        new_path: i32,
        new_len: i32,
    ) -> Answer {
        if too_long(len) || too_long(new_len) {
            return refuse(Errno::Nametoolong);
        }
        if !self.dir.admit(A_NAME).await {
            return refuse(Errno::Dquot);
        }
        let answer = abi::path_link(self.wasi, self.memory, fd, lookup, path, len, new_fd, new_path, new_len).await?;
        if answer == SUCCESS {
            self.dir.account.grew(A_NAME);
        }
        Ok(answer)
    }

    async fn path_symlink(self, target: i32, target_len: i32, fd: i32, path: i32, len: i32) -> Answer {
        if too_long(target_len) || too_long(len) {
            return refuse(Errno::Nametoolong);
        }
        let growth = Growth { bytes: u64::from(target_len.cast_unsigned()), files: 1 };
        if !self.dir.admit(growth).await {
            return refuse(Errno::Dquot);
        }
        let answer = abi::path_symlink(self.wasi, self.memory, target, target_len, fd, path, len).await?;
        if answer == SUCCESS {
            self.dir.account.grew(growth);
        }
        Ok(answer)
    }

    async fn path_readlink(self, fd: i32, path: i32, len: i32, buffer: i32, buffer_len: i32, read: i32) -> Answer {
        if too_long(len) {
            return refuse(Errno::Nametoolong);
        }
        abi::path_readlink(self.wasi, self.memory, fd, path, len, buffer, buffer_len, read).await
    }

    async fn path_filestat_get(self, fd: i32, lookup: i32, path: i32, len: i32, stat: i32) -> Answer {
        if too_long(len) {
            return refuse(Errno::Nametoolong);
        }
        abi::path_filestat_get(self.wasi, self.memory, fd, lookup, path, len, stat).await
    }

    #[allow(clippy::too_many_arguments)]
    async fn path_filestat_set_times(
        self,
        fd: i32,
        lookup: i32,
        path: i32,
        len: i32,
        accessed: i64,
        modified: i64,
        flags: i32,
    ) -> Answer {
        if too_long(len) {
            return refuse(Errno::Nametoolong);
        }
        abi::path_filestat_set_times(self.wasi, self.memory, fd, lookup, path, len, accessed, modified, flags).await
    }

    /// What a path names; `None` when it names nothing, or cannot be looked at.
    async fn stat(&mut self, fd: i32, follow: bool, path: i32, len: i32) -> wasmtime::Result<Option<Filestat>> {
        let lookup = if follow { Lookupflags::SYMLINK_FOLLOW } else { Lookupflags::empty() };
        let path = GuestPtr::<str>::new((path.cast_unsigned(), len.cast_unsigned()));
        match self.wasi.path_filestat_get(self.memory, descriptor(fd), lookup, path).await {
            Ok(stat) => Ok(Some(stat)),
            Err(error) => error.downcast().map(|_errno| None),
        }
    }

    /// Whether a path ends in the name of what it means: with a slash or a dot at its end, it is read in one way by one call and in another by
    /// the next.
    fn names_plainly(&self, path: i32, len: i32) -> bool {
        let path = GuestPtr::<str>::new((path.cast_unsigned(), len.cast_unsigned()));
        self.memory.as_cow_str(path).is_ok_and(|path| !matches!(path.rsplit('/').next(), None | Some("" | "." | "..")))
    }
}

impl PrivateDir {
    /// A file that a call was to make larger or smaller: what has become of it.
    pub(super) fn settle(&mut self, file: &std::fs::File, before: u64, growth: Growth) {
        use std::os::unix::fs::MetadataExt as _;
        match file.metadata() {
            Ok(now) if now.nlink() > 0 => self.account.resized(before, now.len()),
            // Without a name, it is not in the count.
            Ok(_) => {}
            Err(_) => {
                self.account.grew(growth);
                self.account.doubt();
            }
        }
    }

    /// A name is gone; `what` had it, if that is certain.
    fn unnamed(&mut self, what: Option<Filestat>) {
        self.nameless |= self.open.values().any(|open: &Open| open.regular);
        match what {
            Some(what) if what.filetype == Filetype::Directory || what.nlink > 1 => self.account.lost(0),
            Some(what) => self.account.lost(what.size),
            None => self.account.doubt(),
        }
    }
}
