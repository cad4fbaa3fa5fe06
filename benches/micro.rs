//! `cargo bench --bench micro [-- --record]`: instructions of the engine's small parts, counted by valgrind and compared
//! with `benches/baseline.json`. Fails if one got dearer than the tolerance allows; `--record` takes what it finds as the
//! new baseline.
//!
//! Each case is run twice in a process of its own, with few and with many rounds; the difference is that of the rounds.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on says where")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::{Command, ExitCode};

use infill::engine::plan;
use infill::front::cachefiles::wire::{self, Body, Message};
use infill::key::Key;
use infill::lab::bench::engine;
use infill::lab::bench::machine::{Bare, PAGE_BYTES};
use infill::lab::packages;
use serde::{Deserialize, Serialize};

const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/baseline.json");
/// Rounds of the two runs of a case.
const ROUNDS: (u64, u64) = (20_000, 40_000);
/// A case: its name, and so many rounds of it.
type Case = (&'static str, fn(u64));

const CASES: [Case; 5] = [
    ("parse_read", parse_read),
    ("parse_open", parse_open),
    ("plan", plan_windows),
    ("machine_request", machine),
    ("shard_request", shard),
];

/// What was recorded.
#[derive(Deserialize, Serialize)]
struct Baseline {
    /// How much dearer a case may get, in percent; another compiler moves them a little.
    tolerance_percent: f64,
    /// Instructions of one round.
    instructions: BTreeMap<String, f64>,
}

fn parse(body: Body, rounds: u64) {
    let bytes = wire::encode(&Message { msg_id: 3, object_id: 7, body });
    for _ in 0..rounds {
        black_box(wire::parse(black_box(&bytes))).unwrap();
    }
}

fn parse_read(rounds: u64) {
    parse(Body::Read(8192..12288), rounds);
}

fn parse_open(rounds: u64) {
    parse(Body::Open { fd: 9, key: Key::new(b"domain", b"sha256:0123456789abcdef") }, rounds);
}

fn plan_windows(rounds: u64) {
    let len_bytes = 1 << 30;
    for round in 0..rounds {
        let start = black_box(round * 12345);
        let demand = plan::clamp(&(start..start + 5000), len_bytes, PAGE_BYTES).unwrap();
        let window = plan::window(&demand, 1 << 20, len_bytes, PAGE_BYTES);
        black_box(plan::piece(&window, 1 << 20));
    }
}

fn machine(rounds: u64) {
    let mut bare = Bare::default();
    assert_eq!(bare.pass(rounds), rounds);
}

/// The whole way: router, mailbox, shard, machine, with nothing behind them.
fn shard(rounds: u64) {
    engine::pass_of(&["nothing".to_owned(), rounds.to_string()]).unwrap();
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, name, rounds] = &args[..]
        && flag == "--case"
    {
        let (_, case) = CASES.iter().find(|(known, _)| known == name).unwrap();
        case(rounds.parse().unwrap());
        return ExitCode::SUCCESS;
    }
    if let Err(error) = packages::ensure(packages::BENCH_TOOLS) {
        println!("micro: not run: {error}");
        return ExitCode::SUCCESS;
    }
    let count = |name: &str, rounds: u64| instructions(Command::new("valgrind"), name, rounds);
    let each = |name: &str| (count(name, ROUNDS.1) - count(name, ROUNDS.0)) as f64 / (ROUNDS.1 - ROUNDS.0) as f64;
    let found: BTreeMap<String, f64> = CASES.iter().map(|(name, _)| ((*name).to_owned(), each(name))).collect();
    judge(&found, args.iter().any(|arg| arg == "--record"))
}

/// Instructions of this program doing one case.
fn instructions(mut valgrind: Command, name: &str, rounds: u64) -> u64 {
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(std::env::current_exe().unwrap());
    let output = valgrind.args(["--case", name, &rounds.to_string()]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed under valgrind:\n{text}");
    // ==123== Collected : 4567
    text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok()).unwrap()
}

fn judge(found: &BTreeMap<String, f64>, record: bool) -> ExitCode {
    let text = std::fs::read_to_string(BASELINE).unwrap_or_else(|_| r#"{"tolerance_percent":5.0,"instructions":{}}"#.into());
    let mut baseline: Baseline = serde_json::from_str(&text).unwrap();
    let mut result = ExitCode::SUCCESS;
    println!("{:<18} {:>12} {:>12} {:>8}", "instructions of", "now", "recorded", "change");
    for (name, now) in found {
        let Some(then) = baseline.instructions.get(name) else {
            println!("{name:<18} {now:>12.1} {:>12} {:>8}", "-", "new");
            continue;
        };
        let change = (now / then - 1.0) * 100.0;
        println!("{name:<18} {now:>12.1} {then:>12.1} {change:>+7.1}%");
        if change > baseline.tolerance_percent && !record {
            println!("  dearer than {} % allows: make it cheaper, or record the new price and say why", baseline.tolerance_percent);
            result = ExitCode::FAILURE;
        }
    }
    if record {
        baseline.instructions = found.iter().map(|(name, now)| (name.clone(), (now * 10.0).round() / 10.0)).collect();
        std::fs::write(BASELINE, serde_json::to_string_pretty(&baseline).unwrap() + "\n").unwrap();
        println!("recorded in {BASELINE}");
    }
    result
}
