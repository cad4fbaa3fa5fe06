//! Which kernel interface the daemon serves, and the hold on it that outlives this process.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::Failure;
use crate::config::{Config, FrontEndKind};
use crate::front::FrontEnd;
use crate::front::cachefiles::{BindError, BindOptions, CullLimits, Device};
use crate::front::sim::socket::SocketFront;
use crate::mount::{Blobs, BlobsError};
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
    /// The culling limits that the device is bound with.
    pub(super) limits: CullLimits,
    /// The hold on it that outlives this process.
    pub(super) keep: Option<Keep>,
}

impl Opened {
    /// The kernel interface, and for the one of a real kernel the hold on it that outlives this process.
    pub(super) fn new(config: &Config, claimed: Option<Keep>, sim_socket: Option<i32>) -> Result<Self, Failure> {
        match (claimed, sim_socket) {
            (None, Some(0)) => {
                let front = SocketFront::from_stdin(&config.cache_dir)
                    .map_err(|error| Failure::new(exit::FAILED, format!("no socket on standard input: {error}")))?;
                Ok(Self { fronts: vec![Arc::new(front)], device: None, blobs: None, limits: config.cull, keep: None })
            }
            (None, _) => Err(Failure::new(exit::USAGE, "--front-end sim needs --sim-socket 0, a socket on standard input")),
            (Some(keep), _) => Self::of_kernel(config, keep),
        }
    }

    /// What this kernel has and the settings allow.
    fn of_kernel(config: &Config, keep: Keep) -> Result<Self, Failure> {
        match config.front_end {
            FrontEndKind::Fanotify => Self::fanotify(config, keep),
            FrontEndKind::Cachefiles | FrontEndKind::Sim => {
                let mut keep = keep;
                let (device, limits) = open_device(config, &mut keep)?.map_err(|error| Failure::new(error.exit_code(), error))?;
                Ok(Self::cachefiles(device, limits, keep))
            }
            FrontEndKind::Auto => Self::either(config, keep),
        }
    }

    /// Cachefiles where the kernel has its on-demand mode, else fanotify.
    fn either(config: &Config, mut keep: Keep) -> Result<Self, Failure> {
        match open_device(config, &mut keep)? {
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
        Self { fronts, device: Some(device), blobs: None, limits, keep: Some(keep) }
    }

    fn fanotify(config: &Config, keep: Keep) -> Result<Self, Failure> {
        let blobs = Blobs::new(&config.cache_dir, config.shards).map_err(|error| Failure::new(no_fanotify(&error), error))?;
        let fronts = blobs.fronts();
        Ok(Self { fronts, device: None, blobs: Some(Arc::new(blobs)), limits: config.cull, keep: Some(keep) })
    }

    /// Any of its sources.
    pub(super) fn front(&self) -> &dyn FrontEnd {
        &*self.fronts[0]
    }

    /// What is kept while no daemon serves.
    fn to_keep(&self) -> std::io::Result<OwnedFd> {
        self.front().requests().try_clone_to_owned()
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

fn failed(error: KeepError) -> Failure {
    Failure::new(error.exit_code(), error)
}

type Bound = Result<(Arc<Device>, CullLimits), BindError>;

/// Takes over the device that an earlier daemon had, or binds it. Gives also the culling limits that it has.
fn open_device(config: &Config, keep: &mut Keep) -> Result<Bound, Failure> {
    let mut options = BindOptions::new(&config.cache_dir);
    options.tag.clone_from(&config.tag);
    options.secctx.clone_from(&config.secctx);
    options.limits = config.cull;
    options.xfs_extent_bytes = config.xfs_extent_bytes;
    let opened = match keep.find().map_err(failed)? {
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
