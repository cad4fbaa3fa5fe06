//! `infill doctor`: can this host serve images, through cachefiles or from files, and if not, what is to be done?
//!
//! | file | its subject |
//! |---|---|
//! | `id` | the names of findings |
//! | `release` | kernel versions: the window of the feature, known bugs (pure) |
//! | `features` | what is compiled into the kernel and its modules |
//! | `device` | the device node and who may open it |
//! | `cache_dir` | the cache directory and its file system |
//! | `fanotify` | pre-content events, for images that are mounted from files |
//! | `host` | io_uring, limits |
//! | `confinement` | Landlock, seccomp |
//! | `state_dir` | the state directory, and the daemon that serves there |
//! | `stores` | where blobs come from |
//!
//! Nothing is changed: no module is loaded, the device is not opened, the only files that are made (to try direct writes, and
//! what the kernel asks for) never have a name, and the only mount is nowhere.

pub mod cache_dir;
pub mod confinement;
pub mod device;
pub mod fanotify;
pub mod features;
pub mod host;
pub mod id;
pub mod release;
pub mod state_dir;
pub mod stores;

use std::fmt;
use std::fs;
use std::path::Path;

use self::features::Kernel;
pub use self::id::Id;
use self::release::Running;
use crate::config::FrontEndKind;
use crate::front::cachefiles::CullLimits;
use crate::ops::exit;
use crate::store::StoreSpec;

/// How a check ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// Serving is not possible.
    Fail,
    /// It could not be found out.
    Unknown,
}

/// What a failure amounts to; the first is the worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The kernel lacks the feature, or its device is in use.
    Unavailable,
    /// This process is not permitted to use it.
    NotPermitted,
    /// The cache directory cannot be used.
    BadCacheDir,
    /// Anything else.
    Failed,
    /// Serving is possible.
    Ready,
}

impl Verdict {
    /// The exit code, one of [`exit`].
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Ready => 0,
            Self::Failed => exit::FAILED,
            Self::Unavailable => exit::UNAVAILABLE,
            Self::NotPermitted => exit::NO_PERMISSION,
            Self::BadCacheDir => exit::BAD_CONFIGURATION,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "this host can serve images",
            Self::Unavailable => "not possible: the kernel lacks what is needed, or its device is in use",
            Self::NotPermitted => "not possible: this process is not permitted to",
            Self::BadCacheDir => "not possible: the cache directory cannot be used",
            Self::Failed => "not possible as things are",
        })
    }
}

/// One finding.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Check {
    /// A stable name.
    pub id: Id,
    /// How it ended.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What the operator can do; empty if nothing has to be done.
    #[serde(rename = "do")]
    pub remedy: String,
    /// The command for a shell that does it, where there is one.
    pub fix: Option<String>,
    /// What it amounts to.
    #[serde(skip)]
    pub verdict: Verdict,
}

impl Check {
    fn ok(id: Id, found: impl Into<String>) -> Self {
        Self::new(id, Status::Ok, Verdict::Ready, found.into(), "")
    }

    fn warn(id: Id, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(id, Status::Warn, Verdict::Ready, found.into(), remedy)
    }

    fn unknown(id: Id, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(id, Status::Unknown, Verdict::Ready, found.into(), remedy)
    }

    fn fail(id: Id, verdict: Verdict, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(id, Status::Fail, verdict, found.into(), remedy)
    }

    fn new(id: Id, status: Status, verdict: Verdict, found: String, remedy: impl Into<String>) -> Self {
        Self { id, status, found, remedy: remedy.into(), fix: None, verdict }
    }

    /// With the command that does what has to be done.
    fn fixed_by(self, command: impl Into<String>) -> Self {
        Self { fix: Some(command.into()), ..self }
    }
}

/// All findings.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// In the order of printing.
    pub checks: Vec<Check>,
    /// The worst of them.
    pub verdict: Verdict,
}

impl Report {
    /// A report of these checks.
    #[must_use]
    pub fn new(checks: Vec<Check>) -> Self {
        Self { verdict: worst(&checks), checks }
    }
}

/// What is to be checked.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The kernel interface that is to be served.
    pub front_end: FrontEndKind,
    /// Where the cache is to be.
    pub cache_dir: &'a Path,
    /// The stores that are to be used.
    pub stores: &'a [StoreSpec],
    /// How full the cache's file system may become.
    pub limits: &'a CullLimits,
    /// How much the cache may take.
    pub cache_bytes: Option<u64>,
    /// Pieces in which cache files are to take their space on XFS; `None`: the default.
    pub xfs_extent_bytes: Option<u32>,
    /// Where the daemon's lock is to be.
    pub state_dir: &'a Path,
    /// Event loops, which have descriptors of their own.
    pub shards: usize,
}

/// Examines this host.
#[must_use]
pub fn examine(subject: &Subject<'_>) -> Report {
    let mut checks = interface(subject);
    checks.extend(cache_dir::checks(subject));
    checks.extend(state_dir::checks(subject.state_dir));
    checks.extend(host::checks(subject.shards));
    checks.extend(confinement::checks());
    checks.extend(subject.stores.iter().flat_map(|store| stores::checks(store, subject.cache_dir)));
    Report::new(checks)
}

/// What is found of the kernel interface: that of the settings, or the one that a daemon would take.
fn interface(subject: &Subject<'_>) -> Vec<Check> {
    let running = Running::read();
    let kernel = Kernel::read(&running.release);
    let mut cachefiles = release::checks(&running);
    cachefiles.extend(kernel.checks());
    cachefiles.extend(device::checks(&kernel));
    let files = fanotify::checks(&running, &kernel, subject.cache_dir, subject.shards);
    judged(subject.front_end, cachefiles, files)
}

fn judged(front_end: FrontEndKind, mut cachefiles: Vec<Check>, files: Vec<Check>) -> Vec<Check> {
    match front_end {
        FrontEndKind::Fanotify => files,
        // What is nearer to being possible: for a user who may nothing, only that counts, and not what the other one lacks.
        FrontEndKind::Auto if worst(&files) > worst(&cachefiles) => {
            let mut checks = vec![instead(&cachefiles)];
            checks.extend(files);
            checks
        }
        FrontEndKind::Auto if worst(&files) == worst(&cachefiles) && worst(&files) != Verdict::Ready => {
            cachefiles.extend(files);
            cachefiles
        }
        _ => cachefiles,
    }
}

fn worst(checks: &[Check]) -> Verdict {
    checks.iter().map(|check| check.verdict).min().unwrap_or(Verdict::Ready)
}

/// In a line, why not through cachefiles, where that does not matter.
fn instead(cachefiles: &[Check]) -> Check {
    let mut wrong = cachefiles.iter().filter(|check| check.status == Status::Fail).map(|check| check.found.as_str());
    let (first, rest) = (wrong.next().unwrap_or_default(), wrong.count());
    let found =
        format!("not with this kernel ({first}, and {rest} more: --front-end cachefiles shows them); images are mounted from files");
    Check::ok(Id::Cachefiles, found)
}

/// The command that gives the service `infill` a setting, now and at every start.
fn set_in_unit(setting: &str) -> String {
    format!(
        "mkdir -p /etc/systemd/system/infill.service.d && printf '[Service]\\n{setting}\\n' >> \
         /etc/systemd/system/infill.service.d/60-doctor.conf && systemctl daemon-reload && systemctl restart infill"
    )
}

/// A path in a command for a shell.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+,:@".contains(c));
    if is_plain { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// The text of a small file below `/proc` or `/sys`, without the newline at its end.
fn read(path: &str) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides() {
        let fail = |verdict| Check::fail(Id::Kernel, verdict, "", "");
        let verdict = |checks: &[Check]| Report::new(checks.to_vec()).verdict.exit_code();
        let harmless = [Check::ok(Id::Kernel, ""), Check::warn(Id::Kernel, "", ""), Check::unknown(Id::Kernel, "", "")];
        assert_eq!(verdict(&[]), 0);
        assert_eq!(verdict(&harmless), 0);
        let mut checks = harmless.to_vec();
        for (worse, code) in [(Verdict::Failed, 1), (Verdict::BadCacheDir, 78), (Verdict::NotPermitted, 77), (Verdict::Unavailable, 69)] {
            checks.push(fail(worse));
            assert_eq!(verdict(&checks), code);
        }
    }

    #[test]
    fn the_front_end_that_is_nearer_decides() {
        let verdict = |cachefiles, files| {
            let [cachefiles, files] = [cachefiles, files].map(|verdict| vec![Check::fail(Id::Kernel, verdict, "no", "")]);
            Report::new(judged(FrontEndKind::Auto, cachefiles, files)).verdict
        };
        // A user who may nothing, on a kernel that has no cachefiles: as root it works.
        assert_eq!(verdict(Verdict::Unavailable, Verdict::NotPermitted), Verdict::NotPermitted);
        assert_eq!(verdict(Verdict::NotPermitted, Verdict::Unavailable), Verdict::NotPermitted);
        assert_eq!(verdict(Verdict::Unavailable, Verdict::Ready), Verdict::Ready);
        assert_eq!(verdict(Verdict::Ready, Verdict::Unavailable), Verdict::Ready);
    }

    /// A module of the doctor provokes each of its own findings; here is seen that none was forgotten, and that each of them says
    /// what to do.
    #[test]
    fn every_finding_is_provoked_and_says_what_to_do() {
        let provoked: Vec<Check> = [
            release::tests::provoked(),
            features::tests::provoked(),
            device::tests::provoked(),
            fanotify::tests::provoked(),
            cache_dir::tests::provoked(),
            state_dir::tests::provoked(),
            host::tests::provoked(),
            confinement::tests::provoked(),
            stores::tests::provoked(),
            vec![instead(&[Check::fail(Id::Kernel, Verdict::Unavailable, "old", "")])],
        ]
        .concat();
        // What only informs is never wrong.
        let informs = |id| matches!(id, Id::StoreReflink | Id::Daemon);
        for &id in Id::ALL {
            let of_it: Vec<_> = provoked.iter().filter(|check| check.id == id).collect();
            assert!(!of_it.is_empty(), "no test provokes {id}");
            assert!(informs(id) || of_it.iter().any(|check| check.status != Status::Ok), "{id} is only ever fine");
        }
        for check in &provoked {
            assert!(!check.found.is_empty() && !check.found.contains('\n'), "{check:?}");
            if check.status != Status::Ok {
                assert!(!check.remedy.is_empty(), "{}: {} says not what to do", check.id, check.found);
            }
            let Some(command) = &check.fix else { continue };
            let parsed = std::process::Command::new("sh").args(["-n", "-c", command]).output().unwrap();
            assert!(parsed.status.success() && !command.contains('\n'), "{}: {command}: {parsed:?}", check.id);
        }
    }
}
