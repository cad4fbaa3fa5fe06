//! `infill bench restart`: what readers notice when the daemon is killed and started anew.

use std::time::Duration;

use clap::Args;

use super::inside::{Inside, PROGRESS};
use crate::cli::Failure;
use crate::lab::bench::restart::{self, Figures};
use crate::lab::disk::{self, CacheFs};
use crate::lab::progress::Progress;
use crate::lab::{LabError, Result, Scratch, kernel, packages};
use crate::ops::exit;

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
    /// End with the figures as one JSON object
    #[arg(long)]
    json: bool,
    /// The guest's kernel
    #[arg(long, default_value = kernel::SERIES[0], value_parser = kernel::SERIES)]
    kernel: String,
    /// File system under the cache
    #[arg(long, value_enum, default_value_t = CacheFs::Ext4)]
    fs: CacheFs,
    /// How often the daemon is killed
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// Says at which moments
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop it with SIGTERM instead, which lets it finish the reads that have begun
    #[arg(long)]
    orderly: bool,
    /// Only the job itself, inside a guest
    #[arg(long, hide = true)]
    here: bool,
}

/// Measures.
///
/// # Errors
/// Something that is needed could not be had, or a reader noticed more than time.
pub(super) fn run(args: &RestartArgs) -> std::result::Result<(), Failure> {
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
    Err(Failure::new(exit::FAILED, "readers got errors or wrong bytes; see above"))
}

/// Inside the guest.
fn here(args: &RestartArgs) -> Result<()> {
    let storm = restart::Storm { orderly: args.orderly, ..restart::in_guest(args.kills, args.seed)? };
    let figures = storm.run(|number| println!("{PROGRESS}{number} of {} kills", args.kills))?;
    println!("{}", serde_json::to_string(&figures).map_err(|error| LabError::Failed(error.to_string()))?);
    Ok(())
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
    let (kills, seed) = (args.kills.to_string(), args.seed.to_string());
    let mut argv = vec!["restart", "--here", "--kills", &kills, "--seed", &seed];
    argv.extend(args.orderly.then_some("--orderly"));
    let inside = Inside {
        step: "killing infill under readers",
        series: &args.kernel,
        cache_fs: args.fs,
        store_disk: &store_disk,
        argv: &argv,
        figures_start: FIGURES_START,
        total_limit: GUEST_LIMIT + KILL_LIMIT * u32::try_from(args.kills).unwrap_or(u32::MAX),
    };
    let figures: Figures = inside.run(scratch.path())?;
    Ok(Figures { cache_fs: Some(args.fs.name().to_owned()), ..figures })
}
