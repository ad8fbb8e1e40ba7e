//! Operations of the host: started by `Turn::call`, answered in frames, closed when dropped.

use std::marker::PhantomData;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::error::{check, read_whole};
use crate::{Error, OperationError, sys};

/// Room for a first frame; a longer one costs a second call, since the host then leaves it where it is.
const FRAME_BYTES_USUAL: usize = 4 * 1024;

/// The most operations that one [`wait_any`] can wait for.
const WAIT_OPERATIONS_MAX: usize = 8;

/// An operation of the host that was started and not yet closed. Dropping it closes it: what the host is still doing for it is stopped.
///
/// It answers in frames of bytes. The first is a JSON head, the rest are what the operation defines.
///
/// ```
/// use serde_json::{Value, json};
/// use turnhouse_guest::{Turn, WorkerResult, testing::{self, Answer}};
///
/// fn worker(turn: Turn) -> WorkerResult {
///     let mut echo = turn.call("host.echo", &json!({ "frames": ["a", "b"], "delay_ms": 50 }))?;
///     let head: Option<Value> = echo.recv_json()?;
///     assert_eq!(head, Some(json!({ "frames": 2 })));
///     while let Some(frame) = echo.recv()? {
///         turn.say(&String::from_utf8(frame)?)?;
///     }
///     Ok(())
/// }
///
/// let report = testing::turn("go")
///     .on_call("host.echo", |_request| Answer::head(&json!({ "frames": 2 })).frame("a").frame("b"))
///     .run(worker);
/// assert_eq!(report.text(), "ab");
/// ```
#[derive(Debug)]
pub struct Operation {
    handle: i32,
    _this_thread: PhantomData<*const ()>,
}

impl Operation {
    pub(crate) fn start(operation: &str, request: &[u8]) -> Result<Operation, Error> {
        let result = sys::call(operation, request);
        check(result)?;
        Ok(Operation { handle: result, _this_thread: PhantomData })
    }

    /// Waits for the next frame; `None` is the end.
    ///
    /// # Errors
    /// [`Error::Operation`] when the operation failed; asking again gives the same.
    pub fn recv(&mut self) -> Result<Option<Vec<u8>>, Error> {
        self.next_frame(-1)
    }

    /// As [`recv`](Operation::recv), but waits no longer than this.
    ///
    /// # Errors
    /// [`Error::TimedOut`]: the operation goes on, its next frame can still be asked for. [`Error::Operation`].
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Option<Vec<u8>>, Error> {
        self.next_frame(timeout_ms(Some(timeout)))
    }

    /// As [`recv`](Operation::recv), but does not wait at all.
    ///
    /// # Errors
    /// [`Error::NotReady`] when there is no frame yet; [`Error::Operation`].
    pub fn try_recv(&mut self) -> Result<Option<Vec<u8>>, Error> {
        self.next_frame(0)
    }

    /// Waits for the next frame and reads it as JSON; `None` is the end.
    ///
    /// # Errors
    /// [`Error::Json`] if the frame is not the JSON of a `T` (it is consumed); [`Error::Operation`].
    pub fn recv_json<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        match self.recv()? {
            Some(frame) => Ok(Some(serde_json::from_slice(&frame)?)),
            None => Ok(None),
        }
    }

    fn next_frame(&mut self, timeout_ms: i32) -> Result<Option<Vec<u8>>, Error> {
        let mut frame = vec![0; FRAME_BYTES_USUAL];
        loop {
            match check(sys::recv(self.handle, &mut frame, timeout_ms)) {
                Ok(0) => return Ok(None),
                Ok(len) if len > frame.len() => frame.resize(len, 0),
                Ok(len) => {
                    frame.truncate(len);
                    return Ok(Some(frame));
                }
                Err(Error::Io) => return Err(self.failure()),
                Err(error) => return Err(error),
            }
        }
    }

    /// What the host says of an operation that ended with IO.
    fn failure(&self) -> Error {
        match read_whole(|into| sys::error_read(self.handle, into)) {
            Ok(json) => Error::Operation(serde_json::from_slice::<OperationError>(&json).unwrap_or_default()),
            Err(_) => Error::Io,
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // It can only fail for a handle that is not open, and this one is.
        let _ = sys::close(self.handle);
    }
}

/// Waits until one of up to 8 operations has a frame, has ended or has failed, and says which: its index. `None` waits without end (but for
/// the turn's own deadline), zero does not wait.
///
/// # Errors
/// [`Error::TimedOut`], or with a timeout of zero [`Error::NotReady`]; [`Error::Invalid`] for no operation, or for more than 8.
///
/// ```
/// use serde_json::json;
/// use turnhouse_guest::{self as th, Turn, testing::{self, Answer}};
///
/// let report = testing::turn("go")
///     .on_call("slow", |_| Answer::pending())
///     .on_call("quick", |_| Answer::head(&json!({})))
///     .run(|turn: Turn| {
///         let operations = [turn.call("slow", &json!({}))?, turn.call("quick", &json!({}))?];
///         let first = th::wait_any(&operations, None)?;
///         turn.say(&format!("number {first} was first"))?;
///         Ok(())
///     });
/// assert_eq!(report.text(), "number 1 was first");
/// ```
pub fn wait_any<'a>(
    operations: impl IntoIterator<Item = &'a Operation>,
    timeout: Option<Duration>,
) -> Result<usize, Error> {
    let mut handles = [0; WAIT_OPERATIONS_MAX];
    let mut count = 0;
    for operation in operations {
        *handles.get_mut(count).ok_or(Error::Invalid)? = operation.handle;
        count += 1;
    }
    check(sys::wait(&handles[..count], timeout_ms(timeout)))
}

/// The interface counts in whole milliseconds: −1 waits, 0 polls. A part of a millisecond is rounded up, so that a short wait never becomes a poll.
fn timeout_ms(timeout: Option<Duration>) -> i32 {
    let Some(timeout) = timeout else { return -1 };
    i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_round_up_and_stop_at_the_largest() {
        assert_eq!(timeout_ms(None), -1);
        assert_eq!(timeout_ms(Some(Duration::ZERO)), 0);
        assert_eq!(timeout_ms(Some(Duration::from_nanos(1))), 1);
        assert_eq!(timeout_ms(Some(Duration::from_millis(1500))), 1500);
        assert_eq!(timeout_ms(Some(Duration::MAX)), i32::MAX);
    }
}
