//! What images were mounted of, so that a daemon which finds their mounts, and nothing else that an earlier one has left, can
//! serve them again: the kernel tells only the image's file.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};

use crate::ops::mounting::Image;

/// The list, in the cache directory: each line is one JSON object.
const FILE: &str = "blobs.mounted";
/// Its successor, while it is written.
const NEW_FILE: &str = "blobs.mounted.new";

/// Ways in which one image's file can be mounted at a time: each may need its own list of devices, and is remembered.
const WAYS_MAX: usize = 64;

/// An image, and the name of its file among the blobs.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
struct Note {
    file: String,
    image: String,
    domain: Option<String>,
    #[serde(default)]
    devices: Vec<String>,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Notes {
    dir: PathBuf,
    notes: BTreeSet<Note>,
}

impl Notes {
    /// Those in a cache directory. A line that makes no sense is dropped: its mount is only named then.
    pub(super) fn open(dir: &Path) -> Self {
        let text = fs::read_to_string(dir.join(FILE)).unwrap_or_default();
        let notes = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        Self { dir: dir.to_owned(), notes }
    }

    /// The images that `file` was mounted as: several, if with other devices each time.
    pub(super) fn find(&self, file: &str) -> Vec<Image> {
        let found = self.notes.iter().filter(|note| note.file == file);
        found
            .map(|Note { image, domain, devices, .. }| Image { name: image.clone(), domain: domain.clone(), devices: devices.clone() })
            .collect()
    }

    /// Notes what `file` is to be mounted as. `false`: it is in too many other ways.
    pub(super) fn add(&mut self, file: String, image: &Image) -> bool {
        let Image { name, domain, devices } = image;
        let note = Note { file, image: name.clone(), domain: domain.clone(), devices: devices.clone() };
        if self.notes.contains(&note) {
            return true;
        }
        if self.notes.iter().filter(|known| known.file == note.file).count() >= WAYS_MAX {
            return false;
        }
        self.notes.insert(note);
        self.write();
        true
    }

    /// Forgets all files but those that are still `wanted`.
    pub(super) fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        let before = self.notes.len();
        self.notes.retain(|note| wanted(&note.file));
        if self.notes.len() < before {
            self.write();
        }
    }

    fn write(&self) {
        if let Err(error) = self.try_write() {
            let path = self.dir.join(FILE);
            tracing::warn!(
                "cannot write {}: {error}: mounts that outlive the daemon and its keepers could not be repaired",
                path.display()
            );
        }
    }

    fn try_write(&self) -> io::Result<()> {
        let mut text = Vec::new();
        for note in &self.notes {
            serde_json::to_writer(&mut text, note)?;
            text.push(b'\n');
        }
        // Mounts do not outlive a loss of power, so nothing has to be synced.
        fs::write(self.dir.join(NEW_FILE), text)?;
        // By the one call of its kind that a confined daemon has.
        renameat_with(CWD, self.dir.join(NEW_FILE), CWD, self.dir.join(FILE), RenameFlags::empty())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_found_by_the_next_one_and_forgotten_when_it_is_not_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let image =
            |devices: &[&str]| Image { name: "a".into(), domain: Some("d".into()), devices: devices.iter().map(|&d| d.into()).collect() };
        let mut notes = Notes::open(dir.path());
        notes.add("f".into(), &image(&["x"]));
        notes.add("f".into(), &image(&["y"]));
        notes.add("f".into(), &image(&["y"]));
        notes.add("g".into(), &image(&[]));
        fs::OpenOptions::new()
            .append(true)
            .open(dir.path().join(FILE))
            .and_then(|mut file| io::Write::write_all(&mut file, b"{\n"))
            .unwrap();
        let mut notes = Notes::open(dir.path());
        assert_eq!(notes.find("f"), [image(&["x"]), image(&["y"])]);
        notes.retain(|file| file == "g");
        let notes = Notes::open(dir.path());
        assert_eq!((notes.find("f").len(), notes.find("g")), (0, vec![image(&[])]));
    }

    #[test]
    fn an_image_is_remembered_in_so_many_ways() {
        let dir = tempfile::tempdir().unwrap();
        let mut notes = Notes::open(dir.path());
        let way = |n: usize| Image { name: "a".into(), domain: None, devices: vec![n.to_string()] };
        assert!((0..WAYS_MAX).all(|n| notes.add("f".into(), &way(n))));
        assert!(!notes.add("f".into(), &way(WAYS_MAX)));
        assert!(notes.add("f".into(), &way(0)) && notes.add("g".into(), &way(WAYS_MAX)));
        assert_eq!(Notes::open(dir.path()).find("f").len(), WAYS_MAX);
    }
}
