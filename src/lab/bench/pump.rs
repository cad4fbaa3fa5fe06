//! A front end without a kernel: crowds of readers that ask for one page after the other, always so many at a time.
//!
//! Its device is an eventfd. Where it counts, each request is one read of it and each answer one write(2), as it is one
//! ioctl(2) on cachefiles' device: so the system calls of the process are those of a daemon. Otherwise it only wakes the
//! engine when that has found nobody waiting, and what is left is the engine's own cost.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::machine::{PAGE_BYTES, page};
use crate::engine::stats::Histogram;
use crate::front::{Answer, Caps, Found, FrontEnd, FrontError, NeedRequest, ObjectId, OpenRequest, Outcome, Request, Ticket};
use crate::lab::{LabError, Result, Trying};

/// Longest wait for all answers.
const PATIENCE: Duration = Duration::from_secs(300);
/// The token of every open.
const OPEN_TOKEN: u64 = u64::MAX;
/// A token of a request has the number of its crowd above this bit, and below it the time at which it was asked.
const CROWD_SHIFT: u32 = 56;

/// Readers that ask alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crowd {
    /// Objects that they read in turn; their numbers count from [`Crowd::first`].
    pub(super) objects: u32,
    /// Number of the first object.
    pub(super) first: u32,
    /// Pages of each object; a power of two. Each is asked for once, then all of them again.
    pub(super) pages: u64,
    /// How many requests wait at a time.
    pub(super) readers: u64,
    /// How many there are in all; `None`: until the first crowd is done.
    pub(super) requests: Option<u64>,
}

impl Crowd {
    /// The object and first byte of a request.
    fn place(&self, request: u64) -> (ObjectId, u64) {
        let objects = u64::from(self.objects);
        let object = self.first + u32::try_from(request % objects).unwrap_or(0);
        (ObjectId(object), page(request / objects, self.pages) * PAGE_BYTES)
    }
}

/// How far a crowd is.
#[derive(Default)]
struct Progress {
    /// Readers that are about to ask.
    ready: AtomicU64,
    asked: AtomicU64,
    answered: AtomicU64,
    failed: AtomicU64,
    /// How long answers took, if that is measured. Of one shard: it has one writer.
    took: Histogram,
}

/// Counts something of the thread that answers, at two moments; of one shard.
pub(super) struct Probe {
    read: fn() -> u64,
    /// After so many answers of the first crowd.
    from: u64,
    before: AtomicU64,
    after: AtomicU64,
}

impl Probe {
    /// Compares what `read` gives after `from` answers with what it gives after the last one.
    pub(super) const fn new(read: fn() -> u64, from: u64) -> Self {
        Self { read, from, before: AtomicU64::new(0), after: AtomicU64::new(0) }
    }

    fn look(&self, answered: u64, requests: u64) {
        if answered == self.from {
            self.before.store((self.read)(), Ordering::Relaxed);
        } else if answered == requests {
            self.after.store((self.read)(), Ordering::Relaxed);
        }
    }
}

/// See the module's description. The first crowd is the one that is measured.
pub(super) struct Pump {
    device: EventFd,
    /// Each request is a read of the device, each answer a write to it.
    counts: bool,
    holes_are_absent: bool,
    crowds: Vec<(Crowd, Progress)>,
    /// When it was made, if the time of each answer is to be measured.
    clock: Option<Instant>,
    probe: Option<Probe>,
    opens: Mutex<Vec<Request>>,
    unopened: AtomicU64,
    /// The engine has found nobody.
    idle: AtomicBool,
    /// How many steps are done: each open, then everything.
    steps: Mutex<usize>,
    news: Condvar,
}

/// What a pump is made of.
#[derive(Default)]
pub(super) struct Parts {
    /// Who asks.
    pub(super) crowds: Vec<Crowd>,
    /// The device counts requests and answers.
    pub(super) counts: bool,
    /// Sinks are files that can be asked what they hold.
    pub(super) holes_are_absent: bool,
    /// The time of each answer is measured.
    pub(super) timed: bool,
    /// What else is counted.
    pub(super) probe: Option<Probe>,
}

impl Pump {
    pub(super) fn new(parts: Parts) -> Result<Arc<Self>> {
        let Parts { crowds, counts, holes_are_absent, timed, probe } = parts;
        let mut flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        flags.set(EfdFlags::EFD_SEMAPHORE, counts);
        Ok(Arc::new(Self {
            device: EventFd::from_flags(flags).trying(|| "cannot make an eventfd")?,
            counts,
            holes_are_absent,
            crowds: crowds.into_iter().map(|crowd| (crowd, Progress::default())).collect(),
            clock: timed.then(Instant::now),
            probe,
            opens: Mutex::default(),
            unopened: AtomicU64::new(0),
            idle: AtomicBool::new(true),
            steps: Mutex::default(),
            news: Condvar::new(),
        }))
    }

    /// The pump as the engine sees it; tickets need it shared.
    pub(super) fn front(self: &Arc<Self>) -> Arc<dyn FrontEnd> {
        Arc::new(Front(Arc::clone(self)))
    }

    /// A ticket for an open.
    pub(super) fn open_ticket(self: &Arc<Self>) -> Ticket {
        Ticket::new(Arc::clone(self) as Arc<dyn Answer>, OPEN_TOKEN)
    }

    /// Has objects opened, and waits until they are.
    ///
    /// # Errors
    /// One was refused, or nothing comes.
    pub(super) fn open(&self, opens: Vec<OpenRequest>) -> Result<()> {
        let count = opens.len();
        self.opens.lock().unwrap_or_else(PoisonError::into_inner).extend(opens.into_iter().map(Request::Open));
        self.unopened.store(count as u64, Ordering::SeqCst);
        self.tell(count as u64).trying(|| "cannot ask")?;
        self.wait_for(count)
    }

    /// Lets all crowds ask, and waits until the first one has its answers.
    ///
    /// # Errors
    /// A request of the first crowd failed, or no answer comes.
    pub(super) fn run(&self) -> Result<()> {
        let opened = *self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        for (crowd, progress) in &self.crowds {
            self.ask(progress, crowd.readers).trying(|| "cannot ask")?;
        }
        self.wait_for(opened + 1)?;
        let failed = self.crowds[0].1.failed.load(Ordering::Relaxed);
        if failed > 0 {
            return Err(LabError::Failed(format!("{failed} requests failed")));
        }
        Ok(())
    }

    /// Asks and answers so many requests of the first crowd with no engine between: what this costs is the bench's own part.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn answer_all(self: &Arc<Self>, requests: u64) -> Result<()> {
        self.ask(&self.crowds[0].1, self.crowds[0].0.readers).trying(|| "cannot ask")?;
        for _ in 0..requests {
            if let Some(Request::Need(need)) = self.next() {
                need.ticket.answer(Outcome::Done).trying(|| "cannot answer")?;
            }
        }
        Ok(())
    }

    /// Value that a share of the first crowd's answers took at most, in nanoseconds, if that was measured.
    pub(super) fn took_ns(&self, share: f64) -> u64 {
        self.crowds[0].1.took.percentile_ns(share)
    }

    /// Answers that a crowd has.
    pub(super) fn answered(&self, crowd: usize) -> u64 {
        self.crowds[crowd].1.answered.load(Ordering::Relaxed)
    }

    /// By how much that which is counted has grown.
    pub(super) fn counted(&self) -> Option<u64> {
        let probe = self.probe.as_ref()?;
        Some(probe.after.load(Ordering::Relaxed) - probe.before.load(Ordering::Relaxed))
    }

    fn step(&self) {
        *self.steps.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.news.notify_all();
    }

    fn wait_for(&self, step: usize) -> Result<()> {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.news.wait_timeout_while(steps, PATIENCE, |steps| *steps < step);
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            return Err(LabError::Failed(format!("{} requests had their answer in {} s", self.answered(0), PATIENCE.as_secs())));
        }
        Ok(())
    }

    fn ask(&self, progress: &Progress, readers: u64) -> std::io::Result<()> {
        progress.ready.fetch_add(readers, Ordering::SeqCst);
        self.tell(readers)
    }

    /// Makes the device readable for so many requests.
    fn tell(&self, requests: u64) -> std::io::Result<()> {
        if self.counts {
            self.device.write(requests)?;
        } else if self.idle.load(Ordering::SeqCst) && self.idle.swap(false, Ordering::SeqCst) {
            self.device.write(1)?;
        }
        Ok(())
    }

    /// What is asked next, if anybody is ready. Only the engine's receiving shard calls it.
    fn next(self: &Arc<Self>) -> Option<Request> {
        if self.unopened.load(Ordering::SeqCst) > 0 {
            self.unopened.fetch_sub(1, Ordering::SeqCst);
            return self.opens.lock().unwrap_or_else(PoisonError::into_inner).pop();
        }
        let ready = |(_, progress): &(Crowd, Progress)| progress.ready.load(Ordering::SeqCst) > 0;
        let number = self.crowds.iter().position(ready)?;
        let (crowd, progress) = &self.crowds[number];
        progress.ready.fetch_sub(1, Ordering::SeqCst);
        let request = progress.asked.load(Ordering::Relaxed);
        progress.asked.store(request + 1, Ordering::Relaxed);
        let (object, start) = crowd.place(request);
        let ticket = Ticket::new(Arc::clone(self) as Arc<dyn Answer>, (number as u64) << CROWD_SHIFT | self.now_ns());
        Some(Request::Need(NeedRequest { object, range: start..start + PAGE_BYTES, ticket }))
    }

    /// Time since the beginning, if it is measured.
    fn now_ns(&self) -> u64 {
        self.clock.map_or(0, |clock| u64::try_from(clock.elapsed().as_nanos()).unwrap_or(0))
    }
}

/// See [`Pump::front`].
struct Front(Arc<Pump>);

impl FrontEnd for Front {
    fn name(&self) -> &'static str {
        "pump"
    }

    fn caps(&self) -> Caps {
        let holes_are_absent = self.0.holes_are_absent;
        // Files that are written like cachefiles' descriptors; devices take everything at once.
        Caps { align_bytes: PAGE_BYTES, holes_are_absent, sinks_block: holes_are_absent, ..Caps::default() }
    }

    fn requests(&self) -> BorrowedFd<'_> {
        self.0.device.as_fd()
    }

    fn parse(&self, read: std::result::Result<&[u8], Errno>, requests: &mut Vec<Request>) -> std::result::Result<Found, FrontError> {
        match read {
            Err(Errno::EAGAIN) => return Ok(Found::Nothing),
            Err(errno) => return Err(FrontError::Broken(errno.into())),
            Ok(_) => {}
        }
        let mut next = self.0.next();
        if next.is_none() && !self.0.counts {
            // In this order: who becomes ready after the second look sees that it must wake us.
            self.0.idle.store(true, Ordering::SeqCst);
            next = self.0.next();
        }
        let found = if next.is_some() { Found::Part } else { Found::Nothing };
        requests.extend(next);
        Ok(found)
    }
}

impl Answer for Pump {
    fn answer(&self, token: u64, outcome: Outcome) -> std::io::Result<bool> {
        if token == OPEN_TOKEN {
            self.step();
            return Ok(true);
        }
        let number = usize::try_from(token >> CROWD_SHIFT).unwrap_or(0);
        let (crowd, progress) = &self.crowds[number];
        if outcome != Outcome::Done {
            progress.failed.fetch_add(1, Ordering::Relaxed);
        }
        if self.clock.is_some() {
            progress.took.record(self.now_ns() - (token & ((1 << CROWD_SHIFT) - 1)));
        }
        let answered = progress.answered.fetch_add(1, Ordering::Relaxed) + 1;
        let requests = crowd.requests.unwrap_or(u64::MAX);
        if number == 0
            && let Some(probe) = &self.probe
        {
            probe.look(answered, requests);
        }
        // The reader goes on: as many requests wait as before.
        if answered.saturating_add(crowd.readers) <= requests {
            self.ask(progress, 1)?;
        } else if answered == requests {
            self.step();
        }
        Ok(true)
    }
}
