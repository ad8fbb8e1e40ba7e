//! What can go wrong in a call to the host, as types. Owns the mapping from the host's numbers; says nothing about how a turn ends.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a call to the host failed.
///
/// The host answers with the negative of a WASI preview 1 errno; each is a variant here, named for what it means in this interface. A number
/// that this version does not know is [`Error::Io`]. Two variants carry more: [`Error::Operation`] is the failure of an operation in the host's
/// words, [`Error::Json`] a value that could not be written as, or read from, JSON.
///
/// That a turn is over (its deadline, a cancel) is never an error: the host does not return to the worker then.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// `2BIG`: more bytes than the host takes (a reply, an event, a snapshot, a request).
    TooBig,
    /// `ACCES`: the agent's settings do not allow this operation.
    Denied,
    /// `AGAIN`: nothing is there yet, and the call was asked not to wait.
    NotReady,
    /// `BADF`: the operation was closed, or was never this turn's.
    BadHandle,
    /// `FAULT`: a pointer outside the worker's memory. Not reachable through this crate.
    Fault,
    /// `ILSEQ`: text that is not UTF-8. Not reachable through this crate.
    NotUtf8,
    /// `INVAL`: a malformed argument: an event's name, an operation's request.
    Invalid,
    /// `IO`, and every number that this version does not know.
    Io,
    /// `MFILE`: too many operations open at once. Drop one and call again.
    TooManyOpen,
    /// `NOBUFS`: this turn has used up what it may have (events, operations).
    Exhausted,
    /// `NOENT`: there is nothing to read.
    NotFound,
    /// `NOSYS`: the host knows no operation of this name.
    UnknownOperation,
    /// `PERM`: this turn may not do that.
    NotPermitted,
    /// `TIMEDOUT`: the time given to this call is over. The operation goes on; ask again, or drop it.
    TimedOut,
    /// An operation failed; what the host says about it.
    Operation(OperationError),
    /// A value that is not the JSON it should be: a state of another shape, an answer that was not expected.
    Json(serde_json::Error),
}

impl Error {
    /// The error for a WASI preview 1 errno (a positive number, as in `turnhouse.h`). An unknown one is [`Error::Io`].
    ///
    /// ```
    /// use turnhouse_guest::Error;
    /// assert!(matches!(Error::from_errno(73), Error::TimedOut));
    /// assert!(matches!(Error::from_errno(4711), Error::Io));
    /// ```
    pub fn from_errno(errno: i32) -> Error {
        match errno {
            1 => Error::TooBig,
            2 => Error::Denied,
            6 => Error::NotReady,
            8 => Error::BadHandle,
            21 => Error::Fault,
            25 => Error::NotUtf8,
            28 => Error::Invalid,
            33 => Error::TooManyOpen,
            42 => Error::Exhausted,
            44 => Error::NotFound,
            52 => Error::UnknownOperation,
            63 => Error::NotPermitted,
            73 => Error::TimedOut,
            _ => Error::Io,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Error::TooBig => "more bytes than the host takes",
            Error::Denied => "the agent's settings do not allow this operation",
            Error::NotReady => "nothing is ready yet",
            Error::BadHandle => "no open operation has this handle",
            Error::Fault => "a pointer outside the worker's memory",
            Error::NotUtf8 => "text that is not UTF-8",
            Error::Invalid => "an argument that the host does not understand",
            Error::Io => "the host could not do it",
            Error::TooManyOpen => "too many operations are open at once",
            Error::Exhausted => "this turn has used up what it may have of this",
            Error::NotFound => "there is nothing to read",
            Error::UnknownOperation => "the host knows no operation of this name",
            Error::NotPermitted => "this turn may not do that",
            Error::TimedOut => "the time given to this call is over",
            Error::Operation(failure) => return write!(f, "the operation failed: {failure}"),
            Error::Json(_) => "not the JSON that was expected",
        })
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Json(cause) => Some(cause),
            _ => None,
        }
    }
}

impl From<serde_json::Error> for Error {
    fn from(cause: serde_json::Error) -> Error {
        Error::Json(cause)
    }
}

/// Why an operation failed, as the host tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct OperationError {
    /// A stable name to branch on, such as `provider_unavailable` or `operation_timeout`.
    pub code: String,
    /// A sentence for a person: what happened, what to do.
    pub detail: String,
    /// Whether the same call may succeed later.
    pub retryable: bool,
    /// How long to wait before trying again, in milliseconds, where the host knows.
    pub retry_after_ms: Option<u64>,
}

impl OperationError {
    /// A failure that is not worth repeating. For a test's script; in a turn the host makes these.
    pub fn new(code: impl Into<String>, detail: impl Into<String>) -> OperationError {
        OperationError { code: code.into(), detail: detail.into(), retryable: false, retry_after_ms: None }
    }

    /// The same failure, worth repeating after so many milliseconds.
    pub fn retry_after_ms(mut self, retry_after_ms: u64) -> OperationError {
        self.retryable = true;
        self.retry_after_ms = Some(retry_after_ms);
        self
    }
}

impl Default for OperationError {
    /// What is told where the host gave no details.
    fn default() -> OperationError {
        OperationError::new("internal", "the host gave no details")
    }
}

impl fmt::Display for OperationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.detail, self.code)
    }
}

/// A host function's result: not negative is its value, negative is −errno.
pub(crate) fn check(result: i32) -> Result<usize, Error> {
    usize::try_from(result).map_err(|_| Error::from_errno(result.wrapping_neg()))
}

/// Reads the whole of something that the host has: asks for its size, then for its bytes.
pub(crate) fn read_whole(mut read: impl FnMut(&mut [u8]) -> i32) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; check(read(&mut []))?];
    if !bytes.is_empty() {
        let total = check(read(&mut bytes))?;
        bytes.truncate(total);
    }
    Ok(bytes)
}
