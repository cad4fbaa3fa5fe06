//! Directory trees, and manifests that say what they must read as.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{LabError, Result, Trying, checksum};

/// One file or link of a tree.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Entry {
    /// Below the root; UTF-8, which [`Manifest::of`] insists on.
    pub path: String,
    /// What it is.
    pub content: Content,
}

/// What an entry must be.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub enum Content {
    /// A regular file.
    File {
        /// Its length.
        len_bytes: u64,
        /// [`checksum`] of its bytes.
        sum: u64,
    },
    /// A symbolic link to this.
    Link(String),
}

/// Everything in a tree, sorted by path.
#[derive(Clone, PartialEq, Eq, Default, Debug, serde::Serialize, serde::Deserialize)]
pub struct Manifest {
    /// Files and links.
    pub entries: Vec<Entry>,
}

impl Manifest {
    /// Reads a whole tree.
    ///
    /// # Errors
    /// Something in it cannot be read or has a name that is not UTF-8.
    pub fn of(root: &Path) -> Result<Self> {
        let mut entries = Vec::new();
        for path in walk(root)? {
            entries.push(Entry { content: content_of(&root.join(&path))?, path });
        }
        Ok(Self { entries })
    }

    /// Reads what [`Manifest::save`] wrote.
    ///
    /// # Errors
    /// It cannot be read or is something else.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read(path).trying(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).map_err(|e| LabError::Failed(format!("{}: not a manifest: {e}", path.display())))
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|e| LabError::Failed(format!("cannot write a manifest: {e}")))?;
        fs::write(path, text).trying(|| format!("cannot write {}", path.display()))
    }

    /// Length of all files together.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        let lengths = self.entries.iter().map(|e| match e.content {
            Content::File { len_bytes, .. } => len_bytes,
            Content::Link(_) => 0,
        });
        lengths.sum()
    }

    /// Compares the names under `root`, without reading any file.
    ///
    /// # Errors
    /// A directory cannot be listed.
    pub fn compare_names(&self, root: &Path) -> Result<Vec<String>> {
        let there = walk(root)?;
        let wanted: Vec<&str> = self.entries.iter().map(|e| e.path.as_str()).collect();
        let found: Vec<&str> = there.iter().map(String::as_str).collect();
        let one_sided = |a: &[&str], b: &[&str], what: &str| -> Vec<String> {
            let odd = a.iter().filter(|p| b.binary_search(p).is_err());
            odd.map(|p| format!("{p}: {what}")).collect()
        };
        let mut differences = one_sided(&wanted, &found, "missing");
        differences.extend(one_sided(&found, &wanted, "should not be there"));
        Ok(differences)
    }
}

/// Paths of all files and links below `root`, sorted bytewise.
pub(super) fn walk(root: &Path) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        let full = root.join(&dir);
        let list = || format!("cannot list {}", full.display());
        for entry in fs::read_dir(&full).trying(list)? {
            let entry = entry.trying(list)?;
            let path = dir.join(entry.file_name());
            if entry.file_type().trying(list)?.is_dir() {
                todo.push(path);
                continue;
            }
            let path = path
                .into_os_string()
                .into_string()
                .map_err(|name| LabError::Failed(format!("{}: the name is not UTF-8", name.display())))?;
            paths.push(path);
        }
    }
    paths.sort_unstable();
    Ok(paths)
}

fn content_of(path: &Path) -> Result<Content> {
    let what = || format!("cannot read {}", path.display());
    if path.is_symlink() {
        let target = fs::read_link(path).trying(what)?;
        return Ok(Content::Link(target.to_string_lossy().into_owned()));
    }
    let bytes = fs::read(path).trying(what)?;
    Ok(Content::File { len_bytes: bytes.len() as u64, sum: checksum(&bytes) })
}

/// Where every machine that can build this program has files of all sizes.
pub const MACHINE_SOURCES: &[&str] = &["/usr/bin", "/usr/include", "/usr/share/perl", "/usr/lib/python3", "/usr/lib/python3.11"];

/// Which files of this machine make a tree, and how many of them.
#[derive(Clone, Copy, Debug)]
pub struct Selection {
    /// Directories that they are in.
    pub sources: &'static [&'static str],
    /// Limits of the whole tree; one source gives at most half of each.
    pub files_max: usize,
    /// See `files_max`.
    pub bytes_max: u64,
    /// Longer files are left out.
    pub file_bytes_max: u64,
}

impl Selection {
    /// Copies readable regular files to `tree` until a limit is reached.
    ///
    /// # Errors
    /// A file cannot be copied.
    pub fn copy_to(&self, tree: &Path) -> Result<()> {
        fs::create_dir_all(tree).trying(|| format!("cannot make {}", tree.display()))?;
        let (mut files, mut bytes) = (0, 0);
        for source in self.sources.iter().map(Path::new).filter(|s| s.is_dir()) {
            let (mut source_files, mut source_bytes) = (0, 0);
            for path in walk(source)? {
                let from = source.join(&path);
                let usable = |m: &fs::Metadata| m.is_file() && m.len() <= self.file_bytes_max && m.permissions().mode() & 0o4 != 0;
                let Some(meta) = from.symlink_metadata().ok().filter(usable) else {
                    continue;
                };
                if bytes + meta.len() > self.bytes_max || source_bytes + meta.len() > self.bytes_max / 2 {
                    continue;
                }
                if files >= self.files_max || source_files >= self.files_max / 2 {
                    break;
                }
                copy(&from, &tree.join(from.strip_prefix("/").unwrap_or(&from)))?;
                files += 1;
                bytes += meta.len();
                source_files += 1;
                source_bytes += meta.len();
            }
        }
        Ok(())
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let dir = to.parent().unwrap_or(to);
    let copied = fs::create_dir_all(dir).and_then(|()| fs::copy(from, to));
    copied.map(drop).trying(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// What reading a tree against its manifest gave.
#[derive(Default, Debug)]
pub struct Comparison {
    /// Bytes read.
    pub bytes: u64,
    /// Files that read as something else, and names that are on one side only.
    pub different: Vec<String>,
    /// Files that could not be read, with the reason.
    pub failed: Vec<String>,
    /// From the first open to the last close.
    pub took: Duration,
}

impl Comparison {
    /// `equal`, `different` or `failed`.
    #[must_use]
    pub fn verdict(&self) -> &'static str {
        match (self.failed.is_empty(), self.different.is_empty()) {
            (false, _) => "failed",
            (true, false) => "different",
            (true, true) => "equal",
        }
    }
}

/// Reads everything below `root` with several threads that share one list, and compares it.
#[must_use]
pub fn compare(root: &Path, manifest: &Manifest, readers: usize) -> Comparison {
    let began = Instant::now();
    let next = AtomicUsize::new(0);
    let mut result = Comparison::default();
    match manifest.compare_names(root) {
        Ok(odd) => result.different = odd,
        Err(e) => result.failed.push(e.to_string()),
    }
    let read_some = || {
        let mut part = Comparison::default();
        while let Some(entry) = manifest.entries.get(next.fetch_add(1, Ordering::Relaxed)) {
            match content_of(&root.join(&entry.path)) {
                Ok(content) if content == entry.content => {
                    if let Content::File { len_bytes, .. } = content {
                        part.bytes += len_bytes;
                    }
                }
                Ok(content) => part.different.push(difference(entry, &content)),
                Err(e) => part.failed.push(e.to_string()),
            }
        }
        part
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..readers).map(|_| scope.spawn(read_some)).collect();
        for thread in threads {
            match thread.join() {
                Ok(part) => {
                    result.bytes += part.bytes;
                    result.different.extend(part.different);
                    result.failed.extend(part.failed);
                }
                Err(_) => result.failed.push("a reader panicked".into()),
            }
        }
    });
    result.took = began.elapsed();
    result
}

/// Says how an entry differs from what was read.
#[must_use]
pub fn difference(entry: &Entry, found: &Content) -> String {
    format!("{}: is {found:?}, should be {:?}", entry.path, entry.content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_equals_its_manifest_until_a_bit_a_name_or_a_link_changes() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let root = dir.path();
        fs::create_dir(root.join("d")).expect("mkdir");
        fs::write(root.join("d/a"), b"one").expect("write");
        fs::write(root.join("b"), b"").expect("write");
        std::os::unix::fs::symlink("d/a", root.join("l")).expect("link");
        let manifest = Manifest::of(root).expect("readable");
        assert_eq!(manifest.len_bytes(), 3);
        assert_eq!(compare(root, &manifest, 2).verdict(), "equal");

        fs::write(root.join("d/a"), b"onf").expect("write");
        let result = compare(root, &manifest, 2);
        assert_eq!((result.verdict(), result.different.len()), ("different", 1));
        fs::remove_file(root.join("b")).expect("remove");
        assert_eq!(compare(root, &manifest, 1).verdict(), "failed");
        fs::write(root.join("c"), b"").expect("write");
        let names = manifest.compare_names(root).expect("listable");
        assert_eq!(names, ["b: missing", "c: should not be there"]);
    }
}
