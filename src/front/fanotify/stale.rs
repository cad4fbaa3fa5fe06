//! Events that a dead process has read and not answered. They are answered by their names of then, which are numbers of
//! descriptors, as soon as their data is there.
//!
//! The kernel takes an answer for the oldest event of that number. So no other event may get the number before, and
//! especially not if the dead process did give the answer and only could not note it: the number is taken here, and if
//! something else has it, no event is read.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::group::{Inner, take_over};
use super::journal::Unanswered;
use crate::front::{Answer, NeedRequest, ObjectId, Outcome, Ticket};
use crate::range::ByteRange;

/// Such an event, and its number.
#[derive(Debug)]
pub(super) struct Stale {
    event: Unanswered,
    /// The number is taken by this alone.
    reserved: bool,
}

impl Stale {
    /// Takes the number with a copy of `placeholder`.
    pub(super) fn reserve(event: Unanswered, placeholder: BorrowedFd<'_>) -> Self {
        let copy = fcntl(placeholder, FcntlArg::F_DUPFD_CLOEXEC(event.number));
        // SAFETY: the kernel has just made this descriptor for us.
        let copy = copy.map(|raw| unsafe { OwnedFd::from_raw_fd(raw) });
        let reserved = copy.is_ok_and(|copy| copy.as_raw_fd() == event.number && copy.into_raw_fd() == event.number);
        Self { event, reserved }
    }

    /// Whether somebody else has the number, who may give it back at any time.
    pub(super) const fn is_in_the_way(&self) -> bool {
        !self.reserved
    }
}

/// An answer that is owed: given when everything that the event may be about is there.
struct Debt {
    group: Arc<Inner>,
    number: RawFd,
    /// The number is a descriptor that belongs to this. If it is never answered, it stays as it is until the process ends.
    reserved: bool,
    /// Needs that have no outcome yet.
    left: AtomicUsize,
    /// The error of one that failed, or 0.
    failed: AtomicI32,
}

impl Debt {
    fn pay(&self) {
        let result = match self.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Errno::from_raw(errno)),
        };
        if let Err(error) = self.group.give(self.number, result) {
            tracing::error!("the kernel did not take the answer to a read that the daemon before this one was asked for: {error}");
        }
        if self.reserved {
            drop(take_over(self.number));
        } else {
            self.group.let_go();
        }
    }
}

impl Answer for Debt {
    fn answer(&self, _: u64, outcome: Outcome) -> io::Result<bool> {
        if let Outcome::Failed(errno) = outcome {
            self.failed.store(errno as i32, Ordering::Release);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.pay();
        }
        Ok(true)
    }
}

/// Has what `stale` wants brought by `ask`, or answers it if that is nothing. `objects` are those of the group, with their
/// lengths in bytes, 0 for one that is complete.
pub(super) fn owe(group: &Arc<Inner>, stale: &Stale, objects: &[(ObjectId, u64)], ask: &impl Fn(NeedRequest)) {
    let Unanswered { number, object, range } = &stale.event;
    let candidates = objects.iter().filter(|(candidate, _)| object.is_none_or(|object| object == *candidate));
    // Its data may be missing if nobody knows of it.
    let unknown = candidates.clone().count() == 0;
    let clamp = |len_bytes: u64| range.start.min(len_bytes)..range.end.min(len_bytes);
    let wants = candidates.map(|&(object, len_bytes)| (object, clamp(len_bytes))).filter(|(_, range)| !range.is_empty());
    let wants: Vec<(ObjectId, ByteRange)> = wants.collect();
    let debt = Arc::new(Debt {
        group: Arc::clone(group),
        number: *number,
        reserved: stale.reserved,
        left: AtomicUsize::new(wants.len()),
        failed: AtomicI32::new(if unknown { Errno::EIO as i32 } else { 0 }),
    });
    if wants.is_empty() {
        return debt.pay();
    }
    let token = u64::from(number.unsigned_abs());
    for (object, range) in wants {
        ask(NeedRequest { object, range, ticket: Ticket::new(Arc::clone(&debt) as Arc<dyn Answer>, token) });
    }
}
