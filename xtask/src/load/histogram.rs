//! Latencies, recorded at a fixed cost: a log-linear histogram, exact to 1.6 %.
//!
//! One array of counters a client, merged when the run is over: recording is one addition, with no allocation and no lock.

use std::time::Duration;

/// Sub-buckets of each power of two.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.trailing_zeros();
/// Up to 2^36 × 64 ns: over an hour.
const BUCKETS: usize = (36 * STEPS) as usize;

/// How long things took.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    pub fn new() -> Histogram {
        Histogram { counts: vec![0; BUCKETS], total: 0 }
    }

    pub fn record(&mut self, time: Duration) {
        let at = bucket(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        self.counts[at] += 1;
        self.total += 1;
    }

    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
    }

    pub fn count(&self) -> u64 {
        self.total
    }

    /// The time that `share` (0 to 1) of all records do not exceed, in milliseconds; 0 when there are none.
    pub fn quantile_ms(&self, share: f64) -> f64 {
        let rank = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle(at) as f64 / 1e6;
            }
        }
        0.0
    }
}

fn bucket(nanos: u64) -> usize {
    if nanos < STEPS {
        return nanos as usize;
    }
    let shift = 63 - nanos.leading_zeros() - STEP_BITS;
    let at = u64::from(shift + 1) * STEPS + ((nanos >> shift) - STEPS);
    (at as usize).min(BUCKETS - 1)
}

fn middle(at: usize) -> u64 {
    let at = at as u64;
    if at < STEPS {
        return at;
    }
    let shift = at / STEPS - 1;
    let low = (at % STEPS + STEPS) << shift;
    low + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_two_percent() {
        let mut even = Histogram::new();
        for micros in 1..=10_000 {
            even.record(Duration::from_micros(micros));
        }
        for (share, expected_ms) in [(0.0, 0.001), (0.5, 5.0), (0.99, 9.9), (1.0, 10.0)] {
            let seen = even.quantile_ms(share);
            assert!((seen - expected_ms).abs() <= expected_ms * 0.02, "{share}: {seen}, not {expected_ms}");
        }
    }

    #[test]
    fn merging_keeps_every_record() {
        let (mut a, mut b) = (Histogram::new(), Histogram::new());
        a.record(Duration::from_millis(1));
        b.record(Duration::from_secs(10_000_000));
        a.merge(&b);
        assert_eq!(a.count(), 2);
        assert!((a.quantile_ms(0.5) - 1.0).abs() < 0.02);
    }

    #[test]
    fn without_records_a_quantile_is_zero() {
        assert_eq!(Histogram::new().quantile_ms(0.99), 0.0);
    }

    #[test]
    fn buckets_follow_each_other_without_gaps() {
        let mut last = 0;
        for nanos in 0..200_000 {
            let at = bucket(nanos);
            assert!(at == last || at == last + 1, "{nanos} ns");
            last = at;
        }
    }
}
