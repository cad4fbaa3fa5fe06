//! Seeding what the kernel knows or uses already: what is there stays, and what is mounted is not disturbed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use crate::guest::{Guest, data, drop_caches, with_blob};
use crate::readers::{How, expect_equal};
use crate::seed::{
    expect_prefetch, fates, object, prefetch_command, reads_of_all, refused_and_read_on_demand, stock_beside_cache, wait_until,
};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("seeding_leaves_present_objects_alone", present_objects_stay),
    ("seeding_of_mounted_blobs_is_refused", mounted_blobs_are_refused),
    ("seeded_object_linked_under_a_mounted_one_is_harmless", linked_under_a_mounted_one),
    ("seeding_beside_mounting_goes_well_either_way", beside_mounting),
];

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// How often seeding and mounting race for a new domain.
const RACES: u32 = 16;

fn present_objects_stay(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["one.img", "one.blob"])? {
        return refused_and_read_on_demand(guest);
    }
    guest.serve(&[])?;
    let options = with_blob("one.img", "one.blob");
    let at = guest.mount(&options)?;
    guest.umount(&at)?;
    wait_until("the kernel names its objects", || object(guest, "one.img").is_ok() && object(guest, "one.blob").is_ok())?;
    let identity = || -> Result<_> {
        let meta = object(guest, "one.blob")?.metadata()?;
        Ok((meta.ino(), meta.blocks(), meta.ctime(), meta.ctime_nsec()))
    };
    let before = identity()?;
    expect_prefetch(guest, &["one.img", "one.blob"], "already_there", "")?;
    // In use, with a name: found by the name.
    let at = guest.mount(&options)?;
    expect_prefetch(guest, &["one.img", "one.blob"], "already_there", "")?;
    if identity()? != before {
        return Err("an object that was there has changed".into());
    }
    expect_equal(&at, &data("one.json"), 2, How::Read)?;
    guest.umount(&at)?;
    guest.stop()?;
    Ok(())
}

/// Mounted for the first time, an object has no name that would stand in the way.
fn mounted_blobs_are_refused(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["one.img", "one.blob"])? {
        return refused_and_read_on_demand(guest);
    }
    guest.serve(&[])?;
    let options = with_blob("one.img", "one.blob");
    let at = guest.mount(&options)?;
    expect_prefetch(guest, &["one.img", "one.blob"], "refused", "in use")?;
    if object(guest, "one.img").is_ok() {
        return Err("a mounted image was seeded".into());
    }
    expect_equal(&at, &data("one.json"), 2, How::Read)?;
    guest.umount(&at)?;
    let reads = reads_of_all(guest, &options, "one.json")?;
    guest.stop()?;
    if reads == 0 { Ok(()) } else { Err(format!("{reads} READs").into()) }
}

/// What happens if the kernel begins to use a blob just after seeding looked: the name appears while its own
/// object has none. (Made in another cache before the mount, because seeding itself refuses.)
fn linked_under_a_mounted_one(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["one.img", "one.blob"])? {
        return refused_and_read_on_demand(guest);
    }
    let own = guest.cache.clone();
    guest.cache = own.with_extension("elsewhere");
    expect_prefetch(guest, &["one.img", "one.blob"], "seeded", "")?;
    let made = [object(guest, "one.img")?, object(guest, "one.blob")?];
    let elsewhere = std::mem::replace(&mut guest.cache, own);
    guest.serve(&[])?;
    let options = with_blob("one.img", "one.blob");
    let at = guest.mount(&options)?;
    // Now both are looked up; for a device the kernel does that beside the mount.
    expect_equal(&at, &data("one.json"), 2, How::Read)?;
    let mut links = Vec::new();
    for path in made {
        let link = guest.cache.join(path.strip_prefix(&elsewhere)?);
        fs::hard_link(&path, &link)?;
        links.push((link, path.metadata()?.ino()));
    }
    drop_caches()?;
    expect_equal(&at, &data("one.json"), 2, How::Read)?;
    guest.umount(&at)?;
    let replaced = |(link, inode): &(PathBuf, u64)| link.metadata().is_ok_and(|meta| meta.ino() != *inode);
    wait_until("the kernel puts its own objects there", || links.iter().all(replaced))?;
    let reads = reads_of_all(guest, &options, "one.json")?;
    guest.stop()?;
    if reads == 0 { Ok(()) } else { Err(format!("{reads} READs").into()) }
}

/// Both make the domain's directories, and the object; whoever comes first.
fn beside_mounting(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["one.img", "one.blob", "tiny.img"])? {
        return refused_and_read_on_demand(guest);
    }
    guest.serve(&[])?;
    let mut counts = BTreeMap::<String, u32>::new();
    for race in 0..RACES {
        let domain = format!("race{race}");
        let options = format!("fsid=tiny.img,domain_id={domain}");
        let prefetch = prefetch_command(guest, Some(&domain), &["tiny.img"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        // The process needs a while until it is where the race is.
        std::thread::sleep(Duration::from_millis(u64::from(race) * 8));
        let at = guest.mount(&options)?;
        let fates = fates(&prefetch.wait_with_output()?)?;
        expect_equal(&at, &data("tiny.json"), 1, How::Read)?;
        guest.umount(&at)?;
        if fates[0].0 == "failed" {
            return Err(format!("race {race}: {fates:?}").into());
        }
        *counts.entry(format!("{fates:?}")).or_default() += 1;
        if reads_of_all(guest, &options, "tiny.json")? != 0 {
            return Err(format!("race {race}: data was not kept").into());
        }
    }
    println!("{counts:?}");
    guest.stop()?;
    Ok(())
}
