//! A blob whose bytes come from a pipe or a device, for tests and benches: no store gives one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Blob, Data, Extent, SourceFile};

/// So many bytes of something that has no length of its own.
#[derive(Debug)]
pub(crate) struct Endless([Arc<SourceFile>; 1]);

impl Endless {
    /// A blob of `len_bytes` that are read from `fd`.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub(crate) fn new(fd: OwnedFd, len_bytes: u64) -> io::Result<Self> {
        let file = File::from(fd);
        let found = file.metadata()?;
        Ok(Self([Arc::new(SourceFile { len_bytes, ..SourceFile::unchecked(file, &found) })]))
    }
}

impl Blob for Endless {
    fn len_bytes(&self) -> u64 {
        self.0[0].len_bytes
    }

    fn extent(&self, offset: u64) -> Extent {
        Extent { len_bytes: self.len_bytes() - offset, data: Data::Read { file: 0, offset } }
    }

    fn files(&self) -> &[Arc<SourceFile>] {
        &self.0
    }
}
