//! What a phase cost: CPU time of every task, disk traffic, READs; and what the daemon holds.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use nix::time::ClockId;
use nix::unistd::Pid;

use super::memdisk::{clock_ns, own_cpu_ns};
use super::{Held, Phase, Traffic};
use crate::lab::{LabError, Result, Trying};

/// A sector of /proc/diskstats, whatever the disk's blocks are.
const SECTOR_BYTES: u64 = 512;
const TRACING: &str = "/sys/kernel/tracing";

/// Begins to count READs: the kernel notes each in its trace buffer, whose own statistics are the count.
pub(super) fn count_reads() -> Result<()> {
    let event = Path::new(TRACING).join("events/cachefiles/cachefiles_ondemand_read/enable");
    fs::write(&event, "1").trying(|| format!("cannot enable {}", event.display()))
}

fn reads() -> Result<u64> {
    let mut total = 0;
    let cpus = Path::new(TRACING).join("per_cpu");
    let list = || format!("cannot list {}", cpus.display());
    for cpu in fs::read_dir(&cpus).trying(list)? {
        let text = read(&cpu.trying(list)?.path().join("stats"))?;
        total += field(&text, "entries:") + field(&text, "overrun:");
    }
    Ok(total)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).trying(|| format!("cannot read {}", path.display()))
}

/// The number after `name` at the start of a line; 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// What has been used so far.
pub(super) struct Snapshot {
    tasks: HashMap<i32, u64>,
    own_ns: u64,
    reads: u64,
    cache: Traffic,
    store: Traffic,
}

impl Snapshot {
    /// To be taken before a phase: its own CPU time is read last.
    pub(super) fn before(cache: &str, store: &str) -> Result<Self> {
        let mut snapshot = Self::take(cache, store)?;
        snapshot.own_ns = own_cpu_ns()?;
        Ok(snapshot)
    }

    /// To be taken after a phase: its own CPU time is read first.
    pub(super) fn after(cache: &str, store: &str) -> Result<Self> {
        let own_ns = own_cpu_ns()?;
        Ok(Self { own_ns, ..Self::take(cache, store)? })
    }

    fn take(cache: &str, store: &str) -> Result<Self> {
        let disks = read(Path::new("/proc/diskstats"))?;
        let (cache, store) = (traffic(&disks, cache), traffic(&disks, store));
        Ok(Self { tasks: tasks()?, own_ns: 0, reads: reads()?, cache, store })
    }

    /// What was used since `before`.
    pub(super) fn since(&self, before: &Self, wall_ns: u64, daemon: Option<i32>) -> Phase {
        let used = |pid: &i32| self.tasks.get(pid).map_or(0, |now| now - before.tasks.get(pid).unwrap_or(&0).min(now));
        let others: u64 = self.tasks.keys().map(used).sum();
        Phase {
            wall_ns,
            cpu_ns: others + self.own_ns - before.own_ns,
            daemon_cpu_ns: daemon.as_ref().map_or(0, used),
            reads: self.reads - before.reads,
            cache: difference(self.cache, before.cache),
            store: difference(self.store, before.store),
        }
    }
}

fn difference(now: Traffic, before: Traffic) -> Traffic {
    Traffic {
        read_bytes: now.read_bytes - before.read_bytes,
        written_bytes: now.written_bytes - before.written_bytes,
        writes: now.writes - before.writes,
    }
}

/// CPU time of every process and kernel thread but this one.
fn tasks() -> Result<HashMap<i32, u64>> {
    let own = std::process::id().cast_signed();
    let entries = fs::read_dir("/proc").trying(|| "cannot list /proc")?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut tasks = HashMap::new();
    for pid in pids.filter(|pid| *pid != own) {
        // One that has ended meanwhile has no clock.
        if let Ok(clock) = ClockId::pid_cpu_clock_id(Pid::from_raw(pid)) {
            tasks.insert(pid, clock_ns(clock).unwrap_or(0));
        }
    }
    Ok(tasks)
}

/// Fields of a disk's line after its name: reads, merged, sectors, ms, writes, merged, sectors
/// (Documentation/admin-guide/iostats.rst).
fn traffic(text: &str, disk: &str) -> Traffic {
    let line = text.lines().map(|line| line.split_whitespace().skip(2)).find_map(|mut words| (words.next()? == disk).then_some(words));
    let numbers: Vec<u64> = line.into_iter().flatten().filter_map(|word| word.parse().ok()).collect();
    let number = |index: usize| numbers.get(index).copied().unwrap_or(0);
    Traffic { read_bytes: number(2) * SECTOR_BYTES, written_bytes: number(6) * SECTOR_BYTES, writes: number(4) }
}

/// What a daemon holds now.
pub(super) fn held(pid: i32) -> Result<Held> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let status = read(&dir.join("status")).map_err(|e| LabError::Failed(format!("the daemon is gone: {e}")))?;
    let fds = fs::read_dir(dir.join("fd")).trying(|| "cannot list the daemon's descriptors")?.count();
    Ok(Held { fds, threads: field(&status, "Threads:"), rss_kib: field(&status, "VmHWM:") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let disks = " 252 0 vda 1 0 8 0 0 0 0 0\n 251 0 cache 68 0 4096 1 72 3 8192 4 0 9 10\n";
        let found = traffic(disks, "cache");
        assert_eq!((found.read_bytes, found.writes, found.written_bytes), (4096 * 512, 72, 8192 * 512));
        assert_eq!(traffic(disks, "absent").writes, 0);
        assert_eq!(field("Name:\tx\nVmHWM:\t    1696 kB\n", "VmHWM:"), 1696);
    }

    #[test]
    fn this_process_sees_others_work() {
        assert!(!tasks().expect("/proc").contains_key(&std::process::id().cast_signed()));
        assert!(held(std::process::id().cast_signed()).expect("/proc").threads > 0);
    }
}
