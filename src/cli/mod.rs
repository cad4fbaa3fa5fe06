//! The command line.

pub mod doctor;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::ops::doctor::Probes;

/// Serves the data of EROFS images on demand.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Find out whether this host can serve images, and what to do if not.
    Doctor(doctor::DoctorArgs),
}

/// Does what the arguments say.
#[must_use]
pub fn run() -> ExitCode {
    match Cli::parse().verb {
        Verb::Doctor(args) => doctor::run(
            &args,
            &Probes {
                ring: &|| Ok("not tried".to_owned()),
                holders: &|_| Vec::new(),
                set_xattr: &|_| Ok(()),
            },
        ),
    }
}
