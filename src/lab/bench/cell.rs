//! The guest's side: one cell from its disks to its result.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::sync;

use super::data::Listing;
use super::meter::{self, Snapshot};
use super::readers::{Plan, nanoseconds};
use super::stages::{Trace, Tracer};
use super::{
    BLOB, CACHE_DIR, CACHE_EXTENTS, CELL_FILE, Cell, CellResult, Held, IMAGE, LISTING_FILE, MANY, MOUNT_DIR, Phase, RESULT_MARK, Reading,
    STORE_BESIDE_CACHE, STORE_DIR, STORE_EXTENTS, Scenario, Service, data, memdisk,
};
use crate::lab::{LabError, Result, Trying, last_lines};

/// Names and sizes of the disks.
const CACHE_DISK: &str = "ncache";
const STORE_DISK: &str = "nstore";
const DISK_MIB: u64 = 512;
/// What the daemon says.
const DAEMON_LOG: &str = "/tmp/daemon.log";
/// How long the daemon may take to bind its cache; the guest's clock knows no slow host.
const BIND_LIMIT: Duration = Duration::from_secs(20);
/// How long the kernel may measure the processor's clock after the boot.
const CLOCK_LIMIT: Duration = Duration::from_secs(10);
/// Time for what `sync` and dropping the caches set off.
const QUIET: Duration = Duration::from_millis(200);

/// Does the cell of [`CELL_FILE`] and prints its result for the host.
///
/// # Errors
/// Something could not be done. Wrong data is no error, but in the result.
pub fn run() -> Result<()> {
    let text = fs::read(CELL_FILE).trying(|| format!("cannot read {CELL_FILE}"))?;
    let cell: Cell = serde_json::from_slice(&text).map_err(|e| LabError::Failed(format!("{CELL_FILE} makes no sense: {e}")))?;
    if cell.cpus == 1 {
        await_clock()?;
    }
    let copy_cost = memdisk::copy_cost()?;
    make_disks(&cell)?;
    let listing = Listing::load(Path::new(LISTING_FILE))?;
    let plan = Plan::new(cell.scenario, listing, Path::new(MOUNT_DIR));
    meter::count_reads()?;
    let daemon = Daemon::start(&cell.service)?;
    drop_caches()?;
    if cell.warm_source {
        warm_source()?;
    }
    let daemon_pid = daemon.as_ref().map(|d| d.0.id().cast_signed());
    let measured = Measured { daemon: daemon_pid, mounts: mounts(&cell)?, traced: cell.traced };
    let result = measured.phases(&plan);
    if result.is_err() {
        println!("{}", last_lines(&fs::read_to_string(DAEMON_LOG).unwrap_or_default(), 20));
    }
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let result = CellResult { kernel: kernel.trim().into(), copy_cost, ..result? };
    let text = serde_json::to_string(&result).map_err(|e| LabError::Failed(format!("cannot write the result: {e}")))?;
    println!("{RESULT_MARK}{text}");
    Ok(())
}

/// Waits until the kernel trusts the processor's clock: before, every look at the time is slow.
fn await_clock() -> Result<()> {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let began = Instant::now();
    while fs::read_to_string(path).trying(|| format!("cannot read {path}"))?.trim() != "tsc" {
        if began.elapsed() > CLOCK_LIMIT {
            return Err(LabError::Failed(format!("the kernel does not use the processor's clock; see {path}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn make_disks(cell: &Cell) -> Result<()> {
    for (disk, extents, on, fs, flags) in [
        (CACHE_DISK, CACHE_EXTENTS, "/cache", cell.cache_fs.name(), MsFlags::MS_NOATIME),
        (STORE_DISK, STORE_EXTENTS, STORE_DIR, "ext4", MsFlags::MS_RDONLY),
    ] {
        memdisk::make(disk, DISK_MIB, cell.disk_latency_ns)?;
        let device = Path::new("/dev").join(disk);
        memdisk::restore(Path::new(extents), &device)?;
        fs::create_dir_all(on).trying(|| format!("cannot make {on}"))?;
        mount(Some(&device), on, Some(fs), flags, None::<&str>).trying(|| format!("cannot mount {} on {on}", device.display()))?;
    }
    for dir in [CACHE_DIR, MOUNT_DIR] {
        fs::create_dir_all(dir).trying(|| format!("cannot make {dir}"))?;
    }
    if cell.service.store_beside_cache {
        copy_store()?;
    }
    Ok(())
}

/// Puts the store on the cache's disk, where the two can share blocks.
fn copy_store() -> Result<()> {
    let what = || format!("cannot copy {STORE_DIR} to {STORE_BESIDE_CACHE}");
    fs::create_dir_all(STORE_BESIDE_CACHE).trying(what)?;
    for entry in fs::read_dir(STORE_DIR).trying(what)? {
        let entry = entry.trying(what)?;
        if entry.path().is_file() {
            fs::copy(entry.path(), Path::new(STORE_BESIDE_CACHE).join(entry.file_name())).trying(what)?;
        }
    }
    Ok(())
}

/// An image to mount: source, options and place.
struct Image {
    source: String,
    options: String,
    on: PathBuf,
}

fn mounts(cell: &Cell) -> Result<Vec<Image>> {
    let Service { source, options, .. } = &cell.service;
    let image = |image: &str, blob: &str, on: PathBuf| {
        let named = |text: &str| text.replace("{image}", image).replace("{blob}", blob);
        fs::create_dir_all(&on).trying(|| format!("cannot make {}", on.display()))?;
        Ok(Image { source: named(source), options: named(options), on })
    };
    if cell.scenario != Scenario::Many8 {
        return Ok(vec![image(IMAGE, BLOB, MOUNT_DIR.into())?]);
    }
    let many = (0..MANY).map(|n| (n, data::many_names(n)));
    many.map(|(n, (name, blob))| image(&name, &blob, Path::new(MOUNT_DIR).join(n.to_string()))).collect()
}

fn drop_caches() -> Result<()> {
    sync();
    fs::write("/proc/sys/vm/drop_caches", "3").trying(|| "cannot drop the caches")?;
    std::thread::sleep(QUIET);
    Ok(())
}

/// Brings the store's files into the page cache.
fn warm_source() -> Result<()> {
    for name in [IMAGE, BLOB] {
        let path = Path::new(STORE_DIR).join(name);
        let copied = File::open(&path).and_then(|mut file| io::copy(&mut file, &mut io::sink()));
        copied.trying(|| format!("cannot read {}", path.display()))?;
    }
    Ok(())
}

struct Measured {
    daemon: Option<i32>,
    mounts: Vec<Image>,
    traced: bool,
}

impl Measured {
    fn phases(&self, plan: &Plan) -> Result<CellResult> {
        let tracer = self.traced.then(|| Tracer::set_up(self.daemon)).transpose()?;
        let mount_cold = self.mount()?;
        let (cold, cold_trace) = self.traced_read(plan, tracer.as_ref())?;
        let held = self.daemon.map_or(Ok(Held::default()), meter::held)?;
        self.umount()?;
        drop_caches()?;
        let mount_present = self.mount()?;
        let (present, present_trace) = self.traced_read(plan, tracer.as_ref())?;
        self.umount()?;
        let stages = cold_trace.zip(present_trace).map(|(cold, present)| cold.stages(&present));
        Ok(CellResult { mount_cold, cold, mount_present, present, held, stages, ..CellResult::default() })
    }

    fn mount(&self) -> Result<Phase> {
        let (phase, ()) = self.measure(|_| {
            self.mounts.iter().try_for_each(|Image { source, options, on }| {
                mount(Some(&**source), on, Some("erofs"), MsFlags::MS_RDONLY, Some(&**options))
                    .trying(|| format!("cannot mount {source} ({options}) on {}", on.display()))
            })
        })?;
        Ok(phase)
    }

    fn umount(&self) -> Result<()> {
        let all = self.mounts.iter();
        all.map(|image| umount2(&image.on, MntFlags::empty())).collect::<nix::Result<()>>().trying(|| "cannot unmount an image")
    }

    fn traced_read(&self, plan: &Plan, tracer: Option<&Tracer>) -> Result<(Reading, Option<Trace>)> {
        tracer.map(Tracer::begin).transpose()?;
        let reading = self.read(plan)?;
        Ok((reading, tracer.map(Tracer::end).transpose()?))
    }

    fn read(&self, plan: &Plan) -> Result<Reading> {
        let (phase, reading) = self.measure(|began| Ok(plan.read(began)))?;
        Ok(Reading { phase, ..reading })
    }

    fn measure<T>(&self, work: impl FnOnce(Instant) -> Result<T>) -> Result<(Phase, T)> {
        let before = Snapshot::before(CACHE_DISK, STORE_DISK)?;
        let began = Instant::now();
        let result = work(began)?;
        let wall_ns = nanoseconds(began.elapsed());
        let after = Snapshot::after(CACHE_DISK, STORE_DISK)?;
        Ok((after.since(&before, wall_ns, self.daemon), result))
    }
}

/// The daemon, killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(service: &Service) -> Result<Option<Self>> {
        let Some((program, arguments)) = service.argv.split_first() else { return Ok(None) };
        let log = File::create(DAEMON_LOG).trying(|| format!("cannot write {DAEMON_LOG}"))?;
        let errors = log.try_clone().trying(|| format!("cannot write {DAEMON_LOG}"))?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
        let mut daemon = Self(command.spawn().trying(|| format!("cannot start {program}"))?);
        daemon.await_cache()?;
        std::thread::sleep(Duration::from_millis(service.settle_ms));
        Ok(Some(daemon))
    }

    /// Waits until the kernel lists an active cache: two lines of headings, then one a cache with its state in the
    /// sixth column (fscache_caches_seq_show, fs/fscache/cache.c).
    fn await_cache(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            let caches = fs::read_to_string("/proc/fs/fscache/caches").unwrap_or_default();
            if caches.lines().skip(2).any(|line| line.split_whitespace().nth(5) == Some("A")) {
                return Ok(());
            }
            let ended = self.0.try_wait().trying(|| "cannot wait for the daemon")?;
            if ended.is_some() || began.elapsed() > BIND_LIMIT {
                let log = fs::read_to_string(DAEMON_LOG).unwrap_or_default();
                return Err(LabError::Failed(format!("the daemon did not bind its cache; it said:\n{}", last_lines(&log, 20))));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
