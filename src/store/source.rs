//! Source files: how a blob's file is opened for the engine to read, and the blob that is one such file.

use std::fs::{File, Metadata};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Once};

use memmap2::MmapOptions;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::uio::pread;
use nix::unistd::{Whence, lseek};

use super::error::Cause;
use super::holes::Holes;
use super::resident::is_resident;
use super::{Blob, Data, Extent, SourceFile, SourceMode};
use crate::ops::erofs::on_erofs;
use crate::range::{align_down, page_bytes};

/// How a file is opened that is to become a source. `O_NONBLOCK` so that a FIFO cannot hold the caller up;
/// [`SourceFile::new`] takes it away again.
pub const OPEN_FLAGS: OFlag = OFlag::O_RDONLY.union(OFlag::O_CLOEXEC).union(OFlag::O_NOCTTY).union(OFlag::O_NONBLOCK);

/// Alignment in bytes of every direct read that the engine makes: of offset, length and memory.
pub const DIRECT_ALIGN_BYTES: usize = 4096;

/// Unit of `st_blocks` (inode(7)).
const STAT_BLOCK_BYTES: u64 = 512;

impl SourceFile {
    /// Makes a source of a file that was opened with [`OPEN_FLAGS`].
    ///
    /// A mode that the file system refuses is replaced by [`SourceMode::Buffered`]; [`SourceFile::mode`]
    /// says which it became. No `posix_fadvise` in that mode: `RANDOM` would switch read-ahead off for
    /// streams, `SEQUENTIAL` would double it for the small reads of a random reader, and the engine asks
    /// for whole windows anyway.
    ///
    /// # Errors
    /// The file is not a regular one, lies on EROFS, or the system refused.
    pub fn new(fd: OwnedFd, wanted: SourceMode) -> Result<Self, Cause> {
        let file = File::from(fd);
        let found = file.metadata().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        if let Some(kind) = unfit_kind(SFlag::from_bits_truncate(found.mode()) & SFlag::S_IFMT) {
            return Err(Cause::NotAFile(kind));
        }
        if on_erofs(&file)? {
            return Err(Cause::OnErofs);
        }
        // Without O_NONBLOCK from here on: with it, io_uring would return EAGAIN instead of waiting on
        // file systems that cannot do better (io_rw_init_file, io_uring/rw.c).
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
        let mut source = Self::unchecked(file, &found);
        match wanted {
            SourceMode::Buffered => {}
            SourceMode::Direct => source.try_direct()?,
            SourceMode::Mmap if source.try_map() => source.mode = SourceMode::Mmap,
            SourceMode::Mmap => {}
            SourceMode::Auto => {
                source.try_direct()?;
                source.try_see();
            }
        }
        Ok(source)
    }

    /// A source of whatever `file` is, of the length that was `found`, to be read through the page cache. Nothing is tried.
    pub(crate) fn unchecked(file: File, found: &Metadata) -> Self {
        let (len_bytes, device, identity) = (found.len(), found.dev(), found.into());
        Self { fd: file.into(), len_bytes, device, identity, mode: SourceMode::Buffered, map: None }
    }

    /// Whether a range that starts with a page had better be written from the mapped pages than be read: they are
    /// there, and all in memory. Never blocks, and takes no lock that is held for longer than a moment.
    #[must_use]
    pub fn is_in_memory(&self, offset: u64, len_bytes: u64) -> bool {
        self.map.is_some() && is_resident(&self.fd, offset, len_bytes).unwrap_or(false)
    }

    /// Maps the file if it can be seen what of it is in memory: a map that is used blindly would read through
    /// the page cache, which costs more than to read past it.
    fn try_see(&mut self) {
        static SAID: Once = Once::new();
        match is_resident(&self.fd, 0, 1) {
            Ok(_) => drop(self.try_map()),
            Err(errno) => SAID.call_once(|| {
                let takes = match errno {
                    Errno::ENOSYS => "Linux 6.5, and in a container a seccomp filter that knows the call",
                    Errno::EPERM => {
                        "the blobs' owner or somebody who may write them, and in a container a seccomp filter that allows the call"
                    }
                    _ => "another file system",
                };
                tracing::info!(
                    "cannot see which blobs are in memory (cachestat: {errno}), so all are read from their disks; that takes {takes}"
                );
            }),
        }
    }

    /// Changes to direct reads if one of them works.
    fn try_direct(&mut self) -> Result<(), Errno> {
        if fcntl(&self.fd, FcntlArg::F_SETFL(OFlag::O_DIRECT)).is_ok() {
            if self.len_bytes == 0 || direct_read_works(&self.fd) {
                self.mode = SourceMode::Direct;
                return Ok(());
            }
            fcntl(&self.fd, FcntlArg::F_SETFL(OFlag::empty()))?;
        }
        Ok(())
    }

    /// Maps the file if that is possible, and says whether it was. It is not on some file systems (`ENODEV`), and
    /// not beyond `vm.max_map_count` mappings (`ENOMEM`), which a dense host can reach.
    fn try_map(&mut self) -> bool {
        let map = match usize::try_from(self.len_bytes) {
            // An empty file cannot be mapped, and has no bytes that would need it.
            Ok(0) => Ok(None),
            Ok(len_bytes) => MmapOptions::new().len(len_bytes).map_raw_read_only(&self.fd).map(Some),
            Err(_) => return false,
        };
        let mapped = map.is_ok();
        self.map = map.unwrap_or(None);
        mapped
    }
}

/// What a file is that cannot be a blob; `None` for a regular file.
fn unfit_kind(kind: SFlag) -> Option<&'static str> {
    match kind {
        SFlag::S_IFREG => None,
        SFlag::S_IFDIR => Some("a directory"),
        SFlag::S_IFIFO => Some("a FIFO"),
        SFlag::S_IFCHR | SFlag::S_IFBLK => Some("a device"),
        _ => Some("not a file with data"),
    }
}

/// Whether a direct read of [`DIRECT_ALIGN_BYTES`] works. Length and memory are aligned to that and to no
/// more, so a device that needs a coarser alignment refuses. It is made where the file has data, because
/// a hole is read without the device having a say.
fn direct_read_works(fd: &OwnedFd) -> bool {
    let mut memory = vec![0_u8; 4 * DIRECT_ALIGN_BYTES];
    let start = memory.as_ptr().align_offset(2 * DIRECT_ALIGN_BYTES).saturating_add(DIRECT_ALIGN_BYTES);
    let Some(buffer) = memory.get_mut(start..start.saturating_add(DIRECT_ALIGN_BYTES)) else {
        return false;
    };
    let data = lseek(fd, 0, Whence::SeekData).unwrap_or(0).cast_unsigned();
    let offset = align_down(data, DIRECT_ALIGN_BYTES as u64).cast_signed();
    pread(fd, buffer, offset).is_ok()
}

/// A blob that is one file.
///
/// Blobs do not change while they are open: that is the contract with whoever keeps the store. A file that is
/// written all the same is not served by its old holes: what was a hole counts as one only as long as the file's
/// change time is still that of the opening. (Writes in the same tick of the clock as the last one before the
/// opening go unnoticed, some milliseconds.)
#[derive(Debug)]
pub struct FileBlob {
    file: [Arc<SourceFile>; 1],
    holes: Holes,
    /// When the file was changed last, before its holes were looked for.
    changed: (i64, i64),
}

impl FileBlob {
    /// The blob that has the bytes of `file`. May block.
    #[must_use]
    pub fn new(file: SourceFile) -> Self {
        let stat = fstat(&file.fd);
        let is_sparse = |stat: &FileStat| stat.st_blocks.cast_unsigned().saturating_mul(STAT_BLOCK_BYTES) < file.len_bytes;
        let (holes, changed) = match &stat {
            Ok(stat) if is_sparse(stat) => (Holes::of_file(&file.fd, file.len_bytes, page_bytes()), change_time(stat)),
            _ => Default::default(),
        };
        Self { file: [Arc::new(file)], holes, changed }
    }

    fn is_unchanged(&self) -> bool {
        fstat(&self.file[0].fd).is_ok_and(|stat| change_time(&stat) == self.changed)
    }
}

const fn change_time(stat: &FileStat) -> (i64, i64) {
    (stat.st_ctime, stat.st_ctime_nsec)
}

impl Blob for FileBlob {
    fn len_bytes(&self) -> u64 {
        self.file[0].len_bytes
    }

    /// The file's data and its large holes in turn; small holes are part of the data and read as zeros.
    fn extent(&self, offset: u64) -> Extent {
        debug_assert!(offset < self.len_bytes(), "extent beyond the blob");
        let (is_hole, end) = self.holes.at(offset);
        let data = if is_hole && self.is_unchanged() {
            Data::Zero
        } else if self.file[0].mode == SourceMode::Mmap {
            Data::Mapped { file: 0, offset }
        } else {
            Data::Read { file: 0, offset }
        };
        Extent { len_bytes: end.min(self.len_bytes()).saturating_sub(offset), data }
    }

    fn files(&self) -> &[Arc<SourceFile>] {
        &self.file
    }

    fn whole_file(&self) -> Option<&SourceFile> {
        let file = &*self.file[0];
        (file.len_bytes > 0).then_some(file)
    }
}
