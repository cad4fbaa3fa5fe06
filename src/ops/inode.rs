//! Which file an inode number stands for: numbers are given away again when their files are gone.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

mod sys {
    #![allow(missing_docs, reason = "made by a macro")]
    // FS_IOC_GETVERSION, _IOR('v', 1, long): the size in its number is that of a long, but an int is written
    // (ext4_ioctl, fs/ext4/ioctl.c; xfs_file_ioctl, fs/xfs/xfs_ioctl.c; btrfs_ioctl_getversion, fs/btrfs/ioctl.c).
    nix::ioctl_read!(getversion, b'v', 1, libc::c_long);
}

/// The generation of a file's inode: together with its number it names the file, and no later one (`i_generation`, which is
/// random or counts on; NFS relies on it).
///
/// # Errors
/// `ENOTTY`: the file system has none; ext4, XFS and btrfs have.
pub fn generation(file: impl AsFd) -> Result<u32, Errno> {
    let mut value: libc::c_long = 0;
    // SAFETY: the descriptor is open while borrowed, and the kernel writes an int through a pointer to a long of ours.
    unsafe { sys::getversion(file.as_fd().as_raw_fd(), &raw mut value) }?;
    let bytes = value.to_ne_bytes();
    Ok(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_given_away_again_gets_another_generation() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir_in(".").unwrap();
        let made = |name: &str| {
            let file = std::fs::File::create(dir.path().join(name)).unwrap();
            let id = generation(&file).map(|generation| (file.metadata().unwrap().ino(), generation));
            std::fs::remove_file(dir.path().join(name)).unwrap();
            id
        };
        match (0..100).map(|_| made("a")).collect::<Result<Vec<_>, _>>() {
            Ok(mut ids) => {
                ids.sort_unstable();
                ids.dedup();
                assert_eq!(ids.len(), 100, "{ids:?}");
            }
            Err(errno) => eprintln!("not run: the file system here has no generations: {errno}"),
        }
    }
}
