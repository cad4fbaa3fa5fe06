//! How threads hand work to a shard: a bounded queue, and a wake-up for a shard that sleeps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Tuning;
use super::fds::Charge;
use super::stats::ObjectStats;
use crate::front::{NeedRequest, ObjectId, Sink};
use crate::key::Key;
use crate::range::ByteRange;
use crate::store::Blob;

/// Messages that a shard's mailbox holds. A full one makes the sender wait, and so the kernel.
const MAILBOX_MAX: usize = 4096;

/// What a shard is told.
#[derive(Debug)]
pub(super) enum Message {
    /// An object of yours was opened.
    Adopt(Adopted),
    /// The kernel knows that it is.
    Opened(ObjectId),
    /// A reader waits for data of an object of yours. With the time at which it was read from the kernel.
    Need(NeedRequest, u64),
    /// An object of yours is gone.
    Close(ObjectId),
    /// Descriptors are scarce: offer so many objects that nobody waits for.
    Evict(usize),
    /// The sink of an object that you offered: somebody waits for it after all.
    Keep(ObjectId, Arc<dyn Sink>),
    /// The operator has other wishes.
    Tune(Tuning),
}

/// A newly opened object.
#[derive(Debug)]
pub(super) struct Adopted {
    pub(super) object: ObjectId,
    pub(super) key: Arc<Key>,
    pub(super) blob: Arc<dyn Blob>,
    /// The part of the blob that is metadata, as far as known.
    pub(super) metadata: Option<ByteRange>,
    pub(super) sink: Arc<dyn Sink>,
    pub(super) stats: Arc<ObjectStats>,
    pub(super) charge: Charge,
}

/// The sending side; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Mailbox {
    queue: SyncSender<Message>,
    bell: Arc<Bell>,
}

/// Wakes one shard.
#[derive(Debug)]
pub(super) struct Bell {
    eventfd: EventFd,
    asleep: AtomicBool,
}

impl Bell {
    fn new() -> io::Result<Self> {
        Ok(Self { eventfd: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?, asleep: AtomicBool::new(false) })
    }

    /// Ends the shard's wait or, if it is not waiting, its next one: for news that are not in the mailbox, which
    /// the shard does not look for before it sleeps.
    pub(super) fn wake(&self) {
        // A full counter wakes as well.
        let _ = self.eventfd.write(1);
    }

    /// Wakes the shard if it sleeps or is about to, because something was put into its mailbox.
    fn ring(&self) {
        // Pairs with the fence in `Inbox::may_sleep`: either the shard sees what was sent, or we see it asleep.
        fence(Ordering::SeqCst);
        // First only looked at, so that the line of one that is awake stays in both cores' caches.
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }
}

impl Mailbox {
    /// Delivers a message, or gives it back if the mailbox is full or its shard has ended.
    pub(super) fn try_send(&self, message: Message) -> Result<(), Message> {
        self.put(message).map(|()| self.ring())
    }

    /// As [`Mailbox::try_send`], but wakes nobody: [`Mailbox::ring`] must follow.
    pub(super) fn put(&self, message: Message) -> Result<(), Message> {
        self.queue.try_send(message).map_err(|(TrySendError::Full(message) | TrySendError::Disconnected(message))| message)
    }

    /// Wakes the shard if it sleeps, for what was put.
    pub(super) fn ring(&self) {
        self.bell.ring();
    }

    /// Delivers a message, waiting for room. Gives it back if the shard has ended.
    pub(super) fn send(&self, message: Message) -> Result<(), Message> {
        self.queue.send(message).map_err(|error| error.0)?;
        self.bell.ring();
        Ok(())
    }

    /// The shard's bell.
    pub(super) const fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }
}

/// The receiving side.
#[derive(Debug)]
pub(super) struct Inbox {
    queue: Receiver<Message>,
    bell: Arc<Bell>,
    stashed: Option<Message>,
}

impl Inbox {
    /// A mailbox and its inbox.
    pub(super) fn pair() -> io::Result<(Mailbox, Self)> {
        let (sender, queue) = sync_channel(MAILBOX_MAX);
        let bell = Arc::new(Bell::new()?);
        Ok((Mailbox { queue: sender, bell: Arc::clone(&bell) }, Self { queue, bell, stashed: None }))
    }

    /// The next message, if there is one.
    pub(super) fn take(&mut self) -> Option<Message> {
        self.stashed.take().or_else(|| self.queue.try_recv().ok())
    }

    /// Announces that the shard is about to sleep. `false`: there is a message, it must not.
    pub(super) fn may_sleep(&mut self) -> bool {
        self.bell.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        match self.queue.try_recv() {
            Ok(message) => {
                self.stashed = Some(message);
                self.awake();
                false
            }
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => self.stashed.is_none(),
        }
    }

    /// The shard is awake again: nobody needs to ring.
    pub(super) fn awake(&self) {
        self.bell.asleep.store(false, Ordering::SeqCst);
    }

    /// Takes back a ring of the bell.
    pub(super) fn silence(&self) {
        // Nothing to take is fine: somebody else's ring may have been taken with ours.
        let _ = self.bell.eventfd.read();
    }

    /// The descriptor to wait on.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.bell.eventfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, poll};

    fn has_rung(inbox: &Inbox) -> bool {
        let mut fds = [PollFd::new(inbox.fd(), PollFlags::POLLIN)];
        poll(&mut fds, 0u8).unwrap() == 1
    }

    #[test]
    fn messages_ring_only_for_a_sleeper_and_news_always() {
        let (mailbox, mut inbox) = Inbox::pair().unwrap();
        mailbox.try_send(Message::Close(ObjectId(1))).unwrap();
        assert!(!has_rung(&inbox), "it is awake");
        assert!(!inbox.may_sleep(), "there is a message");
        assert!(inbox.take().is_some() && inbox.take().is_none() && inbox.may_sleep());
        mailbox.try_send(Message::Close(ObjectId(2))).unwrap();
        assert!(has_rung(&inbox));
        inbox.silence();
        inbox.awake();
        assert!(inbox.take().is_some());
        assert!(inbox.may_sleep());
        mailbox.put(Message::Close(ObjectId(3))).unwrap();
        assert!(!has_rung(&inbox), "more may be put");
        mailbox.ring();
        assert!(has_rung(&inbox));
        inbox.silence();
        inbox.awake();
        assert!(inbox.take().is_some());
        mailbox.bell().wake();
        assert!(inbox.may_sleep() && has_rung(&inbox), "the news came before it slept");
    }
}
