//! The model kernel: cachefiles in on-demand mode as its daemon sees it. Pure and deterministic.
//!
//! Modelled on `fs/cachefiles/{daemon,ondemand}.c` of Linux 6.1.100 to 6.12: those kernels open an object
//! again when its fd was closed, know `restore`, never use an id twice and check who completes what.
//! Two sides use it: the daemon, by the calls of the first block, and the simulated world, which says when
//! processes and kernel workers take their next step.

use std::collections::BTreeMap;

use nix::errno::Errno;

use super::objects::{Cookie, Phase, State};
use super::queue::{Ask, Queue};
use super::readers::{Doing, Look, Reader};
use super::sink::{Flavour, SinkWrite};
use crate::range::ByteRange;

/// The object id that a CLOSE carries when the daemon closed the fd before it was delivered.
pub const NO_OBJECT: u32 = u32::MAX;

/// A message as `read(2)` on the device delivers it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// A blob is mounted, or opened again.
    Open {
        /// To be given back by copen.
        msg_id: u32,
        /// Id of the object while this fd lives.
        object: u32,
        /// Volume key.
        volume: u32,
        /// Cookie key.
        name: String,
        /// The anonymous fd.
        fd: u32,
    },
    /// A range is missing.
    Read {
        /// To be given back by READ_COMPLETE.
        msg_id: u32,
        /// Which object.
        object: u32,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// An object is gone.
    Close {
        /// Which, or [`NO_OBJECT`].
        object: u32,
    },
}

/// What may go wrong with one `read(2)` on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadFault {
    /// Nothing.
    None,
    /// It returns 0 though there is a message.
    Nothing,
    /// No file descriptor is free: an OPEN that would be delivered is lost.
    NoDescriptor,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct Kernel {
    flavour: Flavour,
    cookies: Vec<Cookie>,
    queue: Queue,
    readers: Vec<Reader>,
    /// Live anonymous fds: their cookie and the object id they were opened with.
    fds: BTreeMap<u32, (usize, u32)>,
    next_fd: u32,
    next_object: u32,
    woken: bool,
}

impl Kernel {
    /// A kernel with nothing mounted; its first message id is `first_id`.
    #[must_use]
    pub const fn new(flavour: Flavour, first_id: u32) -> Self {
        Self {
            flavour,
            cookies: Vec::new(),
            queue: Queue::new(first_id),
            readers: Vec::new(),
            fds: BTreeMap::new(),
            next_fd: 10,
            next_object: 1,
            woken: false,
        }
    }

    // What the daemon can do.

    /// `read(2)` on the device; `None` is its 0, "nothing now".
    ///
    /// # Errors
    /// `EMFILE` or `EEXIST` at the delivery of an OPEN, which is lost by it.
    pub fn read(&mut self, fault: ReadFault) -> Result<Option<Message>, Errno> {
        if fault == ReadFault::Nothing {
            return Ok(None);
        }
        let Some(id) = self.select() else {
            return Ok(None);
        };
        self.queue.mark_delivered(id);
        let Some(pending) = self.queue.get(id) else {
            return Ok(None);
        };
        let object = self.cookies[pending.cookie].object_id;
        let object = if object == 0 { NO_OBJECT } else { object };
        match pending.ask {
            Ask::Open => self.deliver_open(id, pending.cookie, fault).map(Some),
            Ask::Read { offset, len, .. } => Ok(Some(Message::Read { msg_id: id, object, offset, len })),
            Ask::Close => {
                self.finish_close(id, pending.cookie);
                Ok(Some(Message::Close { object }))
            }
        }
    }

    /// `poll(2)`: whether something undelivered is not a READ of an object that is being opened again.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        self.queue
            .undelivered()
            .iter()
            .any(|(_, pending)| !matches!(pending.ask, Ask::Read { .. }) || self.cookies[pending.cookie].state != State::Reopening)
    }

    /// Whether pollers were woken since the last call.
    pub const fn take_wakeup(&mut self) -> bool {
        std::mem::replace(&mut self.woken, false)
    }

    /// The command `copen <id>,<size>`.
    ///
    /// # Errors
    /// `EINVAL` if no delivered OPEN has this id, or for an error number below -4095.
    pub fn copen(&mut self, id: u32, size: i64) -> Result<(), Errno> {
        const ERRNO_MAX: i64 = 4095;
        let pending = self.queue.get(id).filter(|pending| pending.ask == Ask::Open && !pending.new).ok_or(Errno::EINVAL)?;
        self.queue.take(id);
        let cookie = &mut self.cookies[pending.cookie];
        let Ok(size) = u64::try_from(size) else {
            self.fail_open(pending.cookie);
            return if size < -ERRNO_MAX { Err(Errno::EINVAL) } else { Ok(()) };
        };
        if cookie.fd.is_none() {
            self.fail_open(pending.cookie);
            return Ok(());
        }
        if cookie.phase == Phase::LookingUp {
            if cookie.size.is_some_and(|old| old != size) {
                cookie.file = super::sink::CacheFile::new(self.flavour.block_bytes);
            }
            cookie.phase = Phase::Publishing;
        }
        cookie.size = Some(size);
        cookie.state = State::Open;
        self.woken = true;
        Ok(())
    }

    /// The ioctl `READ_COMPLETE` on an anonymous fd.
    ///
    /// # Errors
    /// `EINVAL` if no READ of this object has this id.
    pub fn read_complete(&mut self, fd: u32, id: u32) -> Result<(), Errno> {
        let cookie = self.live_cookie(fd).ok_or(Errno::EINVAL)?;
        match self.queue.get(id) {
            Some(pending) if pending.cookie == cookie => match pending.ask {
                Ask::Read { reader, .. } => {
                    self.queue.take(id);
                    self.readers[reader].wake();
                    Ok(())
                }
                _ => Err(Errno::EINVAL),
            },
            _ => Err(Errno::EINVAL),
        }
    }

    /// `pwrite(2)` on an anonymous fd.
    ///
    /// # Errors
    /// `ENOBUFS` without a published file, and those of [`super::sink::CacheFile::write`].
    pub fn write(&mut self, fd: u32, write: &SinkWrite<'_>) -> Result<u64, Errno> {
        let index = self.live_cookie(fd).ok_or(Errno::ENOBUFS)?;
        let cookie = &mut self.cookies[index];
        let blob = cookie.blob.clone().filter(|_| cookie.phase != Phase::LookingUp && cookie.is_published());
        let blob = blob.ok_or(Errno::ENOBUFS)?;
        cookie.file.write(&self.flavour, &blob, write)
    }

    /// `SEEK_DATA` and `SEEK_HOLE` on an anonymous fd: the parts of `range` that are there.
    ///
    /// # Errors
    /// `ENOBUFS` without a published file.
    pub fn present(&self, fd: u32, range: &ByteRange) -> Result<Vec<ByteRange>, Errno> {
        let index = self.live_cookie(fd).ok_or(Errno::ENOBUFS)?;
        let cookie = &self.cookies[index];
        if cookie.is_published() { Ok(cookie.file.present(range)) } else { Err(Errno::ENOBUFS) }
    }

    /// `close(2)` of the last reference to an anonymous fd. Nobody is woken by it.
    pub fn close_fd(&mut self, fd: u32) {
        let live = self.live_cookie(fd);
        self.fds.remove(&fd);
        let Some(index) = live else { return };
        let cookie = &mut self.cookies[index];
        cookie.fd = None;
        cookie.object_id = 0;
        cookie.state = State::Close;
        if self.flavour.flushes_close {
            let close = self.queue.iter().find(|(_, pending)| pending.cookie == index && pending.ask == Ask::Close);
            if let Some(id) = close.map(|(id, _)| id) {
                self.finish_close(id, index);
            }
        }
    }

    /// The command `restore`.
    pub fn restore(&mut self) {
        self.queue.restore();
        self.woken = true;
    }

    // What the world does.

    /// Adds a cookie and returns its index.
    pub fn add_cookie(&mut self, cookie: Cookie) -> usize {
        self.cookies.push(cookie);
        self.cookies.len() - 1
    }

    /// Adds a reader and returns its index.
    pub fn add_reader(&mut self, reader: Reader) -> usize {
        self.readers.push(reader);
        self.readers.len() - 1
    }

    /// Mounts what no mount uses: an OPEN is sent.
    pub fn mount(&mut self, cookie: usize) {
        assert_eq!(self.cookies[cookie].phase, Phase::Idle);
        self.cookies[cookie].phase = Phase::LookingUp;
        self.cookies[cookie].state = State::Close;
        self.push(cookie, Ask::Open);
    }

    /// The next step of a kernel worker for a cookie: to publish the file, or to ask for a re-opening.
    /// `false` if there is nothing to do.
    pub fn work(&mut self, index: usize) -> bool {
        let cookie = &mut self.cookies[index];
        if cookie.phase == Phase::Publishing {
            cookie.phase = Phase::Live;
        } else if cookie.reopen_queued {
            cookie.reopen_queued = false;
            self.push(index, Ask::Open);
        } else {
            return false;
        }
        true
    }

    /// Unmounts: a CLOSE is sent if the object is open. Readers that are still there get `EIO`.
    pub fn umount(&mut self, index: usize) {
        let cookie = &mut self.cookies[index];
        if cookie.state == State::Open {
            cookie.phase = Phase::Withdrawing;
            self.push(index, Ask::Close);
        } else {
            self.withdraw(index);
        }
    }

    /// One step of a reader; `false` if it sleeps, is over, or waits for the mount.
    pub fn run_reader(&mut self, index: usize) -> bool {
        let reader = &mut self.readers[index];
        let cookie = &self.cookies[reader.cookie];
        if reader.is_over() || matches!(reader.doing, Doing::Asleep { .. }) {
            return false;
        }
        match cookie.phase {
            Phase::Live => {}
            Phase::LookingUp | Phase::Publishing => return false,
            Phase::Idle | Phase::Failed | Phase::Withdrawing => {
                reader.doing = Doing::Failed(Errno::EIO);
                return true;
            }
        }
        if let Look::Ask { offset, len } = reader.look(&cookie.file) {
            let cookie = reader.cookie;
            let msg_id = self.push(cookie, Ask::Read { offset, len, reader: index });
            self.readers[index].doing = Doing::Asleep { msg_id };
        }
        true
    }

    /// Kills a reader; its request vanishes.
    pub fn kill(&mut self, index: usize) {
        let reader = &mut self.readers[index];
        if let Doing::Asleep { msg_id } = reader.doing {
            self.queue.take(msg_id);
        }
        if !reader.is_over() {
            reader.doing = Doing::Killed;
        }
    }

    /// All cookies.
    #[must_use]
    pub fn cookies(&self) -> &[Cookie] {
        &self.cookies
    }

    /// All readers.
    #[must_use]
    pub fn readers(&self) -> &[Reader] {
        &self.readers
    }

    /// Requests that were not completed.
    #[must_use]
    pub const fn queue(&self) -> &Queue {
        &self.queue
    }

    /// How its writes behave.
    #[must_use]
    pub const fn flavour(&self) -> &Flavour {
        &self.flavour
    }

    /// Anonymous fds that the daemon has not closed.
    #[must_use]
    pub fn open_fds(&self) -> usize {
        self.fds.len()
    }

    // The kernel's insides.

    fn push(&mut self, cookie: usize, ask: Ask) -> u32 {
        self.woken = true;
        self.queue.push(cookie, ask)
    }

    /// The cookie of an fd, unless the object was withdrawn since.
    fn live_cookie(&self, fd: u32) -> Option<usize> {
        let &(cookie, object) = self.fds.get(&fd)?;
        (self.cookies[cookie].object_id == object).then_some(cookie)
    }

    /// The next message to deliver. A READ of a closed object starts a re-opening instead.
    fn select(&mut self) -> Option<u32> {
        for (id, pending) in self.queue.undelivered() {
            if !matches!(pending.ask, Ask::Read { .. }) {
                return Some(id);
            }
            let cookie = &mut self.cookies[pending.cookie];
            match cookie.state {
                State::Close => {
                    cookie.state = State::Reopening;
                    cookie.reopen_queued = true;
                }
                State::Reopening => {}
                State::Open | State::Dropping => return Some(id),
            }
        }
        None
    }

    fn deliver_open(&mut self, id: u32, index: usize, fault: ReadFault) -> Result<Message, Errno> {
        let occupied = self.cookies[index].fd.is_some();
        if occupied || fault == ReadFault::NoDescriptor {
            self.queue.take(id);
            self.fail_open(index);
            // The next read(2) starts another attempt to open it again.
            self.cookies[index].state = if occupied { self.cookies[index].state } else { State::Close };
            return Err(if occupied { Errno::EEXIST } else { Errno::EMFILE });
        }
        let (fd, object) = (self.next_fd, self.next_object);
        self.next_fd += 1;
        self.next_object += 1;
        self.fds.insert(fd, (index, object));
        let cookie = &mut self.cookies[index];
        cookie.fd = Some(fd);
        cookie.object_id = object;
        Ok(Message::Open { msg_id: id, object, volume: cookie.volume, name: cookie.name.clone(), fd })
    }

    /// An OPEN ended badly: the first one spoils the mount, a later one leaves its READs waiting.
    fn fail_open(&mut self, index: usize) {
        let cookie = &mut self.cookies[index];
        if cookie.phase == Phase::LookingUp {
            cookie.phase = Phase::Failed;
        }
        if cookie.fd.is_none() {
            cookie.state = State::Close;
        }
    }

    /// A CLOSE was delivered or flushed: the object is withdrawn.
    fn finish_close(&mut self, id: u32, index: usize) {
        self.queue.take(id);
        self.withdraw(index);
    }

    /// Nothing can be asked of an object any more: its requests end with `EIO`, its fd means nothing.
    fn withdraw(&mut self, index: usize) {
        for id in self.queue.of_cookie(index) {
            if let Some(Ask::Read { reader, .. }) = self.queue.take(id).map(|pending| pending.ask) {
                self.readers[reader].doing = Doing::Failed(Errno::EIO);
            }
        }
        let cookie = &mut self.cookies[index];
        cookie.phase = Phase::Idle;
        cookie.state = State::Dropping;
        cookie.object_id = 0;
        cookie.fd = None;
        cookie.reopen_queued = false;
    }
}

#[cfg(test)]
mod tests;
