//! Disks and images for guests, as sparse files.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use super::{LabError, Result, Trying, packages, run};

/// The file systems a guest's cache may be on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheFs {
    /// One writer a file when holes are filled.
    Ext4,
    /// Writers of one file in parallel.
    Xfs,
}

impl CacheFs {
    /// The name mount(2) knows it by.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Makes an empty disk of this file system.
    ///
    /// # Errors
    /// What the operating system or the formatting program said.
    pub fn make(self, path: &Path, size_bytes: u64) -> Result<()> {
        match self {
            Self::Ext4 => ext4(path, size_bytes, None),
            Self::Xfs => xfs(path, size_bytes),
        }
    }
}

/// How an EROFS image is laid out.
#[derive(Clone, Copy, Default, Debug)]
pub struct ErofsLayout<'a> {
    /// Files are made of chunks this large (a power of two, at least 4096); without it each file's
    /// data is one run in the image.
    pub chunk_bytes: Option<u32>,
    /// The data goes to this file instead of the image.
    pub blob: Option<&'a Path>,
    /// Data is compressed by this algorithm, such as `lz4`.
    pub compression: Option<&'a str>,
}

/// A fixed identity for disks: ext4 places directories by it, and what is timed shall repeat.
const DISK_UUID: &str = "00000000-0000-4000-8000-000000000002";
/// A fixed time for image files, so that equal trees give equal images.
const IMAGE_TIME: &str = "1700000000";

/// Packs the directory `tree` into an EROFS image.
///
/// # Errors
/// What mkfs.erofs said.
pub fn erofs(image: &Path, tree: &Path, layout: ErofsLayout<'_>) -> Result<()> {
    let mut command = Command::new(program("mkfs.erofs")?);
    command.args(["--quiet", "--all-root", "-x-1", "-T", IMAGE_TIME]);
    command.args(["-U", "00000000-0000-4000-8000-000000000001"]);
    if let Some(chunk_bytes) = layout.chunk_bytes {
        command.arg(format!("--chunksize={chunk_bytes}"));
    }
    if let Some(algorithm) = layout.compression {
        command.arg(format!("-z{algorithm}"));
    }
    if let Some(blob) = layout.blob {
        command.arg(format!("--blobdev={}", blob.display()));
    }
    run(command.arg(image).arg(tree)).map(drop)
}

/// Makes an ext4 disk, with the content of a directory if one is given.
///
/// # Errors
/// What the operating system or mke2fs said.
pub fn ext4(path: &Path, size_bytes: u64, content: Option<&Path>) -> Result<()> {
    sparse(path, size_bytes)?;
    let mut command = Command::new(program("mke2fs")?);
    command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-U", DISK_UUID, "-E"]);
    command.arg(format!("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,hash_seed={DISK_UUID}"));
    if let Some(dir) = content {
        command.arg("-d").arg(dir);
    }
    run(command.arg(path)).map(drop)
}

/// Makes an empty XFS disk (at least 300 MiB, says mkfs.xfs), also for devices with blocks of 4 KiB.
///
/// # Errors
/// What the operating system or mkfs.xfs said.
pub fn xfs(path: &Path, size_bytes: u64) -> Result<()> {
    sparse(path, size_bytes)?;
    run(Command::new(program("mkfs.xfs")?).args(["-q", "-f", "-s", "size=4096", "-m"]).arg(format!("uuid={DISK_UUID}")).arg(path)).map(drop)
}

/// Makes a file of this length that takes no space yet.
///
/// # Errors
/// What the operating system said.
pub fn sparse(path: &Path, size_bytes: u64) -> Result<()> {
    File::create(path).and_then(|file| file.set_len(size_bytes)).trying(|| format!("cannot make the disk {}", path.display()))
}

/// Unit in which [`extents`] looks for zeros.
const EXTENT_BLOCK_BYTES: usize = 64 << 10;

/// Writes the parts of a disk image that are not zero, each as its offset, its length (both 64 bits, little endian)
/// and its bytes. For disks that are restored in a guest's memory.
///
/// # Errors
/// What the operating system said.
pub fn extents(image: &Path, mut out: impl Write) -> Result<()> {
    let what = || format!("cannot copy the data of {}", image.display());
    let mut file = File::open(image).trying(what)?;
    let mut block = vec![0; EXTENT_BLOCK_BYTES];
    let (mut offset, mut len) = (0_u64, 1);
    while len > 0 {
        len = 0;
        while len < block.len()
            && let n @ 1.. = file.read(&mut block[len..]).trying(what)?
        {
            len += n;
        }
        if block[..len].iter().any(|byte| *byte != 0) {
            for part in [&offset.to_le_bytes(), &(len as u64).to_le_bytes(), &block[..len]] {
                out.write_all(part).trying(what)?;
            }
        }
        offset += len as u64;
    }
    Ok(())
}

fn program(name: &str) -> Result<std::path::PathBuf> {
    packages::find(name).ok_or_else(|| LabError::Failed(format!("{name} is not installed on this machine")))
}
