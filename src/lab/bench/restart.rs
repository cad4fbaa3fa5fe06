//! `infill bench restart`: readers read a cold image again and again while the daemon is ended at random moments and
//! started anew at once. What counts is that no reader gets an error or a wrong byte, and how long one had to wait.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use super::Findings;
use super::daemon::Daemon;
use crate::front::sim::rng::Rng;
use crate::lab::disk::{self, ErofsLayout};
use crate::lab::tree::{Content, Entry, MACHINE_SOURCES, Manifest, Selection};
use crate::lab::{Result, Trying, checksum};

/// The image, its blob and its manifest in the data directory.
const IMAGE: &str = "restart.img";
const BLOB: &str = "restart.blob";
const MANIFEST: &str = "restart.json";
/// Chunks of the image.
const CHUNK_BYTES: u32 = 64 << 10;
/// What the image is made of.
const FILES: Selection = Selection { sources: MACHINE_SOURCES, files_max: 1500, bytes_max: 24 << 20, file_bytes_max: 4 << 20 };
/// Readers at a time.
const READERS: usize = 8;
/// What one read(2) asks for.
const READ_BYTES: usize = 64 << 10;
/// The daemon brings little at a time, so that it is nearly always asked for more.
const WINDOW: &str = "--window=64K";
/// Longest life of a daemon that became ready; its end comes at a random moment before. One in three is ended before it
/// is ready.
const LIVES_MS: [u64; 2] = [150, 1500];
/// How long the rounds may take to come to an end after the last kill. A reader that hangs is lost.
const END_LIMIT: Duration = Duration::from_secs(180);
/// Errors that are described.
const ERRORS_SHOWN: usize = 10;
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(2);

/// What is ended how often, and what is read meanwhile.
#[derive(Clone, Debug)]
pub struct Storm {
    /// The program; a second one takes turns with it, as an upgrade does.
    pub infill: Vec<PathBuf>,
    /// Image, blob and manifest.
    pub store: PathBuf,
    /// Their names.
    pub names: [String; 3],
    /// The daemon's cache directory.
    pub cache: PathBuf,
    /// Its state directory.
    pub state: PathBuf,
    /// Where the image is mounted.
    pub at: PathBuf,
    /// How often the daemon ends.
    pub kills: usize,
    /// By `SIGTERM` instead of `SIGKILL`.
    pub orderly: bool,
    /// Says when.
    pub seed: u64,
}

/// What became of the readers; `--json` prints it.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// How often the daemon was ended.
    pub kills: usize,
    /// Of them, before it was ready.
    pub kills_at_start: usize,
    /// Of all, with a reader inside a read(2).
    pub kills_with_readers: usize,
    /// Of all, with a mount waiting.
    pub kills_with_mount: usize,
    /// Reads and mounts that failed.
    pub read_errors: usize,
    /// Bytes of files that read as something else.
    pub wrong_bytes: u64,
    /// Longest single read(2).
    pub longest_stall_ms: u64,
    /// Longest mount(2).
    pub longest_mount_ms: u64,
    /// Calls of read(2).
    pub reads: usize,
    /// Bytes read.
    pub bytes: u64,
    /// Times that the image was mounted cold and read whole.
    pub rounds: usize,
    /// Says when the daemon was ended.
    pub seed: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// The first errors.
    pub errors: Vec<String>,
}

impl Figures {
    fn describe(&mut self, error: String) {
        if self.errors.len() < ERRORS_SHOWN {
            self.errors.push(error);
        }
    }
}

impl Findings for Figures {
    /// Whether nobody noticed anything but time.
    fn is_good(&self) -> bool {
        self.read_errors == 0 && self.wrong_bytes == 0
    }

    fn table(&self) -> String {
        let rows = [
            ("kernel", self.kernel.clone()),
            ("daemon ended", format!("{} times (seed {}), {} of them while it started", self.kills, self.seed, self.kills_at_start)),
            ("under", format!("a reader in read(2): {} times; a mount: {} times", self.kills_with_readers, self.kills_with_mount)),
            ("read", format!("{} reads, {:.1} MB, {} cold rounds of {READERS} readers", self.reads, self.bytes as f64 / 1e6, self.rounds)),
            ("errors", format!("{} reads failed, {} bytes were wrong", self.read_errors, self.wrong_bytes)),
            ("longest wait", format!("{} ms for a read, {} ms for a mount", self.longest_stall_ms, self.longest_mount_ms)),
        ];
        let mut text = rows.map(|(name, value)| format!("  {name:<13} {value}\n")).concat();
        self.errors.iter().for_each(|error| text += &format!("  ! {error}\n"));
        text
    }
}

/// Makes image, blob and manifest of real files of this machine in `data`; gives the bytes of the files.
///
/// # Errors
/// A file cannot be copied, or mkfs.erofs failed.
pub fn prepare(data: &Path, scratch: &Path) -> Result<u64> {
    let tree = scratch.join("tree");
    FILES.copy_to(&tree)?;
    fs::create_dir_all(data).trying(|| format!("cannot make {}", data.display()))?;
    let manifest = Manifest::of(&tree)?;
    manifest.save(&data.join(MANIFEST))?;
    let layout = ErofsLayout { chunk_bytes: Some(CHUNK_BYTES), blob: Some(&data.join(BLOB)), ..ErofsLayout::default() };
    disk::erofs(&data.join(IMAGE), &tree, layout)?;
    Ok(manifest.len_bytes())
}

/// Where the guest has what.
///
/// # Errors
/// This program cannot be found.
pub fn in_guest(kills: usize, seed: u64) -> Result<Storm> {
    Ok(Storm {
        infill: vec![std::env::current_exe().trying(|| "cannot find this program")?],
        store: "/store".into(),
        names: [IMAGE, BLOB, MANIFEST].map(str::to_owned),
        cache: "/cache/root".into(),
        state: "/run/infill".into(),
        at: "/tmp/image".into(),
        kills,
        orderly: false,
        seed,
    })
}

/// What the readers and the one who ends the daemon share.
struct Watch {
    manifest: Manifest,
    /// No further round.
    enough: AtomicBool,
    /// Readers inside read(2) or open(2).
    reading: AtomicUsize,
    /// Mounts inside mount(2).
    mounting: AtomicUsize,
    figures: Mutex<Figures>,
}

impl Storm {
    /// Reads and kills.
    ///
    /// # Errors
    /// The daemon does not start, ends by itself, or a reader hangs. Errors of readers are in the figures.
    pub fn run(&self, on_kill: impl FnMut(usize)) -> Result<Figures> {
        for dir in [&self.cache, &self.at] {
            fs::create_dir_all(dir).trying(|| format!("cannot make {}", dir.display()))?;
        }
        let manifest = Manifest::load(&self.store.join(&self.names[2]))?;
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        let figures = Mutex::new(Figures { kills: self.kills, seed: self.seed, kernel, ..Figures::default() });
        let watch =
            Watch { manifest, enough: AtomicBool::new(false), reading: AtomicUsize::new(0), mounting: AtomicUsize::new(0), figures };
        std::thread::scope(|scope| {
            let began = Instant::now();
            let mut daemon = self.daemon(0)?;
            daemon.await_ready()?;
            let start_ms = millis(began.elapsed());
            let rounds = scope.spawn(|| self.rounds(&watch));
            let ended = self.end_and_start(&mut daemon, start_ms, &watch, on_kill);
            if let Err(error) = &ended {
                println!("{error}");
            }
            watch.enough.store(true, Ordering::Relaxed);
            let began = Instant::now();
            while !rounds.is_finished() {
                if began.elapsed() > END_LIMIT {
                    // A thread that sleeps in the kernel cannot be ended, so neither can this scope.
                    println!("lost: a reader still waits {} s after the last kill\n{}", END_LIMIT.as_secs(), daemon.logged());
                    std::process::exit(1);
                }
                std::thread::sleep(POLL);
            }
            ended?;
            daemon.end(true)?;
            self.release()
        })?;
        Ok(watch.figures.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The daemon with this number.
    fn daemon(&self, number: usize) -> Result<Daemon> {
        let mut command = Command::new(&self.infill[number % self.infill.len()]);
        command.args(["serve", "--front-end=cachefiles", "--keep=keeper", WINDOW]);
        command.arg("--cache-dir").arg(&self.cache).arg("--state-dir").arg(&self.state);
        command.arg("--store").arg(format!("dir:{}", self.store.display()));
        Daemon::start(command, &self.at)
    }

    /// Ends the daemon at random moments; `start_ms` is what a start takes.
    fn end_and_start(&self, daemon: &mut Daemon, start_ms: u64, watch: &Watch, mut on_kill: impl FnMut(usize)) -> Result<()> {
        let mut rng = Rng::new(self.seed);
        for number in 1..=self.kills {
            let at_start = rng.below(3) == 0;
            let longest = if at_start { start_ms.max(1) } else { rng.pick(&LIVES_MS) };
            if !at_start {
                daemon.await_ready()?;
            }
            std::thread::sleep(Duration::from_millis(rng.below(longest)));
            let (reading, mounting) = (watch.reading.load(Ordering::Relaxed), watch.mounting.load(Ordering::Relaxed));
            daemon.end(self.orderly)?;
            *daemon = self.daemon(number)?;
            watch.note(|figures| {
                figures.kills_at_start += usize::from(at_start);
                figures.kills_with_readers += usize::from(reading > 0);
                figures.kills_with_mount += usize::from(mounting > 0);
            });
            on_kill(number);
        }
        daemon.await_ready()
    }

    /// Mounts the image under a new name, so that nothing of it is in the cache, reads all of it, unmounts it.
    fn rounds(&self, watch: &Watch) {
        for round in 0.. {
            if watch.enough.load(Ordering::Relaxed) {
                return;
            }
            let [image, blob, _] = &self.names;
            let options = format!("fsid={image},domain_id=round{round},device={blob}");
            let began = Instant::now();
            let mounted = inside(&watch.mounting, || mount(Some("none"), &self.at, Some("erofs"), MsFlags::MS_RDONLY, Some(&*options)));
            let took_ms = millis(began.elapsed());
            watch.note(|figures| figures.longest_mount_ms = figures.longest_mount_ms.max(took_ms));
            match mounted {
                Err(errno) => watch.error(format!("cannot mount {options}: {errno}")),
                Ok(()) => {
                    watch.read_all(&self.at, round);
                    if let Err(errno) = umount2(&self.at, MntFlags::empty()) {
                        return watch.error(format!("cannot unmount round {round}: {errno}"));
                    }
                }
            }
            watch.note(|figures| figures.rounds += 1);
            self.forget(round);
        }
    }

    /// Removes what the cache holds of rounds before the last; the kernel may still work on the last.
    fn forget(&self, round: usize) {
        if let Some(old) = round.checked_sub(1) {
            let _ = fs::remove_dir_all(self.cache.join(format!("cache/Ierofs,round{old}")));
        }
    }

    fn release(&self) -> Result<()> {
        let mut command = Command::new(&self.infill[0]);
        command.arg("release").arg("--force").arg("--state-dir").arg(&self.state);
        crate::lab::run(&mut command).map(drop)
    }
}

impl Watch {
    fn note(&self, change: impl FnOnce(&mut Figures)) {
        change(&mut self.figures.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn error(&self, what: String) {
        self.note(|figures| {
            figures.read_errors += 1;
            figures.describe(what);
        });
    }

    /// Reads every file once, with all readers, from different places of the list on.
    fn read_all(&self, root: &Path, round: usize) {
        let next = AtomicUsize::new(0);
        let entries = &self.manifest.entries;
        let read_some = || {
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= entries.len() {
                    return;
                }
                self.read(root, &entries[(at + round * READERS) % entries.len()]);
            }
        };
        std::thread::scope(|scope| (0..READERS).for_each(|_| drop(scope.spawn(read_some))));
    }

    fn read(&self, root: &Path, entry: &Entry) {
        let Content::File { len_bytes, sum } = entry.content else { return };
        match self.content(&root.join(&entry.path), len_bytes) {
            Err(error) => self.error(format!("{}: {error}", entry.path)),
            Ok(bytes) if checksum(&bytes) == sum => self.note(|figures| figures.bytes += len_bytes),
            Ok(bytes) => self.note(|figures| {
                figures.wrong_bytes += len_bytes.max(1);
                figures.describe(format!("{}: {} bytes, and they are wrong", entry.path, bytes.len()));
            }),
        }
    }

    fn content(&self, path: &Path, len_bytes: u64) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(usize::try_from(len_bytes).unwrap_or(0) + 1);
        let mut file = inside(&self.reading, || File::open(path))?;
        let (mut reads, mut longest) = (0, Duration::ZERO);
        let mut part = vec![0; READ_BYTES];
        let result = loop {
            let began = Instant::now();
            let result = inside(&self.reading, || file.read(&mut part));
            longest = longest.max(began.elapsed());
            reads += 1;
            match result {
                Ok(0) => break Ok(bytes),
                Ok(len) => bytes.extend(&part[..len]),
                Err(error) => break Err(error),
            }
        };
        self.note(|figures| {
            figures.reads += reads;
            figures.longest_stall_ms = figures.longest_stall_ms.max(millis(longest));
        });
        result
    }
}

/// Counts the caller among those who wait.
fn inside<T>(who: &AtomicUsize, call: impl FnOnce() -> T) -> T {
    who.fetch_add(1, Ordering::Relaxed);
    let result = call();
    who.fetch_sub(1, Ordering::Relaxed);
    result
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
