//! `infill mount` and `infill umount`: what mount(8) does, with a look at what can be had for nothing.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use nix::unistd::geteuid;
use serde::Serialize;

use super::Failure;
use super::foreground;
use super::leased::{self, Made};
use super::place::Place;
use crate::config::{Config, ReadAhead};
use crate::control::Client;
use crate::control::wire::Prepared;
use crate::front::cachefiles::{DEFAULT_DEVNODE, cache_dir};
use crate::image::devices;
use crate::mount::{self, Mounted, ReadAheadError};
use crate::ops::exit;
use crate::ops::mounting::{Image, MountError, check_dir, unmount};
use crate::ops::processes::{Process, find_holders};
use crate::ops::seeding::{Fate, seed_key};
use crate::ops::state::noted_cache;
use crate::store::remembered::Remembered;
use crate::store::{SourceMode, Store, Stores};

/// Mount an image through the running daemon
///
/// Where stores and cache share an XFS or btrfs, the image's blobs are shared with the cache first (see infill
/// prefetch --seed): nothing is copied then, and nothing is asked of the daemon. Elsewhere they are read on demand.
///
/// Exit code: 0 if it is mounted, 2 for names that cannot be, 69 if no daemon serves or the kernel lacks on-demand
/// mode, 75 if the daemon is busy or is being started anew, 77 if this user is not permitted, 1 for anything else.
#[derive(Debug, Args)]
pub struct MountArgs {
    #[command(flatten)]
    place: Place,
    /// Share blobs with other images of this name (EROFS's domain_id); without it the image is by itself
    #[arg(long)]
    domain: Option<String>,
    /// Names of the blobs with the image's data, in order [default: those that the image has]
    #[arg(long = "device", value_name = "BLOB")]
    devices: Vec<String>,
    /// Share no blobs with the cache
    #[arg(long)]
    no_seed: bool,
    /// Serve it too, without a daemon, until a signal comes; then unmount it
    #[arg(long)]
    foreground: bool,
    /// How much the kernel reads ahead, if it is mounted from files: auto, so many bytes, or kernel: as it likes [default: as
    /// the daemon's settings say]
    #[arg(long, value_name = "auto|SIZE|kernel")]
    read_ahead: Option<ReadAhead>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Name of the image's blob (EROFS's fsid)
    image: String,
    /// Where to
    dir: PathBuf,
}

/// Unmount an image
#[derive(Debug, Args)]
pub struct UmountArgs {
    #[command(flatten)]
    place: Place,
    /// Where it is mounted
    dir: PathBuf,
}

/// What was mounted from files; `--json` prints it.
#[derive(Debug, Serialize)]
struct FromFiles {
    image: String,
    dir: PathBuf,
    /// Of all of its files.
    len_bytes: u64,
    /// What of them is in the cache.
    present_bytes: u64,
}

impl FromFiles {
    fn line(&self) -> String {
        let Self { image, dir, len_bytes, present_bytes } = self;
        format!(
            "{image} is mounted on {}; {present_bytes} of {len_bytes} bytes are in the cache, the rest is read on demand",
            dir.display()
        )
    }
}

/// What was done; `--json` prints it.
#[derive(Debug, Default, Serialize)]
struct Report {
    image: String,
    dir: PathBuf,
    /// Blobs that are in the cache because they were shared with it, now or before, and their bytes.
    shared_blobs: usize,
    shared_bytes: u64,
    /// Blobs that are read on demand, and why they are not shared.
    on_demand: Vec<String>,
}

/// Mounts an image.
///
/// # Errors
/// It is not mounted; the message says what to do.
pub fn run(args: &MountArgs) -> Result<(), Failure> {
    let config = args.place.find()?;
    check_dir(&args.dir).map_err(failed)?;
    if args.foreground {
        return foreground::run(&args.place, &config, &args.dir, |daemon| mount_files(args, &daemon));
    }
    // One that serves through cachefiles has the kernel ask it, whoever mounts: nobody else need be able to reach it.
    if let Some(daemon) = Client::find(&config.control_socket)?
        && daemon.mounts_from_files()
    {
        return mount_files(args, &daemon);
    }
    // Others cannot see who holds it, and may not mount either, as the kernel will say.
    if geteuid().is_root() && find_holders(DEFAULT_DEVNODE.as_ref()).iter().all(Process::only_keeps) {
        let dir = config.state_dir.display();
        let message = format!(
            "no daemon serves: none has its state in {dir}, and none has {DEFAULT_DEVNODE}, so the mount would fail or wait; start infill serve (see infill doctor), or name the daemon's --state-dir"
        );
        return Err(Failure::new(exit::UNAVAILABLE, message));
    }
    let image = Image { name: args.image.clone(), domain: args.domain.clone(), devices: args.devices.clone() };
    let mut report = Report { image: args.image.clone(), dir: args.dir.clone(), ..Report::default() };
    if !args.no_seed && !config.stores.is_empty() {
        report.share(&image, &config)?;
    }
    image.mount(&args.dir).map_err(failed)?;
    let line = if args.json { serde_json::to_string(&report).unwrap_or_default() } else { report.line() };
    // A reader that went away does not change what is done.
    let _ = writeln!(std::io::stdout(), "{line}");
    Ok(())
}

/// Mounts an image from files that the daemon makes ready.
fn mount_files(args: &MountArgs, daemon: &Client) -> Result<(), Failure> {
    let wanted = Image { name: args.image.clone(), domain: args.domain.clone(), devices: args.devices.clone() };
    let cannot = format!("cannot mount {} on {}", args.image, args.dir.display());
    let read_ahead = |asked| args.read_ahead.map_or(asked, ReadAhead::bytes);
    let made = leased::make(daemon, |daemon| daemon.attach(&wanted), read_ahead).map_err(|error| error.failure(&cannot))?;
    let Made { prepared: Prepared { len_bytes, present_bytes, .. }, mount, read_ahead } = made;
    warn(&args.dir, read_ahead);
    mount.put(&args.dir).map_err(|error| leased::NotMade::from(error).failure(&cannot))?;
    let report = FromFiles { image: args.image.clone(), dir: args.dir.clone(), len_bytes, present_bytes };
    let line = if args.json { serde_json::to_string(&report).unwrap_or_default() } else { report.line() };
    let _ = writeln!(std::io::stdout(), "{line}");
    Ok(())
}

/// A mount is a mount, also if it is slower than it could be.
pub(super) fn warn(dir: &Path, read_ahead: Result<(), ReadAheadError>) {
    if let Err(error) = read_ahead {
        eprintln!("infill: {}: {error}", dir.display());
    }
}

/// Unmounts an image.
///
/// # Errors
/// It is not unmounted; the message says what to do.
pub fn run_umount(args: &UmountArgs) -> Result<(), Failure> {
    let config = args.place.find()?;
    check_ours(&config, &args.dir)?;
    unmount(&args.dir).map_err(failed)?;
    // It would find out by itself, some seconds later.
    if let Ok(Some(daemon)) = Client::find(&config.control_socket)
        && daemon.mounts_from_files()
    {
        let _ = daemon.release();
    }
    Ok(())
}

/// Other EROFS mounts are somebody else's.
fn check_ours(config: &Config, dir: &Path) -> Result<(), Failure> {
    let mount = std::fs::canonicalize(dir).and_then(|at| mount::mounted_at(&at));
    match mount {
        Ok(Some(mount)) if !mount.is_on_demand && !is_of_cache(config, &mount) => {
            let (dir, image, cache) = (dir.display(), mount.image.display(), config.cache_dir.display());
            let message = format!(
                "{dir}: what is mounted here, {image}, is no image of the cache {cache}; name the daemon's --state-dir or --cache-dir, or use umount(8)"
            );
            Err(Failure::new(exit::FAILED, message))
        }
        // Whatever else is wrong shows when it is unmounted.
        _ => Ok(()),
    }
}

/// Whether an image lies in the cache of the settings, or in that of the daemon.
pub(super) fn is_of_cache(config: &Config, mount: &Mounted) -> bool {
    let noted = noted_cache(&config.state_dir);
    std::iter::once(&config.cache_dir).chain(&noted).any(|dir| mount::is_of_cache(mount, dir))
}

fn failed(error: MountError) -> Failure {
    Failure::new(error.exit_code(), error)
}

impl Report {
    /// Shares what can be shared. Nothing that goes wrong here keeps the image from being mounted.
    fn share(&mut self, image: &Image, config: &Config) -> Result<(), Failure> {
        let stores =
            Stores::from_specs(&config.stores, SourceMode::Buffered).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
        let cache_dir = match cache_dir::check(&config.cache_dir) {
            Ok(dir) => dir,
            Err(error) => {
                self.on_demand.push(error.to_string());
                return Ok(());
            }
        };
        let remembered = Remembered::open(&cache_dir);
        let named = stores.open(&image.key()).ok().flatten().map(|image| devices::names_of(&*image)).unwrap_or_default();
        for key in image.keys(&named) {
            let seeding = seed_key(&stores, &cache_dir, &remembered, &key);
            match seeding.fate {
                Fate::Seeded | Fate::AlreadyThere => {
                    self.shared_blobs += 1;
                    self.shared_bytes += seeding.len_bytes;
                }
                Fate::Refused(why) | Fate::Failed(why) => self.on_demand.push(format!("{key}: {why}")),
            }
        }
        Ok(())
    }

    fn line(&self) -> String {
        let Self { image, dir, shared_blobs, shared_bytes, on_demand } = self;
        let on = format!("{image} is mounted on {}", dir.display());
        match (shared_blobs, on_demand.len()) {
            (0, _) => format!("{on}; its blobs are read on demand"),
            (_, 0) => format!("{on}; {shared_blobs} blobs are in the cache ({shared_bytes} bytes), none was copied"),
            (_, rest) => format!("{on}; {shared_blobs} blobs are in the cache ({shared_bytes} bytes), {rest} are read on demand"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_is_copied() {
        let report = |shared_blobs, on_demand: usize| Report {
            image: "a".into(),
            dir: "/m".into(),
            shared_blobs,
            shared_bytes: 9,
            on_demand: vec!["x".to_owned(); on_demand],
        };
        assert_eq!(report(0, 1).line(), "a is mounted on /m; its blobs are read on demand");
        assert_eq!(report(2, 0).line(), "a is mounted on /m; 2 blobs are in the cache (9 bytes), none was copied");
        assert_eq!(report(2, 1).line(), "a is mounted on /m; 2 blobs are in the cache (9 bytes), 1 are read on demand");
    }
}
