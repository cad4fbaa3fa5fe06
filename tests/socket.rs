//! The whole engine, with real I/O, against a kernel on a socket: right bytes, no reader left hanging.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use infill::engine::placement::seats;
use infill::engine::stats::Snapshot;
use infill::engine::{Engine, EngineError, EngineKind, Settings};
use infill::front::cachefiles::wire::{self, Body, Message};
use infill::front::sim::rng::Rng;
use infill::front::sim::socket::{ReadError, SocketFront, SocketKernel};
use infill::front::{FrontEnd, unanswered_tickets};
use infill::key::Key;
use infill::store::dir::DirStore;
use infill::store::{SourceMode, Store, resident};
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Whence, lseek};
use tempfile::TempDir;

#[path = "common/settings.rs"]
mod common;

const PAGE: u64 = 4096;
/// Readers at a time.
const READERS: u64 = 8;
/// Random ranges that each of them reads.
const RANGES: u64 = 40;
/// Times that a daemon takes over from another while readers wait.
const HANDOVERS: u32 = 3;
/// How long a stop may take to finish what has begun.
const DRAIN: Duration = Duration::from_secs(10);

/// A directory of blobs with contents by chance, some of odd length.
struct Blobs {
    dir: TempDir,
    all: Vec<(Key, Vec<u8>)>,
}

impl Blobs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = Rng::new(1);
        let all = [0, 1, 4096, 100_001, 3_000_000].map(|len| {
            let bytes: Vec<u8> = (0..len / 8 + 1).flat_map(|_| rng.next().to_ne_bytes()).take(len).collect();
            let name = format!("blob{len}");
            std::fs::write(dir.path().join(&name), &bytes).unwrap();
            (Key::new(b"dom", name.as_bytes()), bytes)
        });
        Self { dir, all: all.into() }
    }

    fn store(&self, mode: SourceMode) -> Arc<dyn Store> {
        Arc::new(DirStore::new("dir:test".into(), self.dir.path(), mode).unwrap())
    }
}

fn settings(kind: EngineKind, shards: usize) -> Settings {
    Settings { seats: seats(), ..common::settings(kind, shards) }
}

/// Starts an engine on the daemon's end of a socket; `None` if this machine has no io_uring for us.
fn start(kernel: &SocketKernel, end: std::os::fd::OwnedFd, store: &Arc<dyn Store>, settings: &Settings) -> Option<Engine> {
    let front: Arc<dyn FrontEnd> = Arc::new(SocketFront::from_fd(end, kernel.dir()).unwrap());
    match Engine::start(&front, store, settings) {
        Err(EngineError::NoRing(why)) => {
            println!("not run: no io_uring: {why}");
            None
        }
        result => Some(result.unwrap()),
    }
}

/// A kernel, and what its daemons are made of.
struct Case {
    blobs: Blobs,
    store: Arc<dyn Store>,
    settings: Settings,
    kernel: SocketKernel,
}

impl Case {
    /// The longest blob, open.
    fn open_last(&self) -> (u32, &(Key, Vec<u8>)) {
        let blob = self.blobs.all.last().unwrap();
        (self.kernel.open(&blob.0).unwrap(), blob)
    }

    /// The daemon after one that has ended; it gets what that one left unanswered.
    fn next(&self) -> Engine {
        let (end, send_again) = self.kernel.restart().unwrap();
        let engine = start(&self.kernel, end, &self.store, &self.settings).unwrap();
        send_again().unwrap();
        engine
    }
}

/// Each kind of engine with each way to read a source. The engine that the test gives back is ended, and must have left
/// nothing.
fn for_each_engine(test: impl Fn(&Case, Engine) -> Engine) {
    for kind in [EngineKind::Uring, EngineKind::Blocking] {
        for (mode, shards) in [(SourceMode::Auto, 1), (SourceMode::Direct, 1), (SourceMode::Buffered, 2), (SourceMode::Mmap, 2)] {
            println!("{kind:?} {mode:?}, {shards} shards");
            let (blobs, settings, sinks) = (Blobs::new(), settings(kind, shards), tempfile::tempdir().unwrap());
            let (kernel, end) = SocketKernel::new(sinks.path()).unwrap();
            let store = blobs.store(mode);
            let Some(first) = start(&kernel, end, &store, &settings) else { continue };
            let case = Case { blobs, store, settings, kernel };
            let stats = test(&case, first).stop(DRAIN, || false).unwrap();
            assert_eq!(case.kernel.violations(), [""; 0]);
            assert_eq!(unanswered_tickets(), 0);
            println!("{stats:?}");
        }
    }
}

/// Reads a range of an object and compares; the range is cut to the blob's length.
fn read_and_compare(kernel: &SocketKernel, object: u32, bytes: &[u8], start: u64, len: u64, read_ahead: u64) {
    let len_bytes = bytes.len() as u64;
    let range = start.min(len_bytes)..(start + len).min(len_bytes);
    let got = kernel.read(object, &range, read_ahead).unwrap();
    let want = &bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
    assert!(got == want, "wrong bytes in {range:?}");
}

fn read_at_random(kernel: &SocketKernel, objects: &[(u32, &[u8])], seed: u64) {
    let mut rng = Rng::new(seed);
    for _ in 0..RANGES {
        let (object, bytes) = rng.pick(objects);
        let start = rng.below(bytes.len() as u64 + 1);
        let len = rng.pick(&[1, PAGE, 10 * PAGE, 1 << 20]);
        let read_ahead = rng.pick(&[PAGE, 32 * PAGE]);
        read_and_compare(kernel, object, bytes, start, len, read_ahead);
    }
}

/// The sink holds the blob, then zeros up to the page's end, and nothing behind it.
fn assert_sink_is_whole(sink: &File, bytes: &[u8]) {
    let padded = bytes.len().next_multiple_of(4096);
    assert_eq!(sink.metadata().unwrap().len(), padded as u64, "written beyond the end");
    let mut got = vec![0xff; padded];
    sink.read_exact_at(&mut got, 0).unwrap();
    assert!(got[..bytes.len()] == *bytes && got[bytes.len()..].iter().all(|&byte| byte == 0));
}

#[test]
fn readers_get_the_right_bytes() {
    for_each_engine(|case, engine| {
        let kernel = &case.kernel;
        let objects: Vec<(u32, &[u8])> = case.blobs.all.iter().map(|(key, bytes)| (kernel.open(key).unwrap(), &bytes[..])).collect();
        let missing = kernel.open(&Key::new(b"dom", b"missing"));
        assert_eq!(missing, Err(ReadError::Errno(Errno::ENOENT)));
        thread::scope(|scope| {
            for seed in 0..READERS {
                let objects = &objects;
                scope.spawn(move || read_at_random(kernel, objects, seed));
            }
        });
        for &(object, bytes) in &objects {
            read_and_compare(kernel, object, bytes, 0, u64::MAX / 2, 32 * PAGE);
            assert_sink_is_whole(&kernel.sink(object).unwrap(), bytes);
            // Beyond the end there is nothing to bring, but there is an answer.
            let end = (bytes.len() as u64).next_multiple_of(PAGE);
            kernel.demand(object, &(end..end + PAGE)).unwrap();
            kernel.demand(object, &(0..u64::MAX)).unwrap();
            kernel.close(object).unwrap();
        }
        engine
    });
}

/// Reads one blob through an engine with `--source auto`, and gives the statistics.
fn read_whole(dir: &TempDir, name: &str, bytes: &[u8], kind: EngineKind) -> Option<Snapshot> {
    let store: Arc<dyn Store> = Arc::new(DirStore::new("dir:test".into(), dir.path(), SourceMode::Auto).unwrap());
    let sinks = tempfile::tempdir().unwrap();
    let (kernel, end) = SocketKernel::new(sinks.path()).unwrap();
    let engine = start(&kernel, end, &store, &settings(kind, 1))?;
    let object = kernel.open(&Key::new(b"", name.as_bytes())).unwrap();
    read_and_compare(&kernel, object, bytes, 0, u64::MAX / 2, 32 * PAGE);
    assert_sink_is_whole(&kernel.sink(object).unwrap(), bytes);
    kernel.close(object).unwrap();
    let stats = engine.stop(DRAIN, || false).unwrap();
    assert_eq!(kernel.violations(), [""; 0]);
    Some(stats)
}

#[test]
fn a_warm_source_is_mapped_a_cold_one_read_and_a_hole_neither() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blob");
    let mut bytes: Vec<u8> = (0..2_000_001_u64).map(|i| (i ^ i >> 9) as u8).collect();
    bytes[700_000..1_500_000].fill(0);
    let file = File::create(&path).unwrap();
    file.write_all_at(&bytes[..700_000], 0).unwrap();
    file.write_all_at(&bytes[1_500_000..], 1_500_000).unwrap();
    file.sync_all().unwrap();
    for kind in [EngineKind::Uring, EngineKind::Blocking] {
        // The data in front of the hole; the file system may keep part of the hole as data.
        let is_warm = || resident::is_resident(&file, 0, 700_000);
        assert_eq!(std::fs::read(&path).unwrap().len(), bytes.len());
        match (is_warm(), read_whole(&dir, "blob", &bytes, kind)) {
            (Ok(true), Some(stats)) => {
                assert!(stats.bytes_mapped >= 1_100_000 && stats.bytes_direct + stats.bytes_buffered < 200_000, "{stats:?}");
            }
            (warm, stats) => println!("not run with {kind:?}: in memory {warm:?}, engine {}", stats.is_some()),
        }
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let cold = !is_warm().unwrap_or(false);
        let Some(stats) = read_whole(&dir, "blob", &bytes, kind) else { continue };
        if cold {
            assert!(stats.bytes_mapped == 0 && stats.bytes_direct + stats.bytes_buffered >= 1_200_000, "{stats:?}");
        }
        if lseek(&file, 0, Whence::SeekHole).is_ok_and(|hole| hole < 1_000_000) {
            assert!((500_000..=800_000).contains(&stats.bytes_zero), "{stats:?}");
        }
        println!("{kind:?}, cold {cold}: {stats:?}");
    }
}

#[test]
fn a_new_daemon_takes_over_while_readers_wait() {
    for_each_engine(|case, engine| {
        let (object, (_, bytes)) = case.open_last();
        let done = AtomicU64::new(0);
        let last = thread::scope(|scope| {
            for seed in 0..READERS {
                let (kernel, done) = (&case.kernel, &done);
                scope.spawn(move || {
                    read_at_random(kernel, &[(object, bytes)], seed);
                    done.fetch_add(1, Ordering::Release);
                });
            }
            (0..HANDOVERS).fold(engine, |engine, _| {
                thread::sleep(Duration::from_millis(10));
                engine.stop(DRAIN, || false).unwrap();
                case.next()
            })
        });
        assert_eq!(done.load(Ordering::Acquire), READERS);
        last
    });
}

#[test]
fn a_stop_without_patience_leaves_nobody_hanging() {
    for_each_engine(|case, engine| {
        let (object, (_, bytes)) = case.open_last();
        let pages = bytes.len() as u64 / PAGE;
        thread::scope(|scope| {
            for n in 0..4 * READERS {
                scope.spawn(move || {
                    let start = n * 37 % pages * PAGE;
                    case.kernel.demand(object, &(start..start + PAGE)).unwrap();
                });
            }
            engine.stop(Duration::ZERO, || false).unwrap();
            // What the daemon did not read any more is the next one's.
            case.next()
        })
    });
}

#[test]
fn fault_truncated_source_is_an_error_and_never_a_wrong_byte() {
    for_each_engine(|case, engine| {
        let kernel = &case.kernel;
        let (object, (key, bytes)) = case.open_last();
        let half = bytes.len() as u64 / 2;
        let path = case.blobs.dir.path().join(str::from_utf8(key.name()).unwrap());
        OpenOptions::new().write(true).open(path).unwrap().set_len(half).unwrap();
        let lost = kernel.read(object, &(half + PAGE..half + 2 * PAGE), PAGE);
        assert_eq!(lost, Err(ReadError::Errno(Errno::EIO)));
        // What is left of it may be served, but only as it was.
        match kernel.read(object, &(0..PAGE), PAGE) {
            Ok(got) => assert!(got == bytes[..got.len()]),
            Err(error) => assert_eq!(error, ReadError::Errno(Errno::EIO)),
        }
        engine
    });
}

#[test]
fn fault_noise_and_closes_are_survived() {
    for_each_engine(|case, engine| {
        let kernel = &case.kernel;
        let (key, bytes) = &case.blobs.all[3];
        for noise in [&[0xff][..], &[0xff; 16], &[0xff; wire::MSG_MAX_BYTES]] {
            kernel.send_noise(noise).unwrap();
        }
        for body in [Body::Read(0..PAGE), Body::Close] {
            kernel.send_noise(&wire::encode(&Message { msg_id: 77_777, object_id: u32::MAX, body })).unwrap();
        }
        for _ in 0..20 {
            let object = kernel.open(key).unwrap();
            thread::scope(|scope| {
                // Closed while it is read: the reader gets its bytes or an error, at once.
                let reader = scope.spawn(|| kernel.read(object, &(0..bytes.len() as u64), 4 * PAGE));
                kernel.close(object).unwrap();
                if let Ok(got) = reader.join().unwrap() {
                    assert!(got == *bytes);
                }
            });
        }
        let object = kernel.open(key).unwrap();
        read_and_compare(kernel, object, bytes, 0, u64::MAX / 2, 32 * PAGE);
        engine
    });
}
