//! Tables of figures, in Markdown whose columns line up, so that they can also be read as they are.

use std::fmt::Write;

use super::figures::Figures;
use super::{Scenario, targets};
use crate::lab::disk::CacheFs;

const MIB: f64 = (1 << 20) as f64;
/// In a table: it was not measured.
const NONE: &str = "-";

/// For each file system: cold times beside the targets, what others took in comparison, what it cost, and rates.
#[must_use]
pub fn tables(figures: &[Figures], with_targets: bool) -> String {
    let mut text = String::new();
    for fs in [CacheFs::Ext4, CacheFs::Xfs] {
        let of_fs = Selection(figures.iter().filter(|f| f.cache_fs == fs).collect());
        if of_fs.0.is_empty() {
            continue;
        }
        section(&mut text, fs, "cold read in ms (present); part1 with the MB written", of_fs.times(with_targets.then_some(fs)));
        if of_fs.daemons().len() > 1 {
            let first = of_fs.daemons()[0];
            section(&mut text, fs, &format!("cold read as a multiple of that of {first} (spread)"), of_fs.ratios());
        }
        section(&mut text, fs, "what it took", of_fs.costs());
        section(&mut text, fs, "rates; instructions are those of the daemon, in kernel and program", of_fs.rates());
    }
    text + &contrasts(figures)
}

/// One hot object beside eight, and one file system beside the other, where all of that was measured.
fn contrasts(figures: &[Figures]) -> String {
    let all = Selection(figures.iter().collect());
    let cell =
        |daemon: &str, scenario, fs| -> Vec<&Figures> { all.runs(daemon, scenario).into_iter().filter(|f| f.cache_fs == fs).collect() };
    let (hot, many, ext4, xfs) = (Scenario::Rand8, Scenario::Many8, CacheFs::Ext4, CacheFs::Xfs);
    let columns = [
        ("ext4: many8/rand8", (many, ext4), (hot, ext4)),
        ("XFS: many8/rand8", (many, xfs), (hot, xfs)),
        ("rand8: XFS/ext4", (hot, xfs), (hot, ext4)),
        ("many8: XFS/ext4", (many, xfs), (many, ext4)),
    ];
    let row = |daemon: &str| -> Vec<String> {
        let ratio = |((s, fs), (of_s, of_fs))| ratio(&cell(daemon, s, fs), &cell(daemon, of_s, of_fs));
        [daemon.to_owned()].into_iter().chain(columns.iter().map(|(_, cell, of)| ratio((*cell, *of)))).collect()
    };
    let rows: Vec<Vec<String>> = all.daemons().into_iter().map(row).collect();
    if !columns.iter().enumerate().any(|(n, _)| rows.iter().any(|row| row[n + 1] != NONE)) {
        return String::new();
    }
    let mut text = String::from("\nCold reads as multiples of each other (spread)\n\n");
    table(&mut text, &([words(&["daemon"]), columns.iter().map(|(name, ..)| (*name).to_owned()).collect()].concat(), rows));
    text
}

/// The fastest run of a cell as a multiple of the fastest of another one, since what else happens on a machine only adds
/// time; and the least and greatest among runs of the same number, which were taken near each other.
fn ratio(runs: &[&Figures], of: &[&Figures]) -> String {
    let least = |runs: &[&Figures]| runs.iter().map(|f| f.cold_ms).min_by(f64::total_cmp);
    let (Some(fastest), Some(fastest_of)) = (least(runs), least(of)) else { return NONE.to_owned() };
    let pair = |f: &&Figures| Some(f.cold_ms / of.iter().find(|other| other.run == f.run)?.cold_ms);
    let mut ratios: Vec<f64> = runs.iter().filter_map(pair).collect();
    ratios.sort_by(f64::total_cmp);
    let ratio = fastest / fastest_of;
    match ratios[..] {
        [first, .., last] => format!("{ratio:.2} ({first:.2}-{last:.2})"),
        _ => format!("{ratio:.2}"),
    }
}

/// For each file system and scenario, the stages of a read, per READ and per MiB.
#[must_use]
pub fn stage_tables(figures: &[Figures]) -> String {
    let mut text = String::new();
    for f in figures {
        let Some(stages) = &f.raw.stages else { continue };
        let (reads, mib) = (f.raw.cold.phase.reads as f64, f.written_mb * 1e6 / MIB);
        let cold = stages.cold_ns.iter().map(|(stage, ns)| (stage, *ns as f64 - stages.present_ns.get(stage).map_or(0.0, |ns| *ns as f64)));
        let each = |ns: f64, of: f64| if of > 0.0 { format!("{:.1}", ns / 1e3 / of) } else { "-".into() };
        let rows = cold.map(|(stage, ns)| vec![stage.clone(), format!("{:.2}", ns / 1e6), each(ns, reads), each(ns, mib)]).collect();
        let took = [stages.read_p50_ns, stages.read_p99_ns, stages.read_p999_ns].map(|ns| format!("{:.0}", ns as f64 / 1e3)).join("/");
        let title = format!(
            "{} {}, cold less present, traced: {reads} READs, {mib:.1} MiB written, a READ took {took} us (p50/p99/p999), {} system calls a READ",
            f.daemon,
            f.scenario.name(),
            each(stages.system_calls as f64 * 1e3, reads)
        );
        section(&mut text, f.cache_fs, &title, (words(&["stage", "ms", "us a READ", "us a MiB"]), rows));
    }
    text
}

/// Headings and rows.
type Table = (Vec<String>, Vec<Vec<String>>);

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// Figures of one file system.
struct Selection<'a>(Vec<&'a Figures>);

impl<'a> Selection<'a> {
    fn scenarios(&self) -> Vec<Scenario> {
        Scenario::ALL.into_iter().filter(|s| self.0.iter().any(|f| f.scenario == *s)).collect()
    }

    fn daemons(&self) -> Vec<&'a str> {
        let mut daemons: Vec<&str> = Vec::new();
        for f in &self.0 {
            if !daemons.contains(&&*f.daemon) {
                daemons.push(&f.daemon);
            }
        }
        daemons
    }

    /// All runs of a cell, by their numbers.
    fn runs(&self, daemon: &str, scenario: Scenario) -> Vec<&'a Figures> {
        let mut runs: Vec<&Figures> = self.0.iter().copied().filter(|f| f.daemon == daemon && f.scenario == scenario).collect();
        runs.sort_by_key(|f| f.run);
        runs
    }

    /// The run in the middle of those of a cell, by its cold read.
    fn middle(&self, daemon: &str, scenario: Scenario) -> Option<&'a Figures> {
        let mut runs = self.runs(daemon, scenario);
        runs.sort_by(|a, b| a.cold_ms.total_cmp(&b.cold_ms));
        runs.get(runs.len() / 2).copied()
    }

    fn times(&self, targets_of: Option<CacheFs>) -> Table {
        let scenarios = self.scenarios();
        let cpu: Vec<Scenario> = scenarios.iter().copied().filter(|s| targets::cpu_us_per_mib(*s).is_some()).collect();
        let head = ["daemon".to_owned()].into_iter();
        let head = head.chain(scenarios.iter().map(|s| s.name().to_owned())).chain(cpu.iter().map(|s| format!("CPU us/MiB {}", s.name())));
        let mut rows = Vec::new();
        for daemon in self.daemons() {
            let time = |s: &Scenario| self.middle(daemon, *s).map_or_else(|| "-".to_owned(), time);
            let fill = |f: &Figures| if f.reads > 0 { format!("{:.0}", f.cpu_us_per_mib) } else { "-".to_owned() };
            let cost = |s: &Scenario| self.middle(daemon, *s).map_or_else(|| "-".to_owned(), fill);
            rows.push([daemon.to_owned()].into_iter().chain(scenarios.iter().map(time)).chain(cpu.iter().map(cost)).collect());
        }
        if let Some(fs) = targets_of {
            let show = |limit: Option<f64>, unit: &str| limit.map_or_else(String::new, |limit| format!("{limit:.0}{unit}"));
            let time = |s: &Scenario| {
                let written = targets::written_mb(*s).map_or_else(String::new, |mb| format!(" {mb:.0} MB"));
                show(targets::cold_ms(fs, *s), &written)
            };
            let cost = |s: &Scenario| show(targets::cpu_us_per_mib(*s), "");
            rows.push(["target".to_owned()].into_iter().chain(scenarios.iter().map(time)).chain(cpu.iter().map(cost)).collect());
        }
        (head.collect(), rows)
    }

    /// Each run against the first daemon's run of the same number, which was taken beside it.
    fn ratios(&self) -> Table {
        let scenarios = self.scenarios();
        let daemons = self.daemons();
        let head = ["daemon".to_owned()].into_iter().chain(scenarios.iter().map(|s| s.name().to_owned()));
        let ratio = |daemon: &str, s: Scenario| ratio(&self.runs(daemon, s), &self.runs(daemons[0], s));
        let row = |daemon: &&str| [(*daemon).to_owned()].into_iter().chain(scenarios.iter().map(|s| ratio(daemon, *s))).collect();
        (head.collect(), daemons[1..].iter().map(row).collect())
    }

    fn costs(&self) -> Table {
        let head = [
            "scenario",
            "daemon",
            "CPU us/MiB",
            "recalibrated",
            "with disks",
            "daemon CPU ms",
            "READs",
            "cache writes",
            "MB written",
            "mount ms",
            "first file ms",
            "of it the kernel",
            "file p50/p99/max us",
            "RSS MiB",
            "threads",
            "fds",
        ];
        let row = |f: &Figures| {
            vec![
                format!("{:.0}", f.cpu_us_per_mib),
                format!("{:.0}", f.cpu_recalibrated_us_per_mib),
                format!("{:.0}", f.cpu_gross_us_per_mib),
                format!("{:.1}", f.daemon_cpu_ms),
                f.reads.to_string(),
                f.cache_writes.to_string(),
                format!("{:.1}", f.written_mb),
                format!("{:.1}", f.mount_ms),
                format!("{:.2}", f.first_file_ms),
                format!("{:.2}", f.first_file_present_ms),
                format!("{:.0}/{:.0}/{:.0}", f.p50_us, f.p99_us, f.max_us),
                format!("{:.1}", f.rss_mib),
                f.threads.to_string(),
                f.fds.to_string(),
            ]
        };
        (words(&head), self.by_scenario(&row))
    }

    fn rates(&self) -> Table {
        let head = ["scenario", "daemon", "READs/s a core", "instructions a READ", "CPU s a GiB filled", "READs a GiB read", "waste %"];
        let row = |f: &Figures| {
            vec![
                format!("{:.0}", f.reads_per_core_s),
                format!("{:.0}", f.instructions_per_read),
                format!("{:.2}", f.daemon_cpu_s_per_gib),
                format!("{:.0}", f.reads_per_gib),
                format!("{:.0}", f.waste_percent),
            ]
        };
        (words(&head), self.by_scenario(&row))
    }

    /// One row for each scenario and daemon that there is.
    fn by_scenario(&self, row: &dyn Fn(&Figures) -> Vec<String>) -> Vec<Vec<String>> {
        let cells = self.scenarios().into_iter().flat_map(|s| self.daemons().into_iter().map(move |daemon| (daemon, s)));
        let found = cells.filter_map(|(daemon, s)| self.middle(daemon, s));
        found.map(|f| [f.scenario.name().to_owned(), f.daemon.clone()].into_iter().chain(row(f)).collect()).collect()
    }
}

fn time(f: &Figures) -> String {
    let written = targets::written_mb(f.scenario).filter(|_| f.reads > 0);
    let written = written.map_or_else(String::new, |_| format!(" {:.1} MB", f.written_mb));
    format!("{:.1} ({:.1}){written}", f.cold_ms, f.present_ms)
}

fn section(text: &mut String, fs: CacheFs, title: &str, cells: Table) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "\nCache on {}: {title}\n", fs.name());
    table(text, &cells);
}

/// Adds a table.
pub(super) fn table(text: &mut String, (head, rows): &Table) {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).chain([head[column].len()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let rule: Vec<String> = widths.iter().map(|width| format!("{}:", "-".repeat(width.saturating_sub(1)))).collect();
    for cells in [head, &rule].into_iter().chain(rows) {
        let _ = write!(text, "|");
        for (cell, width) in cells.iter().zip(&widths) {
            // Writing to a string does not fail.
            let _ = write!(text, " {cell:>width$} |");
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::super::CellResult;
    use super::super::figures::tests::cell;
    use super::*;

    fn figures(name: &str, run: usize, cold_ms: u64) -> Figures {
        let mut result = CellResult::default();
        result.cold.phase.wall_ns = cold_ms * 1_000_000;
        let mut cell = cell(name);
        cell.run = run;
        Figures::of(&cell, &Ok(result)).expect("figures")
    }

    #[test]
    fn runs_are_compared_by_the_fastest_and_shown_by_the_middle_one() {
        let all = [figures("infill", 0, 100), figures("naive", 0, 200), figures("infill", 1, 200), figures("naive", 1, 600)];
        let text = tables(&all, true);
        assert!(text.contains("| 2.00 (2.00-3.00) |"), "{text}");
        assert!(text.contains("200.0 (0.0)") && text.contains("target"), "{text}");
        assert!(!tables(&all, false).contains("target") && !text.contains("multiples of each other"));
    }

    #[test]
    fn one_object_stands_beside_eight() {
        let of = |scenario, cold_ms| Figures { scenario, ..figures("infill", 0, cold_ms) };
        let text = tables(&[of(Scenario::Rand8, 300), of(Scenario::Many8, 150)], false);
        let fs = if figures("infill", 0, 1).cache_fs == CacheFs::Ext4 { "| infill |              0.50 |" } else { "0.50" };
        assert!(text.contains("multiples of each other") && text.contains(fs), "{text}");
    }
}
