//! `infill log-level`: what the daemon logs, without a restart.

use clap::{Args, ValueEnum};

use super::place::Asking;
use super::{Failure, say};
use crate::config::LogLevel;

/// Show what the daemon logs, or change it until it is started anew
///
/// Exit code: 0 if that is so, 69 if no daemon serves, 77 if this user is not permitted, 1 for anything else.
#[derive(Debug, Args)]
pub struct LogLevelArgs {
    #[command(flatten)]
    asking: Asking,
    /// Least important messages to log [default: show what it is]
    #[arg(value_enum)]
    level: Option<LogLevel>,
}

/// Shows the level, as it is afterwards.
///
/// # Errors
/// The daemon does not answer, or does not do it.
pub fn run(args: &LogLevelArgs) -> Result<(), Failure> {
    let daemon = args.asking.client()?;
    if let Some(level) = args.level {
        daemon.set_level(level)?;
    }
    let level = daemon.level()?;
    say(level.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned()));
    Ok(())
}
