//! Cookies and their on-demand objects: the states of `struct cachefiles_ondemand_info`, from mount to
//! withdrawal.

use std::sync::Arc;

use super::blob::SimBlob;
use super::sink::CacheFile;

/// State of the on-demand side of an object (`enum cachefiles_object_state`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// New, or its anonymous fd was closed.
    Close,
    /// An anonymous fd exists and was confirmed by a copen.
    Open,
    /// A read found it closed; a new OPEN is on its way.
    Reopening,
    /// Its CLOSE was delivered: nothing can be asked any more.
    Dropping,
}

/// Where a cookie is between mount and umount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// No mount uses it.
    Idle,
    /// Mounting: its OPEN was not answered yet.
    LookingUp,
    /// The copen came; the lookup worker has yet to publish the file (writes give `ENOBUFS` until then).
    Publishing,
    /// Mounted.
    Live,
    /// The OPEN failed: every read fails until nothing uses it any more.
    Failed,
    /// Unmounted; the worker waits until its CLOSE is delivered.
    Withdrawing,
}

/// One cookie: a blob's cache file as the kernel knows it.
#[derive(Clone, Debug)]
pub struct Cookie {
    /// Index of its volume.
    pub volume: u32,
    /// Its key in the volume.
    pub name: String,
    /// What it should hold; a blob that no store has is a cookie without one.
    pub blob: Option<Arc<SimBlob>>,
    /// Between mount and umount.
    pub phase: Phase,
    /// Of the on-demand object.
    pub state: State,
    /// Id of the live anonymous fd's object; 0 without one.
    pub object_id: u32,
    /// The live anonymous fd, if any.
    pub fd: Option<u32>,
    /// A worker is about to send the OPEN of a re-opening.
    pub reopen_queued: bool,
    /// The size that the daemon gave, once it did.
    pub size: Option<u64>,
    /// What is in the cache.
    pub file: CacheFile,
}

impl Cookie {
    /// A cookie that was never mounted.
    #[must_use]
    pub const fn new(volume: u32, name: String, blob: Option<Arc<SimBlob>>, block_bytes: u64) -> Self {
        Self {
            volume,
            name,
            blob,
            phase: Phase::Idle,
            state: State::Close,
            object_id: 0,
            fd: None,
            reopen_queued: false,
            size: None,
            file: CacheFile::new(block_bytes),
        }
    }

    /// Whether writes to its anonymous fd find a file.
    #[must_use]
    pub const fn is_published(&self) -> bool {
        matches!(self.phase, Phase::Live | Phase::Withdrawing)
    }
}
