//! Where several orgs send messages, each has a few accepted at a time, in the order in which they came.
//!
//! Whatever is let in waits for what was let in before it: for its batch, for a processor, for its answer. An org that floods the host would make all of that as
//! long as its flood is. Here the flood waits for itself, before it holds a slot or anything of the journal's, and another's message waits for a few of its
//! messages (O5). An org that is alone is not held up.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::ids::OrgId;

/// Messages of one org that are being accepted at once, beside others'.
const OF_ORG_MAX: usize = 4;

/// An org is beside others for so long after two different ones were seen.
const BESIDE: Duration = Duration::from_millis(250);

/// Lets messages in.
#[derive(Clone, Default)]
pub struct Turnstile(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    orgs: HashMap<OrgId, Line>,
    /// Who came last.
    last: Option<OrgId>,
    /// When somebody came who was another than who came before.
    changed_at: Option<Instant>,
}

/// An org's messages.
#[derive(Default)]
struct Line {
    inside: usize,
    waiting: VecDeque<oneshot::Sender<Pass>>,
}

/// Held while a message is being accepted.
pub struct Pass(Option<(Turnstile, OrgId)>);

impl Turnstile {
    /// Waits for the org's turn. Whoever goes away meanwhile has had none.
    pub async fn enter(&self, org: &OrgId) -> Pass {
        let waits = {
            let mut state = self.0.lock();
            if state.last.as_ref() != Some(org) && state.last.replace(org.clone()).is_some() {
                state.changed_at = Some(Instant::now());
            }
            let alone = state.alone();
            let line = state.orgs.entry(org.clone()).or_default();
            if line.waiting.is_empty() && (alone || line.inside < OF_ORG_MAX) {
                line.inside += 1;
                return self.pass(org);
            }
            let (call, called) = oneshot::channel();
            line.waiting.push_back(call);
            called
        };
        let since = Instant::now();
        let pass = waits.await.expect("who is inside calls who waits");
        metrics::histogram!("turnhouse_accept_held_seconds").record(since.elapsed());
        pass
    }

    fn pass(&self, org: &OrgId) -> Pass {
        Pass(Some((self.clone(), org.clone())))
    }

    fn leave(&self, org: &OrgId) {
        let mut state = self.0.lock();
        let alone = state.alone();
        let Some(line) = state.orgs.get_mut(org) else { return };
        line.inside -= 1;
        while alone || line.inside < OF_ORG_MAX {
            let Some(call) = line.waiting.pop_front() else { break };
            match call.send(self.pass(org)) {
                Ok(()) => line.inside += 1,
                // Nobody waits there any more. What was not used is not given back: that would come here again.
                Err(mut unused) => drop(unused.0.take()),
            }
        }
        if line.inside == 0 {
            state.orgs.remove(org);
        }
    }
}

impl State {
    fn alone(&self) -> bool {
        self.changed_at.is_none_or(|at| at.elapsed() > BESIDE)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some((turnstile, org)) = self.0.take() {
            turnstile.leave(&org);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn org(name: &str) -> OrgId {
        OrgId::parse(name).unwrap()
    }

    #[test]
    fn o5_beside_others_an_org_has_a_few_at_a_time_in_their_order() {
        let turnstile = Turnstile::default();
        let (flood, other) = (org("flood"), org("other"));
        let mut inside: Vec<Pass> = (0..100).map(|_| turnstile.enter(&flood).now_or_never().unwrap()).collect();
        let _beside = turnstile.enter(&other).now_or_never().expect("another's is let in at once");
        let mut waiting: Vec<_> = (0..10).map(|_| Box::pin(turnstile.enter(&flood))).collect();
        assert!(waiting.iter_mut().all(|enter| enter.now_or_never().is_none()));
        while inside.len() > OF_ORG_MAX {
            inside.pop();
        }
        assert!(waiting.iter_mut().all(|enter| enter.now_or_never().is_none()), "as many as may be are inside");
        // Who goes away has had no turn; who is left is called in order.
        drop(waiting.remove(0));
        inside.pop();
        inside.push(waiting.remove(0).now_or_never().expect("first come, first served"));
        assert!(waiting.iter_mut().all(|enter| enter.now_or_never().is_none()));
        inside.clear();
        // As many as may be, and then the rest.
        let called: Vec<Pass> = waiting.iter_mut().filter_map(|enter| enter.now_or_never()).collect();
        assert_eq!(called.len(), OF_ORG_MAX);
        drop(called);
        drop(waiting);
        assert!(!turnstile.0.lock().orgs.contains_key(&flood), "nothing is left behind");
    }

    #[test]
    fn an_org_that_is_called_and_has_gone_gives_its_turn_to_the_next() {
        let turnstile = Turnstile::default();
        let (flood, other) = (org("flood"), org("other"));
        let _beside = turnstile.enter(&other).now_or_never().unwrap();
        let inside: Vec<Pass> = (0..OF_ORG_MAX).map(|_| turnstile.enter(&flood).now_or_never().unwrap()).collect();
        let mut first = Box::pin(turnstile.enter(&flood));
        let mut second = Box::pin(turnstile.enter(&flood));
        assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
        drop(inside);
        // Both were called. The first never hears it.
        drop(first);
        drop(second.now_or_never().expect("it was called"));
        assert!(!turnstile.0.lock().orgs.contains_key(&flood));
    }
}
