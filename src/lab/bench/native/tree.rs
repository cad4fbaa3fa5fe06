//! A tree of this machine as an EROFS image, read whole and cold: nothing of the mounted files is in the page cache, and all of the
//! blob in the store is.

use memmap2::MmapOptions;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::ground::{Ground, Infill, LoopDisk, Mounted, blob_in, cpu_ns, image_in, image_of, settle, warm};
use super::peer::{self, Kind, Served};
use super::samples::{Figures, Samples};
use super::{Plan, Section, Subject, failed};
use crate::lab::bench::daemon::Daemon;
use crate::lab::disk::CacheFs;
use crate::lab::progress::Progress;
use crate::lab::tree::{Content, Manifest, Selection, compare};
use crate::lab::{Result, Trying};
use crate::ops::reflink::clone_whole;

/// The image in a store.
pub(super) const TREE: &str = "tree";
/// What the tree is made of.
const SOURCES: &[&str] = &["/usr/share", "/usr/bin", "/usr/lib"];
/// Files of the tree.
const FILES_MAX: usize = 40_000;
/// Longest of them.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Numbers of readers.
const READERS: [usize; 2] = [1, 8];
/// What a reader reads at a time, as cat(1).
const READ_BYTES: usize = 128 << 10;
/// Readers that look whether everything is right, after the time was taken.
const CHECKERS: usize = 2;
/// The file system for [`Cell::Reflinked`] beside what is in it.
const XFS_SLACK_BYTES: u64 = 1 << 30;

/// Who serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cell {
    /// Nobody: the blob is complete, in the page cache, and not watched.
    Present,
    /// The same while a thread copies the blob as cp(1) does: what bringing all of it costs at least. Ends when both have.
    BesideCopy,
    /// infill, with an empty cache.
    Copied,
    /// The naive daemon with so many threads.
    Naive(usize),
    /// As [`Cell::Present`], on XFS.
    PresentXfs,
    /// The same, but the blob is a reflink, made just now by nobody's daemon: a file of its own, of which nothing is in the page
    /// cache.
    ReflinkXfs,
    /// infill, with an empty cache on the XFS of its store.
    Reflinked,
}

impl Cell {
    /// Those that are measured beside each other; the first one of a file system is what the others are compared with.
    const HERE: [Self; 5] = [Self::Present, Self::BesideCopy, Self::Copied, Self::Naive(1), Self::Naive(2)];
    const ON_XFS: [Self; 3] = [Self::PresentXfs, Self::ReflinkXfs, Self::Reflinked];

    const fn name(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::BesideCopy => "present, beside cp",
            Self::Copied => "copied",
            Self::Naive(1) => "naive",
            Self::Naive(_) => "naive, 2 threads",
            Self::PresentXfs => "present, XFS",
            Self::ReflinkXfs => "present, XFS, a reflink",
            Self::Reflinked => "reflinked",
        }
    }
}

/// Measures.
pub(super) fn measure(plan: &Plan, ground: &Ground) -> Result<Section> {
    let bench = Bench::make(plan, ground)?;
    let mut progress = Progress::begin("tree: reading it cold");
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        for readers in READERS {
            for cells in [&Cell::HERE[..], if bench.xfs.is_some() { &Cell::ON_XFS } else { &[] }] {
                let (mut present_ms, mut reflink_ms) = (None, None);
                for &cell in cells {
                    progress.update(|| format!("round {}: {}, {readers} readers", round + 1, cell.name()));
                    let (wall, mut figures) = bench.run(cell, readers, round == 0)?;
                    let wall_ms = wall.as_secs_f64() * 1e3;
                    let of_ms = *present_ms.get_or_insert(wall_ms);
                    figures.extend([("wall_ms", wall_ms), ("of_present", wall_ms / of_ms)]);
                    reflink_ms = reflink_ms.or((cell == Cell::ReflinkXfs).then_some(wall_ms));
                    figures.extend(reflink_ms.map(|reflink_ms| ("of_reflink", wall_ms / reflink_ms)));
                    samples.add(cell.name(), readers, figures);
                }
            }
        }
    }
    progress.finish("done");
    let title = format!(
        "{} files ({:.0} MB) read whole and cold by cat's reads; the source is in the page cache",
        bench.tree.files.len(),
        bench.tree.manifest.len_bytes() as f64 / 1e6
    );
    Ok(samples.section(Subject::Tree, title, &["wall_ms", "of_present", "of_reflink", "daemon_cpu_ms", "events", "filled_mb"]))
}

/// A tree of this machine as an image.
pub(super) struct Packed {
    /// What it must read as.
    pub(super) manifest: Manifest,
    /// Paths of the files, in order.
    pub(super) files: Vec<String>,
}

impl Packed {
    /// Makes the image [`TREE`] in a store, of so many bytes at most.
    pub(super) fn make(ground: &Ground, store: &Path, bytes_max: u64) -> Result<Self> {
        let progress = Progress::begin("tree: packing files of this machine into an EROFS image");
        let tree = ground.path("tree");
        Selection { sources: SOURCES, files_max: FILES_MAX, bytes_max, file_bytes_max: FILE_BYTES_MAX }.copy_to(&tree)?;
        let manifest = Manifest::of(&tree)?;
        image_of(&tree, store, TREE)?;
        fs::remove_dir_all(&tree).trying(|| format!("cannot remove {}", tree.display()))?;
        let files = manifest.entries.iter().filter(|entry| matches!(entry.content, Content::File { .. }));
        let files: Vec<String> = files.map(|entry| entry.path.clone()).collect();
        progress.finish(&format!("{} files, {} MiB", files.len(), manifest.len_bytes() >> 20));
        Ok(Self { manifest, files })
    }

    /// An error if a mount of it reads as something else.
    pub(super) fn must_be_right(&self, mounted: &Path, name: &str) -> Result<()> {
        let compared = compare(mounted, &self.manifest, CHECKERS);
        let odd: Vec<_> = compared.failed.iter().chain(&compared.different).take(3).cloned().collect();
        if odd.is_empty() { Ok(()) } else { Err(failed(format!("{name} was read wrong: {}", odd.join("; ")))) }
    }
}

/// The tree in stores.
struct Bench<'a> {
    plan: &'a Plan,
    ground: &'a Ground,
    tree: Packed,
    xfs: Option<LoopDisk>,
}

/// Who serves an image, and what has to be mounted.
struct Ready {
    image: PathBuf,
    blob: PathBuf,
    server: Server,
}

enum Server {
    Nobody,
    Infill(Infill),
    Naive(Daemon),
}

impl Server {
    fn cpu_ns(&self) -> Result<u64> {
        match self {
            Self::Nobody => Ok(0),
            Self::Infill(infill) => infill.cpu_ns(),
            Self::Naive(daemon) => cpu_ns(daemon),
        }
    }
}

impl<'a> Bench<'a> {
    fn make(plan: &'a Plan, ground: &'a Ground) -> Result<Self> {
        let store = ground.store();
        let tree = Packed::make(ground, &store, plan.tree_bytes)?;
        let xfs = LoopDisk::make(ground, CacheFs::Xfs, "xfs", 2 * tree.manifest.len_bytes() + XFS_SLACK_BYTES)?;
        if let Some(xfs) = &xfs {
            let on_xfs = xfs.at().join("store");
            fs::create_dir_all(&on_xfs).trying(|| format!("cannot make {}", on_xfs.display()))?;
            for (from, to) in [(image_in(&store, TREE), image_in(&on_xfs, TREE)), (blob_in(&store, TREE), blob_in(&on_xfs, TREE))] {
                fs::copy(&from, &to).trying(|| format!("cannot write {}", to.display()))?;
            }
        }
        Ok(Self { plan, ground, tree, xfs })
    }

    /// One cell: how long its readers took, and what else it cost. `check`: what they read is looked at, too.
    fn run(&self, cell: Cell, readers: usize, check: bool) -> Result<(Duration, Figures)> {
        let dir = self.base(cell)?.join("cell");
        fs::create_dir_all(&dir).trying(|| format!("cannot make {}", dir.display()))?;
        let Ready { image, blob, server } = self.prepare(cell, &dir)?;
        let mounted = Mounted::make(&image, &blob, &dir.join("mnt"))?;
        settle();
        touch_memory(2 * self.tree.manifest.len_bytes())?;
        let before_ns = server.cpu_ns()?;
        let beside = (cell == Cell::BesideCopy).then(|| (blob_in(&self.ground.store(), TREE), dir.join("copy")));
        let wall = read_whole(mounted.at(), &self.tree.files, readers, beside)?;
        let daemon_cpu_ms = (server.cpu_ns()? - before_ns) as f64 / 1e6;
        if check {
            self.tree.must_be_right(mounted.at(), cell.name())?;
        }
        mounted.end()?;
        let figures = match server {
            Server::Nobody => Vec::new(),
            Server::Infill(infill) => served(daemon_cpu_ms, &of_statistics(&infill.end()?)),
            Server::Naive(daemon) => served(daemon_cpu_ms, &peer::end(daemon)?),
        };
        fs::remove_dir_all(&dir).trying(|| format!("cannot remove {}", dir.display()))?;
        Ok((wall, figures))
    }

    /// Where the cell's store and cache are.
    fn base(&self, cell: Cell) -> Result<&Path> {
        if !Cell::ON_XFS.contains(&cell) {
            return Ok(self.ground.at());
        }
        self.xfs.as_ref().map(LoopDisk::at).ok_or_else(|| failed("there is no XFS"))
    }

    fn prepare(&self, cell: Cell, dir: &Path) -> Result<Ready> {
        let store = self.base(cell)?.join("store");
        let (image, blob) = (image_in(&store, TREE), blob_in(&store, TREE));
        warm(&image)?;
        warm(&blob)?;
        Ok(match cell {
            Cell::Present | Cell::BesideCopy | Cell::PresentXfs => Ready { image, blob, server: Server::Nobody },
            Cell::ReflinkXfs => {
                let twin = dir.join("blob");
                let (from, to) =
                    (File::open(&blob).trying(|| "cannot open the blob")?, File::create(&twin).trying(|| "cannot make a file")?);
                clone_whole(to.as_fd(), from.as_fd()).trying(|| format!("cannot share blocks with {}", twin.display()))?;
                Ready { image, blob: twin, server: Server::Nobody }
            }
            Cell::Copied | Cell::Reflinked => {
                let mut infill = Infill::start(self.plan, &[&store], dir, &[])?;
                let (image, blob) = infill.attach(TREE)?;
                Ready { image, blob, server: Server::Infill(infill) }
            }
            Cell::Naive(threads) => {
                let file = dir.join("blob");
                peer::sparse_twin(&blob, &file)?;
                let daemon = peer::start(self.plan, Kind::Naive, &file, Some(&blob), threads)?;
                Ready { image, blob: file, server: Server::Naive(daemon) }
            }
        })
    }
}

/// Has the kernel get so much memory, and gives it back: where a hypervisor takes back what its guest does not use, who needs
/// new pages would pay for that, and who needs none would not.
pub(super) fn touch_memory(len_bytes: u64) -> Result<()> {
    let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
    MmapOptions::new().len(len).populate().map_anon().map(drop).trying(|| format!("cannot touch {} MiB of memory", len_bytes >> 20))
}

pub(super) fn of_statistics(statistics: &serde_json::Value) -> Served {
    let number = |name: &str| statistics[name].as_u64().unwrap_or(0);
    Served { events: number("requests") + number("present"), bytes: number("bytes_filled") }
}

pub(super) fn served(daemon_cpu_ms: f64, served: &Served) -> Figures {
    vec![("daemon_cpu_ms", daemon_cpu_ms), ("events", served.events as f64), ("filled_mb", served.bytes as f64 / 1e6)]
}

/// Reads every file once; reader i of n has every n-th from the i-th on. From the first open to the last byte, also of a file
/// that is copied meanwhile.
pub(super) fn read_whole(root: &Path, files: &[String], readers: usize, beside: Option<(PathBuf, PathBuf)>) -> Result<Duration> {
    let began = Instant::now();
    let read = |first: usize| -> Result<()> {
        let mut buffer = vec![0; READ_BYTES];
        for path in files.iter().skip(first).step_by(readers) {
            let path = root.join(path);
            let what = || format!("cannot read {}", path.display());
            let mut file = File::open(&path).trying(what)?;
            while file.read(&mut buffer).trying(what)? > 0 {}
        }
        Ok(())
    };
    thread::scope(|scope| {
        let copy = |(from, to): (PathBuf, PathBuf)| fs::copy(&from, &to).map(drop).trying(|| format!("cannot write {}", to.display()));
        let copying = beside.map(|files| scope.spawn(move || copy(files)));
        let threads: Vec<_> = (0..readers).map(|first| scope.spawn(move || read(first))).chain(copying).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(failed("a reader panicked"))))
    })?;
    Ok(began.elapsed())
}
