//! Values as people write them: sizes with suffixes, percentages, the window, and names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};

/// How much the kernel reads ahead in a mount from files, if nobody says something else (docs/performance.md).
const AUTO_READ_AHEAD_BYTES: u64 = 1 << 20;

/// A number of bytes, written as such or with a suffix `K`, `M` or `G` (powers of 1024).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    /// With the largest suffix that leaves a whole number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffixes = [(30, "G"), (20, "M"), (10, "K")];
        match suffixes.into_iter().find(|(shift, _)| self.0 > 0 && self.0.trailing_zeros() >= *shift) {
            Some((shift, suffix)) => write!(f, "{}{suffix}", self.0 >> shift),
            None => self.0.fmt(f),
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

/// A share of a whole, written as a number, or as cachefilesd has it, with a percent sign.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Percent(pub u8);

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('%').unwrap_or(text);
        number.parse().ok().filter(|percent| *percent <= 100).map(Self).ok_or_else(|| format!("{text:?} is not 0 to 100"))
    }
}

/// The window of `--window`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WindowText {
    /// Adapts to how each blob is read.
    #[default]
    Auto,
    /// Always the aligned window of so many bytes.
    Fixed(Bytes),
}

impl FromStr for WindowText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Fixed) }
    }
}

impl fmt::Display for WindowText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(bytes) => bytes.fmt(f),
        }
    }
}

/// The read-ahead of `--read-ahead`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReadAhead {
    /// What was measured to be best.
    #[default]
    Auto,
    /// What the kernel gives every mount.
    Kernel,
    /// So many bytes.
    Fixed(Bytes),
}

impl ReadAhead {
    /// In bytes; `None`: as the kernel likes.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        match self {
            Self::Auto => Some(AUTO_READ_AHEAD_BYTES),
            Self::Kernel => None,
            Self::Fixed(Bytes(bytes)) => Some(bytes),
        }
    }
}

impl FromStr for ReadAhead {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "kernel" => Ok(Self::Kernel),
            size => size.parse().map(Self::Fixed),
        }
    }
}

impl fmt::Display for ReadAhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Kernel => f.write_str("kernel"),
            Self::Fixed(bytes) => bytes.fmt(f),
        }
    }
}

/// Shown as they are written.
macro_rules! shown_as_text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )+};
}

shown_as_text!(Bytes, WindowText, ReadAhead);

/// Which kernel interface to serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FrontEndKind {
    /// cachefiles where this kernel has its on-demand mode, else fanotify.
    #[default]
    Auto,
    /// cachefiles on-demand mode (Linux 5.19 to 7.1): the kernel caches.
    Cachefiles,
    /// fanotify's pre-content events (Linux 6.14): images are mounted from sparse files.
    Fanotify,
    /// The model kernel of the tests, on a socket.
    #[value(hide = true)]
    Sim,
}

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Least important messages that are logged; in the order of how many that are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, clap::ValueEnum, Deserialize, Serialize)]
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
