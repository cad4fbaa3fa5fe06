//! `infill bench native`: the fanotify front end on this machine's own kernel.

use std::time::Duration;

use clap::Args;

use crate::cli::{Failure, print_json};
use crate::lab::bench::native::{self, Plan, Subject};
use crate::lab::{Result, Trying};
use crate::ops::exit;

/// Flags of `infill bench native`.
#[derive(Debug, Args)]
pub struct NativeArgs {
    /// End with the figures as one JSON object
    #[arg(long)]
    json: bool,
    /// Fail if a target is missed that was measured
    #[arg(long)]
    check: bool,
    /// What is measured
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Subject::ALL)]
    only: Vec<Subject>,
    /// How often everything is measured, all in turn
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Readers at a time, of events
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 8, 16], value_parser = clap::value_parser!(u16).range(1..=1024))]
    readers: Vec<u16>,
    /// How long readers read, where they do not read everything once
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    time_ms: u64,
    /// How much of this machine's files the tree has at most
    #[arg(long, value_name = "MIB", default_value_t = 800, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    tree_mib: u64,
    /// More flags for infill serve
    #[arg(long, value_name = "FLAGS", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    serve_flags: String,
}

/// Measures and shows.
///
/// # Errors
/// The kernel has no such events, something that is needed could not be had, or with `--check` a target was missed.
pub(super) fn run(args: &NativeArgs) -> std::result::Result<(), Failure> {
    if let Some(why) = native::unfit() {
        return Err(Failure::new(exit::UNAVAILABLE, why));
    }
    let report = plan(args).and_then(|plan| native::measure(&plan)).map_err(|error| Failure::new(exit::FAILED, error))?;
    print!("{}", report.tables());
    if args.json {
        print_json(&report)?;
    }
    let missed: Vec<String> = report.verdicts.iter().filter(|verdict| !verdict.met).map(native::targets::Verdict::line).collect();
    if args.check && !missed.is_empty() {
        return Err(Failure::new(exit::FAILED, format!("{} targets were missed: {}", missed.len(), missed.join("; "))));
    }
    Ok(())
}

fn plan(args: &NativeArgs) -> Result<Plan> {
    Ok(Plan {
        infill: std::env::current_exe().trying(|| "cannot find this program")?,
        only: args.only.clone(),
        rounds: args.rounds.into(),
        readers: args.readers.iter().copied().map(usize::from).collect(),
        time: Duration::from_millis(args.time_ms),
        tree_bytes: args.tree_mib << 20,
        serve_flags: args.serve_flags.split_whitespace().map(str::to_owned).collect(),
    })
}
