//! Whether a message may come in. Pure: facts → [`Decision`] or a named [`Refusal`].
//!
//! The store gathers the facts inside the accepting transaction and asks here, so that what was true when it was decided is true when it is
//! written. Nothing is stored for a refusal. The order of the checks is part of the contract: ownership first, then idempotency, then what the
//! message refers to, then busy, then what the org and the agent may use, then room.

use crate::ids::TurnId;
use crate::quota::{Exceeded, LimitName, LimitOf};

/// What to do when the conversation has a live turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBusy {
    /// Wait behind it.
    #[default]
    Enqueue,
    /// Be refused.
    Reject,
    /// Cancel every live turn of the conversation.
    Interrupt,
    /// Wait behind it, together with whatever else comes meanwhile: all of it is one next turn, in the order in which it came.
    Collect,
}

/// What the store knows about a submission's place, read in the transaction that would accept it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts {
    /// The conversation exists and is not the caller's to see.
    pub foreign: bool,
    /// The turn that already has the submission's idempotency key, and whether its body was the same.
    pub keyed: Option<(TurnId, bool)>,
    /// The message refers to an attachment that is not there.
    pub attachment_missing: bool,
    /// Live turns of the conversation, and the one whose turn it is.
    pub lane_live: usize,
    /// The ready or running turn of the conversation, else the first that waits.
    pub lane_active: Option<TurnId>,
    /// The last turn that waits in the conversation, if it collects and has room for this message.
    pub joins: Option<TurnId>,
    /// What the org, or the agent, has used up that a message needs. Nothing for a message that was accepted before.
    pub exceeded: Option<Exceeded>,
    /// Live turns of the org.
    pub org_live: usize,
    /// Live turns of the agent, and how many there may be, if it has a bound of its own.
    pub agent_queue: Option<(usize, usize)>,
    /// Live turns of the host.
    pub host_live: usize,
}

/// How many live turns there may be.
#[derive(Debug, Clone, Copy)]
pub struct QueueBounds {
    /// Of a conversation, its running one not counted.
    pub conversation_queue_max: usize,
    /// Of an org.
    pub org_queue_max: usize,
    /// Of the host.
    pub host_queue_max: usize,
}

/// What becomes of an admissible submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// A new turn.
    Accept {
        /// Cancel the conversation's live turns first.
        interrupt: bool,
    },
    /// The turn that this key already began.
    Attach(TurnId),
    /// No turn of its own: it becomes part of this one.
    Join(TurnId),
}

/// Why a submission does not come in.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The conversation is another member's: to the caller it does not exist.
    #[error("not found")]
    NotFound,
    /// The key came with another body.
    #[error("idempotency key used with another body")]
    IdempotencyMismatch,
    /// It refers to an attachment that is not there, or not the caller's to use.
    #[error("attachment not found")]
    AttachmentNotFound,
    /// `on_busy: reject`, and a turn is live.
    #[error("conversation busy")]
    ConversationBusy {
        /// That turn.
        active: TurnId,
    },
    /// Too many turns wait in the conversation.
    #[error("conversation queue full")]
    ConversationQueueFull,
    /// The org, or the agent, has used up what it may use.
    #[error("over the {}'s {}", .0.of.as_str(), .0.limit.as_str())]
    Exceeded(Exceeded),
    /// Too many live turns of the org.
    #[error("org queue full")]
    OrgQueueFull {
        /// How many there may be.
        max: usize,
    },
    /// Too many live turns of the agent.
    #[error("agent queue full")]
    AgentQueueFull {
        /// How many there may be.
        max: usize,
    },
    /// Too many live turns of the host.
    #[error("host queue full")]
    HostQueueFull,
}

impl Refusal {
    /// The limit that it is for, and whose that is.
    pub fn limit(&self) -> Option<(LimitOf, LimitName)> {
        match self {
            Refusal::Exceeded(exceeded) => Some((exceeded.of, exceeded.limit)),
            Refusal::OrgQueueFull { .. } => Some((LimitOf::Org, LimitName::QueueMax)),
            Refusal::AgentQueueFull { .. } => Some((LimitOf::Agent, LimitName::QueueMax)),
            _ => None,
        }
    }
}

/// Decides.
pub fn decide(facts: &Facts, on_busy: OnBusy, bounds: &QueueBounds) -> Result<Decision, Refusal> {
    if facts.foreign {
        return Err(Refusal::NotFound);
    }
    match facts.keyed {
        Some((turn, true)) => return Ok(Decision::Attach(turn)),
        Some((_, false)) => return Err(Refusal::IdempotencyMismatch),
        None => {}
    }
    if facts.attachment_missing {
        return Err(Refusal::AttachmentNotFound);
    }
    let interrupt = match (on_busy, facts.lane_active) {
        (OnBusy::Reject, Some(active)) => return Err(Refusal::ConversationBusy { active }),
        (OnBusy::Interrupt, Some(_)) => true,
        _ => false,
    };
    // Also for what joins: it is a message like any other.
    if let Some(exceeded) = facts.exceeded {
        return Err(Refusal::Exceeded(exceeded));
    }
    // Takes no room of its own.
    if let (OnBusy::Collect, Some(turn)) = (on_busy, facts.joins) {
        return Ok(Decision::Join(turn));
    }
    // An interrupt makes room for itself in its conversation; in the org and the host its predecessors are gone by then, too.
    let freed = if interrupt { facts.lane_live } else { 0 };
    if facts.lane_live - freed > bounds.conversation_queue_max {
        return Err(Refusal::ConversationQueueFull);
    }
    if facts.org_live.saturating_sub(freed) >= bounds.org_queue_max {
        return Err(Refusal::OrgQueueFull { max: bounds.org_queue_max });
    }
    if let Some((live, max)) = facts.agent_queue
        && live.saturating_sub(freed) >= max
    {
        return Err(Refusal::AgentQueueFull { max });
    }
    if facts.host_live.saturating_sub(freed) >= bounds.host_queue_max {
        return Err(Refusal::HostQueueFull);
    }
    Ok(Decision::Accept { interrupt })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: QueueBounds = QueueBounds { conversation_queue_max: 2, org_queue_max: 10, host_queue_max: 20 };

    #[test]
    fn ownership_then_idempotency_then_busy_then_use_then_room() {
        let turn = TurnId::new();
        let full_org = Refusal::OrgQueueFull { max: 10 };
        let used_up = Exceeded { of: LimitOf::Org, limit: LimitName::SubmitsPerSecond, max: 2.0, wait_ms: Some(500) };
        let all = Facts {
            foreign: true,
            keyed: Some((turn, false)),
            attachment_missing: true,
            lane_live: 9,
            lane_active: Some(turn),
            joins: Some(turn),
            exceeded: Some(used_up),
            org_live: 99,
            agent_queue: Some((9, 9)),
            host_live: 99,
        };
        assert_eq!(decide(&all, OnBusy::Reject, &BOUNDS), Err(Refusal::NotFound));
        let own = Facts { foreign: false, ..all };
        assert_eq!(decide(&own, OnBusy::Reject, &BOUNDS), Err(Refusal::IdempotencyMismatch));
        let same = Facts { keyed: Some((turn, true)), attachment_missing: false, ..own };
        assert_eq!(decide(&same, OnBusy::Interrupt, &BOUNDS), Ok(Decision::Attach(turn)));
        let without = Facts { keyed: None, ..own };
        assert_eq!(decide(&without, OnBusy::Reject, &BOUNDS), Err(Refusal::AttachmentNotFound));
        let greedy = Facts { attachment_missing: false, ..without };
        assert_eq!(decide(&greedy, OnBusy::Reject, &BOUNDS), Err(Refusal::ConversationBusy { active: turn }));
        for on_busy in [OnBusy::Enqueue, OnBusy::Interrupt, OnBusy::Collect] {
            assert_eq!(decide(&greedy, on_busy, &BOUNDS), Err(Refusal::Exceeded(used_up)), "also what would join");
        }
        let new = Facts { exceeded: None, ..greedy };
        assert_eq!(decide(&new, OnBusy::Reject, &BOUNDS), Err(Refusal::ConversationBusy { active: turn }));
        assert_eq!(decide(&new, OnBusy::Enqueue, &BOUNDS), Err(Refusal::ConversationQueueFull));
        assert_eq!(decide(&new, OnBusy::Collect, &BOUNDS), Ok(Decision::Join(turn)), "it takes no room");
        let full = Facts { joins: None, ..new };
        assert_eq!(decide(&full, OnBusy::Collect, &BOUNDS), Err(Refusal::ConversationQueueFull));
        assert_eq!(decide(&same, OnBusy::Collect, &BOUNDS), Ok(Decision::Attach(turn)), "the key comes first");
        assert_eq!(decide(&new, OnBusy::Interrupt, &BOUNDS), Err(full_org));
        let alone = Facts { lane_live: 0, lane_active: None, ..new };
        assert_eq!(decide(&alone, OnBusy::Reject, &BOUNDS), Err(full_org));
        let full_agent = Facts { org_live: 9, ..alone };
        assert_eq!(decide(&full_agent, OnBusy::Reject, &BOUNDS), Err(Refusal::AgentQueueFull { max: 9 }));
        let room = Facts { agent_queue: Some((8, 9)), ..full_agent };
        assert_eq!(decide(&room, OnBusy::Reject, &BOUNDS), Err(Refusal::HostQueueFull));
        let room = Facts { host_live: 19, ..room };
        assert_eq!(decide(&room, OnBusy::Reject, &BOUNDS), Ok(Decision::Accept { interrupt: false }));
    }

    #[test]
    fn a_conversation_holds_its_running_turn_and_its_queue() {
        let active = Some(TurnId::new());
        let full = Facts { lane_live: 3, lane_active: active, ..Facts::default() };
        assert_eq!(decide(&full, OnBusy::Enqueue, &BOUNDS), Err(Refusal::ConversationQueueFull));
        assert_eq!(decide(&full, OnBusy::Interrupt, &BOUNDS), Ok(Decision::Accept { interrupt: true }));
        let room = Facts { lane_live: 2, ..full };
        assert_eq!(decide(&room, OnBusy::Enqueue, &BOUNDS), Ok(Decision::Accept { interrupt: false }));
    }
}
