//! An agent's settings: what `PUT /v1/agents/{agent}` stores and a turn runs under. Pure.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::gate::SessionMode;
use crate::ids::{AgentId, WorkerName};
use crate::limits::Limits;
use crate::quota::OwnLimits;

/// The bounds that an agent may set for itself, each within the operator's.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AgentLimits {
    /// Wall time of a turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub turn_timeout_ms: Option<u64>,
    /// Time without progress.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub idle_timeout_ms: Option<u64>,
    /// Guest CPU time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub cpu_timeout_ms: Option<u64>,
    /// Ready, and not started.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub admission_timeout_ms: Option<u64>,
    /// Waiting behind other turns of its conversation.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub queue_timeout_ms: Option<u64>,
    /// Linear memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub memory_bytes_max: Option<usize>,
    /// The reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub reply_bytes_max: Option<usize>,
    /// One snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub snapshot_bytes_max: Option<usize>,
    /// Messages a second, over time.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(exclusive_minimum = 0.0)]
    pub submits_per_second: Option<f64>,
    /// Messages at once, after a pause; as many as come in a second, where only the rate is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000_000)]
    pub submit_burst: Option<u32>,
    /// Running turns. What is over waits its turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000_000)]
    pub running_max: Option<u32>,
    /// Live turns, running ones included. 0: it takes no messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1_000_000_000)]
    pub queue_max: Option<u32>,
    /// Milliseconds of guests' processor time in an hour of the clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub cpu_ms_per_hour: Option<u64>,
    /// Bytes of its turns and snapshots, as last measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub storage_bytes_max: Option<u64>,
}

/// Messages a second that a limit may say: what is far from them overflows in reckoning how long to wait.
const RATES: RangeInclusive<f64> = 0.001..=1e6;
/// Counts over this are no bounds.
const COUNT_MAX: u32 = 1_000_000_000;

impl AgentLimits {
    /// The bounds that hold for all of its turns together, within its org's.
    pub fn own(&self) -> OwnLimits {
        OwnLimits {
            submits_per_second: self.submits_per_second,
            submit_burst: self.submit_burst,
            running_max: self.running_max,
            queue_max: self.queue_max,
            cpu_ms_per_hour: self.cpu_ms_per_hour,
            storage_bytes_max: self.storage_bytes_max,
        }
    }

    fn check_own(&self) -> Result<(), InvalidSetting> {
        let says = |what: &str| Err(InvalidSetting(format!("limits.{what}")));
        if self.submits_per_second.is_some_and(|rate| !RATES.contains(&rate)) {
            return says("submits_per_second must be 0.001 to 1000000; leave it out for any number");
        }
        if self.submit_burst.is_some() && self.submits_per_second.is_none() {
            return says("submit_burst goes with limits.submits_per_second; set that, too");
        }
        for (name, value, min) in [
            ("submit_burst", self.submit_burst, 1),
            ("running_max", self.running_max, 1),
            ("queue_max", self.queue_max, 0),
        ] {
            if value.is_some_and(|value| !(min..=COUNT_MAX).contains(&value)) {
                return says(&format!("{name} must be {min} to {COUNT_MAX}; leave it out for any number"));
            }
        }
        for (name, value) in [("cpu_ms_per_hour", self.cpu_ms_per_hour), ("storage_bytes_max", self.storage_bytes_max)]
        {
            if value.is_some_and(|value| value == 0 || i64::try_from(value).is_err()) {
                return says(&format!("{name} must be at least 1; leave it out for any number"));
            }
        }
        Ok(())
    }
}

/// An agent as its owner set it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentSettings {
    /// The worker that it runs.
    pub worker: WorkerName,
    /// The worker's version. The newest, when none is named at `PUT`; then fixed until the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Whether conversations that name no agent get this one. One agent of an org at most.
    #[serde(default)]
    pub default: bool,
    /// How its conversations keep their state.
    #[serde(default)]
    pub session_mode: SessionMode,
    /// Its own bounds.
    #[serde(default)]
    pub limits: AgentLimits,
    /// Environment of the worker's program.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Hosts that its operations may reach.
    #[serde(default)]
    pub allowed_hosts: Vec<String>,
    /// The model that its `llm.chat` uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Completed turns that its input carries.
    #[serde(default)]
    pub history_messages: usize,
}

/// Why settings are refused, naming the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidSetting(pub String);

/// What whoever asks for file mode is told where several hosts share the store: a directory is one machine's.
pub const NO_FILE_MODE: &str =
    "session mode \"file\" needs the embedded store, and this host's database is shared with others; use \"snapshot\"";

impl AgentSettings {
    /// Settings that run `worker` and nothing else.
    pub fn of(worker: WorkerName) -> AgentSettings {
        AgentSettings {
            worker,
            version: None,
            default: false,
            session_mode: SessionMode::Snapshot,
            limits: AgentLimits::default(),
            environment: BTreeMap::new(),
            allowed_hosts: Vec::new(),
            model: None,
            history_messages: 0,
        }
    }

    /// Holds the settings against the operator's bounds.
    pub fn check(&self, operator: &Limits) -> Result<(), InvalidSetting> {
        let own = &self.limits;
        let bounds = [
            ("turn_timeout_ms", own.turn_timeout_ms, operator.turn_timeout_ms_max),
            ("idle_timeout_ms", own.idle_timeout_ms, operator.turn_timeout_ms_max),
            ("cpu_timeout_ms", own.cpu_timeout_ms, operator.turn_timeout_ms_max),
            ("admission_timeout_ms", own.admission_timeout_ms, operator.queue_timeout_ms),
            ("queue_timeout_ms", own.queue_timeout_ms, operator.queue_timeout_ms),
            ("memory_bytes_max", own.memory_bytes_max.map(|v| v as u64), operator.memory_bytes_max as u64),
            ("reply_bytes_max", own.reply_bytes_max.map(|v| v as u64), operator.reply_bytes_max as u64),
            ("snapshot_bytes_max", own.snapshot_bytes_max.map(|v| v as u64), operator.snapshot_bytes_max as u64),
        ];
        for (name, value, max) in bounds {
            match value {
                Some(0) => return Err(InvalidSetting(format!("limits.{name} must be at least 1"))),
                Some(value) if value > max => {
                    return Err(InvalidSetting(format!("limits.{name} is {value}; this host allows at most {max}")));
                }
                _ => {}
            }
        }
        own.check_own()?;
        if self.history_messages > operator.history_messages_max {
            let max = operator.history_messages_max;
            return Err(InvalidSetting(format!(
                "history_messages is {}; this host allows at most {max}",
                self.history_messages
            )));
        }
        if self.session_mode == SessionMode::File && self.history_messages > 0 {
            return Err(InvalidSetting(
                "history_messages must be 0 with session_mode \"file\": its turns are private and have no history"
                    .to_owned(),
            ));
        }
        let mut environment_bytes = 0;
        for (name, value) in &self.environment {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') || name.starts_with("TURNHOUSE_") {
                return Err(InvalidSetting(format!(
                    "environment: {name:?} cannot be set; names have no '=' or NUL and do not begin with TURNHOUSE_"
                )));
            }
            environment_bytes += name.len() + value.len() + 2;
        }
        if environment_bytes > operator.env_bytes_max {
            let max = operator.env_bytes_max;
            return Err(InvalidSetting(format!(
                "environment has {environment_bytes} bytes; this host allows at most {max}"
            )));
        }
        Ok(())
    }
}

/// A stored agent: its settings with the version resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Agent {
    /// Its name.
    pub id: AgentId,
    /// Settings; `version` is always set.
    pub settings: AgentSettings,
    /// + 1 at every change.
    pub revision: u64,
    /// When it was made, RFC 3339 when shown.
    pub created_at: crate::clock::Timestamp,
    /// When it was last changed.
    pub updated_at: crate::clock::Timestamp,
}

impl Agent {
    /// What it says of a bound, or the operator's default.
    pub fn turn_timeout_ms(&self, limits: &Limits) -> u64 {
        self.settings.limits.turn_timeout_ms.unwrap_or(limits.turn_timeout_ms)
    }

    /// See [`Agent::turn_timeout_ms`].
    pub fn admission_timeout_ms(&self, limits: &Limits) -> u64 {
        self.settings.limits.admission_timeout_ms.unwrap_or(limits.admission_timeout_ms)
    }

    /// See [`Agent::turn_timeout_ms`].
    pub fn queue_timeout_ms(&self, limits: &Limits) -> u64 {
        self.settings.limits.queue_timeout_ms.unwrap_or(limits.queue_timeout_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_stay_within_the_operators_bounds() {
        let operator = Limits::default();
        let fine = AgentSettings::of(WorkerName::parse("echo").unwrap());
        fine.check(&operator).unwrap();
        let mut slow = fine.clone();
        slow.limits.turn_timeout_ms = Some(operator.turn_timeout_ms_max + 1);
        assert!(slow.check(&operator).unwrap_err().0.contains("turn_timeout_ms"));
        let mut zero = fine.clone();
        zero.limits.memory_bytes_max = Some(0);
        assert!(zero.check(&operator).is_err());
        for (own, field) in [
            (AgentLimits { submits_per_second: Some(0.0), ..AgentLimits::default() }, "submits_per_second"),
            (AgentLimits { submits_per_second: Some(1e-300), ..AgentLimits::default() }, "submits_per_second"),
            (AgentLimits { submits_per_second: Some(1e308), ..AgentLimits::default() }, "submits_per_second"),
            (AgentLimits { submits_per_second: Some(f64::NAN), ..AgentLimits::default() }, "submits_per_second"),
            (AgentLimits { submit_burst: Some(1), ..AgentLimits::default() }, "submits_per_second"),
            (AgentLimits { running_max: Some(0), ..AgentLimits::default() }, "running_max"),
            (AgentLimits { queue_max: Some(u32::MAX), ..AgentLimits::default() }, "queue_max"),
            (AgentLimits { cpu_ms_per_hour: Some(0), ..AgentLimits::default() }, "cpu_ms_per_hour"),
        ] {
            let refused = AgentSettings { limits: own, ..fine.clone() }.check(&operator).unwrap_err();
            assert!(refused.0.contains(field), "{refused}");
        }
        AgentSettings { limits: AgentLimits { queue_max: Some(0), ..AgentLimits::default() }, ..fine.clone() }
            .check(&operator)
            .unwrap();
        let mut environment = fine;
        environment.environment.insert("TURNHOUSE_TURN_ID".into(), "x".into());
        assert!(environment.check(&operator).is_err());
    }
}
