//! Attachments: files beside the message, read from the host as far as the worker wants them.

use std::io;
use std::marker::PhantomData;

use crate::error::check;
use crate::{Error, sys};

/// A file beside the message, to be read. [`Turn::attachment`](crate::Turn::attachment) opens one.
///
/// Each read is a call to the host, which fills the buffer as far as there is more: read with a large one, or through a [`std::io::BufReader`].
///
/// ```
/// use std::io::{BufRead, BufReader};
/// use turnhouse_guest::{Part, Turn, WorkerResult, testing};
///
/// fn worker(turn: Turn) -> WorkerResult {
///     let mut lines = 0;
///     for part in &turn.input()?.message.parts {
///         if let Part::Attachment { attachment_id, .. } = part {
///             lines += BufReader::new(turn.attachment(attachment_id)?).lines().count();
///         }
///     }
///     Ok(turn.say(&format!("{lines} lines"))?)
/// }
///
/// let report = testing::turn("count").attachment("a.txt", "text/plain", "one\ntwo\n").run(worker);
/// assert_eq!(report.text(), "2 lines");
/// ```
#[derive(Debug)]
pub struct Attachment {
    id: String,
    at: u64,
    size: u64,
    _this_thread: PhantomData<*const ()>,
}

impl Attachment {
    pub(crate) fn open(id: &str) -> Result<Attachment, Error> {
        let size = check(sys::attachment_read(id, 0, &mut []))?;
        Ok(Attachment { id: id.to_owned(), at: 0, size: size as u64, _this_thread: PhantomData })
    }

    /// How many bytes it has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All that is left of it.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when the turn has had more read than it may, [`Error::Io`] when the host cannot read it.
    pub fn read_all(&mut self) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; usize::try_from(self.size.saturating_sub(self.at)).map_err(|_| Error::TooBig)?];
        let read = self.fill(&mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    fn fill(&mut self, into: &mut [u8]) -> Result<usize, Error> {
        let Ok(offset) = u32::try_from(self.at) else { return Ok(0) };
        if into.is_empty() {
            return Ok(0);
        }
        let left = check(sys::attachment_read(&self.id, offset, into))?;
        let read = left.min(into.len());
        self.at += read as u64;
        Ok(read)
    }
}

impl io::Read for Attachment {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.fill(into).map_err(io::Error::other)
    }
}

impl io::Seek for Attachment {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        let at = match to {
            io::SeekFrom::Start(at) => Some(at),
            io::SeekFrom::End(by) => self.size.checked_add_signed(by),
            io::SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "before the beginning"))?;
        Ok(self.at)
    }
}
