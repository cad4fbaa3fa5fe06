//! What went wrong between the kernel and us, counted. In a healthy system only `late_answers` grows.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Default, Debug)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// See [`Counts`].
#[derive(Default, Debug)]
pub(super) struct Counters {
    pub(super) malformed: Counter,
    pub(super) unknown_objects: Counter,
    pub(super) late_answers: Counter,
    pub(super) lost_opens: Counter,
}

/// The counters at one moment, each a number of events since the device was bound.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, serde::Serialize)]
pub struct Counts {
    /// Messages that made no sense and were refused.
    pub malformed: u64,
    /// READs of objects without an open descriptor; their readers may hang until the object is opened again.
    pub unknown_objects: u64,
    /// Answers that the kernel no longer wanted: the reader was killed, or the object closed.
    pub late_answers: u64,
    /// OPENs that the kernel failed for good before we saw them, for want of a descriptor or memory.
    pub lost_opens: u64,
}

impl Counters {
    pub(super) fn snapshot(&self) -> Counts {
        Counts {
            malformed: self.malformed.get(),
            unknown_objects: self.unknown_objects.get(),
            late_answers: self.late_answers.get(),
            lost_opens: self.lost_opens.get(),
        }
    }
}
