//! Where the CPU time of a read goes, and how long each READ takes: from the kernel's trace of task switches, the daemon's
//! system calls and cachefiles' requests (tracefs, Documentation/trace/ftrace.rst).
//!
//! For one processor whose clock counts instructions: there the time stamp counter is a clock of nanoseconds, and what
//! runs between two events is what ran before the second. The tracing itself is part of what it shows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use nix::libc;

use super::Stages;
use crate::lab::{Result, Trying};

/// A trace of its own, beside the one that counts READs.
const INSTANCE: &str = "/sys/kernel/tracing/instances/stages";
/// Room for some hundred thousand events.
const BUFFER_KIB: &str = "131072";
const REQUEST: &str = "cachefiles/cachefiles_ondemand_read";

const OWN_CODE: &str = "daemon: its own code";
const PROTOCOL: &str = "daemon: protocol (poll, read, ioctl)";
const SOURCE: &str = "daemon: source read (pread)";
const FILL: &str = "daemon: cache write (pwrite)";
const RING: &str = "daemon: ring (io_uring_enter, source reads in it)";
const OTHER_CALLS: &str = "daemon: other system calls";
const WORKERS: &str = "ring's workers: cache write";
const READERS: &str = "readers";
const KERNEL: &str = "kernel threads (journal, write-back)";
const IDLE: &str = "nobody: waiting for disks";

/// A trace that can be switched on and off.
pub(super) struct Tracer {
    daemon: HashSet<i32>,
    /// What threads of this program are called; its readers are such threads.
    own_name: String,
}

/// What a trace of one phase says.
#[derive(Default, Debug)]
pub(super) struct Trace {
    spent_ns: BTreeMap<String, u64>,
    system_calls: u64,
    took_ns: Vec<u64>,
}

impl Tracer {
    /// Makes the trace, switched off.
    pub(super) fn set_up(daemon: Option<i32>) -> Result<Self> {
        fs::create_dir(INSTANCE).trying(|| format!("cannot make {INSTANCE}"))?;
        set("tracing_on", "0")?;
        set("buffer_size_kb", BUFFER_KIB)?;
        set("trace_clock", "x86-tsc")?;
        let daemon: HashSet<i32> = daemon.map_or_else(|| Ok(HashSet::new()), threads)?;
        let ours: Vec<String> = daemon.iter().map(|tid| format!("common_pid == {tid}")).collect();
        if !ours.is_empty() {
            for event in ["raw_syscalls/sys_enter", "raw_syscalls/sys_exit"] {
                set(&format!("events/{event}/filter"), &ours.join(" || "))?;
                set(&format!("events/{event}/enable"), "1")?;
            }
        }
        for event in ["sched/sched_switch", REQUEST] {
            set(&format!("events/{event}/enable"), "1")?;
        }
        let name = fs::read_to_string("/proc/self/comm").trying(|| "cannot read /proc/self/comm")?;
        Ok(Self { daemon, own_name: name.trim().to_owned() })
    }

    /// Forgets what was traced and begins anew.
    pub(super) fn begin(&self) -> Result<()> {
        set("trace", "")?;
        set("tracing_on", "1")
    }

    /// Stops, and makes sense of what was traced.
    pub(super) fn end(&self) -> Result<Trace> {
        set("tracing_on", "0")?;
        let path = Path::new(INSTANCE).join("trace");
        let what = || format!("cannot read {}", path.display());
        let mut reading = Reading::new(self);
        for line in BufReader::new(File::open(&path).trying(what)?).lines() {
            reading.line(&line.trying(what)?);
        }
        Ok(reading.trace)
    }
}

fn set(setting: &str, value: &str) -> Result<()> {
    let path = Path::new(INSTANCE).join(setting);
    fs::write(&path, value).trying(|| format!("cannot write {value:?} to {}", path.display()))
}

fn threads(pid: i32) -> Result<HashSet<i32>> {
    let dir = PathBuf::from(format!("/proc/{pid}/task"));
    let entries = fs::read_dir(&dir).trying(|| format!("cannot list {}", dir.display()))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

impl Trace {
    /// This one of the cold read and that of the present one together.
    pub(super) fn stages(mut self, present: &Self) -> Stages {
        self.took_ns.sort_unstable();
        let rank = |thousandths: usize| self.took_ns.get(self.took_ns.len() * thousandths / 1000).copied().unwrap_or(0);
        Stages {
            system_calls: self.system_calls,
            reads: self.took_ns.len(),
            read_p50_ns: rank(500),
            read_p99_ns: rank(990),
            read_p999_ns: rank(999),
            present_ns: present.spent_ns.clone(),
            cold_ns: self.spent_ns,
        }
    }
}

/// Reading a trace line by line.
struct Reading<'a> {
    tracer: &'a Tracer,
    trace: Trace,
    /// Who runs, by number and name, and since when.
    running: Option<(i32, String)>,
    since_ns: u64,
    /// System calls that threads of the daemon are in.
    calls: HashMap<i32, i64>,
    /// When readers that wait for their READ queued it; the kernel wakes them for nothing else.
    queued: HashMap<i32, u64>,
}

impl<'a> Reading<'a> {
    fn new(tracer: &'a Tracer) -> Self {
        Self { tracer, trace: Trace::default(), running: None, since_ns: 0, calls: HashMap::new(), queued: HashMap::new() }
    }

    /// `NAME-PID [CPU] FLAGS TIME: EVENT: DETAILS`; anything else is a comment.
    fn line(&mut self, line: &str) {
        let Some((task, pid, time_ns, event, details)) = split(line) else { return };
        match &self.running {
            Some((who, name)) => {
                let stage = self.stage(*who, name);
                *self.trace.spent_ns.entry(stage.to_owned()).or_default() += time_ns.saturating_sub(self.since_ns);
            }
            None => self.running = Some((pid, task.to_owned())),
        }
        self.since_ns = time_ns;
        match event {
            "sched_switch" => {
                self.running = next_task(details);
                let queued = self.running.as_ref().and_then(|(pid, _)| self.queued.remove(pid));
                self.trace.took_ns.extend(queued.map(|at| time_ns.saturating_sub(at)));
            }
            "sys_enter" => {
                self.trace.system_calls += 1;
                self.calls.extend(details.split_whitespace().nth(1).and_then(|word| Some((pid, word.parse().ok()?))));
            }
            "sys_exit" => drop(self.calls.remove(&pid)),
            "cachefiles_ondemand_read" => drop(self.queued.insert(pid, time_ns)),
            _ => {}
        }
    }

    fn stage(&self, pid: i32, name: &str) -> &'static str {
        if pid == 0 {
            return IDLE;
        }
        if name.starts_with("iou-wrk") {
            return WORKERS;
        }
        if !self.tracer.daemon.contains(&pid) {
            return if name == self.tracer.own_name { READERS } else { KERNEL };
        }
        match self.calls.get(&pid).copied() {
            None => OWN_CODE,
            Some(libc::SYS_read | libc::SYS_poll | libc::SYS_ppoll | libc::SYS_ioctl | libc::SYS_epoll_wait | libc::SYS_epoll_pwait) => {
                PROTOCOL
            }
            Some(libc::SYS_pread64 | libc::SYS_preadv | libc::SYS_preadv2) => SOURCE,
            Some(libc::SYS_pwrite64 | libc::SYS_pwritev | libc::SYS_pwritev2) => FILL,
            Some(libc::SYS_io_uring_enter) => RING,
            Some(_) => OTHER_CALLS,
        }
    }
}

/// Task, its number, time, event and details of a line.
fn split(line: &str) -> Option<(&str, i32, u64, &str, &str)> {
    // A task's name may hold anything; the bracket of the processor's number is the first thing that is sure.
    let (task, rest) = line.split_once(" [")?;
    let (name, pid) = task.trim().rsplit_once('-')?;
    let (head, details) = rest.split_once(": ")?;
    let time_ns = head.split_whitespace().last()?.parse().ok()?;
    let (event, details) = details.split_once(": ")?;
    Some((name, pid.parse().ok()?, time_ns, event, details))
}

/// `prev_comm=A ... ==> next_comm=B next_pid=7 next_prio=120`.
fn next_task(details: &str) -> Option<(i32, String)> {
    let (_, next) = details.split_once("next_comm=")?;
    let (name, rest) = next.rsplit_once(" next_pid=")?;
    Some((rest.split_whitespace().next()?.parse().ok()?, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_to_who_ran_and_to_the_call_it_was_in() {
        let tracer = Tracer { daemon: [40].into(), own_name: "infill".into() };
        let mut reading = Reading::new(&tracer);
        for line in [
            "# tracer: nop",
            "  infill-7       [000] d..2.    1000: cachefiles_ondemand_read: o=00000001 mid=0 oid=1 s=0 l=1000",
            "  infill-7       [000] d..2.    1100: sched_switch: prev_comm=infill prev_pid=7 prev_prio=120 prev_state=D ==> next_comm=a b-1 next_pid=40 next_prio=120",
            "  a b-1-40       [000] .....    1150: sys_enter: NR 18 (5, 7f, 1000, 0, 0, 0)",
            "  a b-1-40       [000] .....    1450: sys_exit: NR 18 = 4096",
            "  a b-1-40       [000] d..2.    1600: sched_switch: prev_comm=a b-1 prev_pid=40 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120",
            "  <idle>-0       [000] d..2.    2600: sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=iou-wrk-40 next_pid=9 next_prio=120",
            "  iou-wrk-40-9   [000] d..2.    2700: sched_switch: prev_comm=iou-wrk-40 prev_pid=9 prev_prio=120 prev_state=S ==> next_comm=jbd2/x-8 next_pid=8 next_prio=120",
            "  jbd2/x-8-8     [000] d..2.    2750: sched_switch: prev_comm=jbd2/x-8 prev_pid=8 prev_prio=120 prev_state=S ==> next_comm=infill next_pid=7 next_prio=120",
        ] {
            reading.line(line);
        }
        let spent: Vec<(&str, u64)> = reading.trace.spent_ns.iter().map(|(stage, ns)| (&**stage, *ns)).collect();
        let expected = [(FILL, 300), (OWN_CODE, 200), (KERNEL, 50), (IDLE, 1000), (READERS, 100), (WORKERS, 100)];
        assert_eq!(spent, expected);
        assert_eq!((reading.trace.system_calls, &*reading.trace.took_ns), (1, &[1750_u64][..]));
    }
}
