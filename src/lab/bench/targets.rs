//! What the figures must be: the project's targets for the bench's own tree, disks of 50 us and Linux 6.12.
//!
//! They were set with the yardstick of the project's first days: the instruction clock, the times of the read alone, CPU
//! time a MiB by [`super::figures`]' constants. The tree has the numbers of the yardstick's, so they hold as they are.

use super::Scenario;
use super::figures::Figures;
use crate::lab::disk::CacheFs;

/// The rows whose figures have targets, and those that only serve to compare.
pub const INFILL: &str = "infill";
/// See [`INFILL`].
pub const SEEDED: &str = "seeded";
/// See [`INFILL`].
pub const ALL: &str = "all";

/// CPU time a MiB with one reader (seq1), and with eight (par8), in microseconds.
const CPU_US_PER_MIB: (f64, f64) = (85.0, 160.0);
/// What part1 may write, in 10^6 bytes.
const PART1_WRITTEN_MB: f64 = 15.0;
/// How much later than the kernel alone allows the first file after the mount may be there, in milliseconds.
const FIRST_FILE_MS: f64 = 2.0;
/// A seeded image's cold read against its present one.
const SEEDED_COLD_PER_PRESENT: f64 = 1.02;
/// The present read against the one after a daemon that filled everything at once.
const PRESENT_PER_ALL: f64 = 1.02;

/// The cold read, in milliseconds.
#[must_use]
pub const fn cold_ms(fs: CacheFs, scenario: Scenario) -> Option<f64> {
    Some(match (fs, scenario) {
        (CacheFs::Ext4, Scenario::Seq1) => 372.0,
        (CacheFs::Xfs, Scenario::Seq1) => 370.0,
        (_, Scenario::Par8) => 228.0,
        (CacheFs::Ext4, Scenario::Shuf1) => 380.0,
        (CacheFs::Xfs, Scenario::Shuf1) => 385.0,
        (_, Scenario::Part1) => 88.0,
        (CacheFs::Ext4, Scenario::Rand1) => 155.0,
        (CacheFs::Xfs, Scenario::Rand1) => 158.0,
        (CacheFs::Ext4, Scenario::Rand8) => 65.0,
        (CacheFs::Xfs, Scenario::Rand8) => 70.0,
        (_, Scenario::Many8) => return None,
    })
}

/// CPU time a MiB, in microseconds.
#[must_use]
pub const fn cpu_us_per_mib(scenario: Scenario) -> Option<f64> {
    match scenario {
        Scenario::Seq1 => Some(CPU_US_PER_MIB.0),
        Scenario::Par8 => Some(CPU_US_PER_MIB.1),
        _ => None,
    }
}

/// What was written, in 10^6 bytes.
#[must_use]
pub const fn written_mb(scenario: Scenario) -> Option<f64> {
    match scenario {
        Scenario::Part1 => Some(PART1_WRITTEN_MB),
        _ => None,
    }
}

/// Every target that is missed, in words.
#[must_use]
pub fn missed(figures: &[Figures]) -> Vec<String> {
    figures.iter().flat_map(|f| missed_by(f, figures)).collect()
}

fn missed_by(f: &Figures, others: &[Figures]) -> Vec<String> {
    let all = others.iter().find(|o| o.daemon == ALL && (o.cache_fs, o.scenario) == (f.cache_fs, f.scenario));
    // Eight readers are in each other's way at once.
    let alone = f.scenario.readers() == 1;
    let cold_per_present = f.cold_ms / f.present_ms;
    let limits = match &*f.daemon {
        INFILL => vec![
            ("cold read, ms", f.cold_ms, cold_ms(f.cache_fs, f.scenario)),
            ("CPU, us/MiB", f.cpu_us_per_mib, cpu_us_per_mib(f.scenario)),
            ("written, MB", f.written_mb, written_mb(f.scenario)),
            ("first file, ms after the kernel alone", f.first_file_ms - f.first_file_present_ms, alone.then_some(FIRST_FILE_MS)),
            ("present read, against the one after filling everything", f.present_ms, all.map(|all| all.present_ms * PRESENT_PER_ALL)),
        ],
        SEEDED => vec![
            ("cold read, against the present one", cold_per_present, Some(SEEDED_COLD_PER_PRESENT)),
            ("READs", f.reads as f64, Some(0.0)),
        ],
        _ => Vec::new(),
    };
    let over = limits.into_iter().filter_map(|(what, found, limit)| limit.filter(|limit| found > *limit).map(|limit| (what, found, limit)));
    over.map(|(what, found, limit)| {
        format!("{} {} on {}: {what}: {found:.2}, at most {limit:.2}", f.daemon, f.scenario.name(), f.cache_fs.name())
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::CellResult;
    use super::super::figures::tests::cell;
    use super::*;

    fn figures(name: &str, cold_ms: u64, present_ms: u64) -> Figures {
        let mut result = CellResult::default();
        (result.cold.phase.wall_ns, result.present.phase.wall_ns) = (cold_ms * 1_000_000, present_ms * 1_000_000);
        Figures::of(&cell(name), &Ok(result)).expect("figures")
    }

    #[test]
    fn a_figure_above_its_limit_is_named_and_one_at_it_is_not() {
        assert_eq!(missed(&[figures(INFILL, 370, 300)]), Vec::<String>::new());
        let missed_ones = missed(&[figures(INFILL, 371, 300), figures("naive", 900, 300)]);
        assert_eq!(missed_ones, ["infill seq1 on xfs: cold read, ms: 371.00, at most 370.00"]);
    }

    #[test]
    fn the_seeded_row_and_what_is_left_behind_have_limits_too() {
        assert_eq!(missed(&[figures(SEEDED, 102, 100)]), Vec::<String>::new());
        assert_eq!(missed(&[figures(SEEDED, 103, 100)]).len(), 1);
        let slow = missed(&[figures(INFILL, 100, 320), figures(ALL, 400, 300)]);
        assert!(slow[0].contains("after filling everything"), "{slow:?}");
    }
}
