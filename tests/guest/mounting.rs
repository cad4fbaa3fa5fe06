//! `infill mount` and `infill umount`: what a user of them sees, with a daemon and without one.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use nix::mount::{MntFlags, umount2};
use serde_json::Value;

use crate::guest::{DOMAIN, Guest, INFILL, data};
use crate::readers::{How, expect_equal};
use crate::seed::stock_beside_cache;
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("images_are_mounted_by_name_and_unmounted", by_name),
    ("mounted_images_share_their_blobs_where_that_is_possible", sharing),
    ("a_mount_that_fails_says_what_to_do", failures),
];

/// `EX_UNAVAILABLE`.
const UNAVAILABLE: i32 = 69;

fn infill(verb: &str, arguments: &[&str]) -> std::io::Result<Output> {
    Command::new(INFILL).arg(verb).args(arguments).env("NO_COLOR", "1").output()
}

/// Runs it and wants it to succeed; gives what it printed.
fn well(verb: &str, arguments: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
    let output = infill(verb, arguments)?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(format!("infill {verb} {arguments:?}: {output:?}").into()),
    }
}

/// Runs it and wants it to fail with this exit code and these words.
fn badly(verb: &str, arguments: &[&str], code: i32, words: &str) -> Outcome {
    let output = infill(verb, arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() == Some(code) && said.contains(words) && said.lines().count() == 1 {
        true => Ok(()),
        false => Err(format!("infill {verb} {arguments:?}: {}: {said}", output.status).into()),
    }
}

/// A directory to mount on.
fn place(name: &str) -> std::io::Result<String> {
    let dir = format!("/mnt/{name}");
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn by_name(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    guest.serve(&[])?;
    let dir = place("by-name")?;
    let line = well("mount", &["--domain", DOMAIN, "--device", "one.blob", "one.img", &dir])?;
    if line.trim_end() != format!("one.img is mounted on {dir}; its blobs are read on demand") {
        return Err(line.into());
    }
    let equal = expect_equal(Path::new(&dir), &data("one.json"), 2, How::Read);
    well("umount", &[&dir])?;
    equal?;
    badly("umount", &[&dir], 1, "no EROFS image is mounted here")?;
    guest.stop()?;
    Ok(())
}

/// What `infill prefetch --seed` does, at the mount. Where blocks cannot be shared they are read on demand, and nobody
/// is told anything else.
fn sharing(guest: &mut Guest) -> Outcome {
    let shares = stock_beside_cache(guest, &["one.img", "one.blob"])?;
    guest.serve(&[])?;
    let dir = place("sharing")?;
    let (cache, store) = (format!("--cache-dir={}", guest.cache.display()), format!("--store=dir:{}", guest.store.display()));
    let line = well("mount", &["--json", &cache, &store, "--domain", DOMAIN, "--device", "one.blob", "one.img", &dir])?;
    let report: Value = serde_json::from_str(&line)?;
    let equal = expect_equal(Path::new(&dir), &data("one.json"), 2, How::Read);
    well("umount", &[&dir])?;
    equal?;
    let ended = guest.stop()?;
    let expected = if shares { (2, 0) } else { (0, 2) };
    let found = (report["shared_blobs"].as_u64().unwrap_or(99), report["on_demand"].as_array().map_or(99, Vec::len));
    if found != expected || shares == (ended.json["bytes_filled"] != 0) {
        return Err(format!("{report}, then {}", ended.json).into());
    }
    Ok(())
}

fn failures(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    let dir = place("failures")?;
    badly("mount", &["one.img", &dir], UNAVAILABLE, "start infill serve")?;
    guest.serve(&[])?;
    badly("mount", &["one.img", "/mnt/not-made"], 2, "give an existing directory")?;
    badly("mount", &["a,ro", &dir], 2, "cannot hold a comma")?;
    badly("mount", &["no-such.img", &dir], 1, "could not find or read the image")?;
    let mounted = infill("mount", &["--device=one.blob", "--device=one.blob", "one.img", &dir])?;
    if mounted.status.success() || !String::from_utf8_lossy(&mounted.stderr).contains("its devices are not those of the mount") {
        let _ = umount2(dir.as_str(), MntFlags::MNT_DETACH);
        return Err(format!("{mounted:?}").into());
    }
    guest.stop()?;
    Ok(())
}
