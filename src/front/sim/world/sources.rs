//! What operations on source files and sinks come to when nothing is injected: the disk's own doings.

use std::collections::HashMap;

use nix::errno::Errno;

use crate::front::sim::blob::{FileBytes, PAGE_BYTES, SimBlob};
use crate::front::sim::content::{Memory, Origin, Origins};
use crate::range::{ByteRange, align_down, align_up};
use crate::store::{Blob, SourceMode};

/// The state of all source files.
#[derive(Clone, Default, Debug)]
pub(super) struct Sources {
    /// Lengths of files that were truncated, by blob and file.
    truncated: HashMap<(u32, usize), u64>,
}

impl Sources {
    /// Cuts a file to `len` bytes. A mapped file is cut between pages: inside a page the mapping would go on
    /// with zeros, which nobody can tell from data.
    pub(super) fn truncate(&mut self, blob: &SimBlob, file: usize, len: u64) {
        let mapped = blob.files()[file].mode == SourceMode::Mmap || blob.may_be_mapped();
        let len = if mapped { align_down(len, PAGE_BYTES) } else { len };
        if len < self.len(blob, file) {
            self.truncated.insert((blob.id(), file), len);
        }
    }

    fn len(&self, blob: &SimBlob, file: usize) -> u64 {
        self.truncated.get(&(blob.id(), file)).copied().unwrap_or_else(|| blob.file_len(file))
    }

    /// A file's bytes as they are now.
    #[must_use]
    pub(super) fn bytes<'a>(&self, blob: &'a SimBlob, file: usize) -> FileBytes<'a> {
        FileBytes { blob, file, len: self.len(blob, file) }
    }

    /// Whether a part of a range of a blob can never be had again.
    #[must_use]
    pub(super) fn is_lost(&self, blob: &SimBlob, range: &ByteRange) -> bool {
        let mut at = range.start;
        while at < range.end.min(blob.len_bytes()) {
            let (source, run) = blob.source(at);
            let run = run.min(range.end - at).min(blob.len_bytes() - at);
            if let Some((file, offset)) = source
                && offset + run > self.len(blob, file)
            {
                return true;
            }
            at += run;
        }
        blob.is_broken(range)
    }

    /// What `pread(2)` of a file gives: the bytes up to the end or to a broken sector.
    ///
    /// # Errors
    /// `EIO` at a broken sector.
    pub(super) fn read(&self, blob: &SimBlob, file: usize, offset: u64, len: u64) -> Result<u64, Errno> {
        let available = self.len(blob, file).saturating_sub(offset).min(len);
        match blob.first_broken(file, &(offset..offset + available)) {
            Some(broken) if broken == offset => Err(Errno::EIO),
            Some(broken) => Ok(broken - offset),
            None => Ok(available),
        }
    }

    /// How much of a mapping a write can take from `offset` on before a page cannot be had.
    ///
    /// # Errors
    /// `EFAULT` if that is the first page.
    pub(super) fn mapped(&self, blob: &SimBlob, file: usize, offset: u64, len: u64) -> Result<u64, Errno> {
        let end = align_up(self.len(blob, file), PAGE_BYTES).min(offset + len);
        let broken = blob.first_broken(file, &(offset..end.max(offset)));
        let end = broken.map_or(end, |broken| align_down(broken, PAGE_BYTES));
        if end <= offset { Err(Errno::EFAULT) } else { Ok(end - offset) }
    }
}

/// Puts what a read of `n` bytes brought into memory, and garbage into the rest of its `len` bytes.
pub(super) fn land(memory: &mut Memory, at: u64, bytes: &FileBytes<'_>, offset: u64, n: u64, len: u64) {
    let mut done = 0;
    while done < n {
        let (origin, run) = bytes.at(offset + done);
        let run = run.min(n - done);
        memory.fill(at + done, run, origin);
        done += run;
    }
    memory.fill(at + n, len - n, Origin::Garbage);
}
