//! Coming and going: many images, an end under load, a new start.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use infill::lab::tree::{Content, Manifest};

use crate::guest::{ASKED_OFTEN, AT_WORK, Guest, ReadCount, data, drop_caches, with_blob};
use crate::readers::{How, READ_LIMIT, Readers, expect_equal};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("two_hundred_images_come_and_go", two_hundred_images),
    ("sigterm_under_load_hangs_nobody", sigterm_under_load),
    ("data_survives_a_restart", data_survives_a_restart),
];

/// How many images are mounted at the same time.
const IMAGES: usize = 200;
/// How much larger the daemon may be afterwards.
const RSS_SLACK_KIB: u64 = 4096;
/// How long the daemon may take to close what a last unmount left.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

fn two_hundred_images(guest: &mut Guest) -> Outcome {
    let names: Vec<String> = (0..IMAGES).map(|n| format!("tiny{n}.img")).collect();
    for name in &names {
        guest.stock_as("tiny.img", name)?;
    }
    guest.serve(&[])?;
    // A first round, so that what is made once is there before anything is measured.
    round(guest, &names)?;
    let process = PathBuf::from(format!("/proc/{}", guest.daemon_pid()?));
    let before = settled(&process, usize::MAX)?;
    round(guest, &names)?;
    let after = settled(&process, before.fds)?;
    guest.stop()?;
    if after.fds > before.fds || after.rss_kib > before.rss_kib + RSS_SLACK_KIB {
        return Err(format!("before {before:?}, after {after:?}").into());
    }
    Ok(())
}

/// Mounts all, reads all, unmounts all.
fn round(guest: &Guest, names: &[String]) -> Outcome {
    let manifest = Manifest::load(&data("tiny.json"))?;
    let mut mounts = Vec::new();
    for name in names {
        mounts.push(guest.mount(&format!("fsid={name},domain_id=lab"))?);
    }
    for at in &mounts {
        let result = infill::lab::tree::compare(at, &manifest, 1);
        if result.verdict() != "equal" {
            return Err(format!("{}: {result:?}", at.display()).into());
        }
    }
    for at in &mounts {
        guest.umount(at)?;
    }
    Ok(())
}

#[derive(Debug)]
struct Footprint {
    fds: usize,
    rss_kib: u64,
}

/// The daemon's footprint once it has at most `fds` descriptors, or does not change for a second.
fn settled(process: &Path, fds: usize) -> Result<Footprint, Box<dyn std::error::Error>> {
    let began = Instant::now();
    let mut last = usize::MAX;
    let mut since = Instant::now();
    loop {
        let now = fs::read_dir(process.join("fd"))?.count();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        let quiet = since.elapsed() > Duration::from_secs(1);
        if quiet && now <= fds || began.elapsed() > SETTLE_LIMIT {
            let status = fs::read_to_string(process.join("status"))?;
            let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let rss = rss.and_then(|text| text.split_whitespace().next());
            let rss_kib = rss.ok_or("no VmRSS")?.parse()?;
            return Ok(Footprint { fds: now, rss_kib });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn sigterm_under_load(guest: &mut Guest) -> Outcome {
    guest.stock(&["tree.img", "tree.blob"])?;
    guest.serve(&ASKED_OFTEN)?;
    let options = with_blob("tree.img", "tree.blob");
    let at = guest.mount(&options)?;
    let count = ReadCount::start()?;
    let readers = Readers::start(&at, &data("tree.json"), 8, How::Read)?;
    count.await_more(AT_WORK)?;
    guest.stop()?;
    // Readers get the right bytes or an I/O error; they do not hang and read nothing else.
    let complaints = readers.finish(READ_LIMIT)?;
    // ENOBUFS is what the kernel itself answers once the cache is withdrawn.
    let known = |line: &&String| !line.contains("os error 5") && !line.contains("os error 105");
    if let Some(line) = complaints.iter().find(known) {
        return Err(format!("not an I/O error: {line}").into());
    }
    guest.umount(&at)?;
    guest.serve(&[])?;
    guest.expect_whole(&options, "tree.json", (8, How::Read))?;
    guest.stop()?;
    Ok(())
}

/// The daemon ends while an image is mounted; what was fetched until then is not fetched again.
fn data_survives_a_restart(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    let options = with_blob("one.img", "one.blob");
    let half = first_half(&data("one.json"))?;
    guest.serve(&[])?;
    let at = guest.mount(&options)?;
    expect_files_equal(&at, &half)?;
    guest.stop()?;
    guest.umount(&at)?;
    drop_caches()?;

    guest.serve(&[])?;
    let count = ReadCount::start()?;
    let at = guest.mount(&options)?;
    expect_files_equal(&at, &half)?;
    let reads = count.reads()?;
    expect_equal(&at, &data("one.json"), 2, How::Read)?;
    guest.umount(&at)?;
    guest.stop()?;
    if reads != 0 {
        return Err(format!("{reads} READs for data that was there before the restart").into());
    }
    Ok(())
}

fn first_half(manifest: &Path) -> Result<Manifest, Box<dyn std::error::Error>> {
    let mut manifest = Manifest::load(manifest)?;
    manifest.entries.truncate(manifest.entries.len() / 2);
    Ok(manifest)
}

fn expect_files_equal(mount: &Path, manifest: &Manifest) -> Outcome {
    for entry in &manifest.entries {
        let path = mount.join(&entry.path);
        if let Content::File { len_bytes, sum } = entry.content {
            let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            if (bytes.len() as u64, infill::lab::checksum(&bytes)) != (len_bytes, sum) {
                return Err(format!("{} reads as something else", path.display()).into());
            }
        }
    }
    Ok(())
}
