//! Who makes which blob ready: one at a time for each blob, and nobody waits for another one.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Names of blobs that are being made ready. Who makes one has it for itself, so that two mounts of one blob share what the
/// first one made; and nobody waits for another blob, whose store may hang.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// With the place that one will have, as soon as that is known.
    names: Mutex<HashMap<String, Option<Place>>>,
    /// Some of them are free.
    freed: Condvar,
}

/// Where the events of a blob are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    /// Which group is asked for it.
    pub(super) group: usize,
    /// The file system of its source.
    pub(super) device: u64,
}

/// One of them, until it is dropped.
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    name: &'a str,
}

impl Claims {
    /// Waits until nobody else has `name`; `None`: not as long as `patience`.
    pub(super) fn take<'a>(&'a self, name: &'a str, patience: Duration) -> Option<Claim<'a>> {
        let is_taken = |names: &mut HashMap<_, _>| names.contains_key(name);
        let waited = self.freed.wait_timeout_while(self.names(), patience, is_taken);
        let (mut names, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        names.insert(name.to_owned(), None);
        Some(Claim { claims: self, name })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.names().contains_key(name)
    }

    fn names(&self) -> MutexGuard<'_, HashMap<String, Option<Place>>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim<'_> {
    /// Whose it is.
    pub(super) const fn name(&self) -> &str {
        self.name
    }

    /// Takes the place that `choose` likes, which is told those of the other blobs that are being made. Two that choose at the
    /// same time know of each other.
    pub(super) fn settle(&self, choose: impl FnOnce(&[(&str, Place)]) -> Place) -> Place {
        let mut names = self.claims.names();
        let others: Vec<_> = names.iter().filter_map(|(name, place)| Some((name.as_str(), (*place)?))).collect();
        let place = choose(&others);
        names.insert(self.name.to_owned(), Some(place));
        place
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.claims.names().remove(self.name);
        self.claims.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_a_name_until_it_is_done_and_others_know_its_place() {
        let (claims, short) = (Claims::default(), Duration::from_millis(1));
        let (a, b) = (claims.take("a", short).unwrap(), claims.take("b", short).unwrap());
        assert!(claims.has("a") && claims.take("a", short).is_none());
        let place = Place { group: 3, device: 7 };
        a.settle(|others| {
            assert_eq!(others, []);
            place
        });
        b.settle(|others| {
            assert_eq!(others, [("a", place)]);
            place
        });
        drop(a);
        assert!(!claims.has("a"));
        let a = claims.take("a", short).unwrap();
        a.settle(|others| {
            assert_eq!(others, [("b", place)]);
            place
        });
    }
}
