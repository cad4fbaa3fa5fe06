//! `infill bench`: measurements, one command for each published table.

mod density;
mod guest;
mod inside;
mod native;
mod restart;
mod tune;

use std::path::PathBuf;

use clap::Subcommand;

use super::{Failure, print_json};
use crate::lab::bench::native::peer;
use crate::lab::bench::{cell, engine, naive};
use crate::ops::exit;

pub use guest::GuestArgs;

/// What `infill bench` measures.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// What infill costs readers, beside other daemons, on a real kernel whose clock counts instructions
    Guest(Box<GuestArgs>),
    /// What the engine costs without a kernel that asks: requests a second, system calls a request
    Engine {
        /// End with the figures as one JSON object
        #[arg(long)]
        json: bool,
        /// Numbers of shards to measure [default: one, and one for each processor]
        #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
        shards: Vec<u16>,
        /// Only one run with this behind the engine and so many requests, for so many shards
        #[arg(long, hide = true, num_args = 2..=3, value_names = ["BEHIND", "REQUESTS", "SHARDS"])]
        pass: Vec<String>,
    },
    /// What readers notice when the daemon is killed and started anew, again and again, on a real kernel
    Restart(restart::RestartArgs),
    /// Thousands of mounted objects under a small budget of descriptors, on a real kernel
    Density(density::DensityArgs),
    /// What infill costs readers on this machine's own kernel (6.14 or later), by fanotify: events, a cold tree, isolation
    Native(native::NativeArgs),
    /// What a knob of `infill tune` does on this machine's own kernel: the cell it is for, with the knob off and on in turn
    Tune(tune::TuneArgs),
    /// One cell, inside a guest
    #[command(hide = true)]
    Cell,
    /// The daemons to compare with
    #[command(hide = true)]
    Naive {
        /// Where the kernel's cache is
        cache_dir: PathBuf,
        /// Where the blobs are
        store: PathBuf,
        /// Bring the whole blob at its first request
        #[arg(long)]
        all: bool,
    },
    /// The daemons to compare with on this machine's own kernel
    #[command(hide = true)]
    NativePeer(peer::PeerArgs),
}

/// Runs what was asked for.
///
/// # Errors
/// Something that is needed could not be had, or a cell failed.
pub fn run(bench: &Bench) -> Result<(), Failure> {
    let failed = |error| Failure::new(exit::FAILED, error);
    match bench {
        Bench::Guest(args) => guest::run(args),
        Bench::Engine { pass, .. } if !pass.is_empty() => engine::pass_of(pass).map_err(failed),
        Bench::Engine { json, shards, .. } => {
            let shards: Vec<usize> = shards.iter().copied().map(usize::from).collect();
            let report = engine::measure(None, &["bench", "engine", "--pass"], &shards).map_err(failed)?;
            print!("{}", report.table());
            if *json { print_json(&report) } else { Ok(()) }
        }
        Bench::Restart(args) => restart::run(args),
        Bench::Density(args) => density::run(args),
        Bench::Native(args) => native::run(args),
        Bench::Tune(args) => tune::run(args),
        Bench::NativePeer(args) => peer::run(args).map_err(failed),
        Bench::Cell => cell::run().map_err(failed),
        Bench::Naive { cache_dir, store, all } => match naive::serve(cache_dir, store, *all) {
            Ok(never) => match never {},
            Err(error) => Err(failed(error)),
        },
    }
}
