//! Reads and writes by threads that block: for hosts where io_uring is refused.
//!
//! The same contract as [`super::ring`], held by a few threads with `pread(2)` and `pwrite(2)`, an epoll
//! instance to wait, and an eventfd that tells it of completions.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::edges::Edges;
use super::io::{DRAIN_MAX, Done, FileRef, Io, Kind, Op, Ready, Watch};

/// See the module's description.
#[derive(Debug)]
pub struct Blocking {
    /// Its end ends the workers. They are not joined: one may hang in the kernel, and each operation owns its
    /// memory.
    jobs: Option<Sender<Op>>,
    /// Messages to read with the next wait.
    receives: Vec<Op>,
    /// Nothing that is queued may start any more.
    ended: Arc<AtomicBool>,
    done: Receiver<Done>,
    completions: Arc<EventFd>,
    edges: Edges,
}

impl Blocking {
    /// Starts `workers` threads. With `sinks_copy` they map a file's pages before they write from them.
    ///
    /// # Errors
    /// No thread or descriptor could be had.
    pub fn new(workers: u32, sinks_copy: bool, watch: Watch<'_>) -> io::Result<Self> {
        let completions = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let edges = Edges::new(watch)?;
        edges.watch_also(completions.as_fd())?;
        let ((jobs, queue), (results, done)) = (channel(), channel());
        let (queue, ended) = (Arc::new(Mutex::new(queue)), Arc::<AtomicBool>::default());
        for n in 0..workers.max(1) {
            let worker = Worker {
                queue: Arc::clone(&queue),
                ended: Arc::clone(&ended),
                sinks_copy,
                results: results.clone(),
                completions: Arc::clone(&completions),
            };
            std::thread::Builder::new().name(format!("infill-io-{n}")).spawn(move || worker.run())?;
        }
        Ok(Self { jobs: Some(jobs), receives: Vec::new(), ended, done, completions, edges })
    }
}

/// What a thread works with.
struct Worker {
    queue: Arc<Mutex<Receiver<Op>>>,
    ended: Arc<AtomicBool>,
    sinks_copy: bool,
    results: Sender<Done>,
    completions: Arc<EventFd>,
}

impl Worker {
    fn run(&self) {
        loop {
            let next = self.queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(op) = next else { return };
            if self.ended.load(Ordering::Acquire) {
                return;
            }
            if self.sinks_copy && op.kind == Kind::Write {
                op.memory.populate();
            }
            if self.results.send(run(op)).is_err() {
                return;
            }
            // The counter cannot overflow in practice, and a full one wakes as well.
            let _ = self.completions.write(1);
        }
    }
}

fn run(op: Op) -> Done {
    let result = match op.kind {
        Kind::Read => op.memory.read_at(op.file.fd, op.offset),
        Kind::Receive => op.memory.receive(op.file.fd),
        Kind::Write => op.memory.write_at(op.file.fd, op.offset),
    };
    match op.then {
        Some((file, offset)) if u32::try_from(result) == Ok(op.memory.len()) => {
            Done { result: op.memory.write_at(file.fd, offset), op, copied: true }
        }
        _ => Done { op, result, copied: false },
    }
}

impl Blocking {
    /// Reads the messages that are wanted, up to the first read that finds none. Whether any were wanted.
    fn receive(&mut self, done: &mut Vec<Done>) -> bool {
        let before = done.len();
        let mut nothing = None;
        for op in self.receives.drain(..) {
            let result = nothing.unwrap_or_else(|| op.memory.receive(op.file.fd));
            nothing = nothing.or_else(|| [0, -(Errno::EAGAIN as i32)].contains(&result).then_some(result));
            done.push(Done { op, result, copied: false });
        }
        done.len() > before
    }
}

impl Drop for Blocking {
    /// Waits until no thread can use a descriptor any more: its number may soon stand for another file.
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.jobs = None;
        let deadline = Instant::now() + DRAIN_MAX;
        while self.done.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok() {}
    }
}

impl Io for Blocking {
    fn add_file(&mut self, fd: BorrowedFd<'_>) -> FileRef {
        FileRef::plain(fd)
    }

    fn remove_file(&mut self, _: FileRef) {}

    fn push(&mut self, op: Op) {
        if op.kind == Kind::Receive {
            return self.receives.push(op);
        }
        let key = op.key;
        let queued = self.jobs.as_ref().is_some_and(|jobs| jobs.send(op).is_ok());
        debug_assert!(queued, "the workers live as long as the queue, but operation {key} was lost");
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Done>) -> io::Result<Ready> {
        let timeout = if self.receive(done) { Some(Duration::ZERO) } else { timeout };
        let (ready, completed) = self.edges.wait(timeout)?;
        if completed {
            // Nothing to take is fine: the threads' results are looked for in any case.
            let _ = self.completions.read();
        }
        done.extend(self.done.try_iter());
        Ok(ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::buffers::Buffers;
    use std::os::unix::fs::FileExt;

    #[test]
    fn does_what_the_ring_does() {
        let (buffers, wake) = (Buffers::new(4, 65536).unwrap(), EventFd::new().unwrap());
        let mut io = Blocking::new(2, false, Watch { requests: &[], wake: wake.as_fd() }).unwrap();
        let file = tempfile::tempfile().unwrap();
        let to = io.add_file(file.as_fd());
        for key in 0..100 {
            io.push(Op { key, kind: Kind::Write, file: to, offset: key * 4096, memory: buffers.zeros(4096), then: None });
        }
        wake.write(1).unwrap();
        let (mut done, mut woken) = (Vec::new(), false);
        while done.len() < 100 || !woken {
            woken |= io.wait(Some(Duration::from_secs(10)), &mut done).unwrap().woken;
        }
        io.push(Op { key: 100, kind: Kind::Read, file: to, offset: 399 * 1024, memory: buffers.slot(0, 0, 65536), then: None });
        while done.len() < 101 {
            io.wait(Some(Duration::from_secs(10)), &mut done).unwrap();
        }
        assert_eq!((done[100].op.key, done[100].result), (100, 1024));
        assert_eq!(file.metadata().unwrap().len(), 409_600);
        let mut last = [1];
        file.read_exact_at(&mut last, 409_599).unwrap();
        assert_eq!(last, [0]);
    }

    #[test]
    fn nothing_starts_after_it_was_dropped() {
        let (buffers, wake) = (Buffers::new(4, 1 << 20).unwrap(), EventFd::new().unwrap());
        let mut io = Blocking::new(2, false, Watch { requests: &[], wake: wake.as_fd() }).unwrap();
        let file = tempfile::tempfile().unwrap();
        let to = io.add_file(file.as_fd());
        for key in 0..500 {
            io.push(Op { key, kind: Kind::Write, file: to, offset: key << 20, memory: buffers.zeros(1 << 20), then: None });
        }
        drop(io);
        // The descriptor's number may stand for another file from here on.
        let len = file.metadata().unwrap().len();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(file.metadata().unwrap().len(), len);
        assert!(len < 500 << 20, "what had not been started is not done any more");
    }
}
