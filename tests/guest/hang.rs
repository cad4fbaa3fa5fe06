//! A store that hangs in the kernel, as a dead disk or a stopped file server does: its readers get errors in time, those
//! of another store notice nothing, and it is served again when it is back.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use infill::lab::tree::{Content, Manifest};
use memmap2::MmapMut;
use nix::errno::Errno;
use nix::libc::O_DIRECT;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guest::{Guest, data, drop_caches, with_blob};
use crate::host::{EMULATOR, HANGING_DISK, HANGING_DRIVE};
use crate::readers::{How, expect_equal};
use crate::seed::wait_until;
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("fault_hanging_store_fails_its_readers_and_no_other", |g| hanging_store(g, "uring")),
    ("fault_hanging_store_fails_its_readers_and_no_other_blocking_engine", |g| hanging_store(g, "blocking")),
];

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// How long a request may wait. A reader waits twice as long: the kernel asks again for a page whose read-ahead failed.
const TIMEOUT: Duration = Duration::from_secs(4);
/// Readers of what hangs: more than a shard has slots.
const STUCK_READERS: usize = 20;
/// How often that many come while the disk hangs.
const ROUNDS: usize = 2;
/// A read that takes longer than this hangs.
const HANGS: Duration = Duration::from_secs(1);
/// After how many seconds the kernel complains of a task that hangs, which ends the guest; 0: never.
const COMPLAIN: &str = "/proc/sys/kernel/hung_task_timeout_secs";
/// What the guests' kernel is built with (src/lab/kernel.config).
const COMPLAIN_SECS: &str = "60";
/// Where the disk is mounted.
const MOUNTED: &str = "/tmp/hanging";

/// The disk that the emulator can stop: it is given one byte a second.
struct HangingDisk {
    /// Reads it, and hangs with it.
    probe: Option<JoinHandle<std::io::Result<()>>>,
    /// Reads that the probe has done.
    reads: Arc<AtomicUsize>,
}

impl HangingDisk {
    /// Mounts it, with copies of these files of the test data.
    fn with(names: &[&str]) -> Result<Self> {
        fs::create_dir_all(MOUNTED)?;
        mount(Some(HANGING_DISK), MOUNTED, Some("ext4"), MsFlags::empty(), None::<&str>)?;
        for name in names {
            fs::copy(data(name), Path::new(MOUNTED).join(name))?;
        }
        Ok(Self { probe: None, reads: Arc::default() })
    }

    /// Comes back when no read of the disk ends any more.
    fn hang(&mut self) -> Outcome {
        // On a busy machine it may take long.
        fs::write(COMPLAIN, "0")?;
        throttle(1);
        let disk = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(HANGING_DISK)?;
        let reads = Arc::clone(&self.reads);
        self.probe = Some(std::thread::spawn(move || {
            // A mapping is aligned, as such a read wants it.
            let mut page = MmapMut::map_anon(4096)?;
            let mut since = Instant::now();
            while since.elapsed() < HANGS {
                since = Instant::now();
                disk.read_exact_at(&mut page, 0)?;
                reads.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }));
        let mut last = (usize::MAX, Instant::now());
        wait_until("the disk hangs", || {
            let now = self.reads.load(Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            }
            last.1.elapsed() > HANGS
        })
    }

    fn hangs(&self) -> bool {
        self.probe.as_ref().is_some_and(|probe| !probe.is_finished())
    }

    fn go_on(&mut self) -> Outcome {
        throttle(0);
        match self.probe.take().map(JoinHandle::join) {
            Some(Err(_)) => Err("the probe panicked".into()),
            Some(Ok(result)) => Ok(result?),
            None => Ok(()),
        }
    }
}

/// Whatever happened, the guest can be switched off.
impl Drop for HangingDisk {
    fn drop(&mut self) {
        throttle(0);
        let _ = fs::write(COMPLAIN, COMPLAIN_SECS);
        let _ = umount2(MOUNTED, MntFlags::MNT_DETACH);
    }
}

/// Has the emulator give the disk so many bytes a second; 0: all that it wants.
fn throttle(bytes_per_second: u32) {
    println!("{EMULATOR}block_set_io_throttle {HANGING_DRIVE} {bytes_per_second} 0 0 0 0 0");
}

fn hanging_store(guest: &mut Guest, engine: &str) -> Outcome {
    let mut disk = HangingDisk::with(&["one.img", "one.blob"])?;
    guest.stock(&["two.img", "two.blob"])?;
    let timeout = format!("--request-timeout-ms={}", TIMEOUT.as_millis());
    let (store, engine) = (format!("--store=dir:{MOUNTED}"), format!("--engine={engine}"));
    guest.serve(&[&timeout, &store, &engine, "--shards=1"])?;
    let (one, two) = (guest.mount(&with_blob("one.img", "one.blob"))?, guest.mount(&with_blob("two.img", "two.blob"))?);
    let files = files_with_data("one.json")?;
    // So that its metadata is in the cache.
    Manifest::load(&data("one.json"))?.compare_names(&one)?;
    drop_caches()?;

    disk.hang()?;
    // As many in each round as in the first.
    let mut threads = usize::MAX;
    for (round, files) in files.chunks(STUCK_READERS).take(ROUNDS).enumerate() {
        let stuck: Vec<_> = files.iter().map(|file| one.join(file)).map(|path| std::thread::spawn(move || timed_read(&path))).collect();
        std::thread::sleep(TIMEOUT / 4);
        if round == 0 {
            others_notice_nothing(&two)?;
        }
        for reader in stuck {
            let (result, took) = reader.join().map_err(|_| "a reader panicked")?;
            if result.as_ref().err().and_then(std::io::Error::raw_os_error) != Some(Errno::EIO as i32) || took < TIMEOUT {
                return Err(format!("a reader of what hangs ended after {} ms with {:?}", took.as_millis(), result.map(|b| b.len())).into());
            }
        }
        let before = std::mem::replace(&mut threads, threads_of(guest)?);
        if threads > before {
            return Err(format!("threads pile up in the daemon: {before}, then {threads}").into());
        }
    }
    expect_report(guest)?;
    if !disk.hangs() {
        return Err("the disk did not hang all the time".into());
    }
    disk.go_on()?;

    drop_caches()?;
    expect_equal(&one, &data("one.json"), 4, How::Read)?;
    expect_equal(&two, &data("two.json"), 4, How::Read)?;
    guest.umount(&one)?;
    guest.umount(&two)?;
    let ended = guest.stop()?;
    let timed_out = ended.json["timed_out"].as_u64().unwrap_or(0);
    if timed_out < (ROUNDS * STUCK_READERS) as u64 || ended.json["stuck"] != 0 || ended.json["pending"] != 0 {
        return Err(format!("the statistics do not tell of it: {}", ended.json).into());
    }
    Ok(())
}

/// Readers of another store have each of their files sooner than what hangs has its first error.
fn others_notice_nothing(mount: &Path) -> Outcome {
    for file in files_with_data("two.json")? {
        let (result, took) = timed_read(&mount.join(&file));
        if result.is_err() || took > TIMEOUT {
            return Err(format!("{}, which does not hang: {} ms, {:?}", file.display(), took.as_millis(), result.err()).into());
        }
    }
    expect_equal(mount, &data("two.json"), 4, How::Read)
}

fn threads_of(guest: &Guest) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/task", guest.daemon_pid()?))?.count())
}

/// The log names the blob and what to look at, and the statistics count the operations that hang.
fn expect_report(guest: &Guest) -> Outcome {
    kill(Pid::from_raw(guest.daemon_pid()?.cast_signed()), Signal::SIGUSR1)?;
    wait_until("the daemon's statistics", || guest.log().contains("\"stuck\":"))?;
    let log = guest.log();
    let is_told = log.contains("one.blob offset=") && log.contains("a read of its source has not ended");
    if is_told && !log.contains("\"stuck\":0") { Ok(()) } else { Err(format!("it is not told:\n{log}").into()) }
}

fn files_with_data(manifest: &str) -> Result<Vec<PathBuf>> {
    let has_data = |content: &Content| matches!(content, Content::File { len_bytes, .. } if *len_bytes > 0);
    let manifest = Manifest::load(&data(manifest))?;
    Ok(manifest.entries.iter().filter(|entry| has_data(&entry.content)).map(|entry| PathBuf::from(&entry.path)).collect())
}

fn timed_read(path: &Path) -> (std::io::Result<Vec<u8>>, Duration) {
    let began = Instant::now();
    (fs::read(path), began.elapsed())
}
