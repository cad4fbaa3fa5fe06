//! `infill release`: gives up a device that is kept between two daemons.

use std::path::PathBuf;

use super::{Failure, say};
use crate::mount::{is_bag, mounted_everywhere};
use crate::ops::exit;
use crate::ops::keep::{Keep, KeepError};
use crate::ops::notify::passed;
use crate::ops::state::DEFAULT_STATE_DIR;

/// Where the kernel lists caches: name, and how many volumes and objects are in use (fs/netfs/fscache_cache.c, before
/// 6.8 fs/fscache/cache.c).
const CACHES: &str = "/proc/fs/fscache/caches";
/// Columns of that list.
const VOLUMES_COLUMN: usize = 2;
const OBJECTS_COLUMN: usize = 3;

/// Give the device up that is kept while no daemon serves: the end of `infill serve --keep keeper` for good.
///
/// Refused while a daemon serves, and while images are mounted unless --force is given: they lose what they have not
/// read yet, and what is in the cache, until they are mounted anew. What systemd keeps is given up with the unit:
/// systemctl stop.
#[derive(Clone, Debug, clap::Args)]
pub struct ReleaseArgs {
    /// State directory of the daemon
    #[arg(long, value_name = "DIR", env = "INFILL_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Also if images are mounted
    #[arg(long)]
    force: bool,
}

/// Gives the device up.
///
/// # Errors
/// A daemon serves, images are mounted, nobody keeps a device, or who does cannot be reached.
pub fn run(args: &ReleaseArgs) -> Result<(), Failure> {
    let failed = |error: KeepError| Failure::new(error.exit_code(), error);
    let mut keep = Keep::claim(&args.state_dir).map_err(failed)?;
    let Some(device) = keep.find(passed()).map_err(failed)? else {
        let message = format!("no keeper of {} holds a device: nothing to release", args.state_dir.display());
        return Err(Failure::new(exit::FAILED, message));
    };
    if is_bag(&device) {
        return release_bag(args, keep);
    }
    let in_use = in_use(&std::fs::read_to_string(CACHES).unwrap_or_default());
    if in_use > 0 && !args.force {
        let message = format!(
            "images are mounted ({in_use} volumes and objects are in use): unmount them first, or give the device up all the same with --force; they then give I/O errors until they are mounted anew"
        );
        return Err(Failure::new(exit::UNAVAILABLE, message));
    }
    drop(device);
    keep.give_up().map_err(failed)?;
    say("infill: the device is given up");
    Ok(())
}

/// The same of what is kept for images that are mounted from files. Without it nothing holds their readers back from what
/// is not there.
fn release_bag(args: &ReleaseArgs, keep: Keep) -> Result<(), Failure> {
    let mounted = mounted_everywhere(keep.noted_cache().as_ref()).unwrap_or_default();
    if let (Some(first), false) = (mounted.first(), args.force) {
        let (count, at) = (mounted.len(), first.at.display());
        let message = format!(
            "{count} images are mounted, the first on {at}: unmount them first, or with --force whoever reads them gets zeros for what is not in the cache"
        );
        return Err(Failure::new(exit::UNAVAILABLE, message));
    }
    keep.give_up().map_err(|error| Failure::new(error.exit_code(), error))?;
    say("infill: what was kept is given up");
    Ok(())
}

/// Volumes and objects in use in all caches.
fn in_use(caches: &str) -> u64 {
    let count = |line: &str, column| line.split_ascii_whitespace().nth(column).and_then(|field| field.parse().ok()).unwrap_or(0);
    // Two lines of headings hold no numbers.
    caches.lines().map(|line| count(line, VOLUMES_COLUMN) + count(line, OBJECTS_COLUMN)).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_and_objects_are_counted() {
        let list = "CACHE    REF   VOLS  OBJS  ACCES S NAME\n======== ===== ===== ===== ===== = ===============\n\
                    00000001     2     1     3     0 A infill\n";
        assert_eq!(in_use(list), 4);
        assert_eq!(in_use(&list.replace("    1     3", "    0     0")), 0);
        assert_eq!(in_use(""), 0);
    }
}
