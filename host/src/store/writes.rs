//! The hot path: what is written in batches, and the answer to each write. Who reads what became of it: `records.rs`.

use bytes::Bytes;
use uuid::Uuid;

use crate::admission::{OnBusy, QueueBounds, Refusal};
use crate::attachment::Attachment;
use crate::clock::Timestamp;
use crate::content::Joinable;
use crate::event::EventBatch;
use crate::gate::{Envelope, GateRefusal, SnapshotPermit};
use crate::ids::{AgentId, OrgId, ReplicaId, RunId, TurnId, UserId, WorkerName};
use crate::lease::{Epoch, Lease};
use crate::turn::{Outcome, Usage};

/// One write of the hot path.
#[derive(Debug, Clone)]
pub enum Write {
    /// A message comes in.
    Accept(Box<Accept>),
    /// Free slots look for ready turns.
    Claim(ClaimRequest),
    /// A running turn says something.
    Append(Append),
    /// A turn ends.
    Commit(Box<Commit>),
    /// A running turn goes back to the queue.
    Requeue(Requeue),
    /// A running turn is about to begin an operation of class `effect`: its log row, durable, and the marker's flag.
    BeginEffect(Append),
}

impl Write {
    /// How much it takes, near enough: what a client or a guest has said.
    pub fn bytes(&self) -> usize {
        match self {
            Write::Accept(accept) => {
                accept.message.len() + accept.collect.as_ref().map_or(0, |it| it.message.more.len())
            }
            Write::Append(append) | Write::BeginEffect(append) => append.batch.bytes(),
            Write::Commit(commit) => {
                let reply = match &commit.outcome {
                    Outcome::Completed { reply, .. } => reply.bytes(),
                    _ => 0,
                };
                reply + commit.tail.bytes() + commit.snapshot.as_ref().map_or(0, |staged| staged.body.len())
            }
            Write::Claim(_) | Write::Requeue(_) => 0,
        }
    }
}

/// The answer to the write at the same place of the batch.
#[derive(Debug)]
pub enum Written {
    /// To [`Write::Accept`].
    Accept(AcceptResult),
    /// To [`Write::Claim`]: refused envelopes come back too.
    Claim(Vec<Claimed>),
    /// To [`Write::Append`] and [`Write::BeginEffect`].
    Append(Fenced),
    /// To [`Write::Commit`].
    Commit(CommitResult),
    /// To [`Write::Requeue`].
    Requeue(Fenced),
    /// The item broke a constraint that nobody foresaw, alone; the others of its batch stand.
    Failed(String),
}

/// Whether a fenced write found its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fenced {
    /// It was written.
    Done,
    /// The marker is gone or has another epoch: nothing was written.
    Stale,
}

/// A message that was found admissible at the edge.
#[derive(Debug, Clone)]
pub struct Accept {
    /// The org of the key that submits.
    pub org: OrgId,
    /// The new turn.
    pub turn: TurnId,
    /// Its agent.
    pub agent: AgentId,
    /// Run id, org and conversation, as the enqueuer gave them. The gateway's own routes fill all three.
    pub envelope: Envelope,
    /// Who submits; owns the conversation if this turn begins it.
    pub user: UserId,
    /// Whether the submitter sees every conversation of the org.
    pub sees_all: bool,
    /// The message as JSON ([`crate::content::Content`]).
    pub message: Bytes,
    /// What it refers to, as the submitter was found to have it, each once.
    pub attachments: Vec<Attachment>,
    /// Operations with outside effects are skipped.
    pub dry_run: bool,
    /// `Idempotency-Key` and the SHA-256 of the raw body.
    pub key: Option<(String, [u8; 32])>,
    /// What to do if the conversation is busy.
    pub on_busy: OnBusy,
    /// The message as one that others join, and that joins others: with `on_busy: collect`.
    pub collect: Option<Collect>,
    /// How many live turns there may be.
    pub bounds: QueueBounds,
    /// Its clocks.
    pub clocks: Clocks,
    /// How often it may be started.
    pub attempts_max: u32,
    /// A slot is free and held for it: start it in this very write, if its lane is empty, its org under its bound and nothing older ready.
    pub claim_for: Option<(ReplicaId, RunningBound)>,
}

/// A message that may become part of a waiting turn, or have others become part of its own.
#[derive(Debug, Clone)]
pub struct Collect {
    /// It as parts.
    pub message: Joinable,
    /// Parts of a turn's message at most.
    pub parts_max: u32,
    /// Bytes of a turn's message at most.
    pub bytes_max: usize,
    /// Bytes of the attachments that it refers to.
    pub files_bytes: u64,
    /// Bytes of all that a turn's message refers to at most.
    pub files_bytes_max: u64,
}

impl Collect {
    /// Whether it fits into a turn whose message has so many parts and bytes, and refers to so many. One that does not collect has no parts.
    pub fn fits(&self, parts: u32, bytes: usize, files_bytes: u64) -> bool {
        parts > 0
            && parts + self.message.adds() <= self.parts_max
            && bytes + self.message.more.len() <= self.bytes_max
            && (self.files_bytes == 0 || files_bytes.saturating_add(self.files_bytes) <= self.files_bytes_max)
    }
}

/// How many turns of one org may run at once.
#[derive(Debug, Clone, Copy)]
pub struct RunningBound(pub usize);

/// A turn's clocks that the store keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    /// Ready, and not started.
    pub admission_timeout_ms: u64,
    /// Behind other turns of its conversation.
    pub queue_timeout_ms: u64,
    /// From start to end.
    pub turn_timeout_ms: u64,
}

/// What became of an [`Accept`].
#[derive(Debug)]
pub enum AcceptResult {
    /// It is durable: one terminal event is owed.
    Accepted {
        /// Turns that `on_busy: interrupt` ended in the same transaction.
        interrupted: Vec<Ended>,
        /// It was claimed at once. Without this, a slot must come for it.
        claimed: Option<Box<Claimed>>,
    },
    /// The key had begun this turn already.
    Attached(TurnId),
    /// It is durable as part of this turn, which waits.
    Joined(TurnId),
    /// Nothing was stored.
    Refused(Refusal),
}

/// Free slots, and who holds them.
#[derive(Debug, Clone, Copy)]
pub struct ClaimRequest {
    /// The claimer; must be live and not draining.
    pub holder: ReplicaId,
    /// How many at most.
    pub slots: usize,
    /// Running turns of one org at most.
    pub org_running_max: RunningBound,
    /// A refused envelope waits `backoff_ms << refusals`, at most `backoff_ms_max`.
    pub backoff_ms: u64,
    /// See `backoff_ms`.
    pub backoff_ms_max: u64,
}

/// A marker that changed its owner.
#[derive(Debug, Clone)]
pub struct Claimed {
    /// The right to write for it. For a refused envelope: the right to end it.
    pub lease: Lease,
    /// What the gate decides from.
    pub envelope: Envelope,
    /// The gate's column said no: it is back in the queue, and has been refused so often.
    pub refused: Option<(GateRefusal, u32)>,
    /// Its agent.
    pub agent: AgentId,
    /// Worker and version with which it first started, fixed for all attempts. `None`: the agent is gone.
    pub worker: Option<(WorkerName, u32)>,
    /// Revision of the agent's settings now.
    pub agent_revision: u64,
    /// Whose it is.
    pub user: UserId,
    /// 1 for the first start.
    pub attempt: u32,
    /// It had started before, in an earlier epoch.
    pub restarted: bool,
    /// The epoch of the first start.
    pub first_epoch: Epoch,
    /// The message as JSON.
    pub message: Bytes,
    /// Operations with outside effects are skipped.
    pub dry_run: bool,
    /// When it was accepted.
    pub accepted_at: Timestamp,
    /// When this attempt started.
    pub started_at: Timestamp,
    /// Its place in the conversation.
    pub seq: Option<i64>,
    /// Where its conversation's chain stands: what it starts from.
    pub head: Option<Head>,
    /// Its conversation's generation, in file mode and with a place in one: whose directory it works in.
    pub generation: Option<Uuid>,
}

/// The end of a conversation's chain of snapshots.
#[derive(Debug, Clone)]
pub struct Head {
    /// The run that wrote it, or the conversation's generation when there is none yet. The next snapshot's parent.
    pub parent: Uuid,
    /// The snapshot; `None` at the root.
    pub snapshot: Option<Snapshot>,
}

/// A snapshot as it was stored.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The run that wrote it.
    pub run_id: RunId,
    /// The worker that wrote it.
    pub worker: WorkerName,
    /// Its version.
    pub version: u32,
    /// Its bytes. `None`: the row is there, the bytes are not (S6: the turn fails).
    pub body: Option<Bytes>,
}

/// Events of a running turn.
#[derive(Debug, Clone)]
pub struct Append {
    /// The right to write.
    pub lease: Lease,
    /// Consecutive.
    pub batch: EventBatch,
}

/// The one way in which a turn ends.
#[derive(Debug, Clone)]
pub struct Commit {
    /// The org.
    pub org: OrgId,
    /// The turn.
    pub turn: TurnId,
    /// Only under this epoch. `None`: whatever it is (cancel, deletion).
    pub epoch: Option<Epoch>,
    /// How it ends.
    pub outcome: Outcome,
    /// The next state of its conversation.
    pub snapshot: Option<StagedSnapshot>,
    /// Events that no [`Append`] has written, of epoch `epoch`.
    pub tail: EventBatch,
    /// What it used; `None` when it never ran.
    pub usage: Option<Usage>,
}

/// A snapshot to be written, with the proof that it may be.
#[derive(Debug, Clone)]
pub struct StagedSnapshot {
    /// The gate's.
    pub permit: SnapshotPermit,
    /// What it started from: must still be the conversation's head.
    pub parent: Uuid,
    /// The state.
    pub body: Bytes,
}

/// What became of a [`Commit`].
#[derive(Debug)]
pub enum CommitResult {
    /// This call ended the turn. Its terminal event is `ended`'s.
    Won(Box<Ended>),
    /// Somebody else has ended it, or owns it now: nothing was written.
    Lost,
    /// The conversation's head is not the snapshot's parent any more (it was reset): nothing was written. Commit again without.
    SnapshotConflict,
}

/// A turn that has just ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// The org.
    pub org: OrgId,
    /// The turn.
    pub turn: TurnId,
    /// Its agent.
    pub agent: AgentId,
    /// How.
    pub outcome: Outcome,
    /// What it used.
    pub usage: Option<Usage>,
    /// It held a slot of this replica or another: whoever runs it must stop.
    pub was_running: bool,
    /// When it was accepted, and when it ended.
    pub accepted_at: Timestamp,
    /// See `accepted_at`.
    pub ended_at: Timestamp,
    /// The conversation's next turn became ready.
    pub promoted: bool,
}

/// Back to the queue. The attempt does not count: only the loss of a host spends one.
#[derive(Debug, Clone)]
pub struct Requeue {
    /// The right to write.
    pub lease: Lease,
    /// Not before so long from now.
    pub delay_ms: u64,
}
