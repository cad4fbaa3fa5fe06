//! `infill serve`: the daemon.

mod check;
mod control;
mod front;
pub(super) mod reload;
mod repair;
mod watchdog;

use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use self::control::Sockets;
use self::front::{CacheOf, Opened};
use self::reload::{Live, Reload};
use self::watchdog::Watchdog;
use super::Failure;
use crate::config::{self, Config, Given, Resolved};
use crate::control::Images;
use crate::engine::placement::{self, Seat};
use crate::engine::room::NoRoom;
use crate::engine::stats::Snapshot;
use crate::engine::trace::Tracer;
use crate::engine::{Engine, EngineError, Settings};
use crate::front::FrontEnd;
use crate::mount::{BlobCache, Service, ServiceSettings};
use crate::ops::confine::{self, Kept, Mode, User};
use crate::ops::keep::Keep;
use crate::ops::limits::Raised;
use crate::ops::seeding::{Fate, Seeding, seed_key};
use crate::ops::signals::{Event, Signals};
use crate::ops::space::{self, Steward, Volumes};
use crate::ops::status::{Look, Statistics};
use crate::ops::{erofs, exit, limits, log, notify};
use crate::store::remembered::Remembered;
use crate::store::{Store, StoreSpec, Stores};

/// How long the printing of traced requests may take after the engine has stopped.
const PRINT_MAX: Duration = Duration::from_secs(2);
/// Pause between two looks at whether it has ended.
const PRINT_POLL: Duration = Duration::from_millis(5);

/// Flags of `infill serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Settings file [default: /etc/infill/config.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "INFILL_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: Given,
    /// Print a line for each answered read
    #[arg(long)]
    trace_requests: bool,
    /// Print statistics as one JSON object at the end
    #[arg(long)]
    json: bool,
    /// Replace mounts from files that outlived an earlier daemon and its keepers, as infill repair does
    #[arg(long)]
    repair: bool,
    /// Check the settings, that the stores, the user and the group exist, print nothing if all is good, and end
    #[arg(long)]
    check_config: bool,
    /// The socket of the model kernel: 0, standard input (for tests)
    #[arg(long, hide = true, value_name = "FD")]
    sim_socket: Option<i32>,
}

/// Serves until a signal says stop.
///
/// # Errors
/// Whatever keeps it from serving, with the exit code that says what kind it is.
pub fn run(args: ServeArgs) -> Result<(), Failure> {
    let ServeArgs { config: file, options, trace_requests, json, repair, check_config, sim_socket } = args;
    let settings = options.settings(file.as_deref()).and_then(Resolved::with_store);
    let settings = settings.map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
    let config = settings.config.clone();
    if check_config {
        return check::check(&config);
    }
    let mut reload = Reload::new(file.clone(), options, &settings);
    log::start(config.log_level, config.log_format);
    // Before the first thread, so that all of them leave signals to this one.
    let signals = Signals::block().map_err(|error| Failure::new(exit::FAILED, format!("cannot receive signals: {error}")))?;
    let raised = limits::raise().map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
    tracing::debug!(fds = raised.fds, "limits raised");
    if erofs::runs_from_erofs() {
        let message =
            "this program lies on EROFS, perhaps on an image that it would have to serve to itself; run a copy from another file system";
        return Err(Failure::new(exit::BAD_CONFIGURATION, message));
    }
    let mut passed = notify::passed();
    let mut watchdog = Watchdog::from_env();
    let claimed = front::claim(&config)?;
    // With the rights of whoever starts it, and before anything is taken from the kernel.
    let sockets = Sockets::open(&config, &mut passed)?;
    let user = become_user(&config)?;
    let store = open_stores(&config)?;
    let mut opened = Opened::new(&config, claimed, passed, sim_socket)?;
    let remembered = Arc::new(Remembered::open(&config.cache_dir));
    remembered.tidy();
    let seeded_bytes = if opened.device.is_some() { seed(&config, &*store, &remembered) } else { 0 };
    // What it looks up on this host cannot be read later.
    let cache = opened.cache(&config);
    let seats = placement::seats();
    // It does what this process will not be permitted, and waits for it.
    let repairing = if repair { repair::start(&config, file.as_deref(), &opened)? } else { None };
    let store = confine_to(&config, file.as_deref(), user.as_ref(), store)?;
    let space = space::Settings { cache_dir: config.cache_dir.clone(), limits: opened.limits, budget_bytes: config.cache_bytes };
    let (steward, no_room) = start_steward(space, cache)?.unzip();
    if user.is_some() {
        confine::drop_cache_powers().map_err(|why| Failure::new(exit::FAILED, format!("cannot give up capabilities: {why}")))?;
    }
    let (tracer, printer) = start_tracer(trace_requests)?;
    let leave_rest = is_kept(opened.keep.as_ref());
    let settings = Settings { tracer, no_room, remembered, leave_rest, ..engine_settings(&config, raised, seats)? };
    let engine = start_engine(&opened.fronts, &store, &settings)?;
    seal(&config);
    let mounts = start_mounts(&config, &opened, &engine, store)?;
    let look = Look::new(opened.front().name(), engine.started(), engine.observer())
        .with_space(steward.as_ref().map(Steward::watch))
        .with_blobs(opened.blobs.clone())
        .after(opened.restored, seeded_bytes);
    let images = mounts.clone().map(|mounts| mounts as Arc<dyn Images>);
    sockets.serve(control::daemon(look.clone(), reload.shown(), images))?;
    repairing.map_or(Ok(()), repair::attend).map_err(|error| Failure::new(exit::FAILED, format!("no thread: {error}")))?;
    announce(&config, &opened, &engine);
    let live = Live { engine: engine.entry(), steward: steward.as_ref(), mounts: mounts.as_deref() };
    let result = serve(engine, &look, &live, &mut reload, &signals, &mut opened, watchdog.as_mut());
    // While it looks at a file, that is not idle.
    steward.into_iter().for_each(Steward::stop);
    if let Some(mounts) = mounts {
        mounts.end();
        opened.give_up_if_idle();
    }
    finish(printer);
    // If nobody else keeps the device, the kernel now fails what still waits, and unbinds.
    drop(opened);
    report(&look, result, json)
}

fn open_stores(config: &Config) -> Result<Arc<dyn Store>, Failure> {
    let stores = Stores::from_specs(&config.stores, config.source).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
    Ok(Arc::new(stores))
}

/// Shares the blobs that are configured with the cache: after binding, when the cache is checked and ours, and before
/// requests are answered. Whatever cannot be shared is read on demand, so nothing here keeps it from serving. Gives how many
/// bytes came by it.
fn seed(config: &Config, store: &dyn Store, remembered: &Remembered) -> u64 {
    let mut seeded_bytes = 0;
    for key in &config.seed {
        let Seeding { fate, len_bytes, .. } = seed_key(store, &config.cache_dir, remembered, key);
        match fate {
            Fate::Seeded => {
                seeded_bytes += len_bytes;
                tracing::info!(blob = %key, bytes = len_bytes, "seeded: shared with the cache");
            }
            Fate::AlreadyThere => tracing::debug!(blob = %key, "not seeded: it is in the cache already"),
            Fate::Refused(why) | Fate::Failed(why) => tracing::warn!(blob = %key, "not seeded, it is read on demand: {why}"),
        }
    }
    seeded_bytes
}

/// The capabilities stay until the device is bound.
fn become_user(config: &Config) -> Result<Option<User>, Failure> {
    let Some(account) = &config.user else { return Ok(None) };
    let user = User::find(account).and_then(|user| user.become_it().map(|()| user));
    user.map(Some).map_err(|error| Failure::new(error.exit_code(), error))
}

/// Gives up what serving does not need, before there is a second thread. Gives the stores, opened again as whom and
/// with what is left: what the daemon will not be able to read shows now.
fn confine_to(config: &Config, file: Option<&Path>, user: Option<&User>, before: Arc<dyn Store>) -> Result<Arc<dyn Store>, Failure> {
    drop(before);
    let mut readable: Vec<_> = config.stores.iter().map(StoreSpec::path).collect();
    // For SIGHUP. Not only the file that is there now: who changes it may put another one in its place.
    readable.push(config::directory(file));
    let writable = [config.cache_dir.as_path()];
    let kept = Kept { user, readable: &readable, writable: &writable };
    let parts = confine::confine(config.confine, &kept).map_err(|error| Failure::new(error.exit_code(), error))?;
    confine::announce(config.confine, user, &parts);
    open_stores(config)
}

/// After the engine has made its rings.
fn seal(config: &Config) {
    if config.confine != Mode::Off
        && let Err(why) = confine::calls::seal()
    {
        tracing::warn!("rings can still be made, which seccomp was to prevent: {why}");
    }
}

fn start_tracer(wanted: bool) -> Result<(Option<Tracer>, Option<JoinHandle<()>>), Failure> {
    if !wanted {
        return Ok((None, None));
    }
    let out = std::io::LineWriter::new(std::io::stdout());
    let (tracer, printer) = Tracer::start(out).map_err(|error| Failure::new(exit::FAILED, format!("cannot trace requests: {error}")))?;
    Ok((Some(tracer), Some(printer)))
}

/// Starts to look after the space of a cache.
fn start_steward(settings: space::Settings, cache: Option<CacheOf>) -> Result<Option<(Steward, NoRoom)>, Failure> {
    let Some(cache) = cache else { return Ok(None) };
    let start = || {
        let no_room = NoRoom::new()?;
        let dir = settings.cache_dir.clone();
        let steward = match cache {
            CacheOf::Device { device, may_cull, lists } => {
                Steward::start(settings, move || Volumes::new(&dir, device, may_cull, lists), no_room.clone())
            }
            CacheOf::Blobs(blobs) => {
                blobs.ring_for_room(no_room.clone());
                Steward::start(settings, move || BlobCache::new(blobs), no_room.clone())
            }
        };
        Ok((steward?, no_room))
    };
    start().map(Some).map_err(|error: std::io::Error| Failure::new(exit::FAILED, format!("cannot look after the cache's space: {error}")))
}

/// What the engine's settings are by the operator's.
fn engine_settings(config: &Config, raised: Raised, seats: Vec<Seat>) -> Result<Settings, Failure> {
    let fd_budget =
        limits::fd_budget(config.fd_budget, raised, config.shards).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))?;
    Ok(Settings {
        shards: config.shards,
        seats,
        kind: config.engine,
        window: config.window,
        completion: config.completion,
        slot_bytes: config.slot_bytes,
        slots: config.slots,
        workers: config.workers,
        fd_budget,
        open_timeout: config.open_timeout,
        request_timeout: config.request_timeout,
        tracer: None,
        no_room: None,
        remembered: Arc::default(),
        leave_rest: false,
    })
}

fn start_engine(fronts: &[Arc<dyn FrontEnd>], store: &Arc<dyn Store>, settings: &Settings) -> Result<Engine, Failure> {
    Engine::start_all(fronts, store, settings).map_err(|error| {
        let code = if matches!(error, EngineError::NoRing(_)) { exit::UNAVAILABLE } else { exit::FAILED };
        Failure::new(code, error)
    })
}

/// Looks after images that are mounted from files.
fn start_mounts(config: &Config, opened: &Opened, engine: &Engine, store: Arc<dyn Store>) -> Result<Option<Arc<Service>>, Failure> {
    let Some(blobs) = &opened.blobs else { return Ok(None) };
    let patience = config.open_timeout + config.request_timeout;
    let asked_for_metadata = opened.mounts.asked_for_metadata;
    let settings = ServiceSettings { patience, read_ahead_bytes: config.read_ahead.bytes(), asked_for_metadata };
    let service = Arc::new(Service::new(Arc::clone(blobs), engine.entry(), store, settings, &opened.mounts.mounted));
    for error in blobs.resume(&engine.entry(), service.store(), patience) {
        tracing::error!("its readers get I/O errors: {error}");
    }
    service.watch().map_err(|error| Failure::new(exit::FAILED, format!("cannot look after mounted images: {error}")))?;
    Ok(Some(service))
}

/// Whether somebody has the device when this process ends.
fn is_kept(keep: Option<&Keep>) -> bool {
    keep.is_some_and(|keep| keep.by().is_some())
}

/// Says that requests are being answered: in the log, to the service manager, and on standard output for whoever waits
/// for it.
fn announce(config: &Config, opened: &Opened, engine: &Engine) {
    let (front, keep, started) = (opened.front(), opened.keep.as_ref(), engine.started());
    if started.kind == "blocking" && started.detail != "as set" {
        tracing::warn!("serving with blocking threads: {}", started.detail);
    }
    let stores: Vec<_> = config.stores.iter().map(ToString::to_string).collect();
    let caps = front.caps();
    tracing::info!(
        front_end = front.name(),
        cache = %config.cache_dir.display(),
        stores = stores.join(","),
        shards = started.shards,
        engine = started.kind,
        detail = started.detail,
        buffers = %started.pages,
        reopens = caps.reopens,
        metadata = opened.blobs.as_ref().map(|_| if opened.mounts.asked_for_metadata { "on demand" } else { "whole" }),
        kept_by = keep.and_then(Keep::by).unwrap_or("nobody"),
        "serving"
    );
    if opened.blobs.is_none() && !caps.reopens {
        tracing::warn!(
            "this kernel cannot repeat requests to a new daemon, so the device is not kept: if infill ends, for whatever reason, mounted images give I/O errors until they are mounted anew; Linux 6.1.95, 6.6.35 and 6.8 can"
        );
    }
    keep.inspect(|keep| keep.ready());
    // Nobody listening is fine.
    let _ = writeln!(std::io::stdout(), "infill: ready ({}, {} x {})", front.name(), started.shards, started.kind);
}

/// Waits for signals, for the engine or a keeper to die.
fn serve(
    engine: Engine,
    look: &Look,
    live: &Live<'_>,
    reload: &mut Reload,
    signals: &Signals,
    opened: &mut Opened,
    mut watchdog: Option<&mut Watchdog>,
) -> Result<Snapshot, EngineError> {
    while !engine.has_failed() {
        if wait_for(signals, &engine, opened.keep.as_ref(), watchdog.as_deref().map(Watchdog::due_in)) {
            opened.renew();
            engine.leave_rest(is_kept(opened.keep.as_ref()));
        }
        watchdog.iter_mut().for_each(|watchdog| watchdog.look(opened.front().name(), &engine));
        match signals.next() {
            Some(Event::Stop) => {
                tracing::info!("stopping: finishing the reads that have begun; a second signal ends at once");
                break;
            }
            Some(Event::Report) => tracing::info!("{}", json_text(&look.statistics())),
            Some(Event::Reload) => {
                opened.keep.iter().for_each(Keep::reloading);
                reload.reload(live);
                opened.keep.iter().for_each(Keep::ready);
            }
            None => {}
        }
    }
    opened.keep.iter().for_each(Keep::stopping);
    if !opened.blobs.as_ref().is_some_and(|blobs| blobs.is_idle()) {
        say_what_becomes(engine.snapshot().objects, opened.keep.as_ref());
    }
    engine.stop(reload.drain_timeout, || signals.next() == Some(Event::Stop))
}

/// Says what becomes of images that are mounted when the daemon ends.
fn say_what_becomes(objects: u64, keep: Option<&Keep>) {
    match keep.and_then(Keep::by) {
        Some(by) => tracing::info!(
            objects,
            "images stay mounted, because {by} keeps the device: what is asked from now on waits until infill serves again (`infill release` gives it up)"
        ),
        None if objects > 0 => tracing::warn!(
            objects,
            "images are still mounted: what they have not read yet gives I/O errors until infill serves again and they are mounted anew"
        ),
        None => {}
    }
}

/// Waits until there is something to do, for so long at most; `true`: a keeper has died.
fn wait_for(signals: &Signals, engine: &Engine, keep: Option<&Keep>, at_most: Option<Duration>) -> bool {
    let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(engine.ended(), PollFlags::POLLIN)];
    fds.extend(keep.into_iter().flat_map(Keep::watch).map(|keeper| PollFd::new(keeper, PollFlags::POLLIN)));
    // An interrupted wait is looked at like any other.
    let _ = poll(&mut fds, at_most.map_or(PollTimeout::NONE, rounded_up));
    fds.iter().skip(2).any(|fd| fd.any().unwrap_or(false))
}

/// Not a moment too short, which would wait again and again.
fn rounded_up(time: Duration) -> PollTimeout {
    PollTimeout::try_from(time + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
}

/// Waits until all traced requests are printed. Not for ever: a shard that hangs keeps its tracer, and whoever
/// reads standard output may have stopped reading.
fn finish(printer: Option<JoinHandle<()>>) {
    let started = Instant::now();
    while printer.as_ref().is_some_and(|printer| !printer.is_finished()) && started.elapsed() < PRINT_MAX {
        std::thread::sleep(PRINT_POLL);
    }
}

fn report(look: &Look, result: Result<Snapshot, EngineError>, json: bool) -> Result<(), Failure> {
    let snapshot = result.map_err(|error| Failure::new(exit::FAILED, error))?;
    let Snapshot { bytes_mapped, bytes_direct, bytes_buffered, bytes_zero, .. } = snapshot;
    tracing::info!(bytes_mapped, bytes_direct, bytes_buffered, bytes_zero, "where the cache's bytes came from");
    tracing::info!(reads = snapshot.needs, failed = snapshot.needs_failed, bytes = snapshot.bytes_filled, "stopped");
    if json {
        let _ = writeln!(std::io::stdout(), "{}", json_text(&look.with_counts(snapshot)));
    }
    Ok(())
}

/// What `--json` and `SIGUSR1` show.
fn json_text(statistics: &Statistics) -> String {
    serde_json::to_string(statistics).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
}
