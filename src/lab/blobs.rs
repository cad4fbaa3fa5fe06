//! An EROFS image whose every file lies on a blob of its own. mkfs.erofs gives an image one blob; here the kernel is to
//! have thousands of objects, and a mount for each would cost far more than the objects do.
//!
//! Little endian, blocks of 4 KiB (fs/erofs/erofs_fs.h): the superblock, the table of devices (each names its blob),
//! the root directory, the inodes. Linux mounts it from 6.1 on with `fsid=` alone: the names in the table stand for
//! `device=` options (`erofs_scan_devices`, fs/erofs/super.c).

use crate::ops::erofs::MAGIC;

const BLOCK_BYTES: usize = 4096;
/// Where the superblock begins.
const SUPERBLOCK_AT: usize = 1024;
/// Incompatible features: files of chunks, a table of devices.
const FEATURES: u32 = 0x4 | 0x8;
/// A place in the table of devices, and the name in it.
const DEVICE_BYTES: usize = 128;
const NAME_MAX_BYTES: usize = 64;
/// Unit in which inodes are numbered, and what each inode here takes: itself (the compact form) and one chunk.
const INODE_UNIT_BYTES: usize = 32;
const INODE_BYTES: usize = 64;
/// The layout of a file that is one run, or one of chunks, as in `i_format`.
const PLAIN: u16 = 0;
const CHUNKS: u16 = 4 << 1;
/// Chunks are described by indexes that name a device.
const CHUNK_INDEXES: u32 = 0x20;
const DIRECTORY: (u16, u8) = (0o040_555, 2);
const FILE: (u16, u8) = (0o100_444, 1);
/// An entry of a directory without its name.
const ENTRY_BYTES: usize = 12;

/// Most blobs of one image: the number of one takes 16 bits, and 0 is the image itself.
pub const BLOBS_MAX: usize = 65_535;

/// The image. File and blob have the same name, and the file is all of the blob.
///
/// # Panics
/// More than [`BLOBS_MAX`] names, one that is longer than 64 bytes, or blobs of more than 2 GiB.
#[must_use]
pub fn image(names: &[String], blob_bytes: usize) -> Vec<u8> {
    assert!(names.len() <= BLOBS_MAX && names.iter().all(|name| (1..=NAME_MAX_BYTES).contains(&name.len())));
    let blocks = u32::try_from(blob_bytes.div_ceil(BLOCK_BYTES)).expect("a blob of a sensible length");
    let devices = padded(names.iter().flat_map(|name| device(name, blocks)).collect());
    let directory = directory(names);
    let devices_at = BLOCK_BYTES;
    let directory_at = devices_at + devices.len();
    let inodes_at = directory_at + directory.len();
    let mut inodes = inode(PLAIN, DIRECTORY.0, directory.len(), block(directory_at), None);
    // Chunks are a power of two of blocks.
    let chunk_format = CHUNK_INDEXES | blocks.next_power_of_two().ilog2();
    for number in 1..=names.len() {
        inodes.extend(inode(CHUNKS, FILE.0, blob_bytes, chunk_format, Some(number)));
    }
    let inodes = padded(inodes);
    let mut first = superblock(names.len(), block(inodes_at), block(inodes_at + inodes.len()));
    first.extend(devices);
    first.extend(directory);
    first.extend(inodes);
    first
}

/// The block that holds the superblock.
fn superblock(devices: usize, inodes_block: u32, blocks: u32) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    let mut put = |at: usize, field: &[u8]| bytes[SUPERBLOCK_AT + at..][..field.len()].copy_from_slice(field);
    put(0, &MAGIC.to_le_bytes());
    // Bits of a block's length; the root is the first inode.
    put(12, &[12]);
    put(16, &(devices as u64 + 1).to_le_bytes());
    put(36, &blocks.to_le_bytes());
    put(40, &inodes_block.to_le_bytes());
    put(80, &FEATURES.to_le_bytes());
    put(86, &short(devices));
    // In units of its own.
    put(88, &short(BLOCK_BYTES / DEVICE_BYTES));
    bytes
}

fn device(name: &str, blocks: u32) -> [u8; DEVICE_BYTES] {
    let mut bytes = [0; DEVICE_BYTES];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes[NAME_MAX_BYTES..][..4].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// `place`: the first block of a file that is one run, else the format of its chunks; `on`: the device of its one chunk.
fn inode(layout: u16, mode: u16, len_bytes: usize, place: u32, on: Option<usize>) -> Vec<u8> {
    let mut bytes = vec![0; INODE_BYTES];
    let mut put = |at: usize, field: &[u8]| bytes[at..][..field.len()].copy_from_slice(field);
    put(0, &layout.to_le_bytes());
    put(4, &mode.to_le_bytes());
    put(6, &[if on.is_some() { 1 } else { 2 }]);
    put(8, &u32::try_from(len_bytes).expect("a file of a sensible length").to_le_bytes());
    put(16, &place.to_le_bytes());
    put(20, &u32::try_from(on.unwrap_or(0) + 1).expect("a sensible number").to_le_bytes());
    if let Some(device) = on {
        // Behind the inode: advice, device, block on it.
        put(INODE_UNIT_BYTES + 2, &short(device));
    }
    bytes
}

/// The root directory's blocks: entries, then their names; sorted by name over all.
fn directory(names: &[String]) -> Vec<u8> {
    let child = |(number, name): (usize, &String)| (name.clone(), (number + 1) * INODE_BYTES / INODE_UNIT_BYTES, FILE.1);
    let mut entries: Vec<_> = names.iter().enumerate().map(child).collect();
    entries.extend([".", ".."].map(|name| (name.to_owned(), 0, DIRECTORY.1)));
    entries.sort();
    let mut blocks = Vec::new();
    let mut rest = &entries[..];
    while !rest.is_empty() {
        let mut used = 0;
        let fits = |(name, ..): &&(String, usize, u8)| {
            used += ENTRY_BYTES + name.len();
            used <= BLOCK_BYTES
        };
        let (here, later) = rest.split_at(rest.iter().take_while(fits).count());
        rest = later;
        let mut name_at = here.len() * ENTRY_BYTES;
        for (name, inode, kind) in here {
            blocks.extend((*inode as u64).to_le_bytes());
            blocks.extend(short(name_at));
            blocks.extend([*kind, 0]);
            name_at += name.len();
        }
        here.iter().for_each(|(name, ..)| blocks.extend(name.as_bytes()));
        blocks = padded(blocks);
    }
    blocks
}

/// Whole blocks.
fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    bytes
}

fn block(at: usize) -> u32 {
    u32::try_from(at / BLOCK_BYTES).expect("an image of a sensible length")
}

fn short(number: usize) -> [u8; 2] {
    u16::try_from(number).expect("a number of 16 bits").to_le_bytes()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::lab::packages;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|number| format!("blob{number:05}")).collect()
    }

    #[test]
    fn directories_are_sorted_and_no_name_crosses_a_block() {
        let bytes = directory(&names(1000));
        let mut seen = Vec::new();
        for block in bytes.chunks(BLOCK_BYTES) {
            let at = |entry: usize| usize::from(u16::from_le_bytes([block[entry * ENTRY_BYTES + 8], block[entry * ENTRY_BYTES + 9]]));
            let count = at(0) / ENTRY_BYTES;
            for entry in 0..count {
                let end = if entry + 1 < count { at(entry + 1) } else { BLOCK_BYTES };
                seen.push(String::from_utf8(block[at(entry)..end].to_vec()).unwrap().trim_end_matches('\0').to_owned());
            }
        }
        assert!(seen.is_sorted());
        assert_eq!(seen.len(), 1002);
    }

    #[test]
    fn the_tools_of_erofs_take_it() {
        let Some(dump) = packages::find("dump.erofs") else { return eprintln!("not run: there is no dump.erofs") };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), image(&names(3), 3 * BLOCK_BYTES)).unwrap();
        let blob = tempfile::NamedTempFile::new().unwrap();
        blob.as_file().set_len(3 * BLOCK_BYTES as u64).unwrap();
        // It wants to be given each of the devices.
        let devices = (0..3).map(|_| format!("--device={}", blob.path().display()));
        let output = Command::new(dump).arg("-s").args(devices).arg(file.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("device_table"), "{output:?}");
    }
}
