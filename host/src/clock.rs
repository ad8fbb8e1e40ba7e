//! Time as a parameter: whoever needs it is given a [`Clock`]; nothing below the edges reads the system's.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::macros::format_description;

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// RFC 3339 in UTC, always with three digits of milliseconds, so that times sort as text: `2026-11-23T17:03:12.120Z`.
    pub fn rfc3339(self) -> String {
        const FORMAT: &[time::format_description::BorrowedFormatItem<'_>] =
            format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000)
            .ok()
            .and_then(|t| t.format(FORMAT).ok())
            .unwrap_or_else(|| "1970-01-01T00:00:00.000Z".to_owned())
    }

    /// From RFC 3339, to the millisecond. `None`: it is none, or before 1970.
    pub fn parse(text: &str) -> Option<Timestamp> {
        let time = OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
        i64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok().filter(|ms| *ms >= 0).map(Timestamp)
    }

    /// Before every UUIDv7 of this moment and after every earlier one.
    pub fn first_id(self) -> uuid::Uuid {
        uuid::Uuid::from_u128(u128::from(self.0.max(0).unsigned_abs()) << 80)
    }

    /// This moment plus `ms` milliseconds.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Timestamp {
        Timestamp(self.0.saturating_add_unsigned(ms))
    }

    /// Milliseconds from `earlier` to this moment; 0 when it lies ahead.
    pub fn since_ms(self, earlier: Timestamp) -> u64 {
        self.0.saturating_sub(earlier.0).max(0).unsigned_abs()
    }
}

impl serde::Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.rfc3339())
    }
}

/// Where the time comes from.
#[derive(Debug, Clone, Default)]
pub struct Clock(Source);

#[derive(Debug, Clone, Default)]
enum Source {
    #[default]
    System,
    /// Stands still until it is moved.
    Fixed(Arc<AtomicI64>),
    Following(Arc<Following>),
}

/// Somebody else's time, as of its last word, and on from there by the monotonic clock.
#[derive(Debug)]
struct Following {
    since: Instant,
    /// Their time at `since`.
    then_ms: AtomicI64,
}

impl Clock {
    /// The system's clock.
    pub fn system() -> Clock {
        Clock(Source::System)
    }

    /// A clock for tests, which stands at `at` until [`Clock::advance_ms`].
    pub fn fixed(at: Timestamp) -> Clock {
        Clock(Source::Fixed(Arc::new(AtomicI64::new(at.0))))
    }

    /// A clock that goes by somebody else's time, which is `now`: a host's whose database is shared. What this machine's own clock says, and how
    /// it is set meanwhile, changes nothing. [`Clock::follow`] keeps it right.
    pub fn following(now: Timestamp) -> Clock {
        Clock(Source::Following(Arc::new(Following { since: Instant::now(), then_ms: AtomicI64::new(now.0) })))
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Source::System => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }
            Source::Fixed(at) => Timestamp(at.load(Ordering::Relaxed)),
            Source::Following(following) => {
                Timestamp(following.then_ms.load(Ordering::Relaxed).saturating_add(millis(following.since)))
            }
        }
    }

    /// It is `now` where a following clock's time comes from. Nothing to any other clock.
    pub fn follow(&self, now: Timestamp) {
        if let Source::Following(following) = &self.0 {
            following.then_ms.store(now.0.saturating_sub(millis(following.since)), Ordering::Relaxed);
        }
    }

    /// Moves a fixed clock.
    ///
    /// # Panics
    /// On any other, which nobody moves.
    pub fn advance_ms(&self, ms: i64) {
        let Source::Fixed(at) = &self.0 else { panic!("only a fixed clock can be moved") };
        at.fetch_add(ms, Ordering::Relaxed);
    }
}

fn millis(since: Instant) -> i64 {
    i64::try_from(since.elapsed().as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_in_utc() {
        assert_eq!(Timestamp(0).rfc3339(), "1970-01-01T00:00:00.000Z");
        assert_eq!(Timestamp(1_795_453_392_120).rfc3339(), "2026-11-23T17:03:12.120Z");
        assert_eq!(Timestamp(1_795_453_392_123).rfc3339(), "2026-11-23T17:03:12.123Z");
        assert_eq!(Timestamp::parse("2026-11-23T17:03:12.123Z"), Some(Timestamp(1_795_453_392_123)));
        assert_eq!(Timestamp::parse("2026-11-23T18:03:12.123456+01:00"), Some(Timestamp(1_795_453_392_123)));
        for none in ["", "2026-11-23", "1969-12-31T23:59:59Z", "2026-13-01T00:00:00Z", "now"] {
            assert_eq!(Timestamp::parse(none), None, "{none}");
        }
    }

    #[test]
    fn a_fixed_clock_moves_only_when_told() {
        let clock = Clock::fixed(Timestamp(5));
        assert_eq!(clock.now(), Timestamp(5));
        clock.advance_ms(10);
        assert_eq!(clock.clone().now(), Timestamp(15));
    }

    #[test]
    fn r3_a_following_clock_goes_by_anothers_time() {
        let clock = Clock::following(Timestamp(1_000_000));
        let near = |at: i64| (at..at + 10_000).contains(&clock.now().0);
        assert!(near(1_000_000));
        clock.follow(Timestamp(5_000));
        assert!(near(5_000));
        let system = Clock::system();
        system.follow(Timestamp(0));
        assert!(system.now() > Timestamp(1_000_000_000_000), "nobody tells the system's clock");
    }
}
