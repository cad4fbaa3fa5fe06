//! A blob is replaced while infill does not run: bytes of the old and the new one never come together.

use std::fs;
use std::path::Path;

use infill::lab::tree::{Content, Entry, Manifest};

use crate::guest::{Guest, data, drop_caches, with_blob};
use crate::readers::How;
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[("fault_blob_replaced_while_infill_is_down_is_not_mixed_with_what_is_cached", replaced_while_down)];

/// Unit in which the kernel caches.
const BLOCK_BYTES: usize = 4096;

type Files = Vec<(String, Vec<u8>)>;

/// All of the image is cached, and its blob is replaced by one of the same length in which every byte is another. Then it is
/// as at first again; and as another user, who cannot look into the cache.
fn replaced_while_down(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img"])?;
    let blob = guest.store.join("one.blob");
    let old = fs::read(data("one.blob"))?;
    let new: Vec<u8> = old.iter().map(|byte| !byte).collect();
    fs::write(&blob, &old)?;
    guest.whole_tree(&[], &with_blob("one.img", "one.blob"), "one.json", (2, How::Read))?;
    let files = read_all(guest, &[])?;

    put(&blob, &new)?;
    for (path, bytes) in read_all(guest, &[])? {
        let before = files.iter().find(|(known, _)| *known == path).ok_or("a file is new")?;
        if !is_inverted(&before.1, &bytes) {
            return Err(format!("{path} has bytes of the blob that was replaced").into());
        }
    }
    put(&blob, &old)?;
    fs::set_permissions(&blob, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    if read_all(guest, &["--user=65534:65534"])? != files {
        return Err("with the first blob again the image is not what it was".into());
    }
    Ok(())
}

/// Puts a file in the place of another, as whoever builds images does.
fn put(blob: &Path, bytes: &[u8]) -> Outcome {
    let next = blob.with_extension("next");
    fs::write(&next, bytes)?;
    fs::rename(&next, blob)?;
    Ok(())
}

/// All files that have data, by a daemon of their own.
fn read_all(guest: &Guest, serve: &[&str]) -> Result<Files, Box<dyn std::error::Error>> {
    drop_caches()?;
    guest.serve(serve)?;
    let at = guest.mount(&with_blob("one.img", "one.blob"))?;
    let has_data = |entry: &&Entry| matches!(entry.content, Content::File { len_bytes: 1.., .. });
    let manifest = Manifest::load(&data("one.json"))?;
    let read = |entry: &Entry| fs::read(at.join(&entry.path)).map(|bytes| (entry.path.clone(), bytes));
    let files = manifest.entries.iter().filter(has_data).map(read).collect::<Result<_, _>>()?;
    guest.umount(&at)?;
    guest.stop()?;
    Ok(files)
}

/// Whether every block has the other bytes; one of zeros may be a hole of the image, which is in no blob.
fn is_inverted(before: &[u8], after: &[u8]) -> bool {
    let inverted = |(a, b): (&[u8], &[u8])| a.iter().zip(b).all(|(a, b)| *a == !*b) || (a == b && a.iter().all(|byte| *byte == 0));
    before.len() == after.len() && before.chunks(BLOCK_BYTES).zip(after.chunks(BLOCK_BYTES)).all(inverted)
}
