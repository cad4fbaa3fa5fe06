//! From a seed to a world: which kernel, which blobs, how many shards, what goes wrong and how often.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::Arc;

use crate::engine::machine::Limits;
use crate::engine::plan::{Complete, Completion, Window};
use crate::front::sim::blob::{PAGE_BYTES, SimBlob};
use crate::front::sim::kernel::Kernel;
use crate::front::sim::objects::Cookie;
use crate::front::sim::readers::Reader;
use crate::front::sim::rng::Rng;
use crate::front::sim::sink::{FLAVOURS, Flavour};
use crate::range::{ByteRange, align_down, align_up};
use crate::store::Blob;

/// How often each thing goes wrong, in a thousand chances.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Faults {
    /// An operation moves less than it was asked to.
    pub(super) short: u64,
    /// An operation is interrupted: `EINTR` or `EAGAIN`.
    pub(super) soft: u64,
    /// A write finds no room, but will at the next try: `ENOSPC`, `ENOBUFS` or `EDQUOT`.
    pub(super) no_room: u64,
    /// An operation fails once for no reason: `EIO` or `ECANCELED`.
    pub(super) hard: u64,
    /// A short write is reported as complete (kernels that round their result).
    pub(super) lie: u64,
    /// A sector of a blob cannot be read, for ever.
    pub(super) broken: u64,
    /// `read(2)` on the device returns 0 for no reason.
    pub(super) nothing: u64,
    /// A wake-up is lost.
    pub(super) deaf: u64,
    /// An OPEN finds no descriptor.
    pub(super) no_descriptor: u64,
    /// A reader is killed.
    pub(super) kill: u64,
    /// A blob is unmounted under its readers, or mounted again.
    pub(super) umount: u64,
    /// A source file is truncated.
    pub(super) truncate: u64,
    /// Every write finds no room, for a while.
    pub(super) full: u64,
    /// The daemon gives an object's descriptor back.
    pub(super) evict: u64,
    /// The daemon dies and starts again with `restore`.
    pub(super) crash: u64,
    /// `restore` without a reason: everything is delivered twice.
    pub(super) restore: u64,
    /// An operation of a fill that is over is reported done once more.
    pub(super) stale: u64,
    /// A file system hangs: nothing that reads from it ends, for a while or until the other faults have ended.
    pub(super) hang: u64,
    /// One that hangs comes back.
    pub(super) come_back: u64,
    /// A READ that the kernel never sent, for an object that nobody opened.
    pub(super) forged: u64,
}

impl Faults {
    /// A choice of faults; one world in eight has none.
    fn by_chance(rng: &mut Rng) -> Self {
        let mut faults = Self::default();
        if rng.chance(125) {
            return faults;
        }
        let mut draw = |field: &mut u64, most: u64| {
            if rng.chance(350) {
                *field = rng.between(1, most);
            }
        };
        draw(&mut faults.short, 400);
        draw(&mut faults.soft, 300);
        draw(&mut faults.no_room, 200);
        draw(&mut faults.hard, 100);
        draw(&mut faults.lie, 100);
        draw(&mut faults.broken, 600);
        draw(&mut faults.nothing, 300);
        draw(&mut faults.deaf, 300);
        draw(&mut faults.no_descriptor, 100);
        draw(&mut faults.kill, 20);
        draw(&mut faults.umount, 15);
        draw(&mut faults.truncate, 5);
        draw(&mut faults.full, 5);
        draw(&mut faults.evict, 20);
        draw(&mut faults.crash, 5);
        draw(&mut faults.restore, 5);
        draw(&mut faults.stale, 100);
        draw(&mut faults.forged, 10);
        draw(&mut faults.hang, 30);
        draw(&mut faults.come_back, 10);
        faults
    }
}

/// What a seed says about a world before its first step.
#[derive(Debug)]
pub(super) struct Setup {
    /// The machine's limits, the same for every shard.
    pub(super) limits: Limits,
    /// Number of shards.
    pub(super) shards: usize,
    /// What goes wrong.
    pub(super) faults: Faults,
    /// Steps before the faults end and everything must come to rest.
    pub(super) steps: u64,
    /// How often, in a thousand, a shard takes all its actions at once; otherwise it hears more first.
    pub(super) prompt: u64,
    /// The kernel with its cookies and readers, nothing mounted.
    pub(super) kernel: Kernel,
    /// The blobs that the store has.
    pub(super) blobs: Vec<Arc<SimBlob>>,
}

impl Setup {
    /// The world of a seed.
    #[must_use]
    pub(super) fn new(rng: &mut Rng) -> Self {
        let faults = Faults::by_chance(rng);
        let flavour = rng.pick(&FLAVOURS);
        let first_id = rng.pick(&[0, 1, 77, u32::MAX - 2, u32::MAX]);
        let mut kernel = Kernel::new(flavour, first_id);
        let blobs = blobs(rng, &faults);
        add_cookies(&mut kernel, &blobs, &flavour, rng);
        for _ in 0..rng.between(1, 6) {
            kernel.add_reader(some_reader(&kernel, rng));
        }
        Self {
            limits: limits(rng),
            shards: rng.pick(&[1, 1, 2, 3]),
            faults,
            steps: rng.between(50, 600),
            prompt: rng.pick(&[1000, 1000, 300]),
            kernel,
            blobs,
        }
    }
}

fn blobs(rng: &mut Rng, faults: &Faults) -> Vec<Arc<SimBlob>> {
    let make = |id| {
        let mut blob = SimBlob::by_chance(id, rng);
        while blob.len_bytes() > 0 && rng.chance(faults.broken) {
            let at = rng.below(blob.len_bytes());
            blob.break_at(at);
        }
        Arc::new(blob)
    };
    let count = 4;
    (0..count).map(make).collect()
}

/// One to four cookies with a blob each, and perhaps one that no store has.
fn add_cookies(kernel: &mut Kernel, blobs: &[Arc<SimBlob>], flavour: &Flavour, rng: &mut Rng) {
    for blob in &blobs[..rng.index(blobs.len()) + 1] {
        let name = format!("blob{}", blob.id());
        kernel.add_cookie(Cookie::new(0, name, Some(blob.clone()), flavour.block_bytes));
    }
    if rng.chance(150) {
        kernel.add_cookie(Cookie::new(1, "unknown".into(), None, flavour.block_bytes));
    }
}

fn limits(rng: &mut Rng) -> Limits {
    let fill_max_bytes = PAGE_BYTES << rng.below(7);
    Limits {
        page_bytes: PAGE_BYTES,
        fill_max_bytes,
        window: if rng.below(3) == 0 { Window::Adaptive { budget_percent: 6 } } else { Window::Fixed(PAGE_BYTES << rng.below(9)) },
        completion: completion(rng),
        slots: rng.pick(&[1, 2, 3, 8]),
        fills_per_need: rng.pick(&[1, 2, 4, 16]),
        timeout_ns: rng.pick(&[2, 30]) * 1_000_000_000,
        probe: rng.chance(800),
        sinks_know: true,
    }
}

fn completion(rng: &mut Rng) -> Completion {
    Completion {
        when: rng.pick(&[Complete::Auto, Complete::Auto, Complete::Off, Complete::Always]),
        bytes_per_s: NonZeroU64::new(rng.pick(&[0, 0, 1 << 20, 1 << 30])),
    }
}

/// A reader of a cookie: all of it, a few places, or ranges that make no sense.
pub(super) fn some_reader(kernel: &Kernel, rng: &mut Rng) -> Reader {
    let cookie = rng.index(kernel.cookies().len());
    let blob = kernel.cookies()[cookie].blob.as_ref();
    let len = blob.map_or(PAGE_BYTES, |blob| blob.padded_len().max(PAGE_BYTES));
    let read_ahead = PAGE_BYTES << rng.below(6);
    let style = rng.below(10);
    let wanted: VecDeque<ByteRange> = match style {
        0..4 => std::iter::once(0..len).collect(),
        4..8 => (0..rng.between(1, 12)).map(|_| some_pages(len, rng)).collect(),
        _ => (0..rng.between(1, 6)).map(|_| nonsense(len, rng)).collect(),
    };
    let mut reader = Reader::new(cookie, wanted, read_ahead);
    reader.careless = style >= 8;
    reader
}

fn some_pages(len: u64, rng: &mut Rng) -> ByteRange {
    const PAGES_MAX: u64 = 12;
    let start = align_down(rng.below(len), PAGE_BYTES);
    let end = align_up(start + 1 + rng.below(PAGES_MAX * PAGE_BYTES), PAGE_BYTES);
    start..end.min(len)
}

/// A range as a broken image or a kernel with small blocks might ask for.
fn nonsense(len: u64, rng: &mut Rng) -> ByteRange {
    const BLOCK_BYTES: u64 = 1024;
    let start = rng.below(2 * len);
    match rng.below(6) {
        0 => start..start,
        1 => start..u64::MAX,
        2 => u64::MAX - 5..u64::MAX,
        3 => len..len + PAGE_BYTES,
        4 => align_down(start, BLOCK_BYTES)..align_down(start, BLOCK_BYTES) + BLOCK_BYTES,
        _ => start..start + rng.below(len),
    }
}
