//! The fanotify front end on this machine's own kernel: real mounts, the real engine, real readers. Needs root, a kernel with
//! pre-content events (Linux 6.14) and EROFS; says so where one is missing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use infill::engine::placement::seats;
use infill::engine::plan::{Completion, Window};
use infill::engine::{Engine, EngineKind, Settings};
use infill::front::fanotify::Group;
use infill::key::Key;
use infill::lab::demo;
use infill::lab::tree::{Manifest, compare};
use infill::mount::{self, Blobs, Source};
use infill::store::dir::DirStore;
use infill::store::{SourceMode, Store};
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why this machine cannot run these tests.
fn unfit() -> Option<String> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = std::fs::File::create(dir.path().join("probe")).unwrap();
    let group = match Group::new() {
        Ok(group) => group,
        Err(errno) => return Some(format!("no fanotify group: {errno}")),
    };
    group.mark(std::os::fd::AsFd::as_fd(&file), infill::front::ObjectId(0), 0).err().map(|errno| format!("no pre-content events: {errno}"))
}

fn settings(kind: EngineKind, shards: usize) -> Settings {
    Settings {
        shards,
        seats: seats(),
        kind,
        window: Window::Adaptive { budget_percent: 100 },
        completion: Completion::default(),
        slot_bytes: 256 << 10,
        slots: 16,
        workers: 4,
        fd_budget: 1000,
        open_timeout: Duration::from_secs(20),
        request_timeout: Duration::from_secs(30),
        no_room: None,
        tracer: None,
        remembered: Arc::default(),
        leave_rest: false,
    }
}

/// A store with an image and its blob, and a cache that is served from it.
struct Host {
    dir: TempDir,
    manifest: Manifest,
    store: Arc<dyn Store>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let store_dir = dir.path().join("store");
        let manifest = demo::prepare(&store_dir, &dir.path().join("scratch")).unwrap();
        let store = Arc::new(DirStore::new("dir:test".into(), &store_dir, SourceMode::Auto).unwrap());
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        Self { dir, manifest, store }
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Serves, mounts, and unmounts behind `use_it`.
    fn mounted(&self, kind: EngineKind, shards: usize, use_it: impl FnOnce(&Path, &Engine)) {
        let blobs = Arc::new(Blobs::new(&self.dir.path().join("cache"), shards).unwrap());
        let engine = Engine::start_all(&blobs.fronts(), &self.store, &settings(kind, shards)).unwrap();
        let attach = |name: &str, whole| {
            let key = Key::new(b"dom", name.as_bytes());
            blobs.attach(&engine.entry(), &*self.store, &key, whole, PATIENCE).unwrap()
        };
        let (image, blob) = (attach(demo::IMAGE, true), attach(demo::BLOB, false));
        assert!(image.file().map().is_full());
        let source = Source { image: image.file().path().to_owned(), devices: vec![blob.file().path().to_owned()], direct: false };
        mount::mount(&source, &self.at()).unwrap();
        drop((image, blob));
        assert_eq!(blobs.release(&engine.entry()), 0, "they are mounted");
        use_it(&self.at(), &engine);
        nix::mount::umount(&self.at()).unwrap();
        assert_eq!(blobs.release(&engine.entry()), 2, "they are not mounted any more");
        let snapshot = engine.stop(PATIENCE, || false).unwrap();
        println!("{}", serde_json::to_string(&snapshot).unwrap());
        assert_eq!((snapshot.needs_failed, snapshot.unanswered), (0, 0));
    }
}

#[test]
fn a_tree_is_read_through_sparse_files_byte_for_byte() {
    if let Some(why) = unfit() {
        return println!("not run: {why}");
    }
    for (kind, shards) in [(EngineKind::Uring, 2), (EngineKind::Blocking, 1)] {
        let host = Host::new();
        host.mounted(kind, shards, |at, _| {
            let read = compare(at, &host.manifest, 8);
            println!("{:?}", read.took);
            assert_eq!(read.verdict(), "equal", "{read:?}");
        });
    }
}
