//! `infill tune`: what could be set differently on this host, why, and setting it.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use serde::Serialize;

use super::{Failure, print_json};
use crate::config::Given;
use crate::ops::tune::TuneError;
use crate::ops::tune::apply::{Done, apply, revert};
use crate::ops::tune::host::Host;
use crate::ops::tune::knob::{Found, State};
use crate::ops::tune::profile::{Name, Profile};
use crate::ops::tune::root::Root;

/// What takes effect only when something is started anew.
const RESTART: &str = "systemctl daemon-reload && systemctl restart infill";

/// See what could be set differently on this host, and why; set it, and set it back
///
/// Without --apply or --revert nothing is changed. What is in a profile was measured, by the command beside it; the figures are in
/// tuning/README.md. What is changed is recorded in /var/lib/infill/tune.json, with what was there before.
///
/// Exit code: 0 if it was shown or done, 75 if another one is at work, 77 if it is for root, 78 if a file is in the way that infill did not write, 1 for anything
/// else that is in the way; then nothing is changed, or the message says what is.
#[derive(Debug, clap::Args)]
pub struct TuneArgs {
    /// The kind of host [default: as this one looks]
    #[arg(long, value_enum)]
    profile: Option<Name>,
    /// Show what is and what should be, and change nothing; this is done also if nothing is asked for
    #[arg(long, group = "what")]
    check: bool,
    /// Set it, now and for every start
    #[arg(long, group = "what")]
    apply: bool,
    /// Set everything back that --apply has set
    #[arg(long, group = "what", conflicts_with = "profile")]
    revert: bool,
    /// Do it below this directory, for an image; the kernel's own values are set only if they are there, too
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// What is printed for a machine.
#[derive(Serialize)]
struct Answer {
    profile: Option<Name>,
    why: Option<String>,
    knobs: Vec<Found>,
    done: Option<Done>,
}

/// Shows, applies or reverts.
///
/// # Errors
/// See [`TuneError`].
pub fn run(args: &TuneArgs) -> Result<(), Failure> {
    let failed = |error: TuneError| Failure::new(error.exit_code(), error);
    let root = Root::new(&args.root);
    if !args.root.is_dir() {
        return Err(Failure::new(crate::ops::exit::BAD_CONFIGURATION, format!("--root {}: this is no directory", args.root.display())));
    }
    if (args.apply || args.revert) && root.is_host() && !geteuid().is_root() {
        return Err(failed(TuneError::NotRoot));
    }
    if args.revert {
        let done = revert(&root).map_err(failed)?;
        return show(args, &Answer { profile: None, why: None, knobs: Vec::new(), done: Some(done) });
    }
    let (profile, why) = match args.profile {
        Some(profile) => (profile, "as it was asked for".to_owned()),
        None => guess(),
    };
    let done = if args.apply { Some(apply(&root, profile).map_err(failed)?) } else { None };
    let knobs = Profile::of(profile).knobs.iter().map(|knob| knob.look(&root)).collect();
    show(args, &Answer { profile: Some(profile), why: Some(why), knobs, done })
}

/// The profile for this host, by its processors and the disks of its stores.
fn guess() -> (Name, String) {
    // Settings that cannot be read are doctor's business.
    let stores = Given::default().look(None).map(|config| config.stores).unwrap_or_default();
    let dirs: Vec<&Path> = stores.iter().map(crate::store::StoreSpec::path).collect();
    Host::read(&dirs).guess()
}

fn show(args: &TuneArgs, answer: &Answer) -> Result<(), Failure> {
    if args.json {
        return print_json(answer);
    }
    let text =
        answer.profile.map(|profile| table(profile, answer)).unwrap_or_default() + &answer.done.as_ref().map(said).unwrap_or_default();
    // A reader that went away (a pager, head) does not change what was done.
    let _ = io::stdout().lock().write_all(text.as_bytes());
    Ok(())
}

/// A line for each knob.
fn table(profile: Name, answer: &Answer) -> String {
    let heads = ["knob", "current", "recommended"];
    let cells = |found: &Found| [found.knob.clone(), found.current.clone(), found.recommended.clone()];
    let width = |column: usize| {
        let longest = answer.knobs.iter().map(|found| cells(found)[column].chars().count()).max().unwrap_or(0);
        longest.max(heads[column].len())
    };
    let widths = [0, 1, 2].map(width);
    let line = |mark: &str, cells: [&str; 3], why: &str| {
        let mut line = format!("{mark:<3}");
        for (cell, width) in cells.iter().zip(widths) {
            // Writing to a string does not fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        line + why
    };
    let summary = Profile::of(profile).summary;
    let mut text = format!("profile {profile}: {}\n{summary}\n\n", answer.why.as_deref().unwrap_or_default());
    text += &(line("", heads, "why") + "\n");
    for found in &answer.knobs {
        let mark = match found.state {
            State::Ok => "ok",
            State::Change => "->",
            State::NotHere => "-",
        };
        let [knob, current, recommended] = cells(found);
        text += &(line(mark, [&knob, &current, &recommended], &found.why) + "\n");
    }
    text + "\nok: as it should be, ->: to be changed (--apply), -: not in this kernel; measured: tuning/README.md\n"
}

/// What was done, and what is left to do.
fn said(done: &Done) -> String {
    let mut text = String::from("\n");
    for path in &done.changed {
        let _ = writeln!(text, "changed: {}", path.display());
    }
    let _ = writeln!(text, "{} changed, {} as they should be", done.changed.len(), done.unchanged);
    let is_of_service = |path: &PathBuf| path.starts_with("/etc/infill") || path.starts_with("/etc/systemd");
    if done.changed.iter().any(is_of_service) {
        let _ = writeln!(text, "for infill to take it: {RESTART}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table is for a terminal.
    #[test]
    fn every_profile_fits_into_a_hundred_columns() {
        let dir = tempfile::tempdir().unwrap();
        for profile in Name::ALL {
            let knobs = Profile::of(profile).knobs.iter().map(|knob| knob.look(&Root::new(dir.path()))).collect();
            let answer = Answer { profile: Some(profile), why: Some("as it was asked for".into()), knobs, done: None };
            let text = table(profile, &answer);
            for line in text.lines() {
                assert!(line.chars().count() <= 100, "{profile}: {} columns: {line}", line.chars().count());
            }
        }
    }
}
