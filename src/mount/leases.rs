//! What was made ready and is not mounted yet: it stays so for a while, under a name that nobody can guess.
//!
//! Readers of a blob that is let go of are not held back any more: they would see zeros where nothing was brought. So whoever
//! mounts has to know that nothing was let go between its question and its mount, and does this, in this order:
//!
//! 1. It asks; the daemon makes all blobs ready, pins them, and gives a lease.
//! 2. It makes the mount, which is nowhere yet (fsmount(2)). That opens the files, so that from now on the blobs count as used
//!    (`BlobFile::is_unused`), whoever looks.
//! 3. It ends the lease. If the daemon says that this was valid, its pins have held from 1 until after 2, and since 2 the open
//!    files hold: at no time was a blob unused. If it says anything else, or nothing (the lease has run out, another daemon
//!    serves now, which knows no leases of the last one), blobs may have been let go in between, and perhaps made ready again
//!    since: what was read of the mount until then may be wrong. The mount is dropped, and all begins again.
//! 4. Only now the mount is put where others see it (move_mount(2)).
//!
//! A lease that is never ended, because its client died, runs out. A daemon that ends gives all of them up.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};

use super::blobs::Pinned;
use crate::hex::hex;

/// How long a lease is good for: a mount is made in milliseconds.
pub(super) const LEASE_MAX: Duration = Duration::from_secs(60);
/// Leases at a time.
const LEASES_MAX: usize = 1024;
/// Random bytes in the name of one.
const ID_BYTES: usize = 16;

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Leases<T = Vec<Pinned>>(Mutex<HashMap<String, (Instant, T)>>);

impl<T> Leases<T> {
    /// Keeps `pins` for a while; gives the lease's name. `None`: there are too many, or no chance is to be had.
    pub(super) fn begin(&self, pins: T, now: Instant) -> Option<String> {
        let mut id = [0; ID_BYTES];
        // So few bytes come whole (getrandom(2)), and without a wait.
        getrandom(&mut id, GetRandomFlags::NONBLOCK).ok().filter(|len| *len == ID_BYTES)?;
        let id = hex(&id);
        let mut all = self.all();
        if all.len() >= LEASES_MAX {
            return None;
        }
        all.insert(id.clone(), (now + LEASE_MAX, pins));
        Some(id)
    }

    /// Ends a lease. `true`: it was valid until now.
    pub(super) fn end(&self, id: &str, now: Instant) -> bool {
        // The pins go after the table is free again: they take other locks.
        let ended = self.all().remove(id);
        ended.is_some_and(|(until, _)| now < until)
    }

    /// Ends those that have run out.
    pub(super) fn expire(&self, now: Instant) {
        let out: Vec<_> = self.all().extract_if(|_, (until, _)| *until <= now).collect();
        if !out.is_empty() {
            tracing::info!(leases = out.len(), "made ready, and not mounted in time");
        }
    }

    /// Ends all.
    pub(super) fn end_all(&self) {
        drop(std::mem::take(&mut *self.all()));
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, (Instant, T)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_lease_is_valid_once_and_for_its_time_and_then_holds_nothing() {
        let (leases, now, pin) = (Leases::default(), Instant::now(), Arc::new(()));
        let begin = |leases: &Leases<Arc<()>>| leases.begin(Arc::clone(&pin), now).unwrap();
        let [a, b, c] = [begin(&leases), begin(&leases), begin(&leases)];
        assert!(a != b && a.len() == 2 * ID_BYTES);
        leases.expire(now + LEASE_MAX / 2);
        assert!(leases.end(&a, now) && !leases.end(&a, now) && !leases.end("x", now));
        assert_eq!(Arc::strong_count(&pin), 3);
        // Its time is over, whether somebody has looked or not.
        assert!(!leases.end(&b, now + LEASE_MAX));
        leases.expire(now + LEASE_MAX);
        assert!(!leases.end(&c, now) && Arc::strong_count(&pin) == 1);
        for _ in 0..LEASES_MAX {
            begin(&leases);
        }
        assert!(leases.begin(Arc::clone(&pin), now).is_none());
        leases.end_all();
        assert_eq!(Arc::strong_count(&pin), 1);
    }
}
