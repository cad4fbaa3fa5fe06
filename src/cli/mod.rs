//! The command line: one file a verb.

pub mod bench;
pub mod config;
pub mod demo;
pub mod docs;
pub mod doctor;
mod foreground;
mod human;
pub mod install;
mod leased;
pub mod log_level;
pub mod mount;
pub mod place;
pub mod prefetch;
pub mod release;
pub mod repair;
pub mod serve;
pub mod stat;
pub mod top;
pub mod tune;

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};
use serde::Serialize;

use crate::config::keys;
use crate::control::ClientError;
use crate::ops::exit;

/// Serves EROFS container images on demand, from local blobs.
#[derive(Debug, Parser)]
#[command(name = "infill", version, about, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Answer the kernel's requests until told to stop
    Serve(Box<serve::ServeArgs>),
    Mount(mount::MountArgs),
    Umount(mount::UmountArgs),
    Repair(repair::RepairArgs),
    Prefetch(prefetch::PrefetchArgs),
    Stat(stat::StatArgs),
    Top(top::TopArgs),
    LogLevel(log_level::LogLevelArgs),
    Release(release::ReleaseArgs),
    Install(install::InstallArgs),
    #[command(subcommand)]
    Config(config::ConfigVerb),
    /// Find out whether this host can serve images, and what to do if not
    Doctor(Box<doctor::DoctorArgs>),
    Tune(tune::TuneArgs),
    /// See the whole way work, on this machine: a real kernel asks, infill serves, every byte is compared
    Demo(demo::DemoArgs),
    /// Measure: one command for each published table
    #[command(subcommand)]
    Bench(bench::Bench),
    #[command(subcommand)]
    Docs(docs::Docs),
    /// The process that keeps the device between two daemons
    #[command(hide = true)]
    Keeper,
    /// First process of a lab guest
    #[command(hide = true)]
    LabInit,
}

/// Why a verb failed: what to print, and the exit code.
#[derive(Debug)]
pub struct Failure {
    /// One line: what, where, what to do.
    pub message: String,
    /// See [`exit`].
    pub code: u8,
}

impl Failure {
    /// A failure with an exit code.
    pub fn new(code: u8, error: impl Display) -> Self {
        Self { message: error.to_string(), code }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(error.exit_code(), error)
    }
}

/// The failure for a setting that a variable gives, and that clap takes for a wrong flag.
fn bad_variable(error: &clap::Error) -> Option<Failure> {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else { return None };
    let key = keys::all().find(|key| argument.split([' ', '=']).next() == Some(&key.flag()))?;
    let flag = key.flag();
    // Who gave the flag meant that.
    if std::env::args_os().any(|given| given.as_encoded_bytes().starts_with(flag.as_bytes())) {
        return None;
    }
    let problem = key.check(&[std::env::var_os(key.variable())?]).err()?;
    Some(Failure::new(exit::BAD_CONFIGURATION, format!("{}: {} = {problem}", key.variable(), key.name())))
}

fn fail(Failure { message, code }: &Failure) -> ExitCode {
    eprintln!("infill: {message}");
    ExitCode::from(*code)
}

/// Prints a line. A reader that went away does not change what is done.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints for a machine: one JSON object as one line.
fn print_json(what: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(what).map_err(|error| Failure::new(exit::FAILED, error))?;
    say(text);
    Ok(())
}

/// The definition of the command line.
fn command() -> clap::Command {
    Cli::command()
}

/// Runs what the command line asks for.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => match bad_variable(&error) {
            Some(failure) => return fail(&failure),
            None => error.exit(),
        },
    };
    let result = match cli.verb {
        Verb::Serve(args) => serve::run(*args),
        Verb::Mount(args) => mount::run(&args),
        Verb::Umount(args) => mount::run_umount(&args),
        Verb::Repair(args) => repair::run(&args),
        Verb::Prefetch(args) => prefetch::run(&args),
        Verb::Stat(args) => stat::run(&args),
        Verb::Top(args) => top::run(&args),
        Verb::LogLevel(args) => log_level::run(&args),
        Verb::Release(args) => release::run(&args),
        Verb::Install(args) => install::run(&args),
        Verb::Keeper => crate::ops::keeper::main()
            .map_err(|e| Failure::new(exit::FAILED, format!("the keeper is started by infill serve; there is no other use for it: {e}"))),
        Verb::Doctor(args) => match doctor::run(*args) {
            Ok(code) => return code,
            Err(failure) => Err(failure),
        },
        Verb::Config(verb) => config::run(&verb),
        Verb::Docs(what) => docs::run(&what),
        Verb::Tune(args) => tune::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::Bench(what) => bench::run(&what),
        Verb::LabInit => crate::lab::init::main().map(|never| match never {}).map_err(|e| Failure::new(exit::FAILED, e)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure),
    }
}
