//! Work that may block, each piece on a thread of its own: so many at a time, and none more.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

use tokio::sync::oneshot;

/// A bounded number of threads.
#[derive(Clone, Debug)]
pub(super) struct Jobs {
    name: &'static str,
    running: Arc<AtomicUsize>,
    max: usize,
}

/// One of them, until it is dropped.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Jobs {
    pub(super) fn new(name: &'static str, max: usize) -> Self {
        Self { name, running: Arc::default(), max }
    }

    fn slot(&self) -> Option<Slot> {
        let slot = Slot(Arc::clone(&self.running));
        (self.running.fetch_add(1, Ordering::Relaxed) < self.max).then_some(slot)
    }

    /// What `work` gives. Who stops waiting for it does not end it. `None`: all threads are busy, or none is to be had, which
    /// must not end the daemon.
    pub(super) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let slot = self.slot()?;
        let (done, result) = oneshot::channel();
        let run = move || {
            let told = work();
            drop(slot);
            // Nobody may wait any more.
            let _ = done.send(told);
        };
        Builder::new().name(self.name.to_owned()).spawn(run).ok()?;
        result.await.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn there_are_so_many_at_a_time_and_one_that_is_not_waited_for_counts() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let jobs = Jobs::new("test", 1);
        let (go_on, wait) = channel::<()>();
        runtime.block_on(async {
            let hangs = jobs.run(move || wait.recv());
            assert!(tokio::time::timeout(std::time::Duration::from_millis(10), hangs).await.is_err());
            assert_eq!(jobs.run(|| 1).await, None);
            go_on.send(()).unwrap();
            while jobs.run(|| 1).await != Some(1) {}
        });
    }
}
