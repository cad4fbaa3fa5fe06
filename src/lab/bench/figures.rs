//! Figures of the cells.

use serde::Serialize;

use super::{Cell, CellResult, Phase, Reading, Scenario};
use crate::lab::Result;
use crate::lab::disk::CacheFs;

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;
/// What the modelled disks cost in CPU time, as the yardstick has it: nanoseconds a byte read, and a byte written for the
/// first time. They were measured once, as direct requests to a bare null_blk disk, and are the same for every daemon.
const YARDSTICK_READ_NS: f64 = 0.545;
/// See [`YARDSTICK_READ_NS`].
const YARDSTICK_WRITE_NS: f64 = 0.690;

/// The figures of one cell.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Who served.
    pub daemon: String,
    /// What was read.
    pub scenario: Scenario,
    /// File system under the cache.
    pub cache_fs: CacheFs,
    /// Which of several equal cells.
    pub run: usize,
    /// The first read, nothing in the cache; without the mount.
    pub cold_ms: f64,
    /// The read after a second mount, everything in the cache: the limit.
    pub present_ms: f64,
    /// The first mount.
    pub mount_ms: f64,
    /// The second mount.
    pub mount_present_ms: f64,
    /// From the end of the first mount to the first whole file (or block).
    pub first_file_ms: f64,
    /// The same after the second mount: what the kernel alone allows.
    pub first_file_present_ms: f64,
    /// READs of the first mount and read.
    pub reads: u64,
    /// Write requests to the cache's disk, those of its journal included.
    pub cache_writes: u64,
    /// What was written to the cache's disk, in 10^6 bytes.
    pub written_mb: f64,
    /// The same, as a multiple of what the readers read.
    pub written_per_wanted: f64,
    /// CPU time of everything in the cold read beyond that of the present read, for each MiB written to the cache,
    /// less what the modelled disks cost by the yardstick's constants. What the targets mean. Says nothing where the
    /// present read is slow because small fills left the cache in pieces.
    pub cpu_us_per_mib: f64,
    /// The same, less what the same bytes cost as plain direct requests to the bare disks, measured in this very cell.
    pub cpu_recalibrated_us_per_mib: f64,
    /// The same with the disks.
    pub cpu_gross_us_per_mib: f64,
    /// The daemon's own part of the cold read's CPU time.
    pub daemon_cpu_ms: f64,
    /// The daemon's CPU time in seconds for each GiB written to the cache.
    pub daemon_cpu_s_per_gib: f64,
    /// READs for each second of the daemon's CPU time: what one core could answer.
    pub reads_per_core_s: f64,
    /// Instructions of the daemon for each READ, in the program and in the kernel; a nanosecond is one.
    pub instructions_per_read: f64,
    /// READs for each GiB that the readers read.
    pub reads_per_gib: f64,
    /// Share of what was written that nobody read, in percent; the journal is part of it.
    pub waste_percent: f64,
    /// Time of one file (or block) from open to close: half took no longer.
    pub p50_us: f64,
    /// 99 of 100 took no longer.
    pub p99_us: f64,
    /// None took longer.
    pub max_us: f64,
    /// Descriptors of the daemon after the cold read.
    pub fds: usize,
    /// Its threads.
    pub threads: u64,
    /// Its memory at most.
    pub rss_mib: f64,
    /// READs of the second mount and read; all of them would be waste.
    pub reads_present: u64,
    /// What was measured, as it was.
    pub raw: CellResult,
}

/// A cell that gave no figures.
#[derive(Clone, Debug, Serialize)]
pub struct Failed {
    /// Who served.
    pub daemon: String,
    /// What was read.
    pub scenario: Scenario,
    /// File system under the cache.
    pub cache_fs: CacheFs,
    /// Why.
    pub error: String,
}

/// CPU time of a phase without what the modelled disks copied, at a price in nanoseconds a byte.
fn busy_ns(phase: &Phase, read_ns: f64, write_ns: f64) -> f64 {
    let read = (phase.cache.read_bytes + phase.store.read_bytes) as f64 * read_ns;
    phase.cpu_ns as f64 - read - phase.cache.written_bytes as f64 * write_ns
}

/// A quotient, and 0 where there is nothing to divide by.
fn per(amount: f64, of: f64) -> f64 {
    if of > 0.0 { amount / of } else { 0.0 }
}

impl Figures {
    /// Makes figures of what a cell measured.
    ///
    /// # Errors
    /// The cell failed, or something was read wrong.
    pub fn of(cell: &Cell, result: &Result<CellResult>) -> std::result::Result<Self, Failed> {
        let failed = |error| Failed { daemon: cell.service.name.clone(), scenario: cell.scenario, cache_fs: cell.cache_fs, error };
        let raw = result.as_ref().map_err(|e| failed(e.to_string()))?;
        let wrong: Vec<_> = raw.cold.wrong.iter().chain(&raw.present.wrong).cloned().collect();
        if !wrong.is_empty() {
            return Err(failed(format!("read wrong: {}", wrong.join("; "))));
        }
        let Reading { phase: cold, bytes, first_ns, p50_ns, p99_ns, max_ns, .. } = &raw.cold;
        let (mount, present) = (&raw.mount_cold, &raw.present.phase);
        let written = (cold.cache.written_bytes + mount.cache.written_bytes) as f64;
        let wanted = *bytes as f64;
        let daemon_ns = cold.daemon_cpu_ns as f64;
        let extra_us_per_mib = |read_ns, write_ns| {
            let extra_ns = busy_ns(cold, read_ns, write_ns) - busy_ns(present, read_ns, write_ns);
            per(extra_ns / 1e3, written / MIB)
        };
        let ms = |ns: u64| ns as f64 / 1e6;
        let us = |ns: u64| ns as f64 / 1e3;
        Ok(Self {
            daemon: cell.service.name.clone(),
            scenario: cell.scenario,
            cache_fs: cell.cache_fs,
            run: cell.run,
            cold_ms: ms(cold.wall_ns),
            present_ms: ms(present.wall_ns),
            mount_ms: ms(mount.wall_ns),
            mount_present_ms: ms(raw.mount_present.wall_ns),
            first_file_ms: ms(*first_ns),
            first_file_present_ms: ms(raw.present.first_ns),
            reads: mount.reads + cold.reads,
            cache_writes: mount.cache.writes + cold.cache.writes,
            written_mb: written / 1e6,
            written_per_wanted: per(written, wanted),
            cpu_us_per_mib: extra_us_per_mib(YARDSTICK_READ_NS, YARDSTICK_WRITE_NS),
            cpu_recalibrated_us_per_mib: extra_us_per_mib(raw.copy_cost.read_ns, raw.copy_cost.write_ns),
            cpu_gross_us_per_mib: extra_us_per_mib(0.0, 0.0),
            daemon_cpu_ms: daemon_ns / 1e6,
            daemon_cpu_s_per_gib: per(daemon_ns / 1e9, written / GIB),
            reads_per_core_s: per(cold.reads as f64, daemon_ns / 1e9),
            instructions_per_read: per(daemon_ns, cold.reads as f64),
            reads_per_gib: per(cold.reads as f64, wanted / GIB),
            waste_percent: per(written - wanted.min(written), written) * 100.0,
            p50_us: us(*p50_ns),
            p99_us: us(*p99_ns),
            max_us: us(*max_ns),
            fds: raw.held.fds,
            threads: raw.held.threads,
            rss_mib: raw.held.rss_kib as f64 / 1024.0,
            reads_present: raw.mount_present.reads + raw.present.phase.reads,
            raw: raw.clone(),
        })
    }

    /// One line for whoever watches.
    #[must_use]
    pub fn line(&self) -> String {
        format!("cold {:.1} ms, present {:.1} ms, {} READs, {:.1} MB written", self.cold_ms, self.present_ms, self.reads, self.written_mb)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Service;
    use super::*;

    /// A cell of nobody in particular.
    pub(in super::super) fn cell(name: &str) -> Cell {
        Cell {
            service: Service::own(name, vec!["x".into()]),
            scenario: Scenario::Seq1,
            cache_fs: CacheFs::Xfs,
            disk_latency_ns: 0,
            warm_source: false,
            cpus: 1,
            run: 0,
            traced: false,
        }
    }

    #[test]
    fn a_wrong_byte_fails_the_cell() {
        let mut result = CellResult::default();
        assert!(Figures::of(&cell("x"), &Ok(result.clone())).is_ok());
        result.present.wrong.push("a: wrong".into());
        let failed = Figures::of(&cell("x"), &Ok(result)).expect_err("wrong data");
        assert!(failed.error.contains("a: wrong"));
    }

    #[test]
    fn cpu_a_mib_is_what_filling_added_without_the_disks_copying() {
        let mut result = CellResult::default();
        result.copy_cost.write_ns = 1.0;
        result.cold.phase.cpu_ns = 5_000_000 + (1 << 20);
        result.cold.phase.cache.written_bytes = 1 << 20;
        result.present.phase.cpu_ns = 3_000_000;
        let figures = Figures::of(&cell("x"), &Ok(result)).expect("figures");
        assert!((figures.cpu_recalibrated_us_per_mib - 2000.0).abs() < 0.1, "{figures:?}");
        // Of the 1048.6 us of copying, 723.5 are the disk's by the yardstick's price.
        assert!((figures.cpu_us_per_mib - 2325.1).abs() < 0.1, "{figures:?}");
        assert!((figures.cpu_gross_us_per_mib - 3048.6).abs() < 0.1, "{figures:?}");
    }
}
