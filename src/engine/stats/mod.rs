//! What shards count. A shard owns its counters and is their only writer; others read them at any time.
//!
//! | file | its subject |
//! |---|---|
//! | `mod` | a shard's counters, and their sum |
//! | `histogram` | durations |
//! | `objects` | counters of each blob |

mod histogram;
mod objects;

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::machine::Counters;
use crate::front::Outcome;

pub use self::histogram::{Durations, Histogram};
pub use self::objects::ObjectReport;
pub(super) use self::objects::{ObjectStats, Objects};

/// Classes of how many answers go out together: 1, 2, up to 4, 8, 16, 32, 64.
const BATCH_CLASSES: usize = 7;

/// Adds to a counter that only the caller writes.
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
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
            answers_ok: AtomicU64,
            answers_failed: AtomicU64,
            answers_timed_out: AtomicU64,
            answers_late: AtomicU64,
            answers_refused: AtomicU64,
            turns: AtomicU64,
            latency: Histogram,
            queued: Histogram,
            served: Histogram,
            /// The thread's id; 0: not known yet.
            thread: AtomicI32,
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
            /// Answers given: the bytes are there.
            pub answers_ok: u64,
            /// Answers given: an error, but not because time was over.
            pub answers_failed: u64,
            /// Answers given: time was over.
            pub answers_timed_out: u64,
            /// Of all of them, those that nobody waited for any more.
            pub answers_late: u64,
            /// Answers that the kernel refused.
            pub answers_refused: u64,
            /// Turns of the event loops.
            pub turns: u64,
            /// Requests to open an object.
            pub opens: u64,
            /// Of them, answered well.
            pub opens_ok: u64,
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
            /// Opens of blobs that had been open before: their descriptors had been given up, or their image was mounted again.
            pub reopens: u64,
            /// Half of the answers took at most this long, in microseconds.
            pub p50_us: u64,
            /// 99 of 100 answers took at most this long, in microseconds.
            pub p99_us: u64,
            /// 999 of 1000 answers took at most this long, in microseconds.
            pub p999_us: u64,
            /// How long answers took, from the request on.
            #[serde(skip)]
            pub latency: Durations,
            /// Of that, for those that waited for bytes to be brought: until the first of them was being brought.
            #[serde(skip)]
            pub queued: Durations,
            /// And from then on.
            #[serde(skip)]
            pub served: Durations,
        }

        impl Snapshot {
            /// Adds up shards, at some time.
            pub(super) fn sum<'a>(shards: impl Iterator<Item = &'a ShardStats>, now_ns: u64) -> Self {
                let mut sum = Self::default();
                for shard in shards {
                    $(sum.$name += shard.$name.load(Ordering::Relaxed);)+
                    sum.pending += shard.pending();
                    sum.oldest_ms = sum.oldest_ms.max(shard.oldest_ms(now_ns));
                    sum.stuck += shard.stuck.load(Ordering::Relaxed);
                    sum.objects += shard.objects.load(Ordering::Relaxed);
                    sum.present += shard.present.load(Ordering::Relaxed);
                    sum.answers_ok += shard.answers_ok.load(Ordering::Relaxed);
                    sum.answers_failed += shard.answers_failed.load(Ordering::Relaxed);
                    sum.answers_timed_out += shard.answers_timed_out.load(Ordering::Relaxed);
                    sum.answers_late += shard.answers_late.load(Ordering::Relaxed);
                    sum.answers_refused += shard.answers_refused.load(Ordering::Relaxed);
                    sum.turns += shard.turns.load(Ordering::Relaxed);
                    sum.latency.add(&shard.latency);
                    sum.queued.add(&shard.queued);
                    sum.served.add(&shard.served);
                    for (sum, class) in sum.answer_batches.iter_mut().zip(&shard.batches) {
                        *sum += class.load(Ordering::Relaxed);
                    }
                }
                sum.p50_us = sum.latency.percentile_ns(0.5) / 1000;
                sum.p99_us = sum.latency.percentile_ns(0.99) / 1000;
                sum.p999_us = sum.latency.percentile_ns(0.999) / 1000;
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
    bytes_ahead_used,
    bytes_ahead_wasted,
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

    /// An answer was given, so long after the request was read; for one that waited for bytes, also how long after that the first
    /// of them was being brought.
    pub(super) fn answered(&self, outcome: Outcome, latency_ns: u64, queued_ns: Option<u64>) {
        let answers = match outcome {
            Outcome::Failed(Errno::ETIMEDOUT) => &self.answers_timed_out,
            Outcome::Failed(_) => &self.answers_failed,
            Outcome::Done | Outcome::Opened { .. } => &self.answers_ok,
        };
        bump(answers, 1);
        self.latency.record(latency_ns);
        if let Some(queued_ns) = queued_ns {
            self.queued.record(queued_ns);
            self.served.record(latency_ns.saturating_sub(queued_ns));
        }
    }

    /// The calling thread is the shard's.
    pub(super) fn is_here(&self) {
        self.thread.store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
    }

    /// How things stand in shard `index`.
    pub(super) fn report(&self, index: usize, now_ns: u64) -> ShardReport {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ShardReport {
            index,
            requests: of(&self.needs) + of(&self.present),
            pending: self.pending(),
            oldest_ms: self.oldest_ms(now_ns),
            objects: self.objects(),
            turns: of(&self.turns),
            cpu_us: cpu_time(self.thread.load(Ordering::Relaxed)).as_micros().try_into().unwrap_or(u64::MAX),
        }
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

/// How things stand in a shard, for operators.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct ShardReport {
    /// Which.
    pub index: usize,
    /// Requests for data that it got.
    pub requests: u64,
    /// Of them, those that wait for their answer.
    pub pending: u64,
    /// How long the oldest of those has waited.
    pub oldest_ms: u64,
    /// Objects that it has open.
    pub objects: u64,
    /// Turns of its event loop.
    pub turns: u64,
    /// CPU time of its thread, without that of the kernel's workers for it.
    pub cpu_us: u64,
}

/// CPU time of a thread of this process, which costs the thread nothing; zero if there is none.
fn cpu_time(thread: i32) -> Duration {
    /// A thread's clock, its time on a CPU (`CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED`, kernel/time/posix-cpu-timers.c).
    const THREAD_CLOCK: i32 = 4 | 2;
    if thread == 0 {
        return Duration::ZERO;
    }
    clock_gettime(ClockId::from_raw(!thread << 3 | THREAD_CLOCK)).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_time_of_a_shard_is_that_of_its_thread() {
        let stats = ShardStats::default();
        assert_eq!(stats.report(0, 0).cpu_us, 0);
        std::thread::scope(|scope| {
            let (burnt, wait) = std::sync::mpsc::channel();
            let (looked, end) = std::sync::mpsc::channel::<()>();
            let stats = &stats;
            scope.spawn(move || {
                stats.is_here();
                while stats.report(0, 0).cpu_us < 20_000 {}
                burnt.send(()).unwrap();
                let _ = end.recv();
            });
            wait.recv().unwrap();
            assert!(stats.report(0, 0).cpu_us >= 20_000);
            drop(looked);
        });
        // What it did has ended; the kernel's thread ends a little later.
        while stats.report(0, 0).cpu_us > 0 {
            std::thread::yield_now();
        }
    }
}
