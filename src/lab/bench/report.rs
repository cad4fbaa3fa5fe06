//! Figures of the cells, and their tables.

use std::fmt::Write;

use serde::Serialize;

use super::{Cell, CellResult, Phase, Reading, Scenario};
use crate::lab::Result;
use crate::lab::disk::CacheFs;

const MIB: f64 = (1 << 20) as f64;

/// The figures of one cell.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Who served.
    pub daemon: String,
    /// What was read.
    pub scenario: Scenario,
    /// File system under the cache.
    pub cache_fs: CacheFs,
    /// The first read, nothing in the cache; without the mount.
    pub cold_ms: f64,
    /// The read after a second mount, everything in the cache: the limit.
    pub present_ms: f64,
    /// The first mount.
    pub mount_ms: f64,
    /// From the start of the first mount to the first whole file (or block).
    pub first_file_ms: f64,
    /// READs of the first mount and read.
    pub reads: u64,
    /// Write requests to the cache's disk, those of its journal included.
    pub cache_writes: u64,
    /// What was written to the cache's disk, in 10^6 bytes.
    pub written_mb: f64,
    /// The same, as a multiple of what the readers read.
    pub written_per_wanted: f64,
    /// CPU time of everything in the cold read beyond that of the present read, for each MiB written to the cache,
    /// without what the same bytes cost as plain direct requests to the bare disks. Below 0: cheaper than those, for
    /// instance because memory is pinned once. Says nothing where the present read is slow because small fills left
    /// the cache in pieces.
    pub cpu_us_per_mib: f64,
    /// The same with the disks.
    pub cpu_gross_us_per_mib: f64,
    /// The daemon's own part of the cold read's CPU time.
    pub daemon_cpu_ms: f64,
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

/// CPU time of a phase without what the modelled disks copied.
fn busy_ns(phase: &Phase, cell: &CellResult) -> f64 {
    let read = (phase.cache.read_bytes + phase.store.read_bytes) as f64 * cell.copy_cost.read_ns;
    let written = phase.cache.written_bytes as f64 * cell.copy_cost.write_ns;
    phase.cpu_ns as f64 - read - written
}

/// Microseconds a MiB.
fn per_mib(time_ns: f64, bytes: f64) -> f64 {
    if bytes > 0.0 { time_ns / 1e3 / (bytes / MIB) } else { 0.0 }
}

impl Figures {
    /// Makes figures of what a cell measured.
    ///
    /// # Errors
    /// The cell failed, or something was read wrong.
    pub fn of(cell: &Cell, result: &Result<CellResult>) -> std::result::Result<Self, Failed> {
        let failed = |error| Failed { daemon: cell.daemon.clone(), scenario: cell.scenario, cache_fs: cell.cache_fs, error };
        let raw = result.as_ref().map_err(|e| failed(e.to_string()))?;
        let wrong: Vec<_> = raw.cold.wrong.iter().chain(&raw.present.wrong).cloned().collect();
        if !wrong.is_empty() {
            return Err(failed(format!("read wrong: {}", wrong.join("; "))));
        }
        let Reading { phase: cold, bytes, first_ns, p50_ns, p99_ns, max_ns, .. } = &raw.cold;
        let (mount, present) = (&raw.mount_cold, &raw.present.phase);
        let written = (cold.cache.written_bytes + mount.cache.written_bytes) as f64;
        let extra_ns = busy_ns(cold, raw) - busy_ns(present, raw);
        let ms = |ns: u64| ns as f64 / 1e6;
        let us = |ns: u64| ns as f64 / 1e3;
        Ok(Self {
            daemon: cell.daemon.clone(),
            scenario: cell.scenario,
            cache_fs: cell.cache_fs,
            cold_ms: ms(cold.wall_ns),
            present_ms: ms(present.wall_ns),
            mount_ms: ms(mount.wall_ns),
            first_file_ms: ms(mount.wall_ns + first_ns),
            reads: mount.reads + cold.reads,
            cache_writes: mount.cache.writes + cold.cache.writes,
            written_mb: written / 1e6,
            written_per_wanted: written / (*bytes).max(1) as f64,
            cpu_us_per_mib: per_mib(extra_ns, written),
            cpu_gross_us_per_mib: per_mib(cold.cpu_ns as f64 - present.cpu_ns as f64, written),
            daemon_cpu_ms: ms(cold.daemon_cpu_ns),
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

/// All figures as Markdown: for each file system one table of cold times, and one of everything else.
#[must_use]
pub fn tables(figures: &[Figures]) -> String {
    let mut text = String::new();
    for fs in [CacheFs::Ext4, CacheFs::Xfs] {
        let of_fs: Vec<&Figures> = figures.iter().filter(|f| f.cache_fs == fs).collect();
        if !of_fs.is_empty() {
            // Writing to a string does not fail.
            let _ = writeln!(text, "\nCache on {}: cold read in ms (present)\n", fs.name());
            times(&mut text, &of_fs);
            let _ = writeln!(text, "\nCache on {}: what it took\n", fs.name());
            costs(&mut text, &of_fs);
        }
    }
    text
}

fn times(text: &mut String, figures: &[&Figures]) {
    let scenarios: Vec<Scenario> = Scenario::ALL.into_iter().filter(|s| figures.iter().any(|f| f.scenario == *s)).collect();
    let mut daemons: Vec<&str> = Vec::new();
    for f in figures {
        if !daemons.contains(&&*f.daemon) {
            daemons.push(&f.daemon);
        }
    }
    let cells = |daemon: &str, show: &dyn Fn(&Figures) -> String| -> Vec<String> {
        let find = |s: Scenario| figures.iter().find(|f| f.daemon == daemon && f.scenario == s);
        scenarios.iter().map(|s| find(*s).map_or_else(|| "-".to_owned(), |f| show(f))).collect()
    };
    let head: Vec<&str> = ["daemon"].into_iter().chain(scenarios.iter().map(|s| s.name())).collect();
    let rows = daemons.iter().map(|daemon| {
        let mut row = vec![(*daemon).to_owned()];
        row.extend(cells(daemon, &|f| format!("{:.1} ({:.1})", f.cold_ms, f.present_ms)));
        row
    });
    table(text, &head, rows.collect());
}

fn costs(text: &mut String, figures: &[&Figures]) {
    let head = [
        "scenario",
        "daemon",
        "CPU us/MiB",
        "with disks",
        "daemon CPU ms",
        "READs",
        "cache writes",
        "MB written",
        "written/wanted",
        "mount ms",
        "first file ms",
        "file p50/p99/max us",
        "RSS MiB",
        "threads",
        "fds",
    ];
    let rows = Scenario::ALL.into_iter().flat_map(|s| figures.iter().filter(move |f| f.scenario == s)).map(|f| {
        vec![
            f.scenario.name().to_owned(),
            f.daemon.clone(),
            format!("{:.0}", f.cpu_us_per_mib),
            format!("{:.0}", f.cpu_gross_us_per_mib),
            format!("{:.1}", f.daemon_cpu_ms),
            f.reads.to_string(),
            f.cache_writes.to_string(),
            format!("{:.1}", f.written_mb),
            format!("{:.2}", f.written_per_wanted),
            format!("{:.1}", f.mount_ms),
            format!("{:.1}", f.first_file_ms),
            format!("{:.0}/{:.0}/{:.0}", f.p50_us, f.p99_us, f.max_us),
            format!("{:.1}", f.rss_mib),
            f.threads.to_string(),
            f.fds.to_string(),
        ]
    });
    table(text, &head, rows.collect());
}

/// A Markdown table whose columns line up, so that it can also be read as it is.
fn table(text: &mut String, head: &[&str], rows: Vec<Vec<String>>) {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).chain([head[column].len()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut line = |cells: &[&str]| {
        let _ = write!(text, "|");
        for (cell, width) in cells.iter().zip(&widths) {
            let _ = write!(text, " {cell:>width$} |");
        }
        text.push('\n');
    };
    line(head);
    let rule: Vec<String> = widths.iter().map(|width| format!("{}:", "-".repeat(width.saturating_sub(1)))).collect();
    line(&rule.iter().map(String::as_str).collect::<Vec<_>>());
    for row in &rows {
        line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell() -> Cell {
        Cell {
            daemon: "x".into(),
            argv: Vec::new(),
            scenario: Scenario::Seq1,
            cache_fs: CacheFs::Xfs,
            disk_latency_ns: 0,
            warm_source: false,
        }
    }

    #[test]
    fn a_wrong_byte_fails_the_cell() {
        let mut result = CellResult::default();
        assert!(Figures::of(&cell(), &Ok(result.clone())).is_ok());
        result.present.wrong.push("a: wrong".into());
        let failed = Figures::of(&cell(), &Ok(result)).expect_err("wrong data");
        assert!(failed.error.contains("a: wrong"));
    }

    #[test]
    fn cpu_a_mib_is_what_filling_added_without_the_disks_copying() {
        let mut result = CellResult::default();
        result.copy_cost.write_ns = 1.0;
        result.cold.phase.cpu_ns = 5_000_000 + (1 << 20);
        result.cold.phase.cache.written_bytes = 1 << 20;
        result.present.phase.cpu_ns = 3_000_000;
        let figures = Figures::of(&cell(), &Ok(result)).expect("figures");
        assert!((figures.cpu_us_per_mib - 2000.0).abs() < 0.1, "{figures:?}");
        let text = tables(&[figures]);
        assert!(text.contains("Cache on xfs") && text.contains("seq1"), "{text}");
    }
}
