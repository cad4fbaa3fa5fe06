//! Source files: how a blob's file is opened for the engine to read, and the blob that is one such file.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use memmap2::MmapOptions;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::uio::pread;
use nix::unistd::{Whence, lseek};

use super::beneath::file_type;
use super::error::Cause;
use super::{Blob, Data, Extent, SourceFile, SourceMode};
use crate::ops::erofs::on_erofs;
use crate::range::align_down;

/// How a file is opened that is to become a source. `O_NONBLOCK` so that a FIFO cannot hold the caller up;
/// [`SourceFile::new`] takes it away again.
pub const OPEN_FLAGS: OFlag = OFlag::O_RDONLY.union(OFlag::O_CLOEXEC).union(OFlag::O_NOCTTY).union(OFlag::O_NONBLOCK);

/// Alignment in bytes of every direct read that the engine makes: of offset, length and memory.
pub const DIRECT_ALIGN_BYTES: usize = 4096;

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
        let stat = fstat(&fd)?;
        if let Some(kind) = unfit_kind(file_type(&stat)) {
            return Err(Cause::NotAFile(kind));
        }
        if on_erofs(&fd)? {
            return Err(Cause::OnErofs);
        }
        // Without O_NONBLOCK from here on: with it, io_uring would return EAGAIN instead of waiting on
        // file systems that cannot do better (io_rw_init_file, io_uring/rw.c).
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty()))?;
        let mut source =
            Self { fd, len_bytes: u64::try_from(stat.st_size).map_err(|_| Errno::EOVERFLOW)?, mode: SourceMode::Buffered, map: None };
        match wanted {
            SourceMode::Buffered => {}
            SourceMode::Direct => source.try_direct()?,
            SourceMode::Mmap => source.try_map(),
        }
        Ok(source)
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

    /// Maps the file if that is possible. It is not on some file systems (`ENODEV`), and not beyond
    /// `vm.max_map_count` mappings (`ENOMEM`), which a dense host can reach.
    fn try_map(&mut self) {
        let map = match usize::try_from(self.len_bytes) {
            // An empty file cannot be mapped, and has no bytes that would need it.
            Ok(0) => Ok(None),
            Ok(len_bytes) => MmapOptions::new().len(len_bytes).map_raw_read_only(&self.fd).map(Some),
            Err(_) => return,
        };
        if let Ok(map) = map {
            self.map = map;
            self.mode = SourceMode::Mmap;
        }
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
#[derive(Debug)]
pub struct FileBlob {
    file: [Arc<SourceFile>; 1],
}

impl FileBlob {
    /// The blob that has the bytes of `file`.
    #[must_use]
    pub fn new(file: SourceFile) -> Self {
        Self { file: [Arc::new(file)] }
    }
}

impl Blob for FileBlob {
    fn len_bytes(&self) -> u64 {
        self.file[0].len_bytes
    }

    /// One extent to the end. A hole of a sparse file is part of it and read as zeros like any data.
    fn extent(&self, offset: u64) -> Extent {
        debug_assert!(offset < self.len_bytes(), "extent beyond the blob");
        let data = match self.file[0].mode {
            SourceMode::Mmap => Data::Mapped { file: 0, offset },
            SourceMode::Direct | SourceMode::Buffered => Data::Read { file: 0, offset },
        };
        Extent { len_bytes: self.len_bytes().saturating_sub(offset), data }
    }

    fn files(&self) -> &[Arc<SourceFile>] {
        &self.file
    }
}
