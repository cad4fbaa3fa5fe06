//! Mounts that nobody watches: when the last process that held their group has died, the kernel lets readers through to
//! what is not there, and keeps the zeros in its cache.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::blobs::BLOBS_DIR;

/// The mounts of this process, and what is mounted.
const MOUNTS: &str = "/proc/self/mountinfo";
/// What stands before the part of a line that does not depend on the place of the mount.
const SEPARATOR: &[u8] = b"-";

/// Such a mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Poisoned {
    /// Where it is.
    pub at: PathBuf,
    /// The file of its image.
    pub image: PathBuf,
}

/// EROFS mounts of this namespace whose image's file lies in `cache_dir`. If the groups of an earlier daemon are lost, all of
/// them may have shown zeros: they are to be unmounted, and mounted anew.
///
/// # Errors
/// /proc is not there.
pub fn poisoned(cache_dir: &Path) -> io::Result<Vec<Poisoned>> {
    let dir = cache_dir.join(BLOBS_DIR);
    let dir = std::fs::canonicalize(&dir).unwrap_or(dir);
    Ok(erofs(&std::fs::read(MOUNTS)?).filter(|mount| lies_in(&mount.image, &dir)).collect())
}

/// Whether a file lies in a directory, whatever became of the file.
fn lies_in(file: &Path, dir: &Path) -> bool {
    let parent = file.parent().unwrap_or(file);
    file.starts_with(dir) || std::fs::canonicalize(parent).is_ok_and(|parent| parent == dir)
}

/// The EROFS mounts in a list of them: `ID PARENT DEV ROOT AT OPTIONS FIELDS... - TYPE SOURCE OPTIONS` (proc_pid_mountinfo(5)).
fn erofs(list: &[u8]) -> impl Iterator<Item = Poisoned> {
    list.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut words = line.split(|&byte| byte == b' ');
        let at = words.nth(4)?;
        let mut of = words.skip_while(|word| *word != SEPARATOR).skip(1);
        (of.next()? == b"erofs").then_some(())?;
        Some(Poisoned { at: unescape(at), image: unescape(of.next()?) })
    })
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
            bad line\n42 22 0:52 / /mnt/d\\ ro - erofs\n";
        let found: Vec<_> = erofs(list).collect();
        let mount = |at: &str, image: &str| Poisoned { at: at.into(), image: image.into() };
        assert_eq!(found, [mount("/mnt/a b", "/var/cache/infill/blobs/ab"), mount("/mnt/c", "/other/image")]);
        let ours: Vec<_> = found.iter().filter(|mount| lies_in(&mount.image, Path::new("/var/cache/infill/blobs"))).collect();
        assert_eq!(ours, [&found[0]]);
        assert_eq!(unescape(b"a\\134b\\9"), Path::new("a\\b\\9"));
    }
}
