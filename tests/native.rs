//! The fanotify front end on this machine's own kernel: real mounts, the real engine, real readers. Needs root, a kernel with
//! pre-content events (Linux 6.14) and EROFS; says so where one is missing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use infill::engine::placement::seats;
use infill::engine::plan::{Complete, Completion, Window};
use infill::engine::stats::Snapshot;
use infill::engine::{Engine, EngineKind, Settings};
use infill::front::fanotify::Group;
use infill::key::Key;
use infill::lab::disk::{self, ErofsLayout};
use infill::lab::tree::{Content, Manifest, compare};
use infill::lab::{demo, packages};
use infill::mount::{self, Blobs, Source};
use infill::store::dir::DirStore;
use infill::store::{SourceMode, Store};
use tempfile::TempDir;

#[path = "common/settings.rs"]
mod common;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why this machine cannot run these tests.
fn unfit() -> Option<String> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let watched = Group::new().and_then(|group| group.can_watch(dir.path()).unwrap());
    watched.err().map(|errno| format!("no pre-content events: {errno}"))
}

fn settings(kind: EngineKind, shards: usize) -> Settings {
    let window = Window::Adaptive { budget_percent: 100 };
    Settings { seats: seats(), window, slot_bytes: 256 << 10, slots: 16, workers: 4, ..common::settings(kind, shards) }
}

/// A file system to try.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fs {
    /// The one that the build directory lies on.
    Here,
    Xfs,
    Btrfs,
}

impl Fs {
    const ALL: [Self; 3] = [Self::Here, Self::Xfs, Self::Btrfs];

    const fn mkfs(self) -> &'static str {
        match self {
            Self::Here => "true",
            Self::Xfs => "mkfs.xfs",
            Self::Btrfs => "mkfs.btrfs",
        }
    }

    /// Store and cache on it can share blocks.
    const fn shares(self) -> bool {
        !matches!(self, Self::Here)
    }
}

/// A directory on some file system.
struct Ground {
    dir: TempDir,
    mounted: bool,
}

impl Ground {
    /// `None`: not on this machine, as it says.
    fn new(fs: Fs) -> Option<Self> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::create_dir(dir.path().join("ground")).unwrap();
        if fs == Fs::Here {
            return Some(Self { dir, mounted: false });
        }
        let Some(mkfs) = packages::find(fs.mkfs()) else {
            println!("not run on {fs:?}: no {}", fs.mkfs());
            return None;
        };
        let disk = dir.path().join("disk");
        File::create(&disk).unwrap().set_len(1 << 30).unwrap();
        assert!(Command::new(mkfs).arg("-q").arg(&disk).status().unwrap().success());
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(dir.path().join("ground")).output().unwrap();
        if !mounted.status.success() {
            println!("not run on {fs:?}: {}", String::from_utf8_lossy(&mounted.stderr));
            return None;
        }
        Some(Self { dir, mounted: true })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("ground")
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.mounted {
            let _ = nix::mount::umount2(&self.path(), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// A store with an image and its blob, and a cache that is served from it.
struct Host {
    manifest: Manifest,
    store: Arc<dyn Store>,
    ground: Ground,
}

/// A blob as an image's mount has it.
struct Seen {
    present_bytes: u64,
    len_bytes: u64,
}

impl Host {
    fn new(fs: Fs) -> Option<Self> {
        let ground = Ground::new(fs)?;
        let store_dir = ground.path().join("store");
        let manifest = demo::prepare(&store_dir, &ground.path().join("scratch")).unwrap();
        let store = Arc::new(DirStore::new("dir:test".into(), &store_dir, SourceMode::Auto).unwrap());
        std::fs::create_dir(ground.path().join("mnt")).unwrap();
        Some(Self { manifest, store, ground })
    }

    fn at(&self) -> PathBuf {
        self.ground.path().join("mnt")
    }

    /// Serves, mounts, and unmounts behind `use_it`. Gives what the engine did.
    fn mounted(&self, settings: &Settings, use_it: impl FnOnce(&Path, &Seen)) -> Snapshot {
        let blobs = Arc::new(Blobs::new(&self.ground.path().join("cache"), settings.shards).unwrap());
        let engine = Engine::start_all(&blobs.fronts(), &self.store, settings).unwrap();
        let entry = engine.entry();
        let attach = |name: &str, whole| {
            let key = Key::new(b"dom", name.as_bytes());
            blobs.attach(&entry, &*self.store, &key, whole, PATIENCE).unwrap()
        };
        let (image, blob) = (attach(demo::IMAGE, true), attach(demo::BLOB, false));
        assert!(image.file().map().is_full());
        let source = Source { image: image.file().path().to_owned(), devices: vec![blob.file().path().to_owned()], direct: false };
        mount::mount(&source, &self.at()).unwrap();
        let seen = Seen { present_bytes: blob.file().map().present_bytes(), len_bytes: blob.file().len_bytes() };
        drop((image, blob));
        assert_eq!(blobs.release(&entry), 0, "they are mounted");
        use_it(&self.at(), &seen);
        nix::mount::umount(&self.at()).unwrap();
        blobs.save();
        assert_eq!(blobs.release(&entry), 2, "they are not mounted any more");
        let snapshot = engine.stop(PATIENCE, || false).unwrap();
        assert_eq!((snapshot.needs_failed, snapshot.unanswered), (0, 0), "{snapshot:?}");
        snapshot
    }

    fn expect_equal(&self, at: &Path, readers: usize) {
        let read = compare(at, &self.manifest, readers);
        assert_eq!(read.verdict(), "equal", "{read:?}");
    }
}

/// On each file system that this machine has, if it can run any of this.
fn on_each(test: impl Fn(Fs, &Host)) {
    if let Some(why) = unfit() {
        return println!("not run: {why}");
    }
    for fs in Fs::ALL {
        if let Some(host) = Host::new(fs) {
            println!("{fs:?}");
            test(fs, &host);
        }
    }
}

#[test]
fn a_tree_is_read_through_sparse_files_byte_for_byte() {
    on_each(|fs, host| {
        // Each with an empty cache; where blocks can be shared, nothing is sparse.
        let kinds = if fs.shares() { &[(EngineKind::Uring, 2)][..] } else { &[(EngineKind::Uring, 2), (EngineKind::Blocking, 1)] };
        for &(kind, shards) in kinds {
            let _ = std::fs::remove_dir_all(host.ground.path().join("cache"));
            let snapshot = host.mounted(&settings(kind, shards), |at, seen| {
                host.expect_equal(at, 8);
                assert!(fs.shares() || seen.present_bytes == 0);
            });
            assert!(fs.shares() || snapshot.needs + snapshot.present > 100, "{snapshot:?}");
        }
    });
}

#[test]
fn where_store_and_cache_share_a_file_system_nothing_is_copied_or_asked() {
    on_each(|fs, host| {
        if !fs.shares() {
            return;
        }
        let snapshot = host.mounted(&settings(EngineKind::Uring, 1), |at, seen| {
            assert!(seen.present_bytes >= seen.len_bytes);
            host.expect_equal(at, 2);
        });
        assert_eq!((snapshot.needs, snapshot.bytes_filled), (0, 0), "{snapshot:?}");
    });
}

#[test]
fn what_was_brought_is_there_after_a_restart_and_a_complete_blob_is_not_asked_for() {
    on_each(|fs, host| {
        if fs.shares() {
            return;
        }
        let settings = settings(EngineKind::Uring, 2);
        let first =
            &host.manifest.entries.iter().find(|entry| matches!(entry.content, Content::File { len_bytes: 4096.., .. })).unwrap().path;
        host.mounted(&settings, |at, _| drop(std::fs::read(at.join(first)).unwrap()));
        // Not all of it, but not nothing; then all of it, by readers; then nothing is asked at all.
        host.mounted(&settings, |at, seen| {
            assert!(seen.present_bytes > 0 && seen.present_bytes < seen.len_bytes);
            host.expect_equal(at, 4);
        });
        let all = Settings { completion: Completion { when: Complete::Always, ..Completion::default() }, ..settings.clone() };
        host.mounted(&all, |at, _| {
            host.expect_equal(at, 4);
            std::thread::sleep(Duration::from_secs(1));
        });
        let snapshot = host.mounted(&settings, |at, seen| {
            assert!(seen.present_bytes >= seen.len_bytes, "{} of {}", seen.present_bytes, seen.len_bytes);
            host.expect_equal(at, 4);
        });
        assert_eq!((snapshot.needs, snapshot.opens), (0, 0), "{snapshot:?}");
    });
}

/// The daemon as a process.
struct Daemon(std::process::Child);

impl Daemon {
    fn start(host: &Host) -> Self {
        let path = |name: &str| host.ground.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
        command.args(["serve", "--front-end=fanotify", "--window=4K", "--complete=off", "--keep=keeper", "--store"]);
        command.arg(format!("dir:{}", path("store").display()));
        command.arg("--cache-dir").arg(path("cache")).arg("--state-dir").arg(path("state"));
        let log = File::options().append(true).create(true).open(path("log")).unwrap();
        let mut child = command.stdout(std::process::Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
        assert!(line.starts_with("infill: ready"), "{line}{}", std::fs::read_to_string(path("log")).unwrap());
        Self(child)
    }

    fn verb(host: &Host, args: &[&str]) -> std::process::Output {
        let state = host.ground.path().join("state");
        Command::new(env!("CARGO_BIN_EXE_infill")).args(args).arg("--state-dir").arg(state).arg(host.at()).output().unwrap()
    }

    fn end(mut self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
        self.0.wait().unwrap();
    }
}

/// How often the daemon is killed while readers read.
const KILLS: u64 = 20;

/// With the real process: at any moment, in the middle of answers and before any of them. Readers are slowed down by a window
/// of a page, so that there is always something left to ask for.
#[test]
fn a_daemon_is_killed_again_and_again_and_no_reader_notices() {
    if let Some(why) = unfit() {
        return println!("not run: {why}");
    }
    let host = Host::new(Fs::Here).unwrap();
    let first = Daemon::start(&host);
    let mounted = Daemon::verb(&host, &["mount", "--domain=dom", "--device", demo::BLOB, demo::IMAGE]);
    assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
    let last = std::thread::scope(|scope| {
        let mut daemon = first;
        let readers = scope.spawn(|| host.expect_equal(&host.at(), 8));
        for kill in 0..KILLS {
            std::thread::sleep(Duration::from_millis(5 + kill * 13 % 40));
            daemon.end(nix::sys::signal::Signal::SIGKILL);
            daemon = Daemon::start(&host);
        }
        readers.join().unwrap();
        daemon
    });
    host.expect_equal(&host.at(), 2);
    let unmounted = Daemon::verb(&host, &["umount"]);
    assert!(unmounted.status.success(), "{}", String::from_utf8_lossy(&unmounted.stderr));
    last.end(nix::sys::signal::Signal::SIGTERM);
    let log = std::fs::read_to_string(host.ground.path().join("log")).unwrap();
    let owed = log.lines().filter_map(|line| line.split("unanswered=").nth(1)?.trim().parse::<u64>().ok()).sum::<u64>();
    println!("{KILLS} kills, {owed} reads were left unanswered by the dead and answered by their successors");
    assert!(!log.contains("ERROR"), "{log}");
    // Nothing is mounted, so nobody keeps anything.
    let socket = host.ground.path().join("state/keeper.sock");
    let lives = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
    let asked = std::time::Instant::now();
    while lives() {
        // It ends some time after it has said that it will.
        assert!(asked.elapsed() < PATIENCE, "a keeper lives: {log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_mount_in_the_foreground_serves_itself_and_leaves_nothing_behind() {
    if let Some(why) = unfit() {
        return println!("not run: {why}");
    }
    let host = Host::new(Fs::Here).unwrap();
    let path = |name: &str| host.ground.path().join(name);
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    command.args(["mount", "--foreground", "--domain=dom", "--device", demo::BLOB, demo::IMAGE]).arg(host.at());
    command.arg("--store").arg(format!("dir:{}", path("store").display()));
    command.arg("--cache-dir").arg(path("cache")).arg("--state-dir").arg(path("state"));
    let mut mounting = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(mounting.stdout.take().unwrap()), &mut line).unwrap();
    assert!(line.contains("is mounted on"), "{line}");
    host.expect_equal(&host.at(), 8);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(mounting.id().cast_signed()), nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(mounting.wait().unwrap().success());
    assert!(std::fs::read_dir(host.at()).unwrap().next().is_none(), "it is not mounted any more");
    assert!(std::os::unix::net::UnixStream::connect(path("state/control.sock")).is_err());
}

/// An image without devices is right either way.
#[test]
fn an_image_of_one_file_is_read_on_demand_exactly_where_the_kernel_asks_for_metadata() {
    if let Some(why) = unfit() {
        return println!("not run: {why}");
    }
    let host = Host::new(Fs::Here).unwrap();
    let path = |name: &str| host.ground.path().join(name);
    std::fs::create_dir(path("tree")).unwrap();
    for n in 0..200_usize {
        std::fs::write(path("tree").join(format!("file-{n}")), vec![n.to_le_bytes()[0]; n * 100]).unwrap();
    }
    disk::erofs(&path("store/one.img"), &path("tree"), ErofsLayout::default()).unwrap();
    let asked = mount::metadata::is_asked_for(&host.ground.path()).unwrap();
    println!("the kernel asks for metadata: {asked}");
    let daemon = Daemon::start(&host);
    let mounted = Daemon::verb(&host, &["mount", "--json", "one.img"]);
    let report: serde_json::Value = serde_json::from_slice(&mounted.stdout).unwrap();
    assert_eq!(report["present_bytes"] == 0, asked, "{report}");
    let read = compare(&host.at(), &Manifest::of(&path("tree")).unwrap(), 4);
    assert_eq!(read.verdict(), "equal", "{read:?}");
    assert!(Daemon::verb(&host, &["umount"]).status.success());
    daemon.end(nix::sys::signal::Signal::SIGTERM);
    let log = std::fs::read_to_string(path("log")).unwrap();
    assert!(log.contains(if asked { "metadata=\"on demand\"" } else { "metadata=\"whole\"" }), "{log}");
}

/// What a user does wrong, and what is said of it.
#[test]
fn what_cannot_be_mounted_is_explained_and_nothing_is_left() {
    if let Some(why) = unfit() {
        return println!("not run: {why}");
    }
    let host = Host::new(Fs::Here).unwrap();
    let path = |name: &str| host.ground.path().join(name);
    std::fs::write(path("store/no.img"), vec![7; 100_000]).unwrap();
    std::fs::write(path("store/short.img"), b"x").unwrap();
    let daemon = Daemon::start(&host);
    let refused = |args: &[&str], words: &[&str]| {
        let output = Daemon::verb(&host, args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.lines().count() == 1, "{args:?}: {text}");
        words.iter().for_each(|word| assert!(text.contains(word), "{args:?}: {text:?} does not say {word:?}"));
    };
    refused(&["mount", "nothing.img"], &["nothing.img", "no store has"]);
    refused(&["mount", "no.img"], &["no.img", "does not take the image"]);
    refused(&["mount", "short.img"], &["does not take the image"]);
    refused(&["mount", demo::IMAGE], &["--device", "1 devices"]);
    refused(&["mount", "--device=nothing.blob", demo::IMAGE], &["nothing.blob", "no store has"]);
    refused(&["umount"], &["no EROFS image is mounted"]);
    daemon.end(nix::sys::signal::Signal::SIGTERM);
    let off = Command::new(env!("CARGO_BIN_EXE_infill"))
        .args(["serve", "--front-end=fanotify", "--keep=off", "--store"])
        .arg(format!("dir:{}", path("store").display()))
        .arg("--cache-dir")
        .arg(path("cache"))
        .arg("--state-dir")
        .arg(path("state"))
        .output()
        .unwrap();
    assert!(off.status.code() == Some(78) && String::from_utf8_lossy(&off.stderr).contains("--keep auto"), "{off:?}");
    let tmpfs = Command::new(env!("CARGO_BIN_EXE_infill"))
        .args(["serve", "--front-end=fanotify", "--store=dir:/", "--cache-dir=/dev/shm/infill-test", "--state-dir"])
        .arg(path("state"))
        .output()
        .unwrap();
    let _ = std::fs::remove_dir_all("/dev/shm/infill-test");
    assert!(String::from_utf8_lossy(&tmpfs.stderr).contains("ext4, XFS or btrfs"), "{tmpfs:?}");
}

/// The bench, with little of everything: that it goes on measuring what it says.
#[test]
fn the_bench_measures_all_its_cells() {
    if let Some(why) = unfit() {
        return println!("not run: {why}");
    }
    let cache = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    command.args(["bench", "native", "--json", "--rounds=1", "--time-ms=50", "--readers=2", "--tree-mib=8"]);
    let output = command.env("INFILL_CACHE", cache.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let figure = |subject: &str, cell: &str, name: &str| {
        let of = |value: &serde_json::Value, key: &str, list: &str, wanted: &str| {
            value[list].as_array().unwrap().iter().find(|item| item[key] == wanted).cloned().unwrap_or_default()
        };
        of(&of(&report, "subject", "sections", subject), "cell", "rows", cell)[name]["median"].as_f64().unwrap_or(0.0)
    };
    for (subject, cell, name) in [
        ("events", "infill", "daemon_cpu_us"),
        ("events", "bare", "daemon_cpu_us"),
        ("events", "multishot", "daemon_cpu_us"),
        ("events", "naive", "daemon_cpu_us"),
        ("tree", "copied", "filled_mb"),
        ("tree", "naive, 2 threads", "filled_mb"),
        ("hot", "infill, beside", "p99_of_alone"),
        ("hot", "one group, beside", "p99_of_alone"),
        ("complete", "complete, EROFS", "p50_of_never"),
    ] {
        assert!(figure(subject, cell, name) > 0.0, "{subject} {cell} {name}: {text}");
    }
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0, "something is left");
}
