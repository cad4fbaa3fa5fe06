//! What is counted of each blob: for operators, who want to know which image is slow and which is complete.
//!
//! A blob keeps its counters when it is closed and opened again, as happens whenever descriptors are scarce.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::bump;
use crate::key::Key;

/// Blobs that are remembered; of more than that, those that are not open are forgotten.
const OBJECTS_MAX: usize = 16_384;

/// One blob's counters. The shard that owns its object writes them; others read.
#[derive(Debug, Default)]
pub(in crate::engine) struct ObjectStats {
    len_bytes: AtomicU64,
    device: AtomicU64,
    opens: AtomicU64,
    requests: AtomicU64,
    misses: AtomicU64,
    failed: AtomicU64,
    waited_ns: AtomicU64,
    present_bytes: AtomicU64,
    last_ns: AtomicU64,
}

impl ObjectStats {
    /// A request has its answer: after `latency_ns`, if it was a miss.
    pub(in crate::engine) fn answered(&self, miss: Option<u64>, failed: bool, now_ns: u64) {
        bump(&self.requests, 1);
        bump(&self.failed, u64::from(failed));
        if let Some(latency_ns) = miss {
            bump(&self.misses, 1);
            bump(&self.waited_ns, latency_ns);
        }
        self.last_ns.store(now_ns, Ordering::Relaxed);
    }

    /// So much of it is there.
    pub(in crate::engine) fn holds(&self, present_bytes: u64) {
        self.present_bytes.store(present_bytes, Ordering::Relaxed);
    }

    /// So much more of it is there.
    pub(in crate::engine) fn grows(&self, bytes: u64) {
        bump(&self.present_bytes, bytes);
    }
}

/// What is known of one blob at some time.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct ObjectReport {
    /// `domain/name`.
    pub blob: String,
    /// Its length.
    pub len_bytes: u64,
    /// How much of it is in the cache: exactly where the front end's sinks know, else what was there when it was opened and what was
    /// brought since, which may count a page twice.
    pub present_bytes: u64,
    /// Whether it is open now.
    pub open: bool,
    /// Requests that were answered.
    pub requests: u64,
    /// Of them, those that waited for bytes to be brought.
    pub misses: u64,
    /// Of them, those that failed.
    pub failed: u64,
    /// How long all misses waited together, in microseconds.
    pub waited_us: u64,
    /// Since the last request, in milliseconds; `None`: there was none.
    pub idle_ms: Option<u64>,
    /// The file system of its source (`st_dev`).
    pub device: u64,
}

/// See the module's description.
#[derive(Debug, Default)]
pub(in crate::engine) struct Objects(Mutex<HashMap<Key, Arc<ObjectStats>>>);

impl Objects {
    /// The counters of a blob that is about to be opened, and whether it was open before. Not for shards: it may wait.
    pub(in crate::engine) fn open(&self, key: &Key, len_bytes: u64, device: u64) -> (Arc<ObjectStats>, bool) {
        let mut objects = self.lock();
        if objects.len() >= OBJECTS_MAX && !objects.contains_key(key) {
            objects.retain(|_, object| is_open(object));
        }
        let object = objects.entry(key.clone()).or_default();
        object.len_bytes.store(len_bytes, Ordering::Relaxed);
        object.device.store(device, Ordering::Relaxed);
        let again = object.opens.fetch_add(1, Ordering::Relaxed) > 0;
        (Arc::clone(object), again)
    }

    /// All of them, in the order of their names.
    pub(in crate::engine) fn report(&self, now_ns: u64) -> Vec<ObjectReport> {
        let objects: Vec<_> = self.lock().iter().map(|(key, object)| (key.to_string(), is_open(object), Arc::clone(object))).collect();
        let mut reports: Vec<_> = objects.into_iter().map(|(blob, open, object)| report(blob, open, &object, now_ns)).collect();
        reports.sort_unstable_by(|a, b| a.blob.cmp(&b.blob));
        reports
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<ObjectStats>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a shard has it.
fn is_open(object: &Arc<ObjectStats>) -> bool {
    Arc::strong_count(object) > 1
}

fn report(blob: String, open: bool, object: &ObjectStats, now_ns: u64) -> ObjectReport {
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let requests = of(&object.requests);
    ObjectReport {
        blob,
        len_bytes: of(&object.len_bytes),
        // A last page that is not whole counts as one.
        present_bytes: of(&object.present_bytes).min(of(&object.len_bytes)),
        open,
        requests,
        misses: of(&object.misses),
        failed: of(&object.failed),
        waited_us: of(&object.waited_ns) / 1000,
        idle_ms: (requests > 0).then(|| now_ns.saturating_sub(of(&object.last_ns)) / 1_000_000),
        device: of(&object.device),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_that_is_opened_again_goes_on_and_the_oldest_make_room() {
        let objects = Objects::default();
        let key = |n: usize| Key::new(b"dom", format!("b{n}").as_bytes());
        let (first, again) = objects.open(&key(0), 10_000, 7);
        assert!(!again);
        first.answered(Some(3_000_000), false, 5_000_000);
        first.answered(None, true, 6_000_000);
        first.holds(12_288);
        drop(first);
        let (first, again) = objects.open(&key(0), 10_000, 7);
        assert!(again);
        let expected = ObjectReport {
            blob: "dom/b0".into(),
            len_bytes: 10_000,
            present_bytes: 10_000,
            open: true,
            requests: 2,
            misses: 1,
            failed: 1,
            waited_us: 3000,
            idle_ms: Some(4),
            device: 7,
        };
        assert_eq!(objects.report(10_000_000), [expected]);
        for n in 1..=OBJECTS_MAX {
            objects.open(&key(n), 1, 7);
        }
        // Of all those only what is open was kept when there were too many.
        let reports = objects.report(0);
        assert_eq!(reports.iter().filter(|report| report.open).map(|report| report.blob.as_str()).collect::<Vec<_>>(), ["dom/b0"]);
        assert!(reports.len() <= 2, "{}", reports.len());
        drop(first);
    }
}
