//! `infill bench`: measurements, one command for each published table.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::Failure;
use crate::lab::bench::data::Data;
use crate::lab::bench::grid::{Grid, PEER_PROGRAM};
use crate::lab::bench::report::{Failed, Figures, tables};
use crate::lab::bench::{CACHE_DIR, Cell, CellResult, STORE_DIR, Scenario, cell, engine, naive};
use crate::lab::disk::CacheFs;
use crate::lab::init::INIT_PROGRAM;
use crate::lab::progress::Progress;
use crate::lab::{LabError, Result, Scratch, Trying, kernel, packages};
use crate::ops::exit;

/// What `infill bench` measures.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// What infill costs readers, beside other daemons, on a real kernel whose clock counts instructions
    Guest(Box<GuestArgs>),
    /// What the engine costs without a kernel that asks: requests a second, system calls a request
    Engine {
        /// End with the figures as one JSON object
        #[arg(long)]
        json: bool,
        /// Only one run with so many requests
        #[arg(long, hide = true)]
        pass: Option<u64>,
    },
    /// What readers notice when the daemon is killed and started anew, again and again, on a real kernel
    Restart(super::bench_restart::RestartArgs),
    /// One cell, inside a guest
    #[command(hide = true)]
    Cell,
    /// The daemon to compare with
    #[command(hide = true)]
    Naive {
        /// Where the kernel's cache is
        cache_dir: PathBuf,
        /// Where the blobs are
        store: PathBuf,
    },
}

/// Who can be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum DaemonKind {
    /// This program.
    Infill,
    /// A loop that brings exactly what is asked, one request at a time.
    Naive,
    /// No daemon: the image is mounted as a file (Linux 6.12 and later).
    File,
}

/// Flags of `infill bench guest`.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// End with the figures as one JSON object
    #[arg(long)]
    json: bool,
    /// The guest's kernel
    #[arg(long, default_value = kernel::SERIES[0], value_parser = kernel::SERIES)]
    kernel: String,
    /// File systems under the cache
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [CacheFs::Ext4, CacheFs::Xfs])]
    fs: Vec<CacheFs>,
    /// What is read
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Scenario::ALL)]
    scenario: Vec<Scenario>,
    /// Who serves
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [DaemonKind::Infill, DaemonKind::Naive])]
    daemon: Vec<DaemonKind>,
    /// One more daemon: a program of this machine and its arguments, in which {store} and {cache} stand for
    /// directories; it must stay in the foreground and serve the files of {store} by their names
    #[arg(long, value_name = "COMMAND")]
    peer: Option<String>,
    /// More flags for infill serve; several sets, each measured, by giving this several times
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    serve_flags: Vec<String>,
    /// Read this tree instead of files of this machine
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
    /// Time that the disks take for a request
    #[arg(long, value_name = "US", default_value_t = 50)]
    disk_latency_us: u64,
    /// Read the store's files into memory before the cold read
    #[arg(long)]
    warm_source: bool,
    /// Guests at a time; their clocks do not notice
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

/// Runs what was asked for.
///
/// # Errors
/// Something that is needed could not be had, or a cell failed.
pub fn run(bench: &Bench) -> std::result::Result<(), Failure> {
    let failed = |error| Failure::new(exit::FAILED, error);
    match bench {
        Bench::Guest(args) => guest(args),
        Bench::Engine { pass: Some(requests), .. } => engine::pass(*requests).map_err(failed),
        Bench::Engine { json, pass: None } => {
            let report = engine::measure(None, &["bench", "engine", "--pass"]).map_err(failed)?;
            print!("{}", report.table());
            if *json {
                let text = serde_json::to_string(&report).map_err(|error| Failure::new(exit::FAILED, error))?;
                println!("{text}");
            }
            Ok(())
        }
        Bench::Restart(args) => super::bench_restart::run(args),
        Bench::Cell => cell::run().map_err(failed),
        Bench::Naive { cache_dir, store } => match naive::serve(cache_dir, store) {
            Ok(never) => match never {},
            Err(error) => Err(failed(error)),
        },
    }
}

/// What `--json` shows.
#[derive(Serialize)]
struct Report {
    kernel: String,
    files: usize,
    bytes: u64,
    disk_latency_us: u64,
    warm_source: bool,
    cells: Vec<Figures>,
    failed: Vec<Failed>,
}

fn guest(args: &GuestArgs) -> std::result::Result<(), Failure> {
    let report = measure(args).map_err(|error| Failure::new(exit::FAILED, error))?;
    println!(
        "\nLinux {}, {} files ({:.1} MB), disks of {} us, {} sources, one CPU, one instruction a nanosecond",
        report.kernel,
        report.files,
        report.bytes as f64 / 1e6,
        report.disk_latency_us,
        if report.warm_source { "warm" } else { "cold" }
    );
    print!("{}", tables(&report.cells));
    for cell in &report.failed {
        println!("FAILED {} {} {}: {}", cell.daemon, cell.scenario.name(), cell.cache_fs.name(), cell.error);
    }
    if args.json {
        let text = serde_json::to_string(&report).map_err(|error| Failure::new(exit::FAILED, error))?;
        println!("{text}");
    }
    if report.failed.is_empty() {
        return Ok(());
    }
    Err(Failure::new(exit::FAILED, format!("{} cells failed; see above", report.failed.len())))
}

fn measure(args: &GuestArgs) -> Result<Report> {
    packages::ensure(packages::GUEST_TOOLS)?;
    let kernel = kernel::ensure(&args.kernel)?;
    let scratch = Scratch::make("bench")?;
    let progress = Progress::begin("making images and disks");
    let data = Data::make(scratch.path(), args.tree.as_deref())?;
    progress.finish(&format!("{} files, {:.1} MB", data.files, data.bytes as f64 / 1e6));
    let infill = std::env::current_exe().trying(|| "cannot find this program")?;
    let (daemons, peer) = daemons(args)?;
    let mut cells = Vec::new();
    for cache_fs in &args.fs {
        for scenario in &args.scenario {
            for (daemon, argv) in &daemons {
                let (daemon, argv) = (daemon.clone(), argv.clone());
                let disk_latency_ns = args.disk_latency_us * 1000;
                cells.push(Cell { daemon, argv, scenario: *scenario, cache_fs: *cache_fs, disk_latency_ns, warm_source: args.warm_source });
            }
        }
    }
    let grid = Grid { kernel: &kernel, infill: &infill, peer: peer.as_deref(), data: &data, cells };
    eprintln!("infill: {} boots of Linux {}, {} at a time", grid.cells.len(), kernel.version, args.jobs);
    let results = grid.run(scratch.path(), args.jobs, &watch);
    let mut report = Report {
        kernel: kernel.version.clone(),
        files: data.files,
        bytes: data.bytes,
        disk_latency_us: args.disk_latency_us,
        warm_source: args.warm_source,
        cells: Vec::new(),
        failed: Vec::new(),
    };
    for (cell, result) in grid.cells.iter().zip(&results) {
        match Figures::of(cell, result) {
            Ok(figures) => report.cells.push(figures),
            Err(failed) => report.failed.push(failed),
        }
    }
    Ok(report)
}

fn watch(cell: &Cell, result: &Result<CellResult>, took: Duration) {
    let said = Figures::of(cell, result).map_or_else(|failed| format!("FAILED: {}", failed.error), |figures| figures.line());
    eprintln!("infill: {} {} {}: {said} ({:.0} s)", cell.daemon, cell.scenario.name(), cell.cache_fs.name(), took.as_secs_f32());
}

/// A daemon's name in the tables, and its command line.
type Daemon = (String, Vec<String>);

/// Those who serve, and the peer's program.
fn daemons(args: &GuestArgs) -> Result<(Vec<Daemon>, Option<PathBuf>)> {
    let mut daemons: Vec<Daemon> = Vec::new();
    let own = |words: &[&str]| -> Vec<String> { [INIT_PROGRAM].iter().chain(words).map(|&word| word.to_owned()).collect() };
    for kind in &args.daemon {
        match kind {
            DaemonKind::Infill => {
                let store = format!("dir:{STORE_DIR}");
                let base = own(&["serve", "--front-end", "cachefiles", "--keep", "off", "--cache-dir", CACHE_DIR, "--store", &store]);
                let sets = if args.serve_flags.is_empty() { vec![String::new()] } else { args.serve_flags.clone() };
                for flags in sets {
                    let argv = base.iter().cloned().chain(flags.split_whitespace().map(str::to_owned)).collect();
                    daemons.push((format!("infill {flags}").trim_end().to_owned(), argv));
                }
            }
            DaemonKind::Naive => daemons.push(("naive".into(), own(&["bench", "naive", CACHE_DIR, STORE_DIR]))),
            DaemonKind::File => daemons.push(("file".into(), Vec::new())),
        }
    }
    let Some(command) = &args.peer else { return Ok((daemons, None)) };
    let mut words = command.split_whitespace();
    let name = words.next().ok_or_else(|| LabError::Failed("--peer: the command is empty".into()))?;
    let path = if name.contains('/') { Some(PathBuf::from(name)) } else { packages::find(name) };
    let path = path.filter(|path| path.is_file()).ok_or_else(|| LabError::Failed(format!("--peer: there is no program {name}")))?;
    let replaced = words.map(|word| word.replace("{store}", STORE_DIR).replace("{cache}", CACHE_DIR));
    let argv = [PEER_PROGRAM.to_owned()].into_iter().chain(replaced).collect();
    let name = Path::new(name).file_name().map_or_else(|| "peer".to_owned(), |name| name.to_string_lossy().into_owned());
    daemons.push((name, argv));
    Ok((daemons, Some(path)))
}
