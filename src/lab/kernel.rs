//! Guest kernels: built once from Debian's source packages, then kept.
//!
//! Cachefiles on-demand mode is off in most distribution kernels, and most are too old for what replaced it, so the lab
//! builds its own: the newest `linux-source-X` that the machine's own package sources offer, or a newer suite, `make
//! tinyconfig`, and the lines of `kernel.config`. The result lies in the cache directory as `kernel/X-VERSION-FRAGMENT/`,
//! where FRAGMENT is a checksum of the settings for X: a new source or a new configuration is a new kernel.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write, pipe};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg};

use super::apt::Apt;
use super::progress::Progress;
use super::{LabError, Result, Trying, cache_dir, checksum, last_lines, packages, run};

/// The kernels that serve images through cachefiles, newest first. Later ones have no EROFS over fscache (see
/// `docs/kernels.md`), earlier ones differ only in errors that were fixed.
pub const SERIES: [&str; 2] = ["6.12", "6.1"];
/// One that mounts images from files, and asks before it reads their metadata.
pub const FROM_FILES: &str = "7.2";

/// Suites with sources of [`FROM_FILES`]: first that in which it changes least.
const NEWER_SUITES: [&str; 3] = ["trixie-backports", "forky", "sid"];

/// What is added to `tinyconfig`.
const FRAGMENT: &str = include_str!("kernel.config");
/// How much of a failed build's log is shown, in lines.
const LOG_TAIL_LINES: usize = 30;

/// A kernel ready to boot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kernel {
    /// Such as `6.12`.
    pub series: String,
    /// Version of the source package.
    pub version: String,
    /// The compressed image that QEMU boots.
    pub image: PathBuf,
}

/// Gives the kernel of a series: the cached one, or one built now (some minutes).
///
/// # Errors
/// There is none in the cache and it cannot be built: no source package to be had, missing tools, or a
/// failed build (the message holds the end of its log).
pub fn ensure(series: &str) -> Result<Kernel> {
    let home = cache_dir()?.join("kernel");
    fs::create_dir_all(&home).trying(|| format!("cannot make {}", home.display()))?;
    let sources = sources(series, &home)?;
    let package = format!("linux-source-{series}");
    let offered = sources.iter().find_map(|apt| apt.offered(&package, &home));
    if let Some(kernel) = cached(&home, series, offered.as_deref()) {
        return Ok(kernel);
    }
    let _lock = lock(&home.join(format!("{series}.lock")))?;
    // Another process may have built it while this one waited for the lock.
    if let Some(kernel) = cached(&home, series, offered.as_deref()) {
        return Ok(kernel);
    }
    packages::ensure(packages::KERNEL_TOOLS)?;
    let work = home.join(format!("{series}.work"));
    wipe(&work)?;
    fs::create_dir_all(&work).trying(|| format!("cannot make {}", work.display()))?;
    let version = fetch(&package, &sources, &work)?;
    let tree = unpack(series, &work)?;
    configure(series, &tree, &fragment_of(series))?;
    compile(series, &tree, &home.join(format!("{series}.log")))?;
    let kernel = keep(&home, series, &version, &tree)?;
    wipe(&work)?;
    Ok(kernel)
}

/// Where the source of a series may come from, in the order in which they are asked.
fn sources(series: &str, home: &Path) -> Result<Vec<Apt>> {
    match series {
        FROM_FILES => NEWER_SUITES.iter().map(|suite| Apt::of_suite(suite, home)).collect(),
        _ => Ok(vec![Apt::of_machine()]),
    }
}

/// The settings for a series: lines that end with `# since X` are only for X and later, with `# before X` for earlier ones.
fn fragment_of(series: &str) -> String {
    let number = |text: &str| -> Vec<u32> { text.split('.').map(|part| part.parse().unwrap_or(0)).collect() };
    let mut text = String::new();
    for line in FRAGMENT.lines().filter(|line| line.starts_with("CONFIG_")) {
        let (setting, when) = line.split_once(" # ").unwrap_or((line, ""));
        let applies = match when.split_once(' ') {
            Some(("since", since)) => number(series) >= number(since),
            Some(("before", before)) => number(series) < number(before),
            _ => true,
        };
        if applies {
            text.push_str(setting);
            text.push('\n');
        }
    }
    text
}

/// Another one for each kernel that is configured differently.
fn fragment_key(series: &str) -> String {
    format!("{:016x}", checksum(fragment_of(series).as_bytes()))
}

fn home_of(home: &Path, series: &str, version: &str) -> PathBuf {
    home.join(format!("{series}-{version}-{}", fragment_key(series)))
}

/// The cached kernel of this version; of any version, if none is offered (no network, no lists).
fn cached(home: &Path, series: &str, version: Option<&str>) -> Option<Kernel> {
    let found = |dir: &Path, version: &str| {
        let image = dir.join("bzImage");
        image.is_file().then(|| Kernel { series: series.into(), version: version.into(), image })
    };
    if let Some(version) = version {
        return found(&home_of(home, series, version), version);
    }
    let prefix = format!("{series}-");
    let suffix = format!("-{}", fragment_key(series));
    fs::read_dir(home).ok()?.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let version = name.strip_prefix(&prefix)?.strip_suffix(&suffix)?;
        found(&entry.path(), version)
    })
}

fn lock(path: &Path) -> Result<Flock<File>> {
    let open = || OpenOptions::new().create(true).append(true).open(path);
    let file = open().trying(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((_, _)) => eprintln!("infill: another process is building this kernel; waiting for it"),
    }
    let file = open().trying(|| format!("cannot open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).trying(|| format!("cannot lock {}", path.display()))
}

fn wipe(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).trying(|| format!("cannot remove {}", dir.display())),
        _ => Ok(()),
    }
}

/// Downloads the source package into `work` from the first that has it; gives its version.
fn fetch(package: &str, sources: &[Apt], work: &Path) -> Result<String> {
    let progress = Progress::begin(format!("downloading {package}"));
    let mut refused = Vec::new();
    if !sources.iter().any(|apt| apt.download(package, work).map_err(|e| refused.push(e.to_string())).is_ok()) {
        return Err(LabError::Failed(format!(
            "cannot download {package} (6.1 and 6.12 are in Debian 12 and its security updates, {FROM_FILES} in {}; is the network up, \
             and are the package lists current? `apt-get update` as root refreshes them): {}",
            NEWER_SUITES.join(", "),
            refused.join("; ")
        )));
    }
    let deb = only_file(work, ".deb")?;
    let name = deb.file_name().unwrap_or_default().to_string_lossy();
    let version = name.split('_').nth(1).unwrap_or("unknown").to_owned();
    progress.finish(&version);
    Ok(version)
}

fn only_file(dir: &Path, ending: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).trying(|| format!("cannot list {}", dir.display()))?;
    let mut names = entries.flatten().map(|e| e.path());
    names.find(|p| p.to_string_lossy().ends_with(ending)).ok_or_else(|| LabError::Failed(format!("no file *{ending} in {}", dir.display())))
}

fn unpack(series: &str, work: &Path) -> Result<PathBuf> {
    let progress = Progress::begin(format!("unpacking the source of Linux {series}"));
    let deb = only_file(work, ".deb")?;
    let files = work.join("package");
    run(Command::new("dpkg").arg("-x").args([&deb, &files]))?;
    let archive = only_file(&files.join("usr/src"), ".tar.xz")?;
    let tree = work.join("linux");
    fs::create_dir_all(&tree).trying(|| format!("cannot make {}", tree.display()))?;
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(&archive).arg("-C").arg(&tree);
    run(tar.arg("--strip-components=1"))?;
    progress.finish("done");
    Ok(tree)
}

/// Writes `.config` and checks that every wanted symbol has its wanted value in it.
fn configure(series: &str, tree: &Path, fragment: &str) -> Result<()> {
    run(Command::new("make").args(["-s", "tinyconfig"]).current_dir(tree))?;
    let path = tree.join(".config");
    let what = || format!("cannot write {}", path.display());
    // Of two lines for one symbol the later one counts.
    let mut file = OpenOptions::new().append(true).open(&path).trying(what)?;
    file.write_all(fragment.as_bytes()).trying(what)?;
    run(Command::new("make").args(["-s", "olddefconfig"]).current_dir(tree))?;
    let config = fs::read_to_string(&path).trying(|| format!("cannot read {}", path.display()))?;
    let wrong = unmet(fragment, &config);
    if wrong.is_empty() {
        return Ok(());
    }
    Err(LabError::Failed(format!("Linux {series} cannot be configured as src/lab/kernel.config wants; not met: {}", wrong.join(" "))))
}

/// Lines of the fragment that the final configuration does not honour.
fn unmet<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let set: std::collections::HashSet<&str> = config.lines().collect();
    fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter(|line| match line.strip_suffix("=n") {
            Some(symbol) => set.iter().any(|l| l.starts_with(&format!("{symbol}="))),
            None => !set.contains(line),
        })
        .collect()
}

fn compile(series: &str, tree: &Path, log_path: &Path) -> Result<()> {
    let mut progress = Progress::begin(format!("building Linux {series} (some minutes, once)"));
    let mut log = File::create(log_path).trying(|| format!("cannot write {}", log_path.display()))?;
    let (reader, writer) = pipe().trying(|| "cannot make a pipe")?;
    let errors = writer.try_clone().trying(|| "cannot make a pipe")?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = Command::new("make");
    make.args([&format!("-j{jobs}"), "bzImage"]).current_dir(tree);
    make.stdin(Stdio::null()).stdout(writer).stderr(errors);
    let mut child = make.spawn().trying(|| "cannot start make")?;
    drop(make); // holds the pipe's writing ends, and the loop below waits for their end
    let mut compiled = 0_u32;
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.trying(|| "cannot read what make prints")?;
        log.write_all(&[&line[..], b"\n"].concat()).trying(|| format!("cannot write {}", log_path.display()))?;
        compiled += u32::from(line.trim_ascii_start().starts_with(b"CC "));
        progress.update(|| format!("{compiled} files compiled"));
    }
    let status = child.wait().trying(|| "cannot wait for make")?;
    if !status.success() {
        let text = fs::read(log_path).unwrap_or_default();
        return Err(LabError::Failed(format!(
            "building Linux {series} failed ({status}); the whole log is {}, its end:\n{}",
            log_path.display(),
            last_lines(&String::from_utf8_lossy(&text), LOG_TAIL_LINES)
        )));
    }
    progress.finish(&format!("{compiled} files compiled"));
    Ok(())
}

/// Moves image and configuration to their place, the image last: it is what [`cached`] looks for.
fn keep(home: &Path, series: &str, version: &str, tree: &Path) -> Result<Kernel> {
    let dir = home_of(home, series, version);
    fs::create_dir_all(&dir).trying(|| format!("cannot make {}", dir.display()))?;
    for (from, to) in [(".config", "config"), ("arch/x86/boot/bzImage", "bzImage")] {
        let part = dir.join(format!("{to}.part"));
        fs::copy(tree.join(from), &part)
            .and_then(|_| fs::rename(&part, dir.join(to)))
            .trying(|| format!("cannot store {to} in {}", dir.display()))?;
    }
    Ok(Kernel { series: series.into(), version: version.into(), image: dir.join("bzImage") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmet_names_what_is_absent_or_should_be() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=60\nCONFIG_C=n\nCONFIG_D=n\nCONFIG_E=y\n";
        let config = "CONFIG_A=y\nCONFIG_B=60\nCONFIG_C=y\n# CONFIG_D is not set\nCONFIG_EE=y\n";
        assert_eq!(unmet(fragment, config), ["CONFIG_C=n", "CONFIG_E=y"]);
    }

    #[test]
    fn a_setting_is_left_out_where_it_does_not_exist() {
        assert!(fragment_of("6.12").contains("\nCONFIG_CACHESTAT_SYSCALL=y\n"));
        assert!(!fragment_of("6.1").contains("CACHESTAT"));
        assert!(fragment_of("6.1").contains("\nCONFIG_SMP=y\n"));
        assert!(fragment_of("6.12").contains("\nCONFIG_CACHEFILES=y\n") && !fragment_of(FROM_FILES).contains("CACHEFILES"));
        assert!(fragment_of(FROM_FILES).contains("\nCONFIG_FANOTIFY=y\n") && !fragment_of("6.12").contains("FANOTIFY"));
        assert!(SERIES.iter().all(|series| !fragment_of(series).contains('#')));
    }

    #[test]
    fn without_an_offer_any_cached_kernel_of_this_fragment_will_do() {
        let home = tempfile::tempdir().expect("a scratch directory");
        let dir = home_of(home.path(), "6.1", "6.1.5-1");
        fs::create_dir_all(&dir).expect("mkdir");
        assert_eq!(cached(home.path(), "6.1", None), None, "no image yet");
        fs::write(dir.join("bzImage"), b"x").expect("write");
        let kernel = cached(home.path(), "6.1", None).expect("found");
        assert_eq!(kernel.version, "6.1.5-1");
        assert_eq!(cached(home.path(), "6.1", Some("6.1.6-1")), None);
        assert_eq!(cached(home.path(), "6.12", None), None);
    }
}
