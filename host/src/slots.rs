//! Room for running turns: nothing else bounds how many instances there are.
//!
//! A [`Slot`] is held *before* a lease is asked for and until the instance is gone. While there is a backlog, a slot that becomes free wakes the
//! claimer at once (R8).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// All slots of a host.
#[derive(Clone)]
pub struct Slots(Arc<Inner>);

struct Inner {
    permits: Arc<Semaphore>,
    total: usize,
    /// Twice the number of times that there was news, + 1 while something may be ready.
    backlog: AtomicU64,
    wake: Notify,
}

/// The backlog as it was at some moment.
#[derive(Debug, Clone, Copy)]
pub struct BacklogSeen(u64);

/// Room for one running turn.
pub struct Slot {
    permit: Option<OwnedSemaphorePermit>,
    slots: Arc<Inner>,
}

impl Slots {
    /// `total` slots, all free.
    pub fn new(total: usize) -> Slots {
        let permits = Arc::new(Semaphore::new(total));
        Slots(Arc::new(Inner { permits, total, backlog: AtomicU64::new(1), wake: Notify::new() }))
    }

    /// A slot, if one is free now.
    pub fn try_take(&self) -> Option<Slot> {
        let permit = self.0.permits.clone().try_acquire_owned().ok()?;
        Some(Slot { permit: Some(permit), slots: self.0.clone() })
    }

    /// At least one slot, and up to `most` of those that are free.
    pub async fn take(&self, most: usize) -> Vec<Slot> {
        let first = self.0.permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        let mut taken = vec![Slot { permit: Some(first), slots: self.0.clone() }];
        while taken.len() < most
            && let Some(slot) = self.try_take()
        {
            taken.push(slot);
        }
        taken
    }

    /// Something is ready, or may be.
    pub fn note_backlog(&self) {
        let _ = self.0.backlog.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| Some((state | 1) + 2));
        self.0.wake.notify_one();
    }

    /// What there is to know about the backlog now: for [`Slots::no_backlog_since`].
    pub fn backlog_seen(&self) -> BacklogSeen {
        BacklogSeen(self.0.backlog.load(Ordering::Acquire))
    }

    /// Nothing was ready, and what was read is older than `seen`: unless there has been news since, slots need wake nobody.
    pub fn no_backlog_since(&self, seen: BacklogSeen) {
        let BacklogSeen(state) = seen;
        let _ = self.0.backlog.compare_exchange(state, state & !1, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether something may be ready.
    pub fn backlog(&self) -> bool {
        self.0.backlog.load(Ordering::Acquire) & 1 == 1
    }

    /// Resolves when there may be something to claim: one wake-up is remembered.
    pub async fn woken(&self) {
        self.0.wake.notified().await;
    }

    /// How many are held.
    pub fn in_use(&self) -> usize {
        self.0.total - self.0.permits.available_permits()
    }

    /// Resolves when none is held.
    pub async fn all_free(&self) {
        let total = u32::try_from(self.0.total).expect("slots are counted in thousands");
        let _all = self.0.permits.acquire_many(total).await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        drop(self.permit.take());
        if self.slots.backlog.load(Ordering::Acquire) & 1 == 1 {
            self.slots.wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn r8_a_freed_slot_wakes_the_claimer_at_once() {
        let slots = Slots::new(2);
        slots.woken_if_remembered().await;
        let held = slots.take(8).await;
        assert_eq!((held.len(), slots.in_use()), (2, 2));
        assert!(slots.try_take().is_none());
        let seen = slots.backlog_seen();
        slots.no_backlog_since(seen);
        drop(held);
        assert!(
            tokio::time::timeout(Duration::from_millis(20), slots.woken()).await.is_err(),
            "no backlog, no wake-up"
        );
        let held = slots.take(1).await;
        slots.note_backlog();
        slots.woken().await;
        drop(held);
        tokio::time::timeout(Duration::from_secs(5), slots.woken()).await.expect("a freed slot wakes");
        slots.all_free().await;
    }

    #[tokio::test]
    async fn r8_news_since_the_look_keeps_the_backlog() {
        let slots = Slots::new(1);
        let seen = slots.backlog_seen();
        slots.note_backlog();
        slots.no_backlog_since(seen);
        assert!(slots.backlog());
        slots.no_backlog_since(slots.backlog_seen());
        assert!(!slots.backlog());
    }

    impl Slots {
        async fn woken_if_remembered(&self) {
            let _ = tokio::time::timeout(Duration::from_millis(1), self.woken()).await;
        }
    }
}
