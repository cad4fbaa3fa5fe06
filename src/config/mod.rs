//! Settings of `infill serve`. Everything is checked before anything is started.
//!
//! | file | its subject |
//! |---|---|
//! | `options` | the definition: keys, flags, variables, help |
//! | `text` | the values in them |
//! | `keys` | what is known of each key |
//! | `file` | a settings file, and those beside it |
//! | `layers` | flags, environment, files: which one counts |
//! | `mod` | defaults, and the checks |

mod error;
mod file;
pub mod keys;
mod layers;
mod options;
mod text;

use std::net::SocketAddr;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use crate::engine::EngineKind;
use crate::engine::placement::usable_cpus;
use crate::engine::plan::{Completion, Window};
use crate::front::cachefiles::{CullLimits, command};
use crate::key::Key;
use crate::ops::confine::{self, Account};
use crate::ops::keep::KeepMode;
use crate::ops::state::DEFAULT_STATE_DIR;
use crate::range::page_bytes;
use crate::store::{SourceMode, StoreSpec};

pub use self::error::ConfigError;
pub use self::file::{DEFAULT_FILE, DROP_INS, directory, drop_ins};
use self::keys::one_line;
pub use self::layers::{Given, Origin, Resolved};
use self::options::Options;
pub use self::text::{Bytes, FrontEndKind, LogFormat, LogLevel, Percent, ReadAhead, WindowText};

/// Where cachefiles keeps its objects.
pub const DEFAULT_CACHE_DIR: &str = "/var/cache/infill";
/// The kernel's name for the cache.
const DEFAULT_TAG: &str = "infill";
/// Names of the sockets in the state directory.
const CONTROL_SOCKET: &str = "control.sock";
const METRICS_SOCKET: &str = "metrics.sock";
/// Event loops at most; more do not help on any machine we know.
const SHARDS_MAX: usize = 1024;
/// Share of a blob, in percent, that may be brought on bets that nothing has confirmed (at least 4 MiB).
pub(crate) const DEFAULT_AHEAD_PERCENT: u8 = 8;
/// Size of a buffer slot and longest single fill.
const DEFAULT_SLOT_BYTES: u64 = 1 << 20;
/// Buffer slots a shard.
const DEFAULT_SLOTS: u32 = 16;
/// Threads of a shard that may block at a time.
const DEFAULT_WORKERS: u32 = 8;
/// Longest window.
const WINDOW_BYTES_MAX: u64 = 64 << 20;
/// Smallest window and slot: the smallest page, and what cachefiles writes at least (`CACHEFILES_DIO_BLOCK_SIZE`).
const BLOCK_BYTES_MIN: u64 = 4096;
/// A registered buffer is at most 1 GiB long (`io_buffer_validate`, io_uring/rsrc.c); one shard's slots are one.
const SHARD_BUFFER_BYTES_MAX: u64 = 1 << 30;
/// Largest extent size hint: XFS allows up to 8 GiB (`XFS_MAX_BMBT_EXTLEN`, fs/xfs/libxfs/xfs_format.h, in blocks), which is useless here.
const XFS_EXTENT_BYTES_MAX: u64 = 1 << 30;
/// Threads a shard at most.
const WORKERS_MAX: u32 = 512;
/// Least descriptor budget: a few images must be usable at a time.
const FD_BUDGET_MIN: u64 = 32;
/// Most that any Linux lets a process have (`fs.nr_open` is below 2^31).
const FD_BUDGET_MAX: u64 = 1 << 31;
/// Most that the kernel may be told to read ahead in a mount: more only makes readers wait for what they do not read.
const READ_AHEAD_BYTES_MAX: u64 = 64 << 20;
/// How long the lookup of a blob may take, with all its tries. The kernel complains after 20 s.
const DEFAULT_OPEN_TIMEOUT_MS: u64 = 10_000;
/// Least such time: a healthy disk may need that long.
const OPEN_TIMEOUT_MS_MIN: u64 = 100;
/// How long a reader may wait: longer than a disk that is asleep needs, or one that tries a bad sector again and again.
const DEFAULT_REQUEST_TIMEOUT_MS: u64 = 30_000;
/// Least such time.
const REQUEST_TIMEOUT_MS_MIN: u64 = 100;
/// How long a stop waits for what has begun.
const DEFAULT_DRAIN_TIMEOUT_MS: u64 = 10_000;
/// Longest of them all.
const TIMEOUT_MS_MAX: u64 = 600_000;

/// Checked settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Kernel interface to serve.
    pub front_end: FrontEndKind,
    /// Directory for the kernel's cache files.
    pub cache_dir: PathBuf,
    /// Where blobs come from, in order.
    pub stores: Vec<StoreSpec>,
    /// Blobs to seed before serving.
    pub seed: Vec<Key>,
    /// Name of the cache in the kernel.
    pub tag: String,
    /// Security context for the kernel's accesses.
    pub secctx: Option<String>,
    /// How full the cache's file system may become.
    pub cull: CullLimits,
    /// How much the objects in the cache may take together; `None`: as much as `cull` allows.
    pub cache_bytes: Option<u64>,
    /// On XFS, the pieces in which cache files take their space; `None`: what is set, or the default.
    pub xfs_extent_bytes: Option<u32>,
    /// Event loops.
    pub shards: usize,
    /// How reads and writes are done.
    pub engine: EngineKind,
    /// How blobs are read.
    pub source: SourceMode,
    /// How much is brought for a demand.
    pub window: Window,
    /// What is brought when there is nothing better to do.
    pub completion: Completion,
    /// Size of a buffer slot.
    pub slot_bytes: u64,
    /// Buffer slots a shard.
    pub slots: u32,
    /// Blocking threads a shard.
    pub workers: u32,
    /// Descriptors that objects may have; `None`: as the system's limits allow.
    pub fd_budget: Option<u64>,
    /// How much the kernel reads ahead in mounts from files.
    pub read_ahead: ReadAhead,
    /// How long an open may take.
    pub open_timeout: Duration,
    /// How long a reader may wait.
    pub request_timeout: Duration,
    /// How long a stop waits.
    pub drain_timeout: Duration,
    /// Who keeps the device over a restart.
    pub keep: KeepMode,
    /// Where the lock and the keepers' sockets are.
    pub state_dir: PathBuf,
    /// Where verbs talk to the daemon.
    pub control_socket: PathBuf,
    /// Whose members may do so as root may.
    pub control_group: Option<String>,
    /// Where metrics are scraped.
    pub metrics_socket: PathBuf,
    /// And where else.
    pub metrics_listen: Option<SocketAddr>,
    /// User to become.
    pub user: Option<Account>,
    /// What is given up after the start.
    pub confine: confine::Mode,
    /// What is logged.
    pub log_level: LogLevel,
    /// How it looks.
    pub log_format: LogFormat,
}

impl Options {
    /// The checked values, with or without a store.
    fn values(self) -> Result<Config, ConfigError> {
        let stores = self.store.iter().map(|spec| spec.parse().map_err(|error| value("store", spec, &error)));
        let seed = self.seed.iter().map(|blob| blob.parse().map_err(|error| value("seed", blob, &error)));
        let user = self.user.map(|text| text.parse().map_err(|problem: String| value("user", text, &problem))).transpose()?;
        let shards = self.shards.map_or_else(|| usable_cpus().len().max(1), NonZeroUsize::get);
        let state_dir = self.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into());
        let config = Config {
            front_end: self.front_end.unwrap_or_default(),
            cache_dir: self.cache_dir.unwrap_or_else(|| DEFAULT_CACHE_DIR.into()),
            stores: stores.collect::<Result<_, _>>()?,
            seed: seed.collect::<Result<_, _>>()?,
            tag: self.tag.unwrap_or_else(|| DEFAULT_TAG.into()),
            secctx: self.secctx,
            cull: CullLimits {
                brun_percent: self.brun.map(|percent| percent.0),
                bcull_percent: self.bcull.map(|percent| percent.0),
                bstop_percent: self.bstop.map(|percent| percent.0),
                frun_percent: self.frun.map(|percent| percent.0),
                fcull_percent: self.fcull.map(|percent| percent.0),
                fstop_percent: self.fstop.map(|percent| percent.0),
            },
            cache_bytes: self.cache_bytes.map(|bytes| bytes.0),
            xfs_extent_bytes: self.xfs_extent.map(|bytes| u32::try_from(bytes.0).unwrap_or(u32::MAX)),
            shards,
            engine: self.engine.unwrap_or_default(),
            source: self.source.unwrap_or_default(),
            window: match self.window.unwrap_or_default() {
                WindowText::Auto => {
                    Window::Adaptive { budget_percent: self.ahead_percent.map_or(DEFAULT_AHEAD_PERCENT, |percent| percent.0) }
                }
                WindowText::Fixed(bytes) => Window::Fixed(bytes.0),
            },
            completion: Completion {
                when: self.complete.unwrap_or_default(),
                bytes_per_s: self.complete_rate.and_then(|rate| NonZeroU64::new(rate.0)),
            },
            slot_bytes: self.slot_size.map_or(DEFAULT_SLOT_BYTES, |bytes| bytes.0),
            slots: self.slots.unwrap_or(DEFAULT_SLOTS),
            workers: self.workers.unwrap_or(DEFAULT_WORKERS),
            fd_budget: self.fd_budget,
            read_ahead: self.read_ahead.unwrap_or_default(),
            open_timeout: Duration::from_millis(self.open_timeout_ms.unwrap_or(DEFAULT_OPEN_TIMEOUT_MS)),
            request_timeout: Duration::from_millis(self.request_timeout_ms.unwrap_or(DEFAULT_REQUEST_TIMEOUT_MS)),
            drain_timeout: Duration::from_millis(self.drain_timeout_ms.unwrap_or(DEFAULT_DRAIN_TIMEOUT_MS)),
            keep: self.keep.unwrap_or_default(),
            control_socket: self.control_socket.unwrap_or_else(|| state_dir.join(CONTROL_SOCKET)),
            control_group: self.control_group,
            metrics_socket: self.metrics_socket.unwrap_or_else(|| state_dir.join(METRICS_SOCKET)),
            metrics_listen: self.metrics_listen,
            state_dir,
            user,
            confine: self.confine.unwrap_or_default(),
            log_level: self.log_level.unwrap_or_default(),
            log_format: self.log_format.unwrap_or_default(),
        };
        config.check_bounds()?;
        Ok(config)
    }
}

impl Config {
    /// The settings that make it what it is, as far as they have a value.
    fn to_options(&self) -> Options {
        let (blocks, files) = (self.cull.blocks(), self.cull.files());
        let ms = |time: Duration| Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let (window, ahead_percent) = match self.window {
            Window::Fixed(bytes) => (WindowText::Fixed(Bytes(bytes)), DEFAULT_AHEAD_PERCENT),
            Window::Adaptive { budget_percent } => (WindowText::Auto, budget_percent),
        };
        Options {
            front_end: Some(self.front_end),
            cache_dir: Some(self.cache_dir.clone()),
            store: self.stores.iter().map(ToString::to_string).collect(),
            seed: self.seed.iter().map(ToString::to_string).collect(),
            tag: Some(self.tag.clone()),
            secctx: self.secctx.clone(),
            brun: Some(Percent(blocks.run)),
            bcull: Some(Percent(blocks.cull)),
            bstop: Some(Percent(blocks.stop)),
            frun: Some(Percent(files.run)),
            fcull: Some(Percent(files.cull)),
            fstop: Some(Percent(files.stop)),
            cache_bytes: self.cache_bytes.map(Bytes),
            xfs_extent: self.xfs_extent_bytes.map(|bytes| Bytes(bytes.into())),
            shards: NonZeroUsize::new(self.shards),
            engine: Some(self.engine),
            source: Some(self.source),
            window: Some(window),
            ahead_percent: Some(Percent(ahead_percent)),
            complete: Some(self.completion.when),
            complete_rate: Some(Bytes(self.completion.bytes_per_s.map_or(0, NonZeroU64::get))),
            slot_size: Some(Bytes(self.slot_bytes)),
            slots: Some(self.slots),
            workers: Some(self.workers),
            fd_budget: self.fd_budget,
            read_ahead: Some(self.read_ahead),
            open_timeout_ms: ms(self.open_timeout),
            request_timeout_ms: ms(self.request_timeout),
            drain_timeout_ms: ms(self.drain_timeout),
            keep: Some(self.keep),
            state_dir: Some(self.state_dir.clone()),
            control_socket: Some(self.control_socket.clone()),
            control_group: self.control_group.clone(),
            metrics_socket: Some(self.metrics_socket.clone()),
            metrics_listen: self.metrics_listen,
            // As it was written, which is not kept here.
            user: None,
            confine: Some(self.confine),
            log_level: Some(self.log_level),
            log_format: Some(self.log_format),
        }
    }

    fn check_bounds(&self) -> Result<(), ConfigError> {
        for (setting, text) in [("tag", Some(&self.tag)), ("secctx", self.secctx.as_ref())] {
            if let Some(text) = text {
                command::setup(setting, text.as_bytes()).map_err(|why| value(setting, format!("{text:?}"), &why))?;
            }
        }
        self.cull.commands()?;
        if let Some(bytes) = self.xfs_extent_bytes {
            power_of_two("xfs_extent", u64::from(bytes), BLOCK_BYTES_MIN, XFS_EXTENT_BYTES_MAX)?;
        }
        bounds("shards", self.shards as u64, 1, SHARDS_MAX as u64)?;
        match self.window {
            Window::Fixed(bytes) => power_of_two("window", bytes, BLOCK_BYTES_MIN, WINDOW_BYTES_MAX)?,
            Window::Adaptive { budget_percent } => bounds("ahead_percent", u64::from(budget_percent), 0, 100)?,
        }
        // A slot holds at least a page, which is the least that is written.
        power_of_two("slot_size", self.slot_bytes, BLOCK_BYTES_MIN.max(page_bytes()), SHARD_BUFFER_BYTES_MAX / 2)?;
        let slots_max = (SHARD_BUFFER_BYTES_MAX / self.slot_bytes) - 1;
        bounds("slots", u64::from(self.slots), 1, slots_max)?;
        bounds("workers", u64::from(self.workers), 1, u64::from(WORKERS_MAX))?;
        if self.control_socket == self.metrics_socket {
            return Err(value("metrics_socket", self.metrics_socket.display(), &"is the control_socket too; name another path"));
        }
        if let Some(fds) = self.fd_budget {
            bounds("fd_budget", fds, FD_BUDGET_MIN, FD_BUDGET_MAX)?;
        }
        if let ReadAhead::Fixed(Bytes(bytes)) = self.read_ahead {
            bounds("read_ahead", bytes, 0, READ_AHEAD_BYTES_MAX)?;
        }
        let timeouts = [
            ("open_timeout_ms", self.open_timeout, OPEN_TIMEOUT_MS_MIN),
            ("request_timeout_ms", self.request_timeout, REQUEST_TIMEOUT_MS_MIN),
            ("drain_timeout_ms", self.drain_timeout, 0),
        ];
        for (setting, timeout, min) in timeouts {
            bounds(setting, u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX), min, TIMEOUT_MS_MAX)?;
        }
        Ok(())
    }
}

fn value(setting: &'static str, value: impl ToString, problem: &impl ToString) -> ConfigError {
    ConfigError::Value { origin: Origin::Default, setting, value: one_line(&value.to_string()), problem: one_line(&problem.to_string()) }
}

fn bounds(setting: &'static str, number: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&number) { Ok(()) } else { Err(value(setting, number, &format!("must be {min} to {max}"))) }
}

fn power_of_two(setting: &'static str, bytes: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    bounds(setting, bytes, min, max)?;
    if bytes.is_power_of_two() { Ok(()) } else { Err(value(setting, bytes, &"must be a power of two".to_owned())) }
}

#[cfg(test)]
mod tests;
