//! Objects: their anonymous descriptors, and how a READ of one is completed.
//!
//! The kernel completes a READ only through a descriptor of the same object, and a READ that it has handed
//! out once does not come again. So a descriptor must outlive the READs that wait for it: each of them holds
//! its [`Object`], also when the engine has let go of it. The descriptor is never duplicated, because every
//! duplicate keeps the kernel's object and the whole cache alive.
//!
//! All `unsafe` of this front end is in this file.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::counters::Counters;
use crate::front::{Answer, Outcome, Sink};

/// Objects in a table before it looks for dead ones.
const PRUNE_MIN_OBJECTS: usize = 64;

mod sys {
    #![allow(missing_docs, reason = "made by a macro")]
    // CACHEFILES_IOC_READ_COMPLETE, _IOW(0x98, 1, int): 0x40049801 (include/uapi/linux/cachefiles.h). The
    // number says "pointer to int", yet the argument is the request's id itself.
    nix::ioctl_write_int!(read_complete, 0x98, 1);
}

/// Takes over the descriptor that the kernel installed for an OPEN, and sets `FD_CLOEXEC`, which the kernel
/// does not: a descriptor that leaks into a child keeps the cache bound. `O_NONBLOCK` stays off.
///
/// The caller must have `raw` from a message that the kernel has just handed to this process, or from who started
/// it, and must pass it only once: nobody else owns it then.
///
/// # Errors
/// `EBADF`: there is no such descriptor; nothing was taken.
pub(crate) fn take_over(raw: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel installed this number in our table for this message alone and tells nobody else, so
    // it is ours to own; the wire module gives no negative number.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    if let Err(errno) = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        // Not open, so not ours to close.
        let _ = fd.into_raw_fd();
        return Err(errno);
    }
    Ok(fd)
}

/// Ends one READ of the object behind `fd`: its reader wakes and looks for the data.
///
/// # Errors
/// `EINVAL`: the object has no such READ, which is normal when the reader was killed or the object closed.
pub(super) fn read_complete(fd: BorrowedFd<'_>, msg_id: u32) -> Result<(), Errno> {
    // SAFETY: `fd` is open while it is borrowed, and the argument is a plain number: the kernel follows no
    // pointer, whatever kind of file this is (`_IOW(0x98, 1)` is cachefiles' own).
    unsafe { sys::read_complete(fd.as_raw_fd(), msg_id.into()) }.map(drop)
}

/// One object, and its descriptor. Each of its unanswered READs holds a clone, so it is closed when the engine has
/// let go of it and the last READ is answered.
pub(super) struct Object {
    fd: OwnedFd,
    counters: Arc<Counters>,
}

impl Sink for Object {}

impl AsFd for Object {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Object").field(&self.fd).finish()
    }
}

impl Answer for Object {
    /// Completes the READ `token`. There is no way to tell the kernel of a failure other than to complete a
    /// READ whose data is not there: its reader looks, finds a hole, and gets `EIO`.
    fn answer(&self, token: u64, _outcome: Outcome) -> io::Result<bool> {
        let msg_id = u32::try_from(token).map_err(|_| Errno::EINVAL)?;
        match read_complete(self.as_fd(), msg_id) {
            Err(Errno::EINVAL) => {
                self.counters.late_answers.bump();
                Ok(false)
            }
            result => Ok(result.map(|()| true)?),
        }
    }
}

/// The open objects by the kernel's id. Only the thread that reads the device uses it, so its lock is free.
#[derive(Default)]
pub(super) struct Objects(Mutex<Table>);

#[derive(Default)]
struct Table {
    by_id: HashMap<u32, Weak<Object>>,
    /// Size at which dead ones are looked for: an object whose descriptor we closed ourselves gets no CLOSE.
    prune_at: usize,
}

impl Objects {
    /// Adds an object that the kernel has just opened. It lives as long as somebody holds it.
    pub(super) fn insert(&self, id: u32, fd: OwnedFd, counters: &Arc<Counters>) -> Arc<Object> {
        let object = Arc::new(Object { fd, counters: Arc::clone(counters) });
        let mut table = lock(&self.0);
        if table.by_id.len() >= table.prune_at.max(PRUNE_MIN_OBJECTS) {
            table.by_id.retain(|_, object| object.strong_count() > 0);
            table.prune_at = table.by_id.len() * 2;
        }
        table.by_id.insert(id, Arc::downgrade(&object));
        object
    }

    /// The object, to answer READs of it with; `None` if it is unknown or its descriptor is closed.
    pub(super) fn get(&self, id: u32) -> Option<Arc<Object>> {
        lock(&self.0).by_id.get(&id)?.upgrade()
    }

    /// Forgets an object, if it is known.
    pub(super) fn remove(&self, id: u32) {
        lock(&self.0).by_id.remove(&id);
    }

    /// Any object that is open.
    pub(super) fn any(&self) -> Option<Arc<Object>> {
        lock(&self.0).by_id.values().find_map(Weak::upgrade)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        lock(&self.0).by_id.len()
    }
}

/// A panic ends the process, so what a lock guards is never half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::ffi::c_int;
    use std::fs::File;

    use super::*;

    #[test]
    fn the_ioctl_has_the_number_of_the_kernel_header() {
        assert_eq!(nix::request_code_write!(0x98, 1, size_of::<c_int>()), 0x4004_9801);
    }

    #[test]
    fn a_descriptor_that_is_not_there_is_not_taken() {
        // Far above what a test process opens, and below every limit on numbers.
        assert_eq!(take_over(RawFd::MAX).unwrap_err(), Errno::EBADF);
    }

    fn sink() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_sink_stays_open_until_its_last_read_is_answered() {
        let objects = Objects::default();
        let object = objects.insert(5, sink(), &Arc::default());
        let watch = Arc::downgrade(&object);
        let (first, second) = (objects.get(5).unwrap(), objects.get(5).unwrap());
        drop(object);
        objects.remove(5);
        // Not a cachefiles descriptor, so the kernel refuses; that is not hidden.
        let refused = first.answer(1, Outcome::Done).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::ENOTTY as i32));
        drop(first);
        assert_eq!(watch.strong_count(), 1);
        assert!(second.answer(2, Outcome::Failed(Errno::EIO)).is_err());
        drop(second);
        assert_eq!(watch.strong_count(), 0);
    }

    #[test]
    fn closed_objects_are_unknown_and_do_not_pile_up() {
        let objects = Objects::default();
        let _kept = objects.insert(0, sink(), &Arc::default());
        for id in 1..1000 {
            drop(objects.insert(id, sink(), &Arc::default()));
            assert!(objects.get(id).is_none());
            assert!(objects.len() <= PRUNE_MIN_OBJECTS);
        }
        assert!(objects.get(0).is_some());
    }
}
