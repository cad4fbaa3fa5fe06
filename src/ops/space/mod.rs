//! Space: how full the cache's file system may become, and what goes when it is too full.
//!
//! | file | its subject |
//! |---|---|
//! | `policy` | marks, and which objects go (pure) |
//! | `count` | when the cache is counted (pure) |
//! | `cache` | what is looked after |
//! | `volumes`, `uses` | the cache of cachefiles, and when its objects were last used |
//! | `round` | one round of culling |
//! | `steward` | the thread `infill-space`, which sees to it |
//! | `mod` | the room that a file system has, judged as the kernel does |

pub mod cache;
mod count;
pub mod policy;
mod round;
pub mod steward;
mod uses;
mod volumes;

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;

use self::policy::{Limits, Marks, Resource, Room};
pub use self::steward::{Settings, Statistics, Steward, Watch};
pub use self::volumes::Volumes;
use crate::front::cachefiles::{CullLimits, Percents};

/// How much room the file system of an open file has.
///
/// # Errors
/// What fstatvfs(3) says.
pub fn room(file: impl AsFd) -> Result<Room, Errno> {
    let stat = fstatvfs(file)?;
    // The kernel counts in blocks of f_bsize, which equals f_frsize on all file systems that can hold a cache.
    let block_bytes = stat.fragment_size().max(1);
    let bytes = |blocks: u64| blocks.saturating_mul(block_bytes);
    Ok(Room {
        bytes: Resource { free: bytes(stat.blocks_available()), total: bytes(stat.blocks()) },
        files: Resource { free: stat.files_free(), total: stat.files() },
        block_bytes,
    })
}

/// The marks that `limits` set on a file system of this size; the kernel computes them once, when it binds
/// (`cachefiles_add_cache`, fs/cachefiles/cache.c).
#[must_use]
pub fn limits(limits: &CullLimits, room: &Room) -> Limits {
    Limits { bytes: marks(limits.blocks(), room.bytes.total, room.block_bytes), files: marks(limits.files(), room.files.total, 1) }
}

fn marks(percents: Percents, total: u64, unit: u64) -> Marks {
    let mark = |percent: u8| total / unit / 100 * u64::from(percent) * unit;
    Marks { run: mark(percents.run), cull: mark(percents.cull), stop: mark(percents.stop) }
}
