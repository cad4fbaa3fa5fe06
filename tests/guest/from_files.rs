//! Images that are mounted from files, on a kernel that asks before it reads their metadata too: nothing of an image has to be
//! there before it is mounted.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guest::{DOMAIN, Guest, INFILL, data};
use crate::readers::{How, Readers, expect_equal};
use crate::restart::{Released, both_keepers};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("files_the_kernel_asks_for_metadata", asks_for_metadata),
    ("files_whole_tree_equal_eight_readers", whole_tree),
    ("files_an_image_without_devices_is_read_on_demand", |g| on_demand(g, "plain.img")),
    ("files_a_compressed_image_is_read_on_demand", |g| on_demand(g, "packed.img")),
    ("files_kill_nine_under_readers_with_a_device", |g| storm(g, "tree.img", DEVICE)),
    ("files_kill_nine_under_readers_without_devices", |g| storm(g, "plain.img", &[])),
    ("fault_daemon_and_keepers_killed_under_files", all_killed),
    ("files_what_cannot_be_mounted_is_explained", refusals),
];

/// For `infill mount`, where the data is in a blob of its own.
const DEVICE: &[&str] = &["--domain", DOMAIN, "--device", "tree.blob"];
/// Of an image that is mounted, at most one part in so many is there.
const LAZY: u64 = 4;
/// Unit of `st_blocks`.
const BLOCK_BYTES: u64 = 512;
/// How often the daemon is killed while readers read.
const KILLS: u32 = 6;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// `serve` for images from files, with the test data as its store.
pub(crate) fn serve_arguments(guest: &Guest, more: &[&str]) -> Vec<String> {
    let mut arguments = ["serve", "--front-end=fanotify", "--keep=keeper", "--json"].map(str::to_owned).to_vec();
    arguments.push(format!("--cache-dir={}", guest.cache.display()));
    arguments.push(format!("--store=dir:{}", data("").display()));
    arguments.extend(more.iter().map(|&s| s.to_owned()));
    arguments
}

/// Bytes that the blobs in a cache take on disk: of what is sparse, those that are there.
fn present_bytes(cache: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(cache.join("blobs"))? {
        let entry = entry?;
        if entry.path().extension().is_none() {
            bytes += entry.metadata()?.blocks() * BLOCK_BYTES;
        }
    }
    Ok(bytes)
}

fn asks_for_metadata(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    let report = guest.doctor()?;
    if !report.contains("asks before it reads an image's metadata: nothing has to be there") {
        return Err(format!("doctor does not say so: {report}").into());
    }
    guest.serve_with(&serve_arguments(guest, &[]))?;
    let log = guest.log();
    if !log.contains("metadata=\"on demand\"") || log.contains("ERROR") {
        return Err(log.into());
    }
    guest.stop()?;
    // The image that was mounted to find out is gone, with its file.
    if fs::read_dir(guest.cache.join("blobs"))?.next().is_some() {
        return Err("something is left in the cache".into());
    }
    Ok(())
}

fn whole_tree(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    guest.serve_with(&serve_arguments(guest, &[]))?;
    let (at, _) = guest.mount_files("tree.img", DEVICE)?;
    expect_equal(&at, &data("tree.json"), 8, How::Read)?;
    unmount(guest, &at)?;
    guest.stop()?;
    Ok(())
}

/// Mounted with nothing there; then some of it is, after a look at the directories; then all of it.
fn on_demand(guest: &mut Guest, image: &str) -> Outcome {
    let _released = Released(guest);
    guest.serve_with(&serve_arguments(guest, &["--complete=off"]))?;
    let len_bytes = data(image).metadata()?.len();
    let (at, report) = guest.mount_files(image, &[])?;
    let mounted = present_bytes(&guest.cache)?;
    if report["present_bytes"] != 0 || report["len_bytes"] != len_bytes || mounted == 0 || mounted > len_bytes / LAZY {
        return Err(format!("{mounted} of {len_bytes} bytes are there once it is mounted: {report}").into());
    }
    expect_equal(&at, &data("tree.json"), 8, How::Read)?;
    let read = present_bytes(&guest.cache)?;
    println!("{image}: {mounted} of {len_bytes} bytes were there when it was mounted, {read} when all was read");
    unmount(guest, &at)?;
    // What is there is not asked for again.
    let (at, report) = guest.mount_files(image, &[])?;
    expect_equal(&at, &data("tree.json"), 2, How::Mmap)?;
    unmount(guest, &at)?;
    guest.stop()?;
    if report["present_bytes"].as_u64().is_none_or(|present| present < read / 2) {
        return Err(format!("{read} bytes were there: {report}").into());
    }
    Ok(())
}

/// With everything asked for page by page, so that there is always somebody who waits.
fn storm(guest: &mut Guest, image: &str, more: &[&str]) -> Outcome {
    let _released = Released(guest);
    let arguments = serve_arguments(guest, &["--window=4K", "--complete=off"]);
    guest.serve_with(&arguments)?;
    let (at, _) = guest.mount_files(image, more)?;
    let readers = Readers::start(&at, &data("tree.json"), 8, How::Read)?;
    for kill in 0..KILLS {
        std::thread::sleep(Duration::from_millis(u64::from(30 + kill * 77 % 200)));
        guest.kill()?;
        guest.serve_with(&arguments)?;
    }
    readers.expect_equal()?;
    let log = guest.log();
    let owed: u64 = log.lines().filter_map(|line| line.split("unanswered=").nth(1)?.trim().parse::<u64>().ok()).sum();
    println!("{KILLS} kills, {owed} reads were left unanswered by the dead and answered by their successors");
    expect_equal(&at, &data("tree.json"), 2, How::Mmap)?;
    unmount(guest, &at)?;
    guest.stop()?;
    if log.contains("ERROR") { Err(log.into()) } else { Ok(()) }
}

/// Whoever looks at the mount then may see zeros. The next daemon says so; mounted anew, all of it is right, though the kernel has
/// cached zeros of the very file in between.
fn all_killed(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    let arguments = serve_arguments(guest, &["--window=4K", "--complete=off"]);
    guest.serve_with(&arguments)?;
    let (at, _) = guest.mount_files("plain.img", &[])?;
    for pid in both_keepers()? {
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    guest.kill()?;
    let complaints = Readers::start(&at, &data("tree.json"), 4, How::Read)?.finish(crate::readers::READ_LIMIT)?;
    if complaints.is_empty() {
        return Err("everything could be read, with nobody there to bring it".into());
    }
    guest.serve_with(&arguments)?;
    let log = guest.log();
    let told = |line: &str| line.contains(&*at.to_string_lossy()) && line.contains("outlived the daemon and its keepers");
    if !log.lines().any(told) {
        return Err(format!("it does not say that {} is bad:\n{log}", at.display()).into());
    }
    unmount(guest, &at)?;
    let (at, _) = guest.mount_files("plain.img", &[])?;
    expect_equal(&at, &data("tree.json"), 4, How::Read)?;
    unmount(guest, &at)?;
    guest.stop()?;
    Ok(())
}

fn refusals(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    let at = PathBuf::from("/mnt/refused");
    fs::create_dir_all(&at)?;
    let refused = |arguments: &[&str], words: &str| -> Outcome {
        let output = Command::new(INFILL).args(arguments).arg(&at).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        let well = !output.status.success() && said.contains(words) && said.lines().count() == 1;
        if well { Ok(()) } else { Err(format!("infill {arguments:?}: {}: {said}", output.status).into()) }
    };
    refused(&["mount", "plain.img"], "start infill serve")?;
    guest.serve_with(&serve_arguments(guest, &[]))?;
    refused(&["mount", "nothing.img"], "no store has")?;
    // No image, of which nothing is there before the mount.
    refused(&["mount", "tree.blob"], "does not take the image")?;
    refused(&["mount", "tree.img"], "--device")?;
    refused(&["umount"], "no EROFS image is mounted")?;
    guest.stop()?;
    Ok(())
}

/// By the verb, which tells the daemon too.
pub(crate) fn unmount(guest: &Guest, at: &Path) -> Outcome {
    let output = Command::new(INFILL).arg("umount").arg(at).output()?;
    if !output.status.success() {
        return Err(format!("{} is not unmounted: {}", at.display(), String::from_utf8_lossy(&output.stderr)).into());
    }
    guest.unmounted(at);
    Ok(())
}
