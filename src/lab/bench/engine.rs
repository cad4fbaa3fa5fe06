//! `infill bench engine`: the engine without a kernel that asks.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use clap::ValueEnum;
use serde::Serialize;

use super::bare::{self, LimitFigures, WakeFigures};
use super::machine;
use super::rig::{self, Load};
pub use super::rig::{Behind, RunFigures, Waits};
use crate::config::DEFAULT_AHEAD_PERCENT;
use crate::engine::placement::usable_cpus;
use crate::engine::plan::Window;
use crate::lab::{LabError, Result, Trying, cache_dir, packages, run};

/// Runs; the fastest counts.
const RUNS: u32 = 3;
/// Longest that readers of a fast blob may wait beside a slow one, at the 99th percentile, in units of what they wait alone.
const APART_MAX: f64 = 1.5;
/// Calls a request that are worth a line; fewer belong to the beginning and the end.
const CALLS_MIN: f64 = 0.005;
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

/// Whether readers of a fast blob notice a slow one on the same shard.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Isolation {
    /// They alone.
    pub alone: Waits,
    /// As many readers of a slow blob beside them.
    pub beside: Waits,
    /// How much longer they wait beside it, at the 99th percentile.
    pub ratio_p99: f64,
    /// What that may be.
    pub limit: f64,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct EngineReport {
    /// `uname -r`.
    pub kernel: String,
    /// Processors that may be used.
    pub cpus: usize,
    /// See [`MachineFigures`].
    pub machine: MachineFigures,
    /// One shard with nothing, devices and files behind it.
    pub runs: Vec<RunFigures>,
    /// The kernel's part alone of the run with devices.
    pub limit: Option<LimitFigures>,
    /// A wake-up on another core; none where there is one core.
    pub wake: Option<WakeFigures>,
    /// CPU time of the bench's own part of a request with nothing behind the engine: it runs in the shards' threads.
    pub own_ns_per_request: f64,
    /// Some numbers of shards, with nothing and with devices behind them: requests spread over many objects, and so over all
    /// shards; all of them for one, which one shard owns; and, as what this machine can do at most, as many engines of one
    /// shard side by side.
    pub scale: Vec<RunFigures>,
    /// With files in memory, and a slow source beside them.
    pub isolation: Isolation,
    /// System calls a request by what is behind the engine and by name, and `total`, as strace counts them; none without
    /// strace. `write` stands for the device's ioctl(2).
    pub system_calls_per_request: BTreeMap<String, BTreeMap<String, f64>>,
}

/// Measures. `allocations` tells how often its thread has allocated memory so far, if the program counts that; `one_pass` is the
/// command by which this program does [`pass`], to be followed by what is behind the engine and the number of requests.
/// Scaling is measured for each number in `shards`, or, if there is none, for one and one for each processor.
///
/// # Errors
/// The engine cannot be had, or a request was not answered.
pub fn measure(allocations: Option<fn() -> u64>, one_pass: &[&str], shards: &[usize]) -> Result<EngineReport> {
    let machine = machine::measure(allocations)?;
    let all = [Behind::Nothing, Behind::Devices, Behind::Files];
    let runs = all.iter().map(|&behind| best_of(&Load { allocations, ..Load::plain(behind) })).collect::<Result<_>>()?;
    let usual = [1, usable_cpus().len().max(1)];
    let shards = if shards.is_empty() { &usual[..if usual[1] == 1 { 1 } else { 2 }] } else { shards };
    let scale = scale(shards)?;
    let mut system_calls_per_request = BTreeMap::new();
    for behind in [Behind::Devices, Behind::Files] {
        system_calls_per_request.extend(system_calls(one_pass, behind)?.map(|calls| (name(behind), calls)));
    }
    Ok(EngineReport {
        kernel: nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned()).unwrap_or_default(),
        cpus: usable_cpus().len(),
        machine,
        runs,
        limit: bare::measure()?,
        wake: bare::wake()?,
        own_ns_per_request: rig::own_ns_per_request()?,
        scale,
        isolation: isolation()?,
        system_calls_per_request,
    })
}

/// See [`EngineReport::scale`].
fn scale(numbers: &[usize]) -> Result<Vec<RunFigures>> {
    let mut scale = Vec::new();
    for behind in [Behind::Nothing, Behind::Devices] {
        for &shards in numbers {
            let plain = Load::plain(behind);
            scale.push(best_of(&Load { shards, many: true, ..plain })?);
            scale.push(best_of(&Load { shards, ..plain })?);
            if shards > 1 {
                scale.push(best_of(&Load { engines: shards, many: true, ..plain })?);
            }
        }
    }
    Ok(scale)
}

/// The run of several that did most in a second of CPU time.
fn best_of(load: &Load) -> Result<RunFigures> {
    let mut best = rig::run(load)?;
    for _ in 1..RUNS {
        let figures = rig::run(load)?;
        if best.requests_per_cpu_s < figures.requests_per_cpu_s {
            best = figures;
        }
    }
    Ok(best)
}

/// The best of several runs of each kind, in turn: what else this machine does disturbs both.
fn isolation() -> Result<Isolation> {
    let (mut alone, mut beside) = (rig::apart(false)?, rig::apart(true)?);
    let better = |a: Waits, b: Waits| if b.p99_us < a.p99_us { b } else { a };
    for _ in 1..RUNS {
        (alone, beside) = (better(alone, rig::apart(false)?), better(beside, rig::apart(true)?));
    }
    Ok(Isolation { alone, beside, ratio_p99: beside.p99_us / alone.p99_us, limit: APART_MAX })
}

/// One run of the whole engine, for whoever watches from outside (strace, perf): what is behind it, the number of requests,
/// and, if there is a third word, that many shards with requests for many objects.
///
/// # Errors
/// See [`measure`]; or these are not such words.
pub fn pass_of(words: &[String]) -> Result<()> {
    let load = |behind: &str, requests: &str, shards: Option<&String>| {
        let plain = Load::plain(Behind::from_str(behind, false).ok()?);
        let shards = shards.map_or(Some(plain.shards), |shards| shards.parse().ok())?;
        Some(Load { requests: requests.parse().ok()?, shards, many: shards > 1, ..plain })
    };
    let load = match words {
        [behind, requests, rest @ ..] => load(behind, requests, rest.first()),
        _ => None,
    };
    let load = load.ok_or_else(|| LabError::Failed(format!("no such run: {}", words.join(" "))))?;
    let figures = rig::run(&load)?;
    run_rows(&figures, None).iter().for_each(|(_, row)| println!("{row}"));
    Ok(())
}

/// Memory allocations of the shard in the later three quarters of so many requests, with the default window, which adapts,
/// or each with a fill of its own.
///
/// # Errors
/// See [`measure`].
pub fn allocations(behind: Behind, requests: u64, adapts: bool, count: fn() -> u64) -> Result<u64> {
    let plain = Load::plain(behind);
    let window = if adapts { Window::Adaptive { budget_percent: DEFAULT_AHEAD_PERCENT } } else { plain.window };
    let run = rig::run(&Load { requests, window, allocations: Some(count), ..plain })?;
    run.allocations.ok_or_else(|| LabError::Failed("nothing was counted".into()))
}

/// As it is written on the command line.
fn name(behind: Behind) -> String {
    behind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Runs this program under strace, with few requests and with more.
fn system_calls(one_pass: &[&str], behind: Behind) -> Result<Option<BTreeMap<String, f64>>> {
    let Some(strace) = packages::find("strace") else {
        eprintln!("infill: strace is not installed: system calls are not counted");
        return Ok(None);
    };
    let program = std::env::current_exe().trying(|| "cannot find this program")?;
    let path = cache_dir()?.join(format!("strace-{}", std::process::id()));
    let count = |requests: u64| -> Result<BTreeMap<String, u64>> {
        let mut command = Command::new(&strace);
        command.args(["-f", "-qq", "-c", "-U", "name,calls", "-o"]).arg(&path).arg(&program).args(one_pass);
        command.args([name(behind), requests.to_string()]);
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
        let extra = calls.saturating_sub(few.get(name).copied().unwrap_or(0)) as f64 / (TRACED.1 - TRACED.0) as f64;
        (name != "total" && extra >= CALLS_MIN).then(|| (name.clone(), extra))
    };
    let mut each: BTreeMap<String, f64> = many.iter().filter_map(more).collect();
    each.insert("total".into(), each.values().sum());
    Ok(Some(each))
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
        let mut rows = vec![("Linux", format!("{}, {} CPUs", self.kernel, self.cpus))];
        rows.push(("machine alone", format!("{:.2} million requests/s of one core", self.machine.requests_per_s / 1e6)));
        rows.push(("", format!("{:.0} ns a request", self.machine.ns_per_request)));
        if let Some(allocations) = self.machine.allocations_per_request {
            rows.push(("", format!("{allocations:.6} allocations a request")));
        }
        for run in &self.runs {
            rows.extend(run_rows(run, self.system_calls_per_request.get(&name(run.behind))));
        }
        if let Some(limit) = &self.limit {
            rows.push((
                "bare ring",
                format!("{:.0} requests/s a second of CPU time: devices, without an engine", limit.requests_per_cpu_s),
            ));
        }
        if let Some(WakeFigures { hop_us, cpu_us }) = self.wake {
            rows.push(("wake-up", format!("{hop_us:.1} us from a core to another, {cpu_us:.1} us of CPU time")));
        }
        rows.push(("bench's own", format!("{:.0} ns a request, in the figures with nothing behind the engine", self.own_ns_per_request)));
        rows.extend(self.scale.iter().map(scale_row));
        let Isolation { alone, beside, ratio_p99, limit } = self.isolation;
        for (waits, what) in [(alone, "alone"), (beside, "beside a slow one")] {
            rows.push(("a fast blob", format!("{what}: p50 {:.0} us, p99 {:.0} us", waits.p50_us, waits.p99_us)));
        }
        rows.push(("", format!("{ratio_p99:.2} times as long; {limit} at most")));
        rows.iter().map(|(name, value)| format!("  {name:<14} {value}\n")).collect()
    }
}

fn scale_row(run: &RunFigures) -> (&'static str, String) {
    let objects = if run.objects == 1 { "one object".into() } else { format!("{} objects", run.objects) };
    let who = if run.engines > 1 { format!("1, {} engines apart", run.engines) } else { run.shards.to_string() };
    let (rate, cpu_rate, sleeps) = (run.requests_per_s, run.requests_per_cpu_s, run.sleeps_per_request * 1e3);
    let figures = format!("{rate:.0} requests/s, {cpu_rate:.0} a second of CPU time, {sleeps:.1} wake-ups in 1,000 requests");
    ("shards", format!("{who}, {objects}: {figures} ({})", name(run.behind)))
}

fn run_rows(run: &RunFigures, system_calls: Option<&BTreeMap<String, f64>>) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        (
            "whole engine",
            format!(
                "{:.0} requests/s, {:.0} a second of CPU time ({}, {})",
                run.requests_per_s,
                run.requests_per_cpu_s,
                name(run.behind),
                run.kind
            ),
        ),
        ("", format!("latency p50 {} us, p99 {} us, p999 {} us", run.p50_us, run.p99_us, run.p999_us)),
        ("", format!("{:.3} turns and {:.2} operations a request", run.turns_per_request, run.operations_per_request)),
    ];
    rows.extend(
        run.allocations.map(|allocations| ("", format!("{allocations} allocations in the later {} requests", run.requests / 4 * 3))),
    );
    rows.extend(system_calls.into_iter().flatten().map(|(name, calls)| ("system calls", format!("{calls:.3} {name} a request"))));
    rows
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
        for behind in [Behind::Nothing, Behind::Devices, Behind::Files] {
            pass_of(&[name(behind), "300".into()]).expect("an engine");
        }
    }

    #[test]
    fn shards_share_the_objects() {
        // With a ring so many that a wake-up that is lost or left over on the way from core to core shows.
        for (behind, many, requests) in [(Behind::Nothing, true, 3000), (Behind::Nothing, false, 3000), (Behind::Devices, true, 200_000)] {
            let figures = rig::run(&Load { shards: 2, many, requests, ..Load::plain(behind) }).expect("an engine");
            assert_eq!((figures.shards, figures.requests), (2, requests));
        }
    }
}
