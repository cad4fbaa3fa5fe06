//! One seed, one world: the engine's machines against the model kernel, with everything going wrong.
//!
//! A scheduler picks at random what happens next: a message is delivered, an operation ends (well or not), a
//! reader goes on or dies, a blob is unmounted, time passes, the daemon crashes. After every step the rules
//! of `check` must hold. At last the faults end, and everything must come to rest with nothing left.
//!
//! ```text
//!   setup     a seed -> a world                  daemon    messages in, answers out
//!   steps     what happens next                  shard     a real machine, with slots and sinks that are none
//!   io        how operations end                 check     the rules
//!   sources   the same when nothing is injected  sabotage  mistakes on purpose, which the rules must find
//! ```

mod check;
mod daemon;
mod io;
mod sabotage;
mod setup;
mod shard;
mod sources;
mod steps;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

pub use check::{Rule, Violation};
pub use sabotage::Sabotage;

use self::check::Ledger;
use self::setup::{Faults, Setup};
use self::shard::Shard;
use self::sources::Sources;
use super::blob::SimBlob;
use super::kernel::Kernel;
use super::rng::Rng;
use crate::engine::machine::Limits;

/// How many notes before a violation are worth reading.
const NOTES_SHOWN: usize = 60;

/// A simulated host.
#[derive(Debug)]
pub(crate) struct World {
    rng: Rng,
    step: u64,
    now_ns: u64,
    limits: Limits,
    faults: Faults,
    prompt: u64,
    kernel: Kernel,
    shards: Vec<Shard>,
    blobs: Vec<Arc<SimBlob>>,
    sources: Sources,
    ledger: Ledger,
    /// A shard has reason to read the device.
    armed: bool,
    /// No write finds room.
    full: bool,
    /// The file system that hangs.
    hung: Option<u64>,
    /// The other faults have ended: since when whoever reads from elsewhere must not notice what hangs.
    calm_since_ns: Option<u64>,
    /// A shard that stops leaves what it cannot finish.
    leaving: bool,
    /// Daemons that ended.
    restarts: u64,
    sabotage: Option<Sabotage>,
    /// Readers to whom a request was answered with failure, or to whom the kernel lied.
    let_down: BTreeSet<usize>,
    /// Steps with faults.
    wild_steps: u64,
    /// What happened, if it is being written down.
    notes: Option<Vec<String>>,
}

/// What a world that kept all rules has seen.
#[derive(Clone, Copy, Default, Debug)]
pub struct Seen {
    /// Steps taken.
    pub steps: u64,
    /// Daemons that stopped or crashed while requests waited, each followed by another.
    pub restarts: u64,
    /// Requests for data that the machines of the last daemon got.
    pub needs: u64,
    /// Of them, failed.
    pub needs_failed: u64,
    /// Of those, because their time was over.
    pub needs_timed_out: u64,
    /// Readers that got all they wanted.
    pub readers_served: u64,
    /// Readers that got an error.
    pub readers_failed: u64,
}

impl Seen {
    /// Adds what another world has seen.
    pub const fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.restarts += other.restarts;
        self.needs += other.needs;
        self.needs_failed += other.needs_failed;
        self.needs_timed_out += other.needs_timed_out;
        self.readers_served += other.readers_served;
        self.readers_failed += other.readers_failed;
    }
}

/// A seed whose world broke a rule, and how that came.
#[derive(Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The step at which the rule was broken.
    pub step: u64,
    /// The broken rule.
    pub violation: Violation,
    /// What happened before, one line each.
    pub notes: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        writeln!(f, "seed {}, step {}: {}", self.seed, self.step, self.violation)?;
        write!(f, "replay with INFILL_SIM_SEED={}", self.seed)
    }
}

/// Runs the world of a seed to its end.
///
/// # Errors
/// The rule that was broken, with the notes of the steps that led to it.
pub fn run(seed: u64, sabotage: Option<Sabotage>) -> Result<Seen, Box<Report>> {
    World::new(seed, sabotage, false).live().map_err(|_| {
        // The same once more, with notes.
        let mut report = replay(seed, sabotage);
        let dull = report.notes.len().saturating_sub(NOTES_SHOWN);
        report.notes.drain(..dull);
        Box::new(report)
    })
}

/// Runs the world of a seed and tells everything that happened.
#[must_use]
pub fn replay(seed: u64, sabotage: Option<Sabotage>) -> Report {
    let mut world = World::new(seed, sabotage, true);
    let violation = world.live().err();
    let kept = Violation { rule: Rule::Ends, how: "no rule was broken".to_owned() };
    Report { seed, step: world.step, violation: violation.unwrap_or(kept), notes: world.notes.unwrap_or_default() }
}

impl World {
    fn new(seed: u64, sabotage: Option<Sabotage>, talks: bool) -> Self {
        let mut rng = Rng::new(seed);
        let setup = Setup::new(&mut rng);
        let mut world = Self {
            rng,
            step: 0,
            now_ns: 0,
            limits: setup.limits,
            faults: setup.faults,
            prompt: setup.prompt,
            kernel: setup.kernel,
            shards: Vec::new(),
            blobs: setup.blobs,
            sources: Sources::default(),
            ledger: Ledger::default(),
            armed: true,
            full: false,
            hung: None,
            calm_since_ns: None,
            leaving: false,
            restarts: 0,
            sabotage,
            let_down: BTreeSet::new(),
            wild_steps: setup.steps,
            notes: talks.then(Vec::new),
        };
        world.start_daemon(setup.shards);
        world.note_start();
        world
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let step = self.step;
        if let Some(notes) = &mut self.notes {
            notes.push(format!("{step:5} {}", text()));
        }
    }
}
