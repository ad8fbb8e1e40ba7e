//! Deletes what is old or belongs to nothing, mends what stands still, and measures what is stored and what waits: beside the sweep, which no turn may wait for because of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Timestamp;
use crate::dispatch::Dispatch;
use crate::ids::OrgId;
use crate::store::{Retention, Store};

/// How often.
const INTERVAL: Duration = Duration::from_millis(250);

/// Rounds from one look at the queue, and at attachments that nothing refers to, to the next: a second.
const LOOK_EVERY: u32 = 4;

/// How often forgotten idempotency keys are deleted.
const FORGET_EVERY: u32 = 240;

/// At most so many of them a round.
const FORGET_MAX: usize = 2_000;

/// How often conversations are looked for whose next turn was not made ready, five seconds: a look at all that waits, for what was never seen.
const REPAIR_EVERY: u32 = 20;

/// At most so many of them.
const REPAIR_MAX: usize = 200;

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

/// Tidies until it is dropped.
pub async fn tidy(dispatch: Arc<Dispatch>, store: Arc<dyn Store>) {
    let mut rounds = 0_u32;
    let mut retained = None;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        rounds = rounds.wrapping_add(1);
        if rounds.is_multiple_of(LOOK_EVERY) {
            drop_attachments(&dispatch, &*store).await;
        }
        if rounds.is_multiple_of(FORGET_EVERY) {
            forget_keys(&dispatch, &*store).await;
        }
        if rounds.is_multiple_of(REPAIR_EVERY)
            && let Err(error) = store.repair_lanes(dispatch.clock.now(), REPAIR_MAX).await
        {
            tracing::warn!(%error, "could not look for conversations that stand still");
        }
        retain(&dispatch, &*store, &mut retained).await;
        if rounds.is_multiple_of(LOOK_EVERY)
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
