//! The command line: one file a verb.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// First process of a lab guest.
    #[command(hide = true)]
    LabInit,
}

/// Runs the verb that the command line names.
#[must_use]
pub fn main() -> ExitCode {
    match Cli::parse().verb {
        Verb::LabInit => {
            let Err(e) = crate::lab::init::main();
            eprintln!("infill: {e}");
            ExitCode::FAILURE
        }
    }
}
