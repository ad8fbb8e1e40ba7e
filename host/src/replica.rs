//! This process' incarnation: registers it, renews it, steps down in time when it cannot, and notices turns that are no longer its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::dispatch::Dispatch;
use crate::ids::ReplicaId;
use crate::lease::Lease;
use crate::store::Store;

/// How long the end of a lost incarnation may take: the new one must be renewed meanwhile.
const RETIRE_WITHIN: Duration = Duration::from_secs(1);

/// For so long, hints are gathered before what they are about is looked at.
const HINT_GAP: Duration = Duration::from_millis(10);

/// How often a following clock is set.
const FOLLOW_EVERY: Duration = Duration::from_secs(30);

/// Renews until it is dropped. `registered` is when the incarnation was registered.
///
/// Whatever the store does, the turns of this incarnation stop at `lease_ttl_ms − lease_margin_ms` after the last renewal that it confirmed, counted
/// from when that was asked for, on the monotonic clock: before anybody else may take them over.
pub async fn renew(dispatch: Arc<Dispatch>, store: Arc<dyn Store>, registered: Instant) {
    let limits = dispatch.limits.clone();
    let patience = Duration::from_millis(limits.lease_ttl_ms - limits.lease_margin_ms);
    let (every, again) = (Duration::from_millis(limits.lease_renew_ms), Duration::from_millis(limits.backoff_ms));
    let (mut renewed, mut pause) = (registered, Duration::ZERO);
    loop {
        let step_down_at = renewed + patience;
        tokio::time::sleep_until((Instant::now() + pause).min(step_down_at).into()).await;
        // What counts is when we asked: the store's answer may be late, its expiry is not.
        let asked = Instant::now();
        let renewal = store.renew_replica(dispatch.replica(), dispatch.clock.now(), limits.lease_ttl_ms);
        match tokio::time::timeout_at(step_down_at.into(), renewal).await {
            Ok(Ok(true)) => {
                (renewed, pause) = (asked, every);
                continue;
            }
            Ok(Err(error)) if Instant::now() < step_down_at => {
                tracing::warn!(%error, "could not renew the replica's lease");
                pause = again;
                continue;
            }
            // Expired, or nobody knows.
            Ok(Ok(false) | Err(_)) | Err(_) => {}
        }
        tracing::error!(replica = %dispatch.replica(), "the replica's lease is lost; its turns stop here and begin again");
        dispatch.step_down();
        (renewed, pause) = (begin_again(&dispatch, &*store).await, every);
    }
}

/// Keeps the host's clock with the store's, where that has one. Runs until it is dropped.
pub async fn follow_time(dispatch: Arc<Dispatch>, store: Arc<dyn Store>) {
    loop {
        tokio::time::sleep(FOLLOW_EVERY).await;
        let asked = Instant::now();
        match store.time().await {
            // Its answer is as old as half its way here and back.
            Ok(Some(now)) => dispatch.clock.follow(now.plus_ms(asked.elapsed().as_millis() as u64 / 2)),
            Ok(None) => return,
            Err(error) => tracing::warn!(%error, "could not ask the store for its time"),
        }
    }
}

/// Registers a new incarnation, however long the store is away.
async fn begin_again(dispatch: &Dispatch, store: &dyn Store) -> Instant {
    loop {
        let (replica, asked) = (ReplicaId::new(), Instant::now());
        let lost = dispatch.replica();
        match store.register_replica(replica, dispatch.clock.now(), dispatch.limits.lease_ttl_ms).await {
            Ok(()) => {
                dispatch.resume_as(replica);
                // A renewal that we gave up may have reached the store after all, and nobody is to wait for it to run out.
                if !matches!(tokio::time::timeout(RETIRE_WITHIN, store.retire_replica(lost)).await, Ok(Ok(()))) {
                    tracing::warn!(replica = %lost, "the lost incarnation stays until it expires");
                }
                return asked;
            }
            Err(error) => {
                tracing::warn!(%error, "could not register again");
                tokio::time::sleep(Duration::from_millis(dispatch.limits.backoff_ms)).await;
            }
        }
    }
}

/// Stops guests whose turn has ended elsewhere, within `cancel_poll_ms` or as soon as a hint says that one may have; and gives back turns that this
/// incarnation holds without running them, when an answer was lost. Runs until it is dropped.
pub async fn drop_stale(dispatch: Arc<Dispatch>, store: Arc<dyn Store>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(dispatch.limits.cancel_poll_ms));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut unaccounted = Vec::new();
    loop {
        let (at_a_tick, leases) = tokio::select! {
            _ = ticks.tick() => (true, dispatch.running().iter().map(|running| running.lease.clone()).collect()),
            () = dispatch.hinted.more() => {
                // A turn that says much is hinted at as often; one look is enough for a while.
                tokio::time::sleep(HINT_GAP).await;
                (false, dispatch.hinted.take())
            }
        };
        let leases: Vec<Lease> = leases;
        if !leases.is_empty() {
            match store.stale(&leases).await {
                Ok(stale) => {
                    leases.iter().filter(|lease| stale.contains(&lease.turn)).for_each(|lease| dispatch.lost(lease));
                }
                Err(error) => tracing::warn!(%error, "could not look for turns that have ended elsewhere"),
            }
        }
        let in_doubt = dispatch.claims_in_doubt.swap(false, Ordering::AcqRel);
        if at_a_tick && (in_doubt || !unaccounted.is_empty()) {
            match dispatch.settle_claims(&*store, &unaccounted).await {
                Ok(still) => unaccounted = still,
                Err(_unavailable) => dispatch.claims_in_doubt.store(true, Ordering::Release),
            }
        } else if in_doubt {
            dispatch.claims_in_doubt.store(true, Ordering::Release);
        }
    }
}
