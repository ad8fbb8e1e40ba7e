//! Records as they are read.

use std::collections::BTreeMap;

use bytes::Bytes;
use uuid::Uuid;

use crate::caller::Scopes;
use crate::clock::Timestamp;
use crate::event::Event;
use crate::gate::GateRefusal;
use crate::ids::{AgentId, ConversationId, OrgId, RunId, TurnId, UserId, WorkerName};
use crate::lease::Epoch;
use crate::quota::{Meters, OwnLimits};
use crate::turn::{CancelledBy, Failure, TurnState, Usage};

/// A turn as it stands.
#[derive(Debug, Clone)]
pub struct TurnRecord {
    /// Its org.
    pub org: OrgId,
    /// Its id.
    pub id: TurnId,
    /// Whose it is.
    pub user: UserId,
    /// Its agent.
    pub agent: AgentId,
    /// Its conversation, if its envelope named one.
    pub conversation: Option<ConversationId>,
    /// Its run id, if its envelope named one.
    pub run_id: Option<RunId>,
    /// Whether it is a private turn: in no history.
    pub private: bool,
    /// Its place in the conversation.
    pub seq: Option<i64>,
    /// Its state.
    pub state: TurnState,
    /// How often it was started.
    pub attempt: u32,
    /// The epoch of its marker now; of its end when it has ended.
    pub epoch: Epoch,
    /// The epoch of its first start; `None` before it.
    pub first_epoch: Option<Epoch>,
    /// With which it first started.
    pub worker: Option<(WorkerName, u32)>,
    /// The message as JSON.
    pub message: Bytes,
    /// Operations with outside effects are skipped.
    pub dry_run: bool,
    /// The reply as JSON, when completed.
    pub reply: Option<Bytes>,
    /// Whether the reply is other than the deltas joined.
    pub replaces_deltas: bool,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Who cancelled it.
    pub cancelled_by: Option<CancelledBy>,
    /// What it used.
    pub usage: Option<Usage>,
    /// When it was accepted.
    pub accepted_at: Timestamp,
    /// When it first started.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// A stretch of a turn's log, and the turn as of the same moment.
#[derive(Debug, Clone)]
pub struct EventPage {
    /// The turn.
    pub turn: TurnRecord,
    /// Written events after the cursor, in order, without those that follow from `turn` (`turn.accepted`, `turn.started`, the terminal event).
    pub events: Vec<Event>,
    /// There are more behind these.
    pub more: bool,
}

/// A conversation.
#[derive(Debug, Clone)]
pub struct ConversationRecord {
    /// Its agent.
    pub agent: AgentId,
    /// Its id.
    pub id: ConversationId,
    /// Who began it.
    pub user: UserId,
    /// When.
    pub created_at: Timestamp,
    /// The run whose snapshot it stands on.
    pub snapshot_run: Option<RunId>,
    /// What people call it.
    pub title: Option<String>,
    /// What programs wrote on it.
    pub metadata: BTreeMap<String, String>,
}

/// A snapshot without its bytes.
#[derive(Debug, Clone)]
pub struct SnapshotRecord {
    /// Its conversation's agent.
    pub agent: AgentId,
    /// Its conversation.
    pub conversation: ConversationId,
    /// The run that wrote it.
    pub run_id: RunId,
    /// What that started from: another run, or the conversation's generation.
    pub parent: Uuid,
    /// The turn of the run.
    pub turn: TurnId,
    /// The worker that wrote it.
    pub worker: WorkerName,
    /// Its version.
    pub version: u32,
    /// When.
    pub at: Timestamp,
    /// How many bytes it has; `None` when they are no longer kept.
    pub bytes: Option<u64>,
}

/// Of which conversations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Among {
    /// All of the org.
    All,
    /// This one.
    One(AgentId, ConversationId),
}

/// A place in the list of an org's snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotPlace {
    /// The conversation's agent.
    pub agent: AgentId,
    /// The conversation.
    pub conversation: ConversationId,
    /// The snapshot's parent.
    pub parent: Uuid,
}

/// A stretch of a list.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// Items in order.
    pub items: Vec<T>,
    /// There are more behind these.
    pub more: bool,
}

/// Which way a list of turns is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Oldest first, after the cursor.
    Forward,
    /// Newest first, before the cursor.
    Backward,
}

/// A worker's version.
#[derive(Debug, Clone)]
pub struct WorkerVersion {
    /// The worker.
    pub worker: WorkerName,
    /// 1, 2, ….
    pub version: u32,
    /// SHA-256 of the wasm.
    pub digest: [u8; 32],
    /// Bytes of the wasm.
    pub size: u64,
    /// What the module imports, `module.name`.
    pub imports: Vec<String>,
    /// How long it took to compile at upload.
    pub compile_ms: f64,
    /// When it was uploaded.
    pub created_at: Timestamp,
}

/// A key as it is kept: without its secret.
#[derive(Debug, Clone)]
pub struct KeyRecord {
    /// What names it in lists and in `keys revoke`: the first 16 hex digits of its SHA-256.
    pub id: String,
    /// Its org.
    pub org: OrgId,
    /// Its user.
    pub user: UserId,
    /// What it may do.
    pub scopes: Scopes,
    /// What its maker called it.
    pub name: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it stops working.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
    /// When it was last used, to the minute.
    pub last_used_at: Option<Timestamp>,
    /// The id of the key that was made to take its place.
    pub successor: Option<String>,
}

/// How a key stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    /// It works.
    Live,
    /// It works, and ends soon: another must take its place.
    Expiring,
    /// It works until its end; its successor is there.
    Rotated,
    /// It has ended.
    Expired,
    /// It was revoked.
    Revoked,
}

impl KeyRecord {
    /// How it stands at `now`; what ends within `soon_ms` is expiring.
    pub fn state(&self, now: Timestamp, soon_ms: u64) -> KeyState {
        match self.expires_at {
            _ if self.revoked_at.is_some() => KeyState::Revoked,
            Some(at) if at <= now => KeyState::Expired,
            _ if self.successor.is_some() => KeyState::Rotated,
            Some(at) if at <= now.plus_ms(soon_ms) => KeyState::Expiring,
            _ => KeyState::Live,
        }
    }
}

/// What stream tickets are authenticated with.
#[derive(Clone)]
pub struct TicketKey {
    /// 1, 2, …: which one, as a ticket names it.
    pub number: i64,
    /// 256 random bits.
    pub secret: [u8; 32],
    /// When it was made.
    pub created_at: Timestamp,
}

impl std::fmt::Debug for TicketKey {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TicketKey").field("number", &self.number).finish_non_exhaustive()
    }
}

/// An org.
#[derive(Debug, Clone)]
pub struct OrgRecord {
    /// Its id.
    pub id: OrgId,
    /// The member who owns it.
    pub owner: UserId,
    /// When it was made.
    pub created_at: Timestamp,
    /// Since when it is being deleted: it is there for nobody any more, and its rows go.
    pub deleting_at: Option<Timestamp>,
}

/// What an org may and uses.
#[derive(Debug, Clone, Copy)]
pub struct OrgUse {
    /// Its own limits, where the host's do not hold.
    pub own: OwnLimits,
    /// What it has used of what is limited.
    pub meters: Meters,
    /// Its live turns.
    pub live: LiveCounts,
    /// The store's time.
    pub at: Timestamp,
}

/// What an agent with bounds of its own may and has used.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentUse {
    /// Its bounds.
    pub own: OwnLimits,
    /// What it has used of what is limited.
    pub meters: Meters,
    /// Its live turns.
    pub live: u64,
    /// Of these: running, or ready and with room to start.
    pub active: u64,
    /// The store's time.
    pub at: Timestamp,
}

/// What a default agent is made from, for an org that has none.
#[derive(Debug, Clone)]
pub struct Starter {
    /// The agent. One of this name that is there already is taken for it.
    pub agent: AgentId,
    /// The worker that it runs.
    pub worker: WorkerName,
    /// SHA-256 of `wasm`.
    pub digest: [u8; 32],
    /// The worker's module.
    pub wasm: Bytes,
    /// What that imports.
    pub imports: Vec<String>,
    /// Workers of an org at most.
    pub workers_max: usize,
    /// Versions of a worker at most.
    pub versions_kept: usize,
    /// Agents of an org at most.
    pub agents_max: usize,
}

impl Starter {
    /// Names for its worker, should one be taken by somebody's own.
    pub(super) fn worker_names(&self) -> impl Iterator<Item = WorkerName> {
        let numbered = (2..10).filter_map(|n| WorkerName::parse(&format!("{}-{n}", self.worker)).ok());
        std::iter::once(self.worker.clone()).chain(numbered)
    }
}

/// What a sweep found to be done. It only names; [`Write::Commit`](super::Write::Commit) decides.
#[derive(Debug, Default)]
pub struct SweepFindings {
    /// Markers to be ended with this failure, under this epoch.
    pub overdue: Vec<Overdue>,
    /// Whether something is ready for a free slot.
    pub ready: bool,
}

/// A marker that must end.
#[derive(Debug, Clone)]
pub struct Overdue {
    /// Its org.
    pub org: OrgId,
    /// Its turn.
    pub turn: TurnId,
    /// Its epoch now.
    pub epoch: Epoch,
    /// Why.
    pub why: OverdueReason,
}

/// Why a marker must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverdueReason {
    /// `waiting` for longer than its `queue_timeout_ms`.
    QueueTimeout,
    /// `ready` for longer than its `admission_timeout_ms`.
    AdmissionTimeout,
    /// `running` past its deadline.
    TurnTimeout,
    /// Its replica is gone and an effect had begun.
    HostLost,
    /// Its replica is gone and no attempt is left.
    AttemptsExhausted,
    /// The gate has refused it too often.
    GateRefused(GateRefusal),
}

/// What stays; `None`: everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// Ended turns that were accepted since, with all that is theirs.
    pub turns_since: Option<Timestamp>,
    /// Logs of turns that were accepted since. A turn keeps its reply without its log.
    pub events_since: Option<Timestamp>,
    /// What was done since, of the audit.
    pub audit_since: Option<Timestamp>,
}

/// Live turns, for `turnhouse_queue_depth` and `readyz`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LiveCounts {
    /// Behind other turns of their conversation.
    pub waiting: u64,
    /// Waiting for a slot.
    pub ready: u64,
    /// Running.
    pub running: u64,
}

impl LiveCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.waiting + self.ready + self.running
    }
}
