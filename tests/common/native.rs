//! A place for tests of images that are mounted from files, on this machine's own kernel, and who serves them there: the real
//! program, or an engine in this process.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use infill::engine::stats::Snapshot;
use infill::engine::{Engine, Settings};
use infill::front::fanotify::Group;
use infill::key::Key;
use infill::lab::packages;
use infill::lab::tree::{Manifest, compare};
use infill::mount::{self, AttachError, Blobs, Pinned};
use infill::store::dir::DirStore;
use infill::store::{SourceMode, Store};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

#[path = "settings.rs"]
mod settings;
pub(crate) use self::settings::settings;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(10);
/// The domain of all blobs.
pub(crate) const DOMAIN: &str = "dom";

/// A file system to try.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fs {
    /// The one that the build directory lies on.
    Here,
    Xfs,
    Btrfs,
}

impl Fs {
    pub(crate) const ALL: [Self; 3] = [Self::Here, Self::Xfs, Self::Btrfs];
    const DISK_BYTES: u64 = 1 << 30;

    const fn mkfs(self) -> Option<&'static str> {
        match self {
            Self::Here => None,
            Self::Xfs => Some("mkfs.xfs"),
            Self::Btrfs => Some("mkfs.btrfs"),
        }
    }

    /// Store and cache on it can share blocks.
    pub(crate) const fn shares(self) -> bool {
        !matches!(self, Self::Here)
    }
}

/// A file system in a file, which is mounted until this is dropped.
struct Disk(PathBuf);

impl Disk {
    /// `None`: not on this machine, as it says.
    fn mount(file: &Path, len_bytes: u64, mkfs: &str, options: &[&str], at: PathBuf) -> Option<Self> {
        let Some(program) = packages::find(mkfs) else {
            println!("not run: no {mkfs}");
            return None;
        };
        File::create(file).unwrap().set_len(len_bytes).unwrap();
        let made = Command::new(program).arg("-q").args(options).arg(file).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(file).arg(&at).output().unwrap();
        if !mounted.status.success() {
            println!("not run on that of {mkfs}: {}", String::from_utf8_lossy(&mounted.stderr));
            return None;
        }
        Some(Self(at))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A store, and room for a cache and for mounts.
pub(crate) struct Host {
    /// What its image must read as, if it has one.
    pub(crate) manifest: Manifest,
    // Dropped in this order.
    disks: Vec<Disk>,
    dir: TempDir,
    root: PathBuf,
}

impl Host {
    /// On a file system, with what `fill` puts into the store. `None`: not on this machine, as it says.
    pub(crate) fn new(fs: Fs, fill: impl FnOnce(&Self) -> Manifest) -> Option<Self> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        if let Err(errno) = Group::new().and_then(|group| group.can_watch(dir.path()).unwrap()) {
            println!("not run: no pre-content events: {errno}");
            return None;
        }
        let mut host = Self { manifest: Manifest::default(), disks: Vec::new(), root: dir.path().to_owned(), dir };
        if let Some(mkfs) = fs.mkfs() {
            host.root = host.path("ground");
            host.disks.push(Disk::mount(&host.dir.path().join("disk"), Fs::DISK_BYTES, mkfs, &[], host.root.clone())?);
        }
        ["store", "mnt"].iter().for_each(|name| fs::create_dir(host.path(name)).unwrap());
        host.manifest = fill(&host);
        Some(host)
    }

    /// With the cache on an ext4 of its own, that has so many bytes.
    pub(crate) fn with_cache_on_disk(mut self, len_bytes: u64) -> Option<Self> {
        let options = ["-m0", "-O", "^has_journal"];
        self.disks.push(Disk::mount(&self.path("cache.disk"), len_bytes, "mkfs.ext4", &options, self.path("cache"))?);
        Some(self)
    }

    /// Everything of it lies there: `store`, `cache`, `state`, `mnt`, `log`.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn at(&self) -> PathBuf {
        self.path("mnt")
    }

    pub(crate) fn store(&self, mode: SourceMode) -> Arc<dyn Store> {
        Arc::new(DirStore::new("dir:test".into(), &self.path("store"), mode).unwrap())
    }

    /// The setting that names it.
    pub(crate) fn store_spec(&self) -> String {
        format!("dir:{}", self.path("store").display())
    }

    /// The program, about this place.
    pub(crate) fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
        command.arg(verb).arg("--state-dir").arg(self.path("state")).arg("--cache-dir").arg(self.path("cache"));
        command
    }

    pub(crate) fn expect_equal(&self, at: &Path, readers: usize) {
        expect_equal(at, &self.manifest, readers);
    }

    /// What the daemons have said.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Waits until they have said so, `times` times.
    pub(crate) fn wait_for_log(&self, words: &str, times: usize) {
        wait_until(|| self.log().matches(words).count() >= times, || format!("{words:?} is not in {}", self.log()));
    }

    pub(crate) fn mounts(&self) -> Vec<PathBuf> {
        mount::mounted(&self.path("cache")).unwrap().into_iter().map(|mount| mount.at).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for mount in mount::mounted(&self.path("cache")).unwrap_or_default() {
            let _ = umount2(&mount.at, MntFlags::MNT_DETACH);
        }
        if self.path("state").exists() {
            let _ = self.command("release").arg("--force").output();
        }
    }
}

pub(crate) fn expect_equal(at: &Path, manifest: &Manifest, readers: usize) {
    let read = compare(at, manifest, readers);
    assert_eq!(read.verdict(), "equal", "{read:?}");
}

pub(crate) fn wait_until(is_so: impl Fn() -> bool, why: impl Fn() -> String) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{}", why());
        std::thread::sleep(POLL);
    }
}

/// The daemon as a process, with two keepers.
pub(crate) struct Daemon {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Daemon {
    /// One that serves, with `more` settings.
    pub(crate) fn start(host: &Host, more: &[&str]) -> Self {
        let log = File::options().append(true).create(true).open(host.path("log")).unwrap();
        let mut command = host.command("serve");
        command.args(["--front-end=fanotify", "--keep=keeper", "--complete=off", "--json"]).args(more);
        command.arg("--store").arg(host.store_spec());
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        assert!(line.starts_with("infill: ready"), "{line}{}", host.log());
        Self { child, out }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Its keepers, which are its children as long as it lives.
    pub(crate) fn keepers(&self) -> Vec<Pid> {
        let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let parent = format!("PPid:\t{}\n", self.child.id());
        let is_keeper = |pid: &i32| {
            let read = |name| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
            read("cmdline") == "infill\0keeper\0" && read("status").contains(&parent)
        };
        pids.filter(is_keeper).map(Pid::from_raw).collect()
    }

    /// As by the kernel when memory is short: it has no time for anything.
    pub(crate) fn kill(mut self) {
        kill(self.pid(), Signal::SIGKILL).unwrap();
        self.child.wait().unwrap();
    }

    /// All that holds the groups, so that nobody is asked any more.
    pub(crate) fn kill_with_keepers(mut self) {
        let keepers = self.keepers();
        assert_eq!(keepers.len(), 2);
        for pid in std::iter::once(self.pid()).chain(keepers.iter().copied()) {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        self.child.wait().unwrap();
        wait_until(|| keepers.iter().all(|pid| !Path::new(&format!("/proc/{pid}/fd/0")).exists()), || "keepers live".into());
    }

    /// What it counted.
    pub(crate) fn end(mut self) -> serde_json::Value {
        kill(self.pid(), Signal::SIGTERM).unwrap();
        let last = self.out.by_ref().lines().map(Result::unwrap).last().unwrap();
        assert!(self.child.wait().unwrap().success());
        serde_json::from_str(&last).unwrap()
    }
}

/// Blobs, and an engine in this process that serves them.
pub(crate) struct Served {
    pub(crate) blobs: Arc<Blobs>,
    pub(crate) engine: Engine,
    /// Where blobs are looked up before they are served.
    pub(crate) lookup: Arc<dyn Store>,
}

impl Served {
    pub(crate) fn start(host: &Host, store: Arc<dyn Store>, settings: &Settings) -> Self {
        let blobs = Arc::new(Blobs::new(&host.path("cache"), settings.shards).unwrap());
        let engine = Engine::start_all(&blobs.fronts(), &store, settings).unwrap();
        Self { blobs, engine, lookup: store }
    }

    /// Makes a blob ready, all of it if `whole`.
    pub(crate) fn attach(&self, name: &str, whole: bool) -> Result<Pinned, AttachError> {
        let key = Key::new(DOMAIN.as_bytes(), name.as_bytes());
        self.blobs.attach(&self.engine.entry(), &*self.lookup, &key, whole, PATIENCE)
    }

    /// Lets go of blobs that nobody has mounted. Gives how many.
    pub(crate) fn release(&self) -> usize {
        self.blobs.save();
        self.blobs.release(&self.engine.entry())
    }

    pub(crate) fn stop(self) -> Snapshot {
        let snapshot = self.engine.stop(PATIENCE, || false).unwrap();
        assert_eq!(snapshot.unanswered, 0, "{snapshot:?}");
        snapshot
    }
}
