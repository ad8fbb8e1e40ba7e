//! Named points between the steps of a turn at which a test ends the process as `kill -9` would. Debug builds only: a release has none.
//!
//! `TURNHOUSE_TEST_KILL=after_claim:3` ends the process the third time that it passes `after_claim`.

/// Every point, in the order in which a turn passes them.
pub const ALL: &[&str] = &["after_accept", "after_claim", "after_run", "mid_commit", "after_commit"];

/// Ends the process here, if that was asked for.
#[cfg(debug_assertions)]
pub fn pass(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static ARMED: OnceLock<Option<(String, AtomicU32)>> = OnceLock::new();
    let armed = ARMED.get_or_init(|| {
        let spec = std::env::var("TURNHOUSE_TEST_KILL").ok()?;
        let (name, times) = spec.split_once(':')?;
        Some((name.to_owned(), AtomicU32::new(times.parse().ok()?)))
    });
    if let Some((armed, left)) = armed
        && armed == name
        && left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::thread::sleep(std::time::Duration::from_secs(60));
    }
}

/// Nothing, in a release.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_name: &str) {}
