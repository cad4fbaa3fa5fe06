//! Settings of `infill serve`: a flag wins over its environment variable, that over the file, that over the
//! default. Everything is checked before anything is started.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::engine::plan::Window;
use crate::engine::{EngineKind, usable_cpus};
use crate::front::cachefiles::{BadLimits, CullLimits, command};
use crate::key::Key;
use crate::range::page_bytes;
use crate::store::{SourceMode, StoreSpec};

/// Version of the file format.
const FILE_VERSION: u32 = 1;
/// Read if it exists and no other file is named.
pub const DEFAULT_FILE: &str = "/etc/infill/config.toml";
/// Where cachefiles keeps its objects.
pub const DEFAULT_CACHE_DIR: &str = "/var/cache/infill";
/// The kernel's name for the cache.
const DEFAULT_TAG: &str = "infill";
/// Event loops at most; more do not help on any machine we know.
const SHARDS_MAX: usize = 1024;
/// Share of a blob, in percent, that may be brought on mere bets by the adaptive window (at least 4 MiB).
const DEFAULT_AHEAD_PERCENT: u8 = 6;
/// Size of a buffer slot and longest single fill.
const DEFAULT_SLOT_BYTES: u64 = 1 << 20;
/// Buffer slots a shard.
const DEFAULT_SLOTS: u32 = 16;
/// Threads of a shard that may block in a read or write at a time.
const DEFAULT_WORKERS: u32 = 8;
/// Longest window.
const WINDOW_BYTES_MAX: u64 = 64 << 20;
/// Smallest window and slot: the smallest page, and what cachefiles writes at least (`CACHEFILES_DIO_BLOCK_SIZE`).
const BLOCK_BYTES_MIN: u64 = 4096;
/// A registered buffer is at most 1 GiB long (`io_buffer_validate`, io_uring/rsrc.c); one shard's slots are one.
const SHARD_BUFFER_BYTES_MAX: u64 = 1 << 30;
/// Threads a shard at most.
const WORKERS_MAX: u32 = 512;
/// How long the lookup of a blob that may be found later is tried. The kernel complains after 20 s.
const DEFAULT_OPEN_TIMEOUT_MS: u64 = 10_000;
/// How long a stop waits for what has begun.
const DEFAULT_DRAIN_TIMEOUT_MS: u64 = 10_000;
/// Longest either.
const TIMEOUT_MS_MAX: u64 = 600_000;

/// A number of bytes, written as such or with a suffix `K`, `M` or `G` (powers of 1024).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "BytesText")]
pub struct Bytes(pub u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum BytesText {
    Number(u64),
    Text(String),
}

impl TryFrom<BytesText> for Bytes {
    type Error = String;

    fn try_from(text: BytesText) -> Result<Self, String> {
        match text {
            BytesText::Number(n) => Ok(Self(n)),
            BytesText::Text(text) => text.parse(),
        }
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(['K', 'M', 'G', 'k', 'm', 'g']);
        let shift = match &text[digits.len()..] {
            "" => 0,
            "K" | "k" => 10,
            "M" | "m" => 20,
            "G" | "g" => 30,
            other => return Err(format!("unknown size suffix {other:?}; use K, M or G")),
        };
        let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size; write for example 1M, 128K or 4096"))?;
        number.checked_shl(shift).filter(|bytes| bytes >> shift == number).map(Self).ok_or_else(|| format!("{text:?} is too large"))
    }
}

/// The window of `--window`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(try_from = "BytesText")]
pub enum WindowText {
    /// Adapts to how each blob is read.
    #[default]
    Auto,
    /// Always the aligned window of so many bytes.
    Fixed(Bytes),
}

impl TryFrom<BytesText> for WindowText {
    type Error = String;

    fn try_from(text: BytesText) -> Result<Self, String> {
        match text {
            BytesText::Number(n) => Ok(Self::Fixed(Bytes(n))),
            BytesText::Text(text) => text.parse(),
        }
    }
}

impl FromStr for WindowText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Fixed) }
    }
}

/// Which kernel interface to serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FrontEndKind {
    /// What this kernel has.
    #[default]
    Auto,
    /// cachefiles on-demand mode.
    Cachefiles,
    /// The model kernel of the tests, on a socket.
    #[value(hide = true)]
    #[serde(skip)]
    Sim,
}

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Least important messages that are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Something failed that an operator must know of.
    Error,
    /// Something is odd.
    Warn,
    /// Start, stop, and each object.
    #[default]
    Info,
    /// Details.
    Debug,
}

/// Settings as they are written, in a file, as flags or as environment variables.
#[derive(Clone, Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Kernel interface to serve
    #[arg(long, value_enum, env = "INFILL_FRONT_END")]
    front_end: Option<FrontEndKind>,
    /// Directory for the kernel's cache files, on ext4 or XFS [default: /var/cache/infill]
    #[arg(long, value_name = "DIR", env = "INFILL_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
    /// Where blobs come from: dir:PATH or oci:PATH; several are asked in order
    #[arg(long, value_name = "SPEC", env = "INFILL_STORE", value_delimiter = ',')]
    store: Vec<String>,
    /// Blobs to share with the cache before serving, as DOMAIN/NAME, or NAME for images without a domain
    #[arg(long, value_name = "BLOB", env = "INFILL_SEED", value_delimiter = ',')]
    seed: Vec<String>,
    /// Name of the cache in the kernel [default: infill]
    #[arg(long, env = "INFILL_TAG")]
    tag: Option<String>,
    /// Security context for the kernel's accesses to the cache
    #[arg(long, env = "INFILL_SECCTX")]
    secctx: Option<String>,
    /// Free blocks, in percent, above which culling stops
    #[arg(long, value_name = "PERCENT")]
    brun: Option<u8>,
    /// Free blocks, in percent, below which culling starts
    #[arg(long, value_name = "PERCENT")]
    bcull: Option<u8>,
    /// Free blocks, in percent, below which nothing is cached
    #[arg(long, value_name = "PERCENT")]
    bstop: Option<u8>,
    /// As --brun, for free files
    #[arg(long, value_name = "PERCENT")]
    frun: Option<u8>,
    /// As --bcull, for free files
    #[arg(long, value_name = "PERCENT")]
    fcull: Option<u8>,
    /// As --bstop, for free files
    #[arg(long, value_name = "PERCENT")]
    fstop: Option<u8>,
    /// Event loops, each on a core of its own [default: the usable cores]
    #[arg(long, env = "INFILL_SHARDS")]
    shards: Option<NonZeroUsize>,
    /// How reads and writes are done [default: auto]
    #[arg(long, value_enum, env = "INFILL_ENGINE")]
    engine: Option<EngineKind>,
    /// How blobs are read [default: direct]
    #[arg(long, value_enum, env = "INFILL_SOURCE")]
    source: Option<SourceMode>,
    /// How much is brought for each demand: auto (as the blob is read), or the aligned window of so many bytes;
    /// 4K: only what was asked [default: auto]
    #[arg(long, value_name = "auto|SIZE", env = "INFILL_WINDOW")]
    window: Option<WindowText>,
    /// Share of a blob that --window auto may bring before readers have shown that they want it; at least 4 MiB,
    /// 0: no bets on far jumps [default: 6]
    #[arg(long, value_name = "PERCENT", env = "INFILL_AHEAD_PERCENT")]
    ahead_percent: Option<u8>,
    /// Size of a buffer slot and longest single write; a power of two [default: 1M]
    #[arg(long, value_name = "SIZE", env = "INFILL_SLOT_SIZE")]
    slot_size: Option<Bytes>,
    /// Buffer slots of each shard; memory is shards x slots x slot size [default: 16]
    #[arg(long, env = "INFILL_SLOTS")]
    slots: Option<u32>,
    /// Threads of each shard that may block in a read or write at a time [default: 8]
    #[arg(long, env = "INFILL_WORKERS")]
    workers: Option<u32>,
    /// How long a blob that cannot be opened for a passing reason is tried before its mount fails [default: 10000]
    #[arg(long, value_name = "MS", env = "INFILL_OPEN_TIMEOUT_MS")]
    open_timeout_ms: Option<u64>,
    /// How long a stop waits for reads that have begun [default: 10000]
    #[arg(long, value_name = "MS", env = "INFILL_DRAIN_TIMEOUT_MS")]
    drain_timeout_ms: Option<u64>,
    /// Least important messages to log [default: info]
    #[arg(long, value_enum, env = "INFILL_LOG_LEVEL")]
    log_level: Option<LogLevel>,
    /// How log lines look [default: text]
    #[arg(long, value_enum, env = "INFILL_LOG_FORMAT")]
    log_format: Option<LogFormat>,
}

/// A settings file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    #[serde(default)]
    serve: Options,
}

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
    /// Event loops.
    pub shards: usize,
    /// How reads and writes are done.
    pub engine: EngineKind,
    /// How blobs are read.
    pub source: SourceMode,
    /// How much is brought for a demand.
    pub window: Window,
    /// Size of a buffer slot.
    pub slot_bytes: u64,
    /// Buffer slots a shard.
    pub slots: u32,
    /// Blocking threads a shard.
    pub workers: u32,
    /// How long an open is tried.
    pub open_timeout: Duration,
    /// How long a stop waits.
    pub drain_timeout: Duration,
    /// What is logged.
    pub log_level: LogLevel,
    /// How it looks.
    pub log_format: LogFormat,
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the settings file {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file's text is wrong.
    #[error("settings file {}: {message}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// A value is out of bounds.
    #[error("{setting} = {value}: {problem}")]
    Value {
        /// The setting's name in the file.
        setting: &'static str,
        /// What was given.
        value: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// Limits that contradict each other.
    #[error("bad culling limits: {0}")]
    Cull(#[from] BadLimits),
    /// No store was named.
    #[error(
        "no store: name at least one place that holds blobs, with --store dir:PATH or --store oci:PATH, or store = [...] in the settings file"
    )]
    NoStore,
}

/// Takes the first of two lists of options, field by field.
macro_rules! first_of {
    ($first:ident, $second:ident, $($field:ident),+) => {
        Options {
            $($field: $first.$field.or($second.$field),)+
            store: first_list($first.store, $second.store),
            seed: first_list($first.seed, $second.seed),
        }
    };
}

fn first_list(first: Vec<String>, second: Vec<String>) -> Vec<String> {
    if first.is_empty() { second } else { first }
}

impl Options {
    /// Adds what a settings file says and checks the result. Without `file` the default one is read, if it exists.
    ///
    /// # Errors
    /// A file that cannot be read or understood, or a value that cannot be used; the message names it.
    pub fn resolve(self, file: Option<&Path>) -> Result<Config, ConfigError> {
        let from_file = match file {
            Some(path) => read_file(path)?,
            None if Path::new(DEFAULT_FILE).exists() => read_file(Path::new(DEFAULT_FILE))?,
            None => Self::default(),
        };
        self.or(from_file).check()
    }

    fn or(self, second: Self) -> Self {
        let first = self;
        first_of!(
            first,
            second,
            front_end,
            cache_dir,
            tag,
            secctx,
            brun,
            bcull,
            bstop,
            frun,
            fcull,
            fstop,
            shards,
            engine,
            source,
            window,
            ahead_percent,
            slot_size,
            slots,
            workers,
            open_timeout_ms,
            drain_timeout_ms,
            log_level,
            log_format
        )
    }

    fn check(self) -> Result<Config, ConfigError> {
        if self.store.is_empty() {
            return Err(ConfigError::NoStore);
        }
        let stores = self.store.iter().map(|spec| spec.parse().map_err(|error| value("store", spec, &error)));
        let seed = self.seed.iter().map(|blob| blob.parse().map_err(|error| value("seed", blob, &error)));
        let shards = self.shards.map_or_else(|| usable_cpus().len().max(1), NonZeroUsize::get);
        let config = Config {
            front_end: self.front_end.unwrap_or_default(),
            cache_dir: self.cache_dir.unwrap_or_else(|| DEFAULT_CACHE_DIR.into()),
            stores: stores.collect::<Result<_, _>>()?,
            seed: seed.collect::<Result<_, _>>()?,
            tag: self.tag.unwrap_or_else(|| DEFAULT_TAG.into()),
            secctx: self.secctx,
            cull: CullLimits {
                brun_percent: self.brun,
                bcull_percent: self.bcull,
                bstop_percent: self.bstop,
                frun_percent: self.frun,
                fcull_percent: self.fcull,
                fstop_percent: self.fstop,
            },
            shards,
            engine: self.engine.unwrap_or_default(),
            source: self.source.unwrap_or_default(),
            window: match self.window.unwrap_or_default() {
                WindowText::Auto => Window::Adaptive { budget_percent: self.ahead_percent.unwrap_or(DEFAULT_AHEAD_PERCENT) },
                WindowText::Fixed(bytes) => Window::Fixed(bytes.0),
            },
            slot_bytes: self.slot_size.map_or(DEFAULT_SLOT_BYTES, |bytes| bytes.0),
            slots: self.slots.unwrap_or(DEFAULT_SLOTS),
            workers: self.workers.unwrap_or(DEFAULT_WORKERS),
            open_timeout: Duration::from_millis(self.open_timeout_ms.unwrap_or(DEFAULT_OPEN_TIMEOUT_MS)),
            drain_timeout: Duration::from_millis(self.drain_timeout_ms.unwrap_or(DEFAULT_DRAIN_TIMEOUT_MS)),
            log_level: self.log_level.unwrap_or_default(),
            log_format: self.log_format.unwrap_or_default(),
        };
        config.check_bounds()?;
        Ok(config)
    }
}

impl Config {
    fn check_bounds(&self) -> Result<(), ConfigError> {
        for (setting, text) in [("tag", Some(&self.tag)), ("secctx", self.secctx.as_ref())] {
            if let Some(text) = text {
                command::setup(setting, text.as_bytes()).map_err(|why| value(setting, format!("{text:?}"), &why))?;
            }
        }
        self.cull.commands()?;
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
        for (setting, timeout) in [("open_timeout_ms", self.open_timeout), ("drain_timeout_ms", self.drain_timeout)] {
            bounds(setting, u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX), 0, TIMEOUT_MS_MAX)?;
        }
        Ok(())
    }
}

fn read_file(path: &Path) -> Result<Options, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.into(), source })?;
    parse_file(&text).map_err(|message| ConfigError::Syntax { path: path.into(), message })
}

fn parse_file(text: &str) -> Result<Options, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string().trim_end().replace('\n', "\n  "))?;
    if file.version != FILE_VERSION {
        return Err(format!("version = {} is not known; this infill reads version {FILE_VERSION}", file.version));
    }
    Ok(file.serve)
}

fn value(setting: &'static str, value: impl ToString, problem: &impl ToString) -> ConfigError {
    ConfigError::Value { setting, value: value.to_string(), problem: problem.to_string() }
}

fn bounds(setting: &'static str, number: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&number) { Ok(()) } else { Err(value(setting, number, &format!("must be {min} to {max}"))) }
}

fn power_of_two(setting: &'static str, bytes: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    bounds(setting, bytes, min, max)?;
    if bytes.is_power_of_two() { Ok(()) } else { Err(value(setting, bytes, &"must be a power of two".to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_store() -> Options {
        Options { store: vec!["dir:/srv".into()], ..Options::default() }
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let file = parse_file("version = 1\n[serve]\nwindow = \"64K\"\nslots = 3\nstore = [\"dir:/a\", \"dir:/b\"]\n").unwrap();
        let flags = Options { window: Some(WindowText::Fixed(Bytes(4096))), ..Options::default() };
        let config = flags.or(file).check().unwrap();
        assert_eq!((config.window, config.slots, config.stores.len()), (Window::Fixed(4096), 3, 2));
        assert_eq!(config.slot_bytes, DEFAULT_SLOT_BYTES);
    }

    #[test]
    fn an_unknown_key_is_named() {
        let message = parse_file("version = 1\n[serve]\nwindwo = 3\n").unwrap_err();
        assert!(message.contains("windwo"), "{message}");
        assert!(parse_file("version = 2\n").unwrap_err().contains("version"));
        assert!(parse_file("[serve]\n").unwrap_err().contains("version"));
    }

    #[test]
    fn sizes_are_read_with_suffixes_and_refused_in_words() {
        assert_eq!("128K".parse(), Ok(Bytes(131_072)));
        assert_eq!("4096".parse(), Ok(Bytes(4096)));
        for text in ["", "M", "1T", "1MM", "-1", "99999999999G"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn values_out_of_bounds_are_named_with_what_is_allowed() {
        let cases: [(Options, &str); 5] = [
            (Options { window: Some(WindowText::Fixed(Bytes(5000))), ..with_store() }, "window = 5000: must be a power of two"),
            (Options { slots: Some(0), ..with_store() }, "slots = 0: must be 1 to"),
            (Options { slots: Some(5000), ..with_store() }, "slots = 5000: must be 1 to 1023"),
            (Options { workers: Some(0), ..with_store() }, "workers = 0"),
            (Options { drain_timeout_ms: Some(u64::MAX), ..with_store() }, "drain_timeout_ms"),
        ];
        for (options, expected) in cases {
            let message = options.check().unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
        for (options, expected) in [
            (Options { slot_size: Some(Bytes(2048)), ..with_store() }, "slot_size = 2048: must be "),
            (Options { tag: Some(String::new()), ..with_store() }, "tag = \"\": it is empty"),
            (Options { secctx: Some("a\nb".into()), ..with_store() }, "secctx = \"a\\nb\": it contains"),
            (Options { brun: Some(3), ..with_store() }, "bad culling limits: bstop 1 %, bcull 5 %, brun 3 %"),
        ] {
            let message = options.check().unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
        assert!(matches!(Options::default().check(), Err(ConfigError::NoStore)));
        let message = Options { seed: vec!["a/b/c".into()], ..with_store() }.check().unwrap_err().to_string();
        assert!(message.starts_with("seed = a/b/c: ") && message.contains("DOMAIN/NAME"), "{message}");
        let message = Options { store: vec!["ftp:/x".into()], ..Options::default() }.check().unwrap_err().to_string();
        assert!(message.contains("dir:PATH"), "{message}");
    }
}
