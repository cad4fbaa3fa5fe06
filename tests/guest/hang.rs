//! A source that hangs in the kernel: its readers get errors in time, those of another store notice nothing, and it is
//! served again when it is back.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use infill::lab::tree::{Content, Manifest};
use memmap2::Mmap;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guest::{Guest, data, drop_caches, with_blob};
use crate::readers::{How, expect_equal};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("fault_hanging_store_fails_its_readers_and_no_other", |g| hanging_store(g, "uring")),
    ("fault_hanging_store_fails_its_readers_and_no_other_blocking_engine", |g| hanging_store(g, "blocking")),
];

/// How long the source hangs: less than 30 s, after which the block layer gives a request up.
const HANG: Duration = Duration::from_secs(25);
/// How long a reader may wait.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Readers of what hangs: more than a shard has slots.
const STUCK_READERS: usize = 20;
/// Where null_blk disks are made.
const DISK: &str = "/sys/kernel/config/nullb/nullb0";
const DEVICE: &str = "/dev/nullb0";

/// Holds a file's lock, which direct reads of it want, for as long as its thread runs: the thread writes to the file what
/// lies on a disk that takes its time, and waits for that with the lock held.
struct Hang {
    writer: JoinHandle<std::io::Result<()>>,
}

impl Hang {
    fn begin(file: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        fs::create_dir(DISK)?;
        let time = HANG.as_nanos().to_string();
        for (name, value) in [("size", "16"), ("memory_backed", "1"), ("irqmode", "2"), ("completion_nsec", &*time), ("power", "1")] {
            fs::write(Path::new(DISK).join(name), value).map_err(|e| format!("null_blk {name}: {e}"))?;
        }
        let (mut to, from) = (OpenOptions::new().append(true).open(file)?, File::open(DEVICE)?);
        let writer = std::thread::spawn(move || {
            // SAFETY: nobody writes to the disk.
            let map = unsafe { Mmap::map(&from) }?;
            // Behind the end, so that no byte of the blob changes.
            to.write_all(&map[..1])
        });
        // Until it has the lock.
        std::thread::sleep(Duration::from_millis(500));
        Ok(Self { writer })
    }

    fn lasts(&self) -> bool {
        !self.writer.is_finished()
    }

    fn end(self) -> Outcome {
        self.writer.join().map_err(|_| "the writer panicked")??;
        fs::remove_dir(DISK)?;
        Ok(())
    }
}

fn hanging_store(guest: &mut Guest, engine: &str) -> Outcome {
    guest.stock(&["one.img"])?;
    // A copy, because the others are the same file for all tests.
    fs::copy(data("one.blob"), guest.store.join("one.blob"))?;
    // Another file system.
    let other = guest.cache.with_extension("source");
    fs::create_dir_all(&other)?;
    for name in ["two.img", "two.blob"] {
        fs::copy(data(name), other.join(name))?;
    }
    let timeout = format!("--request-timeout-ms={}", TIMEOUT.as_millis());
    let (store, engine) = (format!("--store=dir:{}", other.display()), format!("--engine={engine}"));
    guest.serve(&[&timeout, &store, &engine, "--source=direct", "--shards=1"])?;
    let (one, two) = (guest.mount(&with_blob("one.img", "one.blob"))?, guest.mount(&with_blob("two.img", "two.blob"))?);
    drop_caches()?;

    let hang = Hang::begin(&guest.store.join("one.blob"))?;
    let stuck: Vec<_> = some_files(&one, STUCK_READERS)?.into_iter().map(|path| std::thread::spawn(move || timed_read(&path))).collect();
    std::thread::sleep(TIMEOUT / 4);
    expect_equal(&two, &data("two.json"), 4, How::Read)?;
    if !hang.lasts() {
        return Err("the other store's readers were not done before the hang was over".into());
    }
    for reader in stuck {
        let (result, took) = reader.join().map_err(|_| "a reader panicked")?;
        if result.err().and_then(|error| error.raw_os_error()) != Some(Errno::EIO as i32) || took < TIMEOUT {
            return Err(format!("a reader of what hangs ended after {} ms and without EIO", took.as_millis()).into());
        }
    }
    if !hang.lasts() {
        return Err("the readers of what hangs got their errors only when it was over".into());
    }
    expect_report(guest)?;
    hang.end()?;
    drop_caches()?;
    expect_equal(&one, &data("one.json"), 4, How::Read)?;
    guest.umount(&one)?;
    guest.umount(&two)?;
    let ended = guest.stop()?;
    if ended.json["timed_out"].as_u64().is_none_or(|timed_out| timed_out < STUCK_READERS as u64 / 2) || ended.json["stuck"] != 0 {
        return Err(format!("the statistics do not tell of it: {}", ended.json).into());
    }
    Ok(())
}

/// The log names the blob and what to look at, and the statistics count the operations that hang.
fn expect_report(guest: &Guest) -> Outcome {
    kill(Pid::from_raw(guest.daemon_pid()?.cast_signed()), Signal::SIGUSR1)?;
    let began = Instant::now();
    loop {
        let log = guest.log();
        let counts = log.lines().rfind(|line| line.contains("\"stuck\":"));
        if let Some(line) = counts {
            let is_told = log.contains("one.blob offset=") && log.contains("a read of its source has not ended");
            return if is_told && !line.contains("\"stuck\":0") { Ok(()) } else { Err(format!("not told:\n{log}").into()) };
        }
        if began.elapsed() > TIMEOUT {
            return Err("no statistics".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Paths of some files whose data lies in the blob.
fn some_files(mount: &Path, count: usize) -> Result<Vec<PathBuf>, Box<dyn std::error::Error>> {
    let manifest = Manifest::load(&data("one.json"))?;
    let has_data = |content: &Content| matches!(content, Content::File { len_bytes, .. } if *len_bytes > 4096);
    let files = manifest.entries.iter().filter(|entry| has_data(&entry.content));
    Ok(files.take(count).map(|entry| mount.join(&entry.path)).collect())
}

fn timed_read(path: &Path) -> (std::io::Result<Vec<u8>>, Duration) {
    let began = Instant::now();
    (fs::read(path), began.elapsed())
}
