//! The kernel's table of requests to the daemon: what `/dev/cachefiles` delivers, and in which order.
//!
//! Modelled on `fs/cachefiles/ondemand.c` of Linux 6.1.100 and later: ids are handed out cyclically, and
//! delivery goes on cyclically from the last delivered id.

use std::collections::BTreeMap;

/// What a request asks of the daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// Open the object.
    Open,
    /// Bring a range.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Index of the reader that sleeps on it.
        reader: usize,
    },
    /// Forget the object.
    Close,
}

/// A request that was not completed yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pending {
    /// Index of the cookie it is about.
    pub cookie: usize,
    /// What it asks.
    pub ask: Ask,
    /// Not delivered yet, or to be delivered again after `restore`.
    pub new: bool,
}

/// All requests that were not completed yet.
#[derive(Clone, Debug)]
pub struct Queue {
    requests: BTreeMap<u32, Pending>,
    next_id: u32,
    next_delivery: u32,
}

impl Queue {
    /// An empty table whose first id is `first_id`: 0 in a fresh cache, any number in an old one.
    #[must_use]
    pub const fn new(first_id: u32) -> Self {
        Self { requests: BTreeMap::new(), next_id: first_id, next_delivery: 0 }
    }

    /// Adds a request and returns its id.
    pub fn push(&mut self, cookie: usize, ask: Ask) -> u32 {
        while self.requests.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.requests.insert(id, Pending { cookie, ask, new: true });
        id
    }

    /// The request with this id.
    #[must_use]
    pub fn get(&self, id: u32) -> Option<Pending> {
        self.requests.get(&id).copied()
    }

    /// Completes a request: its id means nothing afterwards.
    pub fn take(&mut self, id: u32) -> Option<Pending> {
        self.requests.remove(&id)
    }

    /// Undelivered requests in the order in which they are to be considered for delivery.
    #[must_use]
    pub fn undelivered(&self) -> Vec<(u32, Pending)> {
        let from_here = self.requests.range(self.next_delivery..);
        let wrapped = self.requests.range(..self.next_delivery);
        from_here.chain(wrapped).filter(|(_, pending)| pending.new).map(|(id, pending)| (*id, *pending)).collect()
    }

    /// Marks a request as delivered; the next delivery starts behind it.
    pub fn mark_delivered(&mut self, id: u32) {
        if let Some(pending) = self.requests.get_mut(&id) {
            pending.new = false;
            self.next_delivery = id.wrapping_add(1);
        }
    }

    /// The `restore` command: every pending request will be delivered again.
    pub fn restore(&mut self) {
        for pending in self.requests.values_mut() {
            pending.new = true;
        }
    }

    /// Ids of all requests about a cookie.
    #[must_use]
    pub fn of_cookie(&self, cookie: usize) -> Vec<u32> {
        self.iter().filter(|(_, pending)| pending.cookie == cookie).map(|(id, _)| id).collect()
    }

    /// All requests.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Pending)> {
        self.requests.iter().map(|(id, pending)| (*id, pending))
    }

    /// Whether every request was completed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_deliveries_go_round() {
        let mut queue = Queue::new(u32::MAX);
        assert_eq!(queue.push(0, Ask::Open), u32::MAX);
        assert_eq!(queue.push(1, Ask::Open), 0);
        assert_eq!(queue.push(2, Ask::Open), 1);
        assert_eq!(queue.undelivered()[0].0, 0);
        queue.mark_delivered(0);
        let order: Vec<u32> = queue.undelivered().iter().map(|(id, _)| *id).collect();
        assert_eq!(order, [1, u32::MAX]);
        queue.restore();
        assert_eq!(queue.undelivered().len(), 3);
        assert!(queue.take(0).is_some());
        assert_eq!(queue.push(3, Ask::Open), 2, "a completed id is not used again");
    }
}
