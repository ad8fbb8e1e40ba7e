//! Named host operations behind `call`: what one is, which there are, and those that one guest has open.
//!
//! No operation has a task of its own: the future that drives the guest polls them ([`Operations::drive`]), so that they go on while the
//! guest computes or sleeps, and five thousand that wait cost no more than their timers. An operation holds at most two frames that
//! the guest has not taken yet.

pub mod echo;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::Stream;
use serde::Serialize;
use tokio::time::Sleep;

use super::control::OperationGuard;
use super::speech::Speech;
use super::{Control, GuestLimits};
use crate::turn::FailureCode;

/// Frames taken of an operation before the guest asks for them. Two, so that its end is known by the time the last one is read.
const FRAMES_AHEAD_MAX: usize = 2;

/// What repeating an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Harms nobody.
    None,
    /// Happens a second time: its start is made durable first.
    Effect,
}

/// The request is not one of this operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidRequest;

/// The frames of one run. The first is a JSON head. Dropping it aborts the operation.
pub type Frames = Pin<Box<dyn Stream<Item = Result<Bytes, OperationError>> + Send>>;

/// A checked request: nothing has happened until it is called.
pub type Prepared = Box<dyn FnOnce() -> Frames + Send>;

/// A named host operation.
pub trait Operation: Send + Sync {
    /// What `call` names it by.
    fn name(&self) -> &'static str;

    /// What repeating it does.
    fn class(&self) -> Class;

    /// Checks the request.
    fn prepare(&self, request: &[u8]) -> Result<Prepared, InvalidRequest>;
}

/// How an operation failed; what `error_read` copies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OperationError {
    /// Stable: one of the provider codes of a failed turn, or one of an operation alone.
    pub code: Cow<'static, str>,
    /// For a person.
    pub detail: String,
    /// Whether the same request may well succeed later.
    pub retryable: bool,
    /// When.
    pub retry_after_ms: Option<u64>,
}

impl OperationError {
    /// The turn's code, where a failed turn takes this operation's.
    pub(super) fn provider_code(&self) -> Option<FailureCode> {
        use FailureCode::{
            NoModelConfigured, ProviderAuthFailed, ProviderQuotaExhausted, ProviderRejected, ProviderUnavailable,
        };
        FailureCode::parse(&self.code).filter(|code| {
            matches!(
                code,
                NoModelConfigured
                    | ProviderAuthFailed
                    | ProviderQuotaExhausted
                    | ProviderUnavailable
                    | ProviderRejected
            )
        })
    }

    fn timed_out(timeout: Duration) -> OperationError {
        OperationError {
            code: Cow::Borrowed("operation_timeout"),
            detail: format!(
                "the operation took longer than {} ms; have the operator raise limits.operation_timeout_ms",
                timeout.as_millis()
            ),
            retryable: true,
            retry_after_ms: None,
        }
    }

    fn over_limit(what: &str, max: usize) -> OperationError {
        OperationError {
            code: Cow::Borrowed("operation_limit"),
            detail: format!("the answer went over limits.{what} ({max})"),
            retryable: false,
            retry_after_ms: None,
        }
    }
}

/// The operations of this host.
#[derive(Default)]
pub struct Registry(HashMap<&'static str, Arc<dyn Operation>>);

impl Registry {
    /// With `host.echo` alone.
    pub fn standard() -> Registry {
        let mut registry = Registry::default();
        registry.add(Arc::new(echo::Echo));
        registry
    }

    /// Adds an operation.
    ///
    /// # Panics
    /// When its name is taken.
    pub fn add(&mut self, operation: Arc<dyn Operation>) {
        let name = operation.name();
        assert!(self.0.insert(name, operation).is_none(), "two operations are named {name}");
    }

    /// Finds one.
    pub fn get(&self, name: &str) -> Option<&Arc<dyn Operation>> {
        self.0.get(name)
    }
}

/// Why a guest may not begin one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    AtOnce,
    InAll,
}

/// Where an operation stands, to a guest that asks for its next frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    Frame(Bytes),
    End,
    Failed,
}

/// Those of one guest. Handles count from 1 and are never used twice.
pub(super) struct Operations {
    limits: Arc<GuestLimits>,
    control: Arc<Control>,
    begun: u64,
    open: BTreeMap<u32, Open>,
    /// Of the last one that ended, where it failed.
    last_error: Option<OperationError>,
}

struct Open {
    name: &'static str,
    state: State,
    waiting: VecDeque<Bytes>,
    frames: u64,
    bytes: usize,
    begun_at: Instant,
}

enum State {
    Running(Running),
    Ended,
    Failed(OperationError),
}

struct Running {
    frames: Frames,
    timeout: Pin<Box<Sleep>>,
    _in_flight: OperationGuard,
}

#[derive(Serialize)]
struct Started<'a> {
    handle: u32,
    name: &'a str,
    /// Of a dry run `none`, whatever the operation's is: nothing happens that may not happen twice.
    class: Class,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
}

#[derive(Serialize)]
struct FinishedOperation<'a> {
    handle: u32,
    name: &'a str,
    /// `ok`, `closed` (by the guest, or by its end), or the error's code.
    result: &'a str,
    frames: u64,
    bytes: usize,
    duration_ms: u64,
}

/// The data of `operation.started`.
pub(super) fn started(handle: u32, operation: &dyn Operation, dry_run: bool) -> Box<serde_json::value::RawValue> {
    let class = if dry_run { Class::None } else { operation.class() };
    crate::event::raw(&Started { handle, name: operation.name(), class, dry_run })
}

impl Operations {
    pub(super) fn new(limits: Arc<GuestLimits>, control: Arc<Control>) -> Operations {
        Operations { limits, control, begun: 0, open: BTreeMap::new(), last_error: None }
    }

    /// Whether one more may begin.
    pub(super) fn room(&self) -> Result<(), Full> {
        // Like file descriptors: one that has ended counts until it is closed.
        if self.open.len() >= self.limits.operations_concurrent_max {
            return Err(Full::AtOnce);
        }
        if self.begun >= self.limits.operations_max {
            return Err(Full::InAll);
        }
        Ok(())
    }

    /// The next handle. It is used up, whatever becomes of its operation.
    pub(super) fn reserve(&mut self) -> u32 {
        self.begun += 1;
        u32::try_from(self.begun).expect("operations_max is far below 2³²")
    }

    /// Begins an operation under a reserved handle.
    pub(super) fn begin(&mut self, handle: u32, name: &'static str, frames: Frames) {
        let timeout = tokio::time::sleep(Duration::from_millis(self.limits.operation_timeout_ms));
        let running = Running { frames, timeout: Box::pin(timeout), _in_flight: self.control.operation() };
        let open = Open {
            name,
            state: State::Running(running),
            waiting: VecDeque::new(),
            frames: 0,
            bytes: 0,
            begun_at: Instant::now(),
        };
        assert!(self.open.insert(handle, open).is_none(), "a handle is never used twice");
    }

    /// Polls all that run, and registers the task to be woken by them. Whether any has got somewhere.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>, speech: &mut Speech) -> bool {
        let mut moved = false;
        for (handle, open) in &mut self.open {
            let frames = open.frames;
            let polled = open.poll(cx, &self.limits, &self.control);
            moved |= open.frames > frames || polled.is_ready();
            let Poll::Ready(end) = polled else { continue };
            self.last_error = end.as_ref().err().cloned();
            open.state = match end {
                Ok(()) => State::Ended,
                Err(error) => State::Failed(error),
            };
            open.tell_finished(*handle, speech);
        }
        moved
    }

    /// Whether none was ever begun: nothing to drive.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether the handle is open.
    pub(super) fn is_open(&self, handle: i32) -> bool {
        u32::try_from(handle).is_ok_and(|handle| self.open.contains_key(&handle))
    }

    /// What is next of an operation; `None` when nothing is there yet.
    pub(super) fn next(&self, handle: i32) -> Option<Next> {
        let open = self.open.get(&u32::try_from(handle).ok()?)?;
        match (open.waiting.front(), &open.state) {
            (Some(frame), _) => Some(Next::Frame(frame.clone())),
            (None, State::Running(_)) => None,
            (None, State::Ended) => Some(Next::End),
            (None, State::Failed(_)) => Some(Next::Failed),
        }
    }

    /// The guest has its frame.
    pub(super) fn consume(&mut self, handle: i32) {
        if let Some(open) = u32::try_from(handle).ok().and_then(|handle| self.open.get_mut(&handle)) {
            open.waiting.pop_front();
        }
    }

    /// How it failed, if it did.
    pub(super) fn error(&self, handle: i32) -> Option<&OperationError> {
        match &self.open.get(&u32::try_from(handle).ok()?)?.state {
            State::Failed(error) => Some(error),
            _ => None,
        }
    }

    /// Aborts it. Whether the handle was open.
    pub(super) fn close(&mut self, handle: i32, speech: &mut Speech) -> bool {
        let Some(handle) = u32::try_from(handle).ok() else { return false };
        let Some(open) = self.open.remove(&handle) else { return false };
        if matches!(open.state, State::Running(_)) {
            open.tell_finished(handle, speech);
        }
        true
    }

    /// The guest has ended: aborts what still runs. How the last operation failed, if none succeeded after it.
    pub(super) fn finish(&mut self, speech: &mut Speech) -> Option<OperationError> {
        for (handle, open) in std::mem::take(&mut self.open) {
            if matches!(open.state, State::Running(_)) {
                open.tell_finished(handle, speech);
            }
        }
        self.last_error.take()
    }
}

impl Open {
    /// Takes what frames there are and have room. Ready: a running operation has ended.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        limits: &GuestLimits,
        control: &Control,
    ) -> Poll<Result<(), OperationError>> {
        let State::Running(running) = &mut self.state else { return Poll::Pending };
        while self.waiting.len() < FRAMES_AHEAD_MAX {
            let frame = match running.frames.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(frame))) if frame.is_empty() => continue,
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            };
            self.frames += 1;
            self.bytes += frame.len();
            if frame.len() > limits.operation_frame_bytes_max {
                let max = limits.operation_frame_bytes_max;
                return Poll::Ready(Err(OperationError::over_limit("operation_frame_bytes_max", max)));
            }
            if self.bytes > limits.operation_response_bytes_max {
                let max = limits.operation_response_bytes_max;
                return Poll::Ready(Err(OperationError::over_limit("operation_response_bytes_max", max)));
            }
            control.progress();
            self.waiting.push_back(frame);
        }
        let timeout = Duration::from_millis(limits.operation_timeout_ms);
        running.timeout.as_mut().poll(cx).map(|()| Err(OperationError::timed_out(timeout)))
    }

    fn tell_finished(&self, handle: u32, speech: &mut Speech) {
        let result = match &self.state {
            State::Running(_) => "closed",
            State::Ended => "ok",
            State::Failed(error) => &error.code,
        };
        let duration_ms = u64::try_from(self.begun_at.elapsed().as_millis()).unwrap_or(u64::MAX);
        let data =
            FinishedOperation { handle, name: self.name, result, frames: self.frames, bytes: self.bytes, duration_ms };
        speech.tell("operation.finished", &data);
    }
}
