//! Seeding: objects made of the blobs' own blocks, which the kernel takes for its own.
//!
//! Where the cache is on ext4 there is nothing to share, and each of these tests sees that the blobs are
//! refused and read on demand.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use infill::front::cachefiles::layout::{MARK, OBJECT_MARK_BYTES, VOLUME_MARK};
use infill::ops::xattr;
use nix::sys::statvfs::statvfs;
use nix::unistd::{Whence, lseek};
use serde_json::Value;

use crate::guest::{DOMAIN, Guest, INFILL, ReadCount, data, drop_caches, with_blob};
use crate::readers::{How, expect_equal};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("seeded_images_ask_for_nothing_and_use_no_space", seeded_images_ask_for_nothing),
    ("seeded_objects_are_the_kernels_own", seeded_objects_are_the_kernels_own),
    ("seeded_blobs_holes_are_read_on_demand", holes_are_read_on_demand),
    ("seeded_blobs_may_have_any_length", any_length),
    ("seeding_from_another_disk_is_refused", blobs_on_another_disk),
    ("seeded_object_of_another_length_is_thrown_away", changed_length),
];

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Space that seeding two blobs and making their volume may take: 257 directories, and what the file system
/// notes about shared blocks.
const OVERHEAD_BYTES_MAX: u64 = 1 << 20;
/// How long the kernel may take for what it does after an unmounting or the daemon's end.
const COMMIT_LIMIT: Duration = Duration::from_secs(60);
/// The mode of a regular file without any permission.
const S_IFREG: u32 = nix::libc::S_IFREG;
/// Bytes of a page, the unit in which the kernel asks.
const PAGE_BYTES: usize = 4096;

/// Moves the store to the cache's file system and puts files of the test data into it. `false`: that file
/// system cannot share blocks.
pub(crate) fn stock_beside_cache(guest: &mut Guest, names: &[&str]) -> Result<bool> {
    guest.store = guest.cache.with_extension("store");
    fs::create_dir_all(&guest.store)?;
    for name in names {
        fs::copy(data(name), guest.store.join(name))?;
    }
    nix::unistd::sync();
    let mounts = fs::read_to_string("/proc/mounts")?;
    Ok(mounts.lines().any(|line| line.contains(" /cache xfs ")))
}

/// Runs `infill prefetch --seed`; gives what became of each blob.
fn prefetch(guest: &Guest, domain: Option<&str>, names: &[&str]) -> Result<Vec<(String, String)>> {
    fates(&prefetch_command(guest, domain, names).output()?)
}

pub(crate) fn prefetch_command(guest: &Guest, domain: Option<&str>, names: &[&str]) -> Command {
    let mut command = Command::new(INFILL);
    command.args(["prefetch", "--seed", "--json"]);
    command.arg(format!("--cache-dir={}", guest.cache.display())).arg(format!("--store=dir:{}", guest.store.display()));
    command.args(domain.map(|domain| format!("--domain={domain}"))).args(names);
    command
}

/// Outcome and reason for each blob.
pub(crate) fn fates(output: &Output) -> Result<Vec<(String, String)>> {
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(text.trim_end()).map_err(|e| format!("{e}: {output:?}"))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let rows = report["blobs"].as_array().ok_or("no list of blobs")?;
    let fates: Vec<_> = rows.iter().map(|row| (text(&row["outcome"]), text(&row["reason"]))).collect();
    let all_there = fates.iter().all(|(outcome, _)| outcome == "seeded" || outcome == "already_there");
    if output.status.code() != Some(i32::from(!all_there)) {
        return Err(format!("{} for {report}", output.status).into());
    }
    Ok(fates)
}

/// Runs `infill prefetch --seed` and wants the same outcome for all blobs.
pub(crate) fn expect_prefetch(guest: &Guest, names: &[&str], outcome: &str, reason: &str) -> Outcome {
    for (found, why) in prefetch(guest, Some(DOMAIN), names)? {
        if found != outcome || !why.contains(reason) {
            return Err(format!("{names:?}: {found} ({why}) instead of {outcome} ({reason})").into());
        }
    }
    Ok(())
}

/// What every test here does where blocks cannot be shared.
pub(crate) fn refused_and_read_on_demand(guest: &Guest) -> Outcome {
    expect_prefetch(guest, &["one.img", "one.blob"], "refused", "cannot share blocks")?;
    if guest.cache.join("cache").read_dir()?.next().is_some() {
        return Err("a refused blob left something in the cache".into());
    }
    let ended =
        guest.whole_tree(&["--seed=lab/one.img", "--seed=lab/one.blob"], &with_blob("one.img", "one.blob"), "one.json", (2, How::Read))?;
    if ended.json["bytes_filled"] == 0 { Err("nothing was read on demand".into()) } else { Ok(()) }
}

/// Mounts, reads all, unmounts; gives the number of READs.
pub(crate) fn reads_of_all(guest: &Guest, options: &str, manifest: &str) -> Result<u64> {
    drop_caches()?;
    let count = ReadCount::start()?;
    let at = guest.mount(options)?;
    expect_equal(&at, &data(manifest), 2, How::Read)?;
    let reads = count.reads()?;
    guest.umount(&at)?;
    Ok(reads)
}

fn free_bytes() -> Result<u64> {
    nix::unistd::sync();
    let stat = statvfs("/cache")?;
    Ok(stat.blocks_free() * stat.fragment_size())
}

fn seeded_images_ask_for_nothing(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["tree.img", "tree.blob", "one.img", "one.blob", "plain.img"])? {
        return refused_and_read_on_demand(guest);
    }
    // As a setting of the daemon.
    let before = free_bytes()?;
    guest.serve(&["--seed=lab/tree.img", "--seed=lab/tree.blob"])?;
    let used = before.saturating_sub(free_bytes()?);
    let reads = reads_of_all(guest, &with_blob("tree.img", "tree.blob"), "tree.json")?;
    let used_later = before.saturating_sub(free_bytes()?);
    let len_bytes = data("tree.blob").metadata()?.len();
    println!("tree: {reads} READs; {used} bytes used by seeding, {used_later} after reading {len_bytes}");
    if reads != 0 || len_bytes < 4 * OVERHEAD_BYTES_MAX || used.max(used_later) > OVERHEAD_BYTES_MAX {
        return Err("a seeded image was filled or took space".into());
    }
    // While the daemon runs; in the same volume, and as an image of its own.
    expect_prefetch(guest, &["one.img", "one.blob"], "seeded", "")?;
    let alone = prefetch(guest, None, &["plain.img"])?;
    let reads_one = reads_of_all(guest, &with_blob("one.img", "one.blob"), "one.json")?;
    let reads_alone = reads_of_all(guest, "fsid=plain.img", "tree.json")?;
    let ended = guest.stop()?;
    if alone[0].0 != "seeded" || reads_one + reads_alone != 0 || ended.json["bytes_filled"] != 0 {
        return Err(format!("{alone:?}, {reads_one} and {reads_alone} READs, {}", ended.json).into());
    }
    // Another daemon's check of the directory finds nothing wrong with it.
    wait_until_unbound()?;
    guest.serve(&[])?;
    let reads = reads_of_all(guest, "fsid=plain.img", "tree.json")?;
    if reads != 0 || guest.log().contains("damaged") {
        return Err(format!("{reads} READs after a restart").into());
    }
    guest.stop()?;
    Ok(())
}

/// A file or directory of a cache, as far as the kernel looks at it.
#[derive(PartialEq, Eq, Debug)]
struct Entry {
    mode: u32,
    owner: (u32, u32),
    len_bytes: Option<u64>,
    mark: Vec<u8>,
}

/// Everything below a directory.
fn entries(dir: &Path, found: &mut BTreeMap<PathBuf, Entry>) -> Outcome {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        let file = File::open(&path)?;
        let mark = if meta.is_dir() {
            xattr::get::<{ VOLUME_MARK.len() }>(file.as_fd(), MARK)?.map(Vec::from)
        } else {
            xattr::get::<OBJECT_MARK_BYTES>(file.as_fd(), MARK)?.map(Vec::from)
        };
        let entry = Entry {
            mode: meta.permissions().mode(),
            owner: (meta.uid(), meta.gid()),
            len_bytes: meta.is_file().then_some(meta.len()),
            mark: mark.unwrap_or_default(),
        };
        found.insert(path.clone(), entry);
        if meta.is_dir() {
            entries(&path, found)?;
        }
    }
    Ok(())
}

/// All that the kernel made for some images, some of them with strange names, is removed and made again by
/// seeding.
fn seeded_objects_are_the_kernels_own(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["one.img", "one.blob", "tiny.img"])? {
        return refused_and_read_on_demand(guest);
    }
    let alone = ["tiny image", " ", "t\u{e9}t\u{e9}", "0123456789abcdef0123456789abcdef"];
    for name in alone {
        fs::copy(data("tiny.img"), guest.store.join(name))?;
    }
    guest.serve(&[])?;
    let mut mounted = vec![guest.mount(&with_blob("one.img", "one.blob"))?];
    for name in alone {
        mounted.push(guest.mount(&format!("fsid={name}"))?);
    }
    for at in mounted {
        guest.umount(&at)?;
    }
    guest.stop()?;
    let cache = guest.cache.join("cache");
    wait_until_unbound()?;
    let mut of_kernel = BTreeMap::new();
    entries(&cache, &mut of_kernel)?;
    fs::remove_dir_all(&cache)?;

    expect_prefetch(guest, &["one.img", "one.blob"], "seeded", "")?;
    if prefetch(guest, None, &alone)?.iter().any(|(outcome, _)| outcome != "seeded") {
        return Err("an image with a strange name was not seeded".into());
    }
    let mut of_seeding = BTreeMap::new();
    entries(&cache, &mut of_seeding)?;
    let objects = of_kernel.values().filter(|entry| entry.len_bytes.is_some()).count();
    println!("{} entries, {objects} of them objects: {:?}", of_kernel.len(), of_kernel.iter().find(|(_, e)| e.len_bytes.is_some()));
    if objects != 2 + alone.len() {
        return Err(format!("the kernel made {objects} objects").into());
    }
    for (path, entry) in &mut of_kernel {
        // 6.1 makes objects that nobody may read (`cachefiles_create_tmpfile`), which is nothing to copy.
        if entry.mode == S_IFREG {
            entry.mode |= 0o600;
        }
        if of_seeding.get(path) != Some(&*entry) {
            return Err(format!("{}: the kernel made {entry:?}, seeding {:?}", path.display(), of_seeding.get(path)).into());
        }
    }
    if of_seeding.len() != of_kernel.len() {
        return Err("seeding made more than the kernel".into());
    }
    guest.serve(&[])?;
    let mut reads = reads_of_all(guest, &with_blob("one.img", "one.blob"), "one.json")?;
    for name in alone {
        reads += reads_of_all(guest, &format!("fsid={name}"), "tiny.json")?;
    }
    guest.stop()?;
    if reads == 0 { Ok(()) } else { Err(format!("{reads} READs").into()) }
}

/// Where an object of the tests' domain is.
pub(crate) fn object(guest: &Guest, name: &str) -> Result<PathBuf> {
    let volume = guest.cache.join(format!("cache/Ierofs,{DOMAIN}"));
    for fanout in fs::read_dir(volume)? {
        let path = fanout?.path().join(format!("D{name}"));
        if path.exists() {
            return Ok(path);
        }
    }
    Err(format!("there is no object of {name}").into())
}

/// The daemon is gone, but the kernel may still be letting go of its ring, which holds the device, and of the cache.
pub(crate) fn wait_until_unbound() -> Outcome {
    wait_until("the kernel lets go of the device", || File::options().read(true).write(true).open("/dev/cachefiles").is_ok())
}

/// Waits for what the kernel does in its own time.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) -> Outcome {
    let began = Instant::now();
    while !done() {
        if began.elapsed() > COMMIT_LIMIT {
            return Err(format!("not within {} s: {what}", COMMIT_LIMIT.as_secs()).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Punches out what is zero, a page at a time; gives the number of pages.
fn make_sparse(path: &Path) -> Result<usize> {
    let bytes = fs::read(path)?;
    fs::remove_file(path)?;
    let file = File::create(path)?;
    file.set_len(bytes.len() as u64)?;
    let mut holes = 0;
    for (n, page) in bytes.chunks(PAGE_BYTES).enumerate() {
        if page.iter().all(|byte| *byte == 0) {
            holes += 1;
        } else {
            file.write_all_at(page, (n * PAGE_BYTES) as u64)?;
        }
    }
    Ok(holes)
}

fn holes_are_read_on_demand(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["tree.img", "tree.blob", "one.img", "one.blob"])? {
        return refused_and_read_on_demand(guest);
    }
    let blob = guest.store.join("tree.blob");
    let holes = make_sparse(&blob)?;
    nix::unistd::sync();
    expect_prefetch(guest, &["tree.img", "tree.blob"], "seeded", "")?;
    let blocks = (blob.metadata()?.blocks(), object(guest, "tree.blob")?.metadata()?.blocks());
    guest.serve(&[])?;
    let options = with_blob("tree.img", "tree.blob");
    let reads = reads_of_all(guest, &options, "tree.json")?;
    let again = reads_of_all(guest, &options, "tree.json")?;
    let ended = guest.stop()?;
    println!("{holes} pages of holes: {reads} READs, then {again}; {blocks:?} blocks; {}", ended.json);
    if holes == 0 || reads == 0 || reads > holes as u64 || again != 0 || blocks.1 > blocks.0 {
        return Err("holes must be asked for once, and nothing else".into());
    }
    Ok(())
}

fn any_length(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["one.img", "one.blob", "tiny.img"])? {
        return refused_and_read_on_demand(guest);
    }
    guest.serve(&[])?;
    for extra in [1, 511, 4095] {
        let name = format!("odd{extra}.img");
        let path = guest.store.join(&name);
        fs::copy(guest.store.join("tiny.img"), &path)?;
        // Made longer and cut again, so that there were bytes behind its end.
        let len_bytes = path.metadata()?.len();
        let file = OpenOptions::new().write(true).open(&path)?;
        file.write_all_at(&[0xAA; 2 * PAGE_BYTES], len_bytes)?;
        file.sync_all()?;
        file.set_len(len_bytes + extra)?;
        expect_prefetch(guest, &[&name], "seeded", "")?;
        let mut expected = fs::read(&path)?;
        expected.resize(expected.len().next_multiple_of(PAGE_BYTES), 0);
        drop_caches()?;
        let object = object(guest, &name)?;
        if fs::read(&object)? != expected {
            return Err(format!("{name}: the object is not the blob and zeros").into());
        }
        let file = File::open(&object)?;
        let (data, hole) = (lseek(&file, 0, Whence::SeekData)?, lseek(&file, 0, Whence::SeekHole)?);
        if data != 0 || hole != i64::try_from(expected.len())? {
            return Err(format!("{name}: data at {data}, a hole at {hole}").into());
        }
        let reads = reads_of_all(guest, &format!("fsid={name},domain_id={DOMAIN}"), "tiny.json")?;
        if reads != 0 {
            return Err(format!("{name}: {reads} READs").into());
        }
    }
    guest.stop()?;
    Ok(())
}

/// The usual host: nothing can be shared, and readers do not notice.
fn blobs_on_another_disk(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    guest.serve(&["--seed=lab/one.img,lab/one.blob", "--seed=lab/none.img"])?;
    expect_prefetch(guest, &["one.img", "one.blob"], "refused", "different file systems")?;
    expect_prefetch(guest, &["none.img"], "failed", "no blob of this name")?;
    let log = guest.log();
    if log.matches("not seeded").count() != 3 {
        return Err("the daemon does not say that nothing was seeded".into());
    }
    let reads = reads_of_all(guest, &with_blob("one.img", "one.blob"), "one.json")?;
    guest.stop()?;
    if reads == 0 { Err("nothing was read on demand".into()) } else { Ok(()) }
}

/// A blob that is replaced by one of another length: the kernel sees it and reads the new one on demand.
fn changed_length(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["one.img", "one.blob", "tiny.img"])? {
        return refused_and_read_on_demand(guest);
    }
    fs::rename(guest.store.join("tiny.img"), guest.store.join("image"))?;
    expect_prefetch(guest, &["image"], "seeded", "")?;
    fs::remove_file(guest.store.join("image"))?;
    fs::copy(data("plain.img"), guest.store.join("image"))?;
    guest.serve(&[])?;
    let options = format!("fsid=image,domain_id={DOMAIN}");
    let reads = reads_of_all(guest, &options, "tree.json")?;
    let again = reads_of_all(guest, &options, "tree.json")?;
    guest.stop()?;
    if reads > 0 && again == 0 { Ok(()) } else { Err(format!("{reads} READs, then {again}").into()) }
}
