//! Where a blob's metadata is, if it is an EROFS image: asked once, when it is opened, by a thread that may block.

use nix::sys::uio::pread;

use crate::image::superblock::{HEAD_BYTES, Superblock};
use crate::range::ByteRange;
use crate::store::{Blob, Data};

/// Memory that a direct read can be made into.
#[repr(C, align(4096))]
struct Head([u8; HEAD_BYTES]);

/// The part of a blob that is metadata beyond doubt. `None` also if the blob cannot be read: that is told to
/// those who read it.
pub(super) fn of(blob: &dyn Blob) -> Option<ByteRange> {
    if blob.len_bytes() < HEAD_BYTES as u64 {
        return None;
    }
    let extent = blob.extent(0);
    let (Data::Read { file, offset } | Data::Mapped { file, offset }) = extent.data else { return None };
    let mut head = Head([0; HEAD_BYTES]);
    let n = pread(&blob.files().get(file)?.fd, &mut head.0, offset.try_into().ok()?).ok()?;
    let n = n.min(usize::try_from(extent.len_bytes).unwrap_or(usize::MAX));
    Superblock::parse(head.0.get(..n)?)?.metadata()
}
