//! Giving up what the daemon does not need once the device is bound.
//!
//! | file | its subject |
//! |---|---|
//! | `user` | becoming another user |
//! | `powers` | capabilities, and never gaining any (`no_new_privs`) |
//! | `files` | Landlock: which files can be opened at all |
//! | `calls` | seccomp: which system calls exist |
//!
//! All of it holds for the calling thread and what it starts, so it is done while there is no other: after the
//! device is bound and the cache seeded, before the engine starts. What is open stays open. The kernel works on the
//! cache with the credentials of whoever bound it (`cache->cache_cred`, fs/cachefiles/security.c), which are a copy
//! from before: no right that is given up here is missing there.

pub mod calls;
pub mod files;
mod powers;
mod user;

use std::path::Path;

use serde::Serialize;

pub use self::user::{Account, User, UserError};
use super::exit;

/// Where the kernel lists the threads of this process.
const THREADS: &str = "/proc/self/task";

/// How much is given up (`--confine`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// As much as the kernel has; what is missing is logged.
    #[default]
    Auto,
    /// All of it, or infill does not start.
    Strict,
    /// Nothing, except for what becoming another user costs anyway: capabilities.
    Off,
}

/// What the daemon is to keep.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// The user that this process has become.
    pub user: Option<&'a User>,
    /// Directories below which files may be opened for reading.
    pub readable: &'a [&'a Path],
    /// Directories below which files may also be made, changed and removed.
    pub writable: &'a [&'a Path],
}

/// One part of the confinement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// `capabilities`, `no_new_privs`, `landlock`, `seccomp`, or `threads`.
    pub name: &'static str,
    /// In what form it holds; or why it does not, and what the operator can do.
    pub outcome: Result<String, String>,
}

/// Parts of the confinement are missing, and all are wanted.
#[derive(Debug, thiserror::Error)]
#[error("--confine strict: {0} (--confine auto starts without what is missing)")]
pub struct Missing(String);

impl Missing {
    /// The exit code of a process that ends for this reason.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        exit::UNAVAILABLE
    }
}

/// Gives up all but what is `kept`. Cannot be undone, by nobody.
///
/// # Errors
/// In [`Mode::Strict`]: a part is missing. Some parts may hold already.
pub fn confine(mode: Mode, kept: &Kept<'_>) -> Result<Vec<Part>, Missing> {
    let mut parts = Vec::new();
    if mode != Mode::Off {
        parts.extend(other_threads());
        // First, because it needs a capability: CAP_SETPCAP.
        let bounding = powers::empty_bounding_set();
        let no_new_privs = powers::gain_none();
        let landlock = files::restrict(kept.readable, kept.writable);
        // Without Landlock they would be good for any file.
        let spare_cache = kept.user.is_some() && landlock.is_ok();
        parts.push(Part { name: "capabilities", outcome: powers::drop_all(spare_cache).and_then(|left| bounding.map(|()| left)) });
        parts.push(Part { name: "no_new_privs", outcome: no_new_privs });
        parts.push(Part { name: "landlock", outcome: landlock });
        parts.push(Part { name: "seccomp", outcome: calls::restrict() });
    } else if kept.user.is_some() {
        parts.push(Part { name: "capabilities", outcome: powers::drop_all(false) });
    }
    let missing: Vec<_> = parts.iter().filter_map(|part| part.outcome.as_ref().err().map(|why| format!("{}: {why}", part.name))).collect();
    if mode == Mode::Strict && !missing.is_empty() {
        return Err(Missing(missing.join("; ")));
    }
    Ok(parts)
}

/// Makes effective what [`confine`] has left this thread, for looking after the cache; nothing, if it is root's daemon.
///
/// # Errors
/// The kernel refuses.
pub fn take_cache_powers() -> Result<(), String> {
    powers::regain()
}

/// Gives up the rest too: for the thread that starts all those that do not look after the cache.
///
/// # Errors
/// The kernel refuses.
pub fn drop_cache_powers() -> Result<(), String> {
    powers::drop_all(false).map(drop)
}

/// Threads that run already would keep everything. None if there is none, as it should be.
fn other_threads() -> Option<Part> {
    let others = std::fs::read_dir(THREADS).map_or(0, |threads| threads.count().saturating_sub(1));
    let outcome = Err(format!("{others} threads were started before and are not confined; please report this as a bug of infill"));
    (others > 0).then_some(Part { name: "threads", outcome })
}

/// Says in the log what holds and what does not.
pub fn announce(mode: Mode, user: Option<&User>, parts: &[Part]) {
    let user = user.map_or_else(|| format!("uid {}", nix::unistd::geteuid()), ToString::to_string);
    if mode == Mode::Off {
        tracing::warn!(user, "not confined: --confine off");
        return;
    }
    let holds: Vec<_> = parts.iter().filter_map(|part| part.outcome.as_ref().ok().map(|how| format!("{}: {how}", part.name))).collect();
    tracing::info!(user, "confined: {}", holds.join("; "));
    for Part { name, outcome } in parts {
        if let Err(why) = outcome {
            tracing::warn!("not confined by {name}: {why}");
        }
    }
}
