//! What a running turn writes before it ends, each under its epoch: events, the flag of an effect, and its way back to the queue.

use rusqlite::params;

use super::accept::millis;
use super::counts::Stage;
use super::writer::{Tried, Tx};
use crate::store::{Append, Fenced, Requeue};

statements! {
    /// The fence: only the owner of a running marker says anything.
    APPEND_FENCE = "-- append_fence
SELECT 1 FROM turn_markers WHERE org_id = ?1 AND turn_id = ?2 AND epoch = ?3 AND state = 'running'";
    /// The journal's own retry finds its row.
    APPEND_EVENTS = "-- append_events
INSERT INTO turn_events (org_id, turn_id, epoch, first_seq, body) VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT (org_id, turn_id, epoch, first_seq) DO NOTHING";
    BEGIN_EFFECT = "-- begin_effect
UPDATE turn_markers SET effects = 1 WHERE org_id = ?1 AND turn_id = ?2 AND epoch = ?3 AND state = 'running'";
    /// The admission clock begins anew and outlasts the delay. Epoch + 1: the old owner's lease is worth nothing from here. What has
    /// begun an effect is never run again, and not given back.
    REQUEUE = "-- requeue
UPDATE turn_markers SET state = 'ready', holder = NULL, epoch = epoch + 1, attempt = attempt - 1,
       not_before = ?4 + ?5, deadline_at = ?4 + max(admission_ms, ?5 + 1)
 WHERE org_id = ?1 AND turn_id = ?2 AND epoch = ?3 AND state = 'running' AND effects = 0";
}

impl Tx<'_> {
    pub(super) fn append(&mut self, append: &Append, begins_effect: bool) -> Tried<Fenced> {
        let (org, turn, epoch) = (append.lease.org.as_str(), append.lease.turn, append.lease.epoch);
        let held = if begins_effect {
            self.conn.prepare_cached(BEGIN_EFFECT)?.execute(params![org, turn.as_bytes(), epoch])? == 1
        } else {
            self.conn.prepare_cached(APPEND_FENCE)?.exists(params![org, turn.as_bytes(), epoch])?
        };
        if !held {
            return Ok(Fenced::Stale);
        }
        if !append.batch.is_empty() {
            self.conn.prepare_cached(APPEND_EVENTS)?.execute(params![
                org,
                turn.as_bytes(),
                epoch,
                append.batch.first_seq,
                append.batch.encode()
            ])?;
        }
        Ok(Fenced::Done)
    }

    pub(super) fn requeue(&mut self, requeue: &Requeue) -> Tried<Fenced> {
        let lease = &requeue.lease;
        let moved = self.conn.prepare_cached(REQUEUE)?.execute(params![
            lease.org.as_str(),
            lease.turn.as_bytes(),
            lease.epoch,
            self.now.0,
            millis(requeue.delay_ms)
        ])?;
        if moved == 0 {
            return Ok(Fenced::Stale);
        }
        self.shift(&lease.org, Some(Stage::Running), Some(Stage::Ready));
        Ok(Fenced::Done)
    }
}
