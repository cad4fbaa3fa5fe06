//! Every byte that is read is the right one, however it is read, and whatever the daemon is made of.

use std::process::Command;

use infill::lab::tree::{Content, Manifest};

use crate::guest::{Guest, ReadCount, data, drop_caches, with_blob};
use crate::readers::{How, expect_equal};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("whole_tree_equal_one_reader", whole_tree_equal_one_reader),
    ("whole_tree_equal_eight_readers", whole_tree_equal_eight_readers),
    ("whole_tree_equal_mapped", whole_tree_equal_mapped),
    ("whole_tree_equal_blocking_engine", whole_tree_equal_blocking_engine),
    ("whole_tree_equal_source_direct", |g| source(g, "direct")),
    ("whole_tree_equal_source_buffered", |g| source(g, "buffered")),
    ("whole_tree_equal_source_mmap", |g| source(g, "mmap")),
    ("programs_run_from_the_image", programs_run_from_the_image),
    ("two_images_share_a_blob", two_images_share_a_blob),
    ("remount_asks_for_nothing", remount_asks_for_nothing),
];

const PLAIN: &str = "fsid=plain.img";

fn whole_tree_equal_one_reader(guest: &mut Guest) -> Outcome {
    guest.stock(&["plain.img"])?;
    let ended = guest.whole_tree(&[], PLAIN, "tree.json", (1, How::Read))?;
    let field = |name: &str| ended.json[name].as_u64().unwrap_or(0);
    if field("opens") == 0 || field("requests") == 0 || field("bytes_filled") == 0 {
        return Err(format!("the statistics do not say what was done: {}", ended.json).into());
    }
    Ok(())
}

fn whole_tree_equal_eight_readers(guest: &mut Guest) -> Outcome {
    guest.stock(&["tree.img", "tree.blob"])?;
    let options = with_blob("tree.img", "tree.blob");
    guest.whole_tree(&[], &options, "tree.json", (8, How::Read))?;
    Ok(())
}

fn whole_tree_equal_mapped(guest: &mut Guest) -> Outcome {
    guest.stock(&["tree.img", "tree.blob"])?;
    let options = with_blob("tree.img", "tree.blob");
    guest.whole_tree(&[], &options, "tree.json", (8, How::Mmap))?;
    Ok(())
}

fn whole_tree_equal_blocking_engine(guest: &mut Guest) -> Outcome {
    guest.stock(&["plain.img"])?;
    guest.whole_tree(&["--engine=blocking"], PLAIN, "tree.json", (8, How::Read))?;
    Ok(())
}

fn source(guest: &mut Guest, mode: &str) -> Outcome {
    guest.stock(&["tree.img", "tree.blob"])?;
    let flag = format!("--source={mode}");
    let options = with_blob("tree.img", "tree.blob");
    guest.whole_tree(&[&flag], &options, "tree.json", (4, How::Read))?;
    Ok(())
}

/// Pages of a program are faulted in, one window at a time.
fn programs_run_from_the_image(guest: &mut Guest) -> Outcome {
    guest.stock(&["plain.img"])?;
    guest.serve(&[])?;
    let at = guest.mount(PLAIN)?;
    let manifest = Manifest::load(&data("tree.json"))?;
    let mut ran = 0;
    for entry in manifest.entries.iter().filter(|e| e.path.starts_with("bin/")) {
        if !matches!(entry.content, Content::File { .. }) {
            continue;
        }
        let status = Command::new(at.join(&entry.path)).arg("--version").output()?.status;
        // `false` fails even when it only says its version.
        if !status.success() && entry.path != "bin/false" {
            return Err(format!("{} ended with {status}", entry.path).into());
        }
        ran += 1;
    }
    if ran == 0 {
        return Err("no program in the image could be run".into());
    }
    guest.umount(&at)?;
    guest.stop()?;
    Ok(())
}

fn two_images_share_a_blob(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob", "two.img"])?;
    guest.serve(&[])?;
    let one = guest.mount(&with_blob("one.img", "one.blob"))?;
    let two = guest.mount(&with_blob("two.img", "one.blob"))?;
    expect_equal(&one, &data("one.json"), 2, How::Read)?;
    let count = ReadCount::start()?;
    expect_equal(&two, &data("two.json"), 2, How::Read)?;
    let of_metadata = count.reads()?;
    guest.umount(&one)?;
    expect_equal(&two, &data("two.json"), 2, How::Read)?;
    guest.umount(&two)?;
    let ended = guest.stop()?;
    // The second image's data is all there: only its metadata is still asked for.
    let requests = ended.json["requests"].as_u64().unwrap_or(0);
    if ended.json["opens"] != 3 || of_metadata * 3 > requests {
        return Err(format!("{of_metadata} READs for the second image; {}", ended.json).into());
    }
    Ok(())
}

fn remount_asks_for_nothing(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    guest.serve(&[])?;
    let options = with_blob("one.img", "one.blob");
    guest.expect_whole(&options, "one.json", (2, How::Read))?;
    drop_caches()?;
    let count = ReadCount::start()?;
    let at = guest.mount(&options)?;
    expect_equal(&at, &data("one.json"), 2, How::Read)?;
    let reads = count.reads()?;
    guest.umount(&at)?;
    guest.stop()?;
    if reads != 0 {
        return Err(format!("{reads} READs although everything is in the cache").into());
    }
    Ok(())
}
