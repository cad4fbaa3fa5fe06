//! `infill bench density`: far more mounted objects than the daemon may have descriptors.

use std::time::Duration;

use clap::Args;

use super::inside::{Inside, InsideArgs, PROGRESS};
use crate::cli::Failure;
use crate::lab::bench::density::{self, Figures};
use crate::lab::{Result, Scratch, disk, packages};

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
    #[command(flatten)]
    inside: InsideArgs,
    /// Blobs that are mounted and read; the guest's memory and disk are made for some ten thousands
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=30_000))]
    objects: u32,
    /// Descriptors that they may take
    #[arg(long, default_value_t = 512)]
    fd_budget: u64,
}

/// Measures.
///
/// # Errors
/// Something that is needed could not be had, a read failed, or the budget was not held.
pub(super) fn run(args: &DensityArgs) -> std::result::Result<(), Failure> {
    let here = || density::in_guest(args.objects as usize, args.fd_budget, args.inside.seed)?.run(&|far| println!("{PROGRESS}{far}"));
    args.inside.run(here, || in_guest(args), "a read failed or was wrong, or the budget was not held; see above")
}

fn in_guest(args: &DensityArgs) -> Result<Figures> {
    packages::ensure(packages::GUEST_TOOLS)?;
    let scratch = Scratch::make("density")?;
    let store_disk = scratch.path().join("store.img");
    disk::ext4(&store_disk, DISK_BYTES, None)?;
    let (objects, fd_budget) = (args.objects.to_string(), args.fd_budget.to_string());
    let inside = Inside {
        step: "opening and reading objects",
        args: &args.inside,
        store_disk: &store_disk,
        argv: &["density", "--objects", &objects, "--fd-budget", &fd_budget],
        figures_start: FIGURES_START,
        total_limit: GUEST_LIMIT + THOUSAND_LIMIT * args.objects.div_ceil(1000),
    };
    inside.run(scratch.path())
}
