//! `infill bench guest`: daemons beside each other on a real kernel.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::cli::{Failure, print_json};
use crate::lab::bench::data::Data;
use crate::lab::bench::figures::{Failed, Figures};
use crate::lab::bench::grid::Grid;
use crate::lab::bench::peer::{Peer, Profile};
use crate::lab::bench::report::{stage_tables, tables};
use crate::lab::bench::{BLOB, CACHE_DIR, Cell, CellResult, DOMAIN, IMAGE, STORE_BESIDE_CACHE, STORE_DIR, Scenario, Service, targets};
use crate::lab::disk::CacheFs;
use crate::lab::init::INIT_PROGRAM;
use crate::lab::progress::Progress;
use crate::lab::{Result, Scratch, Trying, kernel, packages};
use crate::ops::exit;

/// Who can be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum DaemonKind {
    /// This program.
    Infill,
    /// A loop that brings exactly what is asked, one request at a time.
    Naive,
    /// The same loop, but at the first request for a blob it brings all of it.
    All,
    /// This program with the blobs' blocks shared with the cache before the mount; only where the cache is on XFS.
    Seeded,
    /// No daemon: the image is mounted as a file (Linux 6.12 and later).
    File,
}

/// Flags of `infill bench guest`.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// End with the figures as one JSON object
    #[arg(long)]
    json: bool,
    /// Fail if a target is missed; they are those of Linux 6.12, the bench's own tree and disks of 50 us
    #[arg(long, conflicts_with_all = ["tree", "disk_latency_us", "cpus", "stages", "warm_source"])]
    check: bool,
    /// The guest's kernel
    #[arg(long, default_value = kernel::SERIES[0], value_parser = kernel::SERIES)]
    kernel: String,
    /// File systems under the cache
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [CacheFs::Ext4, CacheFs::Xfs])]
    fs: Vec<CacheFs>,
    /// What is read
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Scenario::USUAL)]
    scenario: Vec<Scenario>,
    /// Who serves
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [DaemonKind::Infill, DaemonKind::Naive, DaemonKind::All, DaemonKind::Seeded, DaemonKind::File])]
    daemon: Vec<DaemonKind>,
    /// One more daemon: a program of this machine and its arguments, in which {store} and {cache} stand for
    /// directories; it must stay in the foreground and serve the files of {store} by their names
    #[arg(long, value_name = "COMMAND")]
    peer: Vec<String>,
    /// One more daemon as a TOML file describes it, with its own programs, files and images; see benches/peers
    #[arg(long, value_name = "FILE")]
    peer_profile: Vec<PathBuf>,
    /// More flags for infill serve; several sets, each measured, by giving this several times
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    serve_flags: Vec<String>,
    /// Read this tree instead of the generated one
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
    /// Time that the disks take for a request
    #[arg(long, value_name = "US", default_value_t = 50)]
    disk_latency_us: u64,
    /// Read the store's files into memory before the cold read
    #[arg(long)]
    warm_source: bool,
    /// Processors of the guest. With more than one its clock is the host's: only ratios say something, of several runs,
    /// one guest at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// How often everything is measured, all daemons in turn
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: usize,
    /// Trace where the CPU time goes; times are longer then
    #[arg(long, conflicts_with = "cpus")]
    stages: bool,
    /// Guests at a time; their clocks do not notice
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

/// What `--json` shows.
#[derive(Serialize)]
struct Report {
    kernel: String,
    files: usize,
    bytes: u64,
    disk_latency_us: u64,
    warm_source: bool,
    cpus: u32,
    cells: Vec<Figures>,
    failed: Vec<Failed>,
    /// Targets that were missed.
    missed: Vec<String>,
}

/// Measures and shows.
///
/// # Errors
/// Something that is needed could not be had, a cell failed, or with `--check` a target was missed.
pub(super) fn run(args: &GuestArgs) -> std::result::Result<(), Failure> {
    let report = measure(args).map_err(|error| Failure::new(exit::FAILED, error))?;
    let clock = if args.cpus == 1 { "one instruction a nanosecond" } else { "the host's clock: compare, do not quote" };
    println!(
        "\nLinux {}, {} files ({:.1} MB), disks of {} us, {} sources, {} CPU, {clock}",
        report.kernel,
        report.files,
        report.bytes as f64 / 1e6,
        report.disk_latency_us,
        if report.warm_source { "warm" } else { "cold" },
        report.cpus
    );
    let with_targets = args.tree.is_none() && args.cpus == 1 && !args.stages && args.kernel == kernel::SERIES[0];
    print!("{}{}", tables(&report.cells, with_targets), stage_tables(&report.cells));
    println!();
    for missed in report.missed.iter().filter(|_| with_targets) {
        println!("MISSED {missed}");
    }
    for cell in &report.failed {
        println!("FAILED {} {} {}: {}", cell.daemon, cell.scenario.name(), cell.cache_fs.name(), cell.error);
    }
    if args.json {
        print_json(&report)?;
    }
    if !report.failed.is_empty() {
        return Err(Failure::new(exit::FAILED, format!("{} cells failed; see above", report.failed.len())));
    }
    if args.check && !report.missed.is_empty() {
        return Err(Failure::new(exit::FAILED, format!("{} targets were missed; see above", report.missed.len())));
    }
    Ok(())
}

fn measure(args: &GuestArgs) -> Result<Report> {
    packages::ensure(packages::GUEST_TOOLS)?;
    let kernel = kernel::ensure(&args.kernel)?;
    let scratch = Scratch::make("bench")?;
    let progress = Progress::begin("making images and disks");
    let data = Data::make(scratch.path(), args.tree.as_deref(), args.scenario.contains(&Scenario::Many8))?;
    let profiles = profiles(args)?;
    let peers = profiles.iter().map(|profile| profile.prepare(&data, scratch.path())).collect::<Result<Vec<Peer>>>()?;
    progress.finish(&format!("{} files, {:.1} MB", data.files, data.bytes as f64 / 1e6));
    let infill = std::env::current_exe().trying(|| "cannot find this program")?;
    let grid = Grid { kernel: &kernel, infill: &infill, peers: &peers, data: &data, cells: cells(args, &profiles) };
    let jobs = if args.cpus == 1 { args.jobs } else { 1 };
    eprintln!("infill: {} boots of Linux {}, {jobs} at a time", grid.cells.len(), kernel.version);
    let results = grid.run(scratch.path(), jobs, &watch);
    let (mut cells, mut failed) = (Vec::new(), Vec::new());
    for (cell, result) in grid.cells.iter().zip(&results) {
        match Figures::of(cell, result) {
            Ok(figures) => cells.push(figures),
            Err(failure) => failed.push(failure),
        }
    }
    Ok(Report {
        kernel: kernel.version.clone(),
        files: data.files,
        bytes: data.bytes,
        disk_latency_us: args.disk_latency_us,
        warm_source: args.warm_source,
        cpus: args.cpus,
        missed: targets::missed(&cells),
        cells,
        failed,
    })
}

fn watch(cell: &Cell, result: &Result<CellResult>, took: Duration) {
    let said = Figures::of(cell, result).map_or_else(|failed| format!("FAILED: {}", failed.error), |figures| figures.line());
    let (daemon, scenario, fs) = (&cell.service.name, cell.scenario.name(), cell.cache_fs.name());
    eprintln!("infill: {daemon} {scenario} {fs}: {said} ({:.0} s)", took.as_secs_f32());
}

fn profiles(args: &GuestArgs) -> Result<Vec<Profile>> {
    let commands = args.peer.iter().map(|command| Profile::of_command(command));
    commands.chain(args.peer_profile.iter().map(|path| Profile::load(path))).collect()
}

/// All cells. Daemons are next to each other, so that what changes with time on the host meets all of them alike.
fn cells(args: &GuestArgs, profiles: &[Profile]) -> Vec<Cell> {
    let own = args.daemon.iter().flat_map(|kind| services(*kind, args));
    let peers = profiles.iter().enumerate().map(|(index, profile)| (profile.service(index), profile.serves_any_image()));
    let services: Vec<(Service, bool)> = own.map(|service| (service, true)).chain(peers).collect();
    let mut cells = Vec::new();
    for run in 0..args.repeat {
        for &cache_fs in &args.fs {
            for &scenario in &args.scenario {
                let able = |(service, any_image): &&(Service, bool)| {
                    let shares_blocks = cache_fs == CacheFs::Xfs || !service.store_beside_cache;
                    shares_blocks && (scenario != Scenario::Many8 || (*any_image && !service.store_beside_cache))
                };
                for (service, _) in services.iter().filter(able) {
                    let (service, disk_latency_ns) = (service.clone(), args.disk_latency_us * 1000);
                    let (warm_source, cpus, traced) = (args.warm_source, args.cpus, args.stages);
                    cells.push(Cell { service, scenario, cache_fs, disk_latency_ns, warm_source, cpus, run, traced });
                }
            }
        }
    }
    cells
}

fn services(kind: DaemonKind, args: &GuestArgs) -> Vec<Service> {
    let own = |words: &[&str]| -> Vec<String> { [INIT_PROGRAM].iter().chain(words).map(|&word| word.to_owned()).collect() };
    let serve = |store: &str| {
        own(&["serve", "--front-end", "cachefiles", "--keep", "off", "--cache-dir", CACHE_DIR, "--store", &format!("dir:{store}")])
    };
    match kind {
        DaemonKind::Infill if args.serve_flags.is_empty() => vec![Service::own(targets::INFILL, serve(STORE_DIR))],
        DaemonKind::Infill => {
            let with = |flags: &String| {
                let argv = serve(STORE_DIR).into_iter().chain(flags.split_whitespace().map(str::to_owned)).collect();
                Service::own(format!("{} {flags}", targets::INFILL).trim_end(), argv)
            };
            args.serve_flags.iter().map(with).collect()
        }
        DaemonKind::Naive => vec![Service::own("naive", own(&["bench", "naive", CACHE_DIR, STORE_DIR]))],
        DaemonKind::All => vec![Service::own(targets::ALL, own(&["bench", "naive", CACHE_DIR, STORE_DIR, "--all"]))],
        DaemonKind::Seeded => {
            let mut argv = serve(STORE_BESIDE_CACHE);
            argv.extend(["--seed".to_owned(), format!("{DOMAIN}/{IMAGE},{DOMAIN}/{BLOB}")]);
            vec![Service { store_beside_cache: true, ..Service::own(targets::SEEDED, argv) }]
        }
        DaemonKind::File => vec![Service::own("file", Vec::new())],
    }
}
