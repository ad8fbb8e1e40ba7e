//! Ends what is overdue: waiting, ready or running past its clock, refused too often, or left behind by a lost replica.
//!
//! The store only names such markers; each is ended through the one commit, which decides. What the sweep finds ready wakes the claimer. A lost replica's turns wait for
//! it, so nothing else is done here.

use std::sync::Arc;
use std::time::Duration;

use crate::dispatch::Dispatch;
use crate::limits::Limits;
use crate::store::{Overdue, OverdueReason, Store};
use crate::turn::{Failure, FailureCode};

/// How often.
const INTERVAL: Duration = Duration::from_millis(250);

/// At most so many markers a round.
const ROUND_MAX: usize = 200;

/// Sweeps until it is dropped.
pub async fn sweep(dispatch: Arc<Dispatch>, store: Arc<dyn Store>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let seen = dispatch.slots.backlog_seen();
        match store.sweep(dispatch.clock.now(), dispatch.limits.gate_refusals_max, ROUND_MAX).await {
            Ok(found) => {
                if found.ready {
                    dispatch.slots.note_backlog();
                } else {
                    dispatch.slots.no_backlog_since(seen);
                }
                // Together: their commits share a batch.
                futures_util::future::join_all(found.overdue.into_iter().map(|overdue| end(&dispatch, overdue))).await;
            }
            Err(error) => tracing::warn!(%error, "could not sweep"),
        }
    }
}

async fn end(dispatch: &Dispatch, overdue: Overdue) {
    let failure = failure(overdue.why, &dispatch.limits);
    let outcome = crate::turn::Outcome::Failed(failure);
    if dispatch.end(overdue.org, overdue.turn, Some(overdue.epoch), outcome).await {
        tracing::info!(turn = %overdue.turn, why = ?overdue.why, "an overdue turn was ended");
    }
}

/// What the client of an overdue turn is told.
pub fn failure(why: OverdueReason, limits: &Limits) -> Failure {
    match why {
        OverdueReason::QueueTimeout => Failure::new(
            FailureCode::QueueTimeout,
            "the turn waited behind other turns of its conversation, or for its agent's limits.running_max, for its whole limits.queue_timeout_ms; send it again, or with on_busy: interrupt",
        ),
        OverdueReason::AdmissionTimeout => Failure::new(
            FailureCode::AdmissionTimeout,
            "the turn was ready for its whole limits.admission_timeout_ms and no slot became free; send it again later, or raise limits.host_running_max",
        ),
        OverdueReason::TurnTimeout => Failure::new(
            FailureCode::TurnTimeout,
            "the turn's wall time is over; raise limits.turn_timeout_ms on its agent",
        ),
        OverdueReason::HostLost => Failure::new(
            FailureCode::HostLost,
            "the host was lost or stopped after an operation with outside effects had begun; check whether the effect took place before sending the message again",
        ),
        OverdueReason::AttemptsExhausted => Failure::new(
            FailureCode::AttemptsExhausted,
            format!(
                "the host was lost in each of the turn's {} attempts; look for what the worker does to its host",
                limits.attempts_max
            ),
        ),
        OverdueReason::GateRefused(refusal) => Failure::gate_refused(refusal),
    }
}
