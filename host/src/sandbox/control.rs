//! What the guest's side and the supervisor share about one running turn: whether it must stop, how its clocks stand.
//!
//! The supervisor ends turns from outside the guest's threads; the sandbox reads [`Control::stopped`] at every epoch yield and host call, and wakes
//! from a wait when it is set. All times are monotonic, in microseconds since the turn's start.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::turn::Usage;

/// Why a guest must stop. The first one stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stop {
    /// Its turn has ended elsewhere (cancel, deadline, takeover) or is given back: nobody waits for its outcome.
    Ended = 1,
    /// Wall time is over.
    TurnTimeout = 2,
    /// No progress for too long.
    IdleTimeout = 3,
    /// CPU time is used up.
    CpuTimeout = 4,
}

/// Shared by a guest, its runner and the supervisor.
#[derive(Debug)]
pub struct Control {
    started: Instant,
    turn_timeout: Duration,
    idle_timeout_us: AtomicU64,
    cpu_timeout_us: AtomicU64,
    stop: AtomicU8,
    answered: AtomicBool,
    stopped: Notify,
    /// Of the last progress.
    progress_us: AtomicU64,
    /// Operations in flight: the idle clock stands still.
    operations: AtomicU32,
    /// CPU time of finished polls of the guest.
    cpu_us: AtomicU64,
    /// When its instance began to exist; 0: not yet.
    instance_us: AtomicU64,
    memory_peak_bytes: AtomicU64,
    host_calls: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

impl Control {
    /// Clocks start now.
    pub fn new(turn_timeout: Duration, idle_timeout: Duration, cpu_timeout: Duration) -> Control {
        Control {
            started: Instant::now(),
            turn_timeout,
            idle_timeout_us: AtomicU64::new(micros(idle_timeout)),
            cpu_timeout_us: AtomicU64::new(micros(cpu_timeout)),
            stop: AtomicU8::new(0),
            answered: AtomicBool::new(false),
            stopped: Notify::new(),
            progress_us: AtomicU64::new(0),
            operations: AtomicU32::new(0),
            cpu_us: AtomicU64::new(0),
            instance_us: AtomicU64::new(0),
            memory_peak_bytes: AtomicU64::new(0),
            host_calls: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
        }
    }

    /// When the turn started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// When wall time is over. Nothing extends it.
    pub fn deadline(&self) -> Instant {
        self.started + self.turn_timeout
    }

    /// What the wall clock allows.
    pub fn turn_timeout(&self) -> Duration {
        self.turn_timeout
    }

    /// What the idle clock allows.
    pub fn idle_timeout(&self) -> Duration {
        Duration::from_micros(self.idle_timeout_us.load(Ordering::Relaxed))
    }

    /// Sets the clocks that are the agent's own, once its settings are known: a turn is watched from its claim on.
    pub fn set_timeouts(&self, idle: Duration, cpu: Duration) {
        self.idle_timeout_us.store(micros(idle), Ordering::Relaxed);
        self.cpu_timeout_us.store(micros(cpu), Ordering::Relaxed);
    }

    /// Makes the guest stop. Whether this call was the first.
    pub fn stop(&self, why: Stop) -> bool {
        let first = self.stop.compare_exchange(0, why as u8, Ordering::AcqRel, Ordering::Acquire).is_ok();
        self.stopped.notify_waiters();
        first
    }

    /// Makes the guest stop and takes it on to answer its client, whoever stopped it first: `true` for the first to do so.
    pub fn answer_for(&self, why: Stop) -> bool {
        let first = !self.answered.swap(true, Ordering::AcqRel);
        self.stop(why);
        first
    }

    /// Whether somebody outside answers the client; else whoever runs the guest does.
    pub fn answered(&self) -> bool {
        self.answered.load(Ordering::Acquire) || self.stopped() == Some(Stop::Ended)
    }

    /// Why it must stop, if it must.
    pub fn stopped(&self) -> Option<Stop> {
        match self.stop.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Stop::Ended),
            2 => Some(Stop::TurnTimeout),
            3 => Some(Stop::IdleTimeout),
            _ => Some(Stop::CpuTimeout),
        }
    }

    /// Resolves once it must stop.
    pub async fn until_stopped(&self) -> Stop {
        loop {
            let notified = self.stopped.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if let Some(why) = self.stopped() {
                return why;
            }
            notified.await;
        }
    }

    /// The guest has got somewhere.
    pub fn progress(&self) {
        self.progress_us.store(micros(self.started.elapsed()), Ordering::Relaxed);
    }

    /// An operation begins; the idle clock stands still until its guard is dropped, and starts anew then.
    pub fn operation(self: &std::sync::Arc<Self>) -> OperationGuard {
        self.operations.fetch_add(1, Ordering::AcqRel);
        OperationGuard(self.clone())
    }

    /// Adds CPU time of the guest.
    pub fn add_cpu(&self, time: Duration) {
        self.cpu_us.fetch_add(micros(time), Ordering::Relaxed);
    }

    /// Its instance is about to be made.
    pub(super) fn instance_begins(&self) {
        self.instance_us.store(micros(self.started.elapsed()).max(1), Ordering::Relaxed);
    }

    /// Its linear memory has become so large.
    pub(super) fn grew_to(&self, bytes: usize) {
        self.memory_peak_bytes.fetch_max(bytes as u64, Ordering::Relaxed);
    }

    /// One more host call; how many there have been.
    pub(super) fn count_host_call(&self) -> u64 {
        add(&self.host_calls, 1)
    }

    /// The guest has been given so many bytes.
    pub(super) fn count_in(&self, bytes: usize) {
        add(&self.bytes_in, bytes as u64);
    }

    /// The guest has handed out so many bytes.
    pub(super) fn count_out(&self, bytes: usize) {
        add(&self.bytes_out, bytes as u64);
    }

    /// What the turn has used by now.
    pub fn usage(&self) -> Usage {
        let ms = |us: u64| us as f64 / 1_000.0;
        let now = micros(self.started.elapsed());
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Usage {
            cpu_ms: ms(read(&self.cpu_us)),
            wall_ms: ms(now),
            memory_peak_bytes: read(&self.memory_peak_bytes),
            host_calls: read(&self.host_calls),
            bytes_in: read(&self.bytes_in),
            bytes_out: read(&self.bytes_out),
            instance_ms: match read(&self.instance_us) {
                0 => 0.0,
                began => ms(now.saturating_sub(began)),
            },
        }
    }

    /// CPU time of the guest's finished polls.
    pub fn cpu(&self) -> Duration {
        Duration::from_micros(self.cpu_us.load(Ordering::Relaxed))
    }

    /// What the CPU clock allows in all.
    pub fn cpu_timeout(&self) -> Duration {
        Duration::from_micros(self.cpu_timeout_us.load(Ordering::Relaxed))
    }

    /// The clock that has run out at `now`, if one has; else the earliest moment at which one may.
    pub fn check(&self, now: Instant) -> Result<Instant, Stop> {
        if now >= self.deadline() {
            return Err(Stop::TurnTimeout);
        }
        let idle_since = if self.operations.load(Ordering::Acquire) > 0 {
            now
        } else {
            self.started + Duration::from_micros(self.progress_us.load(Ordering::Relaxed))
        };
        let idle_at = idle_since + self.idle_timeout();
        if now >= idle_at { Err(Stop::IdleTimeout) } else { Ok(idle_at.min(self.deadline())) }
    }
}

/// Only the guest's own thread adds, so that no locked instruction is needed; others read.
fn add(counter: &AtomicU64, more: u64) -> u64 {
    let sum = counter.load(Ordering::Relaxed) + more;
    counter.store(sum, Ordering::Relaxed);
    sum
}

/// An operation in flight.
#[derive(Debug)]
pub struct OperationGuard(std::sync::Arc<Control>);

impl Drop for OperationGuard {
    fn drop(&mut self) {
        // A failing provider is no progress in itself, but its time was not the guest's: the clock goes on from where an
        // operation that took no time would have left it. Only a successful frame calls `progress`.
        self.0.operations.fetch_sub(1, Ordering::AcqRel);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn control() -> Arc<Control> {
        Arc::new(Control::new(Duration::from_secs(60), Duration::from_secs(30), Duration::from_secs(10)))
    }

    #[test]
    fn the_first_stop_stays() {
        let control = control();
        assert_eq!(control.stopped(), None);
        assert!(control.stop(Stop::IdleTimeout));
        assert!(!control.stop(Stop::Ended));
        assert_eq!(control.stopped(), Some(Stop::IdleTimeout));
    }

    #[test]
    fn what_a_turn_has_used_can_be_read_while_it_runs() {
        let control = control();
        assert_eq!((control.usage().instance_ms, control.usage().host_calls), (0.0, 0));
        control.instance_begins();
        control.grew_to(65_536);
        control.grew_to(1_000);
        control.count_in(3);
        control.count_out(4);
        control.count_out(5);
        assert_eq!((control.count_host_call(), control.count_host_call()), (1, 2));
        control.add_cpu(Duration::from_micros(1_500));
        let used = control.usage();
        assert_eq!((used.memory_peak_bytes, used.host_calls, used.bytes_in, used.bytes_out), (65_536, 2, 3, 9));
        assert!((used.cpu_ms - 1.5).abs() < 1e-9 && used.instance_ms <= used.wall_ms);
    }

    #[test]
    fn t6_nothing_extends_the_absolute_deadline() {
        let control = control();
        control.progress();
        let _operation = control.operation();
        assert_eq!(control.check(control.deadline()), Err(Stop::TurnTimeout));
    }

    #[test]
    fn t6_the_idle_clock_stands_still_during_an_operation() {
        let control = control();
        let late = control.started() + Duration::from_secs(31);
        assert_eq!(control.check(late), Err(Stop::IdleTimeout));
        let operation = control.operation();
        assert!(control.check(late).is_ok());
        drop(operation);
        assert_eq!(control.check(late), Err(Stop::IdleTimeout));
    }
}
