//! `infill repair`: mounts from files that outlived their daemon and its keepers.

use std::path::{Path, PathBuf};

use clap::Args;
use nix::sys::signal::SigSet;

use super::leased;
use super::mount::{is_of_cache, warn};
use super::place::Place;
use super::{Failure, say};
use crate::config::Config;
use crate::control::{Client, ClientError};
use crate::mount::{self, Mounted};
use crate::ops::exit;
use crate::ops::processes::{describe, find_users};

/// Written to it, [`PAGE_CACHE`] has the kernel forget what it has read of files, wherever that can be read again.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";
/// See [`DROP_CACHES`].
const PAGE_CACHE: &str = "1";

/// Replace mounts that outlived their daemon and its keepers
///
/// When all of those are dead, the kernel lets readers through to what is not there, and keeps the zeros that they got. With a
/// daemon that serves again, this puts a new mount in the place of each, has the kernel forget what it has in memory of files,
/// and names the processes that still have files of the old mount: those must be restarted.
///
/// Exit code: 0 if all are replaced, 69 if no daemon serves, 77 if this user is not permitted, 1 for anything else.
#[derive(Debug, Args)]
pub struct RepairArgs {
    #[command(flatten)]
    place: Place,
    /// Where they are
    #[arg(required = true)]
    dirs: Vec<PathBuf>,
}

/// Replaces mounts.
///
/// # Errors
/// One at least is not replaced; the others are.
pub fn run(args: &RepairArgs) -> Result<(), Failure> {
    // A daemon that starts this takes its signals elsewhere, and a program that is started inherits that.
    let _ = SigSet::empty().thread_set_mask();
    let config = args.place.find()?;
    let daemon = Client::connect(&config.control_socket).map_err(|error| match error {
        ClientError::NoDaemon(socket) => {
            let socket = socket.display();
            let message =
                format!("no daemon listens on {socket}; start infill serve --repair, or name the daemon's --control-socket or --state-dir");
            Failure::new(exit::UNAVAILABLE, message)
        }
        error => error.into(),
    })?;
    let mut failed = 0;
    let mut or_say = |dir: &Path, why: String| {
        eprintln!("infill: {}: not repaired: {why}", dir.display());
        failed += 1;
    };
    // All of them first: from then on whoever reads is served, through the old mounts too.
    let mut ready = Vec::new();
    for dir in &args.dirs {
        match prepare(&config, &daemon, dir) {
            Ok(old) => ready.push(old),
            Err(why) => or_say(dir, why),
        }
    }
    if !ready.is_empty() {
        forget_cached();
    }
    for old in &ready {
        match replace(&daemon, old) {
            Ok(()) => report(old),
            Err(why) => or_say(&old.at, why),
        }
    }
    let (all, dir) = (args.dirs.len(), args.dirs[0].display());
    match failed {
        0 => Ok(()),
        _ => Err(Failure::new(exit::FAILED, format!("{failed} of {all} mounts, the first given is {dir}, are not repaired; see above"))),
    }
}

/// Has the daemon serve a mount's image again. It goes on with that, for the mount has its files open.
fn prepare(config: &Config, daemon: &Client, dir: &Path) -> Result<Mounted, String> {
    let at = std::fs::canonicalize(dir).map_err(|error| error.to_string())?;
    let old = mount::mounted_at(&at).map_err(|error| error.to_string())?;
    let old = old.filter(|old| is_of_cache(config, old));
    let old = old
        .ok_or_else(|| format!("no image of the cache {} is mounted here; see --state-dir and --cache-dir", config.cache_dir.display()))?;
    if !old.is_plain {
        return Err("it shows a part of an image, or something is mounted on it; unmount it, and mount the image anew".to_owned());
    }
    let ready = daemon.repair(&old.image).map_err(|error| error.to_string())?;
    // Else it runs out.
    let _ = daemon.end_lease(&ready.lease);
    Ok(old)
}

/// What was read as zeros is in memory, of every mount of the image, in whatever namespace. The kernel keeps what programs
/// have mapped.
fn forget_cached() {
    if let Err(error) = std::fs::write(DROP_CACHES, PAGE_CACHE) {
        eprintln!("infill: cannot write {DROP_CACHES}: {error}: mounts that are not replaced may go on showing zeros");
    }
}

fn replace(daemon: &Client, old: &Mounted) -> Result<(), String> {
    let made = leased::make(daemon, |daemon| daemon.repair(&old.image), |asked| asked).map_err(|error| error.to_string())?;
    warn(&old.at, made.read_ahead);
    made.mount.replace(&old.at).map_err(|error| error.to_string())
}

/// Says what is left of the old mount.
fn report(old: &Mounted) {
    let (dir, users) = (old.at.display(), find_users(old.device));
    if users.is_empty() {
        say(format_args!("infill: {dir}: replaced; no process has files of the old mount"));
    } else {
        say(format_args!(
            "infill: {dir}: replaced; restart those that have files of the old mount, for they may have read zeros: {}",
            describe(&users)
        ));
    }
    // Its image lies in a directory of the cache.
    let others = old.image.ancestors().nth(2).map(mount::mounted_everywhere).and_then(Result::ok).unwrap_or_default();
    for other in others.iter().filter(|other| other.device == old.device) {
        say(format_args!("infill: the old mount is still {}: unmount it there, and mount the image anew", place(other)));
    }
}

/// Where a mount is, in words.
pub(super) fn place(mount: &Mounted) -> String {
    match mount.seen_by {
        None => format!("on {}", mount.at.display()),
        Some(pid) => format!("on {} in the mount namespace of pid {pid}", mount.at.display()),
    }
}
