//! `infill bench`: measurements, one command for each published table.

mod density;
mod guest;
mod inside;
mod restart;

use std::path::PathBuf;

use clap::Subcommand;

use super::Failure;
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
        /// Only one run with so many requests
        #[arg(long, hide = true)]
        pass: Option<u64>,
    },
    /// What readers notice when the daemon is killed and started anew, again and again, on a real kernel
    Restart(restart::RestartArgs),
    /// Thousands of mounted objects under a small budget of descriptors, on a real kernel
    Density(density::DensityArgs),
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
}

/// Runs what was asked for.
///
/// # Errors
/// Something that is needed could not be had, or a cell failed.
pub fn run(bench: &Bench) -> Result<(), Failure> {
    let failed = |error| Failure::new(exit::FAILED, error);
    match bench {
        Bench::Guest(args) => guest::run(args),
        Bench::Engine { pass: Some(requests), .. } => engine::pass(*requests).map_err(failed),
        Bench::Engine { json, pass: None } => {
            let report = engine::measure(None, &["bench", "engine", "--pass"]).map_err(failed)?;
            print!("{}", report.table());
            if *json {
                let text = serde_json::to_string(&report).map_err(|error| Failure::new(exit::FAILED, error))?;
                println!("{text}");
            }
            Ok(())
        }
        Bench::Restart(args) => restart::run(args),
        Bench::Density(args) => density::run(args),
        Bench::Cell => cell::run().map_err(failed),
        Bench::Naive { cache_dir, store, all } => match naive::serve(cache_dir, store, *all) {
            Ok(never) => match never {},
            Err(error) => Err(failed(error)),
        },
    }
}
