//! What shards count. A shard owns its counters and is their only writer; others read them at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::machine::Counters;

/// Sub-divisions of each power of two in a [`Histogram`]: values are known to an eighth.
const SUB_BUCKETS: u64 = 8;
const BUCKETS: usize = 62 * SUB_BUCKETS as usize;
/// Classes of how many answers go out together: 1, 2, up to 4, 8, 16, 32, 64.
const BATCH_CLASSES: usize = 7;

/// A log-linear histogram of durations in nanoseconds.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64; BUCKETS]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new([const { AtomicU64::new(0) }; BUCKETS]) }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, value_ns: u64) {
        bump(&self.buckets[bucket(value_ns)], 1);
    }

    /// Value below which a share of the durations lies, known to an eighth.
    #[must_use]
    pub fn percentile_ns(&self, share: f64) -> u64 {
        let mut buckets = [0; BUCKETS];
        self.add_to(&mut buckets);
        percentile(&buckets, share)
    }

    fn add_to(&self, sums: &mut [u64]) {
        for (sum, bucket) in sums.iter_mut().zip(self.buckets.iter()) {
            *sum += bucket.load(Ordering::Relaxed);
        }
    }
}

/// Adds to a counter that only the caller writes.
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
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

/// Value below which a share of the recorded ones lies.
fn percentile(buckets: &[u64], share: f64) -> u64 {
    let total: u64 = buckets.iter().sum();
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank; an error of one is fine"
    )]
    let rank = ((total as f64 * share).ceil() as u64).max(1);
    let mut seen = 0;
    for (index, count) in buckets.iter().enumerate() {
        seen += count;
        if seen >= rank {
            return bucket_limit(index);
        }
    }
    0
}

/// How things stand in a shard.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Gauges {
    /// Requests that wait for their answer.
    pub(super) pending: usize,
    /// When the oldest of them came.
    pub(super) oldest_ns: Option<u64>,
    /// Operations in flight for longer than any request may wait.
    pub(super) stuck: usize,
    /// Objects that are open.
    pub(super) objects: usize,
}

macro_rules! published {
    ($($(#[$attribute:meta])? $name:ident),+ $(,)?) => {
        /// One shard's counters, readable from anywhere. Aligned so that no two shards write to one cache line
        /// (or to a pair that the processor fetches together).
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct ShardStats {
            $($name: AtomicU64,)+
            pending: AtomicU64,
            /// When the oldest request came that waits, on the engine's clock; 0: none.
            oldest_ns: AtomicU64,
            stuck: AtomicU64,
            objects: AtomicU64,
            /// Requests that the front end knew the bytes of to be there.
            present: AtomicU64,
            answers_late: AtomicU64,
            answers_refused: AtomicU64,
            turns: AtomicU64,
            latency: Histogram,
            batches: [AtomicU64; BATCH_CLASSES],
        }

        impl ShardStats {
            /// Makes the machine's counters and gauges visible.
            pub(super) fn publish(&self, counters: &Counters, now: &Gauges) {
                $(self.$name.store(counters.$name, Ordering::Relaxed);)+
                self.pending.store(now.pending as u64, Ordering::Relaxed);
                self.oldest_ns.store(now.oldest_ns.map_or(0, |since_ns| since_ns.max(1)), Ordering::Relaxed);
                self.stuck.store(now.stuck as u64, Ordering::Relaxed);
                self.objects.store(now.objects as u64, Ordering::Relaxed);
                bump(&self.turns, 1);
            }
        }

        /// The sum over all shards, and what the engine counts as a whole.
        #[derive(Clone, Debug, Default, Serialize)]
        #[allow(missing_docs, reason = "named after the fields of Counters, which are described there")]
        pub struct Snapshot {
            $($(#[$attribute])? pub $name: u64,)+
            /// Requests that wait for their answer.
            pub pending: u64,
            /// How long the oldest of them has waited, in milliseconds.
            pub oldest_ms: u64,
            /// Operations in flight for longer than any request may wait: a disk or a server hangs.
            pub stuck: u64,
            /// Objects that are open.
            pub objects: u64,
            /// Requests whose bytes were there before they came, as their front end knew; they are none of `needs`.
            pub present: u64,
            /// Answers that nobody waited for any more.
            pub answers_late: u64,
            /// Answers that the kernel refused.
            pub answers_refused: u64,
            /// Turns of the event loops.
            pub turns: u64,
            /// Requests to open an object.
            pub opens: u64,
            /// Of them, refused.
            pub opens_failed: u64,
            /// Objects that the kernel closed.
            pub closes: u64,
            /// Objects whose descriptors were given up to make room.
            pub evictions: u64,
            /// Descriptors that objects have.
            pub fds: u64,
            /// Most that they ever had.
            pub fds_peak: u64,
            /// Most that they may have.
            pub fds_budget: u64,
            /// Messages that could not be understood.
            pub malformed: u64,
            /// Requests that were dropped unanswered: a bug if not 0.
            pub unanswered: u64,
            /// Requests that were left to the next daemon when this one ended.
            pub left: u64,
            /// How often answers went out together: 1, 2, up to 4, 8, 16, 32, 64 of them.
            pub answer_batches: [u64; BATCH_CLASSES],
            /// Half of the answers took at most this long, in microseconds.
            pub p50_us: u64,
            /// 99 of 100 answers took at most this long, in microseconds.
            pub p99_us: u64,
            /// 999 of 1000 answers took at most this long, in microseconds.
            pub p999_us: u64,
        }

        impl Snapshot {
            /// Adds up shards, at some time.
            pub(super) fn sum<'a>(shards: impl Iterator<Item = &'a ShardStats>, now_ns: u64) -> Self {
                let mut sum = Self::default();
                let mut latency = [0; BUCKETS];
                for shard in shards {
                    $(sum.$name += shard.$name.load(Ordering::Relaxed);)+
                    sum.pending += shard.pending();
                    sum.oldest_ms = sum.oldest_ms.max(shard.oldest_ms(now_ns));
                    sum.stuck += shard.stuck.load(Ordering::Relaxed);
                    sum.objects += shard.objects.load(Ordering::Relaxed);
                    sum.present += shard.present.load(Ordering::Relaxed);
                    sum.answers_late += shard.answers_late.load(Ordering::Relaxed);
                    sum.answers_refused += shard.answers_refused.load(Ordering::Relaxed);
                    sum.turns += shard.turns.load(Ordering::Relaxed);
                    shard.latency.add_to(&mut latency);
                    for (sum, class) in sum.answer_batches.iter_mut().zip(&shard.batches) {
                        *sum += class.load(Ordering::Relaxed);
                    }
                }
                sum.p50_us = percentile(&latency, 0.5) / 1000;
                sum.p99_us = percentile(&latency, 0.99) / 1000;
                sum.p999_us = percentile(&latency, 0.999) / 1000;
                sum
            }
        }
    };
}

published!(
    #[serde(rename = "requests")]
    needs,
    #[serde(rename = "failed")]
    needs_failed,
    #[serde(rename = "timed_out")]
    needs_timed_out,
    unknown_object,
    beyond_end,
    already_there,
    joined,
    fills,
    fills_failed,
    bytes_asked,
    bytes_filled,
    bytes_unasked,
    background,
    fills_mapped,
    bytes_mapped,
    fills_direct,
    bytes_direct,
    fills_buffered,
    bytes_buffered,
    fills_zero,
    bytes_zero,
    operations,
    stale
);

impl ShardStats {
    /// Objects that are open.
    pub(super) fn objects(&self) -> u64 {
        self.objects.load(Ordering::Relaxed)
    }

    /// Turns of its event loop.
    pub(super) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// How long the oldest request has waited.
    fn oldest_ms(&self, now_ns: u64) -> u64 {
        match self.oldest_ns.load(Ordering::Relaxed) {
            0 => 0,
            since_ns => now_ns.saturating_sub(since_ns) / 1_000_000,
        }
    }

    /// Requests that wait for their answer.
    pub(super) fn pending(&self) -> u64 {
        self.pending.load(Ordering::Relaxed)
    }

    /// An answer was given, so long after the request was read.
    pub(super) fn answered(&self, latency_ns: u64) {
        self.latency.record(latency_ns);
    }

    /// So many answers went out together.
    pub(super) fn batch(&self, answers: usize) {
        if let Some(class) = answers.checked_sub(1) {
            let class = (usize::BITS - class.leading_zeros()) as usize;
            bump(&self.batches[class.min(BATCH_CLASSES - 1)], 1);
        }
    }

    /// A request that asked for nothing but its answer.
    pub(super) fn present(&self) {
        bump(&self.present, 1);
    }

    /// An answer that nobody waited for.
    pub(super) fn late(&self) {
        bump(&self.answers_late, 1);
    }

    /// An answer that the kernel refused.
    pub(super) fn refused(&self) {
        bump(&self.answers_refused, 1);
    }
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
    fn percentiles_of_a_known_set() {
        let histogram = Histogram::default();
        (1..=1000).for_each(|value| histogram.record(value * 1000));
        let mut buckets = [0; BUCKETS];
        histogram.add_to(&mut buckets);
        let p50 = percentile(&buckets, 0.5);
        assert!((500_000..570_000).contains(&p50), "{p50}");
        assert!((990_000..1_130_000).contains(&percentile(&buckets, 0.99)));
        assert_eq!(percentile(&[0; BUCKETS], 0.5), 0);
    }
}
