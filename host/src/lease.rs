//! The fencing token and the time that is left. Pure.
//!
//! Whoever runs a turn holds a [`Lease`]: every write that it makes for the turn carries the lease's epoch, and a write whose epoch is no
//! longer the marker's changes nothing. Check the epoch, never the expiry.

use crate::clock::Timestamp;
use crate::ids::{OrgId, TurnId};

/// A marker's owner number: + 1 at every change of owner, so that no two owners share one.
pub type Epoch = u32;

/// Above this, a turn that has been handed round ends as `attempts_exhausted` (`turn_events` needs room for the last key).
pub const EPOCH_MAX: Epoch = 1_000_000;

/// The right to write for one turn, as long as its epoch is the marker's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The org of the turn's marker.
    pub org: OrgId,
    /// The turn.
    pub turn: TurnId,
    /// The epoch that the claim gave.
    pub epoch: Epoch,
    /// When the turn must have ended.
    pub deadline: Timestamp,
}

impl Lease {
    /// Milliseconds until the deadline; 0 once it has passed.
    pub fn remaining_ms(&self, now: Timestamp) -> u64 {
        self.deadline.0.saturating_sub(now.0).max(0).unsigned_abs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remaining_time_never_is_negative() {
        let lease =
            Lease { org: OrgId::parse("o").unwrap(), turn: TurnId::new(), epoch: 1, deadline: Timestamp(1_000) };
        assert_eq!(lease.remaining_ms(Timestamp(400)), 600);
        assert_eq!(lease.remaining_ms(Timestamp(1_000)), 0);
        assert_eq!(lease.remaining_ms(Timestamp(9_000)), 0);
    }
}
