//! The benches. `infill bench guest`: what a daemon costs its readers, measured on a real kernel whose clock counts
//! instructions. `infill bench engine`: what the engine costs without a kernel that asks. `infill bench restart`: what
//! readers notice when the daemon is killed (`restart`), and `infill bench density`: far more objects than descriptors
//! (`density`). `infill bench native`: the fanotify front end on this machine's own kernel (`native`). These three, and the `daemon`
//! that they start, are apart from all below.
//!
//! ```text
//!  engine  engine    figures of the two below, and system calls counted by strace
//!          machine   the machine alone, with a driver whose operations end at once
//!          rig       the whole engine with memory behind it: one run
//!          pump      its readers, without a kernel
//!          sources   its blobs: files in memory, devices without an end, a slow source
//!          bare      the kernel's part of that alone: the limit
//!  host    corpus    the tree that is read, the same on every machine
//!          data      tree -> images, disks, and the list that says what every file must read as
//!          peer      another daemon, as a file describes it
//!          grid      cells -> boots, some at a time -> results
//!          figures   results -> figures
//!          targets   what the figures must be
//!          report    figures -> tables
//!  guest   cell      one cell: disks, daemon, mount, cold read, umount, mount, present read
//!          memdisk   disks in memory that answer after a time on the guest's clock
//!          readers   who reads what in which order, and whether it was right
//!          meter     CPU time of every task, disks, READs, the daemon
//!          stages    where the CPU time goes, from a trace
//!          naive     the daemons to compare with
//! ```
//! A *cell* is one daemon, one scenario, one file system under the cache: one boot. "Present" is the read after a
//! second mount, everything in the cache and nothing in memory: what the kernel alone costs, and the limit.

mod bare;
pub mod cell;
mod corpus;
mod daemon;
pub mod data;
pub mod density;
pub mod engine;
pub mod figures;
pub mod grid;
pub mod machine;
mod memdisk;
mod meter;
pub mod naive;
pub mod native;
pub mod peer;
mod pump;
mod readers;
pub mod report;
pub mod restart;
mod rig;
mod sources;
mod stages;
pub mod targets;

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::disk::CacheFs;

/// Names in the store, and the domain they are mounted in.
pub const IMAGE: &str = "bench.img";
/// See [`IMAGE`].
pub const BLOB: &str = "bench.blob";
/// See [`IMAGE`].
pub const DOMAIN: &str = "bench";
/// Where the guest finds its cell, the list of files, and the disks' data.
const CELL_FILE: &str = "/cell.json";
const LISTING_FILE: &str = "/listing.json";
const CACHE_EXTENTS: &str = "/disk/cache";
const STORE_EXTENTS: &str = "/disk/store";
/// Where the guest mounts the disks, and the cache directory for a daemon.
pub const STORE_DIR: &str = "/store";
/// See [`STORE_DIR`].
pub const CACHE_DIR: &str = "/cache/root";
/// Where the store is instead, when it has to be on the cache's disk.
pub const STORE_BESIDE_CACHE: &str = "/cache/store";
/// Where the guest mounts images.
pub const MOUNT_DIR: &str = "/mnt";
/// Images of [`Scenario::Many8`].
pub const MANY: usize = 8;
/// The line with this beginning ends with the cell's result.
const RESULT_MARK: &str = "lab: result ";

/// What a bench that is done inside a guest finds; as JSON it comes out of there.
pub trait Findings: Serialize + DeserializeOwned {
    /// Whether it is as it should be.
    fn is_good(&self) -> bool;
    /// It in words.
    fn table(&self) -> String;
}

/// What is read, and by how many.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scenario {
    /// Every file once in the order of paths, one reader.
    Seq1,
    /// The same, eight readers that share one queue.
    Par8,
    /// Every file once in random order, one reader.
    Shuf1,
    /// One file in ten in random order, one reader.
    Part1,
    /// 2,000 random blocks of 4 KiB of the largest file, one reader.
    Rand1,
    /// The same, eight readers that share one queue.
    Rand8,
    /// As rand8, but each reader reads an image of its own, an eighth as large: an object each.
    Many8,
}

impl Scenario {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 7] = [Self::Seq1, Self::Par8, Self::Shuf1, Self::Part1, Self::Rand1, Self::Rand8, Self::Many8];
    /// Those that have targets.
    pub const USUAL: [Self; 6] = [Self::Seq1, Self::Par8, Self::Shuf1, Self::Part1, Self::Rand1, Self::Rand8];

    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Seq1 => "seq1",
            Self::Par8 => "par8",
            Self::Shuf1 => "shuf1",
            Self::Part1 => "part1",
            Self::Rand1 => "rand1",
            Self::Rand8 => "rand8",
            Self::Many8 => "many8",
        }
    }

    const fn readers(self) -> usize {
        match self {
            Self::Par8 | Self::Rand8 | Self::Many8 => 8,
            Self::Seq1 | Self::Shuf1 | Self::Part1 | Self::Rand1 => 1,
        }
    }

    const fn reads_blocks(self) -> bool {
        matches!(self, Self::Rand1 | Self::Rand8 | Self::Many8)
    }
}

/// Who serves, and how the images are mounted then.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Service {
    /// The daemon's name in tables.
    pub name: String,
    /// Program and arguments in the guest; empty: no daemon.
    pub argv: Vec<String>,
    /// Source of the mount; `{image}` in it and in the options stands for the image, `{blob}` for its blob.
    pub source: String,
    /// Options of the mount.
    pub options: String,
    /// After its cache is bound it may still be busy with its start for this long.
    pub settle_ms: u64,
    /// The store is copied to the cache's disk before the daemon starts.
    pub store_beside_cache: bool,
    /// Index of the peer whose programs and images this needs.
    pub peer: Option<usize>,
}

impl Service {
    /// A daemon of this program, or none, with the bench's own images.
    #[must_use]
    pub fn own(name: &str, argv: Vec<String>) -> Self {
        let (source, options) = match argv.is_empty() {
            false => ("none".into(), format!("fsid={{image}},domain_id={DOMAIN},device={{blob}}")),
            true => (format!("{STORE_DIR}/{{image}}"), format!("device={STORE_DIR}/{{blob}}")),
        };
        Self { name: name.into(), argv, source, options, settle_ms: SETTLE_MS, store_beside_cache: false, peer: None }
    }
}

/// See [`Service::settle_ms`].
pub const SETTLE_MS: u64 = 300;

/// One cell, as the guest gets it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    /// Who serves.
    pub service: Service,
    /// What is read.
    pub scenario: Scenario,
    /// File system under the cache.
    pub cache_fs: CacheFs,
    /// Time from a request to its completion, of both disks.
    pub disk_latency_ns: u64,
    /// The store's files are in the page cache when the cold read begins.
    pub warm_source: bool,
    /// Processors of the guest. With one its clock counts instructions; with more it is the host's, and noisy.
    pub cpus: u32,
    /// Which of several equal cells this is.
    pub run: usize,
    /// Trace where the CPU time goes; makes everything slower.
    pub traced: bool,
}

/// What happened in one phase.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// From its first instruction to its last.
    pub wall_ns: u64,
    /// CPU time of all tasks together.
    pub cpu_ns: u64,
    /// Of them, the daemon's with all its threads.
    pub daemon_cpu_ns: u64,
    /// READs that the kernel sent.
    pub reads: u64,
    /// What was read from and written to the cache's disk.
    pub cache: Traffic,
    /// The same of the store's disk.
    pub store: Traffic,
}

/// Traffic of a disk.
#[derive(Clone, Copy, Default, Debug, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Write requests.
    pub writes: u64,
}

/// A phase in which readers read.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub struct Reading {
    /// What it cost.
    pub phase: Phase,
    /// Files or blocks that were read.
    pub items: usize,
    /// Their length together.
    pub bytes: u64,
    /// Items that could not be read or read as something else, with the reason.
    pub wrong: Vec<String>,
    /// When the first item was complete, from the phase's start.
    pub first_ns: u64,
    /// Half of the items took no longer than this, from open to close.
    pub p50_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// All.
    pub max_ns: u64,
}

/// What the daemon holds at the end of the cold read.
#[derive(Clone, Copy, Default, Debug, Serialize, Deserialize)]
pub struct Held {
    /// Descriptors.
    pub fds: usize,
    /// Threads, those of its rings included.
    pub threads: u64,
    /// Most memory so far.
    pub rss_kib: u64,
}

/// What plain direct requests of 1 MiB to the modelled disks cost, in CPU time a byte: mostly the disks' own copying,
/// for which a real disk needs no processor.
#[derive(Clone, Copy, Default, Debug, Serialize, Deserialize)]
pub struct CopyCost {
    /// Reading.
    pub read_ns: f64,
    /// Writing for the first time.
    pub write_ns: f64,
}

/// All that a cell measured.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub struct CellResult {
    /// The guest's kernel release.
    pub kernel: String,
    /// The first mount, nothing in the cache.
    pub mount_cold: Phase,
    /// The read after it.
    pub cold: Reading,
    /// The second mount.
    pub mount_present: Phase,
    /// The read after that.
    pub present: Reading,
    /// The daemon, if there is one.
    pub held: Held,
    /// See [`CopyCost`].
    pub copy_cost: CopyCost,
    /// If the cell was traced.
    pub stages: Option<Stages>,
}

/// Where the CPU time of the reads went, and how long READs took, from a trace.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub struct Stages {
    /// Nanoseconds of the cold read by stage, tracing included.
    pub cold_ns: BTreeMap<String, u64>,
    /// The same of the present read.
    pub present_ns: BTreeMap<String, u64>,
    /// System calls of the daemon in the cold read.
    pub system_calls: u64,
    /// READs whose way was followed.
    pub reads: usize,
    /// From the moment the kernel queued a READ until its reader ran again: half took no longer.
    pub read_p50_ns: u64,
    /// 99 of 100.
    pub read_p99_ns: u64,
    /// 999 of 1,000.
    pub read_p999_ns: u64,
}
