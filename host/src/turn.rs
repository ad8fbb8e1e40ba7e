//! A turn's states, its ends and their codes. Pure.
//!
//! ```text
//!            accept                claim                 commit (deletes the marker)
//! message ──────────► queued ────────────────► running ─────────────────────────────► completed
//!                     waiting → ready    ▲        │                                    failed
//!                        │               └────────┘ requeue (drain, takeover)          cancelled
//!                        └─────────────────────────────────────────────────────────►
//! ```
//! `waiting` and `ready` are one state, `queued`, to a client. The store drives the arrows; whoever deletes the marker ends the turn.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::content::Content;
use crate::gate::GateRefusal;

/// A turn's state, as the API shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TurnState {
    /// Accepted, not started.
    Queued,
    /// An instance works on it.
    Running,
    /// Ended with a reply.
    Completed,
    /// Ended without; `failure` says why.
    Failed,
    /// Ended on request.
    Cancelled,
}

impl TurnState {
    /// Whether the terminal event has been told.
    pub fn is_terminal(self) -> bool {
        matches!(self, TurnState::Completed | TurnState::Failed | TurnState::Cancelled)
    }

    /// As stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            TurnState::Queued => "queued",
            TurnState::Running => "running",
            TurnState::Completed => "completed",
            TurnState::Failed => "failed",
            TurnState::Cancelled => "cancelled",
        }
    }
}

/// How a turn ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// With a reply.
    Completed {
        /// What the worker answered.
        reply: Content,
        /// Whether the reply is other than the deltas joined.
        replaces_deltas: bool,
    },
    /// Without one.
    Failed(Failure),
    /// On request.
    Cancelled {
        /// Whose.
        by: CancelledBy,
    },
}

impl Outcome {
    /// The state that it leads to.
    pub fn state(&self) -> TurnState {
        match self {
            Outcome::Completed { .. } => TurnState::Completed,
            Outcome::Failed(_) => TurnState::Failed,
            Outcome::Cancelled { .. } => TurnState::Cancelled,
        }
    }
}

/// Who ended a turn early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CancelledBy {
    /// The user who began it.
    User,
    /// A newer message with `on_busy: interrupt`.
    Interrupt,
    /// An admin of the org.
    Admin,
    /// The conversation was deleted.
    Deleted,
}

impl CancelledBy {
    /// As stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            CancelledBy::User => "user",
            CancelledBy::Interrupt => "interrupt",
            CancelledBy::Admin => "admin",
            CancelledBy::Deleted => "deleted",
        }
    }

    /// From the stored text.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::User, Self::Interrupt, Self::Admin, Self::Deleted].into_iter().find(|by| by.as_str() == text)
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident => $text:literal $(, $retryable:ident)?;)*) => {
        /// Why a turn failed: stable codes, one page of the manual each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum FailureCode {
            $($(#[$doc])* $variant,)*
        }

        impl FailureCode {
            /// Every code, for documentation and tests.
            pub const ALL: &[FailureCode] = &[$(FailureCode::$variant,)*];

            /// As stored and shown.
            pub fn as_str(self) -> &'static str {
                match self { $(FailureCode::$variant => $text,)* }
            }

            /// Whether the same message may well succeed when it is sent again.
            pub fn retryable(self) -> bool {
                match self { $(FailureCode::$variant => codes!(@ $($retryable)?),)* }
            }
        }
    };
    (@ retryable) => { true };
    (@) => { false };
}

codes! {
    /// Ready, and not started within `admission_timeout_ms`.
    AdmissionTimeout => "admission_timeout", retryable;
    /// Behind other turns of its conversation for longer than `queue_timeout_ms`.
    QueueTimeout => "queue_timeout", retryable;
    /// The gate refused its envelope `gate_refusals_max` times.
    GateRefused => "gate_refused";
    /// The worker's module is gone or does not compile here.
    ModuleUnavailable => "module_unavailable";
    /// The conversation's snapshot exists and cannot be read.
    SnapshotUnreadable => "snapshot_unreadable";
    /// The guest trapped.
    WorkerTrapped => "worker_trapped";
    /// The guest asked for more memory than its limit and failed on it.
    WorkerOutOfMemory => "worker_out_of_memory";
    /// The guest overflowed its stack.
    WorkerStackOverflow => "worker_stack_overflow";
    /// The guest exited with a code other than 0.
    WorkerExit => "worker_exit";
    /// The guest exited with 0 and had said nothing.
    NoReply => "no_reply";
    /// The guest said more than its limits allow.
    OutputLimit => "output_limit";
    /// The guest made more host calls than its limit.
    HostCallLimit => "host_call_limit";
    /// Wall time from start was over.
    TurnTimeout => "turn_timeout";
    /// No progress for too long.
    IdleTimeout => "idle_timeout";
    /// CPU time was used up.
    CpuTimeout => "cpu_timeout";
    /// No model is configured for the agent.
    NoModelConfigured => "no_model_configured";
    /// A provider did not accept its credentials.
    ProviderAuthFailed => "provider_auth_failed";
    /// A provider's quota is used up.
    ProviderQuotaExhausted => "provider_quota_exhausted", retryable;
    /// A provider did not answer.
    ProviderUnavailable => "provider_unavailable", retryable;
    /// A provider refused the request.
    ProviderRejected => "provider_rejected";
    /// The host was lost or stopped after an effect had begun.
    HostLost => "host_lost", retryable;
    /// The host was draining and nobody else could take the turn.
    HostDraining => "host_draining", retryable;
    /// Every attempt lost its host.
    AttemptsExhausted => "attempts_exhausted";
    /// Our fault.
    Internal => "internal", retryable;
}

impl FailureCode {
    /// From the stored text.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == text)
    }
}

/// What a failed turn tells its client: the cause, and what to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Failure {
    /// Stable.
    pub code: FailureCode,
    /// For a person: what happened, with the figure and the setting to change.
    pub detail: String,
    /// Whether the same message may well succeed when it is sent again.
    pub retryable: bool,
    /// The guest's own end, where a provider's failure is the code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What belongs to the code: `exit_code`, `reason`, ….
    #[serde(flatten)]
    pub facts: Map<String, Value>,
}

impl Failure {
    /// A failure with its detail.
    pub fn new(code: FailureCode, detail: impl Into<String>) -> Failure {
        Failure { code, detail: detail.into(), retryable: code.retryable(), cause: None, facts: Map::new() }
    }

    /// Adds a fact that belongs to the code.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Failure {
        self.facts.insert(name.to_owned(), value.into());
        self
    }

    /// The end of a turn whose envelope the gate refused too often.
    pub fn gate_refused(refusal: GateRefusal) -> Failure {
        Failure::new(
            FailureCode::GateRefused,
            format!("{refusal}; an envelope that names a run must name its org and its conversation"),
        )
        .with("reason", refusal.as_str())
    }
}

/// What a turn used.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Usage {
    /// Guest CPU time, milliseconds.
    pub cpu_ms: f64,
    /// From start to end, milliseconds.
    pub wall_ms: f64,
    /// The largest that the guest's linear memory became.
    pub memory_peak_bytes: u64,
    /// Calls of `turnhouse_v1` functions.
    pub host_calls: u64,
    /// What the guest read: message, input, state, frames of operations.
    #[serde(default)]
    pub bytes_in: u64,
    /// What it wrote: standard output and error, events, log, reply, state, requests.
    #[serde(default)]
    pub bytes_out: u64,
    /// How long its instance existed, milliseconds.
    #[serde(default)]
    pub instance_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_their_serde_names_and_come_back() {
        for code in FailureCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            assert_eq!(FailureCode::parse(code.as_str()), Some(*code));
        }
        assert_eq!(FailureCode::parse("nonsense"), None);
    }

    #[test]
    fn t7_a_failure_says_what_belongs_to_it() {
        let failure = Failure::gate_refused(GateRefusal::MissingOrg);
        let json = serde_json::to_value(&failure).unwrap();
        assert_eq!(json["code"], "gate_refused");
        assert_eq!(json["reason"], "missing_org");
        assert_eq!(json["retryable"], false);
        assert_eq!(serde_json::from_value::<Failure>(json).unwrap(), failure);
    }
}
