//! `infill demo`: the whole way on this machine, with numbers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::{Failure, print_json};
use crate::front::cachefiles::{BindOptions, Device};
use crate::lab::demo::{self, Report, Way};
use crate::lab::disk::{self, CacheFs};
use crate::lab::guest::GuestPlan;
use crate::lab::init::{BEGIN_MARK, EXIT_MARK, INIT_PROGRAM, KERNEL_MARK};
use crate::lab::progress::Progress;
use crate::lab::qemu::Ending;
use crate::lab::{LabError, Result, Scratch, Trying, kernel, packages, qemu};
use crate::mount::Blobs;
use crate::ops::exit;

/// How long the guest may take.
const GUEST_LIMIT: Duration = Duration::from_secs(900);
/// Room on the guest's store disk beside the data.
const DISK_SLACK_BYTES: u64 = 64 << 20;
/// Every result in the guest begins like this.
const REPORT_START: &str = "{\"front_end\"";

/// Flags of `infill demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Use a guest with cachefiles on-demand mode even if this machine's own kernel could do it
    #[arg(long)]
    guest: bool,
    /// End with the result as one JSON object
    #[arg(long)]
    json: bool,
    /// The guest's kernel
    #[arg(long, default_value = kernel::SERIES[0], value_parser = kernel::SERIES)]
    kernel: String,
    /// The file system under the guest's cache
    #[arg(long, value_enum, default_value_t = CacheFs::Ext4)]
    cache_fs: CacheFs,
    /// Only the job itself, with this kernel and the data in --data
    #[arg(long, hide = true, requires = "data", requires = "cache_dir")]
    here: bool,
    /// What --here serves
    #[arg(long, hide = true, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where --here has its cache
    #[arg(long, hide = true, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

/// Shows infill at work.
///
/// # Errors
/// Something that is needed could not be had, or the data read was not the data packed.
pub fn run(args: &DemoArgs) -> std::result::Result<(), Failure> {
    let report = show(args).map_err(|error| Failure::new(exit::FAILED, error))?;
    if args.json {
        print_json(&report)?;
    }
    if report.verdict == "equal" {
        return Ok(());
    }
    Err(Failure::new(exit::FAILED, format!("the data read is not the data packed: {}", report.verdict)))
}

fn show(args: &DemoArgs) -> Result<Report> {
    if let (true, Some(data), Some(cache_dir)) = (args.here, &args.data, &args.cache_dir) {
        return demo::serve_and_read(Way::Cachefiles, data, cache_dir);
    }
    let scratch = Scratch::make("demo")?;
    let here = if args.guest { None } else { way_here(&scratch.path().join("probe")) };
    packages::ensure(if here.is_some() { packages::IMAGE_TOOLS } else { packages::GUEST_TOOLS })?;
    let progress = Progress::begin("packing files of this machine into an EROFS image");
    let data = scratch.path().join("data");
    let manifest = demo::prepare(&data, scratch.path())?;
    progress.finish(&format!("{} files, {} MiB", manifest.entries.len(), manifest.len_bytes() >> 20));
    let report = match here {
        Some(way) => demo::serve_and_read(way, &data, &scratch.path().join("cache"))?,
        None => in_guest(args, &data, manifest.len_bytes(), scratch.path())?,
    };
    print!("\n{}", report.table());
    Ok(report)
}

/// What this kernel has and lets us use, by trying.
fn way_here(probe: &Path) -> Option<Way> {
    fs::create_dir_all(probe).ok()?;
    let not_cachefiles = match Device::bind(&BindOptions::new(probe)) {
        Ok(_device) => return Some(Way::Cachefiles),
        Err(error) => error,
    };
    match Blobs::new(probe, 1) {
        Ok(_groups) => Some(Way::Fanotify),
        Err(error) => {
            eprintln!("infill: not with this machine's kernel ({not_cachefiles}; {error}); using a guest");
            None
        }
    }
}

fn in_guest(args: &DemoArgs, data: &Path, len_bytes: u64, scratch: &Path) -> Result<Report> {
    let kernel = kernel::ensure(&args.kernel)?;
    let accelerator = qemu::accelerator(&kernel.image)?;
    let store_disk = scratch.join("store.img");
    disk::ext4(&store_disk, len_bytes * 5 / 4 + DISK_SLACK_BYTES, Some(data))?;
    let infill = std::env::current_exe().trying(|| "cannot find this program")?;
    let argv = [INIT_PROGRAM, "demo", "--here", "--json", "--data", "/store", "--cache-dir", "/cache/infill"];
    let plan = GuestPlan {
        kernel: &kernel,
        infill: &infill,
        programs: &[],
        files: &[],
        cache_fs: args.cache_fs,
        store_disk: &store_disk,
        argv: argv.map(str::to_owned).into(),
        total_limit: GUEST_LIMIT,
    };
    let machine = plan.build(scratch)?;
    let how = if accelerator == qemu::Accelerator::Tcg { "emulated, so slow" } else { "with KVM" };
    eprintln!("infill: booting Linux {} in QEMU ({how}), the cache on {}", kernel.version, args.cache_fs.name());
    let mut console = Console::default();
    let ending = machine.run(accelerator, &mut |line| console.line(line))?;
    let mut report = console.report(&ending)?;
    accelerator.name().clone_into(&mut report.accelerator);
    report.cache_fs = Some(args.cache_fs.name().to_owned());
    Ok(report)
}

/// Shows what the job in the guest prints, and catches its result.
#[derive(Default)]
struct Console {
    begun: bool,
    ended: bool,
    lines: Vec<String>,
    report: Option<Report>,
}

impl Console {
    fn line(&mut self, line: &str) -> bool {
        if line == BEGIN_MARK {
            self.begun = true;
        } else if line.starts_with(REPORT_START) {
            self.report = serde_json::from_str(line).ok();
        } else if line.starts_with(EXIT_MARK) {
            self.ended = true;
        } else if self.begun && !self.ended && !line.is_empty() && !line.starts_with(KERNEL_MARK) {
            println!("{line}");
        }
        self.lines.push(line.to_owned());
        self.begun
    }

    fn report(self, ending: &Ending) -> Result<Report> {
        let console = self.lines.join("\n");
        self.report.ok_or_else(|| {
            let tail = crate::lab::last_lines(&console, 40);
            LabError::Failed(format!("the guest gave no result ({ending}); its console ended with:\n{tail}"))
        })
    }
}
