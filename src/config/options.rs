//! What can be set: the one definition of every key, flag and variable. The help, the manual, the checks of files and
//! the tables in docs/configuration.md are made of it.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::text::{Bytes, FrontEndKind, LogFormat, LogLevel, Percent, ReadAhead, WindowText};
use crate::engine::EngineKind;
use crate::engine::plan::Complete;
use crate::ops::confine;
use crate::ops::keep::KeepMode;
use crate::store::SourceMode;

/// Settings as they are written, in files, as environment variables or as flags; a field's name is its key in a file.
#[derive(Clone, Debug, Default, clap::Args, Serialize)]
pub(super) struct Options {
    /// Kernel interface to serve [default: auto]
    #[arg(long, value_enum, env = "INFILL_FRONT_END")]
    pub(super) front_end: Option<FrontEndKind>,
    /// Directory for the kernel's cache files, on ext4 or XFS [default: /var/cache/infill]
    #[arg(long, value_name = "DIR", env = "INFILL_CACHE_DIR", alias = "dir")]
    #[serde(serialize_with = "as_text")]
    pub(super) cache_dir: Option<PathBuf>,
    /// Where blobs come from: dir:PATH or oci:PATH; several are asked in order
    #[arg(long, value_name = "SPEC", env = "INFILL_STORE", value_delimiter = ',')]
    pub(super) store: Vec<String>,
    /// Blobs to share with the cache before serving, as DOMAIN/NAME, or NAME for images without a domain
    #[arg(long, value_name = "BLOB", env = "INFILL_SEED", value_delimiter = ',')]
    pub(super) seed: Vec<String>,
    /// Name of the cache in the kernel [default: infill]
    #[arg(long, env = "INFILL_TAG")]
    pub(super) tag: Option<String>,
    /// Security context for the kernel's accesses to the cache [default: none]
    #[arg(long, env = "INFILL_SECCTX")]
    pub(super) secctx: Option<String>,
    /// Free blocks, in percent, above which culling stops [default: 7]
    #[arg(long, value_name = "PERCENT", env = "INFILL_BRUN")]
    pub(super) brun: Option<Percent>,
    /// Free blocks, in percent, below which culling starts [default: 5]
    #[arg(long, value_name = "PERCENT", env = "INFILL_BCULL")]
    pub(super) bcull: Option<Percent>,
    /// Free blocks, in percent, below which nothing is cached [default: 1]
    #[arg(long, value_name = "PERCENT", env = "INFILL_BSTOP")]
    pub(super) bstop: Option<Percent>,
    /// As --brun, for free files [default: 7]
    #[arg(long, value_name = "PERCENT", env = "INFILL_FRUN")]
    pub(super) frun: Option<Percent>,
    /// As --bcull, for free files [default: 5]
    #[arg(long, value_name = "PERCENT", env = "INFILL_FCULL")]
    pub(super) fcull: Option<Percent>,
    /// As --bstop, for free files [default: 1]
    #[arg(long, value_name = "PERCENT", env = "INFILL_FSTOP")]
    pub(super) fstop: Option<Percent>,
    /// How much the blobs in the cache may take together; beyond it those used least recently are removed, if they are
    /// not mounted [default: as much as --brun and --bcull allow]
    #[arg(long, value_name = "SIZE", env = "INFILL_CACHE_BYTES")]
    pub(super) cache_bytes: Option<Bytes>,
    /// On XFS, the pieces in which cache files take their space: a power of two. Small ones make blobs that are read here
    /// and there slow to read again; large ones waste space where there are many small blobs [default: 2M, or what the
    /// cache directory has]
    #[arg(long, value_name = "SIZE", env = "INFILL_XFS_EXTENT")]
    pub(super) xfs_extent: Option<Bytes>,
    /// Event loops, each on a core of its own [default: the usable cores]
    #[arg(long, env = "INFILL_SHARDS")]
    pub(super) shards: Option<NonZeroUsize>,
    /// How reads and writes are done [default: auto]
    #[arg(long, value_enum, env = "INFILL_ENGINE")]
    pub(super) engine: Option<EngineKind>,
    /// How blobs are read [default: auto]
    #[arg(long, value_enum, env = "INFILL_SOURCE")]
    pub(super) source: Option<SourceMode>,
    /// How much is brought for each demand: auto (as the blob is read), or the aligned window of so many bytes;
    /// 4K: only what was asked [default: auto]
    #[arg(long, value_name = "auto|SIZE", env = "INFILL_WINDOW")]
    pub(super) window: Option<WindowText>,
    /// How much of a blob, in percent, --window auto may bring on guesses that nothing has confirmed; at least
    /// 4 MiB, 0: no guesses [default: 8]
    #[arg(long, value_name = "PERCENT", env = "INFILL_AHEAD_PERCENT")]
    pub(super) ahead_percent: Option<Percent>,
    /// Bring the rest of a blob in the background: auto (the parts of which readers seem to want all), off, or
    /// always (from its opening on) [default: auto]
    #[arg(long, value_enum, env = "INFILL_COMPLETE")]
    pub(super) complete: Option<Complete>,
    /// How fast at most, in bytes a second for each shard; 0: no limit [default: 0]
    #[arg(long, value_name = "SIZE", env = "INFILL_COMPLETE_RATE")]
    pub(super) complete_rate: Option<Bytes>,
    /// Size of a buffer slot and longest single write; a power of two [default: 1M]
    #[arg(long, value_name = "SIZE", env = "INFILL_SLOT_SIZE")]
    pub(super) slot_size: Option<Bytes>,
    /// Buffer slots of each shard; memory is shards x slots x slot size [default: 16]
    #[arg(long, env = "INFILL_SLOTS")]
    pub(super) slots: Option<u32>,
    /// Threads of each shard that may block at a time: in writes, or with --engine blocking in reads as well [default: 8]
    #[arg(long, env = "INFILL_WORKERS")]
    pub(super) workers: Option<u32>,
    /// File descriptors that open blobs may take; idle ones are closed beyond it [default: from the system's limits]
    #[arg(long, value_name = "N", env = "INFILL_FD_BUDGET")]
    pub(super) fd_budget: Option<u64>,
    /// How much the kernel reads ahead in images that are mounted from files: auto, so many bytes, or kernel: as it likes
    /// [default: auto]
    #[arg(long, value_name = "auto|SIZE|kernel", env = "INFILL_READ_AHEAD")]
    pub(super) read_ahead: Option<ReadAhead>,
    /// How long the lookup of a blob may take, with all its tries, before its mount fails [default: 10000]
    #[arg(long, value_name = "MS", env = "INFILL_OPEN_TIMEOUT_MS")]
    pub(super) open_timeout_ms: Option<u64>,
    /// How long a reader may wait for its bytes before it gets an I/O error [default: 30000]
    #[arg(long, value_name = "MS", env = "INFILL_REQUEST_TIMEOUT_MS")]
    pub(super) request_timeout_ms: Option<u64>,
    /// How long a stop waits for reads that have begun [default: 10000]
    #[arg(long, value_name = "MS", env = "INFILL_DRAIN_TIMEOUT_MS")]
    pub(super) drain_timeout_ms: Option<u64>,
    /// Who keeps the device while no daemon serves, so that images stay mounted over a restart [default: auto]
    #[arg(long, value_enum, env = "INFILL_KEEP")]
    pub(super) keep: Option<KeepMode>,
    /// Directory for what must outlive the daemon: its lock and the keepers' sockets [default: /run/infill]
    #[arg(long, value_name = "DIR", env = "INFILL_STATE_DIR")]
    #[serde(serialize_with = "as_text")]
    pub(super) state_dir: Option<PathBuf>,
    /// Socket on which verbs talk to the daemon: HTTP and JSON [default: control.sock in the state directory]
    #[arg(long, value_name = "PATH", env = "INFILL_CONTROL_SOCKET")]
    #[serde(serialize_with = "as_text")]
    pub(super) control_socket: Option<PathBuf>,
    /// Group whose members may use the control socket as the daemon's own user and root may: they must be able to reach it, so
    /// it needs a --control-socket outside of the state directory [default: none]
    #[arg(long, value_name = "NAME|GID", env = "INFILL_CONTROL_GROUP")]
    pub(super) control_group: Option<String>,
    /// Socket on which metrics are scraped [default: metrics.sock in the state directory]
    #[arg(long, value_name = "PATH", env = "INFILL_METRICS_SOCKET")]
    #[serde(serialize_with = "as_text")]
    pub(super) metrics_socket: Option<PathBuf>,
    /// Address and port on which metrics are scraped as well; whoever reaches it may read them [default: none]
    #[arg(long, value_name = "ADDRESS:PORT", env = "INFILL_METRICS_LISTEN")]
    pub(super) metrics_listen: Option<SocketAddr>,
    /// User to become once the device is bound: NAME or UID, perhaps with :GID; other groups are left [default: stay]
    #[arg(long, value_name = "NAME|UID[:GID]", env = "INFILL_USER")]
    pub(super) user: Option<String>,
    /// Giving up, once the device is bound, capabilities, other files (Landlock) and other system calls (seccomp): auto, as
    /// much as the kernel has; strict, all or no start; off, nothing [default: auto]
    #[arg(long, value_enum, env = "INFILL_CONFINE")]
    pub(super) confine: Option<confine::Mode>,
    /// Least important messages to log [default: info]
    #[arg(long, value_enum, env = "INFILL_LOG_LEVEL")]
    pub(super) log_level: Option<LogLevel>,
    /// How log lines look [default: text]
    #[arg(long, value_enum, env = "INFILL_LOG_FORMAT")]
    pub(super) log_format: Option<LogFormat>,
}

/// A path for a look at it, also one that is not UTF-8.
fn as_text<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(Path::to_string_lossy).serialize(serializer)
}
