//! Ends what is overdue: waiting, ready or running past its clock, refused too often, or left behind by a lost replica.
//!
//! The store only names such markers; each is ended through the one commit, which decides. What the sweep finds ready wakes the claimer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Timestamp;
use crate::dispatch::Dispatch;
use crate::ids::OrgId;
use crate::limits::Limits;
use crate::store::{Overdue, OverdueReason, Retention, Store};
use crate::turn::{Failure, FailureCode};

/// How often.
const INTERVAL: Duration = Duration::from_millis(250);

/// At most so many markers a round.
const ROUND_MAX: usize = 200;

/// How often forgotten idempotency keys are deleted.
const FORGET_EVERY: u32 = 240;

/// At most so many of them a round.
const FORGET_MAX: usize = 2_000;

/// At most so many attachments, and of their uploads.
const ATTACHMENTS_MAX: usize = 200;

/// At most so many turns and logs of an org in one step of retention: some milliseconds of the store's time.
const RETAIN_MAX: usize = 200;

/// For so long orgs are looked at in one round in which nothing is old: ten thousand in some minutes.
const RETAIN_FOR: Duration = Duration::from_millis(8);

/// How often orgs are looked for whose storage is to be measured, and for how long they then are.
const MEASURE_EVERY: Duration = Duration::from_secs(1);
const MEASURE_FOR: Duration = Duration::from_millis(50);

const DAY_MS: u64 = 86_400_000;

/// Sweeps until it is dropped.
pub async fn sweep(dispatch: Arc<Dispatch>, store: Arc<dyn Store>) {
    let mut rounds = 0_u32;
    let mut retained = None;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        rounds = rounds.wrapping_add(1);
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
        if rounds.is_multiple_of(4) {
            drop_attachments(&dispatch, &*store).await;
        }
        if rounds.is_multiple_of(FORGET_EVERY) {
            forget_keys(&dispatch, &*store).await;
        }
        retain(&dispatch, &*store, &mut retained).await;
        if rounds.is_multiple_of(4)
            && let Ok(counts) = store.live_counts().await
        {
            metrics::gauge!("turnhouse_live_turns", "state" => "waiting").set(counts.waiting as f64);
            metrics::gauge!("turnhouse_live_turns", "state" => "ready").set(counts.ready as f64);
            metrics::gauge!("turnhouse_live_turns", "state" => "running").set(counts.running as f64);
            metrics::gauge!("turnhouse_guests_waiting").set(dispatch.sandbox.guests_waiting() as f64);
            metrics::gauge!("turnhouse_slots_in_use").set(dispatch.slots.in_use() as f64);
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

async fn forget_keys(dispatch: &Dispatch, store: &dyn Store) {
    let before = Timestamp(dispatch.clock.now().0.saturating_sub_unsigned(dispatch.limits.idempotency_retention_ms));
    if let Err(error) = store.forget_keys(before, FORGET_MAX).await {
        tracing::warn!(%error, "could not forget idempotency keys");
    }
}

async fn drop_attachments(dispatch: &Dispatch, store: &dyn Store) {
    let before = Timestamp(dispatch.clock.now().0.saturating_sub_unsigned(dispatch.limits.attachment_upload_ms));
    if let Err(error) = store.sweep_attachments(before, ATTACHMENTS_MAX).await {
        tracing::warn!(%error, "could not delete attachments that nothing refers to");
    }
}

/// Measures what orgs have stored, for ever: beside the sweep, since a large one takes seconds.
pub async fn measure(dispatch: Arc<Dispatch>, store: Arc<dyn Store>) {
    let mut ticks = tokio::time::interval(MEASURE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let began = Instant::now();
        loop {
            match store.measure_storage(dispatch.clock.now()).await {
                Ok(Some(_)) if began.elapsed() < MEASURE_FOR => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "could not measure what an org has stored");
                    break;
                }
            }
        }
    }
}

/// A step of retention: org after org for a moment, and the same again where there was more than a step's worth.
async fn retain(dispatch: &Dispatch, store: &dyn Store, after: &mut Option<OrgId>) {
    let since = |days: u32| {
        let age = u64::from(days).saturating_mul(DAY_MS);
        (days > 0).then(|| Timestamp(dispatch.clock.now().0.saturating_sub_unsigned(age)))
    };
    let keep = Retention {
        turns_since: since(dispatch.limits.turn_retention_days),
        events_since: since(dispatch.limits.event_retention_days),
        audit_since: since(dispatch.limits.audit_retention_days),
    };
    if keep == Retention::default() {
        return;
    }
    let began = Instant::now();
    loop {
        match store.retain(after.as_ref(), keep, RETAIN_MAX).await {
            Ok(done) => {
                metrics::counter!("turnhouse_retained_rows_total").increment(done.rows as u64);
                if done.rows < RETAIN_MAX {
                    *after = done.org;
                }
                // Where little was to be done and others may be next.
                if done.rows > 0 || after.is_none() || began.elapsed() > RETAIN_FOR {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "could not delete what is old");
                return;
            }
        }
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
            "the host was lost after an operation with outside effects had begun; check whether the effect took place before sending the message again",
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
