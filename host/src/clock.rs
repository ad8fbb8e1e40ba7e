//! Time as a parameter: whoever needs it is given a [`Clock`]; nothing below the edges reads the system's.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

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
pub struct Clock {
    /// Set in tests: the time stands still until it is moved.
    fixed: Option<Arc<AtomicI64>>,
}

impl Clock {
    /// The system's clock.
    pub fn system() -> Clock {
        Clock { fixed: None }
    }

    /// A clock for tests, which stands at `at` until [`Clock::advance_ms`].
    pub fn fixed(at: Timestamp) -> Clock {
        Clock { fixed: Some(Arc::new(AtomicI64::new(at.0))) }
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        match &self.fixed {
            Some(at) => Timestamp(at.load(Ordering::Relaxed)),
            None => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }
        }
    }

    /// Moves a fixed clock.
    ///
    /// # Panics
    /// On the system's clock, which nobody moves.
    pub fn advance_ms(&self, ms: i64) {
        self.fixed.as_ref().expect("only a fixed clock can be moved").fetch_add(ms, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_in_utc() {
        assert_eq!(Timestamp(0).rfc3339(), "1970-01-01T00:00:00.000Z");
        assert_eq!(Timestamp(1_795_453_392_120).rfc3339(), "2026-11-23T17:03:12.120Z");
        assert_eq!(Timestamp(1_795_453_392_123).rfc3339(), "2026-11-23T17:03:12.123Z");
    }

    #[test]
    fn a_fixed_clock_moves_only_when_told() {
        let clock = Clock::fixed(Timestamp(5));
        assert_eq!(clock.now(), Timestamp(5));
        clock.advance_ms(10);
        assert_eq!(clock.clone().now(), Timestamp(15));
    }
}
