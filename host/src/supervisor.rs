//! The clock that owes the client its answer. Ends a running turn whose wall or idle time is over, from outside the guests' threads.
//!
//! Every [`ROUND`] it looks at all that runs; what may run out before the next round is kept in a heap and met to the millisecond. A turn that ends
//! sooner than a round, as most do, costs it nothing.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use crate::dispatch::{Dispatch, Running};
use crate::ids::TurnId;
use crate::sandbox::Stop;
use crate::turn::{Failure, FailureCode};

/// How often everything is looked at.
const ROUND: Duration = Duration::from_millis(100);

/// Turns that may run out before the next round.
#[derive(Default)]
pub struct Soon {
    heap: Mutex<BinaryHeap<Reverse<(Instant, TurnId)>>>,
    earlier: Notify,
}

impl Soon {
    /// A run begins; if it may run out within a round, its moment is noted.
    pub fn watch(&self, running: &Running) {
        if let Ok(at) = running.control.check(Instant::now())
            && at < Instant::now() + ROUND
        {
            self.note(at, running.lease.turn);
        }
    }

    fn note(&self, at: Instant, turn: TurnId) {
        let mut heap = self.heap.lock();
        let first = heap.peek().is_none_or(|Reverse((first, _))| at < *first);
        heap.push(Reverse((at, turn)));
        drop(heap);
        if first {
            self.earlier.notify_one();
        }
    }

    fn next(&self) -> Option<Instant> {
        self.heap.lock().peek().map(|Reverse((at, _))| *at)
    }

    fn due(&self, now: Instant) -> Vec<TurnId> {
        let mut heap = self.heap.lock();
        let mut due = Vec::new();
        while heap.peek().is_some_and(|Reverse((at, _))| *at <= now) {
            due.extend(heap.pop().map(|Reverse((_, turn))| turn));
        }
        due
    }
}

/// Supervises until it is dropped. Endings run as tasks of `tasks`, since each waits for its commit.
pub async fn supervise(dispatch: Arc<Dispatch>, tasks: TaskTracker) {
    let mut round_at = Instant::now();
    let mut noted = HashSet::new();
    loop {
        let wake_at = dispatch.soon.next().map_or(round_at, |at| at.min(round_at));
        tokio::select! {
            () = tokio::time::sleep_until(wake_at.into()) => {}
            () = dispatch.soon.earlier.notified() => continue,
        }
        let now = Instant::now();
        for turn in dispatch.soon.due(now) {
            noted.remove(&turn);
            if let Some(running) = dispatch.tracked(turn) {
                look(&dispatch, &tasks, &running, now, &mut noted);
            }
        }
        if now >= round_at {
            round_at = now + ROUND;
            for running in dispatch.running() {
                look(&dispatch, &tasks, &running, now, &mut noted);
            }
        }
    }
}

fn look(
    dispatch: &Arc<Dispatch>,
    tasks: &TaskTracker,
    running: &Arc<Running>,
    now: Instant,
    noted: &mut HashSet<TurnId>,
) {
    match running.control.check(now) {
        Ok(at) => {
            if at < now + ROUND + ROUND && noted.insert(running.lease.turn) {
                dispatch.soon.note(at, running.lease.turn);
            }
        }
        Err(why) => {
            if running.control.answer_for(why) {
                let (dispatch, running) = (dispatch.clone(), running.clone());
                tasks.spawn(async move {
                    let failure = timed_out(&running, why);
                    dispatch.fail(&running.lease, failure).await;
                });
            }
        }
    }
}

/// What a client is told of a clock that has run out.
pub fn timed_out(running: &Running, why: Stop) -> Failure {
    let agent = &running.agent;
    match why {
        Stop::IdleTimeout => Failure::new(
            FailureCode::IdleTimeout,
            format!(
                "the turn made no progress for {} ms, its limit; say something as the work goes on, or raise limits.idle_timeout_ms on agent {agent}",
                running.control.idle_timeout().as_millis()
            ),
        ),
        _ => Failure::new(
            FailureCode::TurnTimeout,
            format!(
                "the turn ran for {} ms, its limit; raise limits.turn_timeout_ms on agent {agent}",
                running.turn_timeout_ms
            ),
        ),
    }
}
