//! Inputs from elsewhere, changed at random for a fixed time: what `tests/fuzz` holds for cargo-fuzz, run with nothing but
//! stable Rust, so that every run of the tests does it.
//!
//! `INFILL_FUZZ_SECONDS` says how long for each kind of input (1 if unset). A failure prints the seed, and with that in
//! `INFILL_FUZZ_SEED` the same inputs come again; it also prints the input itself.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[path = "fuzz/targets.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use infill::front::sim::rng::Rng;
use infill::hex::hex;
use targets::{TARGETS, Target};

/// Time for each target.
const SECONDS: u64 = 1;
/// Longest input in bytes: some more than the longest message, and than a superblock needs.
const INPUT_BYTES_MAX: usize = 4096;
/// Inputs that are kept because they were taken in a new way.
const CORPUS_MAX: usize = 500;
/// Changes made to an input at a time.
const CHANGES_MAX: u64 = 6;
/// An input that takes longer makes the program run in a circle.
const STUCK: Duration = Duration::from_secs(60);
/// Bytes at which code decides something.
const SPECIAL: [u8; 12] = [0, 1, b'\n', b' ', b'.', b'/', b',', b'@', b'0', 0x7f, 0xfe, 0xff];
/// Numbers of the same kind.
const NUMBERS: [u64; 8] = [0, 1, 4095, 4096, 1 << 31, (1 << 32) - 1, i64::MAX as u64, u64::MAX];

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(target);
    let mut paths: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no seeds in {}", dir.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Makes another input of one or two.
fn change(rng: &mut Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus[rng.index(corpus.len())].clone();
    for _ in 0..=rng.below(CHANGES_MAX) {
        let at = rng.index(bytes.len() + 1);
        let end = (at + 1 + rng.index(16)).min(bytes.len());
        match rng.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
            1 if at < bytes.len() => bytes[at] = rng.pick(&SPECIAL),
            2 => bytes.insert(at, rng.pick(&SPECIAL)),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let number = rng.pick(&NUMBERS).wrapping_add(rng.below(3)).to_le_bytes();
                let len = rng.pick(&[2, 4, 8]).min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&number[..len]);
            }
            5 => {
                let part = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, part));
            }
            6 => {
                let other = &corpus[rng.index(corpus.len())];
                let from = rng.index(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => {
                let text = rng.pick(&NUMBERS).to_string();
                drop(bytes.splice(at..end.max(at), text.into_bytes()));
            }
        }
    }
    bytes.truncate(INPUT_BYTES_MAX);
    bytes
}

/// Ends the process if an input does not come to an end: nothing else can.
fn watch(name: &str, seed: u64, began: &Mutex<Option<Instant>>) {
    let running_since = || *began.lock().unwrap();
    while let Some(at) = running_since() {
        if at.elapsed() > STUCK {
            eprintln!("{name}: an input takes more than {} s; INFILL_FUZZ_SEED={seed}", STUCK.as_secs());
            std::process::abort();
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn fuzz((name, run): Target) {
    let seed = from_env("INFILL_FUZZ_SEED").unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()));
    let time = Duration::from_secs(from_env("INFILL_FUZZ_SECONDS").unwrap_or(SECONDS));
    let mut rng = Rng::new(seed);
    let mut corpus = seeds(name);
    let mut ways = std::collections::HashSet::new();
    let mut todo = corpus.clone();
    let began = Mutex::new(Some(Instant::now()));
    let (started, mut inputs) = (Instant::now(), 0_u64);
    let failed = thread::scope(|scope| {
        scope.spawn(|| watch(name, seed, &began));
        let mut failed = None;
        while failed.is_none() && (started.elapsed() < time || !todo.is_empty()) {
            let input = todo.pop().unwrap_or_else(|| change(&mut rng, &corpus));
            *began.lock().unwrap() = Some(Instant::now());
            inputs += 1;
            match catch_unwind(AssertUnwindSafe(|| run(&input))) {
                Ok(way) if ways.insert(way) && corpus.len() < CORPUS_MAX => corpus.push(input),
                Ok(_) => {}
                Err(panic) => failed = Some((input, panic)),
            }
        }
        *began.lock().unwrap() = None;
        failed
    });
    let _ = fs::remove_dir_all(targets::place_of(name));
    println!("{name}: {inputs} inputs, taken in {} ways, INFILL_FUZZ_SEED={seed}", ways.len());
    if let Some((input, panic)) = failed {
        let hex = hex(&input);
        eprintln!("{name}: input {inputs} with INFILL_FUZZ_SEED={seed} breaks a promise: {hex}\n(\"{}\")", input.escape_ascii());
        resume_unwind(panic);
    }
}

macro_rules! tests {
    ($($name:ident = $index:literal;)*) => {
        $(#[test]
        fn $name() {
            fuzz(TARGETS[$index]);
        })*

        #[test]
        fn every_target_is_run_and_has_its_file_for_cargo_fuzz() {
            assert_eq!([$(stringify!($name)),*], TARGETS.map(|(name, _)| name));
            for (name, _) in TARGETS {
                let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fuzz/fuzz_targets/{name}.rs"));
                assert!(file.exists(), "{}", file.display());
            }
        }
    };
}

tests! {
    wire = 0;
    key = 1;
    superblock = 2;
    settings = 3;
    notes = 4;
    cache = 5;
    kernel = 6;
    events = 7;
    journal = 8;
    map = 9;
    bag = 10;
    control = 11;
}
