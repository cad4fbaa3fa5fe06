//! Starting and stopping the engine: shards on their cores, openers beside them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::blocking::Blocking;
use super::buffers::{Buffers, Messages, Pages};
use super::clock::Clock;
use super::entry::Entry;
use super::fds::{Budget, Evictor, Offer};
use super::io::{Io, SOURCES_MAX, Watch};
use super::machine::{Limits, Machine};
use super::mailbox::{Inbox, Mailbox};
use super::null::Null;
use super::opener::Opener;
use super::opens::Opens;
use super::placement::{self, Seat};
use super::ring::{self, Ring};
use super::router::{BATCH_MAX, Router};
use super::shard::{Intake, Parts, Shard};
use super::stats::{ObjectReport, ShardReport, Snapshot};
use super::{EngineError, EngineKind, FILLS_PER_NEED, Settings, Shared, as_ns};
use crate::front::{Caps, FrontEnd};
use crate::store::Store;

/// Pause between two looks at whether the shards have ended.
const STOP_POLL: Duration = Duration::from_millis(5);
/// How long a shard that is out of time may take to give its last answers; longer than [`super::io::DRAIN_MAX`],
/// so that only one that hangs is left behind.
const ABORT_WAIT: Duration = Duration::from_secs(2);

/// A shard's thread; it ends with the reason if it is not told to.
type ShardThread = JoinHandle<Result<(), EngineError>>;

/// A running engine.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    shards: Vec<ShardThread>,
    entry: Entry,
    started: Started,
}

/// Sees what an engine does. Cheap to clone; looking takes nothing from the shards.
#[derive(Clone, Debug)]
pub struct Observer(Arc<Shared>);

impl Observer {
    /// What it has done.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.0.snapshot()
    }

    /// How things stand in each shard.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardReport> {
        let now_ns = self.0.clock.now_ns();
        self.0.shards.iter().enumerate().map(|(index, shard)| shard.report(index, now_ns)).collect()
    }

    /// What is known of each blob that is open or was, in the order of their names.
    #[must_use]
    pub fn objects(&self) -> Vec<ObjectReport> {
        self.0.objects.report(self.0.clock.now_ns())
    }
}

/// What a started engine is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Started {
    /// `uring`, `blocking` or `null`.
    pub kind: &'static str,
    /// Its flags, or why there is no ring.
    pub detail: String,
    /// Event loops.
    pub shards: usize,
    /// What their buffers lie in; of several kinds the least good one.
    pub pages: Pages,
}

/// Everything that a shard's thread needs to build itself there.
struct Plan {
    index: usize,
    seat: Option<Seat>,
    settings: Settings,
    caps: Caps,
    /// What it receives from.
    sources: Vec<(Arc<dyn FrontEnd>, Router)>,
    shared: Arc<Shared>,
    clock: Clock,
    inbox: Inbox,
    offers: Sender<Offer>,
}

impl Engine {
    /// Starts serving `front` from `store`.
    ///
    /// # Errors
    /// No ring where the settings want one; no threads, memory or descriptors.
    pub fn start(front: &Arc<dyn FrontEnd>, store: &Arc<dyn Store>, settings: &Settings) -> Result<Self, EngineError> {
        Self::start_all(std::slice::from_ref(front), store, settings)
    }

    /// Starts serving several sources of requests of one kind from `store`. Shards take turns at them: the source in a place is
    /// read by the shard of that place, modulo their number. It is best if that one owns the objects whose requests come
    /// from there ([`Entry::owner`]).
    ///
    /// # Errors
    /// As [`Engine::start`]; no source at all, or more than [`SOURCES_MAX`] for each shard.
    pub fn start_all(fronts: &[Arc<dyn FrontEnd>], store: &Arc<dyn Store>, settings: &Settings) -> Result<Self, EngineError> {
        let none = || EngineError::Resources(std::io::ErrorKind::InvalidInput.into());
        let caps = fronts.first().ok_or_else(none)?.caps();
        let clock = Clock::start();
        let mut pairs = Vec::new();
        let shards = settings.shards.max(fronts.len().div_ceil(SOURCES_MAX));
        for _ in 0..shards {
            pairs.push(Inbox::pair().map_err(EngineError::Resources)?);
        }
        let (mailboxes, inboxes): (Vec<Mailbox>, Vec<Inbox>) = pairs.into_iter().unzip();
        let bells = mailboxes.iter().map(|mailbox| Arc::clone(mailbox.bell())).collect();
        let budget = Budget::new(settings.fd_budget, caps.needs_hold_fds);
        let shared = Arc::new(Shared::new(clock, bells, budget).map_err(EngineError::Resources)?);
        shared.receivers.store(fronts.len(), Ordering::Release);
        shared.leaves_rest.store(settings.leave_rest, Ordering::Release);
        let opens = Arc::new(Opens::new(settings.open_timeout));
        let opener = Opener {
            shared: Arc::clone(&shared),
            store: Arc::clone(store),
            shards: mailboxes.clone(),
            opens: Arc::clone(&opens),
            remembered: Arc::clone(&settings.remembered),
        };
        opener.start()?;
        let (evictor, offers) = Evictor::new(Arc::clone(&shared));
        let mut evictor = Some(evictor);
        let mut plan = |(index, inbox): (usize, Inbox)| Plan {
            index,
            seat: settings.seats.get(index % settings.seats.len().max(1)).cloned(),
            settings: settings.clone(),
            caps,
            sources: Vec::from_iter(fronts.iter().skip(index).step_by(shards).map(|front| {
                let router = Router::new(index, caps, Arc::clone(&shared), mailboxes.clone(), Arc::clone(&opens), evictor.take());
                (Arc::clone(front), router)
            })),
            shared: Arc::clone(&shared),
            clock,
            inbox,
            offers: offers.clone(),
        };
        let plans = inboxes.into_iter().enumerate().map(&mut plan).collect();
        let started = start_shards(plans).inspect_err(|_| {
            shared.abandon();
            opens.end();
        });
        let (shards, started) = started?;
        let entry = Entry::new(Arc::clone(&shared), mailboxes, opens);
        Ok(Self { shared, shards, entry, started })
    }

    /// The way in for requests that come from no kernel.
    #[must_use]
    pub fn entry(&self) -> Entry {
        self.entry.clone()
    }

    /// What it is.
    #[must_use]
    pub const fn started(&self) -> &Started {
        &self.started
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// What it has done.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.shared.snapshot()
    }

    /// Who can look at it from other threads, also when it has ended.
    #[must_use]
    pub fn observer(&self) -> Observer {
        Observer(Arc::clone(&self.shared))
    }

    /// Whether a shard has ended although nobody asked for it.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.shards.iter().any(JoinHandle::is_finished)
    }

    /// Becomes readable when a shard has ended.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.shared.ended.as_fd()
    }

    /// Says whether what is unfinished when the engine ends, for whatever reason, is left to the next daemon instead
    /// of failed: only where somebody keeps the front end's interface open, and the kernel repeats its requests.
    pub fn leave_rest(&self, leaves: bool) {
        self.shared.leaves_rest.store(leaves, Ordering::Release);
    }

    /// Stops: takes nothing new, finishes what has begun, for at most `timeout` or until `hurry` says so; then
    /// fails the rest, or leaves it.
    ///
    /// # Errors
    /// What a shard died of.
    pub fn stop(self, timeout: Duration, hurry: impl Fn() -> bool) -> Result<Snapshot, EngineError> {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.wake_all();
        self.wait(timeout, hurry);
        self.shared.out_of_time.store(true, Ordering::Release);
        self.shared.wake_all();
        self.wait(ABORT_WAIT, || false);
        let mut result = Ok(());
        for (index, shard) in self.shards.into_iter().enumerate() {
            if !shard.is_finished() {
                tracing::error!(shard = index, "left a shard behind that hangs in the kernel; see /proc/PID/task/*/stack and the disks");
            } else if let Ok(ended) = shard.join() {
                result = result.and(ended);
            }
        }
        result.map(|()| self.shared.snapshot())
    }

    fn wait(&self, timeout: Duration, hurry: impl Fn() -> bool) {
        let started = Instant::now();
        while started.elapsed() < timeout && !self.shards.iter().all(JoinHandle::is_finished) && !hurry() {
            std::thread::sleep(STOP_POLL);
        }
    }
}

impl Shared {
    /// Ends all shards at once, when not all of them could be started.
    fn abandon(&self) {
        for flag in [&self.stopping, &self.out_of_time] {
            flag.store(true, Ordering::Release);
        }
        self.receivers.store(0, Ordering::Release);
        self.wake_all();
    }
}

/// Starts the shards. Those that read the kernel's requests come last, the first of all at the end: a start that fails has
/// as a rule taken nothing from the kernel, and the next daemon finds all of it.
fn start_shards(mut plans: Vec<Plan>) -> Result<(Vec<ShardThread>, Started), EngineError> {
    plans.reverse();
    let (mut shards, mut started) = (Vec::new(), Vec::new());
    for plan in plans {
        let (shard, its) = stand(plan)?;
        shards.push(shard);
        started.push(its);
    }
    shards.reverse();
    let (count, pages) = (shards.len(), started.iter().map(|shard| shard.pages).max());
    // There is one at least.
    let last = started.pop().zip(pages).ok_or_else(|| EngineError::Resources(std::io::ErrorKind::InvalidInput.into()));
    last.map(|(shard, pages)| (shards, Started { shards: count, pages, ..shard }))
}

/// Starts a shard, and waits until it has said how it was made.
fn stand(plan: Plan) -> Result<(ShardThread, Started), EngineError> {
    let (report, reports) = sync_channel(1);
    let shard = plan.spawn(report)?;
    // A thread that dies without a word drops its end.
    let died = |_| EngineError::Resources(std::io::ErrorKind::BrokenPipe.into());
    Ok((shard, reports.recv().map_err(died)??))
}

impl Plan {
    fn spawn(self, report: SyncSender<Result<Started, EngineError>>) -> Result<ShardThread, EngineError> {
        let name = format!("infill-shard-{}", self.index);
        let shared = Arc::clone(&self.shared);
        let run = move || {
            let result = self.run(&report);
            // Wakes who waits for the engine to fail; a full counter wakes as well.
            let _ = shared.ended.write(1);
            result
        };
        Builder::new().name(name).spawn(run).map_err(EngineError::Resources)
    }

    /// In the shard's own thread: pins it, then makes its memory (so that it lies on the core's node) and its
    /// ring (which only this thread may use).
    fn run(self, report: &SyncSender<Result<Started, EngineError>>) -> Result<(), EngineError> {
        if let Some(seat) = &self.seat {
            placement::pin(if self.caps.readers_preempt { &seat.near } else { std::slice::from_ref(&seat.cpu) });
            tracing::debug!(shard = self.index, cpu = seat.cpu, workers_on = ?seat.near, "placed");
        }
        let slot_bytes = usize::try_from(self.settings.slot_bytes).unwrap_or(usize::MAX);
        let buffers = Buffers::new(self.settings.slots, slot_bytes).map_err(EngineError::Resources);
        let buffers = match buffers {
            Ok(buffers) => buffers,
            Err(error) => return drop_report(report, error),
        };
        if self.settings.kind == EngineKind::Null {
            return match Null::new(watch(&self.requests(), &self.inbox)) {
                Ok(null) => self.serve(report, ("null", "no I/O".into()), null, buffers, None),
                Err(error) => drop_report(report, EngineError::Resources(error)),
            };
        }
        match self.ring(&buffers) {
            Ok(Some(ring)) => {
                let detail = describe(&ring);
                self.serve(report, ("uring", detail), ring, buffers, None)
            }
            Ok(None) => self.serve_blocking(report, "as set".into(), buffers),
            Err(why) if self.settings.kind == EngineKind::Uring => drop_report(report, EngineError::NoRing(why)),
            Err(why) => self.serve_blocking(report, why, buffers),
        }
    }

    /// A ring, if one is wanted; or why there is none.
    fn ring(&self, buffers: &Buffers) -> Result<Option<Ring>, String> {
        if self.settings.kind == EngineKind::Blocking {
            return Ok(None);
        }
        let Settings { slots: depth, workers, .. } = self.settings;
        let near = self.seat.as_ref().map_or(&[][..], |seat| &seat.near);
        let settings = ring::Settings {
            depth,
            receives: BATCH_MAX,
            workers,
            near,
            sinks_block: self.caps.sinks_block,
            sinks_copy: self.caps.sinks_copy,
            receives_aside: self.caps.ring_reads_wait,
        };
        Ring::new(settings, &buffers.whole(), watch(&self.requests(), &self.inbox)).map(Some).map_err(|error| ring::explain(&error))
    }

    fn requests(&self) -> Vec<BorrowedFd<'_>> {
        self.sources.iter().map(|(front, _)| front.requests()).collect()
    }

    fn serve_blocking(
        self,
        report: &SyncSender<Result<Started, EngineError>>,
        detail: String,
        buffers: Buffers,
    ) -> Result<(), EngineError> {
        let threads = self.settings.workers;
        match Blocking::new(threads, self.caps.sinks_copy, watch(&self.requests(), &self.inbox)) {
            Ok(io) => self.serve(report, ("blocking", detail), io, buffers, Some(threads)),
            Err(error) => drop_report(report, EngineError::Resources(error)),
        }
    }

    /// Becomes the shard. Where every operation needs one of some `threads`, none is begun without one: what has to wait
    /// waits in the machine, which is fair.
    fn serve<I: Io>(
        self,
        report: &SyncSender<Result<Started, EngineError>>,
        (kind, detail): (&'static str, String),
        io: I,
        buffers: Buffers,
        threads: Option<u32>,
    ) -> Result<(), EngineError> {
        let intake = |(front, router): (Arc<dyn FrontEnd>, Router)| {
            Messages::new(front.message_memory()).map(|messages| Intake { front, router, messages })
        };
        let intakes = match self.sources.into_iter().map(intake).collect() {
            Ok(intakes) => intakes,
            Err(error) => return drop_report(report, EngineError::Resources(error)),
        };
        let caps = self.caps;
        let limits = Limits {
            page_bytes: caps.align_bytes,
            fill_max_bytes: self.settings.slot_bytes,
            window: self.settings.window,
            completion: self.settings.completion,
            slots: threads.map_or(self.settings.slots, |threads| threads.min(self.settings.slots)),
            fills_per_need: FILLS_PER_NEED,
            timeout_ns: as_ns(self.settings.request_timeout),
            probe: caps.holes_are_absent,
            sinks_know: caps.sinks_know,
        };
        // Whoever started us may have given up already; the flags then end this shard.
        let _ = report.send(Ok(Started { kind, detail, shards: 1, pages: buffers.pages() }));
        let parts = Parts {
            index: self.index,
            caps,
            shared: self.shared,
            clock: self.clock,
            inbox: self.inbox,
            offers: self.offers,
            intakes,
            machine: Machine::new(limits),
            tracer: self.settings.tracer,
            no_room: self.settings.no_room,
            io,
            buffers,
        };
        Shard::new(parts).run()
    }
}

fn watch<'a>(requests: &'a [BorrowedFd<'a>], inbox: &'a Inbox) -> Watch<'a> {
    Watch { requests, wake: inbox.fd() }
}

fn drop_report(report: &SyncSender<Result<Started, EngineError>>, error: EngineError) -> Result<(), EngineError> {
    let _ = report.send(Err(error));
    Ok(())
}

fn describe(ring: &Ring) -> String {
    let features = ring.features();
    let mut text = features.mode.to_owned();
    for (is_there, name) in [
        (features.restricted, "restricted"),
        (features.fixed_files, "fixed files"),
        (features.fixed_buffers, "fixed buffers"),
        (features.links, "links"),
        (features.near, "workers kept near"),
    ] {
        text.push_str(if is_there { ", " } else { ", no " });
        text.push_str(name);
    }
    text
}
