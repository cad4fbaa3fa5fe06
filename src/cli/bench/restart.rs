//! `infill bench restart`: what readers notice when the daemon is killed and started anew.

use std::time::Duration;

use clap::Args;

use super::inside::{Inside, InsideArgs, PROGRESS};
use crate::cli::Failure;
use crate::lab::bench::restart::{self, Figures};
use crate::lab::progress::Progress;
use crate::lab::{Result, Scratch, disk, packages};

/// How long the guest may take for itself, and for each kill.
const GUEST_LIMIT: Duration = Duration::from_secs(900);
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// Room on the guest's store disk beside the data.
const DISK_SLACK_BYTES: u64 = 32 << 20;
/// The result in the guest begins like this.
const FIGURES_START: &str = "{\"kills\"";

/// Flags of `infill bench restart`.
#[derive(Debug, Args)]
pub struct RestartArgs {
    #[command(flatten)]
    inside: InsideArgs,
    /// How often the daemon is killed
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// Stop it with SIGTERM instead, which lets it finish the reads that have begun
    #[arg(long)]
    orderly: bool,
}

/// Measures.
///
/// # Errors
/// Something that is needed could not be had, or a reader noticed more than time.
pub(super) fn run(args: &RestartArgs) -> std::result::Result<(), Failure> {
    args.inside.run(|| here(args), || in_guest(args), "readers got errors or wrong bytes; see above")
}

/// Inside the guest.
fn here(args: &RestartArgs) -> Result<Figures> {
    let storm = restart::Storm { orderly: args.orderly, ..restart::in_guest(args.kills, args.inside.seed)? };
    storm.run(|number| println!("{PROGRESS}{number} of {} kills", args.kills))
}

fn in_guest(args: &RestartArgs) -> Result<Figures> {
    packages::ensure(packages::GUEST_TOOLS)?;
    let scratch = Scratch::make("restart")?;
    let progress = Progress::begin("packing files of this machine into an EROFS image");
    let data = scratch.path().join("data");
    let len_bytes = restart::prepare(&data, scratch.path())?;
    let store_disk = scratch.path().join("store.img");
    disk::ext4(&store_disk, len_bytes * 5 / 4 + DISK_SLACK_BYTES, Some(&data))?;
    progress.finish(&format!("{} MiB", len_bytes >> 20));
    let kills = args.kills.to_string();
    let mut argv = vec!["restart", "--kills", &kills];
    argv.extend(args.orderly.then_some("--orderly"));
    let inside = Inside {
        step: "killing infill under readers",
        args: &args.inside,
        store_disk: &store_disk,
        argv: &argv,
        figures_start: FIGURES_START,
        total_limit: GUEST_LIMIT + KILL_LIMIT * u32::try_from(args.kills).unwrap_or(u32::MAX),
    };
    inside.run(scratch.path())
}
