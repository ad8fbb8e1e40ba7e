//! What the sandbox is asked and what it answers.

use std::borrow::Cow;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::value::RawValue;

use super::attachments::Attachments;
use super::control::Control;
use super::private_dir::PrivateDir;
use crate::content::Content;
use crate::gate::Grant;
use crate::ids::OrgId;
use crate::limits::Limits;
use crate::turn::{Failure, Usage};

/// The bounds of one guest: the operator's, narrowed by its agent's.
#[derive(Debug, Clone)]
pub struct GuestLimits {
    /// Linear memory.
    pub memory_bytes_max: usize,
    /// Elements of its tables.
    pub table_elements_max: usize,
    /// Its reply, and its standard output.
    pub reply_bytes_max: usize,
    /// Its log and standard error; the rest is dropped and counted.
    pub log_bytes_max: usize,
    /// One emitted event.
    pub emit_bytes_max: usize,
    /// Emitted events.
    pub emit_events_max: u64,
    /// Host calls.
    pub host_calls_max: u64,
    /// Random bytes of one call.
    pub random_bytes_max: u64,
    /// What it may have read of its attachments.
    pub attachment_read_bytes_max: u64,
    /// Open file descriptors.
    pub fds_max: usize,
    /// One snapshot.
    pub snapshot_bytes_max: usize,
    /// Operations in all.
    pub operations_max: u64,
    /// Operations at once.
    pub operations_concurrent_max: usize,
    /// One request.
    pub operation_request_bytes_max: usize,
    /// All frames of one operation.
    pub operation_response_bytes_max: usize,
    /// One frame.
    pub operation_frame_bytes_max: usize,
    /// Wall time of one operation.
    pub operation_timeout_ms: u64,
}

impl From<&Limits> for GuestLimits {
    /// The operator's bounds, for an agent that sets none of its own.
    fn from(limits: &Limits) -> GuestLimits {
        GuestLimits {
            memory_bytes_max: limits.memory_bytes_max,
            table_elements_max: limits.table_elements_max,
            reply_bytes_max: limits.reply_bytes_max,
            log_bytes_max: limits.log_bytes_max,
            emit_bytes_max: limits.emit_bytes_max,
            emit_events_max: limits.emit_events_max,
            host_calls_max: limits.host_calls_max,
            random_bytes_max: limits.random_bytes_max,
            attachment_read_bytes_max: limits.attachment_read_bytes_max,
            fds_max: limits.fds_max,
            snapshot_bytes_max: limits.snapshot_bytes_max,
            operations_max: limits.operations_max,
            operations_concurrent_max: limits.operations_concurrent_max,
            operation_request_bytes_max: limits.operation_request_bytes_max,
            operation_response_bytes_max: limits.operation_response_bytes_max,
            operation_frame_bytes_max: limits.operation_frame_bytes_max,
            operation_timeout_ms: limits.operation_timeout_ms,
        }
    }
}

/// What the guest is given.
#[derive(Debug, Clone)]
pub struct Input {
    /// What `input_read` copies. Made only when the guest asks: most plain programs never do.
    pub json: InputJson,
    /// What `message_read` copies, and standard input.
    pub text: Bytes,
    /// What `snapshot_read` copies; `None` is NOENT.
    pub snapshot: Option<Bytes>,
    /// Environment of the program, in full.
    pub environment: Vec<(String, String)>,
    /// Arguments of the program, its name first.
    pub arguments: Vec<String>,
    /// `dry_run`: operations of class `effect` answer `{"dry_run": true}`.
    pub dry_run: bool,
    /// What `attachment_read` copies.
    pub attachments: Attachments,
}

/// Makes the input's JSON when it is first asked for.
#[derive(Clone)]
pub struct InputJson(pub Arc<dyn Fn() -> Bytes + Send + Sync>);

impl std::fmt::Debug for InputJson {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InputJson")
    }
}

/// One turn, as far as the sandbox is concerned.
pub struct Job {
    /// Whose it is: guests' processor time is shared by org.
    pub org: OrgId,
    /// What the guest is given.
    pub input: Input,
    /// The gate's word: only a `Grant::Shared` lets `snapshot_write` stage anything.
    pub grant: Grant,
    /// The one directory that it may see; most have none.
    pub directory: Option<PrivateDir>,
    /// Its bounds.
    pub limits: Arc<GuestLimits>,
    /// Its clocks, and the way to stop it.
    pub control: Arc<Control>,
    /// Where what it says goes.
    pub output: Arc<dyn Output>,
}

/// What a guest says while it runs. `kind` is `output.delta`, `status`, `x.<name>`, `operation.*` or `snapshot.rejected`.
#[derive(Debug)]
pub struct Said {
    /// The kind of the event.
    pub kind: Cow<'static, str>,
    /// One line of JSON.
    pub data: Box<RawValue>,
}

/// Where a guest's events go. Implemented by the runner (live log, journal), by `turnhouse run` (terminal) and by tests.
#[async_trait]
pub trait Output: Send + Sync {
    /// Takes an event at once, in order. `false`: the reader's side is full, await [`Output::ready`] (inside the turn's time) before going on.
    fn say(&self, said: Said) -> bool;

    /// Resolves when there is room again.
    async fn ready(&self);

    /// Makes the `operation.started` of an effect durable under the turn's lease. Nothing of the effect may happen before it is `Ok`.
    async fn begin_effect(&self, said: Said) -> Result<(), Refused>;
}

/// The lease is gone: the effect must not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the turn is no longer this host's")]
pub struct Refused;

/// How a guest ended.
#[derive(Debug)]
pub struct Finished {
    /// Its reply, or why there is none. A guest's fault is an outcome, not an error. When `control` was stopped from outside, what is here
    /// follows from the [`super::Stop`] and nobody reads it for `Stop::Ended`.
    pub reply: Result<Reply, Failure>,
    /// The next state, if it staged one, whatever the outcome; the caller drops it unless the turn completes.
    pub snapshot: Option<Bytes>,
    /// What it used.
    pub usage: Usage,
    /// Its log lines and standard error, bounded; then how many bytes were dropped.
    pub log: Vec<u8>,
    /// See `log`.
    pub log_bytes_dropped: u64,
}

/// What a guest answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// The answer.
    pub content: Content,
    /// `reply` was called and is other than the deltas joined.
    pub replaces_deltas: bool,
}
