//! Mounts of the cache's files, as /proc tells of them: in this mount namespace, and in those of other processes.
//!
//! Those that outlived the daemon and its keepers are *poisoned*: when the last process that held their groups has died, the
//! kernel lets readers through to what is not there, and keeps the zeros in its cache.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::makedev;

use super::blobs::BLOBS_DIR;

/// Where processes are found.
const PROC: &str = "/proc";
/// What stands before the part of a line that does not depend on the place of the mount.
const SEPARATOR: &[u8] = b"-";
/// Option of a mount through cachefiles' on-demand mode.
const ON_DEMAND: &[u8] = b"fsid=";

/// An EROFS mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mounted {
    /// Where it is.
    pub at: PathBuf,
    /// What is mounted: the file of the image, if it was mounted from files.
    pub image: PathBuf,
    /// Its file system (`st_dev`).
    pub device: u64,
    /// Its root is that of the image, and nothing is mounted on it.
    pub is_plain: bool,
    /// It was mounted through cachefiles.
    pub is_on_demand: bool,
    /// A process in the namespace that has it; `None`: it is this one's.
    pub seen_by: Option<i32>,
}

/// EROFS mounts of this namespace whose image's file lies in `cache_dir`.
///
/// # Errors
/// /proc is not there.
pub fn mounted(cache_dir: &Path) -> io::Result<Vec<Mounted>> {
    let dir = blobs_dir(cache_dir);
    Ok(all()?.into_iter().filter(|mount| lies_in(&mount.image, &dir)).collect())
}

/// The same of all namespaces; this one's come first. Namespaces that no process is in, or none that we may look into, are
/// left out.
///
/// # Errors
/// /proc is not there.
pub fn mounted_everywhere(cache_dir: &Path) -> io::Result<Vec<Mounted>> {
    let (dir, mut found) = (blobs_dir(cache_dir), mounted(cache_dir)?);
    let namespace = |process: &str| std::fs::read_link(format!("{PROC}/{process}/ns/mnt"));
    let mut seen: HashSet<_> = namespace("self").into_iter().collect();
    for pid in std::fs::read_dir(PROC)?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        if !namespace(&pid.to_string()).is_ok_and(|namespace| seen.insert(namespace)) {
            continue;
        }
        let list = std::fs::read(format!("{PROC}/{pid}/mountinfo")).unwrap_or_default();
        let theirs = erofs(&list).into_iter().filter(|mount| lies_in(&mount.image, &dir));
        found.extend(theirs.map(|mount| Mounted { seen_by: Some(pid), ..mount }));
    }
    Ok(found)
}

/// The EROFS mount of this namespace that `at` is the root of, whatever is mounted there. The last one hides the others.
///
/// # Errors
/// /proc is not there.
pub fn mounted_at(at: &Path) -> io::Result<Option<Mounted>> {
    Ok(all()?.into_iter().rfind(|mount| mount.at == at))
}

/// Whether a mount is of an image that lies in `cache_dir`.
#[must_use]
pub fn is_of_cache(mount: &Mounted, cache_dir: &Path) -> bool {
    lies_in(&mount.image, &blobs_dir(cache_dir))
}

fn all() -> io::Result<Vec<Mounted>> {
    Ok(erofs(&std::fs::read(format!("{PROC}/self/mountinfo"))?))
}

pub(super) fn blobs_dir(cache_dir: &Path) -> PathBuf {
    let dir = cache_dir.join(BLOBS_DIR);
    std::fs::canonicalize(&dir).unwrap_or(dir)
}

/// Whether a file lies in a directory, whatever became of the file.
pub(super) fn lies_in(file: &Path, dir: &Path) -> bool {
    let parent = file.parent().unwrap_or(file);
    file.starts_with(dir) || std::fs::canonicalize(parent).is_ok_and(|parent| parent == dir)
}

/// The EROFS mounts in a list of mounts (proc_pid_mountinfo(5)), in its order.
fn erofs(list: &[u8]) -> Vec<Mounted> {
    let lines: Vec<_> = list.split(|&byte| byte == b'\n').filter_map(Line::parse).collect();
    let parents: HashSet<_> = lines.iter().map(|line| line.parent).collect();
    let mounts = lines.iter().filter(|line| line.kind == b"erofs");
    mounts
        .map(|line| Mounted {
            at: unescape(line.at),
            image: unescape(line.source),
            device: line.device,
            is_plain: line.root == b"/" && !parents.contains(line.id),
            is_on_demand: line.options.split(|&byte| byte == b',').any(|option| option.starts_with(ON_DEMAND)),
            seen_by: None,
        })
        .collect()
}

/// A line: `ID PARENT DEV ROOT AT OPTIONS FIELDS... - TYPE SOURCE OPTIONS`.
struct Line<'a> {
    id: &'a [u8],
    parent: &'a [u8],
    device: u64,
    root: &'a [u8],
    at: &'a [u8],
    kind: &'a [u8],
    source: &'a [u8],
    options: &'a [u8],
}

impl<'a> Line<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut words = line.split(|&byte| byte == b' ');
        let (id, parent) = (words.next()?, words.next()?);
        let (major, minor) = std::str::from_utf8(words.next()?).ok()?.split_once(':')?;
        let device = makedev(major.parse().ok()?, minor.parse().ok()?);
        let (root, at) = (words.next()?, words.next()?);
        let mut of = words.skip_while(|word| *word != SEPARATOR).skip(1);
        Some(Self { id, parent, device, root, at, kind: of.next()?, source: of.next()?, options: of.next()? })
    }
}

/// A path, in which some bytes are written as a backslash and three octal digits (`mangle_path`, fs/seq_file.c).
fn unescape(text: &[u8]) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::new(), text);
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\').then(|| after.get(..3)).flatten().and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_our_files_are_found_among_others() {
        let list = b"22 1 0:20 / / rw shared:1 - ext4 /dev/root rw\n\
            40 22 0:50 / /mnt/a\\040b ro,relatime shared:9 master:1 - erofs /var/cache/infill/blobs/ab ro,user_xattr\n\
            41 22 0:51 / /mnt/c ro - erofs /other/image ro\n\
            43 41 0:60 / /mnt/c/d rw - tmpfs none rw\n\
            44 22 0:50 /in /mnt/e ro - erofs /var/cache/infill/blobs/ab ro,user_xattr\n\
            45 22 0:52 / /mnt/f ro - erofs a.img ro,fsid=a.img,domain_id=d\n\
            bad line\n42 22 0:52 / /mnt/d\\ ro - erofs\n";
        let found = erofs(list);
        let mount = |at: &str, image: &str, minor, is_plain, is_on_demand| Mounted {
            at: at.into(),
            image: image.into(),
            device: makedev(0, minor),
            is_plain,
            is_on_demand,
            seen_by: None,
        };
        let ab = "/var/cache/infill/blobs/ab";
        let expected = [
            mount("/mnt/a b", ab, 50, true, false),
            mount("/mnt/c", "/other/image", 51, false, false),
            mount("/mnt/e", ab, 50, false, false),
            mount("/mnt/f", "a.img", 52, true, true),
        ];
        assert_eq!(found, expected);
        let ours: Vec<_> = found.iter().filter(|mount| lies_in(&mount.image, Path::new("/var/cache/infill/blobs"))).collect();
        assert_eq!(ours, [&found[0], &found[2]]);
        assert_eq!(unescape(b"a\\134b\\9"), Path::new("a\\b\\9"));
    }
}
