//! What the guests read: generated trees, their EROFS images and manifests, on one disk image.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use infill::lab::disk::{self, ErofsLayout};
use infill::lab::tree::Manifest;
use infill::lab::{self, initramfs, packages};

/// Where the guest finds images, blobs and manifests.
pub(crate) const DATA: &str = "/store/data";
/// Chunks of the images with a separate blob: several read-ahead windows do not fit into one.
const CHUNK_BYTES: u32 = 64 << 10;
/// Generated files of the large tree, and of the small one.
const FILES: usize = 300;
const SMALL_FILES: usize = 60;
/// The largest file.
const BIG_BYTES: usize = 8 << 20;
/// A file of zeros with a little data at its ends and in its middle.
pub(crate) const SPARSE_BYTES: usize = 8 << 20;
/// Room on the store's disk for everything and for the tests' own copies.
const DISK_BYTES: u64 = 384 << 20;
/// Programs that go into the tree to be executed from it, if they need only libraries that the guest has
/// anyway.
const PROGRAMS: [&str; 8] = ["cat", "cksum", "echo", "expr", "false", "head", "sort", "true"];

/// The disk image with all of it, gone when this is dropped.
pub(crate) struct Fixtures {
    _scratch: tempfile::TempDir,
    /// An ext4 image for the guest's `/store`.
    pub(crate) disk: PathBuf,
}

impl Fixtures {
    /// Makes trees, images, manifests and the disk.
    pub(crate) fn make() -> Result<Self, Box<dyn std::error::Error>> {
        packages::ensure(packages::GUEST_TOOLS)?;
        let scratch = tempfile::tempdir()?;
        let data = scratch.path().join("content/data");
        fs::create_dir_all(&data)?;

        let tree = scratch.path().join("tree");
        generate(&tree, FILES, Some(BIG_BYTES))?;
        add_programs(&tree)?;
        Manifest::of(&tree)?.save(&data.join("tree.json"))?;
        disk::erofs(&data.join("plain.img"), &tree, ErofsLayout::default())?;
        disk::erofs(&data.join("packed.img"), &tree, ErofsLayout { compression: Some("lz4"), ..ErofsLayout::default() })?;
        with_blob(&data, "tree.img", "tree.blob", &tree)?;

        // Two images whose directories have different names and whose data is the same blob.
        for (image, top) in [("one", "a"), ("two", "b")] {
            let tree = scratch.path().join(image);
            generate(&tree.join(top), SMALL_FILES, None)?;
            Manifest::of(&tree)?.save(&data.join(format!("{image}.json")))?;
            with_blob(&data, &format!("{image}.img"), &format!("{image}.blob"), &tree)?;
        }
        if fs::read(data.join("one.blob"))? != fs::read(data.join("two.blob"))? {
            return Err("mkfs.erofs made two different blobs of the same files".into());
        }

        let tree = scratch.path().join("tiny");
        generate(&tree, 1, None)?;
        Manifest::of(&tree)?.save(&data.join("tiny.json"))?;
        disk::erofs(&data.join("tiny.img"), &tree, ErofsLayout::default())?;

        let tree = scratch.path().join("sparse");
        generate(&tree, 10, None)?;
        fs::write(tree.join("sparse"), mostly_zeros(SPARSE_BYTES))?;
        Manifest::of(&tree)?.save(&data.join("sparse.json"))?;
        disk::erofs(&data.join("sparse.img"), &tree, ErofsLayout::default())?;

        let disk = scratch.path().join("store.img");
        disk::ext4(&disk, DISK_BYTES, Some(&scratch.path().join("content")))?;
        Ok(Self { _scratch: scratch, disk })
    }
}

fn with_blob(data: &Path, image: &str, blob: &str, tree: &Path) -> lab::Result<()> {
    let layout = ErofsLayout { chunk_bytes: Some(CHUNK_BYTES), blob: Some(&data.join(blob)), ..ErofsLayout::default() };
    disk::erofs(&data.join(image), tree, layout)
}

/// Fills a directory: files of all the sizes around a page and a chunk, empty ones, ones with runs of
/// zeros, links, many files in one directory, one large file. The same bytes every time.
fn generate(root: &Path, files: usize, big_bytes: Option<usize>) -> std::io::Result<()> {
    let mut random = Random(0x1f11);
    for n in 0..files {
        let dir = root.join(format!("dir{}", n % 7));
        fs::create_dir_all(&dir)?;
        let len = match n % 10 {
            0 => [0, 1, 4095, 4096, 4097, 65_535, 65_536, 65_537][n / 10 % 8],
            1..=6 => random.below(8 << 10),
            7 | 8 => random.below(64 << 10),
            _ => random.below(256 << 10),
        };
        let mut bytes = random.bytes(len);
        if n % 10 == 8 {
            let middle = len / 3..len * 2 / 3;
            bytes[middle].fill(0);
        }
        fs::write(dir.join(format!("file{n:03}")), bytes)?;
    }
    symlink("dir0/file000", root.join("link"))?;
    if let Some(len) = big_bytes {
        fs::write(root.join("big"), random.bytes(len))?;
    }
    Ok(())
}

/// Zeros with data at both ends and in the middle, also next to holes that are too short to be left out.
fn mostly_zeros(len: usize) -> Vec<u8> {
    let mut random = Random(0x0e05);
    let mut bytes = vec![0; len];
    for at in [0, len / 2 + 100, len / 2 + 20_000, len - 1000] {
        bytes[at..at + 1000].copy_from_slice(&random.bytes(1000));
    }
    bytes
}

/// Copies programs of this machine into `bin`.
fn add_programs(tree: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let bin = tree.join("bin");
    fs::create_dir_all(&bin)?;
    let there = initramfs::libraries(Path::new(env!("CARGO_BIN_EXE_infill")))?;
    for name in PROGRAMS {
        let Some(program) = packages::find(name) else {
            continue;
        };
        if initramfs::libraries(&program)?.iter().all(|l| there.contains(l)) {
            fs::copy(&program, bin.join(name))?;
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}

/// SplitMix64: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(len).collect()
    }
}
