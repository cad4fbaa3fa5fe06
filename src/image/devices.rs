//! The table of extra devices in an EROFS image: the names under which the kernel asks for the blobs that hold its data.
//!
//! A slot is `struct erofs_deviceslot` (fs/erofs/erofs_fs.h, since Linux 5.16): 128 bytes, of which the first 64 are a
//! tag, ended by NUL if it is shorter. The kernel takes the tags for names where mount(8) was given none
//! (`erofs_init_device`, fs/erofs/super.c).

use nix::sys::uio::pread;

use super::superblock::{OFFSET, Superblock};
use crate::store::{Blob, SourceFile};

/// `EROFS_DEVT_SLOT_SIZE`.
const SLOT_BYTES: usize = 128;
/// Length of the tag, with which a slot begins.
const TAG_BYTES: usize = 64;
/// Where the superblock has the number of the first slot (`devt_slotoff`), counted from the image's beginning.
const FIRST_SLOT_AT: usize = 88;

/// The names of an image's extra devices, in order, as far as `head`, the beginning of the image, shows them; an empty
/// one is for whoever mounts it to say. `None`: it is no EROFS image.
#[must_use]
pub fn names(head: &[u8]) -> Option<Vec<Vec<u8>>> {
    let devices = usize::from(Superblock::parse(head)?.extra_devices);
    let first = u16::from_le_bytes(head.get(OFFSET + FIRST_SLOT_AT..)?.first_chunk().copied()?);
    let slots = head.get(usize::from(first) * SLOT_BYTES..).unwrap_or_default().chunks_exact(SLOT_BYTES);
    let name = |slot: &[u8]| slot[..TAG_BYTES].split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
    Some(slots.take(devices).map(name).collect())
}

/// How much of an image is read to find the names of its devices: some 500 of them.
const HEAD_BYTES: usize = 64 << 10;

/// Memory that a direct read can be made into.
#[repr(C, align(4096))]
struct Head([u8; HEAD_BYTES]);

/// The same of an image in a store; none if it cannot be read here.
#[must_use]
pub fn names_of(image: &dyn Blob) -> Vec<Vec<u8>> {
    let read = |file: &SourceFile| {
        let mut head = Box::new(Head([0; HEAD_BYTES]));
        let len = pread(&file.fd, &mut head.0, 0).ok()?;
        names(&head.0[..len])
    };
    image.whole_file().and_then(read).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::packages;
    use crate::ops::erofs::MAGIC;
    use proptest::prelude::*;

    fn image(devices: u16, first_slot: u16, tags: &[&[u8]]) -> Vec<u8> {
        let mut image = vec![0; 8192];
        let fields: [(usize, &[u8]); 4] =
            [(0, &MAGIC.to_le_bytes()), (12, &[12]), (86, &devices.to_le_bytes()), (FIRST_SLOT_AT, &first_slot.to_le_bytes())];
        for (at, bytes) in fields {
            image[OFFSET + at..][..bytes.len()].copy_from_slice(bytes);
        }
        for (slot, tag) in tags.iter().enumerate() {
            image[(usize::from(first_slot) + slot) * SLOT_BYTES..][..tag.len()].copy_from_slice(tag);
        }
        image
    }

    #[test]
    fn names_are_the_tags_up_to_their_end() {
        let long = [b'x'; TAG_BYTES];
        let found = names(&image(3, 9, &[b"sha256:aa", &long, b""])).unwrap();
        assert_eq!(found, [b"sha256:aa".to_vec(), long.to_vec(), Vec::new()]);
        assert_eq!(names(&image(0, 0, &[])), Some(Vec::new()));
        assert_eq!(names(&[0; 4096]), None);
    }

    #[test]
    fn a_table_beyond_what_is_there_gives_what_can_be_seen() {
        assert_eq!(names(&image(500, 62, &[b"a", b"b"])).unwrap().len(), 2);
        assert_eq!(names(&image(1, u16::MAX, &[])), Some(Vec::new()));
    }

    #[test]
    fn an_image_made_by_mkfs_has_a_device_without_a_name() {
        let Some(mkfs) = packages::find("mkfs.erofs") else { return eprintln!("not run: no mkfs.erofs") };
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("tree")).unwrap();
        std::fs::write(path("tree/file"), [7; 9000]).unwrap();
        let flags = ["--quiet".to_owned(), "--chunksize=4096".to_owned(), format!("--blobdev={}", path("blob").display())];
        let made = std::process::Command::new(mkfs).args(flags).args([path("image"), path("tree")]).status().unwrap();
        assert!(made.success());
        assert_eq!(names(&std::fs::read(path("image")).unwrap()), Some(vec![Vec::new()]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_borne(devices: u16, first: u16, tail in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let mut image = image(devices, 0, &[]);
            image[OFFSET + FIRST_SLOT_AT..][..2].copy_from_slice(&first.to_le_bytes());
            image.truncate(1200);
            image.extend(tail);
            let found = names(&image).unwrap();
            prop_assert!(found.len() <= usize::from(devices));
        }
    }
}
