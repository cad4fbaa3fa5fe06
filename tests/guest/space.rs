//! Space: what is not mounted goes, least recently used first, when the cache is too full; nothing else ever does.
//!
//! The cache's disk is the same for all tests; ballast beside the caches decides how much room there is.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use infill::engine::placement::seats;
use infill::engine::plan::{Completion, Window};
use infill::engine::{Engine, EngineKind, Settings};
use infill::front::FrontEnd;
use infill::front::cachefiles::cull::{Answer, Culler, empty_graveyard};
use infill::front::cachefiles::tree::Dir;
use infill::front::cachefiles::{BindOptions, Device};
use infill::ops::space::steward::POLL;
use infill::store::{SourceMode, Store, Stores};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;

use crate::guest::{DOMAIN, Guest, data, drop_caches};
use crate::readers::{How, READ_LIMIT, Readers, expect_equal};
use crate::seed::{object, stock_beside_cache, wait_until, wait_until_unbound};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("space_culls_least_recently_used_and_never_mounted", least_recently_used_first),
    ("space_byte_budget_is_held", byte_budget_is_held),
    ("space_blobs_that_are_shared_take_none_and_stay", shared_stay),
    ("space_full_cache_makes_room_for_a_reader", |g| makes_room_for_a_reader(g, Full::Stop)),
    ("space_full_disk_makes_room_for_a_reader", |g| makes_room_for_a_reader(g, Full::Disk)),
    ("space_full_of_mounted_gives_eio_and_recovers", full_of_mounted),
    ("space_volumes_without_objects_go_and_the_graveyard_is_emptied", volumes_go),
    ("space_damaged_objects_are_removed_at_start", damaged_objects),
    ("space_kernel_answers_cull_and_inuse", kernel_answers),
];

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The file that takes up room.
const BALLAST: &str = "/cache/ballast";
/// A turn of the daemon's look at the cache, and some time to do it.
pub(crate) const TURN: Duration = POLL.saturating_add(Duration::from_secs(2));

/// Room on the cache's disk, taken until this is dropped.
pub(crate) struct Ballast(File);

impl Ballast {
    /// Takes none yet.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(File::create(BALLAST)?))
    }

    /// Takes all but `leave` bytes.
    pub(crate) fn leave(&self, leave: u64, full: Full) -> Outcome {
        nix::unistd::sync();
        if full == Full::Disk {
            return self.fill_up(leave);
        }
        let stat = statvfs("/cache")?;
        let more = (stat.blocks_available() * stat.fragment_size()).checked_sub(leave).ok_or("the disk is too full already")?;
        self.grow(more)
    }

    /// Takes all that there is, and gives some back: what a file system keeps for itself is in no number.
    fn fill_up(&self, give_back: u64) -> Outcome {
        for step in [64 << 20, 1 << 20, 64 << 10] {
            while self.grow(step).is_ok() {}
        }
        self.0.set_len(self.0.metadata()?.len().checked_sub(give_back).ok_or("there was no room")?)?;
        nix::unistd::sync();
        Ok(())
    }

    fn grow(&self, more: u64) -> Result<()> {
        let at = self.0.metadata()?.len();
        fallocate(&self.0, FallocateFlags::empty(), i64::try_from(at)?, i64::try_from(more)?)?;
        Ok(())
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = fs::remove_file(BALLAST);
        nix::unistd::sync();
    }
}

/// What ends the room.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// The kernel's stop mark: ENOBUFS.
    Stop,
    /// The disk: ENOSPC.
    Disk,
}

/// One percent of the cache's disk.
pub(crate) fn percent() -> Result<u64> {
    let stat = statvfs("/cache")?;
    Ok(stat.blocks() / 100 * stat.fragment_size())
}

fn options(name: &str) -> String {
    format!("fsid={name},domain_id={DOMAIN}")
}

/// Puts copies of one image into the store under these names.
fn stock(guest: &Guest, names: &[&str]) -> Outcome {
    names.iter().try_for_each(|name| guest.stock_as("plain.img", name))
}

/// Mounts, reads all, unmounts, and waits until the object has its name.
fn visit(guest: &Guest, name: &str) -> Outcome {
    guest.expect_whole(&options(name), "tree.json", (2, How::Read))?;
    wait_until("the kernel names its object", || object(guest, name).is_ok())
}

fn is_there(guest: &Guest, name: &str) -> bool {
    object(guest, name).is_ok()
}

fn used_bytes(guest: &Guest, names: &[&str]) -> u64 {
    let bytes = |name: &&str| object(guest, name).and_then(|path| Ok(path.metadata()?)).map_or(0, |meta| meta.blocks() * 512);
    names.iter().map(bytes).sum()
}

fn least_recently_used_first(guest: &mut Guest) -> Outcome {
    let names = ["a.img", "b.img", "c.img"];
    stock(guest, &names)?;
    guest.serve(&["--bstop=1", "--bcull=11", "--brun=12"])?;
    names.iter().try_for_each(|name| visit(guest, name))?;
    // The oldest is used again, long enough to be seen; its disk is mounted with noatime.
    let at = guest.mount(&options("a.img"))?;
    std::thread::sleep(TURN);
    guest.umount(&at)?;
    std::thread::sleep(TURN);
    // Too full by less than one object: 1 % of the disk, and a page.
    let len = used_bytes(guest, &["b.img"]);
    if len < percent()? + 4096 {
        return Err(format!("the image is too small for this test: {len} bytes").into());
    }
    let ballast = Ballast::new()?;
    ballast.leave(11 * percent()? - 4096, Full::Stop)?;
    wait_until("the least recently used object goes", || !is_there(guest, "b.img"))?;
    std::thread::sleep(TURN);
    if !is_there(guest, "a.img") || !is_there(guest, "c.img") {
        return Err("more than needed was removed".into());
    }
    // Now by more than all of them; one is mounted, though it is not the most recent one.
    let at = guest.mount(&options("c.img"))?;
    ballast.leave(2 * percent()?, Full::Stop)?;
    wait_until("all that is unused goes", || !is_there(guest, "a.img"))?;
    drop_caches()?;
    forget_proc()?;
    expect_equal(&at, &data("tree.json"), 2, How::Read)?;
    if !is_there(guest, "c.img") || !guest.log().contains("too full, and nothing in it is unused") {
        return Err("the mounted one was removed, or nothing was said".into());
    }
    guest.umount(&at)?;
    wait_until("it goes when it is unmounted", || !is_there(guest, "c.img"))?;
    drop(ballast);
    visit(guest, "b.img")?;
    let ended = guest.stop()?;
    if ended.json["culled_objects"] != 3 || ended.json["culled_bytes"].as_u64() < Some(2 * len) {
        return Err(format!("the statistics do not say so: {}", ended.json).into());
    }
    Ok(())
}

/// Makes procfs forget all inodes that nobody has open, as a lack of memory does: a remount shrinks its dentries
/// (`reconfigure_super`, fs/super.c). The daemon is confined, and still has to see what is in use.
fn forget_proc() -> Outcome {
    nix::mount::mount(None::<&str>, "/proc", None::<&str>, nix::mount::MsFlags::MS_REMOUNT, None::<&str>)?;
    Ok(())
}

fn byte_budget_is_held(guest: &mut Guest) -> Outcome {
    let names = ["a.img", "b.img", "c.img"];
    stock(guest, &names)?;
    let len = data("plain.img").metadata()?.len();
    let budget = len + len / 2;
    guest.serve(&[&format!("--cache-bytes={budget}")])?;
    for name in names {
        visit(guest, name)?;
    }
    wait_until("the budget is held", || used_bytes(guest, &names) <= budget)?;
    if !is_there(guest, "c.img") {
        return Err("the most recently used one was removed".into());
    }
    let ended = guest.stop()?;
    println!("{}", ended.json);
    if ended.json["culled_objects"] != 2 || ended.json["cache_objects"] != 1 || ended.json["cache_bytes"].as_u64() > Some(budget) {
        return Err(format!("the statistics do not say so: {}", ended.json).into());
    }
    Ok(())
}

/// To remove what shares its blocks with the store would free nothing.
fn shared_stay(guest: &mut Guest) -> Outcome {
    if !stock_beside_cache(guest, &["plain.img", "one.img"])? {
        println!("not run: this file system shares no blocks");
        return Ok(());
    }
    guest.serve(&["--cache-bytes=1M", "--seed=lab/plain.img"])?;
    std::thread::sleep(TURN);
    guest.expect_whole(&options("plain.img"), "tree.json", (2, How::Read))?;
    std::thread::sleep(TURN);
    let ended = guest.stop()?;
    if !is_there(guest, "plain.img") || ended.json["culled_objects"] != 0 || ended.json["cache_bytes"].as_u64() > Some(1 << 20) {
        return Err(format!("it was removed, or counted: {}", ended.json).into());
    }
    Ok(())
}

/// A fill finds no room, and gets some in time: its reader notices nothing.
fn makes_room_for_a_reader(guest: &mut Guest, full: Full) -> Outcome {
    stock(guest, &["a.img", "b.img"])?;
    let flags: [&str; 3] = match full {
        Full::Stop => ["--bstop=1", "--bcull=2", "--brun=3"],
        Full::Disk => ["--bstop=0", "--bcull=1", "--brun=2"],
    };
    guest.serve(&flags)?;
    visit(guest, "a.img")?;
    let ballast = Ballast::new()?;
    let leave = if full == Full::Stop { 2 * percent()? + (1 << 20) } else { percent()? + (1 << 20) };
    ballast.leave(leave, full)?;
    let at = guest.mount(&options("b.img"))?;
    expect_equal(&at, &data("tree.json"), 2, How::Read)?;
    if is_there(guest, "a.img") {
        return Err("there was room without removing anything".into());
    }
    // With plenty of room, nothing more goes.
    drop(ballast);
    std::thread::sleep(TURN);
    guest.umount(&at)?;
    let ended = guest.stop()?;
    println!("{}", ended.json);
    if ended.json["failed"] != 0 || ended.json["culled_objects"] != 1 {
        return Err(format!("a reader failed, or the statistics are wrong: {}", ended.json).into());
    }
    Ok(())
}

fn full_of_mounted(guest: &mut Guest) -> Outcome {
    stock(guest, &["a.img", "b.img"])?;
    guest.serve(&["--bstop=1", "--bcull=2", "--brun=3"])?;
    visit(guest, "a.img")?;
    let first = guest.mount(&options("a.img"))?;
    let second = guest.mount(&options("b.img"))?;
    let ballast = Ballast::new()?;
    ballast.leave(percent()? + (4 << 20), Full::Stop)?;
    let complaints = Readers::start(&second, &data("tree.json"), 2, How::Read)?.finish(READ_LIMIT)?;
    if complaints.is_empty() || !complaints.iter().all(|line| line.contains("os error 5)")) {
        return Err(format!("{} complaints, and not all are EIO: {:?}", complaints.len(), complaints.first()).into());
    }
    let log = guest.log();
    for word in ["the cache file system has no room", "nothing in it is unused"] {
        if !log.contains(word) {
            return Err(format!("the log does not say: {word}").into());
        }
    }
    // The first one is as good as ever.
    expect_equal(&first, &data("tree.json"), 2, How::Read)?;
    guest.umount(&first)?;
    wait_until("it goes when it is unmounted", || !is_there(guest, "a.img"))?;
    std::thread::sleep(Duration::from_secs(1));
    expect_equal(&second, &data("tree.json"), 2, How::Read)?;
    drop(ballast);
    guest.umount(&second)?;
    guest.stop()?;
    Ok(())
}

fn volumes_go(guest: &mut Guest) -> Outcome {
    stock(guest, &["a.img"])?;
    guest.serve(&["--cache-bytes=1M"])?;
    let at = guest.mount("fsid=a.img")?;
    expect_equal(&at, &data("tree.json"), 2, How::Read)?;
    let volume = guest.cache.join("cache/Ierofs,a.img");
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    File::open(&volume)?.set_modified(old)?;
    std::thread::sleep(TURN);
    if !volume.exists() {
        return Err("a volume in use was removed".into());
    }
    guest.umount(&at)?;
    wait_until("the volume goes with its last object", || !volume.exists())?;
    let graveyard = guest.cache.join("graveyard");
    wait_until("the graveyard is emptied", || fs::read_dir(&graveyard).is_ok_and(|mut dir| dir.next().is_none()))?;
    guest.expect_whole("fsid=a.img", "tree.json", (2, How::Read))?;
    let ended = guest.stop()?;
    if ended.json["culled_volumes"] != 1 {
        return Err(format!("the statistics do not say so: {}", ended.json).into());
    }
    Ok(())
}

fn damaged_objects(guest: &mut Guest) -> Outcome {
    stock(guest, &["a.img", "b.img"])?;
    guest.serve(&[])?;
    visit(guest, "a.img")?;
    visit(guest, "b.img")?;
    guest.stop()?;
    wait_until_unbound()?;
    // As a crash may leave it: a file without the kernel's mark.
    let damaged = object(guest, "a.img")?;
    fs::remove_file(&damaged)?;
    fs::write(&damaged, b"half")?;
    // Links to elsewhere, wherever somebody might look.
    let outside = guest.store.join("outside");
    fs::create_dir_all(outside.join("@00"))?;
    fs::write(outside.join("@00/Dprecious"), b"precious")?;
    let links = ["cache/Ierofs,link", "graveyard/link", &format!("cache/Ierofs,{DOMAIN}/@link")].map(|path| guest.cache.join(path));
    links.iter().try_for_each(|link| symlink(&outside, link))?;

    let name = damaged.display().to_string();
    let seen = guest.doctor()?;
    if !seen.contains("damaged") || !seen.contains(&name) || !damaged.exists() {
        return Err(format!("doctor does not say what it would do, or did it:\n{seen}").into());
    }
    guest.serve(&[])?;
    if damaged.exists() || !guest.log().contains(&name) || guest.log().contains("Db.img") {
        return Err("the damaged object is still there, or that it was removed was not said".into());
    }
    visit(guest, "a.img")?;
    guest.stop()?;
    wait_until_unbound()?;
    guest.serve(&["--cache-bytes=1M"])?;
    wait_until("everything unused goes", || !is_there(guest, "a.img") && !is_there(guest, "b.img"))?;
    guest.stop()?;
    if !outside.join("@00/Dprecious").exists() || fs::symlink_metadata(&links[0]).is_ok() {
        return Err("a link was followed, or left where it breaks mounts".into());
    }
    Ok(())
}

/// The kernel's own answers, asked for by this process, which is the daemon for once.
fn kernel_answers(guest: &mut Guest) -> Outcome {
    stock(guest, &["a.img"])?;
    let device = Device::bind(&BindOptions::new(&guest.cache))?;
    let store: Arc<dyn Store> = Arc::new(Stores::from_specs(&[format!("dir:{}", guest.store.display()).parse()?], SourceMode::default())?);
    let front = Arc::clone(&device) as Arc<dyn FrontEnd>;
    let engine = Engine::start(&front, &store, &settings())?;
    let here = std::env::current_dir()?;
    let cache = guest.cache.join("cache");
    let at = guest.mount(&options("a.img"))?;
    let volume = cache.join(format!("Ierofs,{DOMAIN}"));
    // Mounted for the first time: there is no name yet.
    expect_answers(&device, &fanout(&volume)?, "Da.img", [Answer::Gone; 2])?;
    expect_answers(&device, &cache, &format!("Ierofs,{DOMAIN}"), [Answer::Busy; 2])?;
    guest.umount(&at)?;
    wait_until("the kernel names its object", || is_there(guest, "a.img"))?;
    let at = guest.mount(&options("a.img"))?;
    let object = object(guest, "a.img")?;
    let dir = object.parent().ok_or("no parent")?;
    expect_answers(&device, dir, "Da.img", [Answer::Busy; 2])?;
    expect_answers(&device, &cache, "nothing", [Answer::Gone; 2])?;
    guest.umount(&at)?;
    wait_until("the kernel closes the object", || ask(&device, dir, "Da.img", false).is_ok_and(|answer| answer == Answer::Free))?;
    expect_answers(&device, dir, "Da.img", [Answer::Free; 2])?;
    let root = Dir::open(&guest.cache)?.ok_or("no cache")?;
    if object.exists() || empty_graveyard(&root)? != 0 {
        return Err("a culled file is unlinked at once and never buried".into());
    }
    wait_until("the kernel closes the volume", || {
        ask(&device, &cache, &format!("Ierofs,{DOMAIN}"), false).is_ok_and(|answer| answer == Answer::Free)
    })?;
    expect_answers(&device, &cache, &format!("Ierofs,{DOMAIN}"), [Answer::Free; 2])?;
    if volume.exists() || empty_graveyard(&root)? != 1 {
        return Err("a culled directory is buried, and ours to delete".into());
    }
    guest.expect_whole(&options("a.img"), "tree.json", (2, How::Read))?;
    if std::env::current_dir()? != here {
        return Err("the working directory of another thread was changed".into());
    }
    engine.stop(Duration::from_secs(10), || false)?;
    Ok(())
}

pub(crate) fn settings() -> Settings {
    Settings {
        shards: 1,
        seats: seats(),
        kind: EngineKind::Auto,
        window: Window::Fixed(1 << 20),
        completion: Completion::default(),
        slot_bytes: 1 << 20,
        slots: 4,
        workers: 2,
        fd_budget: 1000,
        open_timeout: Duration::from_secs(5),
        request_timeout: Duration::from_secs(30),
        no_room: None,
        tracer: None,
        remembered: Arc::default(),
        leave_rest: false,
    }
}

/// The directory of the volume in which the object will be: any one does for a name that is nowhere.
fn fanout(volume: &Path) -> Result<PathBuf> {
    Ok(fs::read_dir(volume)?.next().ok_or("the volume is empty")??.path())
}

/// First `inuse`, then `cull`.
fn expect_answers(device: &Arc<Device>, dir: &Path, name: &str, expected: [Answer; 2]) -> Outcome {
    let answers = [ask(device, dir, name, false)?, ask(device, dir, name, true)?];
    if answers == expected { Ok(()) } else { Err(format!("{name}: {answers:?} instead of {expected:?}").into()) }
}

/// Asks from a thread made for it.
fn ask(device: &Arc<Device>, dir: &Path, name: &str, cull: bool) -> Result<Answer> {
    let (device, dir, name) = (Arc::clone(device), dir.to_owned(), name.to_owned());
    let thread = std::thread::spawn(move || {
        let culler = Culler::on_this_thread(device).map_err(|error| error.to_string())?;
        let dir = Dir::open(&dir).map_err(|error| error.to_string())?.ok_or("no such directory")?;
        let answer = if cull { culler.cull(&dir, name.as_ref()) } else { culler.in_use(&dir, name.as_ref()) };
        answer.map_err(|errno| errno.to_string())
    });
    thread.join().map_err(|_| "the thread panicked")?.map_err(Into::into)
}
