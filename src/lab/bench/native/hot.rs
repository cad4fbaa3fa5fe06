//! One reader of what is there, beside many that wait for a slow source, all of them asked for by one daemon. Beside it, what a
//! loop does to it that has one group for everything, and does not wait for the source itself.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::events::{NO_MORE, PAGES};
use super::ground::{Ground, Infill, LoopDisk, ONE, blob_in, drop_cached, image_in, prime, write_random};
use super::hold::Hold;
use super::load::{PAGE_BYTES, Seen, Until, read_randomly};
use super::samples::{Figures, Samples};
use super::throttle::{Limit, Throttle};
use super::{Plan, Section, Subject, failed};
use crate::lab::disk::{CacheFs, sparse};
use crate::lab::progress::Progress;
use crate::lab::{Result, Trying};

/// The slow image in a store. It is never mounted.
const SLOW: &str = "slow";
/// Readers that wait for it.
const WAITING: usize = 256;
/// Distance between what two of them wait for: so far that one fill does not bring both.
const STRIDE_BYTES: u64 = 64 << 10;
/// From when all readers wait until the daemon has taken notice of all of them.
const TAKEN: Duration = Duration::from_millis(200);
/// How long readers may take until they all wait.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longer than anything here takes: no reader gets an error because it waits.
const NO_TIMEOUT: &str = "--request-timeout-ms=600000";
/// The slow disk's, beside what readers wait for.
const SLACK_BYTES: u64 = 64 << 20;

/// A file with data that is there and one that nobody gets, under the same daemon.
struct Pair<'a> {
    name: &'static str,
    hot: PathBuf,
    slow: PathBuf,
    /// What the slow one waits for.
    obstacle: &'a dyn Obstacle,
}

/// What readers wait for, as long as the bench wants.
trait Obstacle: Sync {
    fn begin(&self) -> Result<()>;
    fn end(&self) -> Result<()>;
}

impl Obstacle for Hold {
    fn begin(&self) -> Result<()> {
        self.set(true);
        Ok(())
    }

    fn end(&self) -> Result<()> {
        self.set(false);
        Ok(())
    }
}

impl Obstacle for Throttle {
    fn begin(&self) -> Result<()> {
        self.set(true)
    }

    fn end(&self) -> Result<()> {
        self.set(false)
    }
}

/// Measures.
pub(super) fn measure(plan: &Plan, ground: &Ground) -> Result<Section> {
    let mut progress = Progress::begin("hot: reading what is there, beside readers that wait");
    let store = ground.store();
    let rounds_bytes = plan.rounds as u64 * WAITING as u64 * STRIDE_BYTES;
    let disk = LoopDisk::make(ground, CacheFs::Ext4, "hot-disk", rounds_bytes + SLACK_BYTES)?;
    let disk = disk.ok_or_else(|| failed("there is no slow disk; see above"))?;
    write_random(&image_in(&store, SLOW), PAGE_BYTES)?;
    write_random(&blob_in(disk.at(), SLOW), rounds_bytes)?;
    drop_cached(&blob_in(disk.at(), SLOW))?;
    let flags = [&[NO_TIMEOUT], &NO_MORE[..]].concat();
    let mut infill = Infill::start(plan, &[&store, disk.at()], &ground.dir("hot")?, &flags)?;
    let (_, hot) = infill.attach(ONE)?;
    let (_, slow) = infill.attach(SLOW)?;
    prime(&hot, &ground.blob(), PAGES)?;
    let (one_hot, one_slow) = (ground.copy_of_blob("hot-one")?, ground.path("hot-slow"));
    sparse(&one_slow, rounds_bytes)?;
    let hold = Hold::of(&[one_slow.clone(), one_hot.clone()])?;
    let throttle = Throttle::of(infill.pid(), disk.at(), Limit::Stopped)?;
    let mut pairs = vec![Pair { name: "one group", hot: one_hot, slow: one_slow, obstacle: &hold }];
    if let Some(throttle) = &throttle {
        pairs.insert(0, Pair { name: "infill", hot, slow, obstacle: throttle });
    }
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        progress.update(|| format!("round {}", round + 1));
        for pair in &pairs {
            let alone = pair.read(plan)?;
            let beside = pair.read_beside(plan, round)?;
            samples.add(&format!("{}, alone", pair.name), 1, figures(&alone, &alone));
            samples.add(&format!("{}, beside", pair.name), 1, figures(&beside, &alone));
        }
    }
    drop(pairs);
    infill.end()?;
    drop(throttle);
    progress.finish("done");
    let title = format!(
        "random reads of 4 KiB that are in the page cache, of a file that is watched; beside {WAITING} readers that wait for another one"
    );
    Ok(samples.section(Subject::Hot, title, &["p50_us", "p50_of_alone", "p99_us", "p99_of_alone", "reads_per_s"]))
}

impl Pair<'_> {
    fn read(&self, plan: &Plan) -> Result<Seen> {
        read_randomly(&self.hot, PAGES, 1, Until::Over(plan.time))
    }

    /// The same with readers of the slow one, which wait from before the first read until after the last.
    fn read_beside(&self, plan: &Plan, round: usize) -> Result<Seen> {
        let (began, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let wait = |number: usize| {
            began.fetch_add(1, Ordering::Relaxed);
            let read = read_page(&self.slow, number as u64 * STRIDE_BYTES);
            ended.fetch_add(1, Ordering::Relaxed);
            read
        };
        let wait = &wait;
        self.obstacle.begin()?;
        thread::scope(|scope| {
            let numbers = round * WAITING..(round + 1) * WAITING;
            let waiting: Vec<_> = numbers.map(|number| scope.spawn(move || wait(number))).collect();
            let since = Instant::now();
            while began.load(Ordering::Relaxed) < WAITING && since.elapsed() < PATIENCE {
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(TAKEN);
            let seen = self.read(plan);
            let still = WAITING - ended.load(Ordering::Relaxed);
            self.obstacle.end()?;
            waiting.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(failed("a reader panicked"))))?;
            if still < WAITING {
                return Err(failed(format!("only {still} of {WAITING} readers of {} waited", self.slow.display())));
            }
            seen
        })
    }
}

fn read_page(path: &Path, offset: u64) -> Result<()> {
    let mut page = [0; PAGE_BYTES as usize];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut page, offset));
    read.trying(|| format!("cannot read {}", path.display()))
}

fn figures(seen: &Seen, alone: &Seen) -> Figures {
    vec![
        ("p50_us", seen.p50_us),
        ("p99_us", seen.p99_us),
        ("reads_per_s", seen.reads_per_s),
        ("p50_of_alone", seen.p50_us / alone.p50_us),
        ("p99_of_alone", seen.p99_us / alone.p99_us),
    ]
}
