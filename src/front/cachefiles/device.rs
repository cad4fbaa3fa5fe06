//! The bound device: messages in, answers out.
//!
//! One thread calls [`FrontEnd::parse`]; answers may come from any. An engine that closes a sink early, to save
//! descriptors, drops its last clone on the thread that calls `parse`, and before it reads: the kernel hands out a
//! READ only once, and one that it handed out just before the close cannot be answered any more.
//!
//! Even so the kernel may hand one out after the close: for it the object is open as long as anybody refers to the
//! descriptor's file, and a worker of io_uring does for a moment after it has reported a write. Such a READ is lost,
//! until `restore` makes the kernel hand everything unanswered out again, by which time the object is closed and is
//! opened anew. READs that are being answered come twice then, which does no harm; an OPEN must not
//! (`EEXIST` would fail it for good), so before that all OPENs are answered, and nothing is read.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::bind::{self, BindError, BindOptions, Bound};
use super::command;
use super::counters::{Counters, Counts};
use super::object::{self, Objects};
use super::wire::{self, Body, Header, Message, WireError};
use crate::front::{
    Answer, Caps, Found, FrontEnd, FrontError, MESSAGE_MAX_BYTES, NeedRequest, ObjectId, OpenRequest, Outcome, Request, Ticket,
};
use crate::key::Key;
use crate::range::{self, ByteRange};

/// Smallest alignment of writes, whatever the page size: `CACHEFILES_DIO_BLOCK_SIZE`.
const ALIGN_MIN_BYTES: u64 = 4096;
/// Pause before the kernel is asked for lost READs again: what still refers to a closed descriptor ends soon.
const RESTORE_PAUSE: Duration = Duration::from_millis(10);
const _: () = assert!(wire::MSG_MAX_BYTES <= MESSAGE_MAX_BYTES, "the kernel refuses a shorter read");

/// `/dev/cachefiles`, bound in on-demand mode. Dropping it closes the device, and with that every mounted
/// image fails, unless somebody else keeps it open ([`crate::ops::keep`]); tickets of unanswered OPENs do for a while.
pub struct Device {
    devnode: Arc<Devnode>,
    objects: Objects,
    counters: Arc<Counters>,
    caps: Caps,
    /// When a READ was lost that `restore` is to bring back. Only the thread that reads uses it.
    lost_at: Mutex<Option<Instant>>,
}

/// The open device, as OPENs are answered through it.
struct Devnode {
    fd: OwnedFd,
    counters: Arc<Counters>,
    /// OPENs that were read and have no answer.
    unanswered: AtomicU64,
}

impl Device {
    /// Opens the device and makes a cache of the directory.
    ///
    /// # Errors
    /// See [`BindError`]; nothing is left open then.
    pub fn bind(options: &BindOptions) -> Result<Arc<Self>, BindError> {
        bind::bind(options).map(Self::new)
    }

    /// Goes on with a device that another process has bound to the same directory, and gets again what that one left
    /// unanswered. `noted` says what is known of its directory, for messages.
    ///
    /// # Errors
    /// See [`BindError`]. The device is closed then; whoever kept it still has it.
    pub fn take_over(devnode: OwnedFd, options: &BindOptions, noted: &str) -> Result<Arc<Self>, BindError> {
        bind::take_over(devnode, options, noted).map(Self::new)
    }

    /// `bound.devnode` must be the kernel's device, or a test's stand-in that is as careful: a descriptor
    /// number in a message belongs to the device from then on.
    fn new(bound: Bound) -> Arc<Self> {
        let counters = Arc::<Counters>::default();
        Arc::new(Self {
            devnode: Arc::new(Devnode { fd: bound.devnode, counters: Arc::clone(&counters), unanswered: AtomicU64::new(0) }),
            objects: Objects::default(),
            counters,
            caps: Caps { align_bytes: range::page_bytes().max(ALIGN_MIN_BYTES), reopens: bound.reopens, ..Caps::default() },
            lost_at: Mutex::default(),
        })
    }

    /// What went wrong so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counters.snapshot()
    }

    /// Gives the kernel a command that is no answer. It takes one at a time: a slow one delays answers to OPENs.
    pub(super) fn command(&self, command: &[u8]) -> Result<(), Errno> {
        command::give(self.devnode.fd.as_fd(), command)
    }

    /// What a failed read of the device means.
    fn unread(&self, errno: Errno) -> Result<Option<Request>, FrontError> {
        match errno {
            Errno::EAGAIN | Errno::EINTR => Ok(None),
            Errno::EMFILE | Errno::ENFILE => {
                self.counters.lost_opens.bump();
                Err(FrontError::OutOfDescriptors(errno))
            }
            // These fail the one OPEN that was to be delivered (cachefiles_ondemand_get_fd).
            Errno::EEXIST | Errno::ENOMEM => {
                self.counters.lost_opens.bump();
                Err(FrontError::Malformed(format!("an OPEN was lost, because the kernel could not make its descriptor: {errno}")))
            }
            errno => Err(FrontError::Broken(errno.into())),
        }
    }

    fn open(&self, msg_id: u32, object: u32, key: Key, sink: OwnedFd) -> Request {
        let sink = self.objects.insert(object, sink, &self.counters);
        Request::Open(OpenRequest { object: ObjectId(object), key, ticket: self.open_ticket(msg_id), sink })
    }

    fn open_ticket(&self, msg_id: u32) -> Ticket {
        self.devnode.unanswered.fetch_add(1, Ordering::Relaxed);
        Ticket::new(Arc::clone(&self.devnode) as Arc<dyn Answer>, msg_id.into())
    }

    fn need(&self, msg_id: u32, object: u32, range: ByteRange) -> Result<Option<Request>, FrontError> {
        if let Some(answer) = self.objects.get(object) {
            let ticket = Ticket::new(answer, msg_id.into());
            return Ok(Some(Request::Need(NeedRequest { object: ObjectId(object), range, ticket })));
        }
        if !self.caps.reopens {
            return Err(self.unknown_object(msg_id, object));
        }
        self.counters.unknown_objects.bump();
        *self.lost() = Some(Instant::now());
        Ok(None)
    }

    fn lost(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.lost_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A READ that has no descriptor of its own, where the kernel has no `restore`. Kernels before 6.1.101, 6.6.42 and
    /// 6.9.11 let any descriptor complete it; later ones refuse, and it waits until its object is opened again.
    fn unknown_object(&self, msg_id: u32, object: u32) -> FrontError {
        self.counters.unknown_objects.bump();
        let completed = match self.objects.any() {
            Some(other) => object::read_complete(other.as_fd(), msg_id),
            None => Err(Errno::EBADF),
        };
        let end = match completed {
            Ok(()) => "its reader gets EIO".to_owned(),
            Err(errno) => {
                format!("no other descriptor could complete it ({errno}): kill its reader")
            }
        };
        FrontError::Malformed(format!("READ {msg_id} of {}, which has no open descriptor: {end}", ObjectId(object)))
    }

    /// The request in a message.
    fn understand(&self, bytes: &[u8]) -> Result<Option<Request>, FrontError> {
        // The descriptor first: whatever else the message holds, this must not leak.
        let sink = wire::open_fd(bytes).and_then(|raw| object::take_over(raw).ok());
        let Message { msg_id, object_id, body } = match wire::parse(bytes) {
            Ok(message) => message,
            Err(why) => return Err(self.refuse(bytes, sink, why)),
        };
        let request = match body {
            Body::Open { key, fd } => match sink {
                Some(sink) => self.open(msg_id, object_id, key, sink),
                None => {
                    let why = WireError::Descriptor(fd.cast_unsigned());
                    return Err(self.refuse(bytes, None, why));
                }
            },
            Body::Read(range) => return self.need(msg_id, object_id, range),
            Body::Close => {
                self.objects.remove(object_id);
                Request::Close(ObjectId(object_id))
            }
        };
        Ok(Some(request))
    }

    /// Refuses a message that made no sense, as far as it can be told what it was. `sink` is what it brought: an
    /// OPEN must be answered before its descriptor is closed.
    fn refuse(&self, bytes: &[u8], sink: Option<OwnedFd>, why: WireError) -> FrontError {
        self.counters.malformed.bump();
        let Some(header) = Header::parse(bytes) else {
            return FrontError::Malformed(why.to_string());
        };
        let (msg_id, object) = (header.msg_id, header.object_id);
        let ticket = if header.is_open() {
            Some(self.open_ticket(msg_id))
        } else if header.is_read() {
            let answer = self.objects.get(object);
            answer.map(|answer| Ticket::new(answer, msg_id.into()))
        } else {
            None
        };
        // A refusal of the refusal would say no more than the message itself does.
        let _ = ticket.map(|ticket| ticket.answer(Outcome::Failed(Errno::EINVAL)));
        drop(sink);
        FrontError::Malformed(format!("request {msg_id} of {}: {why}", ObjectId(object)))
    }
}

impl FrontEnd for Device {
    fn name(&self) -> &'static str {
        "cachefiles"
    }

    fn caps(&self) -> Caps {
        self.caps
    }

    fn requests(&self) -> BorrowedFd<'_> {
        self.devnode.fd.as_fd()
    }

    fn parse(&self, read: Result<&[u8], Errno>, requests: &mut Vec<Request>) -> Result<Found, FrontError> {
        let (found, request) = match read {
            // Not the end of anything: it also follows a wake-up for an object that must be opened again first.
            Ok([]) => (Found::Nothing, None),
            // There may be more behind it, also where it is a READ that nobody can answer; and that one is to be settled soon.
            Ok(bytes) => (Found::Part, self.understand(bytes)?),
            Err(errno) => (Found::Nothing, self.unread(errno)?),
        };
        requests.extend(request);
        Ok(found)
    }

    fn settle(&self) -> bool {
        let mut lost_at = self.lost();
        let Some(at) = *lost_at else { return true };
        if at.elapsed() < RESTORE_PAUSE || self.devnode.unanswered.load(Ordering::Acquire) > 0 {
            return false;
        }
        // If the kernel refuses, reading the device will say why.
        let _ = self.command(b"restore");
        *lost_at = None;
        true
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("caps", &self.caps).field("counts", &self.counts()).finish_non_exhaustive()
    }
}

impl Answer for Devnode {
    /// Answers the OPEN `token` with `copen`.
    fn answer(&self, token: u64, outcome: Outcome) -> io::Result<bool> {
        let msg_id = u32::try_from(token).map_err(|_| Errno::EINVAL)?;
        let opened = match outcome {
            Outcome::Opened { len_bytes } => command::copen(msg_id, len_bytes).ok_or(Errno::EFBIG),
            Outcome::Failed(errno) => Ok(command::refuse(msg_id, errno)),
            Outcome::Done => Err(Errno::EINVAL),
        };
        // An answer that cannot be given is an error, but the kernel still must hear something.
        let refused = opened.as_ref().err().copied();
        let command = opened.unwrap_or_else(|errno| command::refuse(msg_id, errno));
        let given = command::give(self.fd.as_fd(), command.as_bytes());
        self.unanswered.fetch_sub(1, Ordering::Release);
        let wanted = match given {
            Err(Errno::EINVAL) => {
                self.counters.late_answers.bump();
                false
            }
            result => result.map(|()| true)?,
        };
        refused.map_or(Ok(wanted), |errno| Err(errno.into()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::{AsRawFd, IntoRawFd};

    use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

    use super::*;

    /// The kernel's end of a stand-in for the device: it keeps the borders between messages, too.
    pub(in super::super) struct Kernel(OwnedFd);

    pub(in super::super) fn device() -> (Arc<Device>, Kernel) {
        device_that(true)
    }

    fn device_that(reopens: bool) -> (Arc<Device>, Kernel) {
        let (devnode, kernel) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC).unwrap();
        (Device::new(Bound { devnode, reopens }), Kernel(kernel))
    }

    impl Kernel {
        fn send(&self, bytes: &[u8]) {
            let sent = send(self.0.as_raw_fd(), bytes, MsgFlags::empty());
            assert_eq!(sent, Ok(bytes.len()));
        }

        fn message(&self, msg_id: u32, object_id: u32, body: Body) {
            self.send(&wire::encode(&Message { msg_id, object_id, body }));
        }

        fn open(&self, msg_id: u32, object_id: u32) {
            let fd = memfd_create(c"object", MFdFlags::empty()).unwrap();
            let (fd, key) = (fd.into_raw_fd(), Key::new(b"dom", b"blob"));
            self.message(msg_id, object_id, Body::Open { fd, key });
        }

        pub(in super::super) fn command(&self) -> String {
            let mut buffer = [0; command::COMMAND_MAX_BYTES];
            let len = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
            str::from_utf8(&buffer[..len]).unwrap().to_owned()
        }
    }

    fn next_open(device: &Device) -> OpenRequest {
        match device.next().unwrap() {
            Some(Request::Open(open)) => open,
            other => panic!("no open: {other:?}"),
        }
    }

    fn next_need(device: &Device) -> NeedRequest {
        match device.next().unwrap() {
            Some(Request::Need(need)) => need,
            other => panic!("no need: {other:?}"),
        }
    }

    fn malformed(device: &Device) -> String {
        match device.next() {
            Err(FrontError::Malformed(why)) => why,
            other => panic!("not malformed: {other:?}"),
        }
    }

    #[test]
    fn an_open_is_delivered_and_answered() {
        let (device, kernel) = device();
        assert!(device.next().unwrap().is_none());
        kernel.open(0, 1);
        let open = next_open(&device);
        assert_eq!(open.object, ObjectId(1));
        assert_eq!(open.key, Key::new(b"dom", b"blob"));
        let flags = fcntl(&open.sink, FcntlArg::F_GETFD).unwrap();
        assert_eq!(FdFlag::from_bits_retain(flags), FdFlag::FD_CLOEXEC);
        let status = OFlag::from_bits_retain(fcntl(&open.sink, FcntlArg::F_GETFL).unwrap());
        assert!(!status.contains(OFlag::O_NONBLOCK));
        assert_eq!(Arc::strong_count(&open.sink), 1, "the engine decides when it closes");
        let len_bytes = 1 << 40;
        open.ticket.answer(Outcome::Opened { len_bytes }).unwrap();
        assert_eq!(kernel.command(), "copen 0,1099511627776");
        assert!(device.next().unwrap().is_none());
    }

    #[test]
    fn an_answer_that_cannot_be_given_becomes_a_refusal() {
        let (device, kernel) = device();
        for (outcome, command) in [(Outcome::Opened { len_bytes: u64::MAX }, "copen 7,-27"), (Outcome::Done, "copen 7,-22")] {
            kernel.open(7, 1);
            next_open(&device).ticket.answer(outcome).unwrap_err();
            assert_eq!(kernel.command(), command);
        }
        kernel.open(8, 2);
        let refused = Outcome::Failed(Errno::ENOENT);
        next_open(&device).ticket.answer(refused).unwrap();
        assert_eq!(kernel.command(), "copen 8,-2");
    }

    #[test]
    fn a_read_is_answered_through_its_own_object() {
        let (device, kernel) = device();
        kernel.open(1, 5);
        let OpenRequest { sink, ticket, .. } = next_open(&device);
        ticket.answer(Outcome::Opened { len_bytes: 1 }).unwrap();
        kernel.message(2, 5, Body::Read(4096..8192));
        let need = next_need(&device);
        assert_eq!((need.object, need.range), (ObjectId(5), 4096..8192));
        assert_eq!(Arc::strong_count(&sink), 2, "open until the READ is answered");
        // The stand-in does not know the ioctl, and that is not hidden.
        let error = need.ticket.answer(Outcome::Done).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ENOTTY as i32));
        assert_eq!(Arc::strong_count(&sink), 1);
        assert_eq!(device.counts(), Counts::default());
    }

    #[test]
    fn a_read_of_a_closed_descriptor_is_asked_for_again_when_no_open_is_unanswered() {
        let (device, kernel) = device();
        kernel.open(1, 5);
        let OpenRequest { sink, ticket, .. } = next_open(&device);
        ticket.answer(Outcome::Opened { len_bytes: 1 }).unwrap();
        assert_eq!(kernel.command(), "copen 1,1");
        drop(sink);
        let read = wire::encode(&Message { msg_id: 2, object_id: 5, body: Body::Read(0..4096) });
        let mut requests = Vec::new();
        assert_eq!(device.parse(Ok(&read), &mut requests).unwrap(), Found::Part, "whoever sees the end does not settle");
        assert!(requests.is_empty());
        // Delivered behind it in the same batch.
        kernel.open(3, 6);
        let open = next_open(&device);
        std::thread::sleep(RESTORE_PAUSE);
        assert!(!device.settle(), "an open is unanswered");
        open.ticket.answer(Outcome::Opened { len_bytes: 1 }).unwrap();
        assert_eq!(kernel.command(), "copen 3,1");
        assert!(device.settle() && device.settle());
        assert_eq!(kernel.command(), "restore");
        assert_eq!(device.counts(), Counts { unknown_objects: 1, ..Counts::default() });
        kernel.message(4, 7, Body::Read(0..4096));
        assert!(device.next().unwrap().is_none());
        assert!(!device.settle(), "what holds the descriptor has had no time to end");
    }

    #[test]
    fn reads_and_closes_of_unknown_objects_are_survived() {
        let (device, kernel) = device_that(false);
        kernel.message(2, u32::MAX, Body::Read(0..4096));
        assert_eq!(
            malformed(&device),
            "READ 2 of object 4294967295, which has no open descriptor: no other descriptor could complete it (EBADF: Bad file number): kill its reader"
        );
        kernel.open(1, 5);
        let open = next_open(&device);
        kernel.message(3, 6, Body::Read(0..4096));
        assert!(malformed(&device).contains("ENOTTY"));
        for object in [u32::MAX, 5, 5] {
            kernel.message(4, object, Body::Close);
            let closed = device.next().unwrap();
            assert!(matches!(closed, Some(Request::Close(ObjectId(id))) if id == object), "{closed:?}");
        }
        kernel.message(5, 5, Body::Read(0..4096));
        assert!(malformed(&device).contains("object 5"));
        open.ticket.answer(Outcome::Failed(Errno::EIO)).unwrap();
        assert_eq!(device.counts().unknown_objects, 3);
    }

    #[test]
    fn a_senseless_open_is_refused_and_its_descriptor_closed() {
        let (device, kernel) = device();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (fd, key) = (writer.into_raw_fd(), Key::new(b"dom", b"blob"));
        let mut bytes = wire::encode(&Message { msg_id: 9, object_id: 1, body: Body::Open { fd, key } });
        // A cookie key that is said to be longer than the message.
        bytes[20] = 0xff;
        kernel.send(&bytes);
        assert!(malformed(&device).contains("cookie key of 255 bytes"));
        assert_eq!(kernel.command(), "copen 9,-22");
        // The end of the pipe comes when no writer is left.
        assert_eq!(File::from(reader).read(&mut [0]).unwrap(), 0);
        kernel.message(10, 1, Body::Read(0..4096));
        assert!(matches!(device.next(), Ok(None)), "it is asked for again");
        assert_eq!((device.counts().malformed, device.counts().unknown_objects), (1, 1));
    }

    #[test]
    fn an_open_whose_descriptor_does_not_exist_is_refused() {
        let (device, kernel) = device();
        let (fd, key) = (i32::MAX, Key::new(b"dom", b"blob"));
        kernel.message(9, 1, Body::Open { fd, key });
        assert_eq!(malformed(&device), "request 9 of object 1: there is no descriptor 2147483647");
        assert_eq!(kernel.command(), "copen 9,-22");
    }

    #[test]
    fn fault_noise_is_refused_and_does_not_stop_the_next_message() {
        let (device, kernel) = device();
        for noise in [&[0xff][..], &[0xff; 16], &[0xff; wire::MSG_MAX_BYTES]] {
            kernel.send(noise);
            malformed(&device);
        }
        kernel.open(1, 1);
        next_open(&device).ticket.answer(Outcome::Opened { len_bytes: 0 }).unwrap();
        assert_eq!(kernel.command(), "copen 1,0");
        assert_eq!(device.counts().malformed, 3);
    }
}
