//! Becoming another user: `--user NAME|UID[:GID]`.

use std::fmt;
use std::str::FromStr;

use nix::errno::Errno;
use nix::sys::prctl::set_keepcaps;
use nix::unistd::{self, Gid, Uid, setgroups, setresgid, setresuid};

use super::powers;
use crate::ops::exit;

/// A user as it is written: a name or a number, and perhaps a group's number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Account {
    name: String,
    gid: Option<u32>,
}

impl FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, gid) = match text.split_once(':') {
            None => (text, None),
            Some((name, gid)) => (name, Some(gid.parse().map_err(|_| format!("{gid:?} is not the number of a group"))?)),
        };
        if name.is_empty() {
            return Err("write the name or the number of a user, for example nobody, 65534 or 65534:65534".to_owned());
        }
        Ok(Self { name: name.to_owned(), gid })
    }
}

/// A user that exists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct User {
    name: String,
    uid: Uid,
    gid: Gid,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (uid {}, gid {})", self.name, self.uid, self.gid)
    }
}

/// Why it is not possible to run as a user.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No such user.
    #[error("--user {0}: there is no such user; make it (useradd --system {0}) or give numbers as UID:GID")]
    Unknown(String),
    /// A number that no user has says nothing about the group.
    #[error("--user {0}: no user has this number, so its group is not known; write UID:GID")]
    NoGroup(u32),
    /// The users cannot be looked up.
    #[error("--user {name}: cannot look the user up: {errno}; give numbers as UID:GID")]
    Lookup {
        /// Who.
        name: String,
        /// Why not.
        errno: Errno,
    },
    /// We may not.
    #[error("cannot become {user}: {errno}; start infill as root, or with CAP_SETUID and CAP_SETGID, or leave --user out")]
    Switch {
        /// Who.
        user: String,
        /// Why not.
        errno: Errno,
    },
    /// Binding the device would not work any more.
    #[error("became {user}, but without the capabilities that binding the device takes: {why}")]
    Powers {
        /// Who.
        user: String,
        /// Why not.
        why: String,
    },
}

impl UserError {
    /// The exit code of a process that ends for this reason.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Unknown(_) | Self::NoGroup(_) | Self::Lookup { .. } => exit::BAD_CONFIGURATION,
            Self::Switch { .. } | Self::Powers { .. } => exit::NO_PERMISSION,
        }
    }
}

impl User {
    /// Finds the user in the system's lists. A number with a group needs no entry there.
    ///
    /// # Errors
    /// There is none, or the lists cannot be read.
    pub fn find(account: &Account) -> Result<Self, UserError> {
        let number = account.name.parse::<u32>().ok();
        if let (Some(uid), Some(gid)) = (number, account.gid) {
            return Ok(Self { name: account.name.clone(), uid: Uid::from_raw(uid), gid: Gid::from_raw(gid) });
        }
        let found = match number {
            Some(uid) => unistd::User::from_uid(Uid::from_raw(uid)),
            None => unistd::User::from_name(&account.name),
        };
        match found {
            Ok(Some(user)) => Ok(Self { name: user.name, uid: user.uid, gid: account.gid.map_or(user.gid, Gid::from_raw) }),
            Ok(None) => Err(number.map_or_else(|| UserError::Unknown(account.name.clone()), UserError::NoGroup)),
            Err(errno) => Err(UserError::Lookup { name: account.name.clone(), errno }),
        }
    }

    /// Takes on the user's and the group's number, leaves all other groups, and keeps the capabilities, which
    /// [`super::confine`] takes. To be done before the device is bound: the kernel's cache files then belong to this
    /// user, who can look after them without any capability.
    ///
    /// # Errors
    /// This process may not.
    pub fn become_it(&self) -> Result<(), UserError> {
        let switch = || {
            set_keepcaps(true)?;
            setgroups(&[self.gid])?;
            setresgid(self.gid, self.gid, self.gid)?;
            setresuid(self.uid, self.uid, self.uid)?;
            set_keepcaps(false)
        };
        switch().map_err(|errno| UserError::Switch { user: self.to_string(), errno })?;
        // The effective ones were lost with the number, the permitted ones kept.
        powers::regain().map_err(|why| UserError::Powers { user: self.to_string(), why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str) -> Result<String, String> {
        let account: Account = text.parse()?;
        User::find(&account).map(|user| user.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn users_are_named_or_numbered() {
        assert_eq!(find("4000000:4000001").unwrap(), "4000000 (uid 4000000, gid 4000001)");
        assert_eq!(find("root").unwrap(), "root (uid 0, gid 0)");
        assert_eq!(find("0").unwrap(), "root (uid 0, gid 0)");
        assert_eq!(find("root:7").unwrap(), "root (uid 0, gid 7)");
        assert!(find("no-such-user").unwrap_err().contains("useradd"));
        assert!(find("4000000").unwrap_err().contains("UID:GID"));
        assert!(find("root:wheel").unwrap_err().contains("\"wheel\""));
        assert!(find("").unwrap_err().contains("nobody"));
        assert!(find(":0").is_err());
    }
}
