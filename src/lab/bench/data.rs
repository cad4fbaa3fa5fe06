//! What the cells read: a tree, its images, the disks, and the listing.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::readers::{BLOCK_BYTES, Sum};
use super::{BLOB, IMAGE};
use crate::front::sim::rng::Rng;
use crate::lab::disk::{self, CacheFs, ErofsLayout};
use crate::lab::tree::{Selection, walk};
use crate::lab::{LabError, Result, Trying};

/// What the tree is made of: headers and scripts, many small files.
const FILES: Selection<'_> = Selection {
    sources: &["/usr/include", "/usr/share/perl", "/usr/lib/python3", "/usr/lib/python3.11", "/usr/share/doc"],
    files_max: 3000,
    bytes_max: 36 << 20,
    file_bytes_max: 512 << 10,
};
/// A file of chance beside them, for reads in the middle of a large file.
const RANDOM_FILE: &str = "zz/random.bin";
const RANDOM_BYTES: usize = 16 << 20;
const RANDOM_SEED: u64 = 20_241_120;
/// Chunks of the image.
const CHUNK_BYTES: u32 = 64 << 10;
/// The cache disk, and room on the store's disk beside the data.
const CACHE_BYTES: u64 = 512 << 20;
const STORE_SLACK_BYTES: u64 = 24 << 20;

/// What every file must read as.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub(super) struct Listing {
    /// In the order of paths.
    pub(super) files: Vec<Listed>,
    /// Index of the largest.
    pub(super) largest: usize,
    /// Checksums of its blocks.
    pub(super) blocks: Vec<u64>,
}

/// One file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Listed {
    pub(super) path: String,
    pub(super) len_bytes: u64,
    pub(super) sum: u64,
}

impl Listing {
    fn of(tree: &Path) -> Result<Self> {
        let mut listing = Self::default();
        for path in walk(tree)? {
            let full = tree.join(&path);
            if full.is_symlink() || !full.is_file() {
                continue;
            }
            let bytes = fs::read(&full).trying(|| format!("cannot read {}", full.display()))?;
            listing.files.push(Listed { path, len_bytes: bytes.len() as u64, sum: Sum::of(&bytes) });
        }
        let by_len = |(_, file): &(usize, &Listed)| file.len_bytes;
        let (largest, file) = listing
            .files
            .iter()
            .enumerate()
            .max_by_key(by_len)
            .ok_or_else(|| LabError::Failed(format!("{} holds no file to read", tree.display())))?;
        let mut big = File::open(tree.join(&file.path)).trying(|| format!("cannot read {}", file.path))?;
        let mut block = [0; BLOCK_BYTES];
        while big.read_exact(&mut block).is_ok() {
            listing.blocks.push(Sum::of(&block));
        }
        listing.largest = largest;
        Ok(listing)
    }

    /// The listing as the content of a file.
    fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|e| LabError::Failed(format!("cannot write the list of files: {e}")))
    }

    /// Reads what the host wrote.
    pub(super) fn load(path: &Path) -> Result<Self> {
        let text = fs::read(path).trying(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).map_err(|e| LabError::Failed(format!("{} makes no sense: {e}", path.display())))
    }
}

/// Everything that goes into the guests, as bytes.
#[derive(Debug)]
pub struct Data {
    /// For [`super::LISTING_FILE`].
    pub(super) listing: Vec<u8>,
    store: Vec<u8>,
    ext4: Vec<u8>,
    xfs: Vec<u8>,
    /// Files in the tree.
    pub files: usize,
    /// Their length together.
    pub bytes: u64,
}

impl Data {
    /// Makes it in `scratch`, of the files below `tree`, or of files of this machine.
    ///
    /// # Errors
    /// A file cannot be copied, or an image not be made.
    pub fn make(scratch: &Path, tree: Option<&Path>) -> Result<Self> {
        let tree = match tree {
            Some(tree) => tree.to_owned(),
            None => make_tree(&scratch.join("tree"))?,
        };
        let store = scratch.join("store");
        fs::create_dir_all(&store).trying(|| format!("cannot make {}", store.display()))?;
        let blob = store.join(BLOB);
        disk::erofs(&store.join(IMAGE), &tree, ErofsLayout { chunk_bytes: Some(CHUNK_BYTES), blob: Some(&blob) })?;
        let listing = Listing::of(&tree)?;
        let bytes: u64 = listing.files.iter().map(|file| file.len_bytes).sum();
        let store_disk = scratch.join("store.disk");
        disk::ext4(&store_disk, (bytes * 5 / 4 + STORE_SLACK_BYTES).next_multiple_of(1 << 20), Some(&store))?;
        let cache = |fs: CacheFs| {
            let path = scratch.join(fs.name());
            fs.make(&path, CACHE_BYTES)?;
            extents(&path)
        };
        Ok(Self {
            store: extents(&store_disk)?,
            ext4: cache(CacheFs::Ext4)?,
            xfs: cache(CacheFs::Xfs)?,
            files: listing.files.len(),
            bytes,
            listing: listing.to_json()?,
        })
    }

    /// The store's disk.
    pub(super) fn store(&self) -> &[u8] {
        &self.store
    }

    /// An empty cache disk.
    pub(super) fn cache(&self, fs: CacheFs) -> &[u8] {
        match fs {
            CacheFs::Ext4 => &self.ext4,
            CacheFs::Xfs => &self.xfs,
        }
    }
}

fn extents(disk: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    disk::extents(disk, &mut bytes)?;
    let _ = fs::remove_file(disk);
    Ok(bytes)
}

fn make_tree(tree: &Path) -> Result<PathBuf> {
    FILES.copy_to(tree)?;
    let random = tree.join(RANDOM_FILE);
    let dir = random.parent().unwrap_or(tree);
    let mut rng = Rng::new(RANDOM_SEED);
    let bytes: Vec<u8> = (0..RANDOM_BYTES / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
    fs::create_dir_all(dir).and_then(|()| fs::write(&random, bytes)).trying(|| format!("cannot write {}", random.display()))?;
    Ok(tree.to_owned())
}
