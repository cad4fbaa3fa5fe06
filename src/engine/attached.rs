//! What a shard knows of an object besides what the machine knows: its blob and its files.

use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use nix::sys::stat::fstat;

use super::fds::Charge;
use super::io::{FileRef, Io};
use super::mailbox::Adopted;
use super::stats::ObjectStats;
use crate::front::Sink;
use crate::key::Key;
use crate::store::{Blob, SourceFile};

/// See the module's description.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) key: Arc<Key>,
    pub(super) blob: Arc<dyn Blob>,
    sink: SinkState,
    sink_file: FileRef,
    pub(super) source_files: Vec<FileRef>,
    pub(super) stats: Arc<ObjectStats>,
    /// Dropped last.
    _charge: Charge,
}

/// What a shard has of an object's sink.
#[derive(Debug)]
enum SinkState {
    Held(Arc<dyn Sink>),
    /// It was offered, to be closed. A request of the object holds it, and so brings it back.
    Offered(Weak<dyn Sink>),
}

/// Which file an operation works on.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// The object's.
    Sink,
    /// One of the blob's.
    Source(usize),
}

impl Attached {
    /// An object that was just opened, whose sources `io` will read.
    pub(super) fn new(adopted: Adopted, io: &mut impl Io) -> Self {
        let Adopted { key, blob, sink, stats, charge, .. } = adopted;
        // Not in the ring's table: a place there may keep a descriptor open long after it was cleared (up to a
        // second in Linux 6.1, and behind any operation that hangs), and an object whose sink is open is not gone.
        let sink_file = FileRef::plain(sink.as_fd());
        let source_files = blob.files().iter().map(|file| io.add_file(file.fd.as_fd())).collect();
        Self { key, blob, sink: SinkState::Held(sink), sink_file, source_files, stats, _charge: charge }
    }

    /// The sink, unless it was offered.
    pub(super) const fn sink(&self) -> Option<&Arc<dyn Sink>> {
        match &self.sink {
            SinkState::Held(sink) => Some(sink),
            SinkState::Offered(_) => None,
        }
    }

    /// The file to work on. `None`: there is none, or it may be closed at any moment.
    pub(super) fn file(&self, target: Target) -> Option<FileRef> {
        match target {
            Target::Sink => self.sink().map(|_| self.sink_file),
            Target::Source(file) => self.source_files.get(file).copied(),
        }
    }

    /// Gives the sink away.
    pub(super) fn offer(&mut self) -> Option<Arc<dyn Sink>> {
        let sink = Arc::clone(self.sink()?);
        self.sink = SinkState::Offered(Arc::downgrade(&sink));
        Some(sink)
    }

    /// Takes the sink back if somebody holds it. `true`: it had been offered.
    pub(super) fn take_back(&mut self) -> bool {
        let SinkState::Offered(offered) = &self.sink else { return false };
        let Some(sink) = offered.upgrade() else { return false };
        self.sink = SinkState::Held(sink);
        true
    }
}

/// Whether a mapped file still has the length it was opened with. A page that lost its tail would be read as
/// zeros, without any error.
pub(super) fn is_whole(file: &SourceFile) -> bool {
    fstat(&file.fd).is_ok_and(|stat| u64::try_from(stat.st_size).is_ok_and(|len| len >= file.len_bytes))
}
