//! What a client and a daemon say to each other. docs/openapi.json describes the same, and a test holds the two together.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::LogLevel;
use crate::ops::mounting::Image;

/// The daemon answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Health {
    /// Always `ok`: one that cannot serve does not answer.
    pub status: String,
    /// Which kernel interface it serves: `cachefiles`, `fanotify` or `sim`.
    pub front_end: String,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
}

/// What is logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// The least important messages.
    pub level: LogLevel,
}

/// An image that is to be made ready or brought.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Its name.
    pub image: String,
    /// Those with the same one share blobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Names of its devices; none: those in the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
}

impl From<Wanted> for Image {
    fn from(Wanted { image: name, domain, devices }: Wanted) -> Self {
        Self { name, domain, devices }
    }
}

impl From<&Image> for Wanted {
    fn from(Image { name, domain, devices }: &Image) -> Self {
        Self { image: name.clone(), domain: domain.clone(), devices: devices.clone() }
    }
}

/// The image of a mount that outlived its daemon.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outlived {
    /// The image's file.
    pub file: PathBuf,
}

/// What is to be mounted of an image that is ready.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// The image's file.
    pub image: PathBuf,
    /// Those of its devices, in order.
    pub devices: Vec<PathBuf>,
    /// Bytes of all of them, and how many of those are there.
    pub len_bytes: u64,
    /// See `len_bytes`.
    pub present_bytes: u64,
    /// How much the kernel shall read ahead in the mount; `None`: as it likes.
    #[serde(default)]
    pub read_ahead_bytes: Option<u64>,
}

/// An image that is ready, and stays so as long as its lease.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ready {
    /// What is to be mounted.
    #[serde(flatten)]
    pub prepared: Prepared,
    /// The lease's name: to be ended when the mount is made, and before anybody can see it.
    pub lease: String,
    /// When it ends by itself, in milliseconds from now.
    pub lease_ms: u64,
}

/// What was let go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Released {
    /// So many blobs.
    pub blobs: usize,
}

/// A blob that is served.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BlobState {
    /// Its domain and name.
    pub blob: String,
    /// Its file in the cache.
    pub file: PathBuf,
    /// How long it is.
    pub len_bytes: u64,
    /// How much of it is there.
    pub present_bytes: u64,
}

/// How far the bringing of an image is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Others come first.
    Waiting,
    /// It is being brought.
    Running,
    /// All of it is there.
    Done,
    /// It is not.
    Failed,
}

/// An image that is being brought whole.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Prefetch {
    /// Which.
    #[serde(flatten)]
    pub wanted: Wanted,
    /// How far it is.
    pub stage: Stage,
    /// Why it failed, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What is served.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ImageList {
    /// Each blob; none where the kernel has the cache (front end `cachefiles`).
    pub blobs: Vec<BlobState>,
    /// Images that are being brought, or were.
    pub prefetches: Vec<Prefetch>,
}

/// Why something cannot be done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Trouble {
    /// One line that says what to do.
    pub error: String,
}
