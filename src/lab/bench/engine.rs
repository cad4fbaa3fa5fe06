//! `infill bench engine`: the engine without a kernel that asks.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use super::{machine, pump};
use crate::lab::{LabError, Result, Trying, cache_dir, packages, run};

/// Requests of one measured run of the whole engine.
pub const REQUESTS: u64 = 1 << 16;
/// Runs; the fastest counts.
const RUNS: u32 = 3;
/// Two runs under strace: what the second has more is that of its requests.
const TRACED: (u64, u64) = (2048, 10_240);

/// The machine alone, with a driver whose operations end at once.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MachineFigures {
    /// Requests of 4 KiB through plan, fill and answer in a second of one core.
    pub requests_per_s: f64,
    /// The same, the other way round.
    pub ns_per_request: f64,
    /// Memory allocations, if the program counts them.
    pub allocations_per_request: Option<f64>,
}

/// The whole engine with files in memory.
#[derive(Clone, Debug, Serialize)]
pub struct EngineFigures {
    /// `uring` or `blocking`.
    pub kind: String,
    /// Requests of 4 KiB, 32 at a time, each with a fill of its own.
    pub requests: u64,
    /// In a second, with all cores there are.
    pub requests_per_s: f64,
    /// In a second of CPU time, the kernel's worker threads included.
    pub requests_per_cpu_s: f64,
    /// Half of the requests were answered within this time of being read.
    pub p50_us: u64,
    /// 99 of 100.
    pub p99_us: u64,
    /// 999 of 1,000.
    pub p999_us: u64,
    /// Turns of the event loop; at most one entry into the ring each.
    pub turns_per_request: f64,
    /// Reads and writes.
    pub operations_per_request: f64,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct EngineReport {
    /// See [`MachineFigures`].
    pub machine: MachineFigures,
    /// See [`EngineFigures`].
    pub engine: EngineFigures,
    /// System calls a request by name, and `total`, as strace counts them; none without strace. `read` and `write`
    /// stand for the device's read(2) and ioctl(2).
    pub system_calls_per_request: Option<BTreeMap<String, f64>>,
}

/// Measures. `allocations` tells how often memory was allocated so far, if the program counts that; `one_pass` is the
/// command by which this program does [`pass`], to be followed by the number of requests.
///
/// # Errors
/// The engine cannot be had, or a request was not answered.
pub fn measure(allocations: Option<fn() -> u64>, one_pass: &[&str]) -> Result<EngineReport> {
    let machine = machine::measure(allocations)?;
    let mut best: Option<EngineFigures> = None;
    for _ in 0..RUNS {
        let figures = pump::run(REQUESTS)?;
        if best.as_ref().is_none_or(|best| best.requests_per_cpu_s < figures.requests_per_cpu_s) {
            best = Some(figures);
        }
    }
    let engine = best.ok_or_else(|| LabError::Failed("nothing was measured".into()))?;
    Ok(EngineReport { machine, engine, system_calls_per_request: system_calls(one_pass)? })
}

/// One run of the whole engine, for whoever watches from outside.
///
/// # Errors
/// See [`measure`].
pub fn pass(requests: u64) -> Result<()> {
    pump::run(requests).map(drop)
}

/// Runs this program under strace, with few requests and with more.
fn system_calls(one_pass: &[&str]) -> Result<Option<BTreeMap<String, f64>>> {
    let Some(strace) = packages::find("strace") else {
        eprintln!("infill: strace is not installed: system calls are not counted");
        return Ok(None);
    };
    let program = std::env::current_exe().trying(|| "cannot find this program")?;
    let path = cache_dir()?.join(format!("strace-{}", std::process::id()));
    let count = |requests: u64| -> Result<BTreeMap<String, u64>> {
        let mut command = Command::new(&strace);
        command.args(["-f", "-qq", "-c", "-U", "name,calls", "-o"]).arg(&path).arg(&program).args(one_pass).arg(requests.to_string());
        run(&mut command)?;
        calls(&path)
    };
    let result = count(TRACED.0).and_then(|few| Ok((few, count(TRACED.1)?)));
    let _ = fs::remove_file(&path);
    let (few, many) = match result {
        Ok(counts) => counts,
        Err(error) => {
            eprintln!("infill: system calls are not counted: {error}");
            return Ok(None);
        }
    };
    let more = |(name, calls): (&String, &u64)| {
        let extra = calls.saturating_sub(few.get(name).copied().unwrap_or(0));
        (extra > 0).then(|| (name.clone(), extra as f64 / (TRACED.1 - TRACED.0) as f64))
    };
    Ok(Some(many.iter().filter_map(more).collect()))
}

/// Names and numbers of strace's summary, its total among them.
fn calls(path: &Path) -> Result<BTreeMap<String, u64>> {
    let text = fs::read_to_string(path).trying(|| format!("cannot read {}", path.display()))?;
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    Ok(text.lines().filter_map(line).collect())
}

impl EngineReport {
    /// The figures as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let Self { machine, engine, system_calls_per_request } = self;
        let mut rows = vec![
            ("machine alone", format!("{:.2} million requests/s of one core", machine.requests_per_s / 1e6)),
            ("", format!("{:.0} ns a request", machine.ns_per_request)),
        ];
        if let Some(allocations) = machine.allocations_per_request {
            rows.push(("", format!("{allocations:.6} allocations a request")));
        }
        rows.extend([
            (
                "whole engine",
                format!("{:.0} requests/s, {:.0} a second of CPU time ({})", engine.requests_per_s, engine.requests_per_cpu_s, engine.kind),
            ),
            ("", format!("latency p50 {} us, p99 {} us, p999 {} us", engine.p50_us, engine.p99_us, engine.p999_us)),
            ("", format!("{:.3} turns and {:.2} operations a request", engine.turns_per_request, engine.operations_per_request)),
        ]);
        for (name, calls) in system_calls_per_request.iter().flatten() {
            rows.push(("system calls", format!("{calls:.3} {name} a request")));
        }
        rows.iter().map(|(name, value)| format!("  {name:<14} {value}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn straces_summary_is_read() {
        let file = tempfile::NamedTempFile::new().expect("a scratch file");
        let text = "syscall                  calls\n---------------- ---------\nio_uring_enter         120\nread 7\n---------------- ---------\ntotal 127\n";
        fs::write(file.path(), text).expect("write");
        let found = calls(file.path()).expect("readable");
        assert_eq!((found["io_uring_enter"], found["read"], found["total"], found.len()), (120, 7, 127, 3));
    }

    #[test]
    fn every_request_of_a_pass_is_answered() {
        pass(300).expect("an engine");
    }
}
