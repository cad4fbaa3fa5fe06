//! A bench whose job is done by this program inside a guest, which prints how far it is, and at last its figures.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cli::{Failure, print_json};
use crate::lab::bench::Findings;
use crate::lab::disk::CacheFs;
use crate::lab::guest::GuestPlan;
use crate::lab::init::INIT_PROGRAM;
use crate::lab::progress::Progress;
use crate::lab::{LabError, Result, Trying, kernel, last_lines, qemu};
use crate::ops::exit;

/// A line of the job's progress begins like this.
pub(super) const PROGRESS: &str = "so far: ";
/// Console lines that are shown of a guest without a result.
const TAIL_LINES: usize = 40;

/// Flags that these benches share.
#[derive(Debug, Args)]
pub(super) struct InsideArgs {
    /// End with the figures as one JSON object
    #[arg(long)]
    json: bool,
    /// The guest's kernel
    #[arg(long, default_value = kernel::SERIES[0], value_parser = kernel::SERIES)]
    kernel: String,
    /// File system under the cache
    #[arg(long, value_enum, default_value_t = CacheFs::Ext4)]
    fs: CacheFs,
    /// Decides what is left to chance
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    /// Only the job itself, inside a guest
    #[arg(long, hide = true)]
    here: bool,
}

/// What is shown of such a bench as JSON: what was found, and on which file system.
#[derive(Serialize)]
struct Shown<'a, T> {
    #[serde(flatten)]
    findings: &'a T,
    cache_fs: &'a str,
}

impl InsideArgs {
    /// Does `job` if this is the guest; else boots one by `boot` for it and shows what was found. `bad` is said of
    /// figures that are not good.
    ///
    /// # Errors
    /// Something that is needed could not be had, or the figures are not good.
    pub(super) fn run<T: Findings>(
        &self,
        job: impl FnOnce() -> Result<T>,
        boot: impl FnOnce() -> Result<T>,
        bad: &str,
    ) -> std::result::Result<(), Failure> {
        let failed = |error: LabError| Failure::new(exit::FAILED, error);
        if self.here {
            return print_json(&job().map_err(failed)?);
        }
        let findings = boot().map_err(failed)?;
        print!("\n{}", findings.table());
        if self.json {
            print_json(&Shown { findings: &findings, cache_fs: self.fs.name() })?;
        }
        if findings.is_good() { Ok(()) } else { Err(Failure::new(exit::FAILED, bad)) }
    }
}

/// What is done where.
pub(super) struct Inside<'a> {
    /// What the job is, for the eye.
    pub(super) step: &'a str,
    /// Kernel and file system.
    pub(super) args: &'a InsideArgs,
    /// See [`GuestPlan::store_disk`].
    pub(super) store_disk: &'a Path,
    /// Arguments of `infill bench`, but for those that all have.
    pub(super) argv: &'a [&'a str],
    /// The line with the figures, a JSON object, begins like this.
    pub(super) figures_start: &'a str,
    /// How long the whole boot may take.
    pub(super) total_limit: Duration,
}

impl Inside<'_> {
    /// Boots, and gives the figures.
    ///
    /// # Errors
    /// The guest could not be made or ended without figures.
    pub(super) fn run<T: DeserializeOwned>(&self, scratch: &Path) -> Result<T> {
        let kernel = kernel::ensure(&self.args.kernel)?;
        let accelerator = qemu::accelerator(&kernel.image)?;
        let infill = std::env::current_exe().trying(|| "cannot find this program")?;
        let seed = format!("--seed={}", self.args.seed);
        let argv = [INIT_PROGRAM, "bench"].iter().chain(self.argv).chain(&["--here", &seed]).map(|&word| word.to_owned()).collect();
        let plan = GuestPlan {
            kernel: &kernel,
            infill: &infill,
            programs: &[],
            files: &[],
            cache_fs: self.args.fs,
            store_disk: self.store_disk,
            argv,
            total_limit: self.total_limit,
        };
        let machine = plan.build(scratch)?;
        let step = format!("{} on Linux {} ({}), the cache on {}", self.step, kernel.version, accelerator.name(), self.args.fs.name());
        let mut progress = Progress::begin(step);
        let (mut lines, mut figures, mut works) = (Vec::new(), None, false);
        let ending = machine.run(accelerator, &mut |line| {
            if let Some(far) = line.strip_prefix(PROGRESS) {
                works = true;
                progress.update(|| far.to_owned());
            } else if line.starts_with(self.figures_start) {
                figures = serde_json::from_str(line).ok();
            }
            lines.push(line.to_owned());
            works
        })?;
        let figures = figures.ok_or_else(|| {
            let tail = last_lines(&lines.join("\n"), TAIL_LINES);
            LabError::Failed(format!("the guest gave no result ({ending}); its console ended with:\n{tail}"))
        })?;
        progress.finish("done");
        Ok(figures)
    }
}
