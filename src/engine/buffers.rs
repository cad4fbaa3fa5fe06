//! Memory that operations use: a shard's buffer slots, and mapped files of a store.
//!
//! An operation owns a [`Memory`], and a `Memory` keeps alive what it points into, so memory that the kernel
//! was given cannot be unmapped before the operation has ended.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, MmapRaw};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use serde::Serialize;

use crate::front::{MESSAGE_MAX_BYTES, MESSAGES_MAX};
use crate::range::page_bytes;
use crate::store::SourceFile;

/// Size that regions are rounded up to, so that huge pages can back them.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// `MADV_COLLAPSE` (include/uapi/asm-generic/mman-common.h, Linux 6.1): makes huge pages of what is there, or says that
/// it cannot. Not every C library knows it.
const MADV_COLLAPSE: libc::c_int = 25;
/// Unit in which messages are zeroed.
const WORD_BYTES: usize = size_of::<u64>();

/// What a region lies in. Huge pages spare the processor look-ups of addresses, and the kernel
/// pages to count in each operation; small ones work as well.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pages {
    /// Huge pages that the operator has reserved (`vm.nr_hugepages`).
    ReservedHuge,
    /// Transparent huge pages.
    TransparentHuge,
    /// Pages of the usual size, or nobody can tell (before Linux 6.1).
    #[default]
    Small,
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReservedHuge => "reserved huge pages",
            Self::TransparentHuge => "transparent huge pages",
            Self::Small => "small pages",
        })
    }
}

/// What a buffer's memory would lie in now, by taking as much as one huge page.
///
/// # Errors
/// There is no memory.
pub fn probe() -> io::Result<Pages> {
    Region::new(HUGE_PAGE_BYTES).map(|region| region.pages)
}

/// An anonymous mapping.
#[derive(Debug)]
pub(super) struct Region {
    base: NonNull<libc::c_void>,
    len: usize,
    pages: Pages,
}

// SAFETY: the region is plain memory. Who may touch which part when is decided by the machine's slots: a
// slot belongs to one fill until its last operation has ended.
unsafe impl Send for Region {}
// SAFETY: as above; `Region` itself offers no access.
unsafe impl Sync for Region {}

impl Region {
    /// Maps at least `len` bytes of zeros. What is long enough for huge pages is touched at once, so that it lies on the
    /// memory node of the calling thread, and so that nothing is left to be missing later.
    fn new(len: usize) -> io::Result<Self> {
        let region = if len < HUGE_PAGE_BYTES {
            Self::map(len.next_multiple_of(usize::try_from(page_bytes()).unwrap_or(HUGE_PAGE_BYTES)), MapFlags::MAP_NORESERVE)?
        } else {
            let len = len.next_multiple_of(HUGE_PAGE_BYTES);
            let transparent = Self::transparent(len)?;
            // Somebody may have reserved the others for a purpose.
            if transparent.pages == Pages::TransparentHuge { transparent } else { Self::reserved(len).unwrap_or(transparent) }
        };
        region.advise(libc::MADV_DONTFORK);
        Ok(region)
    }

    /// In huge pages that nobody else has reserved or uses. The kernel reserves them with the mapping, but a limit of
    /// the control group would show only at the first touch, and kill: so that is done here, where it is an error.
    fn reserved(len: usize) -> Option<Self> {
        let mut region = Self::map(len, MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB).ok()?;
        region.pages = Pages::ReservedHuge;
        region.advise(libc::MADV_POPULATE_WRITE).then_some(region)
    }

    /// Where huge pages can be, if the kernel has some. The last request gets them also where transparent ones are switched
    /// off for programs that do not ask.
    fn transparent(len: usize) -> io::Result<Self> {
        let (_, rest) = {
            let whole = Self::map(len + HUGE_PAGE_BYTES, MapFlags::MAP_NORESERVE)?;
            let start = whole.base.addr().get();
            whole.split(start.next_multiple_of(HUGE_PAGE_BYTES) - start)
        };
        let (mut region, _) = rest.split(len);
        region.advise(libc::MADV_HUGEPAGE);
        if region.advise(libc::MADV_POPULATE_WRITE) && region.advise(MADV_COLLAPSE) {
            region.pages = Pages::TransparentHuge;
        }
        Ok(region)
    }

    fn map(len: usize, flags: MapFlags) -> io::Result<Self> {
        let size = std::num::NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        // SAFETY: a new anonymous mapping, at an address of the kernel's choice, touches no existing memory.
        let base = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE | flags) }?;
        Ok(Self { base, len, pages: Pages::Small })
    }

    /// Two mappings out of one, the first `at` bytes long (whole pages).
    fn split(self, at: usize) -> (Self, Self) {
        let whole = std::mem::ManuallyDrop::new(self);
        let rest = whole.base.map_addr(|base| base.saturating_add(at));
        (Self { base: whole.base, len: at, pages: whole.pages }, Self { base: rest, len: whole.len - at, pages: whole.pages })
    }

    /// Whether the kernel took an advice.
    fn advise(&self, advice: libc::c_int) -> bool {
        // SAFETY: advice on a mapping that we own; none that is used here changes its contents for this process.
        let result = unsafe { libc::madvise(self.base.as_ptr(), self.len, advice) };
        result == 0
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        // SAFETY: the mapping is ours and nobody holds a pointer into it: every `Memory` holds an `Arc` of it.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}

/// A shard's buffer slots, with one more that is always zero.
#[derive(Debug)]
pub struct Buffers {
    region: Arc<Region>,
    slot_bytes: usize,
    slots: u32,
}

impl Buffers {
    /// Maps `slots` slots of `slot_bytes` (a multiple of the page size) and a zero slot.
    ///
    /// # Errors
    /// The kernel has no memory for it.
    pub fn new(slots: u32, slot_bytes: usize) -> io::Result<Self> {
        let len = slot_bytes.checked_mul(slots as usize + 1).ok_or(Errno::ENOMEM)?;
        Ok(Self { region: Arc::new(Region::new(len)?), slot_bytes, slots })
    }

    /// Part of a slot.
    ///
    /// # Panics
    /// If the part does not lie inside a slot, which would be a bug of the machine.
    #[must_use]
    pub fn slot(&self, slot: u32, offset: usize, len: usize) -> Memory {
        assert!(slot <= self.slots && offset <= self.slot_bytes && len <= self.slot_bytes - offset, "part outside of a slot");
        Memory { owner: Owner::Region(Arc::clone(&self.region)), offset: slot as usize * self.slot_bytes + offset, len }
    }

    /// Zeros, for reading only.
    pub(super) fn zeros(&self, len: usize) -> Memory {
        self.slot(self.slots, 0, len)
    }

    /// Sets part of a slot to zero.
    pub(super) fn clear(&mut self, slot: u32, offset: usize, len: usize) {
        let part = self.slot(slot, offset, len);
        // SAFETY: the part lies inside the mapping (checked by `slot`), and the slot belongs to a fill that
        // has no operation in flight when the machine asks for this.
        unsafe { std::ptr::write_bytes(part.ptr(), 0, part.len) };
    }

    /// What they lie in.
    pub(super) fn pages(&self) -> Pages {
        self.region.pages
    }

    /// The whole mapping, to be registered with a ring.
    #[must_use]
    pub fn whole(&self) -> Memory {
        Memory { owner: Owner::Region(Arc::clone(&self.region)), offset: 0, len: self.region.len }
    }
}

/// Where messages are read into: those of a batch lie one behind the other.
#[derive(Debug)]
pub(super) struct Messages(Owner);

impl Messages {
    /// In `given` memory if there is some (see [`crate::front::FrontEnd::message_memory`]).
    ///
    /// # Errors
    /// No memory, or too little was given.
    pub(super) fn new(given: Option<Arc<MmapRaw>>) -> io::Result<Self> {
        let len = MESSAGES_MAX as usize * MESSAGE_MAX_BYTES;
        match given {
            None => Ok(Self(Owner::Region(Arc::new(Region::new(len)?)))),
            Some(map) if map.len() >= len => Ok(Self(Owner::Given(map))),
            Some(_) => Err(Errno::ENOBUFS.into()),
        }
    }

    /// Where message `n` of a batch comes to lie.
    ///
    /// # Panics
    /// If a batch has none of that number.
    pub(super) fn slot(&self, n: u32) -> Memory {
        assert!(n < MESSAGES_MAX, "message outside of its batch");
        Memory { owner: self.0.clone(), offset: n as usize * MESSAGE_MAX_BYTES, len: MESSAGE_MAX_BYTES }
    }
}

#[derive(Clone, Debug)]
enum Owner {
    Region(Arc<Region>),
    File(Arc<SourceFile>),
    /// Of a front end, for messages.
    Given(Arc<MmapRaw>),
}

/// A piece of memory for one operation.
#[derive(Debug)]
pub struct Memory {
    owner: Owner,
    offset: usize,
    len: usize,
}

impl Memory {
    /// Pages of a mapped file. `None` if the file is not mapped or the part lies outside of its mapping
    /// (which reaches to the end of its last page).
    #[must_use]
    pub fn mapped(file: &Arc<SourceFile>, offset: u64, len: u64) -> Option<Self> {
        let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
        let mapped = file.map.as_ref()?.len().next_multiple_of(usize::try_from(page_bytes()).ok()?);
        (offset.checked_add(len)? <= mapped).then(|| Self { owner: Owner::File(Arc::clone(file)), offset, len })
    }

    pub(super) fn ptr(&self) -> *mut u8 {
        match &self.owner {
            Owner::Region(region) => region.base.as_ptr().cast::<u8>().wrapping_add(self.offset),
            Owner::File(file) => file.map.as_ref().map_or(std::ptr::null_mut(), |map| map.as_mut_ptr().wrapping_add(self.offset)),
            Owner::Given(map) => map.as_mut_ptr().wrapping_add(self.offset),
        }
    }

    /// Length in bytes; an operation moves less than 2 GiB, so it fits.
    #[allow(clippy::cast_possible_truncation, reason = "a slot is at most FILL_MAX_BYTES long")]
    pub(super) const fn len(&self) -> u32 {
        self.len as u32
    }

    /// The mapped file it is a part of, if it is.
    pub(super) const fn file(&self) -> Option<&Arc<SourceFile>> {
        match &self.owner {
            Owner::File(file) => Some(file),
            Owner::Region(_) | Owner::Given(_) => None,
        }
    }

    /// The beginning of what a read has put there.
    pub(super) fn bytes(&self, len: usize) -> &[u8] {
        // SAFETY: the memory is alive as long as `self` and long enough (checked when it was made, and here), the kernel
        // has initialised all of it, and it belongs to this operation, which has ended: nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.ptr(), len.min(self.len)) }
    }

    /// The message that a read with this result has put there was handed on: who finds given memory when this process is dead
    /// must not find the message too. Its first word goes first, so that a death in between leaves none that is half one.
    pub(super) fn consume(&self, result: i32) {
        let Owner::Given(_) = self.owner else { return };
        let len = usize::try_from(result).unwrap_or(0).min(self.len).next_multiple_of(WORD_BYTES);
        for at in (0..len).step_by(WORD_BYTES) {
            let word = self.ptr().wrapping_add(at).cast::<u64>();
            // SAFETY: the word lies inside of the memory, which is alive as long as `self` and begins on a word, as its slots do.
            // The operation that it belongs to has ended, so the kernel does not write there.
            unsafe { AtomicU64::from_ptr(word) }.store(0, Ordering::Release);
        }
    }

    /// Whether it lies in the region that [`Buffers::whole`] describes.
    pub(super) const fn is_slot(&self) -> bool {
        matches!(self.owner, Owner::Region(_))
    }

    /// `pread(2)` into it: bytes, or a negative errno.
    pub(super) fn read_at(&self, fd: RawFd, offset: u64) -> i32 {
        // SAFETY: the memory is alive as long as `self`, long enough (checked when it was made), and while
        // this operation runs no other one uses it: the machine gives a slot to one fill only.
        let n = unsafe { libc::pread(fd, self.ptr().cast(), self.len, file_offset(offset)) };
        result(n)
    }

    /// `read(2)` into it: bytes, or a negative errno.
    pub(super) fn receive(&self, fd: RawFd) -> i32 {
        // SAFETY: as for `read_at`.
        let n = unsafe { libc::read(fd, self.ptr().cast(), self.len) };
        result(n)
    }

    /// Has the pages of a mapped file mapped, so that a write finds them. If that fails, the write says why.
    pub(super) fn populate(&self) {
        if let Some(map) = self.file().and_then(|file| file.map.as_ref()) {
            let _ = map.advise_range(Advice::PopulateRead, self.offset, self.len);
        }
    }

    /// `pwrite(2)` from it: bytes, or a negative errno.
    pub(super) fn write_at(&self, fd: RawFd, offset: u64) -> i32 {
        // SAFETY: as for `read_at`; the kernel only reads. Pages of a mapped file that shrank give a short
        // write or EFAULT, no signal, because only the kernel touches them.
        let n = unsafe { libc::pwrite(fd, self.ptr().cast(), self.len, file_offset(offset)) };
        result(n)
    }
}

fn file_offset(offset: u64) -> libc::off_t {
    libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX)
}

fn result(n: isize) -> i32 {
    if n < 0 { -(Errno::last_raw()) } else { i32::try_from(n).unwrap_or(i32::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    #[test]
    fn slots_do_not_overlap_and_are_cleared_only_where_asked() {
        let mut buffers = Buffers::new(2, 8192).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 16384]).unwrap();
        assert_eq!(buffers.slot(0, 0, 8192).read_at(file.as_raw_fd(), 0), 8192);
        assert_eq!(buffers.slot(1, 0, 8192).read_at(file.as_raw_fd(), 0), 8192);
        buffers.clear(0, 4096, 4096);
        let out = tempfile::tempfile().unwrap();
        assert_eq!(buffers.slot(0, 0, 8192).write_at(out.as_raw_fd(), 0), 8192);
        assert_eq!(buffers.slot(1, 0, 8192).write_at(out.as_raw_fd(), 8192), 8192);
        assert_eq!(buffers.zeros(4096).write_at(out.as_raw_fd(), 16384), 4096);
        let mut got = vec![1; 20480];
        std::os::unix::fs::FileExt::read_exact_at(&out, &mut got, 0).unwrap();
        assert!(got[..4096].iter().all(|&b| b == 7) && got[4096..8192].iter().all(|&b| b == 0));
        assert!(got[8192..16384].iter().all(|&b| b == 7) && got[16384..].iter().all(|&b| b == 0));
    }

    /// Each kind of memory, as far as this host has it, works like any other.
    #[test]
    fn regions_are_zero_and_writable_in_pages_of_each_kind() {
        const LEN: usize = 2 * HUGE_PAGE_BYTES;
        let regions = [Region::reserved(LEN), Region::transparent(LEN).ok(), Region::new(LEN - 1).ok()];
        let [reserved, transparent, any] = regions.map(|region| region.map(Arc::new));
        if reserved.is_none() {
            eprintln!("not run: no huge pages are reserved and free here");
        }
        let (transparent, any) = (transparent.unwrap(), any.unwrap());
        assert!(transparent.base.addr().get().is_multiple_of(HUGE_PAGE_BYTES) && transparent.pages != Pages::ReservedHuge);
        assert_eq!(any.len, LEN);
        let file = tempfile::tempfile().unwrap();
        for region in reserved.into_iter().chain([transparent, any]) {
            let memory = |offset, len| Memory { owner: Owner::Region(Arc::clone(&region)), offset, len };
            assert_eq!(memory(0, LEN).write_at(file.as_raw_fd(), 0), i32::try_from(LEN).unwrap());
            assert!(memory(0, LEN).bytes(LEN).iter().all(|&byte| byte == 0));
            std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 0).unwrap();
            let last = memory(LEN - 4096, 4096);
            assert_eq!(last.read_at(file.as_raw_fd(), 0), 4096);
            assert!(last.bytes(4096).iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn a_short_region_takes_no_huge_page() {
        assert_eq!(Buffers::new(2, 4096).unwrap().pages(), Pages::Small);
    }

    #[test]
    #[should_panic(expected = "outside of a slot")]
    fn a_part_outside_of_its_slot_is_a_bug() {
        drop(Buffers::new(2, 8192).unwrap().slot(1, 4096, 8192));
    }
}
