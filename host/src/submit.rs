//! A message comes in: facts at the edge, admission inside the accepting transaction, a turn that owes its client one terminal event.
//!
//! Every enqueuer (the gateway's routes, `POST /v1/ingest`, the library) goes through [`submit`].

use bytes::Bytes;

use crate::admission::{OnBusy, Refusal};
use crate::gate::SessionMode;
use crate::host::Host;
use crate::ids::{AgentId, ConversationId, OrgId, RunId, TurnId, UserId};
use crate::store::StoreError;

/// A message as an enqueuer hands it in, parsed and within its bounds.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The org of the key.
    pub org: OrgId,
    /// Who submits.
    pub user: UserId,
    /// Whether the submitter sees every conversation of the org.
    pub sees_all: bool,
    /// The agent.
    pub agent: AgentId,
    /// What the enqueuer said of the session.
    pub session: Session,
    /// The message as JSON ([`crate::content::Content`]).
    pub message: Bytes,
    /// Operations with outside effects are skipped.
    pub dry_run: bool,
    /// What to do if the conversation is busy.
    pub on_busy: OnBusy,
    /// `Idempotency-Key` and the SHA-256 of the raw body.
    pub key: Option<(String, [u8; 32])>,
}

/// Where a turn belongs.
#[derive(Debug, Clone)]
pub enum Session {
    /// The gateway's own routes: run id (the turn's), org and conversation are all there.
    Conversation(ConversationId),
    /// An adapter's envelope: whatever it had.
    Envelope {
        /// The run.
        run_id: Option<RunId>,
        /// The org as claimed. One that is not the key's must have been refused (`org_mismatch`) before.
        org: Option<OrgId>,
        /// The conversation.
        conversation: Option<ConversationId>,
        /// The agent's, when absent.
        mode: Option<SessionMode>,
    },
}

/// It is durable.
#[derive(Debug, Clone, Copy)]
pub struct Submitted {
    /// The turn.
    pub turn: TurnId,
    /// Its key had begun it already.
    pub replayed: bool,
}

/// Why it is not.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Admission said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No such agent in the org.
    #[error("no such agent")]
    NoSuchAgent,
    /// This host is draining: another attempt reaches another host, or this one after its restart.
    #[error("draining")]
    Draining,
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Accepts a message, or says why not. Returns once it is durable. Cancel-safe: a caller who goes away leaves an accepted turn behind, or nothing.
pub async fn submit(_host: &Host, _submission: Submission) -> Result<Submitted, SubmitError> {
    Err(SubmitError::Draining)
}
