//! `infill bench tune`: what a knob does.

use std::time::Duration;

use clap::Args;

use crate::cli::{Failure, print_json};
use crate::lab::Trying;
use crate::lab::bench::native;
use crate::lab::bench::native::tune::knobs::{KNOBS, Knob};
use crate::lab::bench::native::tune::{TunePlan, measure};
use crate::ops::exit;

/// Flags of `infill bench tune`.
#[derive(Debug, Args)]
pub struct TuneArgs {
    /// End with the figures as one JSON object
    #[arg(long)]
    json: bool,
    /// Say what can be turned, and measure nothing
    #[arg(long)]
    list: bool,
    /// Knobs by their names [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    knob: Vec<String>,
    /// How often each cell is measured off and on, in turn
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// How long readers read, where they do not read everything once
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    time_ms: u64,
    /// How much of this machine's files the tree has at most
    #[arg(long, value_name = "MIB", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    tree_mib: u64,
}

/// Measures and shows.
///
/// # Errors
/// An unknown knob, a kernel without such events, or something that is needed could not be had.
pub(super) fn run(args: &TuneArgs) -> Result<(), Failure> {
    let find = |name: &String| {
        let known: Vec<_> = KNOBS.iter().map(|knob| knob.name).collect();
        Knob::find(name)
            .ok_or_else(|| Failure::new(exit::USAGE, format!("--knob {name}: there is no such knob; there are {}", known.join(", "))))
    };
    let mut knobs = args.knob.iter().map(find).collect::<Result<Vec<_>, _>>()?;
    if knobs.is_empty() {
        knobs = KNOBS.iter().collect();
    }
    if args.list {
        knobs.iter().for_each(|knob| println!("{:<24}{}", knob.name, knob.what));
        return Ok(());
    }
    if let Some(why) = native::unfit() {
        return Err(Failure::new(exit::UNAVAILABLE, why));
    }
    let failed = |error| Failure::new(exit::FAILED, error);
    let plan = TunePlan {
        infill: std::env::current_exe().trying(|| "cannot find this program").map_err(failed)?,
        knobs,
        rounds: args.rounds.into(),
        time: Duration::from_millis(args.time_ms),
        tree_bytes: args.tree_mib << 20,
    };
    let report = measure(&plan).map_err(failed)?;
    print!("{}", report.table());
    if args.json { print_json(&report) } else { Ok(()) }
}
