//! An engine with a pump in front of it and nothing but memory behind it: one measured run.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::ClockId;
use serde::Serialize;

use super::machine::PAGE_BYTES;
use super::memdisk::{clock_ns, own_cpu_ns};
use super::pump::{Crowd, Parts, Probe, Pump};
use super::sources::{self, Shelf};
use crate::engine::placement;
use crate::engine::plan::{Completion, Window};
use crate::engine::stats::Snapshot;
use crate::engine::{Engine, EngineKind, Settings};
use crate::front::OpenRequest;
use crate::lab::{LabError, Result, Trying};
use crate::store::{Blob, Store};

/// Requests that wait at a time, for each shard.
pub(super) const DEPTH: u64 = 32;
/// Pages of all objects together where nothing is kept: 4 GiB, each asked for once.
const PAGES: u64 = 1 << 20;
/// The same where bytes are kept in memory: 256 MiB.
const PAGES_KEPT: u64 = 1 << 16;
/// Objects of a load that is spread over many; a power of two.
const OBJECTS: u32 = 64;
/// Readers of the blob that is fast, and as many of one that is slow.
const READERS_APART: u64 = 8;
/// Requests for the one that is fast.
const REQUESTS_APART: u64 = 1 << 15;
/// The slow one gives a page after each such time. Its readers take turns, so that each waits for some of them.
const PAUSE: Duration = Duration::from_millis(15);
/// Longest wait for an engine to end.
const STOP_MAX: Duration = Duration::from_secs(10);

/// What is behind the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Behind {
    /// Nothing: an operation ends when it begins, a request and an answer are no system calls. The shard, the router, the
    /// mailbox, the machine are the real ones.
    Nothing,
    /// The real ring, which copies from /dev/zero to /dev/null and reads each request; an answer is a system call.
    Devices,
    /// The same with files in memory. They cannot be written without blocking, as cachefiles' own, so worker threads do.
    Files,
}

/// What a run gave.
#[derive(Clone, Debug, Serialize)]
pub struct RunFigures {
    /// What was behind the engine.
    pub behind: Behind,
    /// `uring`, `blocking` or `null`.
    pub kind: String,
    /// Event loops of an engine.
    pub shards: usize,
    /// Engines side by side, each with requests and a front end of its own: they share nothing but the machine.
    pub engines: usize,
    /// Objects that the requests were spread over.
    pub objects: u32,
    /// Requests of 4 KiB, 32 at a time for each shard, each with a fill of its own; of all engines together.
    pub requests: u64,
    /// In a second, with all cores there are.
    pub requests_per_s: f64,
    /// In a second of CPU time, the kernel's worker threads included: of one core.
    pub requests_per_cpu_s: f64,
    /// Half of the requests were answered within this time of being read.
    pub p50_us: u64,
    /// 99 of 100.
    pub p99_us: u64,
    /// 999 of 1,000.
    pub p999_us: u64,
    /// Turns of the event loop; at most one entry into the ring each.
    pub turns_per_request: f64,
    /// How often a thread slept and was woken again.
    pub sleeps_per_request: f64,
    /// Reads and writes.
    pub operations_per_request: f64,
    /// Memory allocations of the shard after the first quarter of the requests, if the program counts them.
    pub allocations: Option<u64>,
}

/// What is to be run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) behind: Behind,
    pub(super) shards: usize,
    /// How many such engines side by side.
    pub(super) engines: usize,
    pub(super) many: bool,
    /// Requests for each; no more than there are pages.
    pub(super) requests: u64,
    /// How much is brought for each.
    pub(super) window: Window,
    pub(super) allocations: Option<fn() -> u64>,
}

impl Load {
    /// One shard with one object, and only what is asked: every request has a fill of its own.
    pub(super) const fn plain(behind: Behind) -> Self {
        let requests = match behind {
            Behind::Nothing | Behind::Devices => PAGES,
            Behind::Files => PAGES_KEPT,
        };
        Self { behind, shards: 1, engines: 1, many: false, requests, window: Window::Fixed(PAGE_BYTES), allocations: None }
    }

    fn crowd(&self) -> Crowd {
        let pages = if self.behind == Behind::Files { PAGES_KEPT } else { PAGES };
        let objects = if self.many { OBJECTS } else { 1 };
        Crowd {
            objects,
            first: 1,
            pages: pages / u64::from(objects),
            readers: DEPTH * self.shards as u64,
            requests: Some(self.requests.min(pages)),
        }
    }

    /// As `infill serve` has it; each engine has places of its own as long as there are some.
    fn settings(&self, engine: usize) -> Settings {
        let mut seats = placement::seats();
        let taken = engine * self.shards % seats.len().max(1);
        seats.rotate_left(taken);
        Settings {
            shards: self.shards,
            seats,
            kind: if self.behind == Behind::Nothing { EngineKind::Null } else { EngineKind::Auto },
            window: self.window,
            completion: Completion::default(),
            slot_bytes: 1 << 20,
            slots: 16,
            workers: 8,
            fd_budget: 1000,
            open_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            no_room: None,
            tracer: None,
            remembered: Arc::default(),
            leave_rest: false,
        }
    }

    fn blob(&self, crowd: &Crowd) -> Result<Arc<dyn Blob>> {
        let len_bytes = crowd.pages * PAGE_BYTES;
        if self.behind == Behind::Files { sources::memory(len_bytes) } else { sources::zeros(len_bytes) }
    }
}

/// An engine whose objects are open.
struct Rig {
    pump: Arc<Pump>,
    engine: Engine,
}

impl Rig {
    /// The engine of this number.
    fn start(number: usize, load: &Load, crowds: Vec<Crowd>, blobs: Vec<Arc<dyn Blob>>, parts: Parts) -> Result<Self> {
        let keeps = load.behind == Behind::Files;
        let parts = Parts { counts: load.behind != Behind::Nothing, holes_are_absent: keeps, crowds: crowds.clone(), ..parts };
        let pump = Pump::new(parts)?;
        let store: Arc<dyn Store> = Arc::new(Shelf(blobs));
        let engine = Engine::start(&pump.front(), &store, &load.settings(number)).map_err(|e| LabError::Failed(e.to_string()))?;
        let null = sources::null_sink()?;
        let mut opens = Vec::new();
        for (blob, crowd) in crowds.iter().enumerate() {
            for object in crowd.first..crowd.first + crowd.objects {
                let sink = if keeps { sources::memory_sink(crowd.pages * PAGE_BYTES)? } else { Arc::clone(&null) };
                let object_id = crate::front::ObjectId(object);
                opens.push(OpenRequest { object: object_id, key: Shelf::key(blob, object), ticket: pump.open_ticket(), sink });
            }
        }
        pump.open(opens)?;
        Ok(Self { pump, engine })
    }
}

/// Lets an engine, or several of them, answer requests.
///
/// # Errors
/// The engine cannot be had, a request failed, or the answers do not come.
pub(super) fn run(load: &Load) -> Result<RunFigures> {
    let crowd = load.crowd();
    let requests = crowd.requests.unwrap_or(0);
    let start = |number| {
        let probe = load.allocations.map(|allocations| Probe::new(allocations, requests / 4));
        Rig::start(number, load, vec![crowd], vec![load.blob(&crowd)?], Parts { probe, ..Parts::default() })
    };
    let rigs = (0..load.engines).map(start).collect::<Result<Vec<Rig>>>()?;
    let turns: u64 = rigs.iter().map(|rig| rig.engine.snapshot().turns).sum();
    let (began, began_cpu_ns, slept) = (Instant::now(), own_cpu_ns()?, sleeps()?);
    thread::scope(|scope| -> Result<()> {
        let pumps: Vec<_> = rigs.iter().map(|rig| scope.spawn(|| rig.pump.run())).collect();
        let failed = |_| Err(LabError::Failed("a thread of the bench died".into()));
        pumps.into_iter().try_for_each(|pump| pump.join().unwrap_or_else(failed))
    })?;
    let (wall_s, cpu_s) = (began.elapsed().as_secs_f64(), (own_cpu_ns()? - began_cpu_ns) as f64 / 1e9);
    let slept = sleeps()? - slept;
    let kind = rigs.first().map_or("none", |rig| rig.engine.started().kind).to_owned();
    let allocations = rigs.iter().map(|rig| rig.pump.counted()).sum();
    let stop = |rig: Rig| rig.engine.stop(STOP_MAX, || false).map_err(|e| LabError::Failed(e.to_string()));
    let counts = rigs.into_iter().map(stop).collect::<Result<Vec<Snapshot>>>()?;
    let requests = requests * load.engines as u64;
    let sum = |of: fn(&Snapshot) -> u64| counts.iter().map(of).sum::<u64>();
    let most = |of: fn(&Snapshot) -> u64| counts.iter().map(of).max().unwrap_or(0);
    Ok(RunFigures {
        behind: load.behind,
        kind,
        shards: load.shards,
        engines: load.engines,
        objects: crowd.objects,
        requests,
        requests_per_s: requests as f64 / wall_s,
        requests_per_cpu_s: requests as f64 / cpu_s,
        p50_us: most(|counts| counts.p50_us),
        p99_us: most(|counts| counts.p99_us),
        p999_us: most(|counts| counts.p999_us),
        turns_per_request: (sum(|counts| counts.turns) - turns) as f64 / requests as f64,
        sleeps_per_request: slept as f64 / requests as f64,
        operations_per_request: sum(|counts| counts.operations) as f64 / requests as f64,
        allocations,
    })
}

/// How often threads of this process have slept so far.
fn sleeps() -> Result<i64> {
    Ok(getrusage(UsageWho::RUSAGE_SELF).trying(|| "cannot read what this process used")?.voluntary_context_switches())
}

/// CPU time that the bench itself takes for a question and its answer, without an engine between.
///
/// # Errors
/// There is no clock, or no eventfd.
pub(super) fn own_ns_per_request() -> Result<f64> {
    let crowd = Load::plain(Behind::Nothing).crowd();
    let pump = Pump::new(Parts { crowds: vec![crowd], ..Parts::default() })?;
    let requests = crowd.requests.unwrap_or(1);
    let began_ns = clock_ns(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    pump.answer_all(requests)?;
    Ok((clock_ns(ClockId::CLOCK_THREAD_CPUTIME_ID)? - began_ns) as f64 / requests as f64)
}

/// How long readers of a fast blob wait, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Waits {
    /// Half of them at most this long.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// Requests for the slow blob that had their answer meanwhile.
    pub slow_answers: u64,
}

/// Lets eight readers read a fast blob, and, if `beside` is set, as many a slow one beside them, on the same shard.
///
/// # Errors
/// As [`run`].
pub(super) fn apart(beside: bool) -> Result<Waits> {
    let load = Load::plain(Behind::Files);
    let fast = Crowd { readers: READERS_APART, requests: Some(REQUESTS_APART), ..load.crowd() };
    let slow = Crowd { first: fast.first + fast.objects, requests: None, ..fast };
    let crowds = if beside { vec![fast, slow] } else { vec![fast] };
    let blobs = vec![load.blob(&fast)?, sources::trickle(slow.pages * PAGE_BYTES, PAUSE)?];
    let Rig { pump, engine } = Rig::start(0, &load, crowds, blobs, Parts { timed: true, ..Parts::default() })?;
    pump.run()?;
    let slow_answers = if beside { pump.answered(1) } else { 0 };
    // What waits for the slow one need not end well.
    engine.stop(Duration::ZERO, || true).map_err(|e| LabError::Failed(e.to_string()))?;
    let took_us = |share| pump.took_ns(share) as f64 / 1e3;
    Ok(Waits { p50_us: took_us(0.5), p99_us: took_us(0.99), slow_answers })
}
