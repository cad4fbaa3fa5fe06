//! `infill bench density`: far more mounted objects than the daemon may have descriptors. Each is a blob of its own,
//! behind a file of an image; all are read in random order, so that nearly every read of missing data finds its
//! object closed, and the kernel has to open it again. What counts is that every byte is right, that the budget is held,
//! and what opening again adds to a read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::sync;
use serde::{Deserialize, Serialize};

use super::Findings;
use super::daemon::Daemon;
use crate::front::sim::rng::Rng;
use crate::lab::{LabError, Result, Trying, blobs};

/// A blob is so many parts of a page, and every read is of one part.
const PARTS: usize = 3;
const PART_BYTES: usize = 4096;
/// Blobs of one image.
const IMAGE_BLOBS: usize = 1000;
/// Readers at a time, but for the objects whose reads are timed.
const READERS: usize = 16;
/// So many objects are timed at most, in the second round, by one reader.
const TIMED: usize = 500;
/// Nothing is brought that nobody asked for, so that every first read of a part misses.
/// Blobs as small as these would waste nearly all of the space that XFS gives them by default.
const FLAGS: [&str; 7] = ["serve", "--front-end=cachefiles", "--keep=off", "--window=4K", "--complete=off", "--xfs-extent=16K", "--json"];
/// The domain that the images share.
const DOMAIN: &str = "density";
/// Pause between two looks at the daemon's descriptors.
const SAMPLE_PAUSE: Duration = Duration::from_millis(20);
/// How often progress is told of.
const STEP_OBJECTS: usize = 500;
/// Errors that are described.
const ERRORS_SHOWN: usize = 10;

/// What is mounted where.
#[derive(Clone, Debug)]
pub struct Crowd {
    /// The program.
    pub infill: PathBuf,
    /// Blobs, each an object of the kernel.
    pub objects: usize,
    /// What the daemon gets as `--fd-budget`.
    pub fd_budget: u64,
    /// Where blobs and images are made.
    pub store: PathBuf,
    /// The daemon's cache directory.
    pub cache: PathBuf,
    /// Where the images are mounted.
    pub at: PathBuf,
    /// Says in which order is read.
    pub seed: u64,
}

/// What was found; `--json` prints it.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Blobs that were mounted and read, each an object of the kernel.
    pub objects: usize,
    /// Images they belong to, each an object too.
    pub images: usize,
    /// The setting.
    pub fd_budget: u64,
    /// Most descriptors that the daemon was seen with, its own among them.
    pub max_fds: usize,
    /// Its descriptors before anything was mounted.
    pub own_fds: usize,
    /// Most descriptors of objects, as the daemon counts them.
    pub fds_peak: u64,
    /// Reads that failed, and parts that were wrong.
    pub errors: usize,
    /// Opens that the daemon refused or lost, and messages that it could not use.
    pub opens_failed: u64,
    /// Opens of objects that had been open before.
    pub reopens: u64,
    /// Objects that were closed to make room.
    pub evictions: u64,
    /// Reads, all verified.
    pub reads: usize,
    /// The daemon's memory when everything was read, and the most that it ever had.
    pub rss_mib: f64,
    /// See [`Figures::rss_mib`].
    pub rss_peak_mib: f64,
    /// Its memory before anything was mounted.
    pub rss_start_mib: f64,
    /// Half of the reads of a part that is missing, of an object that is closed, took no longer.
    pub reopen_p50_us: u64,
    /// 99 of 100.
    pub reopen_p99_us: u64,
    /// The same, of an object that is open.
    pub miss_p50_us: u64,
    /// 99 of 100.
    pub miss_p99_us: u64,
    /// The same of a part that is in the cache, and not in memory: no request.
    pub hit_p50_us: u64,
    /// 99 of 100.
    pub hit_p99_us: u64,
    /// What the phases took.
    pub phases_ms: BTreeMap<String, u64>,
    /// Release of the kernel.
    pub kernel: String,
    /// The first errors.
    pub described: Vec<String>,
}

impl Findings for Figures {
    /// Whether everything was readable within the budget.
    fn is_good(&self) -> bool {
        self.errors == 0
            && self.opens_failed == 0
            && self.fds_peak <= self.fd_budget
            && self.reads == 2 * self.objects + (PARTS - 1) * self.objects.min(TIMED)
    }

    fn table(&self) -> String {
        let us = |p50: u64, p99: u64| format!("p50 {p50} us, p99 {p99} us");
        let rows = [
            ("kernel", self.kernel.clone()),
            ("objects", format!("{} blobs and {} images", self.objects, self.images)),
            (
                "descriptors",
                format!(
                    "{} at most for objects, budget {}; {} in all, {} before",
                    self.fds_peak, self.fd_budget, self.max_fds, self.own_fds
                ),
            ),
            ("read", format!("{} reads, {} wrong or failed", self.reads, self.errors)),
            ("opened", format!("{} times again; {} closed to make room; {} opens failed", self.reopens, self.evictions, self.opens_failed)),
            (
                "memory",
                format!("{:.1} MiB at the start, {:.1} at the end, {:.1} at most", self.rss_start_mib, self.rss_mib, self.rss_peak_mib),
            ),
            ("closed", us(self.reopen_p50_us, self.reopen_p99_us)),
            ("open", us(self.miss_p50_us, self.miss_p99_us)),
            ("in cache", us(self.hit_p50_us, self.hit_p99_us)),
            ("phases", self.phases_ms.iter().map(|(name, ms)| format!("{name} {ms} ms")).collect::<Vec<_>>().join(", ")),
        ];
        let mut text = rows.map(|(name, value)| format!("  {name:<13} {value}\n")).concat();
        self.described.iter().for_each(|error| text += &format!("  ! {error}\n"));
        text
    }
}

/// Latencies in microseconds of the timed reads.
#[derive(Default)]
struct Times {
    reopen: Vec<u64>,
    miss: Vec<u64>,
    hit: Vec<u64>,
}

impl Crowd {
    /// Makes blobs, serves, mounts, reads, unmounts. `progress` gets a few words now and then.
    ///
    /// # Errors
    /// Something that has to work for any measurement did not. Errors of reads are in the figures.
    pub fn run(&self, progress: &(dyn Fn(&str) + Sync)) -> Result<Figures> {
        let names = self.stock(progress)?;
        let mut daemon = Daemon::start(self.command(), &self.at)?;
        daemon.await_ready()?;
        let pid = daemon.pid();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        let figures = Figures {
            objects: self.objects,
            images: names.len(),
            fd_budget: self.fd_budget,
            own_fds: open_fds(pid),
            rss_start_mib: memory_mib(pid, "VmRSS:"),
            kernel,
            ..Figures::default()
        };
        let watch =
            Watch { crowd: self, progress, figures: Mutex::new(figures), done: AtomicUsize::new(0), enough: AtomicBool::new(false) };
        let read = std::thread::scope(|scope| {
            scope.spawn(|| watch.sample(pid));
            let read = watch.mount_and_read(&names);
            watch.note(|figures| {
                (figures.rss_mib, figures.rss_peak_mib) = (memory_mib(pid, "VmRSS:"), memory_mib(pid, "VmHWM:"));
            });
            let unmounted = watch.phase("unmount", || self.unmount(&names));
            watch.enough.store(true, Ordering::Relaxed);
            read.and(unmounted)
        });
        if let Err(error) = read {
            return Err(LabError::Failed(format!("{error}; infill serve said:\n{}", daemon.logged())));
        }
        daemon.end(true)?;
        let mut figures = watch.figures.into_inner().unwrap_or_else(PoisonError::into_inner);
        figures.take_counts(&daemon.last_line())?;
        if !figures.is_good() {
            println!("{}", daemon.logged());
        }
        Ok(figures)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.infill);
        command.args(FLAGS).arg(format!("--fd-budget={}", self.fd_budget));
        command.arg("--cache-dir").arg(&self.cache);
        command.arg("--store").arg(format!("dir:{}", self.store.display()));
        command
    }

    /// Makes blobs and images; gives the images' names.
    fn stock(&self, progress: &dyn Fn(&str)) -> Result<Vec<String>> {
        for dir in [&self.store, &self.cache, &self.at] {
            fs::create_dir_all(dir).trying(|| format!("cannot make {}", dir.display()))?;
        }
        progress("making blobs and images");
        let write = |name: &str, bytes: &[u8]| fs::write(self.store.join(name), bytes).trying(|| format!("cannot write {name}"));
        for object in 0..self.objects {
            let bytes: Vec<u8> = (0..PARTS).flat_map(|part| content(object, part)).collect();
            write(&blob(object), &bytes)?;
        }
        let all: Vec<String> = (0..self.objects).map(blob).collect();
        let images = all.chunks(IMAGE_BLOBS).enumerate().map(|(number, names)| {
            let name = format!("image{number}");
            write(&name, &blobs::image(names, PARTS * PART_BYTES)).map(|()| name)
        });
        images.collect()
    }

    fn unmount(&self, names: &[String]) -> Result<()> {
        names.iter().try_for_each(|name| match umount2(&self.at.join(name), MntFlags::empty()) {
            // It was not mounted.
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
            unmounted => unmounted.trying(|| format!("cannot unmount {name}")),
        })
    }

    /// The objects in an order of their own.
    fn shuffled(&self, salt: u64) -> Vec<usize> {
        let mut rng = Rng::new(self.seed.wrapping_add(salt));
        let mut order: Vec<usize> = (0..self.objects).collect();
        (1..order.len()).rev().for_each(|at| order.swap(at, rng.index(at + 1)));
        order
    }
}

/// Where a guest has what: blobs in memory, so that nothing but the cache is on a disk.
///
/// # Errors
/// This program cannot be found.
pub fn in_guest(objects: usize, fd_budget: u64, seed: u64) -> Result<Crowd> {
    Ok(Crowd {
        infill: std::env::current_exe().trying(|| "cannot find this program")?,
        objects,
        fd_budget,
        store: "/tmp/density/store".into(),
        cache: "/cache/root".into(),
        at: "/tmp/density/images".into(),
        seed,
    })
}

/// What readers and the one who watches the daemon share.
struct Watch<'a> {
    crowd: &'a Crowd,
    progress: &'a (dyn Fn(&str) + Sync),
    figures: Mutex<Figures>,
    done: AtomicUsize,
    enough: AtomicBool,
}

impl Watch<'_> {
    fn note<T>(&self, change: impl FnOnce(&mut Figures) -> T) -> T {
        change(&mut self.figures.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn sample(&self, pid: u32) {
        while !self.enough.load(Ordering::Relaxed) {
            let fds = open_fds(pid);
            self.note(|figures| figures.max_fds = figures.max_fds.max(fds));
            std::thread::sleep(SAMPLE_PAUSE);
        }
    }

    fn phase<T>(&self, name: &str, work: impl FnOnce() -> T) -> T {
        (self.progress)(name);
        let began = Instant::now();
        let result = work();
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.note(|figures| figures.phases_ms.insert(name.to_owned(), took_ms));
        result
    }

    fn mount_and_read(&self, images: &[String]) -> Result<()> {
        self.phase("mount", || images.iter().try_for_each(|name| self.mount(name)))?;
        // Part 0 of each: opened by the mount, and closed since for want of room.
        self.phase("read", || self.visit_all(&self.crowd.shuffled(1), 0));
        drop_caches()?;
        let order = self.crowd.shuffled(2);
        let (timed, rest) = order.split_at(order.len().min(TIMED));
        self.phase("read again", || self.visit_all(rest, 1));
        let mut times = Times::default();
        self.phase("read timed", || {
            // Of an object that is closed; of the same, now open; and what the cache has.
            for &object in timed {
                self.visit(object, &[1, 2, 0], |part, us| [&mut times.hit, &mut times.reopen, &mut times.miss][part].push(us));
            }
        });
        self.note(|figures| {
            (figures.reopen_p50_us, figures.reopen_p99_us) = percentiles(&mut times.reopen);
            (figures.miss_p50_us, figures.miss_p99_us) = percentiles(&mut times.miss);
            (figures.hit_p50_us, figures.hit_p99_us) = percentiles(&mut times.hit);
        });
        Ok(())
    }

    fn mount(&self, name: &str) -> Result<()> {
        let at = self.crowd.at.join(name);
        fs::create_dir_all(&at).trying(|| format!("cannot make {}", at.display()))?;
        let options = format!("fsid={name},domain_id={DOMAIN}");
        mount(Some("none"), &at, Some("erofs"), MsFlags::MS_RDONLY, Some(&*options)).trying(|| format!("cannot mount {options}"))?;
        (self.progress)(&format!("mounted {name}"));
        Ok(())
    }

    /// Reads one part of each, with all readers.
    fn visit_all(&self, order: &[usize], part: usize) {
        std::thread::scope(|scope| {
            for share in order.chunks(order.len().div_ceil(READERS).max(1)) {
                scope.spawn(move || share.iter().for_each(|&object| self.visit(object, &[part], |_, _| ())));
            }
        });
    }

    /// Reads parts of an object, and wants them right.
    fn visit(&self, object: usize, parts: &[usize], mut took_us: impl FnMut(usize, u64)) {
        let image = self.crowd.at.join(format!("image{}", object / IMAGE_BLOBS));
        let file = match File::open(image.join(blob(object))) {
            Ok(file) => file,
            Err(error) => return self.error(format!("{}: {error}", blob(object))),
        };
        // No read-ahead.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        for &part in parts {
            let mut bytes = vec![0; PART_BYTES];
            let began = Instant::now();
            let read = file.read_exact_at(&mut bytes, (part * PART_BYTES) as u64);
            took_us(part, u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
            self.note(|figures| figures.reads += 1);
            match read {
                Err(error) => self.error(format!("{} part {part}: {error}", blob(object))),
                Ok(()) if bytes != content(object, part) => self.error(format!("{} part {part} is wrong", blob(object))),
                Ok(()) => {}
            }
        }
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        if done.is_multiple_of(STEP_OBJECTS) {
            (self.progress)(&format!("visited {done} times"));
        }
    }

    fn error(&self, what: String) {
        self.note(|figures| {
            figures.errors += 1;
            if figures.described.len() < ERRORS_SHOWN {
                figures.described.push(what);
            }
        });
    }
}

impl Figures {
    /// Takes what the daemon counted from the JSON object that it ended with.
    fn take_counts(&mut self, json: &str) -> Result<()> {
        let counts: serde_json::Value = serde_json::from_str(json)
            .map_err(|error| LabError::Failed(format!("infill serve ended without its statistics ({error}): {json}")))?;
        let count = |name: &str| counts[name].as_u64().unwrap_or(0);
        self.fds_peak = count("fds_peak");
        self.evictions = count("evictions");
        self.opens_failed = count("opens_failed") + count("malformed") + count("failed") + count("unanswered");
        self.reopens = count("opens").saturating_sub((self.objects + self.images) as u64);
        Ok(())
    }
}

fn blob(object: usize) -> String {
    format!("blob{object:05}")
}

/// What a part of a blob must read as; no two are equal.
fn content(object: usize, part: usize) -> Vec<u8> {
    let mut rng = Rng::new((object * PARTS + part) as u64);
    (0..PART_BYTES / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

fn open_fds(pid: u32) -> usize {
    fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).map_or(0, Iterator::count)
}

/// A figure of `/proc/PID/status`, there in KiB.
fn memory_mib(pid: u32, name: &str) -> f64 {
    let text = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
}

fn percentiles(times_us: &mut [u64]) -> (u64, u64) {
    times_us.sort_unstable();
    let at = |percent: usize| times_us.get(times_us.len() * percent / 100).copied().unwrap_or(0);
    (at(50), at(99))
}

fn drop_caches() -> Result<()> {
    sync();
    fs::write("/proc/sys/vm/drop_caches", "3").trying(|| "cannot drop the page cache")
}
