//! Kernel versions: where the feature exists, where it is sound, and what is known to be wrong.
//!
//! The numbers are the releases that carry the named commits; docs/kernels.md has the table.

use std::fmt;

use super::{Check, Id, Verdict, read};

/// A release of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The version at the start of `text`, such as `6.1.0-56-amd64` or `7.2-rc3`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let end = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(str::parse);
        let major = numbers.next()?.ok()?;
        let minor = numbers.next()?.ok()?;
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        Some(Self(major, minor, patch))
    }

    /// Whether this release has what `fixed` carries: the first release with it of each stable branch
    /// that got it, and last the first mainline release.
    fn has(self, fixed: &[Self]) -> bool {
        let branch = |v: Self| (v.0, v.1);
        fixed.iter().any(|first| branch(*first) == branch(self) && self >= *first) || fixed.last().is_some_and(|mainline| self >= *mainline)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// c8383054506c: cachefiles on-demand mode.
const FIRST: Version = Version(5, 19, 0);
/// f6145794f17a in stable, c37460cd9b2f in mainline: EROFS over fscache removed.
const EROFS_REMOVED: [Version; 2] = [Version(7, 1, 8), Version(7, 2, 0)];
/// 949eb95d5bcc: the on-demand mode itself removed.
const ONDEMAND_REMOVED: [Version; 1] = [Version(7, 3, 0)];
/// The fixes of copen, READ_COMPLETE, killable waiters and the withdrawal races.
const SANE: [Version; 4] = [Version(6, 1, 101), Version(6, 6, 42), Version(6, 9, 11), Version(6, 10, 0)];
/// 0a7e54c1959c and e73fa11a356c: objects are opened again; `restore`.
const REOPEN: [Version; 3] = [Version(6, 1, 95), Version(6, 6, 35), Version(6, 8, 0)];
/// CVE-2024-56549: NULL dereference by a write before the object has its file.
const EARLY_WRITE: [Version; 5] = [Version(6, 1, 129), Version(6, 6, 78), Version(6, 11, 11), Version(6, 12, 2), Version(6, 13, 0)];

/// FAN_PRE_ACCESS: pre-content events.
const PRE_CONTENT: Version = Version(6, 14, 0);

/// What serves without cachefiles.
const USE_FILES: &str = "infill serve --front-end fanotify";

/// What an operator should run instead.
const GOOD_KERNELS: &str = "boot a kernel from 6.1.101, 6.6.42 or 6.10 up to 7.1.7, best the long-term \
                            6.12 or 6.18; see docs/kernels.md";

/// The kernel that runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Running {
    /// What `uname -r` says.
    pub release: String,
    /// The upstream version.
    pub version: Option<Version>,
    /// Whether the last number of it is known: distributions often put their own in its place.
    pub exact: bool,
}

impl Running {
    /// Asks the kernel.
    #[must_use]
    pub fn read() -> Self {
        Self::new(
            &read("/proc/sys/kernel/osrelease").unwrap_or_default(),
            &read("/proc/sys/kernel/version").unwrap_or_default(),
            read("/proc/version_signature").as_deref(),
        )
    }

    /// From what `uname -r` and `uname -v` say, and Ubuntu's `/proc/version_signature`.
    #[must_use]
    pub fn new(release: &str, build: &str, signature: Option<&str>) -> Self {
        // Debian: `#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-08-30)`.
        let debian = build.split_once("Debian ").map(|(_, rest)| rest);
        // Ubuntu: `Ubuntu 6.8.0-45.45-generic 6.8.12`.
        let ubuntu = signature.and_then(|text| text.split_ascii_whitespace().last());
        let told = debian.or(ubuntu).and_then(Version::parse);
        let version = told.or_else(|| Version::parse(release));
        let own_numbers = matches!(version, Some(Version(_, _, 0))) && release.contains(".0-");
        Self { release: release.to_owned(), version, exact: told.is_some() || !own_numbers }
    }

    /// Alibaba's and OpenAnolis' kernels 4.19 and 5.10, which are reported to have the mode back-ported.
    fn is_anolis(&self) -> bool {
        [".an", ".al"].iter().any(|mark| self.release.contains(mark))
    }
}

/// Everything that the version alone tells.
#[must_use]
pub fn checks(running: &Running) -> Vec<Check> {
    let Some(version) = running.version else {
        let found = format!("'{}' is no version that could be understood", running.release);
        return vec![Check::unknown(Id::Kernel, found, "see docs/kernels.md for the versions that do")];
    };
    let mut checks = vec![window(running, version)];
    if checks.iter().all(|check| check.verdict == Verdict::Ready) && version >= FIRST {
        checks.push(bugs(running, version));
        checks.push(reopen(running, version));
    }
    checks
}

fn window(running: &Running, version: Version) -> Check {
    const ID: Id = Id::Kernel;
    let linux = if running.exact { format!("Linux {version}") } else { format!("Linux {}.{} ({})", version.0, version.1, running.release) };
    let missing = |why| Check::fail(ID, Verdict::Unavailable, format!("{linux}: {why}"), GOOD_KERNELS);
    let removed = |why| {
        let remedy = format!("mount images from files instead (--front-end fanotify, infill mount), or {GOOD_KERNELS}");
        Check::fail(ID, Verdict::Unavailable, format!("{linux}: {why}"), remedy).fixed_by(USE_FILES)
    };
    let removed_71 = version.0 == 7 && version.1 == 1 && !running.exact;
    if version < FIRST && running.is_anolis() {
        let found = format!("{linux}: reported to have on-demand mode back-ported");
        return Check::unknown(ID, found, "look at the lines on the kernel's features below");
    }
    if version < FIRST {
        return missing("cachefiles on-demand mode came with 5.19");
    }
    if version.has(&ONDEMAND_REMOVED) {
        return removed("cachefiles on-demand mode was removed in 7.3, and EROFS over fscache before it");
    }
    if version.has(&EROFS_REMOVED) {
        return removed("EROFS over fscache was removed in 7.1.8 and 7.2");
    }
    if removed_71 || version.0 == 7 && version.1 == 0 {
        let found = format!("{linux}: EROFS over fscache was removed in 7.1.8, perhaps in a late 7.0 release too");
        return Check::unknown(ID, found, GOOD_KERNELS);
    }
    if !running.exact {
        let found = format!("{linux}: the source has on-demand mode; its point release is not known");
        let do_this = "make sure that it includes the fixes of 6.1.101, 6.6.42 or 6.9.11";
        return match version {
            version if version >= Version(6, 10, 0) => Check::ok(ID, format!("{linux}: the source has on-demand mode")),
            _ => Check::unknown(ID, found, do_this),
        };
    }
    if !version.has(&SANE) {
        let found = format!(
            "{linux}: the source has on-demand mode, without the fixes of 6.1.101, 6.6.42 and 6.9.11 (use after \
             free, readers that cannot be killed, answers that reach the wrong request)"
        );
        return Check::warn(ID, found, GOOD_KERNELS);
    }
    Check::ok(ID, format!("{linux}: the source has on-demand mode and its fixes"))
}

/// What the version tells of images that are mounted from files.
#[must_use]
pub fn for_files(running: &Running) -> Check {
    const ID: Id = Id::KernelFiles;
    match running.version {
        None => {
            let found = format!("'{}' is no version that could be understood", running.release);
            Check::unknown(ID, found, "nothing, if the line fanotify is fine")
        }
        Some(version) if version < PRE_CONTENT => Check::fail(
            ID,
            Verdict::Unavailable,
            format!("Linux {version}: pre-content events came with {PRE_CONTENT}"),
            "boot Linux 6.14 or later, best the long-term 6.18; or serve through cachefiles (docs/kernels.md)",
        ),
        Some(version) => Check::ok(
            ID,
            format!("Linux {version}: the source has pre-content events; use uncompressed images: reads of compressed ones may be cut off"),
        ),
    }
}

/// A bug that an operator should know of.
struct Bug {
    first: Version,
    fixed: &'static [Version],
    text: &'static str,
}

/// In [`BUGS`]: from here on to the fixes, nothing may be culled.
const CULL_BROKEN: (Version, [Version; 2]) = (Version(6, 19, 0), [Version(6, 19, 14), Version(7, 0, 0)]);

/// Whether the kernel may be asked to cull: not where that corrupts its memory (CVE-2026-43106).
#[must_use]
pub fn may_cull(running: &Running) -> bool {
    running.version.is_none_or(|version| version < CULL_BROKEN.0 || version.has(&CULL_BROKEN.1))
}

const BUGS: [Bug; 3] = [
    Bug { first: FIRST, fixed: &EARLY_WRITE, text: "a write that comes very early can crash the kernel (CVE-2024-56549)" },
    Bug {
        // cfd86ef7e8e7, reverted by 1e7ab6f67824 before 6.16.
        first: Version(6, 15, 0),
        fixed: &[Version(6, 16, 0)],
        text: "writes to all objects go through one queue, so fills are slow (io_uring and anonymous inodes)",
    },
    Bug {
        first: CULL_BROKEN.0,
        fixed: &CULL_BROKEN.1,
        text: "culling can free a directory entry twice (CVE-2026-43106), so infill does not cull",
    },
];

/// a1bafc3109d7: since 6.9 compressed images are read through bios.
const COMPRESSED_FIRST: Version = Version(6, 9, 0);

fn bugs(running: &Running, version: Version) -> Check {
    const ID: Id = Id::KernelBugs;
    let mut advice = if version >= COMPRESSED_FIRST {
        "mount uncompressed images only: a read of a compressed one that is cached in part can hang or \
         corrupt memory (6.9 to 7.1.7, never fixed)"
    } else {
        "mount uncompressed images only: compressed ones need 6.9"
    }
    .to_owned();
    let known: Vec<&str> = BUGS.iter().filter(|bug| version >= bug.first && !version.has(bug.fixed)).map(|bug| bug.text).collect();
    if known.is_empty() {
        return Check::ok(ID, format!("none that infill does not avoid; {advice}"));
    }
    advice = format!("update to the last release of a long-term kernel; {advice}");
    let text = known.join("; ");
    if running.exact {
        Check::warn(ID, text, advice)
    } else {
        Check::unknown(ID, format!("unless the distribution fixed it: {text}"), advice)
    }
}

fn reopen(running: &Running, version: Version) -> Check {
    const ID: Id = Id::KernelReopen;
    let without =
        "every mounted blob keeps a descriptor, and when the daemon ends, mounted images give I/O errors until they are mounted anew";
    let remedy = "unmount images before a restart, or boot 6.1.95, 6.6.35, 6.8 or later";
    if version.has(&REOPEN) {
        Check::ok(
            ID,
            "the kernel opens blobs again on demand, and repeats unanswered requests to a daemon that asks (restore): images stay mounted over a restart",
        )
    } else if running.exact {
        Check::warn(ID, format!("no re-opening: {without}"), remedy)
    } else {
        Check::unknown(ID, format!("perhaps no re-opening; without it {without}"), remedy)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Status;
    use super::*;

    /// Each bug alone, and each kind of kernel that will not do.
    pub(in super::super) fn provoked() -> Vec<Check> {
        let running = |release: &str| Running::new(release, "", None);
        let releases = [
            "5.18.0",
            "5.19.0",
            "6.1.100",
            "6.1.128",
            "6.2.0-39-generic",
            "6.15.3",
            "6.19.2",
            "7.0.3",
            "7.2.0",
            "7.3.0",
            "odd",
            "5.10.1.an8",
        ];
        let mut found: Vec<Check> = releases.iter().flat_map(|release| checks(&running(release))).collect();
        found.extend(["6.12.1", "7.2.0", "odd"].map(|release| for_files(&running(release))));
        found
    }

    #[test]
    fn each_bug_is_told_where_it_is_and_nowhere_else() {
        let of = |release: &str| checks(&Running::new(release, "", None)).into_iter().find(|check| check.id == Id::KernelBugs).unwrap();
        for (has, has_not, word) in [
            ("6.12.1", "6.12.2", "CVE-2024-56549"),
            ("6.6.77", "6.6.78", "CVE-2024-56549"),
            ("6.15.9", "6.16.0", "one queue"),
            ("6.19.13", "6.19.14", "CVE-2026-43106"),
        ] {
            let (bad, good) = (of(has), of(has_not));
            assert!(bad.status == Status::Warn && bad.found.contains(word) && bad.remedy.contains("update"), "{has}: {bad:?}");
            assert!(!good.found.contains(word), "{has_not}: {good:?}");
        }
        assert!(!may_cull(&Running::new("6.19.13", "", None)) && may_cull(&Running::new("6.19.14", "", None)));
    }

    #[test]
    fn mounting_from_files_takes_a_newer_kernel_and_lasts() {
        let status = |release| for_files(&Running::new(release, "", None)).status;
        assert_eq!(["6.13.9", "6.14.0", "6.18.44", "7.3.1"].map(status), [Status::Fail, Status::Ok, Status::Ok, Status::Ok]);
    }

    /// Status of the lines `kernel`, `kernel-bugs` and `kernel-reopen` as one letter each.
    fn letters(release: &str, build: &str, signature: Option<&str>) -> String {
        checks(&Running::new(release, build, signature))
            .iter()
            .map(|check| match check.status {
                Status::Ok => 'o',
                Status::Warn => 'w',
                Status::Fail => 'F',
                Status::Unknown => '?',
            })
            .collect()
    }

    #[test]
    fn upstream_versions() {
        for (release, expected) in [
            ("5.10.0", "F"),
            ("5.18.19", "F"),
            ("5.19.0", "www"),
            ("6.0.12", "www"),
            ("6.1.94", "www"),
            ("6.1.95", "wwo"),
            ("6.1.100", "wwo"),
            ("6.1.101", "owo"),
            ("6.1.128", "owo"),
            ("6.1.129", "ooo"),
            ("6.1.192", "ooo"),
            ("6.2.16", "www"),
            ("6.6.34", "www"),
            ("6.6.41", "wwo"),
            ("6.6.42", "owo"),
            ("6.6.78", "ooo"),
            ("6.7.12", "www"),
            ("6.8.12", "wwo"),
            ("6.9.10", "wwo"),
            ("6.9.11", "owo"),
            ("6.10.0", "owo"),
            ("6.11.11", "ooo"),
            ("6.12.1", "owo"),
            ("6.12.117", "ooo"),
            ("6.15.3", "owo"),
            ("6.16.0", "ooo"),
            ("6.18.44", "ooo"),
            ("6.19.13", "owo"),
            ("6.19.14", "ooo"),
            ("7.0.3", "?oo"),
            ("7.1.0", "ooo"),
            ("7.1.7", "ooo"),
            ("7.1.8", "F"),
            ("7.2.0-rc1", "F"),
            ("7.2-rc3", "F"),
            ("7.3.1", "F"),
            ("8.0.0", "F"),
            ("garbage", "?"),
        ] {
            assert_eq!(letters(release, "#1 SMP", None), expected, "{release}");
        }
    }

    #[test]
    fn distributions_tell_the_version_elsewhere() {
        let debian = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-08-30)";
        assert_eq!(letters("6.1.0-56-amd64", debian, None), "ooo");
        let old = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.90-1 (2024-05-03)";
        assert_eq!(letters("6.1.0-21-amd64", old, None), "www");
        let ubuntu = Some("Ubuntu 6.8.0-45.45-generic 6.8.12");
        assert_eq!(letters("6.8.0-45-generic", "#45-Ubuntu SMP", ubuntu), "wwo");
        assert_eq!(letters("6.8.0-45-generic", "#45-Ubuntu SMP", None), "??o");
        assert_eq!(letters("6.2.0-39-generic", "#40-Ubuntu SMP", None), "???");
        assert_eq!(letters("6.14.0-29-generic", "#29-Ubuntu SMP", None), "ooo");
        assert_eq!(letters("7.1.0-3-generic", "#3-Ubuntu SMP", None), "?oo");
        assert_eq!(letters("5.10.134-16.an8.x86_64", "#1 SMP", None), "?");
        assert_eq!(letters("5.14.0-503.el9.x86_64", "#1 SMP", None), "F");
        assert_eq!(letters("6.1.141-155.222.amzn2023.x86_64", "#1 SMP", None), "ooo");
    }

    #[test]
    fn a_kernel_without_the_feature_is_told_plainly() {
        let removed = &checks(&Running::new("7.1.8", "", None))[0];
        assert_eq!(removed.verdict, Verdict::Unavailable);
        assert_eq!(removed.found, "Linux 7.1.8: EROFS over fscache was removed in 7.1.8 and 7.2");
        assert!(removed.remedy.starts_with("mount images from files instead") && removed.remedy.contains("boot a kernel from 6.1.101"));
        assert_eq!(removed.fix.as_deref(), Some(USE_FILES));
    }
}
