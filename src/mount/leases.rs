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
//! A lease that is never ended, because its client died, runs out. A daemon that ends gives all of them up, and begins none any
//! more: it is about to give up what holds readers back, and must not call a mount good that was made since.

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
/// What all of them hold; one is good for as much as it needs where there is no other. Some MiB of memory.
const PINS_MAX: usize = 1 << 16;
/// Random bytes in the name of one.
const ID_BYTES: usize = 16;

/// See the module's description.
#[derive(Debug)]
pub(super) struct Leases<P = Pinned>(Mutex<State<P>>);

#[derive(Debug)]
struct State<P> {
    all: HashMap<String, (Instant, Vec<P>)>,
    ended: bool,
}

impl<P> Default for Leases<P> {
    fn default() -> Self {
        Self(Mutex::new(State { all: HashMap::new(), ended: false }))
    }
}

impl<P> State<P> {
    fn has_room_for(&self, pins: usize) -> bool {
        let held: usize = self.all.values().map(|(_, pins)| pins.len()).sum();
        !self.ended && self.all.len() < LEASES_MAX && (held == 0 || held + pins <= PINS_MAX)
    }
}

impl<P> Leases<P> {
    /// Keeps `pins` for a while; gives the lease's name. `None`: there are too many, the daemon ends, or no chance is to be had.
    pub(super) fn begin(&self, pins: Vec<P>, now: Instant) -> Option<String> {
        let mut id = [0; ID_BYTES];
        // So few bytes come whole (getrandom(2)), and without a wait.
        getrandom(&mut id, GetRandomFlags::NONBLOCK).ok().filter(|len| *len == ID_BYTES)?;
        let id = hex(&id);
        let mut state = self.lock();
        if !state.has_room_for(pins.len()) {
            return None;
        }
        state.all.insert(id.clone(), (now + LEASE_MAX, pins));
        Some(id)
    }

    /// Ends a lease. `true`: it was valid until now.
    pub(super) fn end(&self, id: &str, now: Instant) -> bool {
        // The pins go after the table is free again: they take other locks.
        let ended = self.lock().all.remove(id);
        ended.is_some_and(|(until, _)| now < until)
    }

    /// Ends those that have run out.
    pub(super) fn expire(&self, now: Instant) {
        let out: Vec<_> = self.lock().all.extract_if(|_, (until, _)| *until <= now).collect();
        if !out.is_empty() {
            tracing::info!(leases = out.len(), "made ready, and not mounted in time");
        }
    }

    /// Ends all, and begins none any more.
    pub(super) fn end_all(&self) {
        let all = {
            let mut state = self.lock();
            state.ended = true;
            std::mem::take(&mut state.all)
        };
        drop(all);
    }

    fn lock(&self) -> MutexGuard<'_, State<P>> {
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
        let begin = |leases: &Leases<Arc<()>>| leases.begin(vec![Arc::clone(&pin)], now).unwrap();
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
        assert!(leases.begin(vec![Arc::clone(&pin)], now).is_none());
        leases.end_all();
        assert_eq!(Arc::strong_count(&pin), 1);
    }

    #[test]
    fn a_daemon_that_ends_calls_no_mount_good_any_more() {
        let (leases, now) = (Leases::default(), Instant::now());
        let before = leases.begin(vec![()], now).unwrap();
        leases.end_all();
        assert!(!leases.end(&before, now) && leases.begin(vec![()], now).is_none());
    }

    #[test]
    fn leases_hold_so_much_and_one_alone_what_it_needs() {
        let (leases, now) = (Leases::default(), Instant::now());
        let many = |pins| leases.begin(vec![(); pins], now);
        let first = many(PINS_MAX + 1).unwrap();
        assert!(many(1).is_none());
        assert!(leases.end(&first, now) && many(PINS_MAX - 1).is_some() && many(1).is_some() && many(1).is_none());
    }
}
