//! The turn: what a worker is given and what it may do, and the frame around its closure. Operations are in `operation.rs`.

use std::cell::OnceCell;
use std::error::Error as StdError;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{check, read_whole};
use crate::{Attachment, Error, Input, Message, Operation, Part, sys};

/// What a worker's closure returns. `?` takes every error into it, and a `&str` or `String` too: `Err("no such note")?`.
pub type WorkerResult = Result<(), Box<dyn StdError>>;

/// The longest delta that [`Turn::say`] sends in one piece, in bytes; half of what a host takes by default.
const DELTA_BYTES_MAX: usize = 32 * 1024;

/// Runs the worker's one turn. Call it once, from `main`.
///
/// An `Err` of the closure goes to the turn's log with its causes and ends the program with exit code 1: the turn has failed, nothing is saved.
///
/// Off wasm this is for trying a worker without a host: the message is read from standard input, the reply is printed, there is no state and
/// there are no operations.
pub fn run(worker: impl FnOnce(Turn) -> WorkerResult) {
    #[cfg(target_family = "wasm")]
    let result = begin_and_run(worker);
    #[cfg(not(target_family = "wasm"))]
    let result = crate::testing::run_on_stdio(worker);
    if let Err(error) = result {
        sys_log(Level::Error, &with_causes(error.as_ref()));
        std::process::exit(1);
    }
}

pub(crate) fn begin_and_run(worker: impl FnOnce(Turn) -> WorkerResult) -> WorkerResult {
    worker(Turn::begin()?)
}

/// `what: why: why that`.
pub(crate) fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(target_family = "wasm")]
fn sys_log(level: Level, line: &str) {
    sys::log(level as i32, line);
}

#[cfg(not(target_family = "wasm"))]
fn sys_log(_: Level, line: &str) {
    eprintln!("{line}");
}

/// One turn of a conversation: the message that came in, and everything that the worker may do about it.
///
/// The errors of each method are those of [`Error`]; a method that names none of its own can only fail in the ways
/// that every call to the host can ([`Error::Io`]).
#[derive(Debug)]
pub struct Turn {
    text: String,
    input: OnceCell<Input>,
    /// A turn belongs to the one thread that the host calls, and in tests to the test's thread.
    _this_thread: PhantomData<*const ()>,
}

impl Turn {
    /// Only `run` and the tests' `run` make one.
    fn begin() -> Result<Turn, Error> {
        let text = String::from_utf8(read_whole(sys::message_read)?).map_err(|_| Error::NotUtf8)?;
        Ok(Turn { text, input: OnceCell::new(), _this_thread: PhantomData })
    }

    /// The message's text. Where the message has several parts, its text parts joined; see [`input`](Turn::input) for the rest.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Everything else about the turn: its ids, attempt, deadline, dry run, the parts of the message, the agent's environment, the history. Asked of the
    /// host at the first call, kept for the next.
    ///
    /// # Errors
    /// [`Error::Json`] if the host tells it in a shape that this version cannot read.
    pub fn input(&self) -> Result<&Input, Error> {
        if let Some(input) = self.input.get() {
            return Ok(input);
        }
        let input = serde_json::from_slice(&read_whole(sys::input_read)?)?;
        Ok(self.input.get_or_init(|| input))
    }

    /// Opens an attachment of this turn's message, or of its history: a [`Part::Attachment`] has its id.
    ///
    /// # Errors
    /// [`Error::NotFound`] unless the message or the history refers to it, [`Error::Invalid`] if it is no id.
    pub fn attachment(&self, id: &str) -> Result<Attachment, Error> {
        Attachment::open(id)
    }

    /// The state that the last completed turn of this conversation saved, or `None` in its first turn and in every private turn.
    ///
    /// # Errors
    /// [`Error::Json`] if the state is not the JSON of a `T`: it was written by another worker, or an older version of this one. Letting that error
    /// end the turn is right unless you know how to migrate: it leaves the state as it was.
    pub fn state<T: DeserializeOwned>(&self) -> Result<Option<T>, Error> {
        match self.state_bytes()? {
            Some(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            None => Ok(None),
        }
    }

    /// The state as the bytes that were saved, for a worker with a format of its own.
    pub fn state_bytes(&self) -> Result<Option<Vec<u8>>, Error> {
        match read_whole(sys::snapshot_read) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Saves the state for the next turn, as JSON. It counts if and when this turn completes, with its reply; the last save wins.
    ///
    /// # Errors
    /// [`Error::TooBig`] over the host's limit (4 MiB by default): what was saved earlier in this turn stays, and the client is told by a
    /// `snapshot.rejected` event. [`Error::Json`] if the value cannot be JSON.
    pub fn save<T: Serialize + ?Sized>(&self, state: &T) -> Result<Saved, Error> {
        self.save_bytes(&serde_json::to_vec(state)?)
    }

    /// Saves the state as these bytes. Otherwise as [`save`](Turn::save).
    pub fn save_bytes(&self, state: &[u8]) -> Result<Saved, Error> {
        match check(sys::snapshot_write(state)) {
            Ok(_) => Ok(Saved::Staged),
            Err(Error::NotPermitted) => Ok(Saved::Private),
            Err(error) => Err(error),
        }
    }

    /// Streams a piece of the reply (`output.delta`). Long texts go out in pieces of up to 32 KiB, an empty one not at all.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when the turn has no events left (10 000 by default), [`Error::TooBig`] when the reply has grown over its limit.
    pub fn say(&self, text: &str) -> Result<(), Error> {
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.floor_char_boundary(DELTA_BYTES_MAX));
            check(sys::emit("output.delta", piece.as_bytes()))?;
            rest = after;
        }
        Ok(())
    }

    /// Tells the client what the worker is doing ("reading the file"). A status that changes is progress; the same one again is not.
    ///
    /// # Errors
    /// [`Error::TooBig`], [`Error::Exhausted`].
    pub fn status(&self, text: &str) -> Result<(), Error> {
        check(sys::emit("status", text.as_bytes()))?;
        Ok(())
    }

    /// Sends the client an event of the worker's own.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless the name is `x.` and 1 to 48 of `a-z`, `0-9`, `_`, `.`, `-`; [`Error::Json`], [`Error::TooBig`], [`Error::Exhausted`].
    pub fn emit<T: Serialize + ?Sized>(&self, name: &str, data: &T) -> Result<(), Error> {
        // `output.delta` and `status` are text, and have methods of their own.
        if !name.starts_with("x.") {
            return Err(Error::Invalid);
        }
        check(sys::emit(name, &serde_json::to_vec(data)?))?;
        Ok(())
    }

    /// Replies with this text, whatever was streamed before. The last reply wins.
    ///
    /// # Errors
    /// [`Error::TooBig`] over the host's limit (1 MiB by default).
    pub fn reply(&self, text: &str) -> Result<(), Error> {
        #[derive(Serialize)]
        struct Text<'a> {
            text: &'a str,
        }
        check(sys::reply(&serde_json::to_vec(&Text { text })?))?;
        Ok(())
    }

    /// Replies with parts: text, data, files. Otherwise as [`reply`](Turn::reply).
    ///
    /// # Errors
    /// [`Error::TooBig`]; [`Error::Invalid`] for malformed base64 or too many parts; [`Error::Json`] for a [`Part::Unknown`].
    pub fn reply_parts(&self, parts: impl Into<Vec<Part>>) -> Result<(), Error> {
        check(sys::reply(&serde_json::to_vec(&Message { parts: parts.into() })?))?;
        Ok(())
    }

    /// Writes a line to the turn's log, which its operator reads and its client does not. Beyond the host's limit (256 KiB by default) lines are dropped and counted.
    pub fn log(&self, level: Level, line: &str) {
        // A log that is full is no reason to fail, and nothing else can go wrong with a valid level and a `&str`.
        let _ = sys::log(level as i32, line);
    }

    /// Starts a host operation, such as `host.echo`, and does not wait for its answer.
    ///
    /// # Errors
    /// [`Error::UnknownOperation`]; [`Error::Denied`] by the agent's settings; [`Error::Invalid`] for a request that the operation does not understand; [`Error::TooBig`];
    /// [`Error::TooManyOpen`] (8 by default); [`Error::Exhausted`] (128 a turn by default).
    pub fn call<T: Serialize + ?Sized>(&self, operation: &str, request: &T) -> Result<Operation, Error> {
        Operation::start(operation, &serde_json::to_vec(request)?)
    }
}

/// Where a saved state went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saved {
    /// It is committed together with this turn's reply.
    Staged,
    /// Nowhere: this is a private turn, which shares no state. Not an error.
    Private,
}

/// How much a log line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the usual five")]
pub enum Level {
    Trace = 0,
    Debug = 1,
    Info = 2,
    Warn = 3,
    Error = 4,
}
