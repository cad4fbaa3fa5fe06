//! What a daemon is and does at some time: what `infill stat` shows, what `SIGUSR1` logs, what metrics are made of.
//!
//! Whoever looks pays for it; the shards do not notice.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use serde::Serialize;

use super::{log, space};
use crate::config::LogLevel;
use crate::engine::buffers::Pages;
use crate::engine::stats::{Durations, ObjectReport, ShardReport, Snapshot};
use crate::engine::{Observer, Started};
use crate::mount::Blobs;

/// What does not change while a daemon runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Facts {
    /// infill's version.
    pub version: &'static str,
    /// The kernel's release.
    pub kernel: String,
    /// The kernel interface that is served.
    pub front_end: &'static str,
    /// How reads and writes are done.
    pub engine: &'static str,
    /// Event loops.
    pub shards: usize,
    /// What their buffers lie in.
    pub buffers: Pages,
    /// When it began, in seconds of the epoch.
    pub started_unix_s: u64,
    /// Whether it went on where an earlier daemon had ended: 1 if so.
    pub restores: u64,
}

/// What is counted, in one flat object.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Statistics {
    /// What the daemon is.
    #[serde(flatten)]
    pub facts: Facts,
    /// Least important messages that it logs.
    pub log_level: LogLevel,
    /// For how long it runs, in seconds.
    pub uptime_s: u64,
    /// What its engine did.
    #[serde(flatten)]
    pub counts: Snapshot,
    /// Bytes that came into the cache by sharing blocks with a store.
    pub bytes_reflinked: u64,
    /// The cache, if it is on a disk.
    #[serde(flatten)]
    pub space: Option<space::Statistics>,
}

/// Limits of the classes of durations that are shown, in nanoseconds.
pub const CLASSES_NS: [u64; 20] = [
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
];

/// Durations by classes: what a client needs to tell those of the last second from all others.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct ByClass {
    /// How many.
    pub count: u64,
    /// All of them together, in microseconds.
    pub sum_us: u64,
    /// How many are at most as long as each of `classes_us`.
    pub up_to: Vec<u64>,
}

impl From<&Durations> for ByClass {
    fn from(durations: &Durations) -> Self {
        Self { count: durations.count(), sum_us: durations.sum_ns() / 1000, up_to: durations.up_to(&CLASSES_NS) }
    }
}

/// How long requests took.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Times {
    /// Limits of classes, in microseconds.
    pub classes_us: Vec<u64>,
    /// From a read's arrival to its answer.
    pub request: ByClass,
    /// Of reads that waited for a fill: until it began.
    pub queued: ByClass,
    /// Of those: from then on.
    pub served: ByClass,
}

/// All that is known.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    /// In numbers.
    #[serde(flatten)]
    pub statistics: Statistics,
    /// How long requests took.
    pub times: Times,
    /// Each event loop.
    pub per_shard: Vec<ShardReport>,
    /// Each blob that is open or was.
    pub blobs: Vec<ObjectReport>,
}

/// Where it is seen. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Look {
    facts: Facts,
    since: Instant,
    engine: Observer,
    space: Option<space::Watch>,
    blobs: Option<Arc<Blobs>>,
    seeded_bytes: u64,
}

impl Look {
    /// At an engine that was just started for the front end of this name.
    #[must_use]
    pub fn new(front_end: &'static str, started: &Started, engine: Observer) -> Self {
        let kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
        let facts = Facts {
            version: env!("CARGO_PKG_VERSION"),
            kernel,
            front_end,
            engine: started.kind,
            shards: started.shards,
            buffers: started.pages,
            started_unix_s: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
            restores: 0,
        };
        Self { facts, since: Instant::now(), engine, space: None, blobs: None, seeded_bytes: 0 }
    }

    /// And at the space of its cache.
    #[must_use]
    pub fn with_space(self, space: Option<space::Watch>) -> Self {
        Self { space, ..self }
    }

    /// And at the blobs that images are mounted from.
    #[must_use]
    pub fn with_blobs(self, blobs: Option<Arc<Blobs>>) -> Self {
        Self { blobs, ..self }
    }

    /// It went on where an earlier daemon had ended, or not; and so many bytes were shared with the cache before it served.
    #[must_use]
    pub const fn after(mut self, restored: bool, seeded_bytes: u64) -> Self {
        self.facts.restores = restored as u64;
        self.seeded_bytes = seeded_bytes;
        self
    }

    /// The name of the front end.
    #[must_use]
    pub const fn front_end(&self) -> &'static str {
        self.facts.front_end
    }

    /// The numbers.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.with_counts(self.engine.snapshot())
    }

    /// The numbers, with those that the engine gave at its end.
    #[must_use]
    pub fn with_counts(&self, counts: Snapshot) -> Statistics {
        Statistics {
            facts: self.facts.clone(),
            log_level: log::level(),
            uptime_s: self.since.elapsed().as_secs(),
            counts,
            bytes_reflinked: self.seeded_bytes + self.blobs.as_ref().map_or(0, |blobs| blobs.shared_bytes()),
            space: self.space.as_ref().map(space::Watch::statistics),
        }
    }

    /// All of it.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut blobs = self.engine.objects();
        if let Some(served) = &self.blobs {
            served.report(&mut blobs);
        }
        let statistics = self.statistics();
        let Snapshot { latency, queued, served, .. } = &statistics.counts;
        let classes_us = CLASSES_NS.map(|limit_ns| limit_ns / 1000).to_vec();
        let times = Times { classes_us, request: latency.into(), queued: queued.into(), served: served.into() };
        Status { statistics, times, per_shard: self.engine.shards(), blobs }
    }
}
