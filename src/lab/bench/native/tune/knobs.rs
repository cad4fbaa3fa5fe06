//! What can be turned, and by what it is judged: the knobs of the profiles of `infill tune`, and those that were tried and left out.

use std::path::Path;

use super::cells::{Cell, Order};
use super::lever::{KernelFile, Lever};

/// A knob.
#[derive(Clone, Copy, Debug)]
pub struct Knob {
    /// Its name, also in profiles.
    pub name: &'static str,
    /// What "on" is, and what "off".
    pub what: &'static str,
    /// How it is turned.
    pub(super) lever: Lever,
    /// What is read meanwhile.
    pub(super) cells: &'static [Cell],
}

const NO_FLAGS: [&[&str]; 2] = [&[], &[]];
const NONE: Lever = Lever { files: &[], flags: NO_FLAGS, mount_read_ahead_kib: None, store_read_ahead_kib: None };

const fn files(files: &'static [KernelFile]) -> Lever {
    Lever { files, ..NONE }
}

const fn flags(off: &'static [&'static str], on: &'static [&'static str]) -> Lever {
    Lever { flags: [off, on], ..NONE }
}

/// Whether memory gets huge pages by itself.
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

const TREE_1: Cell = Cell::Tree { readers: 1, order: Order::Paths };
const TREE_8: Cell = Cell::Tree { readers: 8, order: Order::Paths };
/// A disk that moves its head for each read.
const HDD_IN_ORDER: Cell = Cell::SlowTree { readers: 1, order: Order::Paths };
const HDD_RANDOM: Cell = Cell::SlowTree { readers: 1, order: Order::Random };
const HDD_PART: Cell = Cell::SlowTree { readers: 1, order: Order::RandomTenth };

/// All of them.
pub const KNOBS: &[Knob] = &[
    Knob {
        name: "halt-poll",
        what: "guest_halt_poll_ns of the module haltpoll: 0, 200000",
        lever: files(&[KernelFile { path: "/sys/module/haltpoll/parameters/guest_halt_poll_ns", off: "0", on: "200000" }]),
        cells: &[Cell::Events { readers: 1 }, Cell::Events { readers: 16 }, TREE_1, TREE_8],
    },
    Knob {
        name: "erofs-read-ahead",
        what: "read_ahead_kb of an EROFS mount: 128 (the kernel's), 1024",
        lever: Lever { mount_read_ahead_kib: Some([128, 1024]), ..NONE },
        cells: &[Cell::Stream, TREE_1, HDD_IN_ORDER],
    },
    Knob {
        name: "fd-budget",
        what: "--fd-budget 512, 4096, for at most 1,000 images",
        lever: flags(&["--fd-budget=512"], &["--fd-budget=4096"]),
        cells: &[Cell::Images { number: 1000 }],
    },
    Knob {
        name: "nr-open",
        what: "fs.nr_open: 4096, 1048576, for at most 1,000 images",
        lever: files(&[KernelFile { path: "/proc/sys/fs/nr_open", off: "4096", on: "1048576" }]),
        cells: &[Cell::Images { number: 1000 }],
    },
    Knob { name: "window", what: "--window auto, 1M", lever: flags(&[], &["--window=1M"]), cells: &[HDD_RANDOM, HDD_PART, HDD_IN_ORDER] },
    Knob {
        name: "slot-size",
        what: "--slot-size 1M, 4M",
        lever: flags(&[], &["--slot-size=4M"]),
        cells: &[HDD_IN_ORDER, HDD_RANDOM, TREE_8],
    },
    Knob {
        name: "ahead-percent",
        what: "--ahead-percent 8, 30",
        lever: flags(&[], &["--ahead-percent=30"]),
        cells: &[HDD_RANDOM, HDD_PART],
    },
    Knob {
        name: "complete-always",
        what: "--complete auto, always",
        lever: flags(&[], &["--complete=always"]),
        cells: &[HDD_RANDOM, HDD_PART, TREE_1],
    },
    Knob {
        name: "store-read-ahead",
        what: "read_ahead_kb of the store's disk: 128, 4096",
        lever: Lever { store_read_ahead_kib: Some([128, 4096]), ..NONE },
        cells: &[HDD_IN_ORDER, HDD_RANDOM],
    },
    Knob { name: "one-shard", what: "--shards 2, 1", lever: flags(&["--shards=2"], &["--shards=1"]), cells: &[TREE_1, TREE_8] },
    Knob { name: "small-buffers", what: "--slots 16, 4", lever: flags(&[], &["--slots=4"]), cells: &[TREE_1, TREE_8] },
    Knob { name: "slots", what: "--slots 16, 64", lever: flags(&[], &["--slots=64"]), cells: &[TREE_8] },
    Knob { name: "workers", what: "--workers 8, 32", lever: flags(&[], &["--workers=32"]), cells: &[TREE_8] },
    Knob { name: "direct", what: "--source auto, direct", lever: flags(&[], &["--source=direct"]), cells: &[TREE_1, TREE_8] },
    Knob {
        name: "transparent-huge-pages",
        what: "transparent huge pages: never, madvise",
        lever: files(&[KernelFile { path: HUGE_PAGES, off: "never", on: "madvise" }]),
        cells: &[TREE_1, HDD_IN_ORDER],
    },
    Knob {
        name: "reserved-huge-pages",
        what: "without transparent ones, vm.nr_hugepages: 0, 64",
        lever: files(&[
            KernelFile { path: HUGE_PAGES, off: "never", on: "never" },
            KernelFile { path: "/proc/sys/vm/nr_hugepages", off: "0", on: "64" },
        ]),
        cells: &[TREE_1],
    },
    Knob {
        name: "dirty-background",
        what: "vm.dirty_background_ratio: 10, 3",
        lever: files(&[KernelFile { path: "/proc/sys/vm/dirty_background_ratio", off: "10", on: "3" }]),
        cells: &[TREE_1],
    },
    Knob {
        name: "autogroup",
        what: "kernel.sched_autogroup_enabled: 1, 0",
        lever: files(&[KernelFile { path: "/proc/sys/kernel/sched_autogroup_enabled", off: "1", on: "0" }]),
        cells: &[Cell::Events { readers: 16 }, TREE_8],
    },
];

impl Knob {
    /// The knob with this name.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        KNOBS.iter().find(|knob| knob.name == name)
    }

    /// Why this machine does not have it, if it does not.
    #[must_use]
    pub fn unfit(&self) -> Option<String> {
        let missing = self.lever.files.iter().find(|file| !Path::new(file.path).exists())?;
        Some(format!("{} is missing", missing.path))
    }
}
