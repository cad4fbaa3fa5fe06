//! The sockets: bound by us, or passed by systemd. To be had before anything is taken from the kernel, so that a daemon which
//! cannot have them leaves nothing half started.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, open};
use nix::sys::socket::sockopt::AcceptConn;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, bind as bind_to, connect, getsockname, getsockopt,
    listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::Group;

use crate::ops::exit;

/// Only the daemon's own user, and root.
const OWN_MODE: u32 = 0o600;
/// Also a group.
const GROUP_MODE: u32 = 0o660;
/// Whoever reaches it.
const ALL_MODE: u32 = 0o666;
/// Permissions by which others than its owner reach what is in a directory.
const ENTERED_BY_OTHERS: u32 = 0o011;
/// How long another daemon may take to make its socket in the same directory.
const LOCK_MAX: Duration = Duration::from_secs(5);
/// Pause between two tries.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// A socket on which clients connect.
#[derive(Debug)]
pub enum Listener {
    /// On this host, who is known.
    Unix(UnixListener),
    /// From wherever the address can be reached.
    Tcp(TcpListener),
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens.
    #[error("another process answers on {}: stop it, or name another {setting}", path.display())]
    InUse {
        /// Which setting says where.
        setting: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// Somebody listens.
    #[error("{setting} = {address}: the port is in use; stop who has it (ss -ltnp), or name another one")]
    PortInUse {
        /// Which setting says where.
        setting: &'static str,
        /// Where.
        address: SocketAddr,
    },
    /// Something else is there.
    #[error("{setting} = {}: there is a file that is no socket; remove it, or name another path", path.display())]
    NoSocket {
        /// Which setting says where.
        setting: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// The path cannot be that of a socket.
    #[error("{setting} = {}: a socket's path is at most 107 bytes long; name a shorter one", path.display())]
    TooLong {
        /// Which setting says where.
        setting: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// A group that cannot get there.
    #[error(
        "control_group = {group}: its members cannot reach {}, because that directory is for its owner alone, as the state directory is; name a control_socket elsewhere, for example /run/infill.sock",
        path.display()
    )]
    Unreachable {
        /// Who.
        group: String,
        /// Where.
        path: PathBuf,
    },
    /// No group.
    #[error("control_group = {0}: there is no such group; make it (groupadd --system {0}) or give the number of one")]
    NoGroup(String),
    /// What was passed is something else.
    #[error(
        "the descriptor {name} that systemd passed is no listening {wanted} socket; see FileDescriptorName= and ListenStream= in the socket unit"
    )]
    Passed {
        /// Its name.
        name: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// The operating system refused.
    #[error("cannot listen on {place}: {source}; see {setting}")]
    Os {
        /// Which setting says where.
        setting: &'static str,
        /// Where.
        place: String,
        /// Why not.
        source: io::Error,
    },
}

impl SocketError {
    /// The exit code of a process that ends for this reason.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::InUse { .. } | Self::PortInUse { .. } => exit::UNAVAILABLE,
            Self::Os { source, .. } if source.kind() == ErrorKind::PermissionDenied => exit::NO_PERMISSION,
            Self::Os { source, .. } if source.kind() == ErrorKind::NotFound => exit::BAD_CONFIGURATION,
            Self::Os { .. } => exit::FAILED,
            Self::NoSocket { .. } | Self::TooLong { .. } | Self::Unreachable { .. } | Self::NoGroup(_) | Self::Passed { .. } => {
                exit::BAD_CONFIGURATION
            }
        }
    }
}

/// Who may use a socket that is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Users<'a> {
    /// The daemon's own, and root.
    Own,
    /// Members of a group as well, which has this name and number.
    Group(&'a str, u32),
    /// Whoever can enter its directory.
    All,
}

impl Users<'_> {
    const fn mode(self) -> u32 {
        match self {
            Self::Own => OWN_MODE,
            Self::Group(..) => GROUP_MODE,
            Self::All => ALL_MODE,
        }
    }
}

/// The number of a group that is written as a name or a number.
///
/// # Errors
/// There is none.
pub fn group_id(group: &str) -> Result<u32, SocketError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let found = Group::from_name(group).ok().flatten();
    found.map(|group| group.gid.as_raw()).ok_or_else(|| SocketError::NoGroup(group.to_owned()))
}

/// Makes a socket in the place of one that a dead process has left; one on which somebody answers stays.
///
/// # Errors
/// See [`SocketError`].
pub fn bind(setting: &'static str, path: &Path, users: Users<'_>) -> Result<Listener, SocketError> {
    let failed = |source: io::Error| SocketError::Os { setting, place: path.display().to_string(), source };
    let address = UnixAddr::new(path).map_err(|_| SocketError::TooLong { setting, path: path.into() })?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    if let Users::Group(name, _) = users
        && fs::metadata(dir).map_err(failed)?.mode() & ENTERED_BY_OTHERS == 0
    {
        return Err(SocketError::Unreachable { group: name.to_owned(), path: path.into() });
    }
    // Between the look at what is there and taking its place nobody else does the same.
    let _lock = lock(dir).map_err(failed)?;
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NoSocket { setting, path: path.into() }),
        Ok(_) if answers(&address).map_err(failed)? => return Err(SocketError::InUse { setting, path: path.into() }),
        Ok(_) => fs::remove_file(path).map_err(failed)?,
        Err(_) => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made = || -> Result<OwnedFd, Errno> {
        let made = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // A socket that is bound has the mode of what it is bound from, less the umask (`unix_bind_bsd`, net/unix/af_unix.c): there
        // is no moment at which others may connect.
        fchmod(&made, Mode::from_bits_truncate(OWN_MODE))?;
        bind_to(made.as_raw_fd(), &address)?;
        Ok(made)
    };
    let made = made().map_err(|errno| failed(errno.into()))?;
    open_to(path, users).map_err(failed)?;
    listen(&made, Backlog::MAXALLOWABLE).map_err(|errno| failed(errno.into()))?;
    Ok(Listener::Unix(made.into()))
}

/// Gives a socket's file the group and the mode for its users; nothing else, which somebody who may write to the directory has put
/// in its place.
fn open_to(path: &Path, users: Users<'_>) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = fs::File::from(open(path, flags, Mode::empty())?);
    if !file.metadata()?.file_type().is_socket() {
        return Err(io::Error::other("something else was put in its place"));
    }
    // The calls for descriptors do not take one of this kind.
    let there = format!("/proc/self/fd/{}", file.as_raw_fd());
    if let Users::Group(_, gid) = users {
        chown(&there, None, Some(gid))?;
    }
    fs::set_permissions(&there, fs::Permissions::from_mode(users.mode()))
}

/// Holds a directory for those who make sockets in it. Not for ever: whoever can read it can hold it as long as he likes, and must
/// not keep a daemon from starting.
fn lock(dir: &Path) -> io::Result<Option<Flock<fs::File>>> {
    let began = Instant::now();
    let mut file = fs::File::open(dir)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) if began.elapsed() >= LOCK_MAX => return Ok(None),
            Err((again, Errno::EWOULDBLOCK | Errno::EINTR)) => file = again,
            Err((_, errno)) => return Err(errno.into()),
        }
        std::thread::sleep(LOCK_POLL);
    }
}

/// Whether somebody listens. Does not wait for who does and is slow.
fn answers(address: &UnixAddr) -> io::Result<bool> {
    let probe = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    match connect(probe.as_raw_fd(), address) {
        // Too many wait already.
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        // A socket of another kind has its process too.
        Err(Errno::EPROTOTYPE) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Listens on an address.
///
/// # Errors
/// Somebody does already, or it is none of this host.
pub fn listen_tcp(setting: &'static str, address: SocketAddr) -> Result<Listener, SocketError> {
    TcpListener::bind(address).map(Listener::Tcp).map_err(|source| match source.kind() {
        ErrorKind::AddrInUse => SocketError::PortInUse { setting, address },
        _ => SocketError::Os { setting, place: address.to_string(), source },
    })
}

/// Takes the socket of this name out of what systemd passed, if it is there. One on which anybody on the network could connect
/// does, only `with_tcp`.
///
/// # Errors
/// It is not what it should be.
pub fn take_passed(passed: &mut Vec<(String, OwnedFd)>, name: &'static str, with_tcp: bool) -> Result<Option<Listener>, SocketError> {
    let Some(at) = passed.iter().position(|(found, _)| found == name) else { return Ok(None) };
    let (_, fd) = passed.swap_remove(at);
    let listens = getsockopt(&fd.as_fd(), AcceptConn) == Ok(true);
    let family = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|address| address.family());
    match family {
        Some(AddressFamily::Unix) if listens => Ok(Some(Listener::Unix(fd.into()))),
        Some(AddressFamily::Inet | AddressFamily::Inet6) if listens && with_tcp => Ok(Some(Listener::Tcp(fd.into()))),
        _ => Err(SocketError::Passed { name, wanted: if with_tcp { "unix or TCP" } else { "unix" } }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_dead_socket_is_replaced_a_live_one_stays_and_a_file_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let first = bind("control_socket", &path, Users::Own).unwrap();
        assert_eq!(mode(&path), OWN_MODE);
        let error = bind("control_socket", &path, Users::Own).unwrap_err();
        assert!(error.exit_code() == exit::UNAVAILABLE && error.to_string().contains("another process answers"), "{error}");
        drop(first);
        let second = bind("metrics_socket", &path, Users::All).unwrap();
        assert_eq!(mode(&path), ALL_MODE);
        UnixStream::connect(&path).unwrap();
        drop(second);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "x").unwrap();
        assert_eq!(bind("control_socket", &path, Users::Own).unwrap_err().exit_code(), exit::BAD_CONFIGURATION);
        let long = dir.path().join("x".repeat(200));
        assert!(bind("control_socket", &long, Users::Own).unwrap_err().to_string().contains("107 bytes"));
    }

    #[test]
    fn many_who_bind_at_once_are_one_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(bind("control_socket", &path, Users::Own).unwrap());
        let bound = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(|| bind("control_socket", &path, Users::Own))).collect();
            all.into_iter().filter_map(|one| one.join().unwrap().ok()).collect::<Vec<_>>()
        });
        assert_eq!(bound.len(), 1);
    }

    #[test]
    fn what_was_put_in_a_sockets_place_keeps_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let (path, secret) = (dir.path().join("socket"), dir.path().join("secret"));
        fs::write(&secret, "x").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(OWN_MODE)).unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        assert!(open_to(&path, Users::All).is_err() && open_to(&secret, Users::All).is_err());
        assert_eq!(mode(&secret), OWN_MODE);
    }

    #[test]
    fn who_holds_the_directory_keeps_nobody_from_making_a_socket() {
        let dir = tempfile::tempdir().unwrap();
        let _held = lock(dir.path()).unwrap().unwrap();
        bind("control_socket", &dir.path().join("socket"), Users::Own).unwrap();
    }

    #[test]
    fn a_group_must_exist_and_be_able_to_get_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let own = nix::unistd::getegid().as_raw();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let error = bind("control_socket", &path, Users::Group("staff", own)).unwrap_err().to_string();
        assert!(error.contains("staff") && error.contains("control_socket elsewhere"), "{error}");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let _bound = bind("control_socket", &path, Users::Group("staff", own)).unwrap();
        assert_eq!(mode(&path), GROUP_MODE);
        assert!(group_id("no-such-group").unwrap_err().to_string().contains("groupadd") && group_id("12").unwrap() == 12);
    }

    #[test]
    fn what_systemd_passes_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let unix = OwnedFd::from(UnixListener::bind(dir.path().join("a")).unwrap());
        let tcp = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let mut passed = vec![("device".to_owned(), file), ("control".to_owned(), tcp), ("metrics".to_owned(), unix)];
        assert!(take_passed(&mut passed, "control", false).unwrap_err().to_string().contains("unix socket"));
        assert!(matches!(take_passed(&mut passed, "metrics", true), Ok(Some(Listener::Unix(_)))));
        assert!(take_passed(&mut passed, "metrics", true).unwrap().is_none());
        assert_eq!(passed.len(), 1);
        assert!(take_passed(&mut passed, "device", true).is_err());
    }
}
