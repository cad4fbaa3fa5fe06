//! What is done with any bytes: one function for each kind of input that comes from elsewhere. Run by cargo-fuzz
//! (`fuzz_targets/`) and, without anything but stable Rust, by `tests/fuzz.rs`.
//!
//! A function panics if a promise is broken. It gives a number that tells how the input was taken: inputs that are taken in a
//! new way are worth being changed further.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use hyper::Method;
use infill::config::{DROP_INS, Given, Origin, keys};
use infill::control::routes::{Asked, Daemon, Images, Kind, Metrics, Refusal, Site, Step, take};
use infill::control::wire::{ImageList, Prefetch, Prepared, Ready, Stage, Wanted};
use infill::front::cachefiles::layout::{MARK, Place, fanout_name, volume_key};
use infill::front::cachefiles::tree::{CACHE, Dir, census};
use infill::front::cachefiles::wire::{self, Body, Header};
use infill::front::cachefiles::{CullLimits, cookies, fsck};
use infill::front::fanotify::map::{PAGE_BYTES, PresenceMap, SinkId};
use infill::front::fanotify::wire::{Events, PRE_ACCESS, response};
use infill::front::fanotify::{empty_journal, unanswered};
use infill::image::superblock::{Superblock, WHOLE_BYTES_MAX};
use infill::key::Key;
use infill::mount::contents;
use infill::ops::bag::Bag;
use infill::ops::doctor::release::{self, Running};
use infill::ops::mounting::Image;
use infill::ops::{passing, xattr};
use infill::store::dir::DirStore;
use infill::store::oci::OciStore;
use infill::store::{Blob, SourceMode, Store, StoreError, StoreSpec, remembered};

/// A target's name, which is that of its directory of seeds, and what it does.
pub(crate) type Target = (&'static str, fn(&[u8]) -> u64);

/// All of them.
pub(crate) const TARGETS: [Target; 12] = [
    ("wire", wire),
    ("key", key),
    ("superblock", superblock),
    ("settings", settings),
    ("notes", notes),
    ("cache", cache),
    ("kernel", kernel),
    ("events", events),
    ("journal", journal),
    ("map", map),
    ("bag", bag),
    ("control", control),
];

fn taken(how: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    how.hash(&mut hasher);
    hasher.finish()
}

/// The parts of an input, cut at a byte that is rare in it.
fn parts<const N: usize>(bytes: &[u8]) -> [&[u8]; N] {
    let mut parts = bytes.splitn(N, |byte| *byte == 0xfe);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// Where a target works, in this process.
pub(crate) fn place_of(target: &str) -> PathBuf {
    std::env::temp_dir().join(format!("infill-fuzz-{}-{target}", std::process::id()))
}

fn scratch(target: &str) -> PathBuf {
    let dir = place_of(target);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// Messages of `/dev/cachefiles`.
///
/// 1. No bytes cause a panic, an overflow or a read out of bounds, at any alignment.
/// 2. The descriptor of an OPEN that is understood is the one that is found before the message is read.
/// 3. A descriptor number is never negative.
/// 4. Keys keep to the kernel's limits, and a range is never empty or reversed.
/// 5. What is understood and encoded again is understood as the same.
/// 6. A message that is refused still tells which request to refuse, if it has a header at all.
pub(crate) fn wire(bytes: &[u8]) -> u64 {
    // A buffer of our own at each alignment: the fuzzer's is always aligned alike.
    let shift = bytes.first().map_or(0, |byte| usize::from(byte % 8));
    let mut shifted = vec![0; shift];
    shifted.extend_from_slice(bytes);
    let bytes = &shifted[shift..];

    let fd = wire::open_fd(bytes);
    assert!(fd.is_none_or(|fd| fd >= 0));
    assert_eq!(Header::parse(bytes).is_some(), bytes.len() >= 16);

    let message = match wire::parse(bytes) {
        Ok(message) => message,
        Err(error) => return taken(std::mem::discriminant(&error)),
    };
    match &message.body {
        Body::Open { fd: carried, key } => {
            assert_eq!(fd, Some(*carried));
            assert!(key.domain().len() < wire::VOLUME_KEY_MAX_BYTES);
            assert!((1..=wire::COOKIE_KEY_MAX_BYTES).contains(&key.name().len()));
        }
        Body::Read(range) => assert!(range.start < range.end),
        Body::Close => {}
    }
    let how = taken(std::mem::discriminant(&message.body));
    // A missing NUL at the end of a full-length volume key is the one thing that encoding adds.
    let encoded = wire::encode(&message);
    if encoded.len() <= bytes.len() {
        assert_eq!(wire::parse(&encoded), Ok(message));
    }
    how
}

/// Stores with one blob each, and a file beside them that no key may lead to.
struct Shelf {
    dir: DirStore,
    oci: OciStore,
}

const DIGEST: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

fn shelf() -> &'static Shelf {
    static SHELF: OnceLock<Shelf> = OnceLock::new();
    SHELF.get_or_init(|| {
        let root = scratch("key");
        let (dir, oci) = (root.join("dir"), root.join("oci"));
        fs::create_dir_all(dir.join("dom")).unwrap();
        fs::create_dir_all(oci.join("blobs/sha256")).unwrap();
        for (file, len) in [("secret", 9), ("dir/blob", 1), ("dir/dom/blob", 2), (&*format!("oci/blobs/sha256/{DIGEST}"), 3)] {
            fs::write(root.join(file), vec![1; len]).unwrap();
        }
        // A link that leads out is no way out either.
        let _ = std::os::unix::fs::symlink("../secret", dir.join("link"));
        Shelf {
            dir: DirStore::new("dir".into(), &dir, SourceMode::Buffered).unwrap(),
            oci: OciStore::new("oci".into(), &oci, SourceMode::Buffered).unwrap(),
        }
    })
}

/// Keys: the domain of an image and the name of a blob.
///
/// 1. A store finds what has the key's own name and nothing else, whatever bytes are in it.
/// 2. A key in a message has nothing that a terminal would obey.
/// 3. The file of an object is one component of a path, below one directory of one volume.
pub(crate) fn key(bytes: &[u8]) -> u64 {
    let [domain, name] = parts(bytes);
    let key = Key::new(domain, name);
    assert!(key.to_string().bytes().all(|byte| (0x20..0x7f).contains(&byte)));
    let len = |found: Result<Option<Arc<dyn Blob>>, StoreError>| found.ok().flatten().map(|blob| blob.len_bytes());
    let in_dir = len(shelf().dir.open(&key));
    assert_eq!(in_dir, (name == b"blob" && is_name(domain) && domain != b"link").then_some(if domain == b"dom" { 2 } else { 1 }));
    let hex = name.strip_prefix(b"sha256:").unwrap_or(name);
    assert_eq!(len(shelf().oci.open(&key)), (hex == DIGEST.as_bytes()).then_some(3));
    let place = Place::of(&key);
    if let Ok(Place { volume, object, .. }) = &place {
        for part in [volume, object] {
            let part = part.as_bytes();
            assert!((1..=255).contains(&part.len()) && !part.iter().any(|byte| matches!(byte, b'/' | 0)) && part != b"..");
        }
    }
    let text = str::from_utf8(bytes).ok().map(str::parse::<Key>);
    taken((in_dir, place.err().map(|why| std::mem::discriminant(&why)), text.map(|key| key.is_ok())))
}

/// Whether a domain may be a directory; a missing one is fine, too.
fn is_name(domain: &[u8]) -> bool {
    domain.len() <= 252 && !matches!(domain, b"." | b"..") && !domain.iter().any(|byte| matches!(byte, b'/' | 0))
}

/// The superblock of an image: what is brought beforehand because of it is bounded.
pub(crate) fn superblock(bytes: &[u8]) -> u64 {
    let Some(found) = Superblock::parse(bytes) else { return 0 };
    let range = found.metadata();
    assert!(range.as_ref().is_none_or(|range| range.start < range.end && range.end - range.start <= WHOLE_BYTES_MAX));
    taken((found.block_bytes, found.extra_devices > 0, range.is_some()))
}

/// A settings file with two beside it, and the values in them.
///
/// 1. They are taken, or refused with one line.
/// 2. A setting is from the last file that has it, and from none only if it is the default.
pub(crate) fn settings(bytes: &[u8]) -> u64 {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    let file = FILE.get_or_init(|| scratch("settings").join("config.toml"));
    let drop_ins = file.with_file_name(DROP_INS);
    let _ = fs::create_dir(&drop_ins);
    let [main, first, second] = parts(bytes);
    for (path, text) in [(file, main), (&drop_ins.join("1.toml"), first), (&drop_ins.join("2.toml"), second)] {
        // Another file each time: to cut one off and fill it again makes ext4 write it to the disk at once.
        let _ = fs::remove_file(path);
        if path == file || !text.is_empty() {
            fs::write(path, text).unwrap();
        }
    }
    match Given::default().settings(Some(file.as_path())) {
        Ok(settings) => {
            let config = &settings.config;
            assert!(config.slots > 0 && config.slot_bytes.is_power_of_two() && config.shards > 0);
            let slots = keys::find("slots").unwrap();
            let is_set = |text: &[u8]| String::from_utf8_lossy(text).lines().any(|line| line.starts_with("slots = "));
            match settings.origin(slots) {
                Origin::Default => assert_eq!(settings.text(slots), "16"),
                Origin::File { path, .. } => assert!(!is_set(second) || path.ends_with("2.toml") || is_multi_line(second)),
                other => panic!("{other}"),
            }
            let from = keys::all().filter(|key| settings.origin(*key) != Origin::Default).count();
            taken((config.stores.len(), config.user.is_some(), config.fd_budget.is_some(), config.seed.len(), from))
        }
        Err(error) => {
            let text = error.to_string();
            assert_eq!(text.lines().count(), 1, "{text}");
            // The kind of error, not the values in it.
            taken(text.chars().rev().filter(char::is_ascii_lowercase).take(40).collect::<String>())
        }
    }
}

/// Whether what looks like a line of its own may be within a text.
fn is_multi_line(text: &[u8]) -> bool {
    text.windows(3).any(|three| matches!(three, b"\"\"\"" | b"'''"))
}

/// Notes that infill finds in its directories, and texts of an operator: limits, blobs that were seen, stores.
pub(crate) fn notes(bytes: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(bytes);
    let limits = CullLimits::from_note(&text);
    if let Some(limits) = &limits {
        let again = CullLimits::from_note(&limits.note()).unwrap();
        assert_eq!((again.blocks(), again.files()), (limits.blocks(), limits.files()));
    }
    let seen = remembered::decode(bytes);
    if let Some((_, made)) = &seen {
        assert!(made.told_bytes - made.identity.len_bytes <= 1);
    }
    let spec = text.parse::<StoreSpec>();
    taken((limits.is_some(), seen.is_some(), spec.is_ok()))
}

/// A cache directory with a volume, a directory in it, an object and their marks by any names: what is counted is there, and
/// what is removed is in the cache.
pub(crate) fn cache(bytes: &[u8]) -> u64 {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    let root = ROOT.get_or_init(|| scratch("cache"));
    let cache = root.join(CACHE);
    let _ = fs::remove_dir_all(&cache);
    let outside = root.join("outside");
    fs::create_dir_all(&outside).unwrap();
    fs::write(outside.join("precious"), "x").unwrap();

    let [volume, fanout, object, mark] = parts(bytes);
    let name = |bytes: &[u8]| -> String {
        bytes.iter().map(|byte| byte & 0x7f).filter(|byte| !matches!(byte, b'/' | 0)).take(200).map(char::from).collect()
    };
    let volume = cache.join(format!("Ierofs,{}", name(volume)));
    let fanout_bytes = fanout;
    let fanout = volume.join(match fanout {
        [number] => fanout_name(*number),
        _ => format!("@{}", name(fanout)),
    });
    fs::create_dir_all(&fanout).unwrap();
    let object = fanout.join(format!("D{}", name(object)));
    if mark.len() % 3 == 2 {
        let _ = std::os::unix::fs::symlink(&outside, &object);
    } else {
        fs::write(&object, "x").unwrap();
    }
    for path in [&object, &volume] {
        if let Ok(file) = File::open(path) {
            // Where the file system has no such attributes, there is no mark.
            let _ = xattr::set(file.as_fd(), MARK, mark);
        }
    }
    let dir = Dir::open(root).unwrap().unwrap();
    let counted = census(&dir).unwrap();
    assert!(counted.objects.len() <= 1 && counted.volumes.len() == 1 && counted.unread.is_none());
    for found in &counted.objects {
        let Place { volume, fanout, object } = &found.place;
        let path = cache.join(volume).join(fanout_name(*fanout)).join(object);
        assert!(fs::symlink_metadata(&path).unwrap().is_file(), "{}", path.display());
    }
    let report = fsck::look(root);
    let removed = fsck::repair(root);
    if let (Ok(report), Ok(removed)) = (&report, &removed) {
        assert_eq!(report, removed);
        assert!(removed.damaged.iter().all(|path| path.starts_with(&cache) && fs::symlink_metadata(path).is_err()));
    }
    assert!(outside.join("precious").exists());
    taken((counted.objects.len(), report.map(|report| report.damaged.len()).ok(), fanout_bytes.len() == 1, mark.len() % 3))
}

/// Texts of the kernel: what fscache has open, with a key of any bytes among lines of any kind; and its version.
///
/// A blob that the kernel has open is found in the lists, whatever else is in them.
pub(crate) fn kernel(bytes: &[u8]) -> u64 {
    let [domain, name, noise, version] = parts(bytes);
    let key = Key::new(domain, name);
    let hex: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    let line = |text: &str, rest: &[u8]| [b"\n", text.as_bytes(), rest, b"\n"].concat();
    let volumes = [noise, &line("ffffffff     3     2   1 00 infill          ", &volume_key(&key)), noise].concat();
    let cookies = [noise, &line("00000001 ffffffff   2   1   1 A 4008 ", hex.as_bytes()), noise].concat();
    let place = Place::of(&key).ok().filter(|_| !domain.contains(&b'\n'));
    if let Some(place) = &place {
        assert!(cookies::listed(&volumes, &cookies, &key));
        // A line of the noise may have given the volume's number another name.
        let live = cookies::live_in(&volumes, &cookies);
        let is_misled = noise.windows(8).any(|part| part == b"ffffffff");
        assert!(live.contains(place) || is_misled, "{key}");
    }
    // Of nothing but noise something may be found, but no place that leads out of the cache.
    for Place { volume, object, .. } in cookies::live_in(noise, noise) {
        assert!([volume, object].iter().all(|part| Path::new(part).components().count() == 1 && part != OsStr::new("..")));
    }
    let text = String::from_utf8_lossy(version);
    let running = Running::new(&text, &text, Some(&text));
    let checks = release::checks(&running);
    taken((place.is_some(), release::may_cull(&running), checks.len(), running.exact))
}

/// Events of a fanotify group. (What a group does with them needs a kernel: it owns the descriptors that they name.)
///
/// 1. No bytes cause a panic; each event takes some of them, and none is taken twice.
/// 2. A descriptor is never negative, a range never reversed, and an answer names its event.
pub(crate) fn events(bytes: &[u8]) -> u64 {
    let mut events = Events::new(bytes);
    let (mut count, mut kinds) = (0, 0_u64);
    let mut left = events.left_over();
    while let Some(event) = events.next() {
        assert!(events.left_over() + 24 <= left);
        left = events.left_over();
        count += 1;
        assert!(event.fd.is_none_or(|fd| fd >= 0) && event.range.as_ref().is_none_or(|range| range.start <= range.end));
        if let Some(fd) = event.fd {
            assert_eq!(response(fd, Ok(()))[..4], fd.to_ne_bytes());
        }
        kinds |= 1 << (u64::from(event.fd.is_some()) | u64::from(event.range.is_some()) << 1 | (event.mask & PRE_ACCESS) >> 18);
    }
    taken((count.min(3), kinds, left.min(30)))
}

/// Where the head of a journal begins, behind the messages.
const JOURNAL_HEAD: u64 = 64 << 10;
/// Where its entries begin.
const JOURNAL_TABLE: u64 = JOURNAL_HEAD + 4096;
/// As many numbers as it has entries.
const JOURNAL_ENTRIES: i32 = 1 << 20;

/// What a dead process may have left: a message, the head and entries of any bytes.
///
/// What is found is found once, has a number for which there is an entry, and is found again by the next process.
pub(crate) fn journal(bytes: &[u8]) -> u64 {
    let [message, head, entries] = parts(bytes);
    let kept = File::from(empty_journal().unwrap());
    let len = kept.metadata().unwrap().len();
    kept.write_all_at(message, 0).unwrap();
    // Most bytes make no journal of it, so the first ones are left alone as a rule.
    let at = JOURNAL_HEAD + if head.first() == Some(&0) { 0 } else { 8 };
    kept.write_all_at(&head[..head.len().min(16)], at).unwrap();
    kept.write_all_at(entries, JOURNAL_TABLE).unwrap();
    let look = || unanswered(kept.try_clone().unwrap().into());
    let Ok(found) = look() else { return 1 };
    assert!(found.windows(2).all(|two| two[0].0 < two[1].0));
    assert!(found.iter().all(|(number, _)| (0..JOURNAL_ENTRIES).contains(number)));
    assert_eq!(look().unwrap(), found);
    assert_eq!(kept.metadata().unwrap().len(), len);
    taken((found.len().min(4), found.iter().any(|(_, range)| range.is_empty())))
}

/// The map of a sink: any file, and one whose header is right.
///
/// It says nothing of a sink whose header it does not have, and never of pages that the sink does not have.
pub(crate) fn map(bytes: &[u8]) -> u64 {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let path = DIR.get_or_init(|| scratch("map")).join("map");
    let [len, bits, header] = parts(bytes);
    let pages = 1 + len.iter().fold(0_u64, |sum, byte| (sum * 31 + u64::from(*byte)) % 40_000);
    let len_bytes = pages * PAGE_BYTES - u64::from(bytes.len() as u8);
    let of = SinkId { name: "name".into(), len_bytes, inode: 1, generation: 2 };
    let open = |of: &SinkId, boot| {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        PresenceMap::open(file, of, boot).unwrap()
    };
    fs::write(&path, bytes).unwrap();
    assert!(open(&of, "boot").ranges().is_empty(), "any bytes are a map");
    let file = File::options().write(true).open(&path).unwrap();
    let live_at = file.metadata().unwrap().len() / 2 + 2048;
    file.write_all_at(&bits[..bits.len().min(4096)], live_at).unwrap();
    file.write_all_at(&bits[..bits.len().min(4096)], 4096).unwrap();
    for boot in ["boot", "another"] {
        let map = open(&of, boot);
        let (ranges, present) = (map.ranges(), map.present_bytes());
        assert!(ranges.iter().all(|range| range.start < range.end && range.end <= pages * PAGE_BYTES));
        assert!(ranges.windows(2).all(|two| two[0].end < two[1].start));
        assert_eq!(ranges.iter().map(|range| range.end - range.start).sum::<u64>(), present);
        assert_eq!(map.is_full(), present == pages * PAGE_BYTES);
    }
    let present = open(&of, "another").present_bytes();
    file.write_all_at(&header[..header.len().min(96)], 0).unwrap();
    let damaged = open(&of, "another").present_bytes();
    assert!(damaged == 0 || damaged == present);
    taken((present == 0, present == pages * PAGE_BYTES, damaged == 0, pages.is_multiple_of(64)))
}

/// What a dead daemon may have left: a bag with any labels, and any messages behind them.
///
/// The name of a blob's file leads nowhere but into its directory.
pub(crate) fn bag(bytes: &[u8]) -> u64 {
    let [count, labels, messages] = parts(bytes);
    // All in all no more than a socket takes at a time (net.unix.max_dgram_qlen).
    let count = u32::try_from(count.len() % 5).unwrap();
    let (kept, other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let mut list = tempfile();
    for label in labels.split(|byte| *byte == b'\n') {
        list.write_all(&u32::try_from(label.len()).unwrap().to_ne_bytes()).unwrap();
        list.write_all(label).unwrap();
    }
    let message = |n: u32| [&b"INFILLB1"[..], &1_u64.to_ne_bytes(), &n.to_ne_bytes(), &(count + 2).to_ne_bytes()].concat();
    let send = |bytes: &[u8], fd| passing::send(other.as_fd(), bytes, Some(fd)).unwrap();
    send(&message(0), other.as_fd());
    send(&message(1), list.as_fd());
    (0..count).for_each(|n| send(&message(n + 2), list.as_fd()));
    messages.chunks(24).take(4).for_each(|message| send(message, list.as_fd()));
    let Ok((_, items)) = Bag::open(OwnedFd::from(kept)) else { return 1 };
    let found = items.len();
    let Ok((groups, files)) = contents(items) else { return taken((2, found)) };
    assert!(groups * 2 + files.len() <= found);
    for file in &files {
        assert!(file.len() == 64 && file.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
    taken((3, groups, files.len()))
}

/// A file without a name.
fn tempfile() -> File {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let path = DIR.get_or_init(|| scratch("bag")).join("list");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file
}

/// Takes everything, and does nothing.
struct NoImages;

impl Images for NoImages {
    fn attach(&self, image: &Image) -> Result<Ready, Refusal> {
        assert_eq!(image.keys(&[])[0], image.key());
        let prepared = Prepared { image: "i".into(), devices: Vec::new(), len_bytes: 1, present_bytes: 0, read_ahead_bytes: None };
        Ok(Ready { prepared, lease: "l".into(), lease_ms: 1 })
    }

    fn repair(&self, file: &Path) -> Result<Ready, Refusal> {
        Err(Refusal::new(Kind::Conflict, format!("not mounted of {}", file.display())))
    }

    fn end_lease(&self, id: &str) -> bool {
        assert!(!id.is_empty() && !id.contains('/'));
        false
    }

    fn release(&self) -> usize {
        0
    }

    fn prefetch(&self, image: &Image) -> Result<Prefetch, Refusal> {
        Ok(Prefetch { wanted: image.into(), stage: Stage::Waiting, error: None })
    }

    fn list(&self) -> ImageList {
        ImageList::default()
    }
}

/// Requests of a client: a method, a path and a body.
///
/// 1. Each is answered, with JSON or nothing, and an error is one line.
/// 2. Who may only look changes nothing.
/// 3. What is understood means the same when it is said again.
pub(crate) fn control(bytes: &[u8]) -> u64 {
    static DAEMON: OnceLock<Arc<Daemon>> = OnceLock::new();
    let daemon = DAEMON.get_or_init(|| {
        let metrics = || Metrics { content_type: "text/plain", body: String::new() };
        let (statistics, config) = (Box::new(|| serde_json::json!({})), Box::new(|| serde_json::json!({})));
        Arc::new(Daemon { front_end: "sim", statistics, metrics: Box::new(metrics), config, images: Some(Arc::new(NoImages)) })
    });
    let [method, path, body] = parts(bytes);
    let Ok(method) = Method::from_bytes(method) else { return 1 };
    let path = String::from_utf8_lossy(path).into_owned();
    let ask = |site, may_change, body: &[u8]| {
        let asked = Asked { method: method.clone(), path: path.clone(), body: body.to_vec().into(), may_change };
        match take(site, daemon, &asked) {
            Step::Now(told) => (told, false),
            Step::Work(_, work) => (work(), true),
        }
    };
    let (told, worked) = ask(Site::Control, true, body);
    let answer = serde_json::from_slice::<serde_json::Value>(&told.body);
    assert!(answer.is_ok() || told.body.is_empty() || told.content_type.is_none());
    if !told.status.is_success() {
        let error = answer.unwrap();
        assert_eq!(error["error"].as_str().unwrap().lines().count(), 1, "{error}");
    }
    let (looked, _) = ask(Site::Control, false, body);
    assert!(method == Method::GET || !looked.status.is_success());
    let (scraped, _) = ask(Site::Metrics, true, body);
    assert!(!scraped.status.is_success() || method == Method::GET);
    if let Ok(wanted) = serde_json::from_slice::<Wanted>(body) {
        let again = serde_json::to_vec(&wanted).unwrap();
        assert_eq!(serde_json::from_slice::<Wanted>(&again).unwrap(), wanted);
        assert_eq!(ask(Site::Control, true, &again).0.status, told.status);
    }
    taken((told.status.as_u16(), worked, looked.status.as_u16(), scraped.status.as_u16()))
}
