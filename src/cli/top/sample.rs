//! What `infill top` knows: the daemon's numbers at some time, and what became of them since an earlier one.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

/// The numbers of a daemon; those that it does not tell are 0.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Sample {
    pub(super) version: String,
    pub(super) kernel: String,
    pub(super) front_end: String,
    pub(super) engine: String,
    pub(super) shards: u64,
    pub(super) uptime_s: u64,
    pub(super) pending: u64,
    pub(super) oldest_ms: u64,
    pub(super) stuck: u64,
    pub(super) answers_ok: u64,
    pub(super) answers_failed: u64,
    pub(super) answers_timed_out: u64,
    pub(super) present: u64,
    pub(super) already_there: u64,
    pub(super) opens: u64,
    pub(super) bytes_mapped: u64,
    pub(super) bytes_direct: u64,
    pub(super) bytes_buffered: u64,
    pub(super) bytes_zero: u64,
    pub(super) bytes_unasked: u64,
    pub(super) bytes_ahead_used: u64,
    pub(super) objects: u64,
    pub(super) fds: u64,
    pub(super) fds_budget: u64,
    pub(super) evictions: u64,
    pub(super) reopens: u64,
    pub(super) cache_bytes: u64,
    pub(super) cache_objects: u64,
    pub(super) cache_free_bytes: u64,
    pub(super) culled_objects: u64,
    pub(super) times: Times,
    pub(super) per_shard: Vec<Shard>,
    pub(super) blobs: Vec<Blob>,
}

/// How long requests took, by classes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Times {
    pub(super) classes_us: Vec<u64>,
    pub(super) request: Classes,
    pub(super) queued: Classes,
    pub(super) served: Classes,
}

/// How many took at most as long as each class says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Classes {
    pub(super) count: u64,
    pub(super) up_to: Vec<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Shard {
    pub(super) index: usize,
    pub(super) pending: u64,
    pub(super) cpu_us: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Blob {
    pub(super) blob: String,
    pub(super) len_bytes: u64,
    pub(super) present_bytes: u64,
    pub(super) open: bool,
    pub(super) requests: u64,
    pub(super) misses: u64,
    pub(super) failed: u64,
    pub(super) waited_us: u64,
    pub(super) device: u64,
}

impl Sample {
    /// What the daemon has told.
    pub(super) fn of(stat: Value) -> serde_json::Result<Self> {
        serde_json::from_value(stat)
    }

    /// Bytes that were brought.
    pub(super) const fn bytes_filled(&self) -> u64 {
        self.bytes_mapped + self.bytes_direct + self.bytes_buffered + self.bytes_zero
    }
}

/// What happened from one sample to another.
#[derive(Debug)]
pub(super) struct Interval<'a> {
    pub(super) before: &'a Sample,
    pub(super) now: &'a Sample,
    pub(super) seconds: f64,
}

/// What became of one blob.
#[derive(Debug)]
pub(super) struct Change<'a> {
    pub(super) blob: &'a Blob,
    pub(super) requests: u64,
    pub(super) misses: u64,
    pub(super) waited_us: u64,
}

impl<'a> Change<'a> {
    const fn of(blob: &'a Blob, before: &Blob) -> Self {
        Self {
            blob,
            requests: blob.requests.saturating_sub(before.requests),
            misses: blob.misses.saturating_sub(before.misses),
            waited_us: blob.waited_us.saturating_sub(before.waited_us),
        }
    }
}

impl Interval<'_> {
    /// How much a number grew in a second. One that is smaller now is another daemon's.
    #[allow(clippy::cast_precision_loss, reason = "what is shown has few digits")]
    pub(super) fn rate(&self, of: impl Fn(&Sample) -> u64) -> f64 {
        of(self.now).saturating_sub(of(self.before)) as f64 / self.seconds.max(1e-3)
    }

    /// Value in microseconds below which a share of the durations of the interval lies, between the limits of its class; `None`:
    /// there were none.
    #[allow(clippy::cast_precision_loss, reason = "what is shown has few digits")]
    pub(super) fn percentile_us(&self, of: impl Fn(&Times) -> &Classes, share: f64) -> Option<f64> {
        let (before, now) = (of(&self.before.times), of(&self.now.times));
        let grown = |at: usize| now.up_to[at].saturating_sub(before.up_to.get(at).copied().unwrap_or(0)) as f64;
        let all = now.count.saturating_sub(before.count) as f64;
        if all < 1.0 {
            return None;
        }
        let limits = &self.now.times.classes_us;
        let (rank, mut below, mut start) = (all * share, 0.0, 0.0);
        for (at, &limit) in limits.iter().enumerate().take(now.up_to.len()) {
            let (reached, limit) = (grown(at), limit as f64);
            if reached >= rank {
                return Some(start + (limit - start) * (rank - below) / (reached - below).max(1.0));
            }
            (below, start) = (reached, limit);
        }
        Some(start)
    }

    /// The blobs with what became of them, those with the most misses first, then those with the most requests.
    pub(super) fn blobs(&self) -> Vec<Change<'_>> {
        let before: HashMap<_, _> = self.before.blobs.iter().map(|blob| (blob.blob.as_str(), blob)).collect();
        let none = Blob::default();
        let mut changes: Vec<_> =
            self.now.blobs.iter().map(|blob| Change::of(blob, before.get(blob.blob.as_str()).copied().unwrap_or(&none))).collect();
        changes.sort_by_key(|change| std::cmp::Reverse((change.misses, change.requests, change.blob.open, change.blob.requests)));
        changes
    }

    /// File systems of sources whose blobs missed: number, misses, and how long those waited on the average, the slowest first.
    #[allow(clippy::cast_precision_loss, reason = "what is shown has few digits")]
    pub(super) fn sources(&self) -> Vec<(u64, u64, f64)> {
        let mut sources: HashMap<u64, (u64, u64)> = HashMap::new();
        for Change { blob, misses, waited_us, .. } in self.blobs().into_iter().filter(|change| change.misses > 0) {
            let (count, waited) = sources.entry(blob.device).or_default();
            (*count, *waited) = (*count + misses, *waited + waited_us);
        }
        let mut sources: Vec<_> =
            sources.into_iter().map(|(device, (misses, waited_us))| (device, misses, waited_us as f64 / misses as f64)).collect();
        sources.sort_by(|a, b| b.2.total_cmp(&a.2));
        sources
    }

    /// How busy each shard was, as a share of one core.
    #[allow(clippy::cast_precision_loss, reason = "what is shown has few digits")]
    pub(super) fn busy(&self) -> Vec<(usize, f64, u64)> {
        let before: HashMap<_, _> = self.before.per_shard.iter().map(|shard| (shard.index, shard.cpu_us)).collect();
        let busy = |shard: &Shard| {
            let spent_us = shard.cpu_us.saturating_sub(before.get(&shard.index).copied().unwrap_or(0));
            (shard.index, spent_us as f64 / 1e6 / self.seconds.max(1e-3), shard.pending)
        };
        self.now.per_shard.iter().map(busy).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_interval() {
        let sample = |count, up_to: [u64; 3]| {
            let request = Classes { count, up_to: up_to.into() };
            Sample { times: Times { classes_us: vec![10, 100, 1000], request, ..Times::default() }, ..Sample::default() }
        };
        let (before, now) = (sample(1000, [1000, 1000, 1000]), sample(1100, [1000, 1050, 1100]));
        let interval = Interval { before: &before, now: &now, seconds: 1.0 };
        assert_eq!(interval.percentile_us(|times| &times.request, 0.5), Some(100.0));
        assert_eq!(interval.percentile_us(|times| &times.request, 0.75), Some(550.0));
        assert_eq!(interval.percentile_us(|times| &times.served, 0.5), None);
    }

    #[test]
    fn blobs_that_miss_come_first_and_their_sources_by_how_slow_they_are() {
        let blob = |name: &str, device, misses, waited_us| Blob {
            blob: name.into(),
            device,
            misses,
            waited_us,
            requests: misses,
            ..Blob::default()
        };
        let before = Sample { blobs: vec![blob("a", 1, 5, 500), blob("b", 2, 7, 700)], ..Sample::default() };
        let now = Sample { blobs: vec![blob("a", 1, 9, 900), blob("b", 2, 7, 700), blob("c", 3, 2, 20_000)], ..Sample::default() };
        let interval = Interval { before: &before, now: &now, seconds: 2.0 };
        let names: Vec<_> = interval.blobs().iter().map(|change| (change.blob.blob.clone(), change.misses)).collect();
        assert_eq!(names, [("a".into(), 4), ("c".into(), 2), ("b".into(), 0)]);
        assert_eq!(interval.sources(), [(3, 2, 10_000.0), (1, 4, 100.0)]);
        assert_eq!(interval.rate(|sample| sample.blobs.len() as u64), 0.5);
        // Another daemon counts from 0.
        assert_eq!(Interval { before: &now, now: &before, seconds: 1.0 }.rate(|sample| sample.blobs.len() as u64), 0.0);
    }
}
