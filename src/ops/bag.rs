//! A bag: any number of descriptors in one, so that whoever can keep one keeps them all.
//!
//! It is one end of a pair of connected sockets. What is in it lies in that end's queue, as messages that carry the descriptors,
//! with the other end among them: who has the first end can look into the queue without taking anything out, and put other
//! things in. So the contents change, but the descriptor that is kept stays the same.
//!
//! ```text
//!   message:  | magic | generation | n of | all |  + up to 253 descriptors
//!   generation: the other end, a list of the labels (a memfd), then the descriptors in the order of the list
//! ```
//!
//! New contents are put behind the old ones as a generation of their own; then the old ones are taken out. What counts is the last
//! generation that is whole. So a process that is killed at any moment loses nothing, and no descriptor is ever only in a
//! process.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recv, recvmsg, setsockopt, socketpair};

use super::passing::send_all;
use crate::front::cachefiles::take_over;

/// What a message begins with; the last digit is the version of the layout.
const MAGIC: [u8; 8] = *b"INFILLB1";
/// Bytes of a message: the magic, the generation, its place, and how many there are.
const MESSAGE_BYTES: usize = 8 + 8 + 4 + 4;
/// Descriptors of a message (`SCM_MAX_FD`, include/net/scm.h).
const FDS_MAX: usize = 253;
/// Longest list of labels that is believed.
const LIST_MAX_BYTES: u64 = 64 << 20;

#[derive(Debug, Clone)]
struct PeekOffset;
// From where on a look into the queue sees something; each look moves it on by what it has seen.
nix::setsockopt_impl!(PeekOffset, libc::SOL_SOCKET, libc::SO_PEEK_OFF, usize, nix::sys::socket::sockopt::SetUsize);

/// A descriptor and what it is.
pub type Item = (Vec<u8>, OwnedFd);

/// See the module's description.
#[derive(Debug)]
pub struct Bag {
    /// To be kept: its queue has everything.
    kept: OwnedFd,
    /// What is sent here comes into that queue.
    other: OwnedFd,
    generation: u64,
    /// In the queue.
    messages: u64,
}

/// What a look into the queue has found of the generation that is being read.
#[derive(Default)]
struct Found {
    generation: u64,
    all: u32,
    n: u32,
    fds: Vec<OwnedFd>,
}

impl Bag {
    /// An empty one.
    ///
    /// # Errors
    /// No descriptors.
    pub fn new() -> io::Result<Self> {
        let (kept, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let mut bag = Self { kept, other, generation: 0, messages: 0 };
        bag.pack(&[])?;
        Ok(bag)
    }

    /// The one that was kept, and what is in it. Nothing is taken out of it.
    ///
    /// # Errors
    /// It is none, one of another version, or there are not enough descriptors.
    pub fn open(kept: OwnedFd) -> io::Result<(Self, Vec<Item>)> {
        // Another one may have looked into it, and been killed.
        setsockopt(&kept, PeekOffset, &0)?;
        let (mut whole, mut found, mut messages, mut generation) = (None, Found::default(), 0, 0);
        loop {
            let (message, fds) = match receive(kept.as_fd()) {
                Err(Errno::EAGAIN) => break,
                result => result?,
            };
            messages += 1;
            let (g, n, all) = parse(&message)?;
            generation = generation.max(g);
            if n == 0 {
                found = Found { generation: g, all, ..Found::default() };
            }
            if (found.generation, found.n) == (g, n) {
                found.n += 1;
                found.fds.extend(fds);
            }
            if found.n == found.all && found.n > 0 {
                whole = Some(std::mem::take(&mut found));
            }
        }
        let mut fds = whole.ok_or(io::ErrorKind::InvalidData)?.fds.into_iter();
        let (other, list) = fds.next().zip(fds.next()).ok_or(io::ErrorKind::InvalidData)?;
        let labels = read_list(File::from(list), fds.len())?;
        if labels.len() != fds.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((Self { kept, other, generation, messages }, labels.into_iter().zip(fds).collect()))
    }

    /// Makes `items` its contents, in the place of what it has.
    ///
    /// # Errors
    /// `ETOOMANYREFS`: more descriptors than RLIMIT_NOFILE are in sockets, without `CAP_SYS_RESOURCE`; `EAGAIN`: more than
    /// the socket's buffer has room for. It then has what it had.
    pub fn pack(&mut self, items: &[(Vec<u8>, BorrowedFd<'_>)]) -> io::Result<()> {
        let list = write_list(items.iter().map(|(label, _)| label.as_slice()))?;
        let fixed = [self.other.as_raw_fd(), list.as_raw_fd()];
        let fds: Vec<RawFd> = fixed.into_iter().chain(items.iter().map(|(_, fd)| fd.as_raw_fd())).collect();
        let (old, all) = (self.messages, u32::try_from(fds.len().div_ceil(FDS_MAX)).map_err(|_| io::ErrorKind::InvalidInput)?);
        // Also if it fails: part of it may lie in the queue.
        self.generation += 1;
        for (n, fds) in (0..).zip(fds.chunks(FDS_MAX)) {
            send_all(self.other.as_fd(), &message(self.generation, n, all), fds, MsgFlags::MSG_DONTWAIT)?;
            self.messages += 1;
        }
        for _ in 0..old {
            // Without room for descriptors: so the kernel lets go of them.
            recv(self.kept.as_raw_fd(), &mut [0; MESSAGE_BYTES], MsgFlags::MSG_DONTWAIT)?;
            self.messages -= 1;
        }
        Ok(())
    }
}

/// What is to be kept; the same for ever.
impl AsFd for Bag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.kept.as_fd()
    }
}

fn message(generation: u64, n: u32, all: u32) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(generation.to_ne_bytes());
    bytes.extend(n.to_ne_bytes());
    bytes.extend(all.to_ne_bytes());
    bytes
}

/// The generation of a message, its place in it, and how many there are.
fn parse(message: &[u8]) -> io::Result<(u64, u32, u32)> {
    let bad = io::ErrorKind::InvalidData;
    let fields = message.strip_prefix(&MAGIC).ok_or(bad)?;
    let (generation, fields) = fields.split_first_chunk().ok_or(bad)?;
    let (n, all) = fields.split_first_chunk().ok_or(bad)?;
    let all = all.first_chunk().ok_or(bad)?;
    Ok((u64::from_ne_bytes(*generation), u32::from_ne_bytes(*n), u32::from_ne_bytes(*all)))
}

/// The next message that was not looked at yet, and copies of its descriptors.
fn receive(socket: BorrowedFd<'_>) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
    let (mut bytes, mut control) = (vec![0; MESSAGE_BYTES], cmsg_space!([RawFd; FDS_MAX]));
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = loop {
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Err(Errno::EINTR) => {}
            result => break result?,
        }
    };
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // The kernel has just installed them for this message: nobody else owns them.
            fds.extend(raw.into_iter().filter_map(|raw| take_over(raw).ok()));
        }
    }
    let (len, flags) = (message.bytes, message.flags);
    bytes.truncate(len);
    // This process has not enough room for descriptors.
    if flags.contains(MsgFlags::MSG_CTRUNC) { Err(Errno::EMFILE) } else { Ok((bytes, fds)) }
}

/// A file with labels: each with its length before it.
fn write_list<'a>(labels: impl Iterator<Item = &'a [u8]>) -> io::Result<File> {
    let mut bytes = Vec::new();
    for label in labels {
        bytes.extend(u32::try_from(label.len()).map_err(|_| io::ErrorKind::InvalidInput)?.to_ne_bytes());
        bytes.extend(label);
    }
    let mut file = File::from(memfd_create("infill-bag", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&bytes)?;
    Ok(file)
}

/// The labels of so many descriptors; there are no more.
fn read_list(mut file: File, count: usize) -> io::Result<Vec<Vec<u8>>> {
    let (mut bytes, mut labels) = (Vec::new(), Vec::new());
    file.rewind()?;
    file.take(LIST_MAX_BYTES).read_to_end(&mut bytes)?;
    let mut rest = bytes.as_slice();
    while let Some((len, after)) = rest.split_first_chunk() {
        let label = after.split_at_checked(usize::try_from(u32::from_ne_bytes(*len)).unwrap_or(usize::MAX));
        let (label, after) = label.filter(|_| labels.len() < count).ok_or(io::ErrorKind::InvalidData)?;
        labels.push(label.to_vec());
        rest = after;
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::fstat;

    fn files(n: usize) -> Vec<(Vec<u8>, File)> {
        (0..n).map(|n| (format!("label {n}").into_bytes(), tempfile::tempfile().unwrap())).collect()
    }

    fn borrowed(files: &[(Vec<u8>, File)]) -> Vec<(Vec<u8>, BorrowedFd<'_>)> {
        files.iter().map(|(label, file)| (label.clone(), file.as_fd())).collect()
    }

    /// What somebody finds who has the bag alone.
    fn look(bag: &Bag) -> Vec<(Vec<u8>, u64)> {
        let (_, items) = Bag::open(bag.as_fd().try_clone_to_owned().unwrap()).unwrap();
        items.into_iter().map(|(label, fd)| (label, fstat(fd).unwrap().st_ino)).collect()
    }

    fn inodes(files: &[(Vec<u8>, File)]) -> Vec<(Vec<u8>, u64)> {
        files.iter().map(|(label, file)| (label.clone(), fstat(file).unwrap().st_ino)).collect()
    }

    #[test]
    fn contents_are_found_by_who_has_the_one_descriptor_as_often_as_they_are_looked_for() {
        let mut bag = Bag::new().unwrap();
        assert_eq!(look(&bag), []);
        for n in [1, 2, FDS_MAX - 2, FDS_MAX - 1, 2 * FDS_MAX] {
            let files = files(n);
            bag.pack(&borrowed(&files)).unwrap();
            assert_eq!(look(&bag), inodes(&files));
            assert_eq!(look(&bag), inodes(&files));
            let kept = bag.as_fd().try_clone_to_owned().unwrap();
            drop(bag);
            bag = Bag::open(kept).unwrap().0;
        }
        assert_eq!(bag.messages, 3, "old contents are gone");
    }

    /// Whoever packs can be killed between any two messages: then the old contents count, or the new ones.
    #[test]
    fn half_a_generation_at_either_end_changes_nothing() {
        let (old, new) = (files(2 * FDS_MAX), files(1));
        let mut bag = Bag::new().unwrap();
        bag.pack(&borrowed(&old)).unwrap();
        let (other, fd) = (bag.other.as_fd(), new[0].1.as_raw_fd());
        send_all(other, &message(bag.generation + 1, 0, 2), &[other.as_raw_fd(), fd], MsgFlags::MSG_DONTWAIT).unwrap();
        assert_eq!(look(&bag), inodes(&old));
        let mut bag = Bag::open(bag.as_fd().try_clone_to_owned().unwrap()).unwrap().0;
        bag.pack(&borrowed(&old)).unwrap();
        assert_eq!((look(&bag), bag.messages), (inodes(&old), 3));
        // Killed while old contents are taken out.
        let list = write_list([b"label 0".as_slice()].into_iter()).unwrap();
        let fds = [bag.other.as_raw_fd(), list.as_raw_fd(), fd];
        send_all(bag.other.as_fd(), &message(bag.generation + 1, 0, 1), &fds, MsgFlags::MSG_DONTWAIT).unwrap();
        for _ in 0..3 {
            assert_eq!(look(&bag), inodes(&new));
            recv(bag.kept.as_raw_fd(), &mut [0; MESSAGE_BYTES], MsgFlags::MSG_DONTWAIT).unwrap();
        }
        assert_eq!(look(&bag), inodes(&new));
    }

    #[test]
    fn what_is_in_it_lives_as_long_as_it_does() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let mut bag = Bag::new().unwrap();
        bag.pack(&[(b"p".to_vec(), write.as_fd())]).unwrap();
        drop(write);
        let kept = bag.as_fd().try_clone_to_owned().unwrap();
        drop(bag);
        nix::unistd::write(&Bag::open(kept.try_clone().unwrap()).unwrap().1[0].1, b"x").unwrap();
        drop(kept);
        let mut text = Vec::new();
        File::from(read).read_to_end(&mut text).unwrap();
        assert_eq!(text, b"x");
    }

    #[test]
    fn what_is_no_bag_is_said_so() {
        assert!(Bag::open(tempfile::tempfile().unwrap().into()).is_err());
        let (kept, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let open = || Bag::open(kept.try_clone().unwrap()).unwrap_err().kind();
        assert_eq!(open(), io::ErrorKind::InvalidData);
        send_all(other.as_fd(), b"something else", &[other.as_raw_fd()], MsgFlags::MSG_DONTWAIT).unwrap();
        assert_eq!(open(), io::ErrorKind::InvalidData);
    }
}
