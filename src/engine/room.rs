//! No room: how shards tell that a write found none, and learn whether waiting for some is worth it.
//!
//! Somebody outside of the engine may be able to make room (for cachefiles `ops::space`). The engine does not know who or
//! how: it rings a bell, and a fill that found no room is tried again a few times, for long enough.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// The bell, shared by the shards and whoever makes room.
#[derive(Clone, Debug)]
pub struct NoRoom(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bell: EventFd,
    since: Instant,
    /// Until when nobody needs to wait for room, in milliseconds after `since`.
    in_vain_until_ms: AtomicU64,
}

impl NoRoom {
    /// A bell that nobody has rung.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new() -> std::io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Inner { bell, since: Instant::now(), in_vain_until_ms: AtomicU64::new(0) })))
    }

    /// Whether a write that ended so found no room: `ENOSPC`; `EDQUOT`, where the room is a quota; or `ENOBUFS`, which is how
    /// cachefiles says it.
    #[must_use]
    pub const fn is_meant_by(errno: Errno) -> bool {
        matches!(errno, Errno::ENOSPC | Errno::EDQUOT | Errno::ENOBUFS)
    }

    /// A write found no room. `false`: there will be none so soon, so do not wait for it.
    #[must_use]
    pub fn ring(&self) -> bool {
        // It can only fail when it has been rung 2^64 times unheard, and then it rings.
        let _ = self.0.bell.write(1);
        self.now_ms() >= self.0.in_vain_until_ms.load(Ordering::Relaxed)
    }

    /// Whether it was rung since it was last asked.
    #[must_use]
    pub fn was_rung(&self) -> bool {
        self.0.bell.read().is_ok()
    }

    /// No room can be made before so much time has passed: fills that find none fail at once.
    pub fn in_vain_for(&self, pause: Duration) {
        let until = self.now_ms().saturating_add(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX));
        self.0.in_vain_until_ms.store(until, Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl AsFd for NoRoom {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_heard_once_and_says_whether_to_wait() {
        let room = NoRoom::new().unwrap();
        assert!(!room.was_rung());
        assert!(room.ring() && room.ring());
        assert!(room.was_rung() && !room.was_rung());
        room.in_vain_for(Duration::from_secs(3600));
        assert!(!room.ring());
        room.in_vain_for(Duration::ZERO);
        assert!(room.ring());
    }
}
