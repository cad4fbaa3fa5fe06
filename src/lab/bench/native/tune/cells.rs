//! What is read while a knob is off or on: each cell with a daemon, a cache and a mount of its own.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{major, minor};

use super::super::events::{NO_MORE, PAGES};
use super::super::ground::{
    Ground, Infill, LoopDisk, Mounted, ONE, ONE_BYTES, ONE_FILE, blob_in, drop_cached, image_in, prime, settle, warm,
};
use super::super::load::{PAGE_BYTES, Until, read_randomly};
use super::super::throttle::{Limit, Throttle};
use super::super::tree::{Packed, TREE, of_statistics, read_whole, touch_memory};
use super::super::{Plan, failed};
use super::lever::Turned;
use crate::front::sim::rng::Rng;
use crate::lab::disk::CacheFs;
use crate::lab::{Result, Trying};

/// What a figure is called.
pub(super) type Figure = &'static str;

/// A disk of 7,200 turns a minute, which moves its head for each read.
const HDD: Limit = Limit::Slow { reads_per_s: 120, bytes_per_s: 150_000_000 };
/// The tree on it at most: it is read again and again.
const HDD_TREE_BYTES: u64 = 96 << 20;
/// Beside what is on the disk.
const DISK_SLACK_BYTES: u64 = 256 << 20;
/// What a reader reads at a time, as cat(1).
const READ_BYTES: usize = 128 << 10;
/// Of the files, one in so many is a part.
const PART: usize = 10;
/// How often each of many blobs is read.
const TURNS: u64 = 3;
/// Longer than a slow disk takes for what readers wait for.
const NO_TIMEOUT: &str = "--request-timeout-ms=600000";
/// Where the read-ahead of mounts is set.
const MOUNTS: &str = "/sys/class/bdi";

/// In which order a tree is read, and how much of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Order {
    /// In the order of paths.
    Paths,
    /// In random order.
    Random,
    /// One file in ten, in random order.
    RandomTenth,
}

/// What is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cell {
    /// Random pages that are in the page cache, of a file that is watched: what an event costs.
    Events { readers: usize },
    /// A tree, cold, the source in the page cache.
    Tree { readers: usize, order: Order },
    /// A small tree, cold, from a disk that gives 120 reads and 150 MB a second.
    SlowTree { readers: usize, order: Order },
    /// A file of 64 MiB in order, cold, the source in the page cache, nothing brought in the background.
    Stream,
    /// As many images as are made ready, at most so many, and a missing page of each one's blob in random order, three times.
    Images { number: usize },
}

impl Cell {
    /// In a table.
    pub(super) fn name(&self) -> String {
        let order = |order: &Order| match order {
            Order::Paths => "in order",
            Order::Random => "random",
            Order::RandomTenth => "one in ten",
        };
        match self {
            Self::Events { readers } => format!("events, {readers} readers"),
            Self::Tree { readers, order: of } => format!("tree, {}, {readers} readers", order(of)),
            Self::SlowTree { readers, order: of } => format!("tree of a slow disk, {}, {readers} readers", order(of)),
            Self::Stream => "stream".to_owned(),
            Self::Images { number } => format!("{number} images"),
        }
    }
}

/// What the cells need, made when the first one needs it.
pub(super) struct Cells<'a> {
    plan: &'a Plan,
    ground: &'a Ground,
    tree: Option<Packed>,
    slow: Option<(LoopDisk, Packed)>,
}

impl<'a> Cells<'a> {
    /// None are made yet.
    pub(super) const fn new(plan: &'a Plan, ground: &'a Ground) -> Self {
        Self { plan, ground, tree: None, slow: None }
    }

    /// Reads, and says what that took.
    pub(super) fn run(&mut self, cell: &Cell, turned: &Turned) -> Result<Vec<(Figure, f64)>> {
        let dir = self.ground.dir("cell")?;
        let figures = match *cell {
            Cell::Events { readers } => self.events(&dir, readers, turned),
            Cell::Tree { readers, order } => self.tree(&dir, readers, order, turned),
            Cell::SlowTree { readers, order } => self.slow_tree(&dir, readers, order, turned),
            Cell::Stream => self.stream(&dir, turned),
            Cell::Images { number } => self.images(&dir, number, turned),
        }?;
        fs::remove_dir_all(&dir).trying(|| format!("cannot remove {}", dir.display()))?;
        Ok(figures)
    }

    fn events(&self, dir: &Path, readers: usize, turned: &Turned) -> Result<Vec<(Figure, f64)>> {
        let flags = [&["--shards=1"], &NO_MORE[..], turned.flags].concat();
        let mut infill = Infill::start(self.plan, &[&self.ground.store()], dir, &flags)?;
        let (_, blob) = infill.attach(ONE)?;
        prime(&blob, &self.ground.blob(), PAGES)?;
        let before_ns = infill.cpu_ns()?;
        let seen = read_randomly(&blob, PAGES, readers, Until::Over(self.plan.time))?;
        let daemon_cpu_us = (infill.cpu_ns()? - before_ns) as f64 / 1e3 / seen.reads as f64;
        infill.end()?;
        Ok(vec![("events_per_s", seen.reads_per_s), ("p50_us", seen.p50_us), ("p99_us", seen.p99_us), ("daemon_cpu_us", daemon_cpu_us)])
    }

    fn tree(&mut self, dir: &Path, readers: usize, order: Order, turned: &Turned) -> Result<Vec<(Figure, f64)>> {
        let store = self.ground.store();
        if self.tree.is_none() {
            self.tree = Some(Packed::make(self.ground, &store, self.plan.tree_bytes)?);
        }
        let tree = self.tree.as_ref().ok_or_else(|| failed("there is no tree"))?;
        warm(&image_in(&store, TREE))?;
        warm(&blob_in(&store, TREE))?;
        let infill = Infill::start(self.plan, &[&store], dir, turned.flags)?;
        read_tree(infill, tree, dir, readers, order, turned)
    }

    fn slow_tree(&mut self, dir: &Path, readers: usize, order: Order, turned: &Turned) -> Result<Vec<(Figure, f64)>> {
        if self.slow.is_none() {
            let disk = LoopDisk::make(self.ground, CacheFs::Ext4, "slow", 2 * HDD_TREE_BYTES + DISK_SLACK_BYTES)?;
            let disk = disk.ok_or_else(|| failed("there is no slow disk; see above"))?;
            let tree = Packed::make(self.ground, &disk.at().join("store"), HDD_TREE_BYTES)?;
            self.slow = Some((disk, tree));
        }
        let (disk, tree) = self.slow.as_ref().ok_or_else(|| failed("there is no slow disk"))?;
        let store = disk.at().join("store");
        if let Some(kib) = turned.store_read_ahead_kib {
            let device = fs::metadata(disk.at()).trying(|| format!("cannot look at {}", disk.at().display()))?.dev();
            let setting = format!("{MOUNTS}/{}:{}/read_ahead_kb", major(device), minor(device));
            fs::write(&setting, kib.to_string()).trying(|| format!("cannot write {setting}"))?;
        }
        let infill = Infill::start(self.plan, &[&store], dir, &[&[NO_TIMEOUT], turned.flags].concat())?;
        let throttle = Throttle::of(infill.pid(), disk.at(), HDD)?;
        let throttle = throttle.ok_or_else(|| failed("no control group can slow a disk down here"))?;
        warm(&image_in(&store, TREE))?;
        drop_cached(&blob_in(&store, TREE))?;
        throttle.set(true)?;
        let figures = read_tree(infill, tree, dir, readers, order, turned);
        throttle.set(false)?;
        figures
    }

    fn stream(&self, dir: &Path, turned: &Turned) -> Result<Vec<(Figure, f64)>> {
        let flags = [&["--complete=off"], turned.flags].concat();
        let mut infill = Infill::start(self.plan, &[&self.ground.store()], dir, &flags)?;
        warm(&self.ground.blob())?;
        touch_memory(2 * ONE_BYTES)?;
        let mounted = mount(&mut infill, ONE, dir, turned)?;
        let (began, path) = (Instant::now(), mounted.at().join(ONE_FILE));
        let mut buffer = vec![0; READ_BYTES];
        let what = || format!("cannot read {}", path.display());
        let mut file = File::open(&path).trying(what)?;
        while file.read(&mut buffer).trying(what)? > 0 {}
        let wall = began.elapsed();
        // An open file would keep it from being unmounted.
        drop(file);
        figures_of(infill, mounted, wall)
    }

    fn images(&self, dir: &Path, number: usize, turned: &Turned) -> Result<Vec<(Figure, f64)>> {
        let store = self.many(number)?;
        let flags = [&["--shards=1"], &NO_MORE[..], turned.flags].concat();
        let mut infill = Infill::start(self.plan, &[&store], dir, &flags)?;
        let mut reads = Vec::new();
        for n in 0..number {
            let blob = match infill.attach(&format!("blob-{n}")) {
                Ok((_, blob)) => blob,
                // The end of what is measured: the refusal names what to raise.
                Err(refused) if ["fd_budget", "LimitNOFILE"].iter().any(|name| refused.to_string().contains(name)) => break,
                Err(error) => return Err(error),
            };
            let file = File::open(&blob).trying(|| format!("cannot open {}", blob.display()))?;
            reads.push((blob, file));
        }
        let ready = reads.len() as f64;
        let mut rng = Rng::new(number as u64);
        let mut took_us = Vec::new();
        for turn in 0..TURNS {
            for last in (1..reads.len()).rev() {
                reads.swap(last, rng.index(last + 1));
            }
            for (path, file) in &reads {
                let (mut page, since) = ([0; PAGE_BYTES as usize], Instant::now());
                // Far from each other: what the kernel reads ahead does not have the next one.
                let offset = turn * (MANY_BYTES / TURNS) / PAGE_BYTES * PAGE_BYTES;
                file.read_exact_at(&mut page, offset).trying(|| format!("cannot read {}", path.display()))?;
                took_us.push(since.elapsed().as_secs_f64() * 1e6);
            }
        }
        took_us.sort_unstable_by(f64::total_cmp);
        let rank = |percent: usize| took_us.get(took_us.len() * percent / 100).copied().unwrap_or(0.0);
        drop(reads);
        infill.end()?;
        Ok(vec![("images_ready", ready), ("p50_us", rank(50)), ("p99_us", rank(99))])
    }

    /// A store of so many small images that are all alike, each with a blob of its own.
    fn many(&self, number: usize) -> Result<PathBuf> {
        let store = self.ground.path("many");
        if store.join(format!("blob-{}.blob", number - 1)).exists() {
            return Ok(store);
        }
        let tree = self.ground.path("tree-of-many");
        fs::create_dir_all(&tree).trying(|| format!("cannot make {}", tree.display()))?;
        super::super::ground::write_random(&tree.join(ONE_FILE), MANY_BYTES)?;
        super::super::ground::image_of(&tree, &store, "blob-0")?;
        for n in 1..number {
            let name = format!("blob-{n}");
            for path in [image_in, blob_in] {
                let to = path(&store, &name);
                fs::copy(path(&store, "blob-0"), &to).trying(|| format!("cannot write {}", to.display()))?;
            }
        }
        settle();
        Ok(store)
    }
}

/// Length of each of many blobs.
const MANY_BYTES: u64 = 192 << 10;

/// Reads a tree of an empty cache, and ends the daemon.
fn read_tree(mut infill: Infill, tree: &Packed, dir: &Path, readers: usize, order: Order, turned: &Turned) -> Result<Vec<(Figure, f64)>> {
    settle();
    touch_memory(2 * tree.manifest.len_bytes())?;
    // Nothing after this but reading: what is brought meanwhile would not be counted.
    let mounted = mount(&mut infill, TREE, dir, turned)?;
    let before_ns = infill.cpu_ns()?;
    let wall = read_whole(mounted.at(), &in_order(&tree.files, order), readers, None)?;
    let daemon_cpu_ms = (infill.cpu_ns()? - before_ns) as f64 / 1e6;
    let mut figures = figures_of(infill, mounted, wall)?;
    figures.push(("daemon_cpu_ms", daemon_cpu_ms));
    Ok(figures)
}

fn in_order(files: &[String], order: Order) -> Vec<String> {
    let mut files = files.to_vec();
    if order != Order::Paths {
        let mut rng = Rng::new(files.len() as u64);
        for last in (1..files.len()).rev() {
            files.swap(last, rng.index(last + 1));
        }
    }
    if order == Order::RandomTenth {
        files.truncate(files.len() / PART);
    }
    files
}

/// Mounts an image with an empty cache.
fn mount(infill: &mut Infill, name: &str, dir: &Path, turned: &Turned) -> Result<Mounted> {
    let (image, blob) = infill.attach(name)?;
    // As infill mount does it, so that the two can tell their mounts apart.
    let turn = File::open(MOUNTS).trying(|| format!("cannot open {MOUNTS}"))?;
    let _turn = Flock::lock(turn, FlockArg::LockExclusive).map_err(|(_, errno)| failed(format!("cannot lock {MOUNTS}: {errno}")))?;
    let before = mounts()?;
    let mounted = Mounted::make(&image, &blob, &dir.join("mnt"))?;
    if let Some(kib) = turned.mount_read_ahead_kib {
        let after = mounts()?;
        let mut made = after.difference(&before);
        let (Some(name), None) = (made.next(), made.next()) else {
            return Err(failed(format!("another EROFS image was mounted meanwhile: see {MOUNTS}")));
        };
        let setting = Path::new(MOUNTS).join(name).join("read_ahead_kb");
        fs::write(&setting, kib.to_string()).trying(|| format!("cannot write {}", setting.display()))?;
    }
    Ok(mounted)
}

/// Names of EROFS mounts' settings.
fn mounts() -> Result<BTreeSet<OsString>> {
    let entries = fs::read_dir(MOUNTS).trying(|| format!("cannot look into {MOUNTS}"))?;
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names.filter(|name| name.as_encoded_bytes().starts_with(b"erofs-")).collect())
}

/// Unmounts, ends the daemon, and says what it did.
fn figures_of(infill: Infill, mounted: Mounted, wall: Duration) -> Result<Vec<(Figure, f64)>> {
    mounted.end()?;
    let served = of_statistics(&infill.end()?);
    Ok(vec![("wall_ms", wall.as_secs_f64() * 1e3), ("events", served.events as f64), ("filled_mb", served.bytes as f64 / 1e6)])
}
