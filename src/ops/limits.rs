//! The process's own limits, raised once at start.

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::unistd::close;

use crate::control::CLIENTS_FDS;
use crate::engine::OPENERS_MAX;
use crate::engine::fds::EMERGENCY_FDS;

/// Descriptor numbers for which the table is made large at start. Growing it later, with threads running,
/// stalls the thread that gets a new descriptor for an RCU grace period (`expand_files`, fs/file.c).
const TABLE_FDS: u64 = 65_536;

/// Descriptors that the daemon needs besides those of blobs, however large it is: the device, stores, the cache's
/// directories, logs, sockets.
const OWN_FDS: u64 = 64;
/// Those of a shard: a ring and its eventfd, or the pipes of blocking threads.
const FDS_PER_SHARD: u64 = 4;
/// Those that a thread which looks a blob up has open on the way to it.
const FDS_PER_OPENER: u64 = 2;
/// Of what the whole system has left, the default budget takes one part in so many.
const SYSTEM_DIVISOR: u64 = 2;

/// What became of the limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Raised {
    /// Descriptors that this process may have.
    pub fds: u64,
    /// Files that could still be opened in the whole system then, if it tells. A confined process cannot ask any more,
    /// nor is it exempt from `fs.file-max` (as `CAP_SYS_ADMIN` is).
    pub free_in_system: Option<u64>,
}

/// Why serving would go wrong.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// Writes to the cache would be cut off.
    #[error(
        "the file size limit is {0} bytes, and it applies to what the kernel writes for us: run with LimitFSIZE=infinity or ulimit -f unlimited"
    )]
    FileSize(u64),
    /// The budget is more than the process may have.
    #[error(
        "fd_budget = {wanted}: this process may have {fds} file descriptors, so at most {most} with this many shards; lower it, or raise LimitNOFILE= and fs.nr_open"
    )]
    Descriptors {
        /// The setting.
        wanted: u64,
        /// The process's limit.
        fds: u64,
        /// What could be set.
        most: u64,
    },
}

/// How many descriptors blobs may have: as set, or what the limits of process and system leave. A setting that the
/// system has too few files for is lowered, with a warning: how many it has changes from one start to the next, and a
/// daemon that does not start leaves readers waiting.
///
/// # Errors
/// More was set than the process may have.
pub fn fd_budget(setting: Option<u64>, raised: Raised, shards: usize) -> Result<u64, LimitError> {
    let besides = besides(shards);
    let most = raised.fds.saturating_sub(besides);
    let free = raised.free_in_system.unwrap_or(u64::MAX).saturating_sub(besides).max(1);
    match setting {
        Some(wanted) if wanted > most => Err(LimitError::Descriptors { wanted, fds: raised.fds, most }),
        Some(wanted) if wanted > free => {
            tracing::warn!(
                "fd_budget = {wanted}: the whole system can open only {free} files more, so it is {free}; lower it, or raise fs.file-max"
            );
            Ok(free)
        }
        Some(wanted) => Ok(wanted),
        None => Ok(default_budget(raised, shards).0),
    }
}

/// What keeps the default budget from being more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Bound {
    /// What this process may have.
    Process,
    /// What the whole system has left.
    System,
    /// The table of the process is made so large at start; more must be asked for.
    Table,
}

/// How many descriptors blobs may have if nothing is set, and what bounds it.
#[must_use]
pub fn default_budget(raised: Raised, shards: usize) -> (u64, Bound) {
    let besides = besides(shards);
    let process = (raised.fds.saturating_sub(besides), Bound::Process);
    let system = (raised.free_in_system.unwrap_or(u64::MAX).saturating_sub(besides) / SYSTEM_DIVISOR, Bound::System);
    let (budget, bound) = process.min(system).min((TABLE_FDS.saturating_sub(besides), Bound::Table));
    (budget.max(1), bound)
}

/// What may be open beside the budget.
fn besides(shards: usize) -> u64 {
    OWN_FDS + CLIENTS_FDS + FDS_PER_SHARD * shards as u64 + FDS_PER_OPENER * OPENERS_MAX as u64 + EMERGENCY_FDS
}

/// Files that may still be opened in the whole system: `fs.file-max` less what `fs.file-nr` says is in use.
#[must_use]
pub fn free_in_system() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/sys/fs/file-nr").ok()?;
    let numbers: Vec<u64> = text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [used, _, max] = numbers[..] else { return None };
    Some(max.saturating_sub(used))
}

/// Raises the number of descriptors as far as allowed, looks how many the system has, and lifts the limits on file sizes and locked memory.
///
/// # Errors
/// A limit that would make fills fail cannot be lifted.
pub fn raise() -> Result<Raised, LimitError> {
    let fds = raise_fds();
    grow_table(fds);
    lift_file_size()?;
    lift_locked_memory();
    Ok(Raised { fds, free_in_system: free_in_system() })
}

fn raise_fds() -> u64 {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(hard);
    // With CAP_SYS_RESOURCE the hard limit can go up too; without, the soft one at least. Nobody may go above
    // `nr_open`, also if the hard limit dates from a time when that was higher.
    let possible = |fds: &u64| setrlimit(Resource::RLIMIT_NOFILE, *fds, *fds).is_ok();
    [most, hard.min(most)].into_iter().find(possible).unwrap_or(soft)
}

/// Uses a high number once: the table grows to it and stays.
fn grow_table(fds: u64) {
    let highest = i32::try_from(fds.min(TABLE_FDS).saturating_sub(1)).unwrap_or(0);
    if let Ok(fd) = fcntl(std::io::stderr(), FcntlArg::F_DUPFD_CLOEXEC(highest)) {
        let _ = close(fd);
    }
}

fn lift_file_size() -> Result<(), LimitError> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((soft, _)) if soft != RLIM_INFINITY => {
            setrlimit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY).map_err(|_| LimitError::FileSize(soft))
        }
        _ => Ok(()),
    }
}

/// The buffers that a ring has registered count as locked, except for who has CAP_IPC_LOCK, which the daemon gives up.
/// Not allowed: the limit stays, and a ring whose buffers do not fit works without registering them.
fn lift_locked_memory() {
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_stays_below_every_limit() {
        let besides = besides(16);
        let budget = |setting, fds, free_in_system| fd_budget(setting, Raised { fds, free_in_system }, 16);
        assert_eq!(budget(None, 1 << 20, None).unwrap(), TABLE_FDS - besides);
        assert_eq!(budget(None, 1 << 20, Some(1000 + besides)).unwrap(), 500);
        assert_eq!(budget(None, 700 + besides, Some(1 << 40)).unwrap(), 700);
        assert_eq!(budget(None, 1 << 20, Some(0)).unwrap(), 1);
        let bound = |fds, free_in_system| default_budget(Raised { fds, free_in_system }, 16).1;
        assert_eq!(bound(1 << 20, None), Bound::Table);
        assert_eq!(bound(1 << 20, Some(1000)), Bound::System);
        assert_eq!(bound(1024, Some(1 << 40)), Bound::Process);
        assert_eq!(budget(Some(704), 704 + besides, None).unwrap(), 704);
        let message = budget(Some(705), 704 + besides, None).unwrap_err().to_string();
        assert!(message.contains("at most 704 "), "{message}");
        assert_eq!(budget(Some(704), 1 << 20, Some(500 + besides)).unwrap(), 500);
        // Each shard has its own.
        assert!(fd_budget(None, Raised { fds: 1024, free_in_system: None }, 128).unwrap() < budget(None, 1024, None).unwrap());
        assert!(free_in_system().is_some_and(|free| free > 0));
    }

    #[test]
    fn the_soft_limit_follows_the_hard_one() {
        let raised = raise().unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!((soft, hard), (raised.fds, raised.fds));
    }
}
