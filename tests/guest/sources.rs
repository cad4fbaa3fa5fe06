//! Where the cache's bytes come from: memory, the disk, or nowhere.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::fixtures::SPARSE_BYTES;
use crate::guest::{Guest, ReadCount, data, drop_caches, with_blob};
use crate::readers::{How, expect_equal};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("holes_of_a_source_become_zeros", holes_of_a_source_become_zeros),
    ("warm_sources_are_written_from_memory", warm_sources_are_written_from_memory),
    ("cold_sources_are_read_directly", cold_sources_are_read_directly),
    ("reserved_huge_pages_are_left_to_others", reserved_huge_pages_are_left),
];

const PAGE_BYTES: usize = 4096;

/// The source lies on the file system under test. What was a hole there must be none in the cache, where the kernel
/// would ask for it for ever.
fn holes_of_a_source_become_zeros(guest: &mut Guest) -> Outcome {
    let store = guest.cache.with_extension("source");
    fs::create_dir_all(&store)?;
    copy_sparse(&data("sparse.img"), &store.join("sparse.img"))?;
    guest.serve(&[&format!("--store=dir:{}", store.display())])?;
    guest.expect_whole("fsid=sparse.img", "sparse.json", (2, How::Read))?;
    drop_caches()?;
    let count = ReadCount::start()?;
    let at = guest.mount("fsid=sparse.img")?;
    expect_equal(&at, &data("sparse.json"), 2, How::Read)?;
    let reads = count.reads()?;
    guest.umount(&at)?;
    let ended = guest.stop()?;
    let zeros = ended.json["bytes_zero"].as_u64().unwrap_or(0);
    if reads != 0 || zeros < SPARSE_BYTES as u64 / 2 {
        return Err(format!("{reads} READs for what is in the cache, {zeros} bytes of zeros: {}", ended.json).into());
    }
    Ok(())
}

/// Copies a file and leaves out the pages that are zero.
fn copy_sparse(from: &Path, to: &Path) -> std::io::Result<()> {
    let bytes = fs::read(from)?;
    let file = File::create(to)?;
    file.set_len(bytes.len() as u64)?;
    for (n, page) in bytes.chunks(PAGE_BYTES).enumerate() {
        if page.iter().any(|&byte| byte != 0) {
            file.write_all_at(page, (n * PAGE_BYTES) as u64)?;
        }
    }
    file.sync_all()
}

fn warm_sources_are_written_from_memory(guest: &mut Guest) -> Outcome {
    let way = if sees_memory()? { "bytes_mapped" } else { "bytes_direct" };
    all_went(guest, way, |path| fs::read(path).map(drop))
}

fn cold_sources_are_read_directly(guest: &mut Guest) -> Outcome {
    all_went(guest, "bytes_direct", |_| Ok(()))
}

/// Somebody has reserved them for a purpose, and the kernel makes others for the buffers.
fn reserved_huge_pages_are_left(guest: &mut Guest) -> Outcome {
    const RESERVED: &str = "/proc/sys/vm/nr_hugepages";
    guest.stock(&["tree.img", "tree.blob"])?;
    drop_caches()?;
    fs::write(RESERVED, "40")?;
    guest.serve(&["--source=direct"])?;
    let at = guest.mount(&with_blob("tree.img", "tree.blob"))?;
    expect_equal(&at, &data("tree.json"), 4, How::Read)?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    guest.umount(&at)?;
    let ended = guest.stop()?;
    fs::write(RESERVED, "0")?;
    let free = memory.lines().find_map(|line| line.strip_prefix("HugePages_Free:")).unwrap_or_default().trim();
    if free != "40" || ended.json["buffers"] != "transparent-huge" || ended.json["bytes_direct"] == 0 {
        return Err(format!("{free} of 40 reserved pages are free: {}", ended.json).into());
    }
    Ok(())
}

/// Wants all bytes of an image to have gone one way, after `prepare` was done to each file that is not in memory.
fn all_went(guest: &mut Guest, way: &str, prepare: fn(&Path) -> std::io::Result<()>) -> Outcome {
    let names = ["tree.img", "tree.blob"];
    guest.stock(&names)?;
    drop_caches()?;
    for name in names {
        prepare(&guest.store.join(name))?;
    }
    let ended = guest.whole_tree(&[], &with_blob("tree.img", "tree.blob"), "tree.json", (4, How::Read))?;
    let bytes = |name: &str| ended.json[name].as_u64().unwrap_or(0);
    if bytes(way) == 0 || bytes(way) + bytes("bytes_zero") != bytes("bytes_filled") {
        return Err(format!("not all bytes went by {way}: {}", ended.json).into());
    }
    Ok(())
}

/// Whether this kernel tells what is in memory (cachestat(2), Linux 6.5).
fn sees_memory() -> Result<bool, Box<dyn std::error::Error>> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    Ok((numbers.next(), numbers.next()) >= (Some(6), Some(5)))
}
