//! The smallest image that has one of each part that a mount reads, each in a page of its own: so it shows what the kernel
//! does with each.
//!
//! The layouts are those of fs/erofs/erofs_fs.h, which every kernel since 5.4 takes: `struct erofs_super_block`, `struct
//! erofs_inode_compact` and `struct erofs_dirent`.

use super::superblock::OFFSET;
use crate::ops::erofs::MAGIC;
use crate::range::ByteRange;

/// The one file in it.
pub const FILE: &str = "f";
/// What is in that.
pub const CONTENT: &[u8] = b"minimal";
/// Of a block: the size that every kernel takes.
const BLOCK_SHIFT: u8 = 12;
/// Unit in which inodes are numbered.
const INODE_BYTES: u64 = 32;
/// `EROFS_INODE_FLAT_PLAIN`, and `EROFS_INODE_FLAT_INLINE`: data in blocks, or right behind the inode.
const PLAIN: u16 = 0;
/// See [`PLAIN`].
const INLINE: u16 = 2 << 1;
/// Modes of the two inodes.
const DIR_MODE: u16 = 0o040_555;
/// See [`DIR_MODE`].
const FILE_MODE: u16 = 0o100_444;
/// What a directory says of its entries: `EROFS_FT_DIR`, `EROFS_FT_REG_FILE`.
const DIR_TYPE: u8 = 2;
/// See [`DIR_TYPE`].
const FILE_TYPE: u8 = 1;
/// `struct erofs_dirent`.
const ENTRY_BYTES: usize = 12;

/// See the module's description.
#[derive(Clone, Debug)]
pub struct Minimal {
    /// All of it.
    pub bytes: Vec<u8>,
    /// Superblock, root inode, and the file's inode with its data: what the kernel takes for metadata.
    pub metadata: [ByteRange; 3],
}

impl Minimal {
    /// With parts that begin `unit_bytes` apart: at least a block, whole blocks.
    #[must_use]
    pub fn new(unit_bytes: u64) -> Self {
        let [root_at, entries_at, file_at, end] = [1, 2, 3, 4].map(|unit: u64| unit * unit_bytes);
        let mut image = Self { bytes: vec![0; size(end)], metadata: [0..unit_bytes, root_at..entries_at, file_at..end] };
        let (root, file) = (root_at / INODE_BYTES, file_at / INODE_BYTES);
        let entries = entries(root, file);
        image.put_superblock(root, end >> BLOCK_SHIFT);
        image.put_inode(root_at, PLAIN, DIR_MODE, entries.len(), entries_at >> BLOCK_SHIFT);
        image.put(entries_at, &entries);
        image.put_inode(file_at, INLINE, FILE_MODE, CONTENT.len(), 0);
        image.put(file_at + INODE_BYTES, CONTENT);
        image
    }

    fn put_superblock(&mut self, root: u64, blocks: u64) {
        let at = OFFSET as u64;
        self.put(at, &MAGIC.to_le_bytes());
        self.put(at + 12, &[BLOCK_SHIFT]);
        self.put(at + 14, &low(root).to_le_bytes()[..2]);
        self.put(at + 16, &2_u64.to_le_bytes());
        self.put(at + 36, &low(blocks).to_le_bytes());
    }

    /// An inode with two links, of root, from the epoch, whose data is `len_bytes` long and begins in `block`.
    fn put_inode(&mut self, at: u64, layout: u16, mode: u16, len_bytes: usize, block: u64) {
        self.put(at, &layout.to_le_bytes());
        self.put(at + 4, &mode.to_le_bytes());
        self.put(at + 6, &2_u16.to_le_bytes());
        self.put(at + 8, &low(len_bytes as u64).to_le_bytes());
        self.put(at + 16, &low(block).to_le_bytes());
        self.put(at + 20, &low(at / INODE_BYTES).to_le_bytes());
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[size(at)..][..bytes.len()].copy_from_slice(bytes);
    }
}

/// A directory's block: entries in the order of their names, then the names.
fn entries(root: u64, file: u64) -> Vec<u8> {
    let entries = [(".", root, DIR_TYPE), ("..", root, DIR_TYPE), (FILE, file, FILE_TYPE)];
    let (mut block, mut names) = (Vec::new(), Vec::new());
    for (name, inode, kind) in entries {
        let name_at = low((entries.len() * ENTRY_BYTES + names.len()) as u64);
        block.extend(inode.to_le_bytes());
        block.extend(&name_at.to_le_bytes()[..2]);
        block.extend([kind, 0]);
        names.extend(name.bytes());
    }
    block.extend(names);
    block
}

/// A number of this small image.
fn low(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The same, of bytes in memory.
fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::superblock::Superblock;
    use crate::lab::packages;

    #[test]
    fn it_is_an_image_to_others_too() {
        let image = Minimal::new(4096);
        let superblock = Superblock::parse(&image.bytes).unwrap();
        assert_eq!((superblock.block_bytes, superblock.inodes, superblock.blocks, superblock.extra_devices), (4096, 2, 4, 0));
        let Some(fsck) = packages::find("fsck.erofs") else { return eprintln!("not run: no fsck.erofs") };
        let dir = tempfile::tempdir().unwrap();
        let (path, out) = (dir.path().join("image"), dir.path().join("out"));
        for unit_bytes in [4096, 65536] {
            std::fs::write(&path, Minimal::new(unit_bytes).bytes).unwrap();
            let mut check = std::process::Command::new(&fsck);
            let checked = check.arg(format!("--extract={}", out.display())).arg("--overwrite").arg(&path).output().unwrap();
            assert!(checked.status.success(), "{checked:?}");
            assert_eq!(std::fs::read(out.join(FILE)).unwrap(), CONTENT);
        }
    }
}
