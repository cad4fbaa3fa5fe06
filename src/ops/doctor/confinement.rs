//! What the daemon can give up on this kernel once it serves, see [`crate::ops::confine`].

use super::{Check, Id};
use crate::ops::confine::{calls, files};

/// Tries Landlock and seccomp, each in a thread that ends right after.
#[must_use]
pub fn checks() -> Vec<Check> {
    vec![
        check(Id::Landlock, files::probe(), "other files than those of the stores and the cache"),
        check(Id::Seccomp, calls::probe(), "system calls that serving does not need"),
    ]
}

fn check(id: Id, outcome: Result<String, String>, what: &str) -> Check {
    match outcome {
        Ok(found) => Check::ok(id, found),
        Err(why) => {
            let (found, remedy) = why.split_once("; ").unwrap_or((&why, ""));
            Check::warn(id, format!("{found}: infill serves without giving up {what}"), remedy)
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Status;
    use super::*;

    pub(in super::super) fn provoked() -> Vec<Check> {
        [Id::Landlock, Id::Seccomp].map(|id| check(id, Err("not in this kernel; build it in".to_owned()), "something")).into()
    }

    #[test]
    fn what_is_missing_is_a_warning_with_a_remedy() {
        let missing = check(Id::Landlock, Err("no x here; build it in".to_owned()), "y");
        assert_eq!((missing.status, missing.remedy.as_str()), (Status::Warn, "build it in"));
        assert_eq!(missing.found, "no x here: infill serves without giving up y");
        assert_eq!(check(Id::Landlock, Ok("version 1".to_owned()), "y").status, Status::Ok);
    }

    #[test]
    fn the_probes_change_nothing_for_the_rest() {
        drop(checks());
        assert!(std::fs::read("/etc/passwd").is_ok());
    }
}
