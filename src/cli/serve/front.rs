//! Which kernel interface the daemon serves, and the hold on it that outlives this process.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::Failure;
use crate::cli::repair::place;
use crate::config::{Config, FrontEndKind};
use crate::front::FrontEnd;
use crate::front::cachefiles::cookies::Lists;
use crate::front::cachefiles::{BindError, BindOptions, CullLimits, Device};
use crate::front::sim::socket::SocketFront;
use crate::mount::{Blobs, BlobsError, Mounted, Restored, is_bag, loops, metadata, mounted_everywhere};
use crate::ops::doctor::release::{Running, may_cull};
use crate::ops::exit;
use crate::ops::keep::{Keep, KeepError, KeepMode};

/// Makes this process the one that serves this kernel; with the rights of whoever starts it, whose directory that is.
pub(super) fn claim(config: &Config) -> Result<Option<Keep>, Failure> {
    if config.front_end == FrontEndKind::Sim {
        return Ok(None);
    }
    Keep::claim(&config.state_dir).map(Some).map_err(failed)
}

/// A front end.
pub(super) struct Opened {
    /// Its sources of requests; of one kind, and one at least.
    pub(super) fronts: Vec<Arc<dyn FrontEnd>>,
    /// The device, if that is what it is.
    pub(super) device: Option<Arc<Device>>,
    /// The files of blobs, if images are mounted from files.
    pub(super) blobs: Option<Arc<Blobs>>,
    /// And their mounts.
    pub(super) mounts: Mounts,
    /// It goes on where an earlier daemon had ended.
    pub(super) restored: bool,
    /// The culling limits that the device is bound with.
    pub(super) limits: CullLimits,
    /// The hold on it that outlives this process.
    pub(super) keep: Option<Keep>,
}

/// What there is to know of mounts from files.
#[derive(Default)]
pub(super) struct Mounts {
    /// Those of the cache.
    pub(super) mounted: Vec<Mounted>,
    /// Nobody watched them for a while.
    pub(super) poisoned: bool,
    /// The kernel asks for their metadata too. If that is not known, it is taken not to.
    pub(super) asked_for_metadata: bool,
}

/// The cache whose space is looked after.
pub(super) enum CacheOf {
    /// It is bound.
    Device {
        /// By this.
        device: Arc<Device>,
        /// Whether the kernel may be asked to cull.
        may_cull: bool,
        /// Where it tells what it has open.
        lists: Option<Lists>,
    },
    /// It has blobs' files.
    Blobs(Arc<Blobs>),
}

impl Opened {
    /// The kernel interface, and for the one of a real kernel the hold on it that outlives this process.
    /// What systemd passed may be that.
    pub(super) fn new(
        config: &Config,
        claimed: Option<Keep>,
        passed: Vec<(String, OwnedFd)>,
        sim_socket: Option<i32>,
    ) -> Result<Self, Failure> {
        match (claimed, sim_socket) {
            (None, Some(0)) => {
                let front = SocketFront::from_stdin(&config.cache_dir)
                    .map_err(|error| Failure::new(exit::FAILED, format!("no socket on standard input: {error}")))?;
                let fronts: Vec<Arc<dyn FrontEnd>> = vec![Arc::new(front)];
                Ok(Self { fronts, device: None, blobs: None, mounts: Mounts::default(), restored: false, limits: config.cull, keep: None })
            }
            (None, _) => Err(Failure::new(exit::USAGE, "--front-end sim needs --sim-socket 0, a socket on standard input")),
            (Some(keep), _) => Self::of_kernel(config, keep, passed),
        }
    }

    /// What an earlier daemon had, or what this kernel has and the settings allow.
    fn of_kernel(config: &Config, mut keep: Keep, passed: Vec<(String, OwnedFd)>) -> Result<Self, Failure> {
        let kept = keep.find(passed).map_err(failed)?;
        let restored = kept.is_some();
        let opened = match (config.front_end, kept) {
            (FrontEndKind::Auto | FrontEndKind::Fanotify, Some(bag)) if is_bag(&bag) => Self::go_on(config, keep, bag),
            (FrontEndKind::Fanotify, Some(_)) => {
                let why = "what was kept over the restart is no bag of the fanotify front end: use --front-end auto, or unmount the images and give it up with `infill release`";
                Err(Failure::new(exit::BAD_CONFIGURATION, why))
            }
            (FrontEndKind::Fanotify, None) => Self::fanotify(config, keep),
            (FrontEndKind::Auto, None) => Self::either(config, keep),
            (_, kept) => {
                let (device, limits) = open_device(config, &mut keep, kept)?.map_err(|error| Failure::new(error.exit_code(), error))?;
                Ok(Self::cachefiles(device, limits, keep))
            }
        };
        opened.map(|opened| Self { restored, ..opened })
    }

    /// Cachefiles where the kernel has its on-demand mode, else fanotify.
    fn either(config: &Config, mut keep: Keep) -> Result<Self, Failure> {
        match open_device(config, &mut keep, None)? {
            Ok((device, limits)) => Ok(Self::cachefiles(device, limits, keep)),
            Err(error @ (BindError::NoDevice(_) | BindError::NoOnDemand(_))) => {
                tracing::info!("not through cachefiles: {error}");
                Self::fanotify(config, keep)
                    .map_err(|Failure { code, message }| Failure::new(code, format!("{message}; nor through cachefiles: {error}")))
            }
            Err(error) => Err(Failure::new(error.exit_code(), error)),
        }
    }

    fn cachefiles(device: Arc<Device>, limits: CullLimits, keep: Keep) -> Self {
        let fronts = vec![Arc::clone(&device) as Arc<dyn FrontEnd>];
        Self { fronts, device: Some(device), blobs: None, mounts: Mounts::default(), restored: false, limits, keep: Some(keep) }
    }

    fn fanotify(config: &Config, keep: Keep) -> Result<Self, Failure> {
        let blobs = Blobs::new(&config.cache_dir, config.shards).map_err(|error| Failure::new(no_fanotify(&error), error))?;
        let mut opened = Self::of_blobs(config, keep, blobs)?;
        opened.mounts.mounted.iter().for_each(say_poisoned);
        opened.mounts.poisoned = true;
        Ok(opened)
    }

    /// Goes on with what an earlier daemon served.
    fn go_on(config: &Config, keep: Keep, bag: OwnedFd) -> Result<Self, Failure> {
        let (blobs, restored) = Blobs::restore(&config.cache_dir, bag).map_err(|error| Failure::new(no_fanotify(&error), error))?;
        let Restored { groups, blobs: count, unanswered, lost } = restored;
        tracing::info!(groups, blobs = count, unanswered, "took over from an earlier daemon: mounted images go on");
        lost.iter().for_each(|error| tracing::error!("its readers get I/O errors: {error}"));
        Self::of_blobs(config, keep, blobs)
    }

    /// Has it kept first: from then on nothing that is mounted can be read without being asked for.
    fn of_blobs(config: &Config, mut keep: Keep, blobs: Blobs) -> Result<Self, Failure> {
        if config.keep == KeepMode::Off {
            let why = "--keep off: the kernel would let readers through to what is not there when infill ends; use --keep auto with the fanotify front end";
            return Err(Failure::new(exit::BAD_CONFIGURATION, why));
        }
        let bag = blobs.bag().map_err(|error| Failure::new(exit::FAILED, format!("no descriptor is free: {error}")))?;
        keep.hold(config.keep, bag.as_fd(), &config.cache_dir).map_err(failed)?;
        loops::find(&config.cache_dir).iter().for_each(|found| tracing::error!("{found}"));
        let unknown = |error: &_| {
            tracing::warn!("images are brought whole before they are mounted: whether the kernel asks for metadata is not known: {error}");
        };
        let asked_for_metadata = metadata::is_asked_for(&config.cache_dir).inspect_err(unknown).unwrap_or(false);
        let mounted = mounted_everywhere(&config.cache_dir).unwrap_or_default();
        let mounts = Mounts { mounted, poisoned: false, asked_for_metadata };
        Ok(Self {
            fronts: blobs.fronts(),
            device: None,
            blobs: Some(Arc::new(blobs)),
            mounts,
            restored: false,
            limits: config.cull,
            keep: Some(keep),
        })
    }

    /// The cache, if there is one on a disk. To be asked for once, before the process is confined.
    pub(super) fn cache(&mut self, config: &Config) -> Option<CacheOf> {
        if let Some(blobs) = &self.blobs {
            return Some(CacheOf::Blobs(Arc::clone(blobs)));
        }
        let device = self.device.take()?;
        let cannot = |error: &_| tracing::warn!("{}: {error}: the last use of blobs is not noted", config.cache_dir.display());
        let lists = Lists::open().inspect_err(cannot).ok();
        Some(CacheOf::Device { device, may_cull: may_cull(&Running::read()), lists })
    }

    /// Any of its sources.
    pub(super) fn front(&self) -> &dyn FrontEnd {
        &*self.fronts[0]
    }

    /// What is kept while no daemon serves.
    fn to_keep(&self) -> std::io::Result<OwnedFd> {
        match &self.blobs {
            Some(blobs) => blobs.bag(),
            None => self.front().requests().try_clone_to_owned(),
        }
    }

    /// Gives up what is kept if nobody needs it: images that are mounted from files are all that does.
    pub(super) fn give_up_if_idle(&mut self) {
        if self.blobs.as_ref().is_some_and(|blobs| blobs.is_idle())
            && let Some(Err(error)) = self.keep.take().map(Keep::give_up)
        {
            tracing::warn!("nothing is mounted, but a keeper stays: {error}");
        }
    }

    /// Starts other keepers in the place of those that have died.
    pub(super) fn renew(&mut self) {
        let kept = self.to_keep();
        let Some(keep) = &mut self.keep else { return };
        match kept.map_err(|error| error.to_string()).and_then(|fd| keep.renew(fd.as_fd()).map_err(|error| error.to_string())) {
            Ok(keepers) => tracing::warn!("a keeper has died; the device is kept by {keepers} now"),
            Err(error) => tracing::error!("the last keeper has died, and no other keeps the device over a restart now: {error}"),
        }
    }
}

fn no_fanotify(error: &BlobsError) -> u8 {
    match error {
        BlobsError::NotPermitted => exit::NO_PERMISSION,
        BlobsError::NoGroup { .. } | BlobsError::NoEvents { .. } => exit::UNAVAILABLE,
        BlobsError::Bag(_) => exit::FAILED,
        BlobsError::Dir { .. } => exit::BAD_CONFIGURATION,
    }
}

/// Says that nobody watched a mount for a while.
fn say_poisoned(mount: &Mounted) {
    let remedy = match mount.seen_by {
        None => format!("infill repair {} replaces it and says who must be restarted, as infill serve --repair does", mount.at.display()),
        Some(_) => "unmount it there, and mount the image anew".to_owned(),
    };
    tracing::error!(
        "the mount of {} {} outlived the daemon and its keepers, so whoever read it since may have got zeros: {remedy}",
        mount.image.display(),
        place(mount)
    );
}

fn failed(error: KeepError) -> Failure {
    Failure::new(error.exit_code(), error)
}

type Bound = Result<(Arc<Device>, CullLimits), BindError>;

/// Takes over the device that an earlier daemon had, or binds it. Gives also the culling limits that it has.
fn open_device(config: &Config, keep: &mut Keep, kept: Option<OwnedFd>) -> Result<Bound, Failure> {
    let mut options = BindOptions::new(&config.cache_dir);
    options.tag.clone_from(&config.tag);
    options.secctx.clone_from(&config.secctx);
    options.limits = config.cull;
    options.xfs_extent_bytes = config.xfs_extent_bytes;
    let opened = match kept {
        Some(kept) => Device::take_over(kept, &options, &keep.noted_cache())
            .inspect(|_| tracing::info!("took over the device of an earlier daemon: mounted images go on, unanswered requests come again"))
            .map(|device| (device, keep.limits_of_kept(options.limits))),
        None => Device::bind(&options).inspect(|_| keep.note_limits(&options.limits)).map(|device| (device, options.limits)),
    };
    let Ok((device, _)) = &opened else { return Ok(opened) };
    // A kernel that does not repeat requests would leave readers and mounts hanging, for whom errors are better.
    let mode = if device.caps().reopens { config.keep } else { KeepMode::Off };
    match keep.hold(mode, device.requests(), &config.cache_dir) {
        Err(error) if mode == KeepMode::Auto => tracing::warn!("nobody keeps the device over a restart: {error}"),
        result => result.map_err(failed)?,
    }
    Ok(opened)
}
