//! The fanotify front end on this machine's own kernel: real mounts, the real engine, real readers. Needs root, a kernel with
//! pre-content events (Linux 6.14) and EROFS; says so where one is missing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use infill::control::Client;
use infill::control::wire::Stage;
use infill::engine::placement::seats;
use infill::engine::plan::{Complete, Completion, Window};
use infill::engine::stats::Snapshot;
use infill::engine::{EngineKind, Settings};
use infill::lab::demo;
use infill::lab::disk::{self, ErofsLayout};
use infill::lab::tree::{Content, Manifest};
use infill::mount::{self, Source};
use infill::ops::mounting::{Image, unmount};
use infill::store::SourceMode;

#[path = "common/native.rs"]
mod common;
use common::{DOMAIN, Daemon, Fs, Host, PATIENCE, Served, expect_equal, wait_until};

fn settings(kind: EngineKind, shards: usize) -> Settings {
    let window = Window::Adaptive { budget_percent: 100 };
    Settings { seats: seats(), window, slot_bytes: 256 << 10, slots: 16, workers: 4, ..common::settings(kind, shards) }
}

/// With an image of real files, and its blob.
fn demo_on(fs: Fs) -> Option<Host> {
    Host::new(fs, |host| demo::prepare(&host.path("store"), &host.path("scratch")).unwrap())
}

/// A blob as an image's mount has it.
struct Seen {
    present_bytes: u64,
    len_bytes: u64,
}

/// Serves, mounts, and unmounts behind `use_it`. Gives what the engine did.
fn mounted(host: &Host, settings: &Settings, use_it: impl FnOnce(&Path, &Seen)) -> Snapshot {
    let served = Served::start(host, host.store(SourceMode::Auto), settings);
    let (image, blob) = (served.attach(demo::IMAGE, true).unwrap(), served.attach(demo::BLOB, false).unwrap());
    assert!(image.file().map().is_full());
    let source = Source { image: image.file().path().to_owned(), devices: vec![blob.file().path().to_owned()], direct: false };
    mount::mount(&source, &host.at()).unwrap();
    let seen = Seen { present_bytes: blob.file().map().present_bytes(), len_bytes: blob.file().len_bytes() };
    drop((image, blob));
    assert_eq!(served.release(), 0, "they are mounted");
    use_it(&host.at(), &seen);
    unmount(&host.at()).unwrap();
    // A process of another test that is between fork and exec has a file open that was opened here.
    let mut released = 0;
    let began = Instant::now();
    while released < 2 {
        assert!(began.elapsed() < PATIENCE, "they are not mounted any more");
        released += served.release();
    }
    let snapshot = served.stop();
    assert_eq!(snapshot.needs_failed, 0, "{snapshot:?}");
    snapshot
}

/// On each file system that this machine has.
fn on_each(test: impl Fn(Fs, &Host)) {
    for fs in Fs::ALL {
        if let Some(host) = demo_on(fs) {
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
            let _ = std::fs::remove_dir_all(host.path("cache"));
            let snapshot = mounted(host, &settings(kind, shards), |at, seen| {
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
        let snapshot = mounted(host, &settings(EngineKind::Uring, 1), |at, seen| {
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
        mounted(host, &settings, |at, _| drop(std::fs::read(at.join(first)).unwrap()));
        // Not all of it, but not nothing; then all of it, by readers; then nothing is asked at all.
        mounted(host, &settings, |at, seen| {
            assert!(seen.present_bytes > 0 && seen.present_bytes < seen.len_bytes);
            host.expect_equal(at, 4);
        });
        let all = Settings { completion: Completion { when: Complete::Always, ..Completion::default() }, ..settings.clone() };
        mounted(host, &all, |at, _| {
            host.expect_equal(at, 4);
            std::thread::sleep(Duration::from_secs(1));
        });
        let snapshot = mounted(host, &settings, |at, seen| {
            assert!(seen.present_bytes >= seen.len_bytes, "{} of {}", seen.present_bytes, seen.len_bytes);
            host.expect_equal(at, 4);
        });
        assert_eq!((snapshot.needs, snapshot.opens), (0, 0), "{snapshot:?}");
    });
}

/// Without the cache directory: the daemon's own note says which it is.
fn verb(host: &Host, args: &[&str]) -> Output {
    let state = host.path("state");
    Command::new(env!("CARGO_BIN_EXE_infill")).args(args).arg("--state-dir").arg(state).arg(host.at()).output().unwrap()
}

/// What slows readers down, so that there is always something left to ask for.
const SMALL_WINDOW: [&str; 1] = ["--window=4K"];
/// How often the daemon is killed while readers read.
const KILLS: u64 = 20;

/// With the real process: at any moment, in the middle of answers and before any of them. Readers are slowed down by a window
/// of a page, so that there is always something left to ask for.
#[test]
fn a_daemon_is_killed_again_and_again_and_no_reader_notices() {
    let Some(host) = demo_on(Fs::Here) else { return };
    let first = Daemon::start(&host, &SMALL_WINDOW);
    let mounted = verb(&host, &["mount", "--domain", DOMAIN, "--device", demo::BLOB, demo::IMAGE]);
    assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
    let last = std::thread::scope(|scope| {
        let mut daemon = first;
        let readers = scope.spawn(|| host.expect_equal(&host.at(), 8));
        for kill in 0..KILLS {
            std::thread::sleep(Duration::from_millis(5 + kill * 13 % 40));
            daemon.kill();
            daemon = Daemon::start(&host, &SMALL_WINDOW);
        }
        readers.join().unwrap();
        daemon
    });
    host.expect_equal(&host.at(), 2);
    let unmounted = verb(&host, &["umount"]);
    assert!(unmounted.status.success(), "{}", String::from_utf8_lossy(&unmounted.stderr));
    last.end();
    let log = host.log();
    let owed = log.lines().filter_map(|line| line.split("unanswered=").nth(1)?.trim().parse::<u64>().ok()).sum::<u64>();
    println!("{KILLS} kills, {owed} reads were left unanswered by the dead and answered by their successors");
    assert!(!log.contains("ERROR"), "{log}");
    // Nothing is mounted, so nobody keeps anything.
    let socket = host.path("state/keeper.sock");
    // It ends some time after it has said that it will.
    wait_until(|| std::os::unix::net::UnixStream::connect(&socket).is_err(), || format!("a keeper lives: {log}"));
}

#[test]
fn a_mount_in_the_foreground_serves_itself_and_leaves_nothing_behind() {
    let Some(host) = demo_on(Fs::Here) else { return };
    let path = |name: &str| host.path(name);
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    command.args(["mount", "--foreground", "--domain", DOMAIN, "--device", demo::BLOB, demo::IMAGE]).arg(host.at());
    command.arg("--store").arg(host.store_spec());
    command.arg("--cache-dir").arg(path("cache")).arg("--state-dir").arg(path("state"));
    let mut mounting = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(mounting.stdout.take().unwrap()), &mut line).unwrap();
    assert!(line.contains("is mounted on"), "{line}");
    host.expect_equal(&host.at(), 8);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(mounting.id().cast_signed()), nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(mounting.wait().unwrap().success());
    assert!(std::fs::read_dir(host.at()).unwrap().next().is_none(), "it is not mounted any more");
    assert!(std::os::unix::net::UnixStream::connect(path("state/control.sock")).is_err());
}

/// What is ready to be mounted is let go of when its lease ends, and not before; an image that was prefetched is there whole.
#[test]
fn what_is_leased_stays_ready_and_what_is_prefetched_comes_whole() {
    let Some(host) = demo_on(Fs::Here) else { return };
    let daemon = Daemon::start(&host, &SMALL_WINDOW);
    let client = Client::connect(&host.path("state/control.sock")).unwrap();
    let image = Image { name: demo::IMAGE.into(), domain: Some(DOMAIN.into()), devices: vec![demo::BLOB.into()] };
    let (first, second) = (client.attach(&image).unwrap(), client.attach(&image).unwrap());
    assert!(first.prepared == second.prepared && first.lease != second.lease);
    assert!(client.end_lease(&first.lease).unwrap());
    assert_eq!(client.release().unwrap(), 0, "another lease is about the same");
    assert_eq!(client.images().unwrap().blobs.len(), 2);
    assert!(client.end_lease(&second.lease).unwrap());
    assert_eq!(client.release().unwrap(), 2);
    assert!(!client.end_lease(&second.lease).unwrap());

    for _ in 0..2 {
        client.prefetch(&image).unwrap();
    }
    let stage = || client.images().unwrap().prefetches[0].clone();
    wait_until(|| stage().stage == Stage::Done, || format!("{:?}", stage()));
    assert_eq!(client.images().unwrap().prefetches.len(), 1);
    let missing = Image { name: "nothing.img".into(), ..image };
    client.prefetch(&missing).unwrap();
    let stage = || client.images().unwrap().prefetches.into_iter().find(|one| one.wanted.image == missing.name).unwrap();
    wait_until(|| stage().error.is_some_and(|why| why.contains("no store has")), || format!("{:?}", stage()));
    let mounted = verb(&host, &["mount", "--json", "--domain", DOMAIN, "--device", demo::BLOB, demo::IMAGE]);
    let report: serde_json::Value = serde_json::from_slice(&mounted.stdout).unwrap();
    // The last page counts as a whole one.
    assert!(report["present_bytes"].as_u64() >= report["len_bytes"].as_u64(), "{report}");
    host.expect_equal(&host.at(), 4);
    assert!(verb(&host, &["umount"]).status.success());
    daemon.end();
}

/// An image without devices is right either way.
#[test]
fn an_image_of_one_file_is_read_on_demand_exactly_where_the_kernel_asks_for_metadata() {
    let Some(host) = demo_on(Fs::Here) else { return };
    let path = |name: &str| host.path(name);
    std::fs::create_dir(path("tree")).unwrap();
    for n in 0..200_usize {
        std::fs::write(path("tree").join(format!("file-{n}")), vec![n.to_le_bytes()[0]; n * 100]).unwrap();
    }
    disk::erofs(&path("store/one.img"), &path("tree"), ErofsLayout::default()).unwrap();
    let asked = mount::metadata::is_asked_for(&host.path(".")).unwrap();
    println!("the kernel asks for metadata: {asked}");
    let daemon = Daemon::start(&host, &SMALL_WINDOW);
    let mounted = verb(&host, &["mount", "--json", "one.img"]);
    let report: serde_json::Value = serde_json::from_slice(&mounted.stdout).unwrap();
    assert_eq!(report["present_bytes"] == 0, asked, "{report}");
    expect_equal(&host.at(), &Manifest::of(&path("tree")).unwrap(), 4);
    assert!(verb(&host, &["umount"]).status.success());
    daemon.end();
    let log = host.log();
    assert!(log.contains(if asked { "metadata=\"on demand\"" } else { "metadata=\"whole\"" }), "{log}");
}

/// What a user does wrong, and what is said of it.
#[test]
fn what_cannot_be_mounted_is_explained_and_nothing_is_left() {
    let Some(host) = demo_on(Fs::Here) else { return };
    let path = |name: &str| host.path(name);
    std::fs::write(path("store/no.img"), vec![7; 100_000]).unwrap();
    std::fs::write(path("store/short.img"), b"x").unwrap();
    let daemon = Daemon::start(&host, &SMALL_WINDOW);
    let refused = |args: &[&str], words: &[&str]| {
        let output = verb(&host, args);
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
    daemon.end();
    let off = Command::new(env!("CARGO_BIN_EXE_infill"))
        .args(["serve", "--front-end=fanotify", "--keep=off", "--store"])
        .arg(host.store_spec())
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
    if Host::new(Fs::Here, |_| Manifest::default()).is_none() {
        return;
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
