//! Tests of the stores together, on real directories.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, statfs};
use nix::sys::uio::pread;
use nix::unistd::mkfifo;
use proptest::prelude::*;
use tempfile::TempDir;

use super::dir::DirStore;
use super::error::Unusable;
use super::holes::HOLE_MIN_BYTES;
use super::name::NameError;
use super::source::DIRECT_ALIGN_BYTES;
use super::*;

const MODES: [SourceMode; 4] = [SourceMode::Auto, SourceMode::Direct, SourceMode::Buffered, SourceMode::Mmap];

/// Bytes that differ from page to page.
fn pattern(len_bytes: usize) -> Vec<u8> {
    (0..len_bytes).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

/// Reads a blob the way the engine does: extent by extent, with aligned pieces where it must.
fn read_all(blob: &dyn Blob) -> Vec<u8> {
    const PIECE_BYTES: usize = 16 * DIRECT_ALIGN_BYTES;
    let mut memory = vec![0_u8; PIECE_BYTES + DIRECT_ALIGN_BYTES];
    let start = memory.as_ptr().align_offset(DIRECT_ALIGN_BYTES);
    let piece = &mut memory[start..start + PIECE_BYTES];
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < blob.len_bytes() {
        let extent = blob.extent(bytes.len() as u64);
        assert!(extent.len_bytes > 0 && bytes.len() as u64 + extent.len_bytes <= blob.len_bytes());
        let want = usize::try_from(extent.len_bytes).unwrap().min(PIECE_BYTES);
        match extent.data {
            Data::Zero => bytes.resize(bytes.len() + want, 0),
            Data::Read { file, offset } => {
                let file = &blob.files()[file];
                let got = pread(&file.fd, piece, offset.cast_signed()).unwrap();
                bytes.extend_from_slice(&piece[..got.min(want)]);
            }
            Data::Mapped { file, offset } => {
                let map = blob.files()[file].map.as_ref().unwrap();
                let offset = usize::try_from(offset).unwrap();
                assert!(offset + want <= map.len());
                let from = map.as_ptr().wrapping_add(offset);
                // SAFETY: the range was just checked against the map, and no test shrinks a mapped file.
                unsafe { std::ptr::copy_nonoverlapping(from, piece.as_mut_ptr(), want) };
                bytes.extend_from_slice(&piece[..want]);
            }
        }
    }
    bytes
}

fn key(domain: &str, name: &str) -> Key {
    Key::new(domain.as_bytes(), name.as_bytes())
}

fn dir_store(path: &Path, mode: SourceMode) -> DirStore {
    DirStore::new(format!("dir:{}", path.display()), path, mode).unwrap()
}

fn found(store: &dyn Store, key: &Key) -> Vec<u8> {
    read_all(&*store.open(key).unwrap().expect("the blob is there"))
}

fn cause(store: &dyn Store, key: &Key) -> Cause {
    store.open(key).expect_err("an error").source
}

/// `store/` with good and hostile entries, and `outside/` next to it, which nothing may reach.
fn link_farm() -> (TempDir, PathBuf) {
    let temp = TempDir::new().unwrap();
    let (store, outside) = (temp.path().join("store"), temp.path().join("outside"));
    fs::create_dir_all(store.join("dom/deep")).unwrap();
    fs::create_dir_all(&outside).unwrap();
    for (path, bytes) in [
        (outside.join("secret"), "secret"),
        (store.join("plain"), "inside"),
        (store.join("dom/plain"), "inside the domain"),
        (store.join("dom/deep/far"), "inside and far down"),
    ] {
        fs::write(path, bytes).unwrap();
    }
    mkfifo(&store.join("fifo"), Mode::S_IRUSR).unwrap();
    for (name, target) in [
        ("good", "dom/deep/far"),
        ("good-up", "dom/../plain"),
        ("good-dir", "dom"),
        ("abs", outside.join("secret").to_str().unwrap()),
        ("abs-inside", store.join("plain").to_str().unwrap()),
        ("up", "../outside/secret"),
        ("deep-up", "dom/deep/../../../outside/secret"),
        ("chain", "up"),
        ("out-dir", "../outside"),
        ("up-dir", ".."),
        ("here", "."),
        ("root", "/"),
        ("magic", "/proc/self/root/etc/passwd"),
        ("loop", "loop"),
        ("dangling", "nowhere"),
        ("device", "/dev/null"),
    ] {
        symlink(target, store.join(name)).unwrap();
    }
    (temp, store)
}

/// All regular files below a directory, links not followed.
fn files_below(dir: &Path, files: &mut HashSet<(u64, u64)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        if meta.is_dir() {
            files_below(&entry.path(), files);
        } else if meta.is_file() {
            files.insert((meta.dev(), meta.ino()));
        }
    }
}

fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
    let part = prop::sample::select(vec![
        "", ".", "..", "/", "\0", "plain", "dom", "deep", "good", "good-up", "good-dir", "abs", "up", "deep-up", "chain", "out-dir",
        "up-dir", "here", "root", "magic", "secret", "outside", "etc", "passwd", "fifo", "loop", "dangling", "device",
    ]);
    prop_oneof![
        3 => part.clone().prop_map(|part| part.as_bytes().to_vec()),
        2 => prop::collection::vec(part, 1..6).prop_map(|parts| parts.join("/").into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ]
}

#[test]
fn no_key_opens_a_file_outside() {
    let (_temp, path) = link_farm();
    let mut inside = HashSet::new();
    files_below(&path, &mut inside);
    let stores = [dir_store(&path, SourceMode::Buffered), dir_store(&path, SourceMode::Buffered).without_links()];
    let keys = (hostile_bytes(), hostile_bytes());
    proptest!(ProptestConfig::with_cases(2000), |((domain, name) in keys)| {
        for store in &stores {
            if let Ok(Some(blob)) = store.open(&Key::new(&domain, &name)) {
                let stat = fstat(&blob.files()[0].fd).unwrap();
                prop_assert!(inside.contains(&(stat.st_dev, stat.st_ino)));
            }
        }
    });
}

#[test]
fn links_are_followed_inside_and_refused_outside() {
    let (_temp, path) = link_farm();
    let store = dir_store(&path, SourceMode::Direct);
    assert_eq!(found(&store, &key("", "good")), b"inside and far down");
    assert_eq!(found(&store, &key("", "good-up")), b"inside");
    assert_eq!(found(&store, &key("good-dir", "plain")), b"inside the domain");
    for name in ["abs", "abs-inside", "up", "deep-up", "chain", "out-dir", "root", "magic", "device"] {
        assert_eq!(cause(&store, &key("", name)), Cause::Leaves, "{name}");
    }
    assert_eq!(cause(&store, &key("out-dir", "secret")), Cause::Leaves);
    assert_eq!(cause(&store, &key("up-dir", "outside")), Cause::Leaves);
    assert_eq!(cause(&store, &key("", "loop")), Cause::Link);
    assert!(store.open(&key("", "dangling")).unwrap().is_none());

    let strict = dir_store(&path, SourceMode::Direct).without_links();
    assert_eq!(found(&strict, &key("dom", "plain")), b"inside the domain");
    for (domain, name) in [("", "good"), ("", "up"), ("good-dir", "plain"), ("out-dir", "secret")] {
        assert_eq!(cause(&strict, &key(domain, name)), Cause::Link, "{domain}/{name}");
    }
}

#[test]
fn what_is_no_file_is_refused_for_good() {
    let (_temp, path) = link_farm();
    let store = dir_store(&path, SourceMode::Direct);
    assert_eq!(cause(&store, &key("", "fifo")), Cause::NotAFile("a FIFO"));
    assert_eq!(cause(&store, &key("", "dom")), Cause::NotAFile("a directory"));
    let error = store.open(&key("dom", "../plain")).unwrap_err();
    assert_eq!(error.source, Cause::Name(NameError::Slash));
    assert!(!error.is_transient());
    assert_eq!(
        error.to_string(),
        format!(
            "store dir:{}: cannot open the blob dom/../plain: a name with '/' in it could leave the \
             store; mount with another fsid, domain_id or device name",
            path.display()
        )
    );
}

#[test]
fn a_domains_own_blob_comes_before_the_shared_one() {
    let (_temp, path) = link_farm();
    let store = dir_store(&path, SourceMode::Buffered);
    assert_eq!(found(&store, &key("dom", "plain")), b"inside the domain");
    assert_eq!(found(&store, &key("other", "plain")), b"inside");
    // An image mounted without a domain has its own name for one, and that name is a file.
    assert_eq!(found(&store, &key("plain", "plain")), b"inside");
    assert!(store.open(&key("dom", "absent")).unwrap().is_none());
}

/// Every mode, also after its fallback, gives the bytes of the file.
fn modes_agree(dir: &Path) {
    let kind = statfs(dir).unwrap().filesystem_type();
    let has_all_modes = matches!(kind, EXT4_SUPER_MAGIC | XFS_SUPER_MAGIC);
    for len_bytes in [0, 1, 4095, 4096, 4097, 65_536, 1_000_003] {
        let bytes = pattern(len_bytes);
        fs::write(dir.join("blob"), &bytes).unwrap();
        for mode in MODES {
            let store = dir_store(dir, mode);
            let blob = store.open(&key("d", "blob")).unwrap().unwrap();
            assert_eq!(blob.len_bytes(), len_bytes as u64);
            let got = blob.files()[0].mode;
            let wanted = if mode == SourceMode::Auto { SourceMode::Direct } else { mode };
            let fell_back = got == SourceMode::Buffered && !has_all_modes;
            assert!(got == wanted || fell_back, "{mode:?} became {got:?}");
            if mode != SourceMode::Auto {
                assert_eq!(blob.files()[0].map.is_some(), got == SourceMode::Mmap && len_bytes > 0);
            }
            assert!(read_all(&*blob) == bytes, "{mode:?}, {len_bytes} bytes");
        }
    }
}

#[test]
fn all_modes_give_the_same_bytes() {
    modes_agree(TempDir::new().unwrap().path());
}

#[test]
fn all_modes_give_the_same_bytes_on_tmpfs() {
    // Before Linux 6.6 tmpfs refuses O_DIRECT.
    if let Ok(dir) = TempDir::new_in("/dev/shm") {
        modes_agree(dir.path());
    }
}

/// A file of `len_bytes` in `dir` that has four bytes of data at an offset, and is a hole otherwise.
fn sparse_file(dir: &Path, len_bytes: u64, data_at: u64) -> (fs::File, Vec<u8>) {
    let file = fs::File::create(dir.join("blob")).unwrap();
    file.set_len(len_bytes).unwrap();
    file.write_all_at(b"data", data_at).unwrap();
    let mut bytes = vec![0; usize::try_from(len_bytes).unwrap()];
    let at = usize::try_from(data_at).unwrap();
    bytes[at..at + 4].copy_from_slice(b"data");
    (file, bytes)
}

#[test]
fn a_sparse_file_reads_as_zeros_and_its_large_holes_are_known() {
    let dir = TempDir::new().unwrap();
    let (_file, bytes) = sparse_file(dir.path(), 2_000_100, 1_000_000);
    for mode in MODES {
        let blob = dir_store(dir.path(), mode).open(&key("", "blob")).unwrap().unwrap();
        assert!(read_all(&*blob) == bytes, "{mode:?}");
        let Extent { len_bytes, data } = blob.extent(0);
        if data != Data::Zero {
            return println!("not run: this file system does not report holes");
        }
        assert!((HOLE_MIN_BYTES..1_000_000).contains(&len_bytes) && len_bytes.is_multiple_of(4096), "{len_bytes}");
        assert_eq!(blob.extent(2_000_099), Extent { len_bytes: 1, data: Data::Zero });
        assert!(blob.whole_file().is_some(), "holes are the file's own");
    }
}

#[test]
fn a_hole_that_is_filled_later_is_read() {
    let dir = TempDir::new().unwrap();
    let (file, mut bytes) = sparse_file(dir.path(), 2_000_100, 1_000_000);
    let store = dir_store(dir.path(), SourceMode::Auto);
    let blob = store.open(&key("", "blob")).unwrap().unwrap();
    // File systems note the time of a change by a clock that ticks a few hundred times a second.
    std::thread::sleep(std::time::Duration::from_millis(50));
    file.write_all_at(b"more", 0).unwrap();
    bytes[..4].copy_from_slice(b"more");
    assert!(read_all(&*blob) == bytes);
}

/// Drops what is cached of a file, if it can be dropped.
fn forget(file: &fs::File) {
    file.sync_all().unwrap();
    nix::fcntl::posix_fadvise(file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

#[test]
fn what_is_in_memory_is_seen() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("blob");
    fs::write(&path, pattern(300_000)).unwrap();
    let source = |mode| SourceFile::new(fs::File::open(&path).unwrap().into(), mode).unwrap();
    assert!(!source(SourceMode::Direct).is_in_memory(0, 4096), "only where it was wanted");
    let auto = source(SourceMode::Auto);
    if auto.map.is_none() {
        return println!("not run: this kernel does not tell what is in memory");
    }
    let file = fs::File::open(&path).unwrap();
    forget(&file);
    if auto.is_in_memory(0, 4096) {
        return println!("not run: this file system keeps its files in memory");
    }
    assert_eq!(fs::read(&path).unwrap().len(), 300_000);
    assert!(auto.is_in_memory(0, 300_000) && auto.is_in_memory(4096, 8192), "it was just read");
    forget(&file);
    assert!(!auto.is_in_memory(0, 300_000), "a mapping that nobody has touched keeps nothing");
}

#[test]
fn what_a_file_system_refuses_becomes_buffered() {
    // sysfs knows neither direct reads nor, for this file, mappings.
    if fs::read("/sys/kernel/notes").is_ok_and(|bytes| !bytes.is_empty()) {
        for mode in MODES {
            let store = dir_store(Path::new("/sys/kernel"), mode);
            let blob = store.open(&key("", "notes")).unwrap().unwrap();
            assert_eq!(blob.files()[0].mode, SourceMode::Buffered, "{mode:?}");
            assert_eq!(read_all(&*blob), fs::read("/sys/kernel/notes").unwrap());
        }
    }
}

#[test]
fn an_exchanged_directory_takes_over_at_the_next_miss() {
    let temp = TempDir::new().unwrap();
    let (path, old) = (temp.path().join("store"), temp.path().join("old"));
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a"), "a").unwrap();
    let store = dir_store(&path, SourceMode::Buffered);
    fs::rename(&path, &old).unwrap();
    assert_eq!(found(&store, &key("", "a")), b"a", "the held directory still serves");
    let error = store.open(&key("", "b")).unwrap_err();
    assert!(matches!(error.source, Cause::Gone(_)), "{error}");
    assert!(error.is_transient(), "a gap during an exchange must not fail an open for good");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("b"), "b").unwrap();
    assert_eq!(found(&store, &key("", "b")), b"b");
    assert!(store.open(&key("", "a")).unwrap().is_none());
}

#[test]
fn oci_layouts_and_containerds_root_are_found() {
    let temp = TempDir::new().unwrap();
    let content = temp.path().join("io.containerd.content.v1.content");
    let hex = "ab".repeat(32);
    fs::create_dir_all(content.join("blobs/sha256")).unwrap();
    fs::write(content.join("blobs/sha256").join(&hex), "layer").unwrap();
    for path in [temp.path(), &content] {
        let spec = StoreSpec::Oci(path.to_owned());
        let store = open_store(&spec, SourceMode::Direct).unwrap();
        assert_eq!(store.name(), spec.to_string());
        assert_eq!(found(&*store, &key("any", &hex)), b"layer");
        assert_eq!(found(&*store, &key("", &format!("sha256:{hex}"))), b"layer");
        for name in ["../../index.json", "index.json", "sha256:..", &"cd".repeat(32)] {
            assert!(store.open(&key("", name)).unwrap().is_none(), "{name}");
        }
    }
}

#[test]
fn directories_that_cannot_be_stores_are_refused_at_start() {
    let temp = TempDir::new().unwrap();
    let file = temp.path().join("file");
    fs::write(&file, "").unwrap();
    let error = |spec: String| open_store(&spec.parse().unwrap(), SourceMode::Direct).unwrap_err();
    for kind in ["dir", "oci"] {
        let missing = error(format!("{kind}:{}/missing", temp.path().display()));
        assert!(matches!(missing.source, Unusable::Missing(_)), "{missing}");
        let file = error(format!("{kind}:{}", file.display()));
        assert!(matches!(file.source, Unusable::NotADirectory(_)), "{file}");
    }
    let empty = error(format!("oci:{}", temp.path().display()));
    assert!(matches!(empty.source, Unusable::NoBlobs(_)), "{empty}");
    // A layout whose blobs are elsewhere would never find one.
    symlink("/", temp.path().join("blobs")).unwrap();
    let link = error(format!("oci:{}", temp.path().display()));
    assert!(matches!(link.source, Unusable::NoBlobs(_)), "{link}");
}

#[derive(Debug)]
struct Failing(Cause);

impl Store for Failing {
    fn name(&self) -> &'static str {
        "failing"
    }

    fn open(&self, key: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        Err(StoreError { store: "failing".into(), key: key.to_string(), source: self.0.clone() })
    }
}

#[test]
fn stores_are_asked_in_order_and_errors_wait_for_the_last() {
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(one.path().join("both"), "one").unwrap();
    fs::write(two.path().join("both"), "two").unwrap();
    fs::write(two.path().join("second"), "two").unwrap();
    let stores = Stores::new(vec![
        Arc::new(Failing(Cause::OnErofs)),
        Arc::new(dir_store(one.path(), SourceMode::Direct)),
        Arc::new(Failing(Cause::Os(Errno::EMFILE))),
        Arc::new(dir_store(two.path(), SourceMode::Direct)),
        Arc::new(Failing(Cause::Leaves)),
    ]);
    assert_eq!(found(&stores, &key("", "both")), b"one");
    assert_eq!(found(&stores, &key("", "second")), b"two");
    // The one that may pass counts, because that store may have the blob.
    let error = stores.open(&key("", "neither")).unwrap_err();
    assert_eq!(error.errno(), Errno::EMFILE);
    assert!(error.is_transient());
    assert!(Stores::new(Vec::new()).open(&key("", "x")).unwrap().is_none());
}
