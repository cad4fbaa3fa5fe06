//! Readers of random pages of a file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::time::ClockId;

use super::failed;
use crate::front::sim::rng::Rng;
use crate::lab::bench::memdisk::clock_ns;
use crate::lab::{Result, Trying};

/// Unit of the reads.
pub(super) const PAGE_BYTES: u64 = 4096;
/// Reads for whose times a reader has room at once.
const READS_EXPECTED: usize = 1 << 20;

/// How much is read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    /// Any pages, for so long.
    Over(Duration),
    /// Each page once; with several readers each has its share.
    AllRead,
}

/// What all readers saw together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Reads.
    pub(super) reads: u64,
    /// In the time from the first to the last one.
    pub(super) reads_per_s: f64,
    /// Half of the reads took no longer.
    pub(super) p50_us: f64,
    /// 99 of 100.
    pub(super) p99_us: f64,
    /// CPU time of the readers, in user and kernel mode, for a read.
    pub(super) cpu_us: f64,
}

/// What one reader saw.
struct Part {
    took_ns: Vec<u32>,
    cpu_ns: u64,
}

/// Has the first `pages` of a file read in random order.
pub(super) fn read_randomly(path: &Path, pages: u64, readers: usize, until: Until) -> Result<Seen> {
    let start = Barrier::new(readers + 1);
    let (wall, parts) = thread::scope(|scope| {
        let start = &start;
        let spawn = |reader: usize| scope.spawn(move || one_reader(path, start, &order(pages, readers, reader), until));
        let threads: Vec<_> = (0..readers).map(spawn).collect();
        start.wait();
        let began = Instant::now();
        let parts = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(failed("a reader panicked"))));
        let parts = parts.collect::<Result<Vec<Part>>>();
        (began.elapsed(), parts)
    });
    Ok(sum_up(wall, parts?))
}

/// Which pages a reader reads, in which order: again and again those, if it reads over a time.
fn order(pages: u64, readers: usize, reader: usize) -> Vec<u64> {
    let mut order: Vec<u64> = (reader as u64..pages).step_by(readers).collect();
    let mut rng = Rng::new(reader as u64);
    for last in (1..order.len()).rev() {
        order.swap(last, rng.index(last + 1));
    }
    order
}

fn one_reader(path: &Path, start: &Barrier, order: &[u64], until: Until) -> Result<Part> {
    let what = || format!("cannot read {}", path.display());
    let opened = File::open(path).and_then(|file| {
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        Ok(file)
    });
    let mut took_ns = Vec::with_capacity(READS_EXPECTED);
    let mut page = [0; PAGE_BYTES as usize];
    start.wait();
    let file = opened.trying(what)?;
    let cpu_before_ns = clock_ns(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    let began = Instant::now();
    let mut now = began;
    'read: loop {
        for number in order {
            if let Until::Over(time) = until
                && now - began >= time
            {
                break 'read;
            }
            file.read_exact_at(&mut page, number * PAGE_BYTES).trying(what)?;
            let ended = Instant::now();
            took_ns.push(u32::try_from((ended - now).as_nanos()).unwrap_or(u32::MAX));
            now = ended;
        }
        if matches!(until, Until::AllRead) {
            break;
        }
    }
    Ok(Part { took_ns, cpu_ns: clock_ns(ClockId::CLOCK_THREAD_CPUTIME_ID)? - cpu_before_ns })
}

fn sum_up(wall: Duration, parts: Vec<Part>) -> Seen {
    let cpu_ns: u64 = parts.iter().map(|part| part.cpu_ns).sum();
    let mut took_ns: Vec<u32> = parts.into_iter().flat_map(|part| part.took_ns).collect();
    took_ns.sort_unstable();
    let rank = |percent: usize| took_ns.get(took_ns.len() * percent / 100).map_or(0.0, |&ns| f64::from(ns) / 1e3);
    let reads = took_ns.len() as f64;
    Seen {
        reads: took_ns.len() as u64,
        reads_per_s: reads / wall.as_secs_f64(),
        p50_us: rank(50),
        p99_us: rank(99),
        cpu_us: cpu_ns as f64 / 1e3 / reads,
    }
}
