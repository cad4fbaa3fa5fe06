//! A group of the bench itself: a thread that answers all events of some files at once, but those of the first one only when it is
//! not held up. Who reads that waits meanwhile, beside all others of the same group.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd;

use super::failed;
use crate::front::fanotify::Group;
use crate::front::{Found, FrontEnd, MESSAGE_MAX_BYTES, NeedRequest, ObjectId, Outcome, Request};
use crate::lab::{Result, Trying};

/// The file that is held up.
const HELD: ObjectId = ObjectId(0);
/// How often the thread looks at what it is told, at least.
const LOOK_EVERY_MS: u16 = 20;

/// See the module's description. Lets everybody go when dropped.
pub(super) struct Hold {
    told: Arc<Told>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is told.
#[derive(Default)]
struct Told {
    hold: AtomicBool,
    end: AtomicBool,
}

impl Hold {
    /// A hold of `files`, of which the first one is held up as [`Hold::set`] says. Who has it open already is not.
    ///
    /// # Errors
    /// They cannot be watched.
    pub(super) fn of(files: &[PathBuf]) -> Result<Self> {
        let group = Group::new().trying(|| "cannot watch files")?;
        for (path, object) in files.iter().zip((HELD.0..).map(ObjectId)) {
            let what = || format!("cannot watch {}", path.display());
            let file = File::open(path).trying(what)?;
            let len_bytes = file.metadata().trying(what)?.len();
            group.mark(file.as_fd(), object, len_bytes).trying(what)?;
        }
        let told = Arc::new(Told::default());
        let thread = {
            let told = Arc::clone(&told);
            thread::spawn(move || {
                answer(&group, &told).unwrap_or_else(|error| eprintln!("infill: readers are not held up any more: {error}"))
            })
        };
        Ok(Self { told, thread: Some(thread) })
    }

    /// Whether who reads from now on is held up; else all go on.
    pub(super) fn set(&self, holds: bool) {
        self.told.hold.store(holds, Ordering::Release);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.set(false);
        self.told.end.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Until it is told to end.
fn answer(group: &Group, told: &Told) -> Result<()> {
    let (mut buffer, mut requests, mut later) = (vec![0; MESSAGE_MAX_BYTES], Vec::new(), Vec::new());
    while !told.end.load(Ordering::Acquire) {
        let hold = told.hold.load(Ordering::Acquire);
        if !hold {
            later.drain(..).for_each(let_go);
        }
        let read = unistd::read(group.requests(), &mut buffer);
        let found = group.parse(read.map(|len| &buffer[..len]), &mut requests).map_err(|error| failed(error.to_string()))?;
        for request in requests.drain(..) {
            match request {
                Request::Need(need) | Request::Present(need) if hold && need.object == HELD => later.push(need),
                Request::Need(need) | Request::Present(need) => let_go(need),
                Request::Open(_) | Request::Close(_) => {}
            }
        }
        if found != Found::Part {
            let mut fds = [PollFd::new(group.requests(), PollFlags::POLLIN)];
            // An interrupted wait is looked at like any other.
            let _ = poll(&mut fds, PollTimeout::from(LOOK_EVERY_MS));
        }
    }
    later.into_iter().for_each(let_go);
    Ok(())
}

/// Nobody may wait any more for what is answered.
fn let_go(need: NeedRequest) {
    let _ = need.ticket.answer(Outcome::Done);
}
