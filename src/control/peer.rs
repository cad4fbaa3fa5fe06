//! Who asks: the kernel says it of the other end of a unix socket, as of when that was connected.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::geteuid;

/// What a user or group of another user namespace is seen as if it has no number in ours (`overflowuid`, kernel/sys.c). So it
/// is nobody in particular, also for a daemon that runs as that user.
const OVERFLOW_ID: u32 = 65_534;
/// Groups of a process that are looked at; more than that has no user we know of (the kernel allows 65,536).
const GROUPS_MAX: usize = 1024;

/// The process at the other end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its groups, all of them.
    pub groups: Vec<u32>,
}

/// Who may do more than look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    own: u32,
    group: Option<u32>,
}

impl Peer {
    /// Who has the other end of a unix socket.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn of(socket: &(impl AsFd + AsRawFd)) -> io::Result<Self> {
        let told = getsockopt(socket, PeerCredentials)?;
        // Who is in too many groups to be told counts as himself.
        let mut groups = more_groups(socket).unwrap_or_default();
        groups.push(told.gid());
        Ok(Self { uid: told.uid(), groups })
    }
}

/// Supplementary groups.
fn more_groups(socket: &impl AsRawFd) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; GROUPS_MAX];
    let mut len = u32::try_from(size_of_val(&groups[..])).unwrap_or(u32::MAX);
    // SAFETY: the descriptor is open while borrowed; the kernel writes at most `len` bytes, which the vector has, and any bytes
    // are numbers.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERGROUPS, groups.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(result)?;
    groups.truncate(usize::try_from(len).unwrap_or(0) / size_of::<u32>());
    Ok(groups)
}

impl Access {
    /// Root, this process's user, and members of `group`.
    #[must_use]
    pub fn new(group: Option<u32>) -> Self {
        Self { own: geteuid().as_raw(), group }
    }

    /// Whether a client may do more than look.
    #[must_use]
    pub fn may_change(&self, peer: &Peer) -> bool {
        let is_own = peer.uid == self.own && peer.uid != OVERFLOW_ID;
        let is_member = self.group.is_some_and(|group| group != OVERFLOW_ID && peer.groups.contains(&group));
        peer.uid == 0 || is_own || is_member
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_kernel_says_who_asks_and_nobody_in_particular_may_do_nothing() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let me = Peer::of(&ours).unwrap();
        assert_eq!(me.uid, geteuid().as_raw());
        let mut groups: Vec<_> = nix::unistd::getgroups().unwrap().iter().map(|group| group.as_raw()).collect();
        groups.push(nix::unistd::getegid().as_raw());
        assert!(groups.iter().all(|group| me.groups.contains(group)), "{me:?} {groups:?}");
        let peer = |uid, group| Peer { uid, groups: vec![7, group] };
        let of = |own, group| Access { own, group };
        assert!(of(5, None).may_change(&peer(0, 1)) && of(5, None).may_change(&peer(5, 1)) && of(5, Some(9)).may_change(&peer(6, 9)));
        assert!(!of(5, None).may_change(&peer(6, 9)) && !of(5, Some(9)).may_change(&peer(6, 8)));
        assert!(!of(OVERFLOW_ID, Some(OVERFLOW_ID)).may_change(&peer(OVERFLOW_ID, OVERFLOW_ID)));
    }
}
