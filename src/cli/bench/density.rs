//! `infill bench density`: far more mounted objects than the daemon may have descriptors.

use std::time::Duration;

use clap::Args;

use super::inside::{Inside, PROGRESS};
use crate::cli::Failure;
use crate::lab::bench::density::{self, Figures};
use crate::lab::disk::{self, CacheFs};
use crate::lab::{LabError, Result, Scratch, kernel, packages};
use crate::ops::exit;

/// How long the guest may take for itself, and for a thousand objects.
const GUEST_LIMIT: Duration = Duration::from_secs(600);
const THOUSAND_LIMIT: Duration = Duration::from_secs(240);
/// The guest's second disk; nothing is on it.
const DISK_BYTES: u64 = 16 << 20;
/// The result in the guest begins like this.
const FIGURES_START: &str = "{\"objects\"";

/// Flags of `infill bench density`.
#[derive(Debug, Args)]
pub struct DensityArgs {
    /// End with the figures as one JSON object
    #[arg(long)]
    json: bool,
    /// The guest's kernel
    #[arg(long, default_value = kernel::SERIES[0], value_parser = kernel::SERIES)]
    kernel: String,
    /// File system under the cache
    #[arg(long, value_enum, default_value_t = CacheFs::Ext4)]
    fs: CacheFs,
    /// Blobs that are mounted and read; the guest's memory and disk are made for some ten thousands
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=30_000))]
    objects: u32,
    /// Descriptors that they may take
    #[arg(long, default_value_t = 512)]
    fd_budget: u64,
    /// Says in which order is read
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the job itself, inside a guest
    #[arg(long, hide = true)]
    here: bool,
}

/// Measures.
///
/// # Errors
/// Something that is needed could not be had, a read failed, or the budget was not held.
pub(super) fn run(args: &DensityArgs) -> std::result::Result<(), Failure> {
    let failed = |error: LabError| Failure::new(exit::FAILED, error);
    if args.here {
        return here(args).map_err(failed);
    }
    let figures = in_guest(args).map_err(failed)?;
    print!("\n{}", figures.table());
    if args.json {
        let text = serde_json::to_string(&figures).map_err(|error| Failure::new(exit::FAILED, error))?;
        println!("{text}");
    }
    if figures.is_good() {
        return Ok(());
    }
    Err(Failure::new(exit::FAILED, "a read failed or was wrong, or the budget was not held; see above"))
}

/// Inside the guest.
fn here(args: &DensityArgs) -> Result<()> {
    let crowd = density::in_guest(args.objects as usize, args.fd_budget, args.seed)?;
    let figures = crowd.run(&|far| println!("{PROGRESS}{far}"))?;
    println!("{}", serde_json::to_string(&figures).map_err(|error| LabError::Failed(error.to_string()))?);
    Ok(())
}

fn in_guest(args: &DensityArgs) -> Result<Figures> {
    packages::ensure(packages::GUEST_TOOLS)?;
    let scratch = Scratch::make("density")?;
    let store_disk = scratch.path().join("store.img");
    disk::ext4(&store_disk, DISK_BYTES, None)?;
    let (objects, fd_budget, seed) = (args.objects.to_string(), args.fd_budget.to_string(), args.seed.to_string());
    let inside = Inside {
        step: "opening and reading objects",
        series: &args.kernel,
        cache_fs: args.fs,
        store_disk: &store_disk,
        argv: &["density", "--here", "--objects", &objects, "--fd-budget", &fd_budget, "--seed", &seed],
        figures_start: FIGURES_START,
        total_limit: GUEST_LIMIT + THOUSAND_LIMIT * args.objects.div_ceil(1000),
    };
    let figures: Figures = inside.run(scratch.path())?;
    Ok(Figures { cache_fs: Some(args.fs.name().to_owned()), ..figures })
}
