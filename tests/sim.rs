//! The engine's machine against the model kernel: thousands of small worlds, each from a seed.
//!
//! `INFILL_SIM_SEEDS` says how many (10,000 if unset), `INFILL_SIM_SEED` replays one and prints all of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use infill::front::sim::timed::{Scene, play};
use infill::front::sim::world::{self, Report, Rule, Sabotage, Seen};

const SEEDS: u64 = 10_000;
/// No world takes nearly as long.
const STUCK: Duration = Duration::from_secs(60);
/// Worlds in which a mistake made on purpose must show.
const SABOTAGE_SEEDS: u64 = 400;

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Ends the process if a world does not end: a machine that runs in a circle can be stopped by nothing else.
fn watch(next: &AtomicU64, seeds: u64) {
    let mut last = (u64::MAX, Instant::now());
    while next.load(Ordering::Relaxed) < seeds {
        thread::sleep(Duration::from_millis(20));
        let now = next.load(Ordering::Relaxed);
        if now != last.0 {
            last = (now, Instant::now());
        }
        if last.1.elapsed() > STUCK {
            eprintln!("no world ended for {} s; one of the last seeds before {now} runs in a circle", STUCK.as_secs());
            std::process::abort();
        }
    }
}

/// Runs seeds on all cores until one breaks a rule.
fn run_all(seeds: u64) -> Result<Seen, Box<Report>> {
    let next = AtomicU64::new(0);
    let run_some = || -> Result<Seen, Box<Report>> {
        let mut total = Seen::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return Ok(total);
            }
            let seen = world::run(seed, None).inspect_err(|_| next.store(seeds, Ordering::Relaxed))?;
            total.add(&seen);
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        scope.spawn(|| watch(&next, seeds));
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(run_some)).collect();
        let mut total = Seen::default();
        for thread in threads {
            total.add(&thread.join().expect("a worker panicked")?);
        }
        Ok(total)
    })
}

#[test]
fn every_world_keeps_the_rules() {
    if let Some(seed) = from_env("INFILL_SIM_SEED") {
        let report = world::replay(seed, None);
        println!("{report}");
        return;
    }
    let seen = match run_all(from_env("INFILL_SIM_SEEDS").unwrap_or(SEEDS)) {
        Ok(seen) => seen,
        Err(report) => panic!("{report}"),
    };
    println!("{seen:?}");
    assert!(seen.restarts > 0, "no daemon ended: {seen:?}");
    assert!(seen.readers_served > seen.readers_failed, "the worlds are too hostile to show much: {seen:?}");
}

#[test]
fn every_mistake_is_found() {
    for sabotage in Sabotage::ALL {
        let found = (0..SABOTAGE_SEEDS).find_map(|seed| world::run(seed, Some(sabotage)).err());
        let report = found.unwrap_or_else(|| panic!("{sabotage:?} was not noticed in {SABOTAGE_SEEDS} worlds"));
        assert!(!report.notes.is_empty());
        println!("{sabotage:?}: {:?} at seed {}, step {}", report.violation.rule, report.seed, report.step);
        let expected: &[Rule] = match sabotage {
            Sabotage::DoneTooEarly => &[Rule::DoneMeansThere],
            Sabotage::DropAnswer | Sabotage::AnswerTwice => &[Rule::OneAnswer],
            Sabotage::FailForNothing => &[Rule::FailureHasReason],
            Sabotage::MisalignedWrite => &[Rule::Aligned],
            Sabotage::WrongPlace | Sabotage::NoPadding => &[Rule::RightBytes, Rule::NoOverlap],
            // The wrong place in a source may also lie behind its end.
            Sabotage::WrongSource => &[Rule::RightBytes, Rule::NoOverlap, Rule::FailureHasReason],
            // Two operations meet in the slot, or a write goes out from the one that its read should have filled.
            Sabotage::OneSlotForAll => &[Rule::SlotOwner, Rule::RightBytes],
            Sabotage::ShortIsWhole => &[Rule::DoneMeansThere],
            Sabotage::EarlyRelease => &[Rule::Release],
            Sabotage::NoRelease => &[Rule::NothingLeft, Rule::Release],
            Sabotage::LostOperation => &[Rule::OneAnswer, Rule::NothingLeft],
        };
        assert!(expected.contains(&report.violation.rule), "{sabotage:?} was taken for {report}");
    }
}

/// The engine's default.
const SLOTS: u32 = 16;

/// How much longer readers of a fast blob wait, at the 99th percentile, beside 32 readers of a slow one: at most, over some
/// seeds. On a clock of its own, so the same on every machine.
fn worst_ratio(readers: u64) -> f64 {
    let ratios = (0..8).map(|seed| {
        let scene = Scene { slots: SLOTS, fast: readers, slow: 0, pages_each: 1000, seed };
        let (alone, beside) = (play(&scene), play(&Scene { slow: 32, ..scene }));
        assert!(beside.slow > 0 && beside.fast_ns.len() == alone.fast_ns.len());
        beside.p99_ns() as f64 / alone.p99_ns() as f64
    });
    let worst = ratios.fold(0.0, f64::max);
    println!("{readers} readers: {worst:.2}");
    worst
}

/// `infill bench engine` measures it with a real ring.
#[test]
fn readers_of_a_fast_blob_do_not_notice_a_slow_source() {
    for readers in [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32] {
        let worst = worst_ratio(readers);
        assert!(worst <= 1.5, "{readers} readers wait {worst:.2} times as long");
    }
}
