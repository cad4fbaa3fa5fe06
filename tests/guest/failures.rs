//! What goes wrong stays small: a reader gets an error and never hangs, the message says what to do, and
//! all is well again once the cause is gone.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::bad_disk::BadDisk;
use crate::guest::{Guest, data, drop_caches, with_blob};
use crate::readers::{HOLDER, How, READ_LIMIT, Readers, expect_equal};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("fault_unknown_image_fails_at_once", unknown_image_fails_at_once),
    ("fault_missing_blob_gives_errors_and_recovers", missing_blob),
    ("fault_truncated_blob_gives_eio_and_recovers", truncated_blob),
    ("fault_unreadable_sectors_give_eio_and_recover", unreadable_sectors),
    ("fault_held_devnode_names_its_holder", held_devnode),
    ("fault_second_daemon_names_the_first", second_daemon),
    ("bad_flag_is_a_usage_error", bad_flag),
    ("fault_missing_store_is_a_configuration_error", missing_store),
    ("fault_cache_on_tmpfs_is_a_configuration_error", cache_on_tmpfs),
    ("fault_cache_on_overlayfs_is_a_configuration_error", cache_on_overlayfs),
];

/// A mount that cannot work must fail within this time.
const AT_ONCE: Duration = Duration::from_secs(5);
/// Exit codes of infill, from sysexits.h.
const USAGE: i32 = 2;
const UNAVAILABLE: i32 = 69;
const CONFIG: i32 = 78;

fn unknown_image_fails_at_once(guest: &mut Guest) -> Outcome {
    guest.serve(&[])?;
    must_not_mount(guest, "fsid=nowhere.img,domain_id=lab")?;
    let log = guest.log();
    if !log.lines().any(|line| line.contains("lab/nowhere.img")) {
        return Err(format!("the log does not name lab/nowhere.img:\n{log}").into());
    }
    // The next one is not affected.
    guest.stock(&["tiny.img"])?;
    guest.expect_whole("fsid=tiny.img,domain_id=lab", "tiny.json", (1, How::Read))?;
    guest.stop()?;
    Ok(())
}

/// The kernel looks a device's blob up beside the mount, so either the mount fails or the reads do.
fn missing_blob(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img"])?;
    guest.serve(&[])?;
    let options = with_blob("one.img", "one.blob");
    let began = Instant::now();
    if let Ok(at) = guest.mount(&options) {
        // ENOBUFS is what 6.12 itself answers for a blob that could not be looked up.
        expect_errors(&at, &[Errno::EIO, Errno::ENOBUFS])?;
        guest.umount(&at)?;
    } else if began.elapsed() > AT_ONCE {
        return Err(format!("the mount took {} s to fail", began.elapsed().as_secs()).into());
    }
    guest.stock(&["one.blob"])?;
    guest.expect_whole(&options, "one.json", (2, How::Read))?;
    guest.stop()?;
    Ok(())
}

/// The image asks for bytes beyond the end of what the store has.
fn truncated_blob(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img"])?;
    let blob = guest.store.join("one.blob");
    let len = fs::copy(data("one.blob"), &blob)?;
    let half = len / 2 + 100;
    File::options().write(true).open(&blob)?.set_len(half)?;
    guest.serve(&[])?;
    let options = with_blob("one.img", "one.blob");
    let at = guest.mount(&options)?;
    expect_errors(&at, &[Errno::EIO])?;
    guest.umount(&at)?;
    fs::copy(data("one.blob"), &blob)?;
    drop_caches()?;
    guest.expect_whole(&options, "one.json", (2, How::Read))?;
    guest.stop()?;
    Ok(())
}

/// A blob on a disk with bad sectors; then the sectors are good again.
fn unreadable_sectors(guest: &mut Guest) -> Outcome {
    let mut disk = BadDisk::make(&guest.store.join("disk"))?;
    for name in ["one.img", "one.blob"] {
        fs::copy(data(name), disk.mounted.join(name))?;
    }
    drop_caches()?;
    let mut needle = [0; 4096];
    let blob = File::open(data("one.blob"))?;
    blob.read_exact_at(&mut needle, blob.metadata()?.size() / 2 / 4096 * 4096)?;
    disk.spoil(&needle)?;
    drop_caches()?;

    let mut arguments = guest.serve_arguments(&[]);
    arguments.retain(|argument| !argument.starts_with("--store"));
    arguments.push(format!("--store=dir:{}", disk.mounted.display()));
    guest.serve_with(&arguments)?;
    let at = guest.mount(&with_blob("one.img", "one.blob"))?;
    expect_errors(&at, &[Errno::EIO])?;
    disk.heal()?;
    expect_equal(&at, &data("one.json"), 2, How::Read)?;
    guest.umount(&at)?;
    guest.stop()?;
    disk.remove()
}

fn held_devnode(guest: &mut Guest) -> Outcome {
    let mut command = Command::new("/proc/self/exe");
    let child = command.arg(HOLDER).stdout(Stdio::piped()).spawn()?;
    let mut holder = Killed(child);
    let mut said = [0; 4];
    holder.0.stdout.take().ok_or("no pipe")?.read_exact(&mut said)?;
    let pid = holder.0.id().to_string();
    let (code, log) = guest.refused(&guest.serve_arguments(&[]))?;
    let command = fs::read_to_string(format!("/proc/{pid}/comm"))?;
    if code != UNAVAILABLE || !log.contains(&pid) || !log.contains(command.trim()) {
        return Err(format!("exit code {code}, and the holder is {pid} ({}); it said:\n{log}", command.trim()).into());
    }
    Ok(())
}

fn second_daemon(guest: &mut Guest) -> Outcome {
    guest.stock(&["tiny.img"])?;
    guest.serve(&[])?;
    let first = guest.daemon_pid()?.to_string();
    let second = Guest::new("second")?;
    let (code, log) = second.refused(&second.serve_arguments(&[]))?;
    if code != UNAVAILABLE || !log.contains(&first) {
        return Err(format!("exit code {code}, the first is {first}; it said:\n{log}").into());
    }
    // The first one goes on.
    guest.expect_whole("fsid=tiny.img", "tiny.json", (1, How::Read))?;
    guest.stop()?;
    Ok(())
}

fn bad_flag(guest: &mut Guest) -> Outcome {
    refuses(guest, &guest.serve_arguments(&["--no-such-flag"]), USAGE, "--no-such-flag")?;
    refuses(guest, &guest.serve_arguments(&["--engine=magic"]), USAGE, "magic")
}

fn missing_store(guest: &mut Guest) -> Outcome {
    fs::remove_dir(&guest.store)?;
    let name = guest.store.display().to_string();
    refuses(guest, &guest.serve_arguments(&[]), CONFIG, &name)
}

fn cache_on_tmpfs(guest: &mut Guest) -> Outcome {
    guest.cache = PathBuf::from("/tmp/cache");
    fs::create_dir_all(&guest.cache)?;
    refuses(guest, &guest.serve_arguments(&[]), CONFIG, "/tmp/cache")
}

fn cache_on_overlayfs(guest: &mut Guest) -> Outcome {
    let part = |name: &str| guest.cache.join(name);
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir_all(part(name))?;
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", part("lower").display(), part("upper").display(), part("work").display());
    let merged = part("merged");
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(&*options))?;
    guest.cache.clone_from(&merged);
    let name = merged.display().to_string();
    let result = refuses(guest, &guest.serve_arguments(&[]), CONFIG, &name);
    umount2(&merged, MntFlags::MNT_DETACH)?;
    result
}

/// Infill ends with this code, names what is wrong, and leaves no cache behind in the kernel.
fn refuses(guest: &Guest, arguments: &[String], code: i32, names: &str) -> Outcome {
    let (got, log) = guest.refused(arguments)?;
    if got != code || !log.contains(names) {
        return Err(format!("exit code {got} instead of {code}, or no word of {names}:\n{log}").into());
    }
    let caches = fs::read_to_string("/proc/fs/fscache/caches")?;
    if caches.lines().count() > 2 {
        return Err(format!("a cache is still bound:\n{caches}").into());
    }
    Ok(())
}

fn must_not_mount(guest: &Guest, options: &str) -> Outcome {
    let began = Instant::now();
    if guest.mount(options).is_ok() {
        return Err(format!("{options} was mounted").into());
    }
    let took = began.elapsed();
    if took > AT_ONCE {
        return Err(format!("the mount of {options} took {} s to fail", took.as_secs()).into());
    }
    Ok(())
}

/// Some files cannot be read, with one of these errors, none reads wrong, and no reader hangs.
pub(crate) fn expect_errors(mount: &Path, known: &[Errno]) -> Outcome {
    let readers = Readers::start(mount, &data("one.json"), 4, How::Read)?;
    let complaints = readers.finish(READ_LIMIT)?;
    if complaints.is_empty() {
        return Err("everything could be read, also what is not there".into());
    }
    let is_known = |line: &str| known.iter().any(|errno| line.contains(&format!("os error {})", *errno as i32)));
    match complaints.iter().find(|line| !is_known(line)) {
        None => Ok(()),
        Some(line) => Err(format!("not one of {known:?}: {line}").into()),
    }
}

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
