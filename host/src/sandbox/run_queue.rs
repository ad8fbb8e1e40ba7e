//! Whose guest runs next: processor time is shared by org, not by guest.
//!
//! There are as many run permits as threads for guests. A guest needs one to be polled. It gives its permit back when it waits for something, and
//! at each of its epoch yields it offers it to whoever waits for one: to the org that has had least, and there to a guest that has just come (or
//! come back from a wait) in turns with those that spin on. So an org with a hundred spinners and an org with one get half each, and a short turn
//! waits for one tick, not for a round of all that spin.
//!
//! Time is counted as in start-time fair queueing: an org that comes back begins where whoever was served last stands; nobody saves up time
//! while away. It knows neither the runtime nor wasmtime; `run::drive` drives it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;

use crate::ids::OrgId;

/// All permits of one sandbox.
pub(super) struct RunQueue(Mutex<State>);

struct State {
    /// Permits that nobody holds. While there is one, nobody waits.
    free: usize,
    /// What the org that was served last had used by then.
    now_us: u64,
    orgs: HashMap<OrgId, Org>,
    waiting: HashMap<u64, Waiting>,
    next_id: u64,
}

#[derive(Default)]
struct Org {
    seats: usize,
    used_us: u64,
    /// Came, or came back from a wait.
    fresh: VecDeque<u64>,
    /// Used up their tick.
    spinning: VecDeque<u64>,
    /// The last to be served was a fresh one.
    fresh_last: bool,
}

struct Waiting {
    waker: Waker,
    granted: bool,
}

/// One guest's place. Dropping it gives back what it holds.
pub(super) struct Seat {
    queue: Arc<RunQueue>,
    org: OrgId,
    state: Holds,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Nothing,
    Ticket(u64),
    Permit,
}

impl RunQueue {
    pub(super) fn new(permits: usize) -> Arc<RunQueue> {
        let (orgs, waiting) = (HashMap::new(), HashMap::new());
        Arc::new(RunQueue(Mutex::new(State { free: permits, now_us: 0, orgs, waiting, next_id: 0 })))
    }

    /// A place for a guest of `org`.
    pub(super) fn seat(self: &Arc<Self>, org: &OrgId) -> Seat {
        let mut state = self.0.lock();
        let now_us = state.now_us;
        let place = state.orgs.entry(org.clone()).or_insert_with(|| Org { used_us: now_us, ..Org::default() });
        place.seats += 1;
        Seat { queue: self.clone(), org: org.clone(), state: Holds::Nothing }
    }

    /// How many guests could run and wait for their turn.
    pub(super) fn waiting(&self) -> usize {
        self.0.lock().waiting.len()
    }
}

impl Seat {
    /// Ready when the guest may be polled.
    pub(super) fn poll_take(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.state == Holds::Permit {
            return Poll::Ready(());
        }
        let mut state = self.queue.0.lock();
        match self.state {
            Holds::Ticket(id) => {
                let waiting = state.waiting.get_mut(&id).expect("a ticket is in the table until its seat takes it out");
                if !waiting.granted {
                    waiting.waker.clone_from(cx.waker());
                    return Poll::Pending;
                }
                state.waiting.remove(&id);
            }
            _ if state.free > 0 => {
                state.free -= 1;
                state.forget_credit(&self.org);
                state.served(&self.org);
            }
            _ => {
                self.state = Holds::Ticket(state.enqueue(&self.org, cx.waker(), false));
                return Poll::Pending;
            }
        }
        self.state = Holds::Permit;
        Poll::Ready(())
    }

    /// The guest waits for something, or is done.
    pub(super) fn leave(&mut self, used: Duration) {
        let mut state = self.queue.0.lock();
        state.charge(&self.org, used);
        self.state = Holds::Nothing;
        let next = state.release();
        drop(state);
        wake(next);
    }

    /// The guest's tick is over and it could go on: whoever is to run next is woken, which may be itself.
    pub(super) fn offer(&mut self, used: Duration, cx: &Context<'_>) {
        let mut state = self.queue.0.lock();
        state.charge(&self.org, used);
        let next = if state.waiting.is_empty() {
            state.served(&self.org);
            Some(cx.waker().clone())
        } else {
            self.state = Holds::Ticket(state.enqueue(&self.org, cx.waker(), true));
            state.release()
        };
        drop(state);
        wake(next);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.queue.0.lock();
        let held = match self.state {
            Holds::Nothing => false,
            Holds::Permit => true,
            // Its place in the queue is passed over.
            Holds::Ticket(id) => state.waiting.remove(&id).is_some_and(|waiting| waiting.granted),
        };
        let next = if held { state.release() } else { None };
        if let Some(org) = state.orgs.get_mut(&self.org) {
            org.seats -= 1;
            if org.seats == 0 {
                state.orgs.remove(&self.org);
            }
        }
        drop(state);
        wake(next);
    }
}

/// Outside the lock: the woken may be polled at once.
fn wake(next: Option<Waker>) {
    if let Some(waker) = next {
        waker.wake();
    }
}

impl State {
    fn org(&mut self, org: &OrgId) -> &mut Org {
        self.orgs.get_mut(org).expect("an org is known as long as it has a seat")
    }

    fn charge(&mut self, org: &OrgId, used: Duration) {
        let used_us = u64::try_from(used.as_micros()).unwrap_or(u64::MAX);
        let org = self.org(org);
        org.used_us = org.used_us.saturating_add(used_us);
    }

    fn served(&mut self, org: &OrgId) {
        let used_us = self.org(org).used_us;
        self.now_us = self.now_us.max(used_us);
    }

    /// Time that an org did not ask for is not owed to it.
    fn forget_credit(&mut self, org: &OrgId) {
        let now_us = self.now_us;
        let org = self.org(org);
        org.used_us = org.used_us.max(now_us);
    }

    fn enqueue(&mut self, org: &OrgId, waker: &Waker, spinning: bool) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.insert(id, Waiting { waker: waker.clone(), granted: false });
        if spinning {
            self.org(org).spinning.push_back(id);
        } else {
            self.forget_credit(org);
            self.org(org).fresh.push_back(id);
        }
        id
    }

    /// A permit is free: it goes to who is next, whose waker is returned.
    fn release(&mut self) -> Option<Waker> {
        loop {
            // Of two that have had as much, the one who has waited longer.
            let least = self.orgs.values_mut().filter(|org| org.waits()).min_by_key(|org| (org.used_us, org.first()));
            let Some(org) = least else {
                self.free += 1;
                return None;
            };
            let (id, used_us) = (org.next(), org.used_us);
            // Otherwise its guest is gone.
            if let Some(waiting) = self.waiting.get_mut(&id) {
                waiting.granted = true;
                self.now_us = self.now_us.max(used_us);
                return Some(waiting.waker.clone());
            }
        }
    }
}

impl Org {
    fn waits(&self) -> bool {
        !(self.fresh.is_empty() && self.spinning.is_empty())
    }

    /// Who has waited longest.
    fn first(&self) -> Option<u64> {
        self.fresh.front().into_iter().chain(self.spinning.front()).copied().min()
    }

    /// Of those that wait, of which there is one.
    fn next(&mut self) -> u64 {
        let fresh = !self.fresh.is_empty() && (self.spinning.is_empty() || !self.fresh_last);
        self.fresh_last = fresh;
        let queue = if fresh { &mut self.fresh } else { &mut self.spinning };
        queue.pop_front().expect("one of the two has somebody")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::Wake;

    use super::*;

    const TICK: Duration = Duration::from_millis(1);

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// A guest that never waits.
    struct Spinner {
        seat: Seat,
        woken: Arc<Woken>,
        ticks: u32,
    }

    impl Spinner {
        fn new(queue: &Arc<RunQueue>, org: &str) -> Spinner {
            let woken = Arc::new(Woken(AtomicBool::new(true)));
            Spinner { seat: queue.seat(&OrgId::parse(org).unwrap()), woken, ticks: 0 }
        }

        /// Whether it may run now, if it was woken.
        fn takes(&mut self) -> bool {
            let waker = Waker::from(self.woken.clone());
            self.woken.0.swap(false, Ordering::Relaxed)
                && self.seat.poll_take(&mut Context::from_waker(&waker)).is_ready()
        }

        fn yields(&mut self) {
            self.ticks += 1;
            let waker = Waker::from(self.woken.clone());
            self.seat.offer(TICK, &Context::from_waker(&waker));
        }
    }

    /// Lets them spin on `threads` threads for so many ticks.
    fn spin(spinners: &mut [Spinner], threads: usize, ticks: usize) {
        for _ in 0..ticks {
            let running: Vec<usize> = (0..spinners.len()).filter(|at| spinners[*at].takes()).collect();
            assert!(running.len() <= threads, "{} run on {threads} threads", running.len());
            running.into_iter().for_each(|at| spinners[at].yields());
        }
    }

    fn ticks(spinners: &[Spinner], org: &str) -> u32 {
        spinners.iter().filter(|spinner| spinner.seat.org.as_str() == org).map(|spinner| spinner.ticks).sum()
    }

    #[test]
    fn an_org_with_a_hundred_spinners_and_an_org_with_one_get_half_each() {
        for threads in [1, 2] {
            let queue = RunQueue::new(threads);
            let mut all: Vec<Spinner> = (0..100).map(|_| Spinner::new(&queue, "many")).collect();
            spin(&mut all, threads, 500);
            // It comes late, and is owed nothing for that.
            all.push(Spinner::new(&queue, "one"));
            let before = ticks(&all, "many");
            spin(&mut all, threads, 1_000);
            let (many, one) = (ticks(&all, "many") - before, ticks(&all, "one"));
            assert!(many.abs_diff(one) <= 4, "{many} and {one} ticks on {threads} threads");
            assert!(all.iter().take(100).all(|spinner| spinner.ticks > 0), "each of the many runs");
        }
    }

    #[test]
    fn who_comes_waits_for_one_tick_and_not_for_a_round() {
        let queue = RunQueue::new(1);
        let mut all: Vec<Spinner> = (0..50).map(|_| Spinner::new(&queue, "many")).collect();
        // Until each has had its first tick.
        spin(&mut all, 1, 110);
        for org in ["many", "other"] {
            let mut short = Spinner::new(&queue, org);
            assert!(!short.takes(), "somebody runs");
            let mut waited = 0;
            while !short.takes() {
                spin(&mut all, 1, 1);
                waited += 1;
                assert!(waited <= 3, "a short turn of {org} waits for {waited} ticks");
            }
            short.seat.leave(TICK / 10);
        }
    }

    #[test]
    fn a_stream_of_short_turns_does_not_starve_those_of_the_same_org_that_spin() {
        let queue = RunQueue::new(1);
        let mut all: Vec<Spinner> = (0..2).map(|_| Spinner::new(&queue, "many")).collect();
        spin(&mut all, 1, 4);
        let before = ticks(&all, "many");
        for _ in 0..40 {
            let mut short = Spinner::new(&queue, "many");
            while !short.takes() {
                spin(&mut all, 1, 1);
            }
            short.seat.leave(TICK);
        }
        assert!(ticks(&all, "many") - before >= 38);
    }

    #[test]
    fn whoever_goes_gives_back_what_it_holds() {
        let queue = RunQueue::new(1);
        let mut holder = Spinner::new(&queue, "a");
        assert!(holder.takes());
        let (mut next, mut gone, mut last) =
            (Spinner::new(&queue, "b"), Spinner::new(&queue, "b"), Spinner::new(&queue, "c"));
        assert!(!next.takes() && !gone.takes() && !last.takes());
        assert_eq!(queue.waiting(), 3);
        drop(gone);
        drop(holder);
        // Granted, and dropped before it noticed.
        assert!(next.woken.0.load(Ordering::Relaxed));
        drop(next);
        assert!(last.takes());
        last.seat.leave(TICK);
        assert_eq!(queue.waiting(), 0);
        drop(last);
        let state = queue.0.lock();
        assert_eq!((state.free, state.orgs.len()), (1, 0));
    }

    #[test]
    fn nobody_saves_up_time_while_away() {
        let queue = RunQueue::new(1);
        let mut all = vec![Spinner::new(&queue, "busy"), Spinner::new(&queue, "idle")];
        all[1].woken.0.store(false, Ordering::Relaxed);
        spin(&mut all, 1, 1_000);
        all[1].woken.0.store(true, Ordering::Relaxed);
        let before = ticks(&all, "busy");
        spin(&mut all, 1, 100);
        assert!(ticks(&all, "busy") - before >= 48, "the busy org is not made to pay for having been alone");
    }

    /// An org whose guests slept while another's ran, and that finds a thread free, is owed nothing either.
    #[test]
    fn nobody_saves_up_time_while_threads_are_free() {
        let queue = RunQueue::new(2);
        let mut sleepers: Vec<Spinner> = (0..2).map(|_| Spinner::new(&queue, "sleeps")).collect();
        let mut busy = vec![Spinner::new(&queue, "busy")];
        spin(&mut busy, 2, 8_000);
        busy.remove(0).seat.leave(Duration::ZERO);
        spin(&mut sleepers, 2, 10);
        let mut short = Spinner::new(&queue, "busy");
        let mut waited = 0;
        while !short.takes() {
            spin(&mut sleepers, 2, 1);
            waited += 1;
            assert!(waited <= 30, "a short turn waits for {waited} ticks of those who slept");
        }
    }
}
