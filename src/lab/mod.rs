//! The lab: real kernels in QEMU, for `infill demo` and for the tests that need a kernel of their own.
//!
//! ```text
//!  packages   what the machine lacks -> apt-get, or one error that names the command
//!  apt        packages of the machine's release, or of a newer suite
//!  kernel     source package + kernel.config -> bzImage, cached outside the checkout
//!  initramfs  programs with their libraries, files, nodes -> a newc archive
//!  disk       ext4, XFS and EROFS images
//!  blobs      an EROFS image of thousands of blobs
//!  tree       a directory tree, and the manifest that says what it must read as
//!  guest      the guest both users want: infill inside, a cache disk, a store disk
//!  systemd    a guest whose first process is systemd, on a root file system of Debian packages
//!  qemu       kernel + initramfs + disks -> a boot, its console line by line, and how it ended
//!  demo       the job of `infill demo`, here or in a guest, and the tree it serves
//!  bench      the job of `infill bench guest`, and its figures
//!  progress   what a long job says of itself on a terminal
//!  init       PID 1 inside the guest (`infill lab-init`): mounts, the job, the power switch
//! ```
//! Nothing here is used by `infill serve`.

pub mod apt;
pub mod bench;
pub mod blobs;
pub mod demo;
pub mod disk;
pub mod guest;
pub mod init;
pub mod initramfs;
pub mod kernel;
pub mod packages;
pub mod progress;
pub mod qemu;
pub mod systemd;
pub mod tree;

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// How many lines of a failed program's output go into the error message.
const SHOWN_LINES: usize = 20;

/// Why something in the lab did not work. Every message names what was tried and what can be done.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Failed(String),
}

/// What lab functions return.
pub type Result<T> = std::result::Result<T, LabError>;

/// Says what was being tried when the operating system refused.
pub trait Trying<T> {
    /// Adds `what` (a phrase such as `cannot write /x`) to the error.
    ///
    /// # Errors
    /// The same failure with more words.
    fn trying<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<io::Error>> Trying<T> for std::result::Result<T, E> {
    fn trying<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| LabError::Io { what: what().to_string(), source: e.into() })
    }
}

/// Where kernels and answers of probes are kept between runs: `$INFILL_CACHE`, else
/// `$XDG_CACHE_HOME/infill`, else `~/.cache/infill`.
///
/// # Errors
/// None of these variables is set, or the directory cannot be made.
pub fn cache_dir() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    let dir = if let Some(dir) = set("INFILL_CACHE") {
        PathBuf::from(dir)
    } else if let Some(dir) = set("XDG_CACHE_HOME") {
        PathBuf::from(dir).join("infill")
    } else if let Some(home) = set("HOME") {
        PathBuf::from(home).join(".cache/infill")
    } else {
        return Err(LabError::Failed("no place to keep kernels: set INFILL_CACHE to a directory".into()));
    };
    std::fs::create_dir_all(&dir).trying(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// A directory in the cache directory that is removed when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes an empty directory of this process, and removes those that killed ones left.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn make(name: &str) -> Result<Self> {
        let home = cache_dir()?;
        for entry in std::fs::read_dir(&home).into_iter().flatten().flatten() {
            let file_name = entry.file_name();
            let pid = file_name.to_str().and_then(|f| f.strip_prefix(name)?.strip_prefix('-'));
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let path = home.join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).trying(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is only in the way.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Runs a program to its end and gives what it printed.
///
/// # Errors
/// It could not be started, or ended with anything but 0; the message holds the end of its output.
pub fn run(command: &mut Command) -> Result<Output> {
    let name = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().trying(|| format!("cannot start {name}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(LabError::Failed(format!("{name} failed ({}):\n{}", output.status, last_lines(&text, SHOWN_LINES))))
}

/// The last `count` lines of a text.
#[must_use]
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// What tells most of a log: its first complaints and its last lines, `count` of each at most.
#[must_use]
pub fn gist_of_log(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    let (before, last) = lines.split_at(lines.len().saturating_sub(count));
    let complains = |line: &&&str| ["WARN", "ERROR"].iter().any(|level| line.contains(level));
    before.iter().filter(complains).take(count).chain(last).copied().collect::<Vec<_>>().join("\n")
}

/// A 64-bit checksum: tells different contents apart by accident, not by attack. Eight bytes a step, so
/// that it is cheap enough for an emulated guest.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64;
    let mut words = bytes.chunks_exact(8);
    for word in words.by_ref() {
        let word = word.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
        hash = (hash ^ word).wrapping_mul(PRIME).rotate_left(23);
    }
    for byte in words.remainder() {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
    }
    hash ^ hash >> 29
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_sees_a_flipped_bit_anywhere_and_the_length() {
        let base = vec![7_u8; 1003];
        let sum = checksum(&base);
        for at in 0..base.len() {
            let mut other = base.clone();
            other[at] ^= 1;
            assert_ne!(checksum(&other), sum, "byte {at}");
        }
        assert_ne!(checksum(&base[..1002]), sum);
        assert_ne!(checksum(&[0; 8]), checksum(&[0; 16]));
    }

    #[test]
    fn a_failed_program_is_reported_with_its_last_words() {
        let error = run(Command::new("sh").args(["-c", "echo first; echo last >&2; exit 3"]));
        let text = error.expect_err("exit 3").to_string();
        assert!(text.contains("last") && text.contains('3'), "{text}");
    }
}
