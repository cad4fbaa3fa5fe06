//! The whole engine with real files: a front end that always keeps a number of requests waiting.
//!
//! Its device is an eventfd that counts: each request is one read of it and each answer one write(2), as it is one
//! ioctl(2) on cachefiles' device. So the system calls of the process are those of a daemon.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use super::engine::EngineFigures;
use super::machine::{PAGE_BYTES, page};
use super::memdisk::own_cpu_ns;
use crate::engine::placement;
use crate::engine::plan::{Completion, Window};
use crate::engine::{Engine, EngineKind, Settings};
use crate::front::{Answer, Caps, FrontEnd, FrontError, NeedRequest, ObjectId, OpenRequest, Outcome, Request, Ticket};
use crate::key::Key;
use crate::lab::{LabError, Result, Trying};
use crate::store::{Blob, FileBlob, SourceFile, SourceMode, Store, StoreError};

/// Requests that wait at a time.
pub(super) const DEPTH: u64 = 32;
/// Pages of the object, 256 MiB; a request each.
const PAGES: u64 = 1 << 16;
/// Longest wait for all answers.
const PATIENCE: Duration = Duration::from_secs(300);
const OBJECT: ObjectId = ObjectId(7);
/// Tokens below it are those of requests for data.
const OPEN_TOKEN: u64 = u64::MAX;

/// The front end, and who answers go to.
struct Pump {
    device: EventFd,
    open: Mutex<Option<Request>>,
    requests: u64,
    asked: AtomicU64,
    answered: AtomicU64,
    failed: AtomicU64,
    /// How many steps are done: the open, everything.
    steps: Mutex<u32>,
    news: Condvar,
}

impl Pump {
    fn new(requests: u64) -> Result<Arc<Self>> {
        let flags = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Arc::new(Self {
            device: EventFd::from_flags(flags).trying(|| "cannot make an eventfd")?,
            open: Mutex::default(),
            requests,
            asked: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            steps: Mutex::default(),
            news: Condvar::new(),
        }))
    }

    fn step(&self) {
        *self.steps.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.news.notify_all();
    }

    fn wait_for(&self, step: u32) -> Result<()> {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.news.wait_timeout_while(steps, PATIENCE, |steps| *steps < step);
        if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
            let answered = self.answered.load(Ordering::Relaxed);
            return Err(LabError::Failed(format!("{answered} of {} requests had their answer in {} s", self.requests, PATIENCE.as_secs())));
        }
        Ok(())
    }

    fn ask(&self, count: u64) -> std::io::Result<()> {
        self.device.write(count).map(drop).map_err(Into::into)
    }
}

/// The pump as the engine sees it; tickets need it shared.
struct Front(Arc<Pump>);

impl FrontEnd for Front {
    fn name(&self) -> &'static str {
        "pump"
    }

    fn caps(&self) -> Caps {
        Caps { align_bytes: PAGE_BYTES, holes_are_absent: true, reopens: true }
    }

    fn requests(&self) -> BorrowedFd<'_> {
        self.0.device.as_fd()
    }

    fn parse(&self, read: std::result::Result<&[u8], Errno>) -> std::result::Result<Option<Request>, FrontError> {
        match read {
            Err(Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(FrontError::Broken(errno.into())),
            Ok(_) => {}
        }
        if self.0.asked.load(Ordering::Relaxed) == 0
            && let Some(open) = self.0.open.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            return Ok(Some(open));
        }
        let token = self.0.asked.fetch_add(1, Ordering::Relaxed);
        let start = page(token) % PAGES * PAGE_BYTES;
        let ticket = Ticket::new(Arc::clone(&self.0) as Arc<dyn Answer>, token);
        Ok(Some(Request::Need(NeedRequest { object: OBJECT, range: start..start + PAGE_BYTES, ticket })))
    }
}

impl Answer for Pump {
    fn answer(&self, token: u64, outcome: Outcome) -> std::io::Result<bool> {
        if token == OPEN_TOKEN {
            self.step();
            return Ok(true);
        }
        if outcome != Outcome::Done {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        let answered = self.answered.fetch_add(1, Ordering::Relaxed) + 1;
        // A reader goes on: as many requests wait as before.
        if answered + DEPTH <= self.requests {
            self.ask(1)?;
        } else if answered == self.requests {
            self.step();
        }
        Ok(true)
    }
}

/// A store of one blob in memory.
#[derive(Debug)]
struct Memory(Arc<dyn Blob>);

impl Store for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn open(&self, _: &Key) -> std::result::Result<Option<Arc<dyn Blob>>, StoreError> {
        Ok(Some(Arc::clone(&self.0)))
    }
}

fn memory_file(len_bytes: u64) -> Result<OwnedFd> {
    let fd = memfd_create(c"bench", MFdFlags::MFD_CLOEXEC).trying(|| "cannot make a file in memory")?;
    let len = i64::try_from(len_bytes).map_err(|_| LabError::Failed("a file too long".into()))?;
    ftruncate(&fd, len).trying(|| "cannot make a file in memory longer")?;
    Ok(fd)
}

/// A source whose pages are there, so that reading it is a copy.
fn source() -> Result<Arc<dyn Store>> {
    let fd = memory_file(0)?;
    let chunk = vec![0xA5; 1 << 20];
    for n in 0..PAGES * PAGE_BYTES / chunk.len() as u64 {
        let offset = i64::try_from(n).unwrap_or(i64::MAX) << 20;
        nix::sys::uio::pwrite(&fd, &chunk, offset).trying(|| "cannot fill a file in memory")?;
    }
    let source = SourceFile::new(fd, SourceMode::Buffered).map_err(|e| LabError::Failed(format!("no source in memory: {e:?}")))?;
    Ok(Arc::new(Memory(Arc::new(FileBlob::new(source)))))
}

/// As `infill serve` has it, but one shard, and only what is asked: every request has a fill of its own.
fn settings() -> Settings {
    Settings {
        shards: 1,
        seats: placement::seats(),
        kind: EngineKind::Auto,
        window: Window::Fixed(PAGE_BYTES),
        completion: Completion::default(),
        slot_bytes: 1 << 20,
        slots: 16,
        workers: 8,
        fd_budget: 1000,
        open_timeout: Duration::from_secs(10),
        request_timeout: Duration::from_secs(30),
        no_room: None,
        tracer: None,
    }
}

/// Lets an engine answer so many requests (at most [`PAGES`]).
///
/// # Errors
/// The engine cannot be had, a request failed, or the answers do not come.
pub(super) fn run(requests: u64) -> Result<EngineFigures> {
    let store = source()?;
    let requests = requests.min(PAGES);
    let pump = Pump::new(requests)?;
    let front: Arc<dyn FrontEnd> = Arc::new(Front(Arc::clone(&pump)));
    let engine = Engine::start(&front, &store, &settings()).map_err(|e| LabError::Failed(e.to_string()))?;
    let ticket = Ticket::new(Arc::clone(&pump) as Arc<dyn Answer>, OPEN_TOKEN);
    let sink = Arc::new(memory_file(PAGES * PAGE_BYTES)?);
    let open = OpenRequest { object: OBJECT, key: Key::new(b"bench", b"blob"), ticket, sink };
    *pump.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(Request::Open(open));
    pump.ask(1).trying(|| "cannot ask")?;
    pump.wait_for(1)?;
    let turns = engine.snapshot().turns;
    let (began, began_cpu_ns) = (Instant::now(), own_cpu_ns()?);
    pump.ask(DEPTH).trying(|| "cannot ask")?;
    pump.wait_for(2)?;
    let (wall_s, cpu_s) = (began.elapsed().as_secs_f64(), (own_cpu_ns()? - began_cpu_ns) as f64 / 1e9);
    let kind = engine.started().kind.to_owned();
    let counts = engine.stop(Duration::from_secs(10), || false).map_err(|e| LabError::Failed(e.to_string()))?;
    let failed = pump.failed.load(Ordering::Relaxed);
    if failed > 0 {
        return Err(LabError::Failed(format!("{failed} of {requests} requests failed")));
    }
    Ok(EngineFigures {
        kind,
        requests,
        requests_per_s: requests as f64 / wall_s,
        requests_per_cpu_s: requests as f64 / cpu_s,
        p50_us: counts.p50_us,
        p99_us: counts.p99_us,
        p999_us: counts.p999_us,
        turns_per_request: (counts.turns - turns) as f64 / requests as f64,
        operations_per_request: counts.operations as f64 / requests as f64,
    })
}
