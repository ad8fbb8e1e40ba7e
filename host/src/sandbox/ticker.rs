//! The engine's clock: one operating-system thread that advances the epoch every millisecond.
//!
//! A tokio task would stand still exactly when guests keep the runtime busy. It holds the engine weakly and ends with it; [`Ticker::alive`]
//! tells whether it still ticks, because without it no guest can be interrupted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use wasmtime::Engine;

/// How long an epoch lasts.
const TICK: Duration = Duration::from_millis(1);

/// Without a tick for this long, the host must not start guests.
const SILENCE_MAX: Duration = Duration::from_secs(1);

pub(super) struct Ticker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    begun: Instant,
    last_tick_ms: AtomicU64,
    stop: AtomicBool,
}

impl Ticker {
    pub(super) fn start(engine: &Engine) -> std::io::Result<Ticker> {
        let shared =
            Arc::new(Shared { begun: Instant::now(), last_tick_ms: AtomicU64::new(0), stop: AtomicBool::new(false) });
        let engine = engine.weak();
        let ticking = shared.clone();
        let thread = std::thread::Builder::new().name("epoch".to_owned()).spawn(move || {
            while !ticking.stop.load(Ordering::Acquire) {
                std::thread::sleep(TICK);
                let Some(engine) = engine.upgrade() else { return };
                engine.increment_epoch();
                ticking.last_tick_ms.store(ticking.now_ms(), Ordering::Relaxed);
            }
        })?;
        Ok(Ticker { shared, thread: Some(thread) })
    }

    /// Whether it has ticked within the last second.
    pub(super) fn alive(&self) -> bool {
        let silence = self.shared.now_ms().saturating_sub(self.shared.last_tick_ms.load(Ordering::Relaxed));
        u128::from(silence) <= SILENCE_MAX.as_millis() && !self.shared.stop.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn stop_for_test(&self) {
        self.shared.stop.store(true, Ordering::Release);
    }
}

impl Shared {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // It wakes within a tick; a panic in it has already been told by its silence.
            let _ = thread.join();
        }
    }
}
