//! What became of changes outside the hot path (that is `writes.rs`).

use super::records::{ConversationRecord, WorkerVersion};
use crate::agent::Agent;
use crate::caller::Owned;
use crate::clock::Timestamp;
use crate::ids::{AgentId, OrgId};
use crate::quota::Exceeded;

/// What became of a conversation that was asked for by its id.
#[derive(Debug)]
pub enum Opening {
    /// It is new.
    Made(Owned<ConversationRecord>),
    /// It was there, perhaps as another member's.
    Found(Owned<ConversationRecord>),
    /// It is not there, and its org may make none now.
    Refused(Exceeded),
}

/// What became of [`Store::provision_org`](super::Store::provision_org).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provisioned {
    /// The org is new.
    pub created: bool,
    /// It had no owner.
    pub owner_set: bool,
    /// It had no owner among its members, and its owner is one now.
    pub owner_joined: bool,
    /// Its default agent.
    pub default: DefaultAgent,
}

/// Which agent answers whoever names none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DefaultAgent {
    /// The one that there was.
    Kept(AgentId),
    /// One of the starter's name, which was not marked.
    Flagged(AgentId),
    /// A new one.
    Made(AgentId),
    /// None: the org was given one before, and its admin has taken it away.
    LeftOut,
    /// None: the org has as many agents or workers as it may.
    NoRoom,
    /// The org is being deleted, and nothing was done.
    Deleting,
}

impl DefaultAgent {
    /// The agent that was marked or made.
    pub fn provided(&self) -> Option<&AgentId> {
        match self {
            DefaultAgent::Flagged(agent) | DefaultAgent::Made(agent) => Some(agent),
            DefaultAgent::Kept(_) | DefaultAgent::LeftOut | DefaultAgent::NoRoom | DefaultAgent::Deleting => None,
        }
    }

    pub(super) fn is_repair(&self) -> bool {
        self.provided().is_some()
    }
}

/// What became of a step of an org's deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erased {
    /// Nothing went: turns of it are live, or nobody has marked it.
    Not,
    /// So many rows went, and there may be more.
    Rows(usize),
    /// Nothing of it is left.
    Whole,
}

/// What became of a step of retention.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retained {
    /// The org that it was about; `None`: there are no more, the round begins again.
    pub org: Option<OrgId>,
    /// How many turns, logs and entries of the audit went.
    pub rows: usize,
}

/// What became of a deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deleted {
    /// It is gone.
    Done,
    /// It was not there.
    NotFound,
    /// This still uses it.
    InUse(String),
}

/// What became of [`Store::put_attachment`](super::Store::put_attachment).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutAttachment {
    /// The member did not have it.
    Created(Timestamp),
    /// The member had uploaded it already. It is kept for as long as a new one.
    Existing(Timestamp),
    /// The org's attachments have as many bytes as they may.
    Full,
    /// All that the org stores has as many bytes as it may have: these.
    StorageFull(u64),
    /// The org is going, or gone: nothing may be left behind in it.
    NoOrg,
}

/// Why there is no room for an upload of a worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkerFull {
    /// The org's `storage_bytes_max`.
    #[error(
        "the org has stored the {0} bytes that it may; delete conversations or workers: what is stored is measured again within a minute or so"
    )]
    Storage(u64),
    /// `org_workers_max`.
    #[error("the org has {0} workers, its limit; delete one")]
    Workers(u64),
    /// `worker_versions_kept`.
    #[error(
        "the worker has {0} versions, its limit, and agents or live turns use them all; move a pin or delete an agent"
    )]
    Versions(u64),
}

/// What became of [`Store::put_worker`](super::Store::put_worker).
#[derive(Debug, Clone)]
pub enum PutWorker {
    /// A new version.
    Created(WorkerVersion),
    /// These bytes were this version already.
    Existing(WorkerVersion),
    /// There is no room for it.
    Full(WorkerFull),
}

/// What became of [`Store::put_agent`](super::Store::put_agent).
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one at a time, taken apart at once
pub enum PutAgent {
    /// Stored.
    Stored {
        /// As stored, with its version.
        agent: Agent,
        /// It did not exist before.
        created: bool,
    },
    /// The worker, or this version of it, does not exist.
    NoSuchWorker,
    /// The org has `org_agents_max` agents.
    Full,
    /// `session_mode: file` needs a directory that every turn finds again, and this store serves several hosts.
    NoFileMode,
}
