//! A message comes in: facts at the edge, admission inside the accepting transaction, a turn that owes its client one terminal event.
//!
//! Every enqueuer (the gateway's routes, `POST /v1/ingest`, the library) goes through [`submit`].

use std::sync::Arc;

use bytes::Bytes;

use crate::admission::{OnBusy, QueueBounds, Refusal};
use crate::attachment::{Attachment, AttachmentId};
use crate::content::Joinable;
use crate::event;
use crate::events::LiveTurn;
use crate::gate::{Envelope, SessionMode};
use crate::host::{Host, STORE_PATIENCE};
use crate::ids::{AgentId, ConversationId, OrgId, RunId, TurnId, UserId};
use crate::store::{Accept, AcceptResult, Clocks, Collect, StoreError};

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
    /// The attachments that it refers to, each once.
    pub attachments: Vec<AttachmentId>,
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
#[derive(Clone)]
pub struct Submitted {
    /// The turn.
    pub turn: TurnId,
    /// Its key had begun it already.
    pub replayed: bool,
    /// The message became part of this turn, which was there before.
    pub joined: bool,
    /// Its newest events, if it is live here: a reader made from them misses nothing, even if the turn ends meanwhile.
    pub live: Option<Arc<LiveTurn>>,
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
    /// All the attachments of a message together.
    #[error("the message's attachments have {bytes} bytes together, the limit is {bytes_max}")]
    AttachmentsTooLarge {
        /// They have so many bytes.
        bytes: u64,
        /// `message_attachments_bytes_max`.
        bytes_max: u64,
    },
    /// File mode, and the store is shared.
    #[error("no file mode")]
    NoFileMode,
    /// This host is draining: another attempt reaches another host, or this one after its restart.
    #[error("draining")]
    Draining,
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the message refers to, if all of it is the submitter's to use. That it still is there when the turn is accepted, the store sees to.
async fn attachments(host: &Host, submission: &Submission) -> Result<Vec<Attachment>, SubmitError> {
    if submission.attachments.is_empty() {
        return Ok(Vec::new());
    }
    let user = (!submission.sees_all).then_some(&submission.user);
    let found = host.store.attachments(&submission.org, user, &submission.attachments).await?;
    if found.len() < submission.attachments.len() {
        return Err(Refusal::AttachmentNotFound.into());
    }
    let bytes = found.iter().map(|attachment| attachment.bytes).sum();
    let bytes_max = host.config.limits.message_attachments_bytes_max;
    if bytes > bytes_max {
        return Err(SubmitError::AttachmentsTooLarge { bytes, bytes_max });
    }
    Ok(found)
}

/// Accepts a message, or says why not. Returns once it is durable. Cancel-safe: a caller who goes away leaves an accepted turn behind, or nothing.
pub async fn submit(host: &Host, submission: Submission) -> Result<Submitted, SubmitError> {
    let dispatch = &host.dispatch;
    // What is asked below is asked once there is room, lest it is no longer so by then.
    let enter = tokio::time::timeout(STORE_PATIENCE, dispatch.turnstile.enter(&submission.org));
    let _pass = enter.await.map_err(|_late| StoreError::Unavailable("the journal is stuck".to_owned()))?;
    if dispatch.draining() {
        return Err(SubmitError::Draining);
    }
    // Whoever was let in before the org was marked finds nothing of it.
    if dispatch.leaving.contains(&submission.org) {
        return Err(SubmitError::NoSuchAgent);
    }
    let agent = host.agent(&submission.org, &submission.agent).await?.ok_or(SubmitError::NoSuchAgent)?;
    let limits = &host.config.limits;
    let attachments = attachments(host, &submission).await?;
    let files_bytes = attachments.iter().map(|attachment| attachment.bytes).sum();
    let turn = TurnId::new();
    // An envelope is a run of its own: it joins nothing.
    let own_run = matches!(submission.session, Session::Envelope { .. });
    let joinable =
        (submission.on_busy == OnBusy::Collect && !own_run).then(|| Joinable::of(&submission.message)).flatten();
    let envelope = match submission.session {
        Session::Conversation(conversation) => Envelope {
            run_id: Some(turn.into()),
            org: Some(submission.org.clone()),
            conversation: Some(conversation),
            mode: agent.settings.session_mode,
        },
        Session::Envelope { run_id, org, conversation, mode } => {
            Envelope { run_id, org, conversation, mode: mode.unwrap_or(agent.settings.session_mode) }
        }
    };
    if envelope.mode == SessionMode::File && host.store.shared() {
        return Err(SubmitError::NoFileMode);
    }
    let now = host.clock.now();
    let accepted = event::accepted(turn, &submission.agent, envelope.conversation.as_ref(), now);
    let (slot, claim_for) = match dispatch.slot_for_accept() {
        Some((slot, replica, bound)) => (Some(slot), Some((replica, bound))),
        None => (None, None),
    };
    let accept = Accept {
        org: submission.org.clone(),
        turn,
        agent: submission.agent,
        envelope,
        user: submission.user,
        sees_all: submission.sees_all,
        message: submission.message,
        attachments,
        dry_run: submission.dry_run,
        key: submission.key,
        on_busy: submission.on_busy,
        collect: joinable.map(|message| Collect {
            message,
            parts_max: u32::try_from(limits.message_parts_max).unwrap_or(u32::MAX),
            // What they say together is no more than one may say: JSON is no shorter than its text.
            bytes_max: limits.message_text_bytes_max.min(limits.request_body_bytes_max),
            files_bytes,
            files_bytes_max: limits.message_attachments_bytes_max,
        }),
        bounds: QueueBounds {
            conversation_queue_max: limits.conversation_queue_max,
            org_queue_max: limits.org_queue_max,
            host_queue_max: limits.host_queue_max,
        },
        clocks: Clocks {
            admission_timeout_ms: agent.admission_timeout_ms(limits),
            queue_timeout_ms: agent.queue_timeout_ms(limits),
            turn_timeout_ms: agent.turn_timeout_ms(limits),
        },
        attempts_max: limits.attempts_max,
        claim_for,
    };
    // The turn is live before it is accepted: it may end before we hear that it was.
    let live = dispatch.live.accept(&submission.org, accepted, turn);
    let accepted = tokio::time::timeout(STORE_PATIENCE, dispatch.journal.accept(accept, slot));
    let accepted = accepted.await.map_err(|_late| StoreError::Unavailable("the journal is stuck".to_owned()))?;
    match accepted.map_err(StoreError::from)? {
        AcceptResult::Accepted { .. } => Ok(Submitted { turn, replayed: false, joined: false, live: Some(live) }),
        AcceptResult::Attached(turn) => {
            Ok(Submitted { turn, replayed: true, joined: false, live: dispatch.live.get(turn) })
        }
        AcceptResult::Joined(turn) => {
            Ok(Submitted { turn, replayed: false, joined: true, live: dispatch.live.get(turn) })
        }
        AcceptResult::Refused(refusal) => {
            if let Some(limit) = refusal.limit() {
                dispatch.meters.refused(&submission.org, limit);
            }
            Err(refusal.into())
        }
    }
}
