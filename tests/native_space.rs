//! The space of the cache of images that are mounted from files, on this machine's own kernel: what nobody has mounted goes when there
//! is too much of it, what somebody has never does, and whatever became of the cache's files, nobody gets a wrong byte. Needs
//! what `tests/native.rs` needs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs::{self, File, FileTimes};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use infill::engine::room::NoRoom;
use infill::engine::{EngineKind, Settings};
use infill::front::cachefiles::CullLimits;
use infill::front::fanotify::BlobFile;
use infill::lab::tree::Manifest;
use infill::mount::{AttachError, BlobCache, Pinned};
use infill::ops::space::{self, Statistics, Steward};
use infill::store::SourceMode;
use nix::fcntl::{FallocateFlags, fallocate};

#[path = "common/native.rs"]
mod common;
use common::{Fs, Host, PATIENCE, Served};

/// Length of a blob; not of whole pages.
const LEN_BYTES: usize = (1 << 20) - 100;
/// What it takes in the cache: its pages, and those of its map.
const TAKES_BYTES: u64 = (1 << 20) + 3 * 4096;
/// How long an attach and a removal race.
const RACE: Duration = Duration::from_secs(5);

fn bytes_of(n: usize) -> Vec<u8> {
    (0..LEN_BYTES).map(|at| (at / 7 + n * 31 + at % 251) as u8 | 1).collect()
}

/// With so many blobs, and no image.
fn with_blobs(blobs: usize) -> Option<Host> {
    Host::new(Fs::Here, |host| {
        (0..blobs).for_each(|n| fs::write(host.path("store").join(format!("blob{n}")), bytes_of(n)).unwrap());
        Manifest::default()
    })
}

/// The files in the cache, maps left out.
fn files(host: &Host) -> Vec<PathBuf> {
    let entries = fs::read_dir(host.path("cache/blobs")).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_none()).collect()
}

fn used_bytes(host: &Host) -> u64 {
    fs::read_dir(host.path("cache/blobs")).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

/// Blobs that are served, and who makes room for them.
struct Tended {
    served: Served,
    steward: Steward,
    no_room: NoRoom,
}

impl Tended {
    fn start(host: &Host, budget_bytes: Option<u64>) -> Self {
        let no_room = NoRoom::new().unwrap();
        let settings = Settings { no_room: Some(no_room.clone()), ..common::settings(EngineKind::Uring, 1) };
        let served = Served::start(host, host.store(SourceMode::Buffered), &settings);
        served.blobs.ring_for_room(no_room.clone());
        let settings = space::Settings { cache_dir: host.path("cache"), limits: CullLimits::default(), budget_bytes };
        let cache = Arc::clone(&served.blobs);
        let steward = Steward::start(settings, move || BlobCache::new(cache), no_room.clone()).unwrap();
        Self { served, steward, no_room }
    }

    /// Makes all of a blob ready, and looks whether it is that.
    fn attach(&self, n: usize) -> Result<Pinned, AttachError> {
        let pinned = self.served.attach(&format!("blob{n}"), true)?;
        expect_bytes(&pinned, n);
        Ok(pinned)
    }

    fn release(&self) -> usize {
        self.served.release()
    }

    /// Has the steward look now, and waits until it has removed what it will.
    fn look_until(&self, done: impl Fn(Statistics) -> bool) -> Statistics {
        let began = Instant::now();
        loop {
            // More often would mean that the file system takes no data.
            std::thread::sleep(Duration::from_millis(1100));
            let _ = self.no_room.ring();
            let statistics = self.steward.watch().statistics();
            if done(statistics) {
                return statistics;
            }
            assert!(began.elapsed() < PATIENCE, "{statistics:?}");
        }
    }

    fn stop(self) -> (u64, Statistics) {
        let watch = self.steward.watch();
        self.steward.stop();
        (self.served.stop().needs_failed, watch.statistics())
    }
}

/// Whether a blob has a file, by attaching nothing.
fn is_cached(host: &Host, n: usize) -> bool {
    let first = bytes_of(n)[..4096].to_vec();
    files(host).iter().any(|path| {
        let mut bytes = vec![0; 4096];
        File::open(path).unwrap().read_exact_at(&mut bytes, 0).is_ok() && bytes == first
    })
}

/// Through the descriptor that was opened before the file was watched, so nobody is asked.
fn expect_bytes(pinned: &Pinned, n: usize) {
    let mut bytes = vec![0; LEN_BYTES];
    let file = File::from(pinned.file().as_fd().try_clone_to_owned().unwrap());
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == bytes_of(n), "wrong bytes of blob {n}");
    let (named, opened) = (fs::metadata(pinned.file().path()).unwrap(), file.metadata().unwrap());
    assert_eq!(named.ino(), opened.ino(), "the file of a blob that is served has lost its name");
}

#[test]
fn a_budget_is_held_while_blobs_come_and_go_and_what_is_used_stays() {
    const BLOBS: usize = 12;
    let budget = 5 * TAKES_BYTES;
    let Some(host) = with_blobs(BLOBS) else { return };
    let daemon = Tended::start(&host, Some(budget));
    let used = daemon.attach(0).unwrap();
    for n in 1..BLOBS {
        drop(daemon.attach(n).unwrap());
        assert_eq!(daemon.release(), 1);
    }
    let kept = daemon.look_until(|statistics| statistics.culled_objects > 0 && used_bytes(&host) <= budget);
    // The oldest have gone, no more than was needed, and not the one that is used.
    let left: Vec<_> = (0..BLOBS).filter(|&n| is_cached(&host, n)).collect();
    println!("{left:?}; {kept:?}");
    assert!(matches!(*left, [0, 8, 9, 10, 11] | [0, 9, 10, 11]), "{left:?} {kept:?}");
    assert_eq!((kept.culled_objects + kept.cache_objects, kept.cull_refused), (BLOBS as u64, 0), "{kept:?}");
    assert_eq!(kept.culled_bytes, kept.culled_objects * TAKES_BYTES, "{kept:?}");
    expect_bytes(&used, 0);
    // What was used last is what was attached last, not what was filled last.
    for n in [9, 1, 2] {
        drop(daemon.attach(n).unwrap());
        daemon.release();
    }
    daemon.look_until(|now| now.culled_objects > kept.culled_objects && used_bytes(&host) <= budget);
    assert!([0, 9, 1, 2].iter().all(|&n| is_cached(&host, n)) && !is_cached(&host, 10));
    drop(used);
    let (failed, _) = daemon.stop();
    assert_eq!(failed, 0);
}

#[test]
fn a_budget_that_is_changed_while_it_serves_is_held() {
    let Some(host) = with_blobs(6) else { return };
    let daemon = Tended::start(&host, None);
    (0..6).for_each(|n| drop(daemon.attach(n).unwrap()));
    daemon.release();
    assert!(used_bytes(&host) > 3 * TAKES_BYTES);
    daemon.steward.set_budget(Some(3 * TAKES_BYTES));
    daemon.look_until(|statistics| statistics.culled_objects > 0 && used_bytes(&host) <= 3 * TAKES_BYTES);
    let (failed, _) = daemon.stop();
    assert_eq!(failed, 0);
}

#[test]
fn a_blob_that_is_attached_while_it_is_removed_keeps_its_file() {
    let Some(host) = with_blobs(1) else { return };
    let daemon = Tended::start(&host, None);
    drop(daemon.attach(0).unwrap());
    daemon.release();
    let name = files(&host)[0].file_name().unwrap().to_str().unwrap().to_owned();
    let (removed, busy, ended) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let mut attached = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                let counter = if BlobFile::remove(&host.path("cache/blobs"), &name).unwrap() { &removed } else { &busy };
                counter.fetch_add(1, Ordering::Relaxed);
            }
        });
        let began = Instant::now();
        while began.elapsed() < RACE {
            let pinned = daemon.attach(0).unwrap();
            expect_bytes(&pinned, 0);
            drop(pinned);
            daemon.release();
            attached += 1;
        }
        ended.store(true, Ordering::Relaxed);
    });
    let (removed, busy) = (removed.into_inner(), busy.into_inner());
    println!("attached {attached} times; removed {removed} times, and {busy} times not because it was in use");
    assert!(attached > 10 && removed > 10 && busy > 10);
    daemon.stop();
}

#[test]
fn fault_full_disk_makes_room_for_a_reader_and_gives_an_error_in_time_when_nothing_can_go() {
    const BLOBS: usize = 40;
    let Some(host) = with_blobs(BLOBS).and_then(|host| host.with_cache_on_disk(24 << 20)) else { return };
    let daemon = Tended::start(&host, None);
    let mut used = vec![daemon.attach(0).unwrap()];
    // Twice as many as there is room for, each of which is not used any more when the next one comes.
    for n in 1..BLOBS {
        drop(daemon.attach(n).unwrap());
        daemon.release();
    }
    assert!(daemon.steward.watch().statistics().culled_objects > 10, "{:?}", daemon.steward.watch().statistics());
    // All of them are used: at some point nothing can go.
    let error = loop {
        let began = Instant::now();
        match daemon.attach(used.len()) {
            Ok(pinned) => used.push(pinned),
            Err(error) => {
                assert!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
                break error;
            }
        }
    };
    println!("{} of {BLOBS} blobs fit: {error}", used.len());
    assert!(["ENOSPC", "No space left"].iter().any(|text| error.to_string().contains(text)), "{error}");
    used.iter().enumerate().for_each(|(n, pinned)| expect_bytes(pinned, n));
    // As soon as one of them is not used any more, it goes on.
    let next = used.len();
    used.drain(1..4);
    daemon.release();
    let began = Instant::now();
    while let Err(error) = daemon.attach(next) {
        assert!(began.elapsed() < PATIENCE, "{error}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let (failed, statistics) = daemon.stop();
    println!("{statistics:?}");
    assert!(failed > 0);
}

/// What may become of the files of two blobs, `a` and `b`, while no daemon runs.
type Damage = (&'static str, fn(a: &Path, b: &Path));

fn map_of(path: &Path) -> PathBuf {
    path.with_extension("map")
}

/// A new file with nothing in it, as long as the old one.
fn empty(path: &Path) {
    let len = fs::metadata(path).unwrap().len();
    fs::remove_file(path).unwrap();
    File::create(path).unwrap().set_len(len).unwrap();
}

fn swap(a: &Path, b: &Path) {
    let aside = a.with_extension("aside");
    fs::rename(a, &aside).unwrap();
    fs::rename(b, a).unwrap();
    fs::rename(&aside, b).unwrap();
}

const DAMAGES: [Damage; 12] = [
    ("nothing", |_, _| ()),
    ("the file is gone, its map is not", |a, _| fs::remove_file(a).unwrap()),
    ("the map is gone, its file is not", |a, _| fs::remove_file(map_of(a)).unwrap()),
    ("another file of the same name and length", |a, _| empty(a)),
    ("the same, with the times of the old one", |a, _| {
        let times = fs::metadata(a).unwrap();
        empty(a);
        let times = FileTimes::new().set_modified(times.modified().unwrap()).set_accessed(times.accessed().unwrap());
        File::options().write(true).open(a).unwrap().set_times(times).unwrap();
    }),
    ("cut off", |a, _| File::options().write(true).open(a).unwrap().set_len(8192).unwrap()),
    ("cut off, and as long as before", |a, _| {
        let file = File::options().write(true).open(a).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(8192).unwrap();
        file.set_len(len).unwrap();
    }),
    ("emptied in the middle", |a, _| {
        let file = File::options().write(true).open(a).unwrap();
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, how, 40_960, 4096).unwrap();
    }),
    ("exchanged files", swap),
    ("exchanged files with their maps", |a, b| {
        swap(a, b);
        swap(&map_of(a), &map_of(b));
    }),
    ("another one's map", |a, b| assert!(fs::copy(map_of(b), map_of(a)).unwrap() > 0)),
    ("a map of nothing but ones", |a, _| {
        let map = File::options().write(true).open(map_of(a)).unwrap();
        let len = usize::try_from(map.metadata().unwrap().len()).unwrap();
        map.write_all_at(&vec![0xff; len], 0).unwrap();
    }),
];

#[test]
fn fault_whatever_becomes_of_the_cache_s_files_no_byte_is_wrong() {
    let Some(host) = with_blobs(2) else { return };
    for (what, damage) in DAMAGES {
        let _ = fs::remove_dir_all(host.path("cache"));
        let daemon = Tended::start(&host, None);
        let path = |n| daemon.attach(n).unwrap().file().path().to_owned();
        let (a, b) = (path(0), path(1));
        daemon.release();
        daemon.stop();
        damage(&a, &b);
        let daemon = Tended::start(&host, None);
        // Each in turn, so that one of them has what was damaged.
        for n in [0, 1] {
            let pinned = daemon.attach(n).unwrap();
            assert!(pinned.file().map().is_full(), "{what}");
        }
        daemon.release();
        let (failed, _) = daemon.stop();
        assert_eq!(failed, 0, "{what}");
        println!("{what}: fine");
    }
}

/// A machine that loses its power anywhere in a removal has one of the files, both, or none; the other one's blocks count all
/// the same, and it can go.
#[test]
fn what_a_removal_has_left_half_done_is_counted_and_goes() {
    let Some(host) = with_blobs(3) else { return };
    let daemon = Tended::start(&host, None);
    let paths: Vec<_> = (0..3).map(|n| daemon.attach(n).unwrap().file().path().to_owned()).collect();
    daemon.release();
    daemon.stop();
    fs::remove_file(map_of(&paths[0])).unwrap();
    fs::remove_file(&paths[1]).unwrap();
    fs::write(host.path("cache/blobs/README"), "an operator's").unwrap();
    let daemon = Tended::start(&host, Some(1));
    let kept = daemon.look_until(|statistics| statistics.culled_objects == 3);
    assert_eq!((kept.cache_bytes, kept.cache_objects), (0, 0), "{kept:?}");
    let left: Vec<_> = fs::read_dir(host.path("cache/blobs")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["README"]);
    assert!(kept.last_cull_unix_s.abs_diff(SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs()) < 60);
    daemon.stop();
}
