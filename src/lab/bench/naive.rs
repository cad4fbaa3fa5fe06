//! The daemons to compare with: one thread, one request at a time, through the page cache. poll, read, pread, pwrite,
//! ioctl. One brings exactly the bytes that were asked for, the other everything at the first request for a blob.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use memmap2::MmapMut;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::front::cachefiles::{BindOptions, Device};
use crate::front::{FrontEnd, NeedRequest, ObjectId, OpenRequest, Outcome, Request, Sink};
use crate::lab::{LabError, Result, Trying};

/// Longest copy at a time.
const BUFFER_BYTES: usize = 1 << 20;

struct Object {
    sink: Arc<dyn Sink>,
    blob: File,
    len_bytes: u64,
    /// Everything was brought.
    whole: bool,
}

struct Naive<'a> {
    store: &'a Path,
    /// Bring everything at the first request.
    all: bool,
    objects: HashMap<ObjectId, Object>,
    /// Page-aligned, as writes to the cache must be.
    buffer: MmapMut,
}

/// Serves the files of the directory `store` by their names until killed; with `all`, each as a whole at its first
/// request.
///
/// # Errors
/// The device cannot be had, or fails.
pub fn serve(cache_dir: &Path, store: &Path, all: bool) -> Result<Infallible> {
    let device = Device::bind(&BindOptions::new(cache_dir)).map_err(|e| LabError::Failed(e.to_string()))?;
    let buffer = MmapMut::map_anon(BUFFER_BYTES).trying(|| "cannot have a buffer")?;
    let mut naive = Naive { store, all, objects: HashMap::new(), buffer };
    loop {
        let mut fds = [PollFd::new(device.requests(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).trying(|| "cannot wait for requests")?;
        while let Some(request) = device.next().map_err(|e| LabError::Failed(e.to_string()))? {
            naive.handle(request);
        }
    }
}

impl Naive<'_> {
    fn handle(&mut self, request: Request) {
        // An answer that the kernel does not want any more is nothing to this daemon.
        let _ = match request {
            Request::Open(open) => self.open(open),
            Request::Need(need) | Request::Present(need) => self.need(need),
            Request::Close(id) => {
                self.objects.remove(&id);
                Ok(true)
            }
        };
    }

    fn open(&mut self, open: OpenRequest) -> std::io::Result<bool> {
        let OpenRequest { object, key, ticket, sink } = open;
        let path = self.store.join(std::ffi::OsStr::from_bytes(key.name()));
        let found = File::open(path).and_then(|blob| Ok((blob.metadata()?.len(), blob)));
        match found {
            Ok((len_bytes, blob)) => {
                self.objects.insert(object, Object { sink, blob, len_bytes, whole: false });
                ticket.answer(Outcome::Opened { len_bytes })
            }
            Err(_) => ticket.answer(Outcome::Failed(Errno::ENOENT)),
        }
    }

    fn need(&mut self, need: NeedRequest) -> std::io::Result<bool> {
        let copied = match self.objects.get_mut(&need.object) {
            Some(object) => {
                let everything = self.all && !object.whole;
                object.whole = self.all;
                copy(object, if everything { 0..object.len_bytes.next_multiple_of(4096) } else { need.range }, &mut self.buffer)
            }
            None => Err(Errno::ENOENT.into()),
        };
        need.ticket.answer(if copied.is_ok() { Outcome::Done } else { Outcome::Failed(Errno::EIO) })
    }
}

fn copy(object: &Object, range: std::ops::Range<u64>, buffer: &mut [u8]) -> std::io::Result<()> {
    let end = range.end.min(object.len_bytes.next_multiple_of(4096));
    let mut at = range.start;
    while at < end {
        let want = usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
        let mut len = 0;
        while len < want
            && let n @ 1.. = object.blob.read_at(&mut buffer[len..want], at + len as u64)?
        {
            len += n;
        }
        // The rest of the last page.
        buffer[len..want].fill(0);
        let offset = i64::try_from(at).map_err(|_| Errno::EFBIG)?;
        let written = nix::sys::uio::pwrite(object.sink.as_fd(), &buffer[..want], offset)?;
        if written == 0 {
            return Err(Errno::EIO.into());
        }
        at += written as u64;
    }
    Ok(())
}
