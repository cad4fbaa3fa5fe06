//! The extent size hint of XFS directories.
//!
//! cachefiles looks for the next hole before each read, and XFS walks every extent from there to do that: a
//! cache file made of many small extents makes reads slow that have nothing to fetch. With a hint on the
//! directory, files made below it take their space in large pieces.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// `FS_XFLAG_EXTSIZE` (include/uapi/linux/fs.h).
const EXTSIZE: u32 = 0x800;
/// `FS_XFLAG_EXTSZINHERIT` (include/uapi/linux/fs.h).
const EXTSZINHERIT: u32 = 0x1000;

/// `struct fsxattr` (include/uapi/linux/fs.h).
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

mod sys {
    #![allow(missing_docs, reason = "made by macros")]
    nix::ioctl_read!(get, b'X', 31, super::FsXattr);
    nix::ioctl_write_ptr!(set, b'X', 32, super::FsXattr);
}

/// The size in bytes of the pieces in which what will be created below an open directory takes its space; `None`
/// if there is no hint.
///
/// # Errors
/// The file system knows no such hint.
pub fn hinted(dir: impl AsFd) -> Result<Option<u32>, Errno> {
    let attributes = attributes(&dir)?;
    Ok((attributes.xflags & EXTSZINHERIT != 0).then_some(attributes.extsize))
}

fn attributes(of: impl AsFd) -> Result<FsXattr, Errno> {
    let mut attributes = FsXattr::default();
    // SAFETY: the structure is the one that the kernel fills, and lives through the call.
    unsafe { sys::get(of.as_fd().as_raw_fd(), &raw mut attributes) }?;
    Ok(attributes)
}

fn set_attributes(of: impl AsFd, attributes: &FsXattr) -> Result<(), Errno> {
    // SAFETY: the structure is the one that the kernel reads, and lives through the call.
    unsafe { sys::set(of.as_fd().as_raw_fd(), attributes) }.map(drop)
}

/// Frees a new and empty file from the hint of its directory: it takes its space as it needs it.
///
/// # Errors
/// The file system knows no such hint, or the file has data.
pub fn unhint(file: impl AsFd) -> Result<(), Errno> {
    let mut attributes = attributes(&file)?;
    attributes.xflags &= !EXTSIZE;
    attributes.extsize = 0;
    set_attributes(file, &attributes)
}

/// Makes what will be created below an open directory take its space in pieces of `bytes`.
///
/// # Errors
/// The file system knows no such hint, or this process may not set it.
pub fn hint(dir: impl AsFd, bytes: u32) -> Result<(), Errno> {
    let mut attributes = attributes(&dir)?;
    attributes.xflags |= EXTSZINHERIT;
    attributes.extsize = bytes;
    set_attributes(dir, &attributes)
}
