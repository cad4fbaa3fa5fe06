//! A bench whose job is done by this program inside a guest, which prints how far it is, and at last its figures.

use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::lab::disk::CacheFs;
use crate::lab::guest::GuestPlan;
use crate::lab::init::INIT_PROGRAM;
use crate::lab::progress::Progress;
use crate::lab::{LabError, Result, Trying, kernel, last_lines, qemu};

/// A line of the job's progress begins like this.
pub(super) const PROGRESS: &str = "so far: ";
/// Console lines that are shown of a guest without a result.
const TAIL_LINES: usize = 40;

/// What is done where.
pub(super) struct Inside<'a> {
    /// What the job is, for the eye.
    pub(super) step: &'a str,
    /// The kernel's series.
    pub(super) series: &'a str,
    /// File system under the cache.
    pub(super) cache_fs: CacheFs,
    /// See [`GuestPlan::store_disk`].
    pub(super) store_disk: &'a Path,
    /// Arguments of `infill bench`.
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
        let kernel = kernel::ensure(self.series)?;
        let accelerator = qemu::accelerator(&kernel.image)?;
        let infill = std::env::current_exe().trying(|| "cannot find this program")?;
        let argv = [INIT_PROGRAM, "bench"].iter().chain(self.argv).map(|&word| word.to_owned()).collect();
        let plan = GuestPlan {
            kernel: &kernel,
            infill: &infill,
            programs: &[],
            files: &[],
            cache_fs: self.cache_fs,
            store_disk: self.store_disk,
            argv,
            total_limit: self.total_limit,
        };
        let machine = plan.build(scratch)?;
        let step = format!("{} on Linux {} ({}), the cache on {}", self.step, kernel.version, accelerator.name(), self.cache_fs.name());
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
