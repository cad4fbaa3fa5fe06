//! A record of each answered request, for `--trace-requests`. Shards put records into a bounded queue; a
//! thread of its own prints them, so that printing delays no reader. What does not fit is counted.

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::front::Outcome;
use crate::key::Key;
use crate::range::{self, ByteRange};

/// Records that wait to be printed.
const RECORDS_MAX: usize = 65_536;

/// One answered request.
#[derive(Debug)]
pub struct Record {
    /// Whose; unknown if the object had been closed.
    pub key: Option<Arc<Key>>,
    /// What was asked.
    pub range: ByteRange,
    /// From the moment the request was read from the kernel to its answer.
    pub latency_ns: u64,
    /// The answer.
    pub outcome: Outcome,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Some(key) => write!(f, "READ {key}")?,
            None => write!(f, "READ (closed object)")?,
        }
        write!(f, " offset={} len={} {}us ", self.range.start, range::len(&self.range), self.latency_ns / 1000)?;
        match self.outcome {
            Outcome::Failed(errno) => write!(f, "failed {errno:?}"),
            Outcome::Done | Outcome::Opened { .. } => write!(f, "done"),
        }
    }
}

/// Takes records from shards.
#[derive(Clone, Debug)]
pub struct Tracer {
    queue: SyncSender<Record>,
    lost: Arc<AtomicU64>,
}

impl Tracer {
    /// A tracer whose records a thread prints to `out`, one line each. The thread ends, having printed all,
    /// when the last clone of the tracer is dropped; join it to wait for that.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(mut out: impl Write + Send + 'static) -> std::io::Result<(Self, JoinHandle<()>)> {
        let (queue, records) = sync_channel::<Record>(RECORDS_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&lost);
        let thread = std::thread::Builder::new().name("infill-trace".into()).spawn(move || {
            for record in records {
                // A closed output is no reason to stop serving.
                let _ = writeln!(out, "{record}");
            }
            let lost = counter.load(Ordering::Relaxed);
            if lost > 0 {
                let _ = writeln!(out, "{lost} more requests were not traced, because printing was too slow");
            }
        })?;
        Ok((Self { queue, lost }, thread))
    }

    /// Adds a record, or counts it as lost.
    pub(super) fn send(&self, record: Record) {
        if self.queue.try_send(record).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}
