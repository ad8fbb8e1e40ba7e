//! This process' incarnation: registers it, renews it, steps down in time when it cannot, and notices turns that are no longer its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::dispatch::Dispatch;
use crate::ids::ReplicaId;
use crate::sandbox::Stop;
use crate::store::Store;

/// Renews until it is dropped. `registered` is when the incarnation was registered.
pub async fn renew(dispatch: Arc<Dispatch>, store: Arc<dyn Store>, registered: Instant) {
    let limits = dispatch.limits.clone();
    let patience = Duration::from_millis(limits.lease_ttl_ms - limits.lease_margin_ms);
    let mut renewed = registered;
    let mut ticks = tokio::time::interval(Duration::from_millis(limits.lease_renew_ms));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // What counts is when we asked: the store's answer may be late, its expiry is not.
        let asked = Instant::now();
        let renewal = store.renew_replica(dispatch.replica(), dispatch.clock.now(), limits.lease_ttl_ms);
        let alive = match tokio::time::timeout(patience.saturating_sub(renewed.elapsed()), renewal).await {
            Ok(Ok(alive)) => alive,
            Ok(Err(error)) => {
                tracing::warn!(%error, "could not renew the replica's lease");
                if renewed.elapsed() < patience {
                    continue;
                }
                false
            }
            Err(_late) => false,
        };
        if alive {
            renewed = asked;
            continue;
        }
        tracing::error!(replica = %dispatch.replica(), "the replica's lease is lost; its turns stop here and begin again");
        dispatch.step_down();
        renewed = begin_again(&dispatch, &*store).await;
    }
}

/// Registers a new incarnation, however long the store is away.
async fn begin_again(dispatch: &Dispatch, store: &dyn Store) -> Instant {
    loop {
        let (replica, asked) = (ReplicaId::new(), Instant::now());
        match store.register_replica(replica, dispatch.clock.now(), dispatch.limits.lease_ttl_ms).await {
            Ok(()) => {
                dispatch.resume_as(replica);
                return asked;
            }
            Err(error) => {
                tracing::warn!(%error, "could not register again");
                tokio::time::sleep(Duration::from_millis(dispatch.limits.backoff_ms)).await;
            }
        }
    }
}

/// Stops guests whose turn has ended elsewhere, within `cancel_poll_ms`. Runs until it is dropped.
pub async fn drop_stale(dispatch: Arc<Dispatch>, store: Arc<dyn Store>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(dispatch.limits.cancel_poll_ms));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let leases: Vec<_> = dispatch.running().into_iter().map(|running| running.lease.clone()).collect();
        if leases.is_empty() {
            continue;
        }
        match store.stale(&leases).await {
            Ok(stale) => stale.into_iter().for_each(|turn| dispatch.stop(turn, Stop::Ended)),
            Err(error) => tracing::warn!(%error, "could not look for turns that have ended elsewhere"),
        }
    }
}
