//! Where everything lies, and infill as a process that serves it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MntFlags, umount, umount2};
use nix::sys::statvfs::statvfs;
use nix::time::ClockId;
use nix::unistd::{Pid, sync};

use super::load::PAGE_BYTES;
use super::{Plan, Subject, failed};
use crate::control::Client;
use crate::control::wire::{Prepared, Ready};
use crate::front::sim::rng::Rng;
use crate::lab::bench::daemon::Daemon;
use crate::lab::bench::memdisk::clock_ns;
use crate::lab::disk::{self, CacheFs, ErofsLayout};
use crate::lab::{Result, Scratch, Trying, run};
use crate::mount::{self, Source};
use crate::ops::mounting::Image;

/// Chunks of all images.
const CHUNK_BYTES: u32 = 64 << 10;
/// Images and their blobs in a store, and the only file in [`ONE`].
pub(super) const ONE: &str = "one";
/// See [`ONE`].
pub(super) const ONE_FILE: &str = "file";
/// Its length.
pub(super) const ONE_BYTES: u64 = 64 << 20;
/// Beside what a tree needs.
const SLACK_BYTES: u64 = 1 << 30;
/// The tree is there as its copy, its blob, the cache of it, and the same on XFS.
const TREE_COPIES: u64 = 5;
const MIB: u64 = 1 << 20;

/// A directory for everything, and in it a store with [`ONE`], an image of one file of random bytes.
pub(super) struct Ground {
    scratch: Scratch,
}

impl Ground {
    /// Makes it.
    pub(super) fn make(plan: &Plan) -> Result<Self> {
        let ground = Self { scratch: Scratch::make("native")? };
        let at = ground.scratch.path();
        let room = statvfs(at).trying(|| format!("cannot look at {}", at.display()))?;
        let free_bytes = room.blocks_available() * room.fragment_size();
        let tree_bytes = if plan.only.contains(&Subject::Tree) { plan.tree_bytes } else { 0 };
        let needed_bytes = TREE_COPIES * tree_bytes + SLACK_BYTES;
        eprintln!("infill: up to {} MiB of {} MiB free are used in {}", needed_bytes / MIB, free_bytes / MIB, at.display());
        if free_bytes < needed_bytes {
            return Err(failed("that is too little room: measure a smaller tree, or say by INFILL_CACHE where there is more"));
        }
        let tree = ground.path("tree-of-one");
        fs::create_dir_all(&tree).trying(|| format!("cannot make {}", tree.display()))?;
        write_random(&tree.join(ONE_FILE), ONE_BYTES)?;
        image_of(&tree, &ground.store(), ONE)?;
        Ok(ground)
    }

    /// The directory.
    pub(super) fn at(&self) -> &Path {
        self.scratch.path()
    }

    /// A place in it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A directory in it.
    pub(super) fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::create_dir_all(&path).trying(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// The store.
    pub(super) fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// The blob of [`ONE`].
    pub(super) fn blob(&self) -> PathBuf {
        blob_in(&self.store(), ONE)
    }

    /// A copy of that, in the page cache.
    pub(super) fn copy_of_blob(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::copy(self.blob(), &path).trying(|| format!("cannot write {}", path.display()))?;
        reload(&path)?;
        Ok(path)
    }
}

/// An image of a store, and its blob.
pub(super) fn image_in(store: &Path, name: &str) -> PathBuf {
    store.join(format!("{name}.img"))
}

/// See [`image_in`].
pub(super) fn blob_in(store: &Path, name: &str) -> PathBuf {
    store.join(format!("{name}.blob"))
}

/// Makes an image of `tree` in a store.
pub(super) fn image_of(tree: &Path, store: &Path, name: &str) -> Result<()> {
    fs::create_dir_all(store).trying(|| format!("cannot make {}", store.display()))?;
    let layout = ErofsLayout { chunk_bytes: Some(CHUNK_BYTES), blob: Some(&blob_in(store, name)), ..ErofsLayout::default() };
    disk::erofs(&image_in(store, name), tree, layout)
}

/// Writes a file whose bytes are all different.
pub(super) fn write_random(path: &Path, len_bytes: u64) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let mut rng = Rng::new(len_bytes);
    let mut file = io::BufWriter::new(File::create(path).trying(what)?);
    (0..len_bytes / 8).try_for_each(|_| file.write_all(&rng.next().to_le_bytes())).trying(what)?;
    file.flush().trying(what)
}

/// Brings a file into the page cache.
pub(super) fn warm(path: &Path) -> Result<()> {
    warm_to(path, u64::MAX)
}

/// The same up to there.
fn warm_to(path: &Path, end: u64) -> Result<()> {
    let read = File::open(path).and_then(|file| io::copy(&mut file.take(end), &mut io::sink()));
    read.map(drop).trying(|| format!("cannot read {}", path.display()))
}

/// Has the page cache hold a file as reading it from beginning to end makes it, however it was written: what is measured of two
/// files can be compared then.
pub(super) fn reload(path: &Path) -> Result<()> {
    drop_cached(path)?;
    warm(path)
}

/// Has the page cache hold nothing of a file.
pub(super) fn drop_cached(path: &Path) -> Result<()> {
    let what = || format!("cannot drop what is cached of {}", path.display());
    let file = File::open(path).trying(what)?;
    file.sync_all().trying(what)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).trying(what)
}

/// Lets the machine finish what is left of the last cell: writes, and files that are gone.
pub(super) fn settle() {
    sync();
}

/// A mounted EROFS image; unmounted when dropped.
pub(super) struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// Mounts it from files.
    pub(super) fn make(image: &Path, blob: &Path, at: &Path) -> Result<Self> {
        fs::create_dir_all(at).trying(|| format!("cannot make {}", at.display()))?;
        let source = Source { image: image.to_owned(), devices: vec![blob.to_owned()], direct: false };
        mount::mount(&source, at).map_err(|error| failed(format!("cannot mount {} on {}: {error}", image.display(), at.display())))?;
        Ok(Self { at: at.to_owned() })
    }

    /// Where it is.
    pub(super) fn at(&self) -> &Path {
        &self.at
    }

    /// Unmounts it.
    pub(super) fn end(self) -> Result<()> {
        umount(&self.at).trying(|| format!("cannot unmount {}", self.at.display()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // It is not mounted any more if it was ended.
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

/// A file system in a file; unmounted when dropped.
pub(super) struct LoopDisk {
    at: PathBuf,
}

impl LoopDisk {
    /// Makes one that is mounted on the directory `name`. `None`: it cannot be made here, as is said.
    pub(super) fn make(ground: &Ground, fs: CacheFs, name: &str, size_bytes: u64) -> Result<Option<Self>> {
        let (disk, at) = (ground.path(name).with_extension("disk"), ground.dir(name)?);
        let made = fs.make(&disk, size_bytes).and_then(|()| run(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(&at)));
        match made {
            Ok(_) => Ok(Some(Self { at })),
            Err(error) => {
                eprintln!("infill: not measured on {} of its own: {error}", fs.name());
                Ok(None)
            }
        }
    }

    /// Where it is.
    pub(super) fn at(&self) -> &Path {
        &self.at
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

/// `infill serve`, and a connection to it that keeps ready what it was asked for. Ended for good when dropped.
pub(super) struct Infill {
    daemon: Daemon,
    /// Files that it made ready: while somebody has them open, it serves them.
    held: Vec<File>,
    /// The program.
    infill: PathBuf,
    state: PathBuf,
}

impl Infill {
    /// Starts it with an empty cache in `dir`; what it prints goes to files beside that.
    pub(super) fn start(plan: &Plan, stores: &[&Path], dir: &Path, flags: &[&str]) -> Result<Self> {
        let (cache, state) = (dir.join("cache"), dir.join("state"));
        fs::create_dir_all(&cache).trying(|| format!("cannot make {}", cache.display()))?;
        let mut command = Command::new(&plan.infill);
        command.args(["serve", "--front-end=fanotify", "--json", "--log-level=warn"]).args(flags).args(&plan.serve_flags);
        for store in stores {
            command.arg("--store").arg(format!("dir:{}", store.display()));
        }
        command.arg("--cache-dir").arg(&cache).arg("--state-dir").arg(&state);
        let mut infill = Self { daemon: Daemon::start(command, dir)?, held: Vec::new(), infill: plan.infill.clone(), state };
        infill.daemon.await_ready()?;
        Ok(infill)
    }

    /// Has an image made ready, with its blob on demand. Gives their files.
    pub(super) fn attach(&mut self, name: &str) -> Result<(PathBuf, PathBuf)> {
        let [image, blob] = ["img", "blob"].map(|kind| format!("{name}.{kind}"));
        let wanted = Image { name: image, domain: Some("bench".into()), devices: vec![blob] };
        let not_ready = |error| failed(format!("infill serve did not make {name} ready: {error}"));
        let daemon = Client::connect(&self.state.join("control.sock")).map_err(not_ready)?;
        let Ready { prepared: Prepared { image, devices, .. }, lease, .. } = daemon.attach(&wanted).map_err(not_ready)?;
        let blob = devices.into_iter().next().unwrap_or_default();
        for file in [&image, &blob] {
            self.held.push(File::open(file).trying(|| format!("cannot open {}", file.display()))?);
        }
        if !daemon.end_lease(&lease).map_err(not_ready)? {
            return Err(failed(format!("infill serve let go of {name} at once")));
        }
        Ok((image, blob))
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// CPU time of it so far, its ring's workers included.
    pub(super) fn cpu_ns(&self) -> Result<u64> {
        cpu_ns(&self.daemon)
    }

    /// Ends it. Nobody may read what it serves any more. Gives its statistics.
    pub(super) fn end(mut self) -> Result<serde_json::Value> {
        // What nobody uses is let go, so that nobody has to keep it.
        self.held.clear();
        self.daemon.end(true)?;
        let line = self.daemon.last_line();
        serde_json::from_str(&line).map_err(|error| failed(format!("infill serve did not say what it did ({error}): {line}")))
    }
}

impl Drop for Infill {
    fn drop(&mut self) {
        // Nothing is left to do if it has ended well. Else somebody keeps what is still mounted, for ever.
        let _ = self.daemon.end(false);
        let _ = run(Command::new(&self.infill).args(["release", "--force", "--state-dir"]).arg(&self.state));
    }
}

/// CPU time of a process so far.
pub(super) fn cpu_ns(daemon: &Daemon) -> Result<u64> {
    let pid = Pid::from_raw(daemon.pid().cast_signed());
    clock_ns(ClockId::pid_cpu_clock_id(pid).trying(|| "cannot see a daemon's CPU time")?)
}

/// Reads the first `pages` of a file that is watched, so that its daemon brings them and they are in the page cache, and sees that they
/// are those of `source`.
pub(super) fn prime(file: &Path, source: &Path, pages: u64) -> Result<()> {
    let len = usize::try_from(pages * PAGE_BYTES).map_err(|_| failed("too many pages"))?;
    let content = |path: &Path| {
        let mut bytes = vec![0; len];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut bytes));
        read.map(|()| bytes).trying(|| format!("cannot read {}", path.display()))
    };
    if content(file)? != content(source)? {
        return Err(failed(format!("{} has other bytes than {}", file.display(), source.display())));
    }
    // As `reload` does it.
    drop_cached(file)?;
    warm_to(file, pages * PAGE_BYTES)
}
