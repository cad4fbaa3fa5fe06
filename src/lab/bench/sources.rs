//! Where the engine's bytes come from and go to, without disks: files in memory, devices that give and take anything, and
//! a source that is slow.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{ftruncate, pipe};

use super::machine::PAGE_BYTES;
use crate::front::Sink;
use crate::key::Key;
use crate::lab::{LabError, Result, Trying};
use crate::store::endless::Endless;
use crate::store::{Blob, FileBlob, SourceFile, SourceMode, Store, StoreError};

/// A store whose blobs are told apart by the first byte of their domain.
#[derive(Debug)]
pub(super) struct Shelf(pub(super) Vec<Arc<dyn Blob>>);

impl Shelf {
    /// A name for a blob, another one for each object.
    pub(super) fn key(blob: usize, object: u32) -> Key {
        Key::new(&[u8::try_from(blob).unwrap_or(u8::MAX)], object.to_string().as_bytes())
    }
}

impl Store for Shelf {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn open(&self, key: &Key) -> std::result::Result<Option<Arc<dyn Blob>>, StoreError> {
        Ok(key.domain().first().and_then(|&blob| self.0.get(usize::from(blob))).cloned())
    }
}

fn endless(fd: OwnedFd, len_bytes: u64) -> Result<Arc<dyn Blob>> {
    Ok(Arc::new(Endless::new(fd, len_bytes).trying(|| "cannot look at a source")?))
}

/// A blob of zeros that are read from a device at once.
pub(super) fn zeros(len_bytes: u64) -> Result<Arc<dyn Blob>> {
    let zero = OpenOptions::new().read(true).open("/dev/zero").trying(|| "cannot open /dev/zero")?;
    endless(zero.into(), len_bytes)
}

/// A blob that gives one page after each `pause`, whoever waits for it, until it is dropped.
pub(super) fn trickle(len_bytes: u64, pause: Duration) -> Result<Arc<dyn Blob>> {
    let (reader, writer) = pipe().trying(|| "cannot make a pipe")?;
    let mut writer = File::from(writer);
    let feed = move || {
        // Ends with the pipe's reader.
        while writer.write_all(&[0xA5; PAGE_BYTES as usize]).is_ok() {
            thread::sleep(pause);
        }
    };
    thread::Builder::new().name("trickle".into()).spawn(feed).trying(|| "cannot start a thread")?;
    endless(reader, len_bytes)
}

/// A blob whose pages are in memory, so that reading it is a copy.
pub(super) fn memory(len_bytes: u64) -> Result<Arc<dyn Blob>> {
    let fd = memory_file(0)?;
    let chunk = vec![0xA5; 1 << 20];
    for n in 0..len_bytes / chunk.len() as u64 {
        let offset = i64::try_from(n).unwrap_or(i64::MAX) << 20;
        nix::sys::uio::pwrite(&fd, &chunk, offset).trying(|| "cannot fill a file in memory")?;
    }
    let source = SourceFile::new(fd, SourceMode::Buffered).map_err(|e| LabError::Failed(format!("no source in memory: {e:?}")))?;
    Ok(Arc::new(FileBlob::new(source)))
}

fn memory_file(len_bytes: u64) -> Result<OwnedFd> {
    let fd = memfd_create(c"bench", MFdFlags::MFD_CLOEXEC).trying(|| "cannot make a file in memory")?;
    let len = i64::try_from(len_bytes).map_err(|_| LabError::Failed("a file too long".into()))?;
    ftruncate(&fd, len).trying(|| "cannot make a file in memory longer")?;
    Ok(fd)
}

/// A sink in memory.
pub(super) fn memory_sink(len_bytes: u64) -> Result<Arc<dyn Sink>> {
    Ok(Arc::new(memory_file(len_bytes)?))
}

/// A sink that takes everything at once and keeps nothing.
pub(super) fn null_sink() -> Result<Arc<dyn Sink>> {
    let null = OpenOptions::new().write(true).open("/dev/null").trying(|| "cannot open /dev/null")?;
    Ok(Arc::new(OwnedFd::from(null)))
}
