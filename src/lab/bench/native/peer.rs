//! The other daemons, each a process that watches one file: such that only answer, because all is there, and such that copy what
//! is asked for.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use nix::unistd;
use serde::{Deserialize, Serialize};

use super::bare::Bare;
use super::{Plan, failed};
use crate::engine::placement::{pin, seats};
use crate::front::fanotify::wire::{EVENT_BYTES, Events, PRE_ACCESS, response};
use crate::lab::bench::daemon::Daemon;
use crate::lab::{Result, Trying};
use crate::ops::signals::{Event, Signals};
use crate::range::ByteRange;

/// Unit in which the naive daemon copies.
const CHUNK_BYTES: u64 = 64 << 10;
/// Longest copy at a time.
const COPY_BYTES: u64 = 1 << 20;
/// Events that one read of the naive daemon gives at most.
const EVENTS_PER_READ: usize = 64;

/// How events are read and answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Kind {
    /// read, maybe pread and pwrite, write, close
    Naive,
    /// One ring
    Bare,
    /// One ring whose read never ends
    Multishot,
}

impl Kind {
    pub(super) const ALL: [Self; 3] = [Self::Naive, Self::Bare, Self::Multishot];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Naive => "naive",
            Self::Bare => "bare",
            Self::Multishot => "multishot",
        }
    }
}

/// What such a process did; it is its last line.
#[derive(Clone, Copy, Default, Debug, Serialize, Deserialize)]
pub struct Served {
    /// Events that were answered.
    pub events: u64,
    /// Bytes that were copied.
    pub bytes: u64,
}

/// Flags of such a process.
#[derive(Clone, Debug, clap::Args)]
pub struct PeerArgs {
    /// How events are read and answered
    #[arg(value_enum)]
    kind: Kind,
    /// What is watched
    file: PathBuf,
    /// Copy what is asked for from this file; without it all is there
    #[arg(long)]
    source: Option<PathBuf>,
    /// Threads of the naive daemon; one stays on the CPU that a shard would have
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

/// Has such a process watch `file`.
pub(super) fn start(plan: &Plan, kind: Kind, file: &Path, source: Option<&Path>, threads: usize) -> Result<Daemon> {
    let mut command = Command::new(&plan.infill);
    command.args(["bench", "native-peer", kind.name()]).arg(file).args(["--threads", &threads.to_string()]);
    if let Some(source) = source {
        command.arg("--source").arg(source);
    }
    let mut daemon = Daemon::start(command, file)?;
    daemon.await_ready()?;
    Ok(daemon)
}

/// Ends it. Nobody may read the file any more.
pub(super) fn end(mut daemon: Daemon) -> Result<Served> {
    daemon.end(true)?;
    serde_json::from_str(&daemon.last_line()).map_err(|error| failed(format!("a daemon did not say what it did: {error}")))
}

/// What threads share.
struct Shared {
    group: Fanotify,
    copy: Option<Copier>,
    events: AtomicU64,
}

/// Is such a process, until it is told to end.
///
/// # Errors
/// The file cannot be watched.
pub fn run(args: &PeerArgs) -> Result<()> {
    let signals = Signals::block().trying(|| "cannot receive signals")?;
    let what = || format!("cannot watch {}", args.file.display());
    // Before it is marked: what is written by it is not asked for.
    let sink = File::options().read(true).write(true).open(&args.file).trying(what)?;
    let blocks = if args.kind == Kind::Naive { InitFlags::empty() } else { InitFlags::FAN_NONBLOCK };
    let flags = InitFlags::FAN_CLASS_PRE_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_UNLIMITED_QUEUE | blocks;
    let group = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_LARGEFILE | EventFFlags::O_CLOEXEC).trying(what)?;
    group.mark(MarkFlags::FAN_MARK_ADD, MaskFlags::from_bits_retain(PRE_ACCESS), &sink, None::<&Path>).trying(what)?;
    let copy =
        args.source.as_ref().map(|source| Copier::new(source, sink).trying(|| format!("cannot read {}", source.display()))).transpose()?;
    let shared: &'static Shared = Box::leak(Box::new(Shared { group, copy, events: AtomicU64::new(0) }));
    let (kind, threads) = (args.kind, args.threads);
    for _ in 0..threads {
        thread::spawn(move || {
            if threads == 1
                && let Some(seat) = seats().first()
            {
                pin(&seat.near);
            }
            if let Err(error) = shared.serve(kind) {
                // Its readers would wait for ever.
                eprintln!("infill: events are not answered any more: {error}");
                std::process::exit(1);
            }
        });
    }
    println!("infill: ready");
    let _ = io::stdout().flush();
    while signals.next() != Some(Event::Stop) {
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait is looked at like any other.
        let _ = poll(&mut fds, PollTimeout::NONE);
    }
    let bytes = shared.copy.as_ref().map_or(0, |copy| copy.bytes.load(Ordering::Relaxed));
    let served = Served { events: shared.events.load(Ordering::Relaxed), bytes };
    println!("{}", serde_json::to_string(&served).unwrap_or_default());
    Ok(())
}

impl Shared {
    fn serve(&self, kind: Kind) -> io::Result<()> {
        match kind {
            Kind::Naive => self.answer_one_by_one(),
            Kind::Bare | Kind::Multishot => match Bare::new(&self.group, kind == Kind::Multishot, &self.events)?.serve()? {},
        }
    }

    fn answer_one_by_one(&self) -> io::Result<()> {
        let mut buffer = [0; EVENTS_PER_READ * EVENT_BYTES];
        let mut bytes = self.copy.as_ref().map_or_else(Vec::new, |_| vec![0; COPY_BYTES as usize]);
        loop {
            let len = unistd::read(&self.group, &mut buffer)?;
            for event in Events::new(&buffer[..len]) {
                let Some(fd) = event.fd else { continue };
                if let (Some(copy), Some(range)) = (&self.copy, event.range) {
                    copy.bring(&range, &mut bytes)?;
                }
                unistd::write(&self.group, &response(fd, Ok(())))?;
                unistd::close(fd)?;
                self.events.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Copies what is missing, in whole chunks.
struct Copier {
    source: File,
    sink: File,
    len_bytes: u64,
    /// Chunks that are there.
    present: Vec<AtomicBool>,
    bytes: AtomicU64,
}

impl Copier {
    fn new(source: &Path, sink: File) -> io::Result<Self> {
        let source = File::open(source)?;
        let len_bytes = source.metadata()?.len();
        let present = (0..len_bytes.div_ceil(CHUNK_BYTES)).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { source, sink, len_bytes, present, bytes: AtomicU64::new(0) })
    }

    fn bring(&self, range: &ByteRange, buffer: &mut [u8]) -> io::Result<()> {
        let is_there = |chunk: u64| usize::try_from(chunk).is_ok_and(|chunk| self.present[chunk].load(Ordering::Acquire));
        let end = range.end.min(self.len_bytes).div_ceil(CHUNK_BYTES);
        let mut chunk = range.start / CHUNK_BYTES;
        while chunk < end {
            let longest = (chunk + COPY_BYTES / CHUNK_BYTES).min(end);
            let missing = (chunk..longest).take_while(|chunk| !is_there(*chunk)).count() as u64;
            if missing > 0 {
                self.copy(chunk..chunk + missing, buffer)?;
            }
            chunk += missing.max(1);
        }
        Ok(())
    }

    fn copy(&self, chunks: std::ops::Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = chunks.start * CHUNK_BYTES..(chunks.end * CHUNK_BYTES).min(self.len_bytes);
        let len = usize::try_from(bytes.end - bytes.start).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.source.read_exact_at(&mut buffer[..len], bytes.start)?;
        self.sink.write_all_at(&buffer[..len], bytes.start)?;
        self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        for chunk in &self.present[usize::try_from(chunks.start).unwrap_or(0)..][..chunks.count()] {
            chunk.store(true, Ordering::Release);
        }
        Ok(())
    }
}

/// Makes a file without data, as long as `source` in whole pages.
pub(super) fn sparse_twin(source: &Path, file: &Path) -> Result<()> {
    let len_bytes = fs::metadata(source).trying(|| format!("cannot look at {}", source.display()))?.len();
    crate::lab::disk::sparse(file, len_bytes.next_multiple_of(super::load::PAGE_BYTES))
}
