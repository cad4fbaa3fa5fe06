//! Disks of the guest's memory whose requests complete after a time on the guest's own clock: null_blk, set up through
//! configfs (Documentation/block/null_blk.rst). A virtio disk would complete in the host's time, and the clock of a guest
//! that waits for it jumps.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use memmap2::MmapMut;
use nix::libc::O_DIRECT;
use nix::time::{ClockId, clock_gettime};

use super::CopyCost;
use crate::lab::{LabError, Result, Trying};

/// Blocks of the disks, as those of both file systems.
const BLOCK_BYTES: &str = "4096";
/// Where the kernel is told about them.
const CONFIG: &str = "/sys/kernel/config/nullb";
/// Unit and number of the requests that measure the cost of copying.
const COPY_BYTES: usize = 1 << 20;
const COPIES: u64 = 16;

/// Makes the disk `/dev/NAME`.
pub(super) fn make(name: &str, size_mib: u64, latency_ns: u64) -> Result<()> {
    let dir = Path::new(CONFIG).join(name);
    fs::create_dir(&dir).trying(|| format!("cannot make {}; does the kernel have CONFIG_BLK_DEV_NULL_BLK?", dir.display()))?;
    // Completion by a timer on the guest's clock (2), or at once by the caller (0).
    let mode = if latency_ns > 0 { "2" } else { "0" };
    let (size, latency) = (size_mib.to_string(), latency_ns.to_string());
    let settings = [
        ("size", &*size),
        ("blocksize", BLOCK_BYTES),
        ("memory_backed", "1"),
        ("submit_queues", "1"),
        ("hw_queue_depth", "128"),
        ("no_sched", "1"),
        ("irqmode", mode),
        ("completion_nsec", &*latency),
        ("power", "1"),
    ];
    for (setting, value) in settings {
        let path = dir.join(setting);
        fs::write(&path, value).trying(|| format!("cannot write {value} to {}", path.display()))?;
    }
    Ok(())
}

/// Writes the parts of a disk that [`crate::lab::disk::extents`] saved, and removes the file that held them.
pub(super) fn restore(extents: &Path, device: &Path) -> Result<()> {
    let what = || format!("cannot restore {} from {}", device.display(), extents.display());
    let mut from = BufReader::new(File::open(extents).trying(what)?);
    let to = OpenOptions::new().write(true).open(device).trying(what)?;
    let mut block = Vec::new();
    let mut head = [0; 16];
    while from.read_exact(&mut head).is_ok() {
        let number = u128::from_le_bytes(head);
        let (offset, len) = (number & u128::from(u64::MAX), number >> 64);
        let (Ok(offset), Ok(len)) = (u64::try_from(offset), usize::try_from(len)) else {
            return Err(LabError::Failed(format!("{} is not a list of extents", extents.display())));
        };
        block.resize(len, 0);
        from.read_exact(&mut block).trying(what)?;
        to.write_all_at(&block, offset).trying(what)?;
    }
    to.sync_all().trying(what)?;
    fs::remove_file(extents).trying(what)
}

/// What plain direct requests of 1 MiB to such a disk cost, in CPU time a byte: its own copying, the pinning of memory
/// and the way through the block layer. To a disk of its own.
pub(super) fn copy_cost() -> Result<CopyCost> {
    let name = "measured";
    make(name, 64, 0)?;
    let device = Path::new("/dev").join(name);
    let what = || format!("cannot measure {}", device.display());
    let file = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(&device).trying(what)?;
    let mut memory = MmapMut::map_anon(COPY_BYTES).trying(what)?;
    memory.fill(1);
    let per_byte = |request: &mut dyn FnMut(u64) -> std::io::Result<()>| -> Result<f64> {
        let began = own_cpu_ns()?;
        for n in 0..COPIES {
            request(n * COPY_BYTES as u64).trying(what)?;
        }
        let bytes = COPIES * COPY_BYTES as u64;
        Ok((own_cpu_ns()? - began) as f64 / bytes as f64)
    };
    let write_ns = per_byte(&mut |offset| file.write_all_at(&memory, offset))?;
    let read_ns = per_byte(&mut |offset| file.read_exact_at(&mut memory, offset))?;
    drop(file);
    let dir = Path::new(CONFIG).join(name);
    fs::remove_dir(&dir).trying(|| format!("cannot remove {}", dir.display()))?;
    Ok(CopyCost { read_ns, write_ns })
}

/// CPU time of this process so far.
pub(super) fn own_cpu_ns() -> Result<u64> {
    clock_ns(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

/// What a clock shows.
pub(super) fn clock_ns(clock: ClockId) -> Result<u64> {
    let time = clock_gettime(clock).trying(|| "cannot read a clock")?;
    let (seconds, rest) = (time.tv_sec().cast_unsigned(), time.tv_nsec().cast_unsigned());
    Ok(seconds * 1_000_000_000 + rest)
}
