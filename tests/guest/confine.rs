//! What the daemon gives up after its start is not needed: it serves without any capability, as another user, with
//! few files and few system calls.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use crate::guest::{DOMAIN, Guest, data, with_blob};
use crate::readers::{How, expect_equal};
use crate::seed::{object, wait_until};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("confined_to_nobody_reads_the_whole_tree", confined_to_nobody),
    ("confined_engines_and_sources_all_serve", confined_engines_and_sources),
    ("confined_as_far_as_possible_by_default", confined_by_default),
    ("confined_user_that_may_not_read_is_told_what_to_do", confined_user_that_may_not_read),
    ("confined_user_makes_room_in_the_cache", confined_user_makes_room),
];

/// Strictly, and as a user of no rights.
const STRICT: [&str; 2] = ["--confine=strict", "--user=nobody"];
/// That user.
const NOBODY: u32 = 65_534;
/// Exit code of a bad configuration, from sysexits.h.
const CONFIG: i32 = 78;

/// The guest has no users.
fn make_nobody() -> Outcome {
    fs::create_dir_all("/etc")?;
    fs::write("/etc/passwd", format!("root:x:0:0::/:\nnobody:x:{NOBODY}:{NOBODY}::/:\n"))?;
    Ok(())
}

/// All lines are in the daemon's `/proc/PID/status`.
fn expect_status(guest: &Guest, lines: &[&str]) -> Outcome {
    let status = fs::read_to_string(format!("/proc/{}/status", guest.daemon_pid()?))?;
    match lines.iter().find(|line| !status.contains(**line)) {
        None => Ok(()),
        Some(line) => Err(format!("{line:?} is not in:\n{status}").into()),
    }
}

/// No capability in any set, none to be gained, a filter.
fn expect_powerless(guest: &Guest) -> Outcome {
    let none = "0000000000000000";
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        expect_status(guest, &[&format!("{set}:\t{none}")])?;
    }
    expect_status(guest, &["NoNewPrivs:\t1", "Seccomp:\t2"])
}

/// The kernel's directories are root's; the one thread that looks after them may enter them, and nobody else may.
fn confined_user_makes_room(guest: &mut Guest) -> Outcome {
    make_nobody()?;
    let names = ["a.img", "b.img"];
    names.iter().try_for_each(|name| guest.stock_as("plain.img", name))?;
    let budget = format!("--cache-bytes={}", data("plain.img").metadata()?.len() * 3 / 2);
    guest.serve(&[&STRICT[..], &[&budget]].concat())?;
    expect_powerless(guest)?;
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.daemon_pid()?))?.flatten().map(|task| task.path());
    for task in tasks {
        let [comm, status] = ["comm", "status"].map(|name| fs::read_to_string(task.join(name)).unwrap_or_default());
        // CAP_DAC_OVERRIDE and CAP_FOWNER.
        let powers = if comm.trim_end() == "infill-space" { "000000000000000a" } else { "0000000000000000" };
        if ["CapPrm", "CapEff"].iter().any(|set| !status.contains(&format!("{set}:\t{powers}"))) {
            return Err(format!("the thread {comm} has other capabilities than {powers}:\n{status}").into());
        }
    }
    for name in names {
        guest.expect_whole(&format!("fsid={name},domain_id={DOMAIN}"), "tree.json", (2, How::Read))?;
        wait_until("the kernel names its object", || object(guest, name).is_ok())?;
    }
    wait_until("what was used longest ago goes", || object(guest, names[0]).is_err())?;
    // A daemon that takes the cache over knows when objects were last used, which is noted in their files.
    let ended = guest.stop()?;
    if object(guest, names[1]).is_err() || ended.json["culled_objects"] != 1 || guest.log().contains("cannot look after") {
        return Err(format!("{}\n{}", ended.json, guest.log()).into());
    }
    Ok(())
}

fn confined_to_nobody(guest: &mut Guest) -> Outcome {
    make_nobody()?;
    guest.stock(&["tree.img", "tree.blob", "one.img", "one.blob"])?;
    guest.serve(&STRICT)?;
    expect_powerless(guest)?;
    expect_status(guest, &[&format!("Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}"), &format!("Gid:\t{NOBODY}\t")])?;
    let tree = guest.mount(&with_blob("tree.img", "tree.blob"))?;
    expect_equal(&tree, &data("tree.json"), 8, How::Read)?;
    // Blobs are found, and cache files made, after the rights are gone.
    guest.expect_whole(&with_blob("one.img", "one.blob"), "one.json", (2, How::Mmap))?;
    guest.umount(&tree)?;
    guest.stop()?;
    // The kernel makes its directories as root, whoever binds; a new daemon finds everything there all the same.
    let owner = fs::metadata(guest.cache.join("cache"))?.uid();
    if owner != 0 {
        return Err(format!("the kernel's directory in the cache belongs to {owner}: culling needs no capability then").into());
    }
    guest.whole_tree(&STRICT, &with_blob("tree.img", "tree.blob"), "tree.json", (4, How::Read))?;
    // As does one that is not confined.
    guest.whole_tree(&["--confine=off"], &with_blob("one.img", "one.blob"), "one.json", (2, How::Read))?;
    Ok(())
}

fn confined_engines_and_sources(guest: &mut Guest) -> Outcome {
    make_nobody()?;
    for engine in ["uring", "blocking"] {
        for source in ["direct", "buffered", "mmap"] {
            let names = ["img", "blob"].map(|kind| format!("{engine}-{source}.{kind}"));
            guest.stock_as("one.img", &names[0])?;
            guest.stock_as("one.blob", &names[1])?;
            guest.serve(&[&STRICT[..], &[&format!("--engine={engine}"), &format!("--source={source}")]].concat())?;
            expect_powerless(guest)?;
            guest.expect_whole(&with_blob(&names[0], &names[1]), "one.json", (4, How::Read))?;
            let ended = guest.stop()?;
            if ended.json["engine"] != engine {
                return Err(format!("served with another engine: {}", ended.json).into());
            }
        }
    }
    Ok(())
}

fn confined_by_default(guest: &mut Guest) -> Outcome {
    guest.stock(&["tiny.img"])?;
    guest.serve(&[])?;
    expect_powerless(guest)?;
    expect_status(guest, &["Uid:\t0\t"])?;
    let log = guest.log();
    for part in ["capabilities: none", "landlock: version", "seccomp: "] {
        if !log.contains(part) {
            return Err(format!("the log does not say {part:?}:\n{log}").into());
        }
    }
    guest.expect_whole("fsid=tiny.img,domain_id=lab", "tiny.json", (1, How::Read))?;
    guest.stop()?;
    Ok(())
}

fn confined_user_that_may_not_read(guest: &mut Guest) -> Outcome {
    make_nobody()?;
    let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
    // A store.
    set(&guest.store, 0o700)?;
    let (code, log) = guest.refused(&guest.serve_arguments(&STRICT))?;
    if code != CONFIG || !log.contains("chmod") || !log.contains(&guest.store.display().to_string()) {
        return Err(format!("exit code {code}, and it said:\n{log}").into());
    }
    // A blob.
    set(&guest.store, 0o755)?;
    let blob = guest.store.join("own.img");
    fs::copy(data("tiny.img"), &blob)?;
    set(&blob, 0o600)?;
    guest.serve(&STRICT)?;
    if guest.mount("fsid=own.img,domain_id=lab").is_ok() {
        return Err("nobody could read what is root's".into());
    }
    if !guest.log().lines().any(|line| line.contains("own.img") && line.contains("chmod")) {
        return Err(format!("the log does not say what to do:\n{}", guest.log()).into());
    }
    set(&blob, 0o644)?;
    guest.expect_whole("fsid=own.img,domain_id=lab", "tiny.json", (1, How::Read))?;
    guest.stop()?;
    Ok(())
}
