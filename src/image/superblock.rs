//! The superblock of an EROFS image, as far as it tells where metadata lies.
//!
//! The layout is that of `struct erofs_super_block` (fs/erofs/erofs_fs.h, Linux 5.19 to 7.1: the fields used here
//! never moved). Where metadata lies was found out with mkfs.erofs 1.5:
//!
//! * Data on extra devices (`--blobdev`): the primary image is metadata and nothing else.
//! * Chunks in the image itself (`--chunksize` alone): all inodes, chunk maps and directories come first, in about
//!   120 bytes for each inode, names included; then the chunks.
//! * Files that are not chunked, compressed or not: inodes lie between the data, in nearly every MiB of an image of
//!   110 MiB, so nothing can be brought whole.

use crate::ops::erofs::MAGIC;
use crate::range::ByteRange;

/// Where the superblock begins (`EROFS_SUPER_OFFSET`).
pub(super) const OFFSET: usize = 1024;
/// How much of an image must be there to read its superblock.
pub const HEAD_BYTES: usize = 4096;
/// `EROFS_FEATURE_INCOMPAT_CHUNKED_FILE`.
const CHUNKED_FILE: u32 = 0x4;
/// Block sizes that the kernel takes: 512 bytes to a page (`erofs_read_superblock`), and a page is 64 KiB at most.
const BLOCK_SHIFTS: std::ops::RangeInclusive<u8> = 9..=16;
/// What an inode of a chunked image needs: itself, its name, a few chunks. See the module's description.
const CHUNKED_INODE_BYTES: u64 = 128;
/// Most metadata that is brought whole. That of an image with 100,000 files.
pub const WHOLE_BYTES_MAX: u64 = 16 << 20;

/// What is known of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// Blocks of the primary image.
    pub blocks: u32,
    /// The block where inodes begin.
    pub metadata_block: u32,
    /// `feature_incompat`.
    pub incompatible: u32,
    /// Devices besides the primary image.
    pub extra_devices: u16,
}

impl Superblock {
    /// Reads the superblock from the first [`HEAD_BYTES`] of a blob. `None`: it is too short or no EROFS image.
    #[must_use]
    pub fn parse(head: &[u8]) -> Option<Self> {
        let block = head.get(OFFSET..)?;
        if u32::from_le_bytes(field(block, 0)?) != MAGIC {
            return None;
        }
        let [block_shift] = field(block, 12)?;
        Some(Self {
            block_bytes: BLOCK_SHIFTS.contains(&block_shift).then(|| 1 << block_shift)?,
            inodes: u64::from_le_bytes(field(block, 16)?),
            blocks: u32::from_le_bytes(field(block, 36)?),
            metadata_block: u32::from_le_bytes(field(block, 40)?),
            incompatible: u32::from_le_bytes(field(block, 80)?),
            extra_devices: u16::from_le_bytes(field(block, 86)?),
        })
    }

    /// The part of the image that is metadata beyond doubt, at most [`WHOLE_BYTES_MAX`] of it.
    #[must_use]
    pub fn metadata(&self) -> Option<ByteRange> {
        let start = u64::from(self.metadata_block) * self.block_bytes;
        let part = if self.extra_devices > 0 {
            0..u64::from(self.blocks) * self.block_bytes
        } else if self.incompatible & CHUNKED_FILE != 0 {
            start..start.saturating_add(self.inodes.saturating_mul(CHUNKED_INODE_BYTES))
        } else {
            return None;
        };
        let end = part.end.min(part.start.saturating_add(WHOLE_BYTES_MAX));
        (part.start < end).then_some(part.start..end)
    }
}

/// A field of `N` bytes.
fn field<const N: usize>(block: &[u8], offset: usize) -> Option<[u8; N]> {
    block.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::packages;
    use proptest::prelude::*;
    use std::process::Command;

    /// A head with the given fields.
    fn head(block_shift: u8, inodes: u64, blocks: u32, metadata_block: u32, incompatible: u32, extra_devices: u16) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        let fields: [(usize, &[u8]); 7] = [
            (0, &MAGIC.to_le_bytes()),
            (12, &[block_shift]),
            (16, &inodes.to_le_bytes()),
            (36, &blocks.to_le_bytes()),
            (40, &metadata_block.to_le_bytes()),
            (80, &incompatible.to_le_bytes()),
            (86, &extra_devices.to_le_bytes()),
        ];
        for (at, bytes) in fields {
            head[OFFSET + at..OFFSET + at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn an_image_made_by_mkfs_is_understood() {
        let Some(mkfs) = packages::find("mkfs.erofs") else { return eprintln!("not run: no mkfs.erofs") };
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        for file in 0..300 {
            std::fs::write(tree.join(format!("file-{file}")), vec![7; 100 * file]).unwrap();
        }
        let make = |name: &str, flags: &[String]| {
            let image = dir.path().join(name);
            let made = Command::new(&mkfs).arg("--quiet").args(flags).arg(&image).arg(&tree).output().unwrap();
            assert!(made.status.success(), "{made:?}");
            let bytes = std::fs::read(image).unwrap();
            (Superblock::parse(&bytes[..HEAD_BYTES]).unwrap(), bytes.len() as u64)
        };
        let (flat, _) = make("flat", &[]);
        assert_eq!((flat.inodes, flat.metadata()), (301, None));
        let chunks = "--chunksize=65536".to_owned();
        let (primary, len) = make("primary", &[chunks.clone(), format!("--blobdev={}", dir.path().join("blob").display())]);
        assert_eq!((primary.extra_devices, primary.metadata()), (1, Some(0..len)));
        let (chunked, _) = make("chunked", &[chunks]);
        assert_eq!(chunked.metadata(), Some(0..301 * CHUNKED_INODE_BYTES));
    }

    #[test]
    fn what_is_no_image_is_not_taken_for_one() {
        assert_eq!(Superblock::parse(&[0; HEAD_BYTES]), None);
        assert_eq!(Superblock::parse(&[]), None);
        assert_eq!(Superblock::parse(&head(40, 1, 1, 0, 0, 1)), None);
        assert_eq!(Superblock::parse(&head(12, 1, 1, 0, 0, 1)[..OFFSET + 87]), None);
        let empty = Superblock::parse(&head(12, 0, 0, 0, CHUNKED_FILE, 0)).unwrap();
        assert_eq!(empty.metadata(), None);
    }

    proptest! {
        /// Nonsense is read without a panic, and what is to be brought has a limit.
        #[test]
        fn any_head_gives_a_bounded_part(
            shift in any::<u8>(), inodes in any::<u64>(), blocks in any::<u32>(), start in any::<u32>(),
            incompatible in any::<u32>(), devices in any::<u16>(), cut in 0..=HEAD_BYTES,
        ) {
            let head = head(shift, inodes, blocks, start, incompatible, devices);
            if let Some(part) = Superblock::parse(&head[..cut]).and_then(|superblock| superblock.metadata()) {
                prop_assert!(part.start < part.end && part.end - part.start <= WHOLE_BYTES_MAX);
            }
        }
    }
}
