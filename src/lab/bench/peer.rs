//! Daemons that are not part of this program, each described by a TOML file, so that they can be measured in the same run.
//! `benches/peers/` has examples.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::data::{Data, store_disk};
use super::{BLOB, CACHE_DIR, DOMAIN, IMAGE, SETTLE_MS, STORE_DIR, Service};
use crate::lab::{LabError, Result, Trying, packages, run};

/// Where the program of [`Profile::of_command`] lies in the guest.
const PEER_PROGRAM: &str = "/bin/peer";

/// A peer as it is written. In `start`, `files`, `source` and `options`, `{store}` and `{cache}` stand for the directories
/// in the guest, `{image}` and `{blob}` for the names of image and blob in the store.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Its name in tables.
    pub name: String,
    /// Programs by their paths in the guest: paths, or names on `PATH`. Shared libraries come along.
    pub programs: BTreeMap<String, String>,
    /// Program and arguments with which it starts. It must stay in the foreground; it is ready when the kernel lists its
    /// cache, and `settle_ms` later.
    pub start: Vec<String>,
    /// Text files by their paths in the guest, such as a configuration.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// Command that makes its own images on this machine: of the directory `{tree}`, into the directory `{store}`.
    /// Without one it gets the bench's EROFS image and blob.
    #[serde(default)]
    pub build: Option<Vec<String>>,
    /// Source of the mount.
    #[serde(default = "no_source")]
    pub source: String,
    /// Options of the mount.
    #[serde(default = "usual_options")]
    pub options: String,
    /// See [`Service::settle_ms`].
    #[serde(default = "usual_settle_ms")]
    pub settle_ms: u64,
}

fn no_source() -> String {
    "none".into()
}

fn usual_options() -> String {
    format!("fsid={{image}},domain_id={DOMAIN},device={{blob}}")
}

const fn usual_settle_ms() -> u64 {
    SETTLE_MS
}

/// What a peer's guests get.
#[derive(Debug)]
pub struct Peer {
    /// Programs: where in the guest, and where on this machine.
    pub(super) programs: Vec<(String, PathBuf)>,
    /// Files: where in the guest, and their text.
    pub(super) files: Vec<(String, String)>,
    /// The disk with its own images, if it has any.
    pub(super) store: Option<Vec<u8>>,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// The file cannot be read or makes no sense.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).trying(|| format!("cannot read the peer's profile {}", path.display()))?;
        toml::from_str(&text).map_err(|e| LabError::Failed(format!("{} is no profile of a peer: {e}", path.display())))
    }

    /// A peer that is one program and serves the bench's images.
    ///
    /// # Errors
    /// There is no program in `command`.
    pub fn of_command(command: &str) -> Result<Self> {
        let mut words = command.split_whitespace().map(str::to_owned);
        let program = words.next().ok_or_else(|| LabError::Failed("--peer: the command is empty".into()))?;
        let name = Path::new(&program).file_name().map_or_else(|| "peer".into(), |name| name.to_string_lossy().into_owned());
        Ok(Self {
            name,
            programs: [(PEER_PROGRAM.to_owned(), program)].into(),
            start: [PEER_PROGRAM.to_owned()].into_iter().chain(words).collect(),
            files: BTreeMap::new(),
            build: None,
            source: no_source(),
            options: usual_options(),
            settle_ms: SETTLE_MS,
        })
    }

    /// How cells start it, as the peer of that index.
    #[must_use]
    pub fn service(&self, index: usize) -> Service {
        Service {
            name: self.name.clone(),
            argv: self.start.iter().map(|word| in_guest(word)).collect(),
            // The names of images are put in by the cell, which may have several.
            source: self.source.replace("{store}", STORE_DIR),
            options: self.options.replace("{store}", STORE_DIR),
            settle_ms: self.settle_ms,
            store_beside_cache: false,
            peer: Some(index),
        }
    }

    /// Whether it serves all images of the bench, or only what it made itself.
    #[must_use]
    pub const fn serves_any_image(&self) -> bool {
        self.build.is_none()
    }

    /// Finds its programs and makes its images.
    ///
    /// # Errors
    /// A program is not there, or the images cannot be made.
    pub fn prepare(&self, data: &Data, scratch: &Path) -> Result<Peer> {
        let found = |(path, program): (&String, &String)| {
            let file = if program.contains('/') { Some(PathBuf::from(program)) } else { packages::find(program) };
            let file = file.filter(|file| file.is_file());
            let file =
                file.ok_or_else(|| LabError::Failed(format!("peer {}: there is no program {program} on this machine", self.name)))?;
            Ok((path.clone(), file))
        };
        Ok(Peer {
            programs: self.programs.iter().map(found).collect::<Result<_>>()?,
            files: self.files.iter().map(|(path, text)| (path.clone(), in_guest(text))).collect(),
            store: self.build.as_ref().map(|command| self.build_store(command, data, scratch)).transpose()?,
        })
    }

    fn build_store(&self, command: &[String], data: &Data, scratch: &Path) -> Result<Vec<u8>> {
        let store = scratch.join(format!("store-of-{}", self.name));
        fs::create_dir_all(&store).trying(|| format!("cannot make {}", store.display()))?;
        let (tree, dir) = (data.tree.to_string_lossy(), store.to_string_lossy());
        let mut words = command.iter().map(|word| word.replace("{tree}", &tree).replace("{store}", &dir));
        let program = words.next().ok_or_else(|| LabError::Failed(format!("peer {}: build is empty", self.name)))?;
        run(Command::new(program).args(words))?;
        store_disk(&store)
    }
}

fn in_guest(text: &str) -> String {
    let text = text.replace("{store}", STORE_DIR).replace("{cache}", CACHE_DIR);
    text.replace("{image}", IMAGE).replace("{blob}", BLOB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_profiles_are_understood() {
        for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers")).expect("the examples") {
            let path = entry.expect("an entry").path();
            let profile = Profile::load(&path).expect("a profile");
            let service = profile.service(0);
            let texts = service.argv.iter().chain([&service.source]).map(String::as_str);
            let texts: Vec<String> = texts.map(str::to_owned).chain(profile.files.values().map(|text| in_guest(text))).collect();
            assert!(texts.iter().all(|text| !text.contains("{store}") && !text.contains("{cache}")), "{texts:?}");
            assert!(service.argv.first().is_some_and(|program| profile.programs.contains_key(program)), "{}", path.display());
        }
    }

    #[test]
    fn a_command_is_a_profile_too() {
        let profile = Profile::of_command("/opt/daemon --root {cache} {store}/x").expect("a command");
        assert_eq!(profile.service(3).argv, [PEER_PROGRAM, "--root", CACHE_DIR, "/store/x"]);
        assert_eq!((&*profile.name, profile.service(3).peer), ("daemon", Some(3)));
        assert!(Profile::of_command(" ").is_err());
    }
}
