//! Readers of turns that do not run here: woken when something has changed in the store, all of a host's with one look.
//!
//! Where several hosts share the store, [`keep_watch`] asks it every [`POLL`] how far all the watched turns have come, in one round trip for up to
//! [`LOOK_MAX`] of them, and wakes the readers of those that have moved; thousands of idle readers cost as many index look-ups, not as many queries.
//! A hint or this host's own doing wakes them at once. A wake-up says only that reading the log may pay.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::ids::{OrgId, TurnId};
use crate::store::{Progress, Store};

/// How often the store is asked where others use it, too.
const POLL: Duration = Duration::from_millis(500);

/// How often it is asked where all that happens happens here: wake-ups come by themselves, and this is for the case that one did not.
const POLL_ALONE: Duration = Duration::from_secs(10);

/// So many turns in one question.
const LOOK_MAX: usize = 1_000;

/// The turns that somebody here waits for.
#[derive(Default)]
pub struct Watch {
    turns: Mutex<HashMap<TurnId, Watched>>,
}

struct Watched {
    org: OrgId,
    news: watch::Sender<()>,
    /// As of the last look.
    known: Option<Option<Progress>>,
}

/// One reader's place. Dropping the last of a turn's ends the watch of it.
pub struct Watching {
    watch: Weak<Watch>,
    turn: TurnId,
    news: watch::Receiver<()>,
}

impl Watch {
    /// Watches a turn from now on.
    pub fn turn(self: &Arc<Self>, org: &OrgId, turn: TurnId) -> Watching {
        let mut turns = self.turns.lock();
        let watched = turns.entry(turn).or_insert_with(|| Watched {
            org: org.clone(),
            news: watch::Sender::new(()),
            known: None,
        });
        Watching { watch: Arc::downgrade(self), turn, news: watched.news.subscribe() }
    }

    /// Something may have changed for its readers.
    pub fn wake(&self, turn: TurnId) {
        if let Some(watched) = self.turns.lock().get(&turn) {
            watched.news.send_replace(());
        }
    }

    /// Turns that are watched.
    pub fn len(&self) -> usize {
        self.turns.lock().len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.turns.lock().is_empty()
    }

    fn all(&self) -> Vec<(OrgId, TurnId)> {
        self.turns.lock().iter().map(|(turn, watched)| (watched.org.clone(), *turn)).collect()
    }

    /// Wakes the readers of what is not as it was. The first look at a turn wakes, too: its reader may have read just before something happened.
    fn learn(&self, asked: &[(OrgId, TurnId)], found: &[Option<Progress>]) {
        let mut turns = self.turns.lock();
        for ((_, turn), progress) in asked.iter().zip(found) {
            if let Some(watched) = turns.get_mut(turn)
                && watched.known != Some(*progress)
            {
                watched.known = Some(*progress);
                watched.news.send_replace(());
            }
        }
    }
}

impl Watching {
    /// What has happened until now is about to be read: only what comes after it is news.
    pub fn seen(&mut self) {
        self.news.mark_unchanged();
    }

    /// Resolves when there may be news.
    pub async fn news(&mut self) {
        if self.news.changed().await.is_err() {
            // The host is gone; its reader ends with its connection.
            std::future::pending().await
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let Some(watch) = self.watch.upgrade() else { return };
        let mut turns = watch.turns.lock();
        // This receiver is still counted.
        if turns.get(&self.turn).is_some_and(|watched| watched.news.receiver_count() <= 1) {
            turns.remove(&self.turn);
        }
    }
}

/// Looks after the watched turns until it is dropped.
pub async fn keep_watch(watch: Arc<Watch>, store: Arc<dyn Store>) {
    let mut ticks = tokio::time::interval(if store.shared() { POLL } else { POLL_ALONE });
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for some in watch.all().chunks(LOOK_MAX) {
            match store.progress(some).await {
                Ok(found) => watch.learn(some, &found),
                Err(error) => {
                    tracing::warn!(%error, "could not look at turns that run elsewhere");
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn woken(watching: &mut Watching) -> bool {
        let woken = watching.news.has_changed().unwrap();
        watching.seen();
        woken
    }

    #[test]
    fn readers_are_woken_by_what_has_changed_and_by_nothing_else() {
        let watch = Arc::new(Watch::default());
        let org = OrgId::parse("acme").unwrap();
        let (one, two) = (TurnId::new(), TurnId::new());
        let (mut first, mut second, mut other) = (watch.turn(&org, one), watch.turn(&org, one), watch.turn(&org, two));
        let asked = watch.all();
        assert_eq!(asked.len(), 2, "a turn is asked about once, however many read it");
        let progress = |seq| Some(Progress { ended: false, running: true, epoch: 1, logged: Some((1, seq)) });
        let found =
            |seq| asked.iter().map(|(_, turn)| progress(if *turn == one { seq } else { 1 })).collect::<Vec<_>>();
        watch.learn(&asked, &found(1));
        assert!(woken(&mut first) && woken(&mut second) && woken(&mut other), "the first look may be news to anybody");
        watch.learn(&asked, &found(1));
        assert!(!woken(&mut first) && !woken(&mut other));
        watch.learn(&asked, &found(2));
        assert!(woken(&mut first) && woken(&mut second) && !woken(&mut other));
        watch.wake(two);
        assert!(!woken(&mut first) && woken(&mut other));
        drop(first);
        assert_eq!(watch.len(), 2);
        drop((second, other));
        assert!(watch.is_empty(), "nothing is left behind");
    }
}
