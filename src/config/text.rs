//! Values as people write them: sizes with suffixes, the window, and names.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How much the kernel reads ahead in a mount from files, if nobody says something else (docs/performance.md).
const AUTO_READ_AHEAD_BYTES: u64 = 1 << 20;

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

/// The read-ahead of `--read-ahead`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(try_from = "BytesText")]
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

impl TryFrom<BytesText> for ReadAhead {
    type Error = String;

    fn try_from(text: BytesText) -> Result<Self, String> {
        match text {
            BytesText::Number(n) => Ok(Self::Fixed(Bytes(n))),
            BytesText::Text(text) => text.parse(),
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

/// Which kernel interface to serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Deserialize)]
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Deserialize, Serialize)]
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
