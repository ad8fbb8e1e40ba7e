//! What the host remembers, in domain terms: one trait, one implementation per database, one conformance suite.
//!
//! The hot path writes in batches through [`Store::write`], which only the journal calls: one transaction for everything that is pending,
//! one answer an item, and an item that fails, fails alone (R7). Everything else is a method of its own. Time is always a parameter.
//! No SQL and no connection leaves this module; nothing here is held while a guest runs.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use crate::agent::{Agent, AgentSettings};
use crate::attachment::{Attachment, AttachmentId};
use crate::audit::{Act, Actor, AuditEntry, AuditFilter, AuditPlace};
use crate::caller::{Owned, Role};
use crate::clock::Timestamp;
use crate::event::EventId;
use crate::ids::{AgentId, ConversationId, OrgId, ReplicaId, TurnId, UserId, WorkerName};
use crate::lease::Lease;
use crate::notes::NotesChange;
use crate::quota::{LimitsChange, OwnLimits};
use crate::turn::Usage;

/// Declares statements and lists them, so that one test per database can look at every plan.
macro_rules! statements {
    ($($(#[$doc:meta])* $name:ident = $sql:expr;)*) => {
        $($(#[$doc])* pub(super) const $name: &str = $sql;)*
        /// Every statement of this module, by name.
        #[cfg(test)]
        pub(super) const STATEMENTS: &[(&str, &str)] = &[$((stringify!($name), $name)),*];
    };
}
mod changes;
mod members;
mod records;
mod status;
mod writes;

pub mod postgres;
pub mod sqlite;

#[cfg(test)]
mod conformance;

pub use changes::*;
pub use members::{Member, MemberRefusal, Membership, PutMember, RemoveMember};
pub use records::*;
pub use status::{Finding, Health, Hint, Progress, ReplicaStatus, StoreStatus};
pub use writes::*;

/// What went wrong with the store itself. Losing an election is none of these.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It does not answer, is full or is read-only; the same call may succeed later.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// Another host uses it.
    #[error("{0}")]
    InUse(String),
    /// Its schema is newer than this program.
    #[error("the database has schema version {found}, this program knows up to {known}; run a newer turnhouse")]
    NewerSchema {
        /// What the database has.
        found: i64,
        /// What this program knows.
        known: i64,
    },
    /// What it holds contradicts itself or this program.
    #[error("the store holds what it should not: {0}")]
    Corrupt(String),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> StoreError {
        match error {
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::ColumnNotFound(_) => {
                StoreError::Corrupt(error.to_string())
            }
            // A grant that is missing, or the wall between orgs: asking again would not help.
            sqlx::Error::Database(refused) if refused.code().as_deref() == Some("42501") => {
                StoreError::Corrupt(format!("the database refuses a statement: {refused}"))
            }
            other => StoreError::Unavailable(other.to_string()),
        }
    }
}

/// What the store's callers get.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Everything that the host remembers.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Writes a batch in one transaction, durably: one answer an item, in order. Only the journal calls this, from its own thread; an
    /// implementation may block it. `Err`: nothing of the batch was written.
    async fn write(&self, batch: Vec<Write>, now: Timestamp) -> Result<Vec<Written>>;
    /// For how long what is pending should gather before it is written: for so long, by the last batches, it would only wait for other hosts' batches.
    fn gather(&self) -> Duration {
        Duration::ZERO
    }

    // -- replicas
    /// Begins an incarnation.
    async fn register_replica(&self, replica: ReplicaId, now: Timestamp, ttl_ms: u64) -> Result<()>;
    /// Prolongs it. `false`: it has expired and is dead for ever.
    async fn renew_replica(&self, replica: ReplicaId, now: Timestamp, ttl_ms: u64) -> Result<bool>;
    /// Claims of this replica find nothing from now on.
    async fn drain_replica(&self, replica: ReplicaId) -> Result<()>;
    /// Ends an incarnation whose turns are all ended or given back.
    async fn retire_replica(&self, replica: ReplicaId) -> Result<()>;
    /// On the embedded store no other host lives: whatever incarnation is left from before has crashed. Expires them all at once, so that their
    /// turns are claimed again without waiting for a TTL. Never called where the store is [`Store::shared`].
    async fn expire_other_replicas(&self, except: ReplicaId, now: Timestamp) -> Result<u64>;

    // -- sweeping
    /// Overdue markers, at most `limit`.
    async fn sweep(&self, now: Timestamp, gate_refusals_max: u32, limit: usize) -> Result<SweepFindings>;
    /// Mends conversations whose next turn was not made ready, at most `limit`. Looks at all that waits.
    async fn repair_lanes(&self, now: Timestamp, limit: usize) -> Result<()>;
    /// Forgets idempotency keys from before `before`, at most `limit`; how many.
    async fn forget_keys(&self, before: Timestamp, limit: usize) -> Result<usize>;
    /// Deletes what `keep` does not, of the org after `after`, at most `limit` turns and as many logs: so little that nobody waits for it.
    async fn retain(&self, after: Option<&OrgId>, keep: Retention, limit: usize) -> Result<Retained>;
    /// Live turns by state.
    async fn live_counts(&self) -> Result<LiveCounts>;

    // -- turns
    /// A turn; belongs to its user.
    async fn turn(&self, org: &OrgId, turn: TurnId) -> Result<Option<Owned<TurnRecord>>>;
    /// Its log after `after` (exclusive; from the start when `None`), about `bytes_max` of it.
    async fn events(
        &self,
        org: &OrgId,
        turn: TurnId,
        after: Option<EventId>,
        bytes_max: usize,
    ) -> Result<Option<EventPage>>;
    /// Turns of a conversation by place; private ones only when asked for. The cursor is a `seq`, exclusive.
    #[allow(clippy::too_many_arguments)]
    async fn turns(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        after: Option<i64>,
        direction: Direction,
        with_private: bool,
        limit: usize,
    ) -> Result<Page<TurnRecord>>;
    /// Running turns held by `replica`, for the hand-over of a drain.
    async fn running_turns(&self, replica: ReplicaId) -> Result<Vec<Lease>>;
    /// Which of these turns have ended or have another epoch: their instances must stop.
    async fn stale(&self, leases: &[Lease]) -> Result<Vec<TurnId>>;
    /// How far these turns have come, in their order, in one round trip; `None`: there is no such turn (any more). Readers whose turn runs elsewhere
    /// live from this, all of a host's at once: it must cost a few index look-ups a turn, and read no body.
    async fn progress(&self, turns: &[(OrgId, TurnId)]) -> Result<Vec<Option<Progress>>>;
    /// What may have changed, from now on, by whichever host; `None`: nobody tells. Hints are told after their commit and never hold it up; a
    /// receiver that lags behind has missed some, and none is owed to anybody.
    fn hints(&self) -> Option<tokio::sync::broadcast::Receiver<Hint>> {
        None
    }

    // -- conversations
    /// Makes a conversation, or finds it. One that is made counts against its org's rate and room as a message does.
    async fn open_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        user: &UserId,
        now: Timestamp,
    ) -> Result<Opening>;
    /// One conversation.
    async fn conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
    ) -> Result<Option<Owned<ConversationRecord>>>;
    /// A conversation's generation, also when it is deleted; `None` when it never was. Renewed when it is deleted or reset; none ever comes back.
    async fn generation(&self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) -> Result<Option<Uuid>>;
    /// What the private directory of a conversation's generation takes of the disk: a part of what its org and its agent have stored. Nothing where hosts share
    /// the store: they have no private directories.
    async fn note_files(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        generation: Uuid,
        bytes: u64,
    ) -> Result<()>;
    /// Conversations of an agent by id, of one user or of all.
    async fn conversations(
        &self,
        org: &OrgId,
        agent: &AgentId,
        user: Option<&UserId>,
        after: Option<&ConversationId>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>>;
    /// Writes a title or metadata on it; `false`: it is not there, or not `whose`.
    async fn write_notes(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        change: &NotesChange,
    ) -> Result<bool>;
    /// Ends its live turns (`by: deleted`), deletes its turns, events and snapshots. Whoever makes it again starts from nothing (S8). `None`: it is not there,
    /// or not `whose`.
    async fn delete_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Option<Vec<Ended>>>;
    /// Starts its chain of snapshots anew; turns stay. `false`: it is not there, or not `whose`.
    async fn reset_snapshot(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<bool>;

    /// An org's conversations by agent and id, after a place.
    async fn org_conversations(
        &self,
        org: &OrgId,
        after: Option<&(AgentId, ConversationId)>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>>;
    /// An org's turns by id, which is by age, after one: those without a place in a conversation, too.
    async fn org_turns(&self, org: &OrgId, after: Option<TurnId>, limit: usize) -> Result<Page<TurnRecord>>;
    /// Snapshots without their bytes, conversation by conversation, after a place.
    async fn snapshots(
        &self,
        org: &OrgId,
        among: &Among,
        after: Option<&SnapshotPlace>,
        limit: usize,
    ) -> Result<Page<SnapshotRecord>>;

    // -- attachments
    /// Stores an attachment for a member, in pieces of [`PIECE_BYTES`](crate::attachment::PIECE_BYTES) but for the last, or finds theirs. The member learns
    /// nothing of others who have the same.
    async fn put_attachment(
        &self,
        org: &OrgId,
        user: &UserId,
        attachment: &Attachment,
        pieces: Vec<Bytes>,
        org_bytes_max: u64,
        now: Timestamp,
    ) -> Result<PutAttachment>;
    /// Those of these that a member may use: who has uploaded them, or has a turn that refers to them. `None`: whoever it is that sees all of the org.
    async fn attachments(&self, org: &OrgId, user: Option<&UserId>, ids: &[AttachmentId]) -> Result<Vec<Attachment>>;
    /// What these turns refer to.
    async fn attachments_of(&self, org: &OrgId, turns: &[TurnId]) -> Result<Vec<Attachment>>;
    /// An org's attachments by id, after one.
    async fn org_attachments(&self, org: &OrgId, after: Option<AttachmentId>, limit: usize)
    -> Result<Page<Attachment>>;
    /// A piece of an attachment, counted from 0.
    async fn attachment_piece(&self, org: &OrgId, id: AttachmentId, piece: u32) -> Result<Option<Bytes>>;
    /// Forgets uploads from before `before`, at most `limit`, and deletes attachments that nothing refers to any more, at most as many and not many
    /// megabytes of them. How many it has looked at.
    async fn sweep_attachments(&self, before: Timestamp, limit: usize) -> Result<usize>;

    // -- workers
    /// Stores a version, or finds the one that has these bytes.
    #[allow(clippy::too_many_arguments)]
    async fn put_worker(
        &self,
        org: &OrgId,
        worker: &WorkerName,
        digest: [u8; 32],
        wasm: Bytes,
        imports: Vec<String>,
        compile_ms: f64,
        workers_max: usize,
        versions_kept: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutWorker>;
    /// The newest version of each worker, by name.
    async fn workers(&self, org: &OrgId, after: Option<&WorkerName>, limit: usize) -> Result<Page<WorkerVersion>>;
    /// A worker's versions, newest first; empty when there is no such worker.
    async fn worker_versions(&self, org: &OrgId, worker: &WorkerName) -> Result<Vec<WorkerVersion>>;
    /// One version.
    async fn worker_version(&self, org: &OrgId, worker: &WorkerName, version: u32) -> Result<Option<WorkerVersion>>;
    /// A module's bytes.
    async fn module(&self, org: &OrgId, digest: [u8; 32]) -> Result<Option<Bytes>>;
    /// Deletes a worker with all its versions, unless an agent uses it.
    async fn delete_worker(&self, org: &OrgId, worker: &WorkerName, now: Timestamp, by: &Actor) -> Result<Deleted>;

    // -- agents
    /// Makes or changes an agent; `version: None` takes the worker's newest. `default: true` takes it from the agent that had it.
    async fn put_agent(
        &self,
        org: &OrgId,
        agent: &AgentId,
        settings: AgentSettings,
        agents_max: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutAgent>;
    /// One agent.
    async fn agent(&self, org: &OrgId, agent: &AgentId) -> Result<Option<Agent>>;
    /// The org's default.
    async fn default_agent(&self, org: &OrgId) -> Result<Option<Agent>>;
    /// Agents by id.
    async fn agents(&self, org: &OrgId, after: Option<&AgentId>, limit: usize) -> Result<Page<Agent>>;
    /// Deletes an agent that has no conversation.
    async fn delete_agent(&self, org: &OrgId, agent: &AgentId, now: Timestamp, by: &Actor) -> Result<Deleted>;

    // -- orgs and keys
    /// Makes an org, or fills in what an older one lacks; `true` when it is new.
    async fn create_org(&self, org: &OrgId, owner: &UserId, now: Timestamp, by: &Actor) -> Result<bool>;
    /// Makes an org with its owner and its default agent, or fills in what an older one lacks. What is there stays as it is.
    async fn provision_org(
        &self,
        org: &OrgId,
        owner: &UserId,
        starter: &Starter,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Provisioned>;
    /// One org.
    async fn org(&self, org: &OrgId) -> Result<Option<OrgRecord>>;
    /// Orgs by id.
    async fn orgs(&self) -> Result<Vec<OrgRecord>>;
    /// Changes an org's own limits, from the next batch on at every host; as they are then. `None`: there is no such org.
    async fn set_org_limits(
        &self,
        org: &OrgId,
        change: &LimitsChange,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Option<OwnLimits>>;
    /// What the guest of a turn used that was ended without it: by an interrupt, with its conversation, by another host. Is added to what its org and
    /// its agent have used, and told of the turn if that is still there. `false`: what it used was known, or it has not ended.
    async fn add_usage(
        &self,
        org: &OrgId,
        agent: &AgentId,
        turn: TurnId,
        usage: &Usage,
        now: Timestamp,
    ) -> Result<bool>;
    /// An org's own limits and what it uses. `None`: there is no such org.
    async fn org_use(&self, org: &OrgId, now: Timestamp) -> Result<Option<OrgUse>>;

    /// Measures what one org has stored, and its agents that have limits: of those that have a limit, the one that was measured longest ago and long enough. `None`: there is none.
    async fn measure_storage(&self, now: Timestamp) -> Result<Option<OrgId>>;

    /// What an agent with bounds of its own has used of them; `None`: it has none.
    async fn agent_use(&self, org: &OrgId, agent: &AgentId, now: Timestamp) -> Result<Option<AgentUse>>;
    /// Marks an org for deletion and ends its keys: from now on it is nobody's. `false`: there is no such org. Told in the host's own audit.
    async fn mark_org(&self, org: &OrgId, now: Timestamp, by: &Actor) -> Result<bool>;
    /// Orgs that are marked.
    async fn deleting_orgs(&self) -> Result<Vec<OrgRecord>>;
    /// An org's live turns, at most `limit`.
    async fn live_turns(&self, org: &OrgId, limit: usize) -> Result<Vec<TurnId>>;
    /// The digests of an org's modules.
    async fn module_digests(&self, org: &OrgId) -> Result<Vec<[u8; 32]>>;
    /// Deletes at most so many rows of a marked org without live turns; at last the org itself.
    async fn erase_org(&self, org: &OrgId, limit: usize) -> Result<Erased>;
    /// Stores a key by the SHA-256 of its secret. `false`: there is no such org.
    async fn create_key(&self, hash: [u8; 32], key: &KeyRecord, by: &Actor) -> Result<bool>;
    /// The key with this SHA-256, whatever its state.
    async fn key(&self, hash: [u8; 32]) -> Result<Option<KeyRecord>>;
    /// The org's key of this id, whatever its state.
    async fn key_by_id(&self, org: &OrgId, id: &str) -> Result<Option<KeyRecord>>;
    /// An org's keys, newest first.
    async fn keys(&self, org: &OrgId) -> Result<Vec<KeyRecord>>;
    /// Stores a key in the place of the org's key `id`, which ends `overlap_ms` from now at the latest. `false`: that is not there, has ended, or has a
    /// successor; nothing is stored.
    async fn rotate_key(&self, id: &str, hash: [u8; 32], key: &KeyRecord, overlap_ms: u64, by: &Actor) -> Result<bool>;
    /// Revokes; `false` when there is no such key.
    async fn revoke_key(&self, org: &OrgId, id: &str, now: Timestamp, by: &Actor) -> Result<bool>;
    /// Records the last use of keys, by id.
    async fn touch_keys(&self, used: &[(OrgId, String)], now: Timestamp) -> Result<()>;
    /// What stream tickets are authenticated with, newest first: the same for every host.
    async fn ticket_keys(&self) -> Result<Vec<TicketKey>>;
    /// Adds one, if its number is the next; `false`: another host was first. Those before its predecessor are forgotten.
    async fn add_ticket_key(&self, number: i64, secret: [u8; 32], now: Timestamp) -> Result<bool>;

    // -- members
    /// An org's members by user, after one.
    async fn members(&self, org: &OrgId, after: Option<&UserId>, limit: usize) -> Result<Page<Member>>;
    /// As what somebody belongs to an org; `None`: they do not, or it is being deleted, or there is none.
    async fn role(&self, org: &OrgId, user: &UserId) -> Result<Option<Role>>;
    /// The orgs to which somebody belongs, by id, at most `limit`.
    async fn memberships(&self, user: &UserId, limit: usize) -> Result<Vec<Membership>>;
    /// The one among somebody's orgs that has this turn. Nothing is looked for in others': it takes the same time whether they have it or nobody does.
    async fn membership_of_turn(&self, user: &UserId, turn: TurnId) -> Result<Option<Membership>>;
    /// Makes somebody a member, or gives a member another role. `changer`: on whose behalf; `None` for the operator, who may make owners, too.
    #[allow(clippy::too_many_arguments)]
    async fn put_member(
        &self,
        org: &OrgId,
        user: &UserId,
        role: Role,
        changer: Option<&UserId>,
        members_max: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutMember>;
    /// Takes a member out of an org and ends their keys there.
    async fn remove_member(
        &self,
        org: &OrgId,
        user: &UserId,
        changer: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<RemoveMember>;

    // -- audit: whatever takes an `Actor` above writes down who did it, in its own transaction
    /// Writes down what changes nothing in the store, before it is done. `None`: in the host's own audit.
    async fn record_act(&self, org: Option<&OrgId>, act: &Act, now: Timestamp, by: &Actor) -> Result<()>;
    /// What was done in an org, or (`None`) to the host, newest first: since a time, before a place.
    async fn audit(
        &self,
        org: Option<&OrgId>,
        filter: &AuditFilter,
        since: Timestamp,
        before: Option<AuditPlace>,
        limit: usize,
    ) -> Result<Page<AuditEntry>>;

    // -- itself
    /// Whether several hosts may use it at once.
    fn shared(&self) -> bool {
        false
    }
    /// The time that it goes by, where that is its own; `None`: it believes the `now` that it is given.
    async fn time(&self) -> Result<Option<Timestamp>> {
        Ok(None)
    }
    /// How it stands, for an operator. Reads what is live and no history.
    async fn status(&self, now: Timestamp) -> Result<StoreStatus>;
    /// What of its own set-up is as it should be and what is not. An error is for a store that does not answer.
    async fn examine(&self) -> Result<Vec<Finding>>;
    /// Whether it answers.
    async fn ping(&self) -> Result<()>;
    /// Flushes and closes.
    async fn close(&self);
}
