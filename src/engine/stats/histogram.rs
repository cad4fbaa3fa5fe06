//! Durations in classes that are an eighth wide: what a shard records, and what is read of it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::bump;

/// Sub-divisions of each power of two: values are known to an eighth.
const SUB_BUCKETS: u64 = 8;
const BUCKETS: usize = 62 * SUB_BUCKETS as usize;

/// A log-linear histogram of durations in nanoseconds, with one writer.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64; BUCKETS]>,
    sum_ns: AtomicU64,
}

/// What histograms held at some time, added up.
#[derive(Clone, Debug)]
pub struct Durations {
    buckets: Box<[u64; BUCKETS]>,
    sum_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new([const { AtomicU64::new(0) }; BUCKETS]), sum_ns: AtomicU64::new(0) }
    }
}

impl Default for Durations {
    fn default() -> Self {
        Self { buckets: Box::new([0; BUCKETS]), sum_ns: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, value_ns: u64) {
        bump(&self.buckets[bucket(value_ns)], 1);
        bump(&self.sum_ns, value_ns);
    }

    /// Value below which a share of the durations lies, known to an eighth.
    #[must_use]
    pub fn percentile_ns(&self, share: f64) -> u64 {
        let mut durations = Durations::default();
        durations.add(self);
        durations.percentile_ns(share)
    }
}

impl Durations {
    /// Adds what a histogram holds.
    pub fn add(&mut self, histogram: &Histogram) {
        for (sum, bucket) in self.buckets.iter_mut().zip(histogram.buckets.iter()) {
            *sum += bucket.load(Ordering::Relaxed);
        }
        self.sum_ns = self.sum_ns.wrapping_add(histogram.sum_ns.load(Ordering::Relaxed));
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All of them together.
    #[must_use]
    pub const fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// How many are at most as long as each of `limits_ns`, which ascend. One that is less than an eighth below a limit may
    /// be missing there.
    #[must_use]
    pub fn up_to(&self, limits_ns: &[u64]) -> Vec<u64> {
        let (mut buckets, mut seen) = (self.buckets.iter().enumerate().peekable(), 0);
        let mut count = |limit_ns: &u64| {
            while let Some((_, count)) = buckets.next_if(|(index, _)| bucket_limit(*index) <= *limit_ns) {
                seen += count;
            }
            seen
        };
        limits_ns.iter().map(&mut count).collect()
    }

    /// Value below which a share of the recorded ones lies, known to an eighth; 0 if there are none.
    #[must_use]
    pub fn percentile_ns(&self, share: f64) -> u64 {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a rank; an error of one is fine"
        )]
        let rank = ((self.count() as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return bucket_limit(index);
            }
        }
        0
    }
}

#[allow(clippy::cast_possible_truncation, reason = "below BUCKETS for every u64")]
const fn bucket(value: u64) -> usize {
    if value < SUB_BUCKETS {
        return value as usize;
    }
    let exponent = (63 - value.leading_zeros()) as u64;
    ((exponent - 2) * SUB_BUCKETS + (value >> (exponent - 3)) % SUB_BUCKETS) as usize
}

/// Upper end of a bucket.
const fn bucket_limit(index: usize) -> u64 {
    let index = index as u64;
    if index < SUB_BUCKETS {
        return index;
    }
    let (exponent, sub) = (index / SUB_BUCKETS + 2, index % SUB_BUCKETS);
    let limit = ((SUB_BUCKETS + sub + 1) as u128) << (exponent - 3);
    if limit > u64::MAX as u128 { u64::MAX } else { limit as u64 - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_below_the_limit_of_its_bucket_and_close_to_it() {
        for shift in 0..64 {
            for value in [1u64 << shift, (1u64 << shift) | ((1u64 << shift) / 3), u64::MAX >> shift] {
                let limit = bucket_limit(bucket(value));
                assert!(value <= limit && limit - value <= value / 7 + 1, "{value} {limit}");
            }
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn a_known_set_is_told_as_it_is() {
        let histogram = Histogram::default();
        (1..=1000).for_each(|value| histogram.record(value * 1000));
        let mut durations = Durations::default();
        durations.add(&histogram);
        let p50 = durations.percentile_ns(0.5);
        assert!((500_000..570_000).contains(&p50), "{p50}");
        assert!((990_000..1_130_000).contains(&durations.percentile_ns(0.99)));
        assert_eq!(Durations::default().percentile_ns(0.5), 0);
        assert_eq!((durations.count(), durations.sum_ns()), (1000, 500_500_000));
        let counts = durations.up_to(&[500, 100_000, 1_200_000]);
        assert!(counts[0] == 0 && (87..=100).contains(&counts[1]) && counts[2] == 1000, "{counts:?}");
    }
}
