//! Bytes in and out of a private directory's files.
//!
//! Here wasmtime-wasi's functions are not called: they copy all that one call names at once, and refuse (`nomem`) what is more than a host
//! call may copy, so that a program which reads or writes a large file in one piece would fail. These take a piece of it, as POSIX allows;
//! every program goes on from there. The position stays wasmtime-wasi's.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use wasmtime_wasi::p1::types::{Errno, Whence};
use wasmtime_wasi::p1::wasi_snapshot_preview1::{self as abi, WasiSnapshotPreview1 as _};
use wasmtime_wasi::p2::bindings::filesystem::types::ErrorCode;
use wasmtime_wasi::runtime::spawn_blocking;
use wiggle::{GuestError, GuestPtr};

use super::account::Growth;
use super::calls::{Answer, Call, descriptor, fault, refuse};

/// At most so much is moved by one call.
const PIECE_BYTES_MAX: u32 = 1024 * 1024;

/// Buffers of one call, as on POSIX systems.
const BUFFERS_MAX: u32 = 1024;

impl Call<'_, '_> {
    pub(super) async fn fd_read(self, fd: i32, iovs: i32, count: i32, read: i32) -> Answer {
        match self.dir.regular(fd).map(|open| open.file.clone()) {
            Some(file) => self.read(fd, file, iovs, count, None, read).await,
            None => abi::fd_read(self.wasi, self.memory, fd, iovs, count, read).await,
        }
    }

    pub(super) async fn fd_pread(self, fd: i32, iovs: i32, count: i32, at: i64, read: i32) -> Answer {
        match self.dir.regular(fd).map(|open| open.file.clone()) {
            Some(file) => self.read(fd, file, iovs, count, Some(at.cast_unsigned()), read).await,
            None => abi::fd_pread(self.wasi, self.memory, fd, iovs, count, at, read).await,
        }
    }

    pub(super) async fn fd_write(self, fd: i32, iovs: i32, count: i32, written: i32) -> Answer {
        match self.dir.regular(fd).map(|open| (open.file.clone(), open.append)) {
            Some((file, append)) => self.write(fd, file, append, iovs, count, None, written).await,
            None => abi::fd_write(self.wasi, self.memory, fd, iovs, count, written).await,
        }
    }

    pub(super) async fn fd_pwrite(self, fd: i32, iovs: i32, count: i32, at: i64, written: i32) -> Answer {
        match self.dir.regular(fd).map(|open| (open.file.clone(), open.append)) {
            Some((file, append)) => self.write(fd, file, append, iovs, count, Some(at.cast_unsigned()), written).await,
            None => abi::fd_pwrite(self.wasi, self.memory, fd, iovs, count, at, written).await,
        }
    }

    async fn read(mut self, fd: i32, file: Arc<File>, iovs: i32, count: i32, at: Option<u64>, read: i32) -> Answer {
        let piece = match self.piece(iovs, count) {
            Ok(Some(piece)) => piece,
            Ok(None) => return refuse(Errno::Inval),
            Err(error) => return fault(error),
        };
        let start = match at {
            Some(at) => at,
            None => match self.position(fd) {
                Ok(position) => position,
                Err(answer) => return answer,
            },
        };
        let len = piece.len() as usize;
        let bytes = spawn_blocking(move || {
            let mut bytes = vec![0; len];
            let read = file.read_at(&mut bytes, start)?;
            bytes.truncate(read);
            io::Result::Ok(bytes)
        });
        let bytes = match bytes.await {
            Ok(bytes) => bytes,
            Err(error) => return failed(&error),
        };
        let filled = piece.get_range(0..bytes.len() as u32).expect("no more is read than asked for");
        if let Err(error) = self.memory.copy_from_slice(&bytes, filled) {
            return fault(error);
        }
        self.moved(fd, at, start, bytes.len(), read).await
    }

    #[allow(clippy::too_many_arguments)]
    async fn write(
        mut self,
        fd: i32,
        file: Arc<File>,
        append: bool,
        iovs: i32,
        count: i32,
        at: Option<u64>,
        written: i32,
    ) -> Answer {
        let bytes = match self.piece(iovs, count) {
            Ok(Some(piece)) => match self.memory.to_vec(piece) {
                Ok(bytes) => bytes,
                Err(error) => return fault(error),
            },
            Ok(None) => return refuse(Errno::Inval),
            Err(error) => return fault(error),
        };
        let size = match file.metadata() {
            Ok(file) => file.len(),
            Err(error) => return failed(&error),
        };
        let start = match (append, at) {
            // Nobody else writes to it: its end is where it is. As on Linux, a position means nothing to a file that is appended to.
            (true, _) => size,
            (false, Some(at)) => at,
            (false, None) => match self.position(fd) {
                Ok(position) => position,
                Err(answer) => return answer,
            },
        };
        let Some(end) = start.checked_add(bytes.len() as u64) else { return refuse(Errno::Fbig) };
        let growth = Growth { bytes: if bytes.is_empty() { 0 } else { end.saturating_sub(size) }, files: 0 };
        if !self.dir.admit(growth).await {
            return refuse(Errno::Dquot);
        }
        let result = {
            let file = file.clone();
            spawn_blocking(move || file.write_at(&bytes, start)).await
        };
        self.dir.settle(&file, size, growth);
        match result {
            Ok(count) => self.moved(fd, at, start, count, written).await,
            Err(error) => failed(&error),
        }
    }

    /// The first buffer with any room, as wasmtime-wasi takes it, or a part of it. `None`: more buffers than anybody may name.
    fn piece(&self, iovs: i32, count: i32) -> Result<Option<GuestPtr<[u8]>>, GuestError> {
        let count = count.cast_unsigned();
        if count > BUFFERS_MAX {
            return Ok(None);
        }
        for number in 0..count {
            let buffer = GuestPtr::<u32>::new(iovs.cast_unsigned()).add(number * 2)?;
            let (pointer, len) = (self.memory.read(buffer)?, self.memory.read(buffer.add(1)?)?);
            if len > 0 {
                let whole = GuestPtr::<u8>::new(pointer).as_array(len);
                // The whole buffer must be there, also what is not used of it.
                self.memory.as_slice(whole)?;
                return Ok(whole.get_range(0..len.min(PIECE_BYTES_MAX)));
            }
        }
        Ok(Some(GuestPtr::new((0, 0))))
    }

    fn position(&mut self, fd: i32) -> Result<u64, Answer> {
        self.wasi.fd_tell(self.memory, descriptor(fd)).map_err(|error| match error.downcast() {
            Ok(errno) => refuse(errno),
            Err(end) => Err(end),
        })
    }

    /// Moves the position, where the call has one, and tells how much was done.
    async fn moved(self, fd: i32, at: Option<u64>, start: u64, count: usize, told: i32) -> Answer {
        if at.is_none() {
            let Ok(end) = i64::try_from(start.saturating_add(count as u64)) else { return refuse(Errno::Overflow) };
            if let Err(error) = self.wasi.fd_seek(self.memory, descriptor(fd), end, Whence::Set).await {
                return error.downcast().map(|errno| errno as i32);
            }
        }
        match self.memory.write(GuestPtr::<u32>::new(told.cast_unsigned()), count as u32) {
            Ok(()) => Ok(0),
            Err(error) => fault(error),
        }
    }
}

fn failed(error: &io::Error) -> Answer {
    refuse(Errno::from(ErrorCode::from(error)))
}
