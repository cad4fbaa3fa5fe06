//! The power is cut while a cache is filled: what the daemon knows to be there after that must be there. The cache is its own, and
//! only what was synced can be relied on; the rest is brought anew.

use std::fs::{self, File};
use std::time::Duration;

use crate::from_files::{serve_arguments, unmount};
use crate::guest::{DOMAIN, Guest, data};
use crate::host::CUT_POWER;
use crate::readers::{How, Readers, expect_equal};
use crate::restart::Released;
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[("fault_loss_of_power_under_files", power_cut)];

/// Images and how they are mounted: all in one file, and with a blob of its own. The first is the one that is read first.
const IMAGES: [(&str, &[&str]); 2] = [("plain.img", &[]), ("tree.img", &["--domain", DOMAIN, "--device", "tree.blob"])];
/// Long enough that the daemon has made durable what it has, which it does every two seconds.
const SAVED: Duration = Duration::from_secs(8);
/// After that the second image is being read, and some of it is there that is not durable.
const UNSAVED: Duration = Duration::from_millis(1500);
/// The guest is gone long before.
const NEVER: Duration = Duration::from_secs(60);

fn power_cut(guest: &mut Guest) -> Outcome {
    let _released = Released(guest);
    let cut = guest.cache.join("cut");
    let first = !cut.exists();
    // Before anything is read: to sync it may take other things along.
    File::create(&cut)?.sync_all()?;
    File::open(&guest.cache)?.sync_all()?;
    let more: &[&str] = if first { &["--window=64K", "--complete=off"] } else { &[] };
    guest.serve_with(&serve_arguments(guest, more))?;
    if first { before(guest) } else { after(guest) }
}

/// Reads the first image whole; when that is durable, begins with the second one.
fn before(guest: &Guest) -> Outcome {
    for (n, (image, more)) in IMAGES.into_iter().enumerate() {
        let (at, _) = guest.mount_files(image, more)?;
        if n == 0 {
            expect_equal(&at, &data("tree.json"), 2, How::Read)?;
            std::thread::sleep(SAVED);
            continue;
        }
        let _readers = Readers::start(&at, &data("tree.json"), 8, How::Read)?;
        std::thread::sleep(UNSAVED);
        println!("{CUT_POWER}");
        std::thread::sleep(NEVER);
    }
    Err("the power was not cut".into())
}

/// Every byte is right, and what was durable need not be brought again.
fn after(guest: &Guest) -> Outcome {
    for (n, (image, more)) in IMAGES.into_iter().enumerate() {
        let (at, report) = guest.mount_files(image, more)?;
        println!("{image} after the loss of power: {report}");
        let bytes = |name: &str| report[name].as_u64().unwrap_or(0);
        if n == 0 && bytes("present_bytes") < bytes("len_bytes") / 2 {
            return Err(format!("what was durable is lost: {report}").into());
        }
        expect_equal(&at, &data("tree.json"), 8, How::Read)?;
        unmount(guest, &at)?;
    }
    fs::remove_file(guest.cache.join("cut"))?;
    guest.stop()?;
    Ok(())
}
