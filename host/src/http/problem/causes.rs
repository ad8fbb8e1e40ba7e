//! What each error below HTTP is to a client: its code, and what to do.

use super::{Code, Problem};
use crate::admission::Refusal;
use crate::agent::NO_FILE_MODE;
use crate::ids::InvalidId;
use crate::keys::AuthError;
use crate::members::OrgError;
use crate::quota::{Exceeded, LimitName, LimitOf};
use crate::store::StoreError;
use crate::submit::SubmitError;

impl From<InvalidId> for Problem {
    fn from(invalid: InvalidId) -> Problem {
        Problem::new(Code::InvalidId, invalid.to_string())
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Problem {
        match error {
            StoreError::Corrupt(_) => Problem::internal(error),
            _ => Problem::new(
                Code::StoreUnavailable,
                "the host's database does not answer; nothing was changed, try again",
            )
            .caused_by(error),
        }
    }
}

impl From<AuthError> for Problem {
    fn from(error: AuthError) -> Problem {
        match error {
            // One text for none, wrong, expired and revoked, keys and tickets: it tells nobody which there are, nor which turns.
            AuthError::Unauthenticated => Problem::new(
                Code::Unauthenticated,
                "send a valid API key as `Authorization: Bearer th_…` (`turnhouse keys create` makes one), a valid token of an issuer that this \
                 host trusts, or to follow a turn a ticket that is still good (`POST /v1/turns/{turn}/ticket` makes one)",
            ),
            AuthError::TooManyFailures { retry_after_s } => Problem::new(
                Code::RateLimited,
                "too many failed authentications from this address; wait, then send a valid API key",
            )
            .at_limit("address", "auth_failures_per_minute")
            .retry_after(retry_after_s),
            AuthError::IssuerUnavailable => Problem::new(
                Code::IssuerUnavailable,
                "the keys of the token's issuer cannot be had, so that nobody can tell whether it is good; try again",
            ),
            AuthError::Store(error) => {
                Problem::new(Code::StoreUnavailable, "the host's database does not answer; try again").caused_by(error)
            }
        }
    }
}

impl From<OrgError> for Problem {
    fn from(error: OrgError) -> Problem {
        match error {
            // As of an org, or a turn, that never was.
            OrgError::NotThere => Problem::not_found("org"),
            OrgError::NoSuchTurn => Problem::not_found("turn"),
            OrgError::NoOrg => Problem::new(
                Code::NoOrg,
                "you are a member of no org here; ask an admin of yours to add you (`PUT /v1/members/{user}`), under the user id that `GET /v1/me` \
                 shows",
            ),
            OrgError::Several => Problem::new(
                Code::OrgRequired,
                "you are a member of several orgs; name the org in the Turnhouse-Org header (`GET /v1/me` lists yours)",
            ),
            OrgError::Store(error) => {
                Problem::new(Code::StoreUnavailable, "the host's database does not answer; try again").caused_by(error)
            }
        }
    }
}

impl From<SubmitError> for Problem {
    fn from(error: SubmitError) -> Problem {
        match error {
            SubmitError::Refused(refusal) => refusal.into(),
            SubmitError::NoSuchAgent => Problem::not_found("agent"),
            SubmitError::AttachmentsTooLarge { .. } => {
                Problem::new(Code::InvalidMessage, format!("{error}; send them in several messages"))
            }
            SubmitError::NoFileMode => Problem::new(Code::InvalidSetting, NO_FILE_MODE),
            SubmitError::Draining => {
                Problem::new(Code::Draining, "this host is stopping and takes no new turns; nothing was accepted, try again")
            }
            SubmitError::Store(StoreError::Corrupt(cause)) => Problem::internal(cause),
            // The answer to the write may be what got lost: only a key makes the retry harmless.
            SubmitError::Store(error) => Problem::new(
                Code::StoreUnavailable,
                "the host's database does not answer; try again with the same Idempotency-Key, so that the message runs once",
            )
            .caused_by(error),
        }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Problem {
        match refusal {
            Refusal::NotFound => Problem::not_found("conversation"),
            Refusal::IdempotencyMismatch => Problem::new(
                Code::IdempotencyMismatch,
                "this Idempotency-Key came with another body before; send the same body, or a new key",
            ),
            Refusal::AttachmentNotFound => Problem::new(
                Code::AttachmentNotFound,
                "the message refers to an attachment that is not there; upload it (`POST /v1/attachments`), and send the message with the id that it gets",
            ),
            Refusal::ConversationBusy { active } => Problem::new(
                Code::ConversationBusy,
                "a turn of this conversation is live; follow its events, cancel it, or send the message with on_busy \"enqueue\" or \"interrupt\"",
            )
            .with("active_turn_id", active.to_string())
            .with("events", format!("/v1/turns/{active}/events")),
            Refusal::ConversationQueueFull => Problem::new(
                Code::ConversationQueueFull,
                "too many turns wait in this conversation; wait for one to end, or send on_busy \"interrupt\"",
            )
            .at_limit("conversation", "queue_max"),
            Refusal::OrgQueueFull { max } => {
                let detail = "too many turns of this org are live; wait for some to end, or have the operator raise the limit: \
                              `turnhouse orgs limits ORG --queue-max N`";
                Problem::new(Code::OrgQueueFull, detail).over(LimitOf::Org.as_str(), LimitName::QueueMax.as_str(), max as f64)
            }
            Refusal::AgentQueueFull { max } => {
                let detail = "too many turns of this agent are live; wait for some to end, or raise `limits.queue_max` in its settings \
                              (`PUT /v1/agents/{agent}`)";
                Problem::new(Code::AgentQueueFull, detail).over(LimitOf::Agent.as_str(), LimitName::QueueMax.as_str(), max as f64)
            }
            Refusal::Exceeded(exceeded) => exceeded.into(),
            Refusal::HostQueueFull => {
                Problem::new(Code::HostQueueFull, "this host has as many live turns as it takes; try again")
                    .at_limit("host", "queue_max")
            }
        }
    }
}

impl From<Exceeded> for Problem {
    fn from(exceeded: Exceeded) -> Problem {
        let Exceeded { of, limit, max, wait_ms } = exceeded;
        let whose = of.as_str();
        let (code, what) = match limit {
            LimitName::StorageBytesMax => (
                Code::QuotaExhausted,
                format!("this {whose} has stored the {max} bytes that it may; delete conversations"),
            ),
            LimitName::CpuMsPerHour => (
                Code::QuotaExhausted,
                format!("this {whose}'s turns have used their {max} ms of processor time of this hour"),
            ),
            _ => (
                Code::RateLimited,
                match of {
                    LimitOf::Org => {
                        format!("more messages and new conversations than {max} a second come from this org")
                    }
                    LimitOf::Agent => format!("more messages than {max} a second come to this agent"),
                },
            ),
        };
        let name = limit.as_str();
        let remedy = match of {
            LimitOf::Org => {
                format!("have the operator raise the limit: `turnhouse orgs limits ORG --{} N`", name.replace('_', "-"))
            }
            LimitOf::Agent => format!("raise `limits.{name}` in its settings (`PUT /v1/agents/{{agent}}`)"),
        };
        let problem = Problem::new(code, format!("{what}; wait, or {remedy}")).over(whose, name, max);
        match wait_ms {
            Some(ms) => problem.retry_after(ms.div_ceil(1_000).max(1)),
            None => problem,
        }
    }
}
