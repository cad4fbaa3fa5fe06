//! Loop devices over the cache's files: what is read through one is not asked for, so holes read as zeros.

use std::fmt;
use std::path::{Path, PathBuf};

use super::mounted::{blobs_dir, lies_in};

/// Where the kernel lists block devices.
const BLOCK: &str = "/sys/block";
/// The file under a loop device, in its directory there.
const BACKING_FILE: &str = "loop/backing_file";

/// Such a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loop {
    /// Its name.
    pub device: String,
    /// The file.
    pub file: PathBuf,
}

impl fmt::Display for Loop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, file } = self;
        write!(
            f,
            "/dev/{device} is a loop device over {}: whoever reads it gets zeros for what is not in the cache, because the kernel does not ask; unmount what is on it, losetup -d /dev/{device}, and use infill mount",
            file.display()
        )
    }
}

/// Those over files of `cache_dir`.
#[must_use]
pub fn find(cache_dir: &Path) -> Vec<Loop> {
    find_in(Path::new(BLOCK), &blobs_dir(cache_dir))
}

fn find_in(block: &Path, blobs: &Path) -> Vec<Loop> {
    let devices = std::fs::read_dir(block).into_iter().flatten().flatten();
    let found = devices.filter_map(|device| {
        let file = std::fs::read_to_string(device.path().join(BACKING_FILE)).ok()?;
        let file = PathBuf::from(file.trim_end_matches('\n'));
        lies_in(&file, blobs).then(|| Loop { device: device.file_name().to_string_lossy().into_owned(), file })
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_over_our_files_are_found() {
        let (dir, blobs) = (tempfile::tempdir().unwrap(), Path::new("/var/cache/infill/blobs"));
        for (device, file) in [("loop0", "/other/disk"), ("loop1", "/var/cache/infill/blobs/ab"), ("loop2", "")] {
            std::fs::create_dir_all(dir.path().join(device).join("loop")).unwrap();
            if !file.is_empty() {
                std::fs::write(dir.path().join(device).join(BACKING_FILE), format!("{file}\n")).unwrap();
            }
        }
        std::fs::create_dir(dir.path().join("sda")).unwrap();
        let found = find_in(dir.path(), blobs);
        assert_eq!(found, [Loop { device: "loop1".into(), file: blobs.join("ab") }]);
        assert!(found[0].to_string().contains("losetup -d /dev/loop1"));
    }
}
