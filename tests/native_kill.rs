//! The fanotify front end under kill -9, on this machine's own kernel: whatever the daemon is doing when it dies, no reader gets a
//! wrong byte, none gets an error, and none waits for ever. Needs what `tests/native.rs` needs.
//!
//! The daemon is this program again, as a test that does nothing when it is run as one ([`daemon`]). What must outlive it is
//! held by a real `infill keeper`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::BuildHasher;
use std::io::{BufRead, BufReader, Lines};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use infill::engine::plan::{Complete, Completion, Window};
use infill::engine::{Engine, EngineKind, Settings};
use infill::front::fanotify::Group;
use infill::front::{FrontEnd, MESSAGE_MAX_BYTES, ObjectId, Outcome, Request};
use infill::key::Key;
use infill::lab::tree::{Content, Manifest};
use infill::lab::{checksum, demo};
use infill::mount::{self, Blobs, Mounted, Source};
use infill::ops::keeper::Keeper;
use infill::store::dir::DirStore;
use infill::store::{SourceMode, Store};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

#[path = "common/settings.rs"]
mod common;

/// Where the daemon works; it is one if this is set.
const DIR: &str = "INFILL_TEST_DAEMON";
/// Where its store is.
const STORE: &str = "INFILL_TEST_STORE";
/// It says so when it serves.
const READY: &str = "ready";
/// It says so how many events the one before it has left.
const UNANSWERED: &str = "unanswered: ";
/// `blocking`, or a ring.
const KIND: &str = "INFILL_TEST_ENGINE";
/// Event loops.
const SHARDS: usize = 2;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a reader may wait for all daemons together. A machine that is slow needs some of it for each.
const HANG: Duration = Duration::from_secs(240);
/// How often a daemon is killed.
const KILLS: usize = 120;
/// Readers at a time.
const READERS: usize = 8;
/// Longest life of a daemon in the kill loop, counted from its start or from when it serves.
const LIFE_MAX_MS: u64 = 60;

fn settings() -> Settings {
    let kind = if std::env::var(KIND).is_ok_and(|kind| kind == "blocking") { EngineKind::Blocking } else { EngineKind::Uring };
    let completion = Completion { when: Complete::Off, ..Completion::default() };
    let window = Window::Fixed(64 << 10);
    Settings { window, completion, slot_bytes: 256 << 10, slots: 16, workers: 4, leave_rest: true, ..common::settings(kind, SHARDS) }
}

/// An image, its blob, and what it must read as.
struct Data {
    dir: TempDir,
    manifest: Manifest,
}

impl Data {
    /// `None`: not on this machine, as it says.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let marked = Group::new().and_then(|group| group.can_watch(dir.path()).unwrap());
        if let Err(errno) = marked {
            println!("not run: no pre-content events: {errno}");
            return None;
        }
        let manifest = demo::prepare(&dir.path().join("store"), &dir.path().join("scratch")).unwrap();
        Some(Self { dir, manifest })
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }
}

/// A place for daemons, one after the other, and the keeper that outlives them.
struct Host<'a> {
    data: &'a Data,
    dir: TempDir,
    keeper: Child,
}

impl<'a> Host<'a> {
    fn new(data: &'a Data) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let mut keeper = Command::new(env!("CARGO_BIN_EXE_infill"));
        let keeper = keeper.arg("keeper").stdin(OwnedFd::from(listener)).stdout(Stdio::null()).spawn().unwrap();
        Self { data, dir, keeper }
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn start(&self, kind: &str) -> Daemon {
        let mut command = Command::new("/proc/self/exe");
        command.args(["--exact", "daemon", "--nocapture", "--test-threads=1"]);
        command.env(DIR, self.dir.path()).env(STORE, self.data.store()).env(KIND, kind);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        Daemon { child, lines, unanswered: 0, serves: false }
    }

    /// Reads a whole tree in a random order.
    fn read_all(&self) {
        let random = RandomState::new();
        let mut entries: Vec<_> = self.data.manifest.entries.iter().collect();
        entries.sort_by_cached_key(|entry| random.hash_one(&entry.path));
        for entry in entries {
            if let Content::File { len_bytes, sum } = entry.content {
                let bytes = std::fs::read(self.at().join(&entry.path)).unwrap();
                assert_eq!((bytes.len() as u64, checksum(&bytes)), (len_bytes, sum), "{}", entry.path);
            }
        }
    }

    /// Has the kernel forget what it cached of some files, so that it asks again.
    fn drop_caches(&self, n: usize) {
        for entry in self.data.manifest.entries.iter().skip(n).step_by(97) {
            if let Content::File { len_bytes: 1.., .. } = entry.content {
                let file = File::open(self.at().join(&entry.path)).unwrap();
                posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            }
        }
    }

    /// Ends the keeper: nobody has the group then but the daemon.
    fn end_keeper(&mut self) {
        self.keeper.kill().unwrap();
        self.keeper.wait().unwrap();
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.at(), nix::mount::MntFlags::MNT_DETACH);
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// A daemon, to be killed.
struct Daemon {
    child: Child,
    lines: Lines<BufReader<ChildStderr>>,
    /// Events that the one before had left.
    unanswered: usize,
    serves: bool,
}

impl Daemon {
    /// Until it serves.
    fn wait(&mut self) {
        while !self.serves {
            let line = self.lines.next().expect("the daemon has ended").unwrap();
            self.understand(&line);
        }
    }

    fn understand(&mut self, line: &str) {
        match line.strip_prefix(UNANSWERED) {
            Some(unanswered) => self.unanswered = unanswered.parse().unwrap(),
            None => assert_eq!(line, READY, "the daemon says something else"),
        }
        self.serves |= line == READY;
    }

    /// With SIGKILL. Gives how many events the one before had left.
    fn kill(&mut self) -> usize {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        while let Some(line) = self.lines.next() {
            self.understand(&line.unwrap());
        }
        std::mem::take(&mut self.unanswered)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `test`, and ends everything if that hangs.
fn in_time(test: impl FnOnce()) {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let began = Instant::now();
            while !ended.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(100));
                if began.elapsed() > HANG {
                    eprintln!("readers hang; giving up. A mount and a keeper may be left behind");
                    std::process::abort();
                }
            }
        });
        let _ends = Ends(&ended);
        test();
    });
}

/// Says so when it is dropped, also by a panic.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// No test: what the tests start, to be killed.
#[test]
fn daemon() {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    // Killed with the tests, however those end.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).unwrap();
    let store_dir = PathBuf::from(std::env::var_os(STORE).unwrap());
    let store: Arc<dyn Store> = Arc::new(DirStore::new("dir:test".into(), &store_dir, SourceMode::Buffered).unwrap());
    let keeper = Keeper::find(&dir.join("s")).unwrap().unwrap();
    let blobs = match keeper.take().unwrap() {
        None => {
            let blobs = Blobs::new(&dir.join("cache"), SHARDS).unwrap();
            keeper.keep(blobs.bag().unwrap().as_fd()).unwrap();
            blobs
        }
        Some(bag) => {
            let (blobs, restored) = Blobs::restore(&dir.join("cache"), bag).unwrap();
            assert!(restored.lost.is_empty() && restored.groups == blobs.fronts().len(), "{restored:?}");
            eprintln!("{UNANSWERED}{}", restored.unanswered);
            blobs
        }
    };
    let blobs = Arc::new(blobs);
    let engine = Engine::start_all(&blobs.fronts(), &store, &settings()).unwrap();
    let entry = engine.entry();
    let failed = blobs.resume(&entry, &store, PATIENCE);
    assert!(failed.is_empty(), "{failed:?}");
    let attach = |name: &str, whole| blobs.attach(&entry, &*store, &Key::new(b"dom", name.as_bytes()), whole, PATIENCE).unwrap();
    let (image, blob) = (attach(demo::IMAGE, true), attach(demo::BLOB, false));
    let at = dir.join("mnt");
    if mount::mounted(&dir.join("cache")).unwrap().iter().all(|mount| mount.at != at) {
        let source = Source { image: image.file().path().to_owned(), devices: vec![blob.file().path().to_owned()], direct: false };
        mount::mount(&source, &at).unwrap();
    }
    eprintln!("{READY}");
    loop {
        std::thread::park();
    }
}

#[test]
fn no_reader_sees_a_daemon_die() {
    let Some(data) = Data::new() else { return };
    let (mut kills, mut unanswered, mut rounds) = (0, 0, 0);
    let random = RandomState::new();
    let life = |n: usize| Duration::from_micros(random.hash_one(n) % (LIFE_MAX_MS * 1000));
    let began = Instant::now();
    in_time(|| {
        while kills < KILLS {
            // With everything missing again; and a ring or threads in turn.
            let kind = if rounds % 2 == 1 { "blocking" } else { "uring" };
            let host = Host::new(&data);
            let mut daemon = host.start(kind);
            daemon.wait();
            let left = AtomicUsize::new(READERS);
            std::thread::scope(|scope| {
                spawn_readers(scope, &host, &left);
                while left.load(Ordering::Acquire) > 0 {
                    // Half of them are killed before they serve.
                    if kills % 2 == 0 {
                        daemon.wait();
                        host.drop_caches(kills % 97);
                    }
                    std::thread::sleep(life(kills));
                    unanswered += daemon.kill();
                    daemon = host.start(kind);
                    kills += 1;
                }
            });
            daemon.wait();
            host.read_all();
            daemon.kill();
            rounds += 1;
        }
    });
    println!("{kills} kills in {rounds} rounds and {:?}; {unanswered} events were left to the next one", began.elapsed());
}

/// Counts down when it is dropped.
struct Leaves<'a>(&'a AtomicUsize);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Starts all readers; `left` counts those that have not ended.
fn spawn_readers<'scope>(scope: &'scope std::thread::Scope<'scope, '_>, host: &'scope Host<'_>, left: &'scope AtomicUsize) {
    for _ in 0..READERS {
        scope.spawn(move || {
            // Also by a panic, which ends the test.
            let _left = Leaves(left);
            host.read_all();
        });
    }
}

/// Events of a store's file, which hold everything up that reads it.
struct Hold {
    group: Group,
    requests: Vec<Request>,
}

impl Hold {
    fn new(file: &Path) -> Self {
        let (group, file) = (Group::new().unwrap(), File::open(file).unwrap());
        group.mark(file.as_fd(), ObjectId(0), file.metadata().unwrap().len()).unwrap();
        Self { group, requests: Vec::new() }
    }

    /// Waits until somebody is held up. The first page is not: a daemon that opens the file looks at it.
    fn wait(&mut self) {
        while self.requests.is_empty() {
            let mut fds = [PollFd::new(self.group.requests(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap(), 1, "nobody reads the store");
            let (mut buffer, mut requests) = ([0; MESSAGE_MAX_BYTES], Vec::new());
            let len = nix::unistd::read(self.group.requests(), &mut buffer).unwrap();
            self.group.parse(Ok(&buffer[..len]), &mut requests).unwrap();
            for request in requests {
                match request {
                    Request::Need(need) if need.range.end <= 4096 => drop(need.ticket.answer(Outcome::Done).unwrap()),
                    request => self.requests.push(request),
                }
            }
        }
    }

    /// Lets everybody go on who is held up. Nobody waits for some of them any more.
    fn let_go(&mut self) {
        for request in self.requests.drain(..) {
            let Request::Need(need) = request else { panic!("{request:?}") };
            need.ticket.answer(Outcome::Done).unwrap();
        }
    }
}

/// Killed for certain after an event was read and before it is answered, by a store that does not give its bytes.
#[test]
fn what_was_read_and_not_answered_is_answered_by_the_next_daemon() {
    let Some(data) = Data::new() else { return };
    in_time(|| {
        for kind in ["uring", "blocking"] {
            let mut host = Host::new(&data);
            let mut daemon = host.start(kind);
            daemon.wait();
            daemon.kill();
            // Who opens it from now on is held up.
            let mut hold = Hold::new(&data.store().join(demo::BLOB));
            daemon = host.start(kind);
            let left = AtomicUsize::new(READERS);
            std::thread::scope(|scope| {
                spawn_readers(scope, &host, &left);
                // Again and again with the same events: the second daemon dies with those of the first.
                for _ in 0..3 {
                    hold.wait();
                    daemon.kill();
                    hold.let_go();
                    daemon = host.start(kind);
                }
                hold.wait();
                assert_eq!(left.load(Ordering::Acquire), READERS, "somebody went on without data");
                drop(hold);
                daemon.wait();
                println!("{kind}: {} events were left by the first ones", daemon.unanswered);
                assert!(daemon.unanswered > 0);
            });
            // Without anybody who holds the groups, the mount is known to be bad.
            assert_eq!(poisoned(&host), [host.at()]);
            host.end_keeper();
            daemon.kill();
            assert_eq!(poisoned(&host), [host.at()]);
            nix::mount::umount(&host.at()).unwrap();
            assert_eq!(poisoned(&host), [] as [PathBuf; 0]);
        }
    });
}

fn poisoned(host: &Host<'_>) -> Vec<PathBuf> {
    mount::mounted(&host.dir.path().join("cache")).unwrap().into_iter().map(|Mounted { at, .. }| at).collect()
}
