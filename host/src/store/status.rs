//! How the store stands: what others have done to turns, and what an operator asks of it. None of it is on the path of a turn.

use crate::clock::Timestamp;
use crate::ids::{ReplicaId, TurnId};
use crate::lease::Epoch;

use super::LiveCounts;

/// What may have changed. Only a hint: it may be late, doubled or lost, and whoever hears it looks for themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hint {
    /// Something is ready for a free slot.
    Ready,
    /// This turn's log has grown, or it has changed its owner or ended.
    Turn(TurnId),
}

/// How far a turn has come. Unequal to an earlier one of the same turn once its state, its owner or its log is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Its terminal event is told.
    pub ended: bool,
    /// Somebody runs it.
    pub running: bool,
    /// Its marker's epoch; of its end when it has ended.
    pub epoch: Epoch,
    /// The newest row of its log: epoch and first seq.
    pub logged: Option<(Epoch, u32)>,
}

/// What `turnhouse status` shows.
#[derive(Debug, Clone)]
pub struct StoreStatus {
    /// `sqlite` or `postgres`.
    pub kind: &'static str,
    /// Where it is, without a password.
    pub place: String,
    /// The newest migration that it has.
    pub schema_version: i64,
    /// The newest migration that this program knows.
    pub schema_known: i64,
    /// Its own time.
    pub now: Timestamp,
    /// Incarnations that are registered, those that will expire first in front.
    pub replicas: Vec<ReplicaStatus>,
    /// Live turns by state.
    pub live: LiveCounts,
    /// For how long the oldest live turn has owed its client an answer.
    pub oldest_live_ms: Option<u64>,
    /// For how long the turn that is next has been ready for a slot: how far the claims lag behind.
    pub oldest_ready_ms: Option<u64>,
    /// Live turns past their deadline, which no sweep has ended yet.
    pub overdue: u64,
}

/// An incarnation.
#[derive(Debug, Clone)]
pub struct ReplicaStatus {
    /// Its id.
    pub id: ReplicaId,
    /// Until its lease ends; negative since it has.
    pub expires_in_ms: i64,
    /// It claims nothing more.
    pub draining: bool,
    /// Running turns that it holds.
    pub running: u64,
}

/// One thing that `turnhouse doctor` looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it was: `schema`, `clock`, `pooler`.
    pub what: &'static str,
    /// How it is.
    pub health: Health,
    /// What was found.
    pub text: String,
    /// What to do about it; empty when nothing is to be done.
    pub advice: String,
}

/// How well something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// As it should be.
    Good,
    /// It works, and something would be better otherwise.
    Doubtful,
    /// A host does not work like this.
    Bad,
}

impl Finding {
    /// As it should be.
    pub fn good(what: &'static str, text: impl Into<String>) -> Finding {
        Finding { what, health: Health::Good, text: text.into(), advice: String::new() }
    }

    /// It works, and `advice` would make it better.
    pub fn doubtful(what: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { what, health: Health::Doubtful, text: text.into(), advice: advice.into() }
    }

    /// A host does not work like this.
    pub fn bad(what: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { what, health: Health::Bad, text: text.into(), advice: advice.into() }
    }
}
