//! Sharing a file's blocks with another file, and seeing how much of a file is shared, which neither std nor nix offers.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;

mod sys {
    #![allow(missing_docs, reason = "made by a macro")]
    // FICLONE, _IOW(0x94, 9, int): 0x40049409 (include/uapi/linux/fs.h). The argument is a descriptor.
    nix::ioctl_write_int!(ficlone, 0x94, 9);
    // FS_IOC_FIEMAP, _IOWR('f', 11, struct fiemap): the size in its number is that of the head alone.
    nix::ioctl_readwrite!(fiemap, b'f', 11, super::Head);
}

/// Extents that are asked for at a time.
const EXTENTS: usize = 64;
/// `FIEMAP_EXTENT_LAST` (include/uapi/linux/fiemap.h, as all of this).
const LAST: u32 = 0x1;
/// `FIEMAP_EXTENT_SHARED`.
const SHARED: u32 = 0x2000;

/// `struct fiemap`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct Head {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
#[derive(Debug)]
struct Map {
    head: Head,
    extents: [Extent; EXTENTS],
}

/// How many bytes of a file lie in blocks that other files have too: removing the file does not free them. What is not
/// written to the disk yet counts as its own.
///
/// # Errors
/// `EOPNOTSUPP`: the file system does not tell. Else what ioctl(2) says.
pub fn shared_bytes(file: impl AsFd) -> Result<u64, Errno> {
    let (mut start, mut shared) = (0, 0);
    loop {
        let head = Head { start, length: u64::MAX - start, extent_count: EXTENTS as u32, ..Head::default() };
        let mut map = Map { head, extents: [Extent::default(); EXTENTS] };
        // SAFETY: the structure is a head and room for as many extents as it says, and lives through the call.
        unsafe { sys::fiemap(file.as_fd().as_raw_fd(), (&raw mut map).cast()) }?;
        let found = &map.extents[..(map.head.mapped_extents as usize).min(EXTENTS)];
        shared += found.iter().filter(|extent| extent.flags & SHARED != 0).map(|extent| extent.length).sum::<u64>();
        match found.last() {
            Some(last) if last.flags & LAST == 0 && last.length > 0 => start = last.logical.saturating_add(last.length),
            _ => return Ok(shared),
        }
    }
}

/// Makes `to` a copy of the whole of `from`, which must be open for reading, by sharing its blocks: ioctl_ficlone(2).
/// What is dirty in memory is written first, so the copy is what a reader sees; holes stay holes.
///
/// # Errors
/// `EXDEV`: they are on two file systems. `EOPNOTSUPP`, `ENOTTY` or `EINVAL`: the file system cannot do it, or not with
/// these files. Else what ioctl_ficlone(2) says.
pub fn clone_whole(to: BorrowedFd<'_>, from: BorrowedFd<'_>) -> Result<(), Errno> {
    let source = u64::try_from(from.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    // SAFETY: both descriptors are open while borrowed, and the argument is a plain number: the kernel follows no
    // pointer.
    unsafe { sys::ficlone(to.as_raw_fd(), source) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_of_its_own_shares_nothing() {
        let mut file = tempfile::tempfile_in(".").unwrap();
        file.write_all(&[7; 300_000]).unwrap();
        file.sync_all().unwrap();
        match shared_bytes(&file) {
            Ok(shared) => assert_eq!(shared, 0),
            Err(errno) => eprintln!("not run: the file system here does not tell: {errno}"),
        }
        let copy = tempfile::tempfile_in(".").unwrap();
        match clone_whole(copy.as_fd(), file.as_fd()) {
            Ok(()) => assert_eq!(shared_bytes(&copy), Ok(300_000_u64.next_multiple_of(4096))),
            Err(errno) => eprintln!("not run: the file system here shares no blocks: {errno}"),
        }
    }
}
