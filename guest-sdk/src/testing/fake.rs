//! The host of a native test: the functions of `sys.rs`, for the turn that runs on this thread, with the real host's checks and default limits.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};

use serde_json::Value;

use super::{Report, TestTurn};
use crate::{Level, Message, OperationError, Part};

const TOO_BIG: i32 = -1;
pub(super) const ACCES: i32 = -2;
const AGAIN: i32 = -6;
const BADF: i32 = -8;
const ILSEQ: i32 = -25;
pub(super) const INVAL: i32 = -28;
const IO: i32 = -29;
const MFILE: i32 = -33;
const NOBUFS: i32 = -42;
const NOENT: i32 = -44;
const NOSYS: i32 = -52;
const PERM: i32 = -63;
const TIMEDOUT: i32 = -73;

const EMIT_BYTES_MAX: usize = 64 * 1024;
const EMIT_EVENTS_MAX: usize = 10_000;
const REPLY_BYTES_MAX: usize = 1024 * 1024;
const REQUEST_BYTES_MAX: usize = 1024 * 1024;
const OPERATIONS_MAX: usize = 128;
const OPERATIONS_CONCURRENT_MAX: usize = 8;
const WAIT_OPERATIONS_MAX: usize = 8;
const EVENT_NAME_CHARS_MAX: usize = 48;

#[derive(Debug, Clone)]
pub(super) enum Answer {
    Refused(i32),
    Frames { frames: Vec<Vec<u8>>, end: End },
}

#[derive(Debug, Clone)]
pub(super) enum End {
    Done,
    Failed(OperationError),
    Never,
}

struct Host {
    turn: TestTurn,
    input_json: Vec<u8>,
    text: String,
    report: Report,
    emitted: usize,
    said_bytes: usize,
    open: BTreeMap<i32, OpenOperation>,
}

struct OpenOperation {
    frames: VecDeque<Vec<u8>>,
    end: End,
}

impl OpenOperation {
    fn is_ready(&self) -> bool {
        !self.frames.is_empty() || !matches!(self.end, End::Never)
    }
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// Runs `body` with this turn as the thread's host. The host is taken away again even when `body` panics, so that the thread's next test starts clean.
pub(super) fn with_turn(mut turn: TestTurn, body: impl FnOnce() -> Option<String>) -> Report {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            HOST.take();
        }
    }

    if turn.input.run_id.is_none() {
        turn.state = None;
        turn.input.snapshot = None;
        turn.input.history.clear();
    }
    let host = Host {
        input_json: serde_json::to_vec(&turn.input).expect("the message's and the history's parts are of known kinds"),
        text: turn.input.message.text(),
        report: Report::default(),
        emitted: 0,
        said_bytes: 0,
        open: BTreeMap::new(),
        turn,
    };
    assert!(HOST.replace(Some(host)).is_none(), "a turn is running on this thread already");
    let _leave = Leave;
    let error = body();
    let mut report = HOST.take().expect("the host stays until the turn is over").report;
    report.error = error;
    report
}

fn with_host(act: impl FnOnce(&mut Host) -> i32) -> i32 {
    HOST.with_borrow_mut(|host| act(host.as_mut().expect("a turn runs on this thread")))
}

fn count(n: usize) -> i32 {
    i32::try_from(n).expect("fits the interface's i32")
}

fn copy_out(from: &[u8], into: &mut [u8]) -> i32 {
    let copied = from.len().min(into.len());
    into[..copied].copy_from_slice(&from[..copied]);
    count(from.len())
}

/// What a wait for something that never comes gives.
fn never(timeout_ms: i32) -> i32 {
    match timeout_ms {
        0 => AGAIN,
        1.. => TIMEDOUT,
        _ => panic!("the worker waits without a timeout for an operation whose script never answers"),
    }
}

pub(crate) fn abi_revision() -> i32 {
    2
}

pub(crate) fn input_read(into: &mut [u8]) -> i32 {
    with_host(|host| copy_out(&host.input_json, into))
}

pub(crate) fn message_read(into: &mut [u8]) -> i32 {
    with_host(|host| copy_out(host.text.as_bytes(), into))
}

pub(crate) fn snapshot_read(into: &mut [u8]) -> i32 {
    with_host(|host| host.turn.state.as_deref().map_or(NOENT, |state| copy_out(state, into)))
}

pub(crate) fn attachment_read(id: &str, offset: u32, into: &mut [u8]) -> i32 {
    if id.len() != "sha256-".len() + 64 {
        return INVAL;
    }
    with_host(|host| match host.turn.attachments.get(id) {
        Some(bytes) => copy_out(bytes.get(offset as usize..).unwrap_or_default(), into),
        None => NOENT,
    })
}

pub(crate) fn snapshot_write(state: &[u8]) -> i32 {
    with_host(|host| {
        if host.turn.input.run_id.is_none() {
            return PERM;
        }
        if state.len() > host.turn.state_bytes_max {
            host.report.rejected_states.push(state.len());
            return TOO_BIG;
        }
        host.report.saved = Some(state.to_vec());
        0
    })
}

pub(crate) fn emit(kind: &str, payload: &[u8]) -> i32 {
    with_host(|host| {
        enum Event {
            Delta(String),
            Status(String),
            Own(Value),
        }
        let text = || String::from_utf8(payload.to_vec()).map_err(|_| ILSEQ);
        let event = match kind {
            "output.delta" => text().map(Event::Delta),
            "status" => text().map(Event::Status),
            _ if is_event_name(kind) => serde_json::from_slice(payload).map(Event::Own).map_err(|_| INVAL),
            _ => Err(INVAL),
        };
        let event = match event {
            Ok(event) => event,
            Err(errno) => return errno,
        };
        if payload.len() > EMIT_BYTES_MAX {
            return TOO_BIG;
        }
        if host.emitted == EMIT_EVENTS_MAX {
            return NOBUFS;
        }
        if let Event::Delta(text) = &event {
            if host.said_bytes + text.len() > REPLY_BYTES_MAX {
                return TOO_BIG;
            }
            host.said_bytes += text.len();
        }
        host.emitted += 1;
        match event {
            Event::Delta(text) => host.report.deltas.push(text),
            Event::Status(text) => host.report.statuses.push(text),
            Event::Own(data) => host.report.events.push((kind.to_owned(), data)),
        }
        0
    })
}

/// `x\.[a-z0-9_.-]{1,48}`
fn is_event_name(kind: &str) -> bool {
    kind.strip_prefix("x.").is_some_and(|name| {
        (1..=EVENT_NAME_CHARS_MAX).contains(&name.len())
            && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-'))
    })
}

pub(crate) fn reply(json: &[u8]) -> i32 {
    let malformed = |part: &Part| match part {
        Part::Blob { .. } => part.bytes().is_none(),
        Part::Unknown | Part::Attachment { .. } => true,
        _ => false,
    };
    with_host(|host| match serde_json::from_slice::<Message>(json) {
        Err(_) => INVAL,
        Ok(reply) if reply.parts.iter().any(malformed) => INVAL,
        Ok(_) if json.len() > REPLY_BYTES_MAX => TOO_BIG,
        Ok(reply) => {
            host.report.replied = Some(reply);
            0
        }
    })
}

pub(crate) fn log(level: i32, line: &str) -> i32 {
    with_host(|host| {
        let level = match level {
            0 => Level::Trace,
            1 => Level::Debug,
            2 => Level::Info,
            3 => Level::Warn,
            4 => Level::Error,
            _ => return INVAL,
        };
        host.report.logs.push((level, line.to_owned()));
        0
    })
}

pub(crate) fn call(operation: &str, request: &[u8]) -> i32 {
    with_host(|host| {
        let Some(script) = host.turn.scripts.get_mut(operation) else { return NOSYS };
        let Ok(request_json) = serde_json::from_slice::<Value>(request) else { return INVAL };
        if request.len() > REQUEST_BYTES_MAX {
            return TOO_BIG;
        }
        if host.open.len() == OPERATIONS_CONCURRENT_MAX {
            return MFILE;
        }
        if host.report.calls.len() == OPERATIONS_MAX {
            return NOBUFS;
        }
        match script(&request_json).0 {
            Answer::Refused(errno) => errno,
            Answer::Frames { frames, end } => {
                host.report.calls.push((operation.to_owned(), request_json));
                let handle = count(host.report.calls.len());
                host.open.insert(handle, OpenOperation { frames: frames.into(), end });
                handle
            }
        }
    })
}

pub(crate) fn recv(handle: i32, into: &mut [u8], timeout_ms: i32) -> i32 {
    with_host(|host| {
        let Some(operation) = host.open.get_mut(&handle) else { return BADF };
        match operation.frames.front() {
            Some(frame) if frame.len() > into.len() => count(frame.len()),
            Some(frame) => {
                let len = copy_out(frame, into);
                operation.frames.pop_front();
                len
            }
            None => match operation.end {
                End::Done => 0,
                End::Failed(_) => IO,
                End::Never => never(timeout_ms),
            },
        }
    })
}

pub(crate) fn error_read(handle: i32, into: &mut [u8]) -> i32 {
    with_host(|host| match host.open.get(&handle) {
        None => BADF,
        Some(OpenOperation { frames, end: End::Failed(error) }) if frames.is_empty() => {
            copy_out(&serde_json::to_vec(error).expect("strings and numbers are JSON"), into)
        }
        Some(_) => NOENT,
    })
}

pub(crate) fn wait(handles: &[i32], timeout_ms: i32) -> i32 {
    with_host(|host| {
        if !(1..=WAIT_OPERATIONS_MAX).contains(&handles.len()) {
            return INVAL;
        }
        let mut ready = None;
        for (at, handle) in handles.iter().enumerate() {
            match host.open.get(handle) {
                None => return BADF,
                Some(operation) if operation.is_ready() && ready.is_none() => ready = Some(at),
                Some(_) => {}
            }
        }
        ready.map_or_else(|| never(timeout_ms), count)
    })
}

pub(crate) fn close(handle: i32) -> i32 {
    // An `Operation` that a panicking test still holds is dropped after the host is gone.
    HOST.with_borrow_mut(|host| match host.as_mut().and_then(|host| host.open.remove(&handle)) {
        Some(_) => 0,
        None => BADF,
    })
}
