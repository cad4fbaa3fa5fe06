//! What an operator does with mounts from files, on this machine's own kernel, with the real program: many at a time, wrongly, with
//! a store that hangs, and after everything that serves them was killed. Needs what `tests/native.rs` needs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use infill::engine::EngineKind;
use infill::front::sim::rng::Rng;
use infill::key::Key;
use infill::lab::disk::{self, ErofsLayout};
use infill::lab::tree::Manifest;
use infill::store::{Blob, SourceMode, Store, StoreError};
use nix::mount::{MntFlags, umount2};

#[path = "common/native.rs"]
mod common;
use common::{DOMAIN, Daemon, Fs, Host, PATIENCE, Served, wait_until};

/// The image, and its blob.
const IMAGE: &str = "app.img";
const BLOB: &str = "app.blob";
/// Its longest file.
const BIG: &str = "big";
const BIG_BYTES: usize = 8 << 20;
/// Its other files; each is some KiB longer than the one before it.
const FILES: usize = 40;

/// With an image of some files, and its blob.
fn app() -> Option<Host> {
    Host::new(Fs::Here, |host| {
        let (tree, store) = (host.path("tree"), host.path("store"));
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join(BIG), noise(BIG_BYTES, 0)).unwrap();
        (1..=FILES).for_each(|n| fs::write(tree.join(format!("f{n}")), noise(n * 3000, n as u64)).unwrap());
        let blob = store.join(BLOB);
        let layout = ErofsLayout { chunk_bytes: Some(64 << 10), blob: Some(&blob), ..ErofsLayout::default() };
        disk::erofs(&store.join(IMAGE), &tree, layout).unwrap();
        Manifest::of(&tree).unwrap()
    })
}

fn mount(host: &Host, image: &str, at: &Path) -> Output {
    host.command("mount").args(["--domain", DOMAIN, "--device", BLOB, image]).arg(at).output().unwrap()
}

fn umount(host: &Host, at: &Path) -> Output {
    host.command("umount").arg(at).output().unwrap()
}

/// Times that an image is mounted while daemons die.
const MOUNTS: usize = 12;
/// How long one lives at most, in milliseconds: about what a mount takes.
const LIFE_MS: u64 = 400;

/// The daemon may die at any moment of a mount: after it made all ready, before and after the mount has the files open, and
/// before it said that nothing was let go of. What is mounted in the end is right, or it is not mounted.
#[test]
fn a_daemon_that_dies_while_images_are_mounted_costs_time_and_no_byte() {
    let Some(host) = app() else { return };
    let mut rng = Rng::new(5);
    let (daemon, lives, failed) = std::thread::scope(|scope| {
        let (mut daemon, mut lives) = (Daemon::start(&host, &["--window=4K"]), 1);
        let mounting = scope.spawn(|| {
            let mut failed = 0;
            for _ in 0..MOUNTS {
                let began = Instant::now();
                loop {
                    let output = mount(&host, IMAGE, &host.at());
                    if output.status.success() {
                        break;
                    }
                    // No daemon, at the moment.
                    assert!(began.elapsed() < PATIENCE && matches!(output.status.code(), Some(69 | 75)), "{output:?}");
                    failed += 1;
                }
                host.expect_equal(&host.at(), 2);
                let unmounted = umount(&host, &host.at());
                assert!(unmounted.status.success(), "{unmounted:?}");
            }
            failed
        });
        while !mounting.is_finished() {
            std::thread::sleep(Duration::from_millis(rng.below(LIFE_MS)));
            daemon.kill();
            daemon = Daemon::start(&host, &["--window=4K"]);
            lives += 1;
        }
        (daemon, lives, mounting.join().unwrap())
    });
    println!("{MOUNTS} mounts by {lives} daemons, {failed} tries failed");
    assert!(lives > 2);
    daemon.end();
}

/// Bytes without holes, of which no two files have the same.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3] | 1
    };
    (0..len).map(|_| next()).collect()
}

fn expect_done(output: &Output) {
    assert!(output.status.success(), "{output:?}");
}

/// A refusal is one line that has all these words.
fn expect_refused(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(code) && text.lines().count() == 1, "{output:?}");
    words.iter().for_each(|word| assert!(text.contains(word), "{text:?} does not say {word:?}"));
}

/// The files of the cache that a daemon has open.
fn open_blobs(daemon: &Daemon, host: &Host) -> BTreeSet<PathBuf> {
    let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().flatten();
    let files = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    files.filter(|file| file.starts_with(host.path("cache/blobs")) && file.extension().is_none() && file.is_file()).collect()
}

/// A process that has a file open, whatever becomes of it.
struct User(Child);

impl User {
    fn of(file: &Path) -> Self {
        Self(Command::new("sleep").arg("600").stdin(File::open(file).unwrap()).spawn().unwrap())
    }

    /// As it is named.
    fn name(&self) -> String {
        format!("pid {} (sleep 600)", self.0.id())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn mounts_that_outlived_everybody_are_repaired() {
    let Some(host) = app() else { return };
    let (at, big) = (host.at(), host.at().join(BIG));
    let is_right = |name: &str| fs::read(at.join(name)).unwrap() == fs::read(host.path("tree").join(name)).unwrap();
    let daemon = Daemon::start(&host, &[]);
    expect_done(&mount(&host, IMAGE, &at));
    assert!(is_right("f1"));
    daemon.kill_with_keepers();
    let user = User::of(&big);
    assert!(!is_right(BIG), "the kernel asks nobody, and yet the bytes are right");

    // It is named, with what to do; from then on what nobody has read yet is right, what was read is not.
    let daemon = Daemon::start(&host, &[]);
    host.wait_for_log("asked for again", 1);
    assert!(host.log().contains(&format!("infill repair {} replaces it", at.display())), "{}", host.log());
    assert!(is_right("f40") && !is_right(BIG));
    let repaired = host.command("repair").arg(&at).output().unwrap();
    expect_done(&repaired);
    let text = String::from_utf8_lossy(&repaired.stdout);
    assert!(text.contains("restart those") && text.contains(&user.name()), "{text}");
    host.expect_equal(&at, 4);
    assert_eq!(host.mounts(), std::slice::from_ref(&at), "one in the place of the other");
    drop(user);

    // Again, with nothing read before; and at the start of the daemon.
    daemon.kill_with_keepers();
    umount2(&at, MntFlags::empty()).unwrap();
    fs::remove_dir_all(host.path("cache/blobs")).unwrap();
    let daemon = Daemon::start(&host, &[]);
    expect_done(&mount(&host, IMAGE, &at));
    daemon.kill_with_keepers();
    assert!(!is_right(BIG) && !is_right("f40"));
    let daemon = Daemon::start(&host, &["--repair"]);
    host.wait_for_log("repaired: all mounts", 1);
    assert!(host.log().contains("replaced; no process has files"), "{}", host.log());
    host.expect_equal(&at, 4);
    assert_eq!(host.mounts(), std::slice::from_ref(&at));
    expect_done(&umount(&host, &at));
    assert!(host.mounts().is_empty());
    let nothing = host.command("repair").arg(&at).output().unwrap();
    assert!(nothing.status.code() == Some(1) && String::from_utf8_lossy(&nothing.stderr).contains("no image of the cache"), "{nothing:?}");
    daemon.end();
}

/// Images at a time, and how often each is mounted.
const IMAGES: usize = 20;
const ROUNDS: usize = 3;

#[test]
fn images_that_share_a_blob_come_and_go_in_any_order() {
    let Some(host) = app() else { return };
    let image = |n: usize| format!("app{n}.img");
    let dir = |n: usize| host.path(&format!("mnt{n}"));
    for n in 0..IMAGES {
        fs::copy(host.path("store").join(IMAGE), host.path("store").join(image(n))).unwrap();
        fs::create_dir(dir(n)).unwrap();
    }
    let daemon = Daemon::start(&host, &[]);
    // As many images as there are threads are mounted at once, each with another one first.
    std::thread::scope(|scope| {
        for n in 0..IMAGES {
            let (host, image, dir) = (&host, image(n), dir(n));
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    std::thread::sleep(Duration::from_millis((n * 37 + round * 101) as u64 % 150));
                    expect_done(&mount(host, &image, &dir));
                    host.expect_equal(&dir, 4);
                    if round + 1 < ROUNDS || n > 0 {
                        expect_done(&umount(host, &dir));
                    }
                }
            });
        }
    });
    // One is left, and with it the blob.
    assert_eq!(host.mounts(), [dir(0)]);
    wait_until(|| open_blobs(&daemon, &host).len() == 2, || format!("{:?}", open_blobs(&daemon, &host)));
    host.expect_equal(&dir(0), 4);
    expect_done(&umount(&host, &dir(0)));
    wait_until(|| open_blobs(&daemon, &host).is_empty(), || format!("{:?}", open_blobs(&daemon, &host)));
    let counted = daemon.end();
    let len = |name: &str| fs::metadata(host.path("store").join(name)).unwrap().len().next_multiple_of(4096);
    let once = len(BLOB) + IMAGES as u64 * len(IMAGE);
    let filled = counted["bytes_filled"].as_u64().unwrap();
    assert!(filled <= once, "{filled} bytes were brought, and all of them once are {once}");
    assert_eq!((&counted["failed"], &counted["unanswered"]), (&0.into(), &0.into()), "{counted}");
}

/// A store in which the first look for one blob lasts until somebody says so.
#[derive(Debug)]
struct Hanging {
    inner: Arc<dyn Store>,
    name: &'static [u8],
    gate: Mutex<Option<Receiver<()>>>,
    waits: Sender<()>,
}

impl Store for Hanging {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn open(&self, key: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        if key.name() == self.name && self.waits.send(()).is_ok() {
            let gate = self.gate.lock().unwrap().take();
            if let Some(gate) = gate {
                let _ = gate.recv();
            }
        }
        self.inner.open(key)
    }
}

#[test]
fn a_store_that_hangs_delays_its_own_mounts_alone() {
    let Some(host) = app() else { return };
    let (open_gate, gate) = channel();
    let (waits, waiting) = channel();
    let inner = host.store(SourceMode::Buffered);
    let hanging: Arc<dyn Store> =
        Arc::new(Hanging { inner: Arc::clone(&inner), name: BLOB.as_bytes(), gate: Mutex::new(Some(gate)), waits });
    let served = Served { lookup: inner, ..Served::start(&host, hanging, &common::settings(EngineKind::Blocking, 1)) };
    let attach = |name: &str, whole| served.attach(name, whole).unwrap();
    std::thread::scope(|scope| {
        let slow = [scope.spawn(|| attach(BLOB, false)), scope.spawn(|| attach(BLOB, false))];
        waiting.recv().unwrap();
        // While the engine waits for the one, the others come and go.
        let began = Instant::now();
        let image = attach(IMAGE, true);
        assert!(image.file().map().is_full());
        served.blobs.save();
        drop(image);
        assert_eq!(served.release(), 1);
        assert!(slow.iter().all(|slow| !slow.is_finished()) && began.elapsed() < PATIENCE / 2);
        drop(open_gate);
        let [first, second] = slow.map(|slow| slow.join().unwrap());
        assert_eq!(first.file().path(), second.file().path());
        assert!(waiting.try_recv().is_err(), "the second one shares what the first one made");
    });
    assert_eq!(served.release(), 1);
    let snapshot = served.stop();
    assert_eq!((snapshot.opens, snapshot.opens_failed), (2, 0), "{snapshot:?}");
}

#[test]
fn what_is_done_wrongly_is_refused_with_the_remedy() {
    let Some(host) = app() else { return };
    let at = host.at();
    expect_refused(&mount(&host, IMAGE, &at), 69, &["no daemon serves", "infill serve"]);
    expect_refused(&host.command("repair").arg(&at).output().unwrap(), 69, &["infill serve --repair"]);
    let daemon = Daemon::start(&host, &[]);
    expect_refused(&mount(&host, IMAGE, &host.path("nowhere")), 2, &["nowhere", "give an existing directory"]);
    expect_refused(&mount(&host, IMAGE, &host.path("log")), 2, &["log", "give an existing directory"]);
    fs::set_permissions(host.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = host.command("mount");
    command.args(["--domain", DOMAIN, "--device", BLOB, IMAGE]).arg(&at).uid(65534).gid(65534);
    match command.output() {
        Ok(output) if output.status.code() != Some(2) => expect_refused(&output, 77, &["as root"]),
        other => println!("not tried as another user, who may not run this program or see its directory: {other:?}"),
    }
    expect_done(&mount(&host, IMAGE, &at));
    expect_refused(&mount(&host, IMAGE, &at), 1, &["mounted here already", "infill umount"]);

    let user = User::of(&at.join("f1"));
    expect_refused(&umount(&host, &at), 1, &["it is used by", &user.name(), "end them first"]);
    drop(user);
    let inside = host.path("inside");
    fs::create_dir(&inside).unwrap();
    nix::mount::mount(Some(&at), &inside, None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>).unwrap();
    let of_another = Command::new(env!("CARGO_BIN_EXE_infill"))
        .args(["umount", "--state-dir=/nowhere", "--cache-dir=/nowhere"])
        .arg(&inside)
        .output()
        .unwrap();
    expect_refused(&of_another, 1, &["is no image of the cache /nowhere", "umount(8)"]);
    expect_done(&umount(&host, &inside));
    loop_devices_are_named(&host);
    expect_done(&umount(&host, &at));
    daemon.end();
    no_cache_on_overlayfs(&host);
}

/// A loop device over a file of the cache is named by the doctor, and by the next daemon.
fn loop_devices_are_named(host: &Host) {
    let blobs = fs::read_dir(host.path("cache/blobs")).unwrap().flatten().map(|entry| entry.path());
    let blob = blobs.filter(|path| path.extension().is_none()).max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let made = Command::new("losetup").args(["--read-only", "--find", "--show"]).arg(&blob).output();
    let Some(made) = made.ok().filter(|made| made.status.success()) else { return println!("not tried with a loop device: losetup fails") };
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let doctor = Command::new(env!("CARGO_BIN_EXE_infill"))
        .args(["doctor", "--front-end=fanotify", "--cache-dir"])
        .arg(host.path("cache"))
        .output()
        .unwrap();
    expect_done(&Command::new("losetup").arg("-d").arg(&device).output().unwrap());
    let text = String::from_utf8_lossy(&doctor.stdout);
    assert!(!doctor.status.success() && text.contains("cache-loop") && text.contains(&format!("losetup -d {device}")), "{text}");
}

fn no_cache_on_overlayfs(host: &Host) {
    for name in ["upper", "work", "lower", "over"] {
        fs::create_dir(host.path(name)).unwrap();
    }
    let path = |name| host.path(name).display().to_string();
    let options = format!("lowerdir={},upperdir={},workdir={}", path("lower"), path("upper"), path("work"));
    let flags = nix::mount::MsFlags::empty();
    if let Err(errno) = nix::mount::mount(Some("overlay"), &host.path("over"), Some("overlay"), flags, Some(options.as_str())) {
        return println!("not tried on overlayfs: {errno}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    command.args(["serve", "--front-end=fanotify", "--store=dir:/", "--state-dir"]).arg(host.path("state"));
    let refused = command.arg("--cache-dir").arg(host.path("over")).output().unwrap();
    umount2(&host.path("over"), MntFlags::MNT_DETACH).unwrap();
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(69) && text.contains("ext4, XFS or btrfs"), "{refused:?}");
}

/// The read-ahead of all EROFS mounts from files, in KiB.
fn read_aheads() -> Vec<(PathBuf, u64)> {
    let settings = fs::read_dir("/sys/class/bdi").unwrap().flatten().map(|entry| entry.path());
    let ours = settings.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("erofs-"));
    ours.filter_map(|path| Some((path.clone(), fs::read_to_string(path.join("read_ahead_kb")).ok()?.trim().parse().ok()?))).collect()
}

#[test]
fn the_kernel_reads_ahead_as_the_settings_say() {
    let Some(host) = app() else { return };
    let daemon = Daemon::start(&host, &["--read-ahead=2044K"]);
    let set_to = |more: &[&str], kib: u64| {
        let output =
            host.command("mount").args(["--domain", DOMAIN, "--device", BLOB]).args(more).arg(IMAGE).arg(host.at()).output().unwrap();
        expect_done(&output);
        assert!(output.stderr.is_empty(), "{output:?}");
        let found = read_aheads();
        assert!(found.iter().any(|(_, found)| *found == kib), "{kib}: {found:?}");
        expect_done(&umount(&host, &host.at()));
    };
    set_to(&[], 2044);
    set_to(&["--read-ahead=124K"], 124);
    set_to(&["--read-ahead=kernel"], 128);
    daemon.end();
}
