//! What the cells read: a tree, its images, the disks, and the listing.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::readers::{BLOCK_BYTES, Sum};
use super::{BLOB, IMAGE, MANY, Scenario, corpus};
use crate::lab::disk::{self, CacheFs, ErofsLayout};
use crate::lab::tree::walk;
use crate::lab::{LabError, Result, Trying};

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
    /// Indices of the files that are read in blocks, all of one length.
    pub(super) in_blocks: Vec<usize>,
    /// Checksums of their blocks, one file after the other.
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
    /// The files below `root`, of which the longest are read in blocks.
    fn of(root: &Path) -> Result<Self> {
        let mut listing = Self::default();
        for path in walk(root)? {
            let full = root.join(&path);
            if full.is_symlink() || !full.is_file() {
                continue;
            }
            let bytes = fs::read(&full).trying(|| format!("cannot read {}", full.display()))?;
            listing.files.push(Listed { path, len_bytes: bytes.len() as u64, sum: Sum::of(&bytes) });
        }
        let longest = listing.files.iter().map(|file| file.len_bytes).max();
        let longest = longest.ok_or_else(|| LabError::Failed(format!("{} holds no file to read", root.display())))?;
        let mut block = [0; BLOCK_BYTES];
        for (index, file) in listing.files.iter().enumerate().filter(|(_, file)| file.len_bytes == longest) {
            let mut file = File::open(root.join(&file.path)).trying(|| format!("cannot read {}", file.path))?;
            while file.read_exact(&mut block).is_ok() {
                listing.blocks.push(Sum::of(&block));
            }
            listing.in_blocks.push(index);
        }
        Ok(listing)
    }

    /// Where a block is: index of its file, and offset.
    pub(super) fn place(&self, block: usize) -> (usize, u64) {
        let per_file = (self.blocks.len() / self.in_blocks.len().max(1)).max(1);
        (self.in_blocks[block / per_file], (block % per_file * BLOCK_BYTES) as u64)
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

/// Names of an image of [`Scenario::Many8`] and of its blob.
pub(super) fn many_names(n: usize) -> (String, String) {
    (format!("many{n}.img"), format!("many{n}.blob"))
}

/// Everything that goes into the guests, as bytes.
#[derive(Debug)]
pub struct Data {
    /// What the images were made of.
    pub(super) tree: PathBuf,
    listing: Vec<u8>,
    many_listing: Vec<u8>,
    store: Vec<u8>,
    ext4: Vec<u8>,
    xfs: Vec<u8>,
    /// Files in the tree.
    pub files: usize,
    /// Their length together.
    pub bytes: u64,
}

impl Data {
    /// Makes it in `scratch`, of the files below `tree`, or of the bench's own tree; with `many`, also the images of
    /// [`Scenario::Many8`].
    ///
    /// # Errors
    /// A file cannot be written, or an image not be made.
    pub fn make(scratch: &Path, tree: Option<&Path>, many: bool) -> Result<Self> {
        let own = scratch.join("tree");
        if tree.is_none() {
            corpus::make(&own)?;
        }
        let tree = tree.map_or(own, Path::to_owned);
        let store = scratch.join("store");
        fs::create_dir_all(&store).trying(|| format!("cannot make {}", store.display()))?;
        let image = |tree: &Path, image: &str, blob: &str| {
            disk::erofs(
                &store.join(image),
                tree,
                ErofsLayout { chunk_bytes: Some(CHUNK_BYTES), blob: Some(&store.join(blob)), ..ErofsLayout::default() },
            )
        };
        image(&tree, IMAGE, BLOB)?;
        let listing = Listing::of(&tree)?;
        let mut many_listing = Listing::default();
        if many {
            let trees = scratch.join("many");
            corpus::make_many(&trees, MANY)?;
            for n in 0..MANY {
                let (name, blob) = many_names(n);
                image(&trees.join(n.to_string()), &name, &blob)?;
            }
            many_listing = Listing::of(&trees)?;
        }
        let cache = |fs: CacheFs| {
            let path = scratch.join(fs.name());
            fs.make(&path, CACHE_BYTES)?;
            extents(&path)
        };
        Ok(Self {
            store: store_disk(&store)?,
            ext4: cache(CacheFs::Ext4)?,
            xfs: cache(CacheFs::Xfs)?,
            files: listing.files.len(),
            bytes: listing.files.iter().map(|file| file.len_bytes).sum(),
            listing: listing.to_json()?,
            many_listing: many_listing.to_json()?,
            tree,
        })
    }

    /// For [`super::LISTING_FILE`].
    pub(super) fn listing(&self, scenario: Scenario) -> &[u8] {
        if scenario == Scenario::Many8 { &self.many_listing } else { &self.listing }
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

/// Makes the disk of a store out of its directory.
pub(super) fn store_disk(store: &Path) -> Result<Vec<u8>> {
    let mut bytes = 0;
    for path in walk(store)? {
        let path = store.join(path);
        bytes += fs::symlink_metadata(&path).trying(|| format!("cannot look at {}", path.display()))?.len();
    }
    let disk = store.with_extension("disk");
    disk::ext4(&disk, (bytes * 9 / 8 + STORE_SLACK_BYTES).next_multiple_of(1 << 20), Some(store))?;
    extents(&disk)
}

fn extents(disk: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    disk::extents(disk, &mut bytes)?;
    let _ = fs::remove_file(disk);
    Ok(bytes)
}
