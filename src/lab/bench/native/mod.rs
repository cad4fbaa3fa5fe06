//! `infill bench native`: the fanotify front end on this machine's own kernel, beside the least that can be done.
//!
//! ```text
//!  events    reads of data that is there, by files that are still watched: what an event costs
//!  tree      a tree of this machine, read whole and cold
//!  hot       reads of data that is there, beside readers that wait for a slow source
//!  complete  reads of a blob that is complete, so that it is not watched any more
//!
//!  ground    where everything lies: store, file systems, and infill as a process
//!  load      readers of random pages
//!  peer      the other daemons, as processes: loops that do nothing but answer, or copy
//!  throttle  a disk that gives nothing, for as long as the bench wants
//!  hold      one group that leaves some of its readers waiting
//!  bare      of the peers, the limit: one ring that reads events and answers them
//!  samples   what was measured -> medians, tables
//!  targets   what the figures must be
//!  tune      of `infill bench tune`: what a knob does
//! ```
//! Everything that is compared is measured in turn, round by round, so that what else the machine does meets all of it alike.

mod bare;
mod complete;
mod events;
mod ground;
mod hold;
mod hot;
mod load;
pub mod peer;
mod samples;
pub mod targets;
mod throttle;
mod tree;
pub mod tune;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use self::ground::Ground;
pub use self::samples::{Row, Section, Spread};
use self::targets::Verdict;
use crate::engine::placement::usable_cpus;
use crate::front::fanotify::Group;
use crate::lab::{LabError, Result, Scratch, Trying, packages};

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// What an event costs that needs nothing but an answer
    Events,
    /// A tree of this machine, read whole and cold
    Tree,
    /// One reader of what is there, beside many that wait for a slow source
    Hot,
    /// Reads of a blob that is complete
    Complete,
}

impl Subject {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 4] = [Self::Events, Self::Tree, Self::Hot, Self::Complete];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Tree => "tree",
            Self::Hot => "hot",
            Self::Complete => "complete",
        }
    }
}

/// What to measure, and how long.
#[derive(Clone, Debug)]
pub struct Plan {
    /// This program.
    pub infill: PathBuf,
    /// Subjects.
    pub only: Vec<Subject>,
    /// How often everything is measured.
    pub rounds: usize,
    /// Readers at a time, where they read for a time.
    pub readers: Vec<usize>,
    /// How long they do.
    pub time: Duration,
    /// Length of the tree.
    pub tree_bytes: u64,
    /// More flags for `infill serve`.
    pub serve_flags: Vec<String>,
}

/// All of it; `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `uname -r`.
    pub kernel: String,
    /// What /proc/cpuinfo calls the processors.
    pub cpu_model: String,
    /// Processors that may be used.
    pub cpus: usize,
    /// How often everything was measured.
    pub rounds: usize,
    /// How much the machine's processors were at work before, in the last minute (/proc/loadavg).
    pub load_before: f64,
    /// What was found of each subject.
    pub sections: Vec<Section>,
    /// Beside what it must be.
    pub verdicts: Vec<Verdict>,
}

impl Report {
    /// The figures as tables.
    #[must_use]
    pub fn tables(&self) -> String {
        let Self { kernel, cpu_model, cpus, rounds, load_before, sections, verdicts } = self;
        let head = format!(
            "\nLinux {kernel}, {cpus} CPUs ({cpu_model}), load {load_before:.2} before; medians of {rounds} rounds, in brackets the least and the greatest\n"
        );
        sections.iter().fold(head, |text, section| text + &section.table()) + &targets::table(verdicts)
    }
}

/// Why this machine cannot run this, if it cannot.
#[must_use]
pub fn unfit() -> Option<String> {
    let scratch = match Scratch::make("probe-native") {
        Ok(scratch) => scratch,
        Err(error) => return Some(error.to_string()),
    };
    let watched = Group::new().map(|group| group.can_watch(scratch.path()));
    let why = match watched {
        Ok(Ok(Ok(()))) => return None,
        Ok(Ok(Err(errno))) | Err(errno) => errno.to_string(),
        Ok(Err(error)) => error.to_string(),
    };
    Some(format!(
        "no pre-content events for files in {}: {why}; they need root, Linux 6.14, and ext4, XFS or btrfs (INFILL_CACHE says where)",
        scratch.path().display()
    ))
}

/// Measures.
///
/// # Errors
/// Something that is needed could not be had, a daemon ended, or something was read wrong.
pub fn measure(plan: &Plan) -> Result<Report> {
    packages::ensure(packages::IMAGE_TOOLS)?;
    let load = read_file("/proc/loadavg")?;
    let ground = Ground::make(plan)?;
    let measure = |subject: &Subject| match subject {
        Subject::Events => events::measure(plan, &ground),
        Subject::Tree => tree::measure(plan, &ground),
        Subject::Hot => hot::measure(plan, &ground),
        Subject::Complete => complete::measure(plan, &ground),
    };
    let sections = Subject::ALL.iter().filter(|subject| plan.only.contains(subject)).map(measure).collect::<Result<Vec<_>>>()?;
    let cpuinfo = read_file("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    Ok(Report {
        kernel: read_file("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cpu_model: model.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned()),
        cpus: usable_cpus().len(),
        rounds: plan.rounds,
        load_before: load.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        verdicts: targets::verdicts(&sections),
        sections,
    })
}

fn read_file(path: &str) -> Result<String> {
    fs::read_to_string(path).trying(|| format!("cannot read {path}"))
}

/// An error in words.
fn failed(what: impl Into<String>) -> LabError {
    LabError::Failed(what.into())
}
