//! The engine: one shard a core, the same for every front end.

pub mod blocking;
pub mod buffers;
pub mod fill;
pub mod io;
pub mod machine;
pub mod plan;
pub mod presence;
pub mod ring;

/// The machine's page size in bytes.
#[must_use]
pub fn page_bytes() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().and_then(|n| usize::try_from(n).ok()).unwrap_or(4096)
}
