//! What an event costs that needs nothing but an answer: random reads of a blob's file, by itself, in the page cache, of which
//! only the last page is missing, so that it is still watched.

use std::path::PathBuf;

use super::ground::{Ground, Infill, ONE, ONE_BYTES, cpu_ns, prime};
use super::load::{PAGE_BYTES, Until, read_randomly};
use super::peer::{self, Kind};
use super::samples::Samples;
use super::{Plan, Section, Subject, failed};
use crate::lab::Result;
use crate::lab::bench::daemon::Daemon;
use crate::lab::progress::Progress;

/// Pages that are read: all but the last.
pub(super) const PAGES: u64 = ONE_BYTES / PAGE_BYTES - 1;
/// Only what is asked for is brought, so that the last page stays missing.
pub(super) const NO_MORE: [&str; 2] = ["--window=4K", "--complete=off"];

/// Who answers for a file.
enum Server {
    Nobody,
    Infill(Infill),
    Peer(Daemon),
}

impl Server {
    fn cpu_ns(&self) -> Result<u64> {
        match self {
            Self::Nobody => Ok(0),
            Self::Infill(infill) => infill.cpu_ns(),
            Self::Peer(daemon) => cpu_ns(daemon),
        }
    }

    fn end(self) -> Result<()> {
        match self {
            Self::Nobody => Ok(()),
            Self::Infill(infill) => infill.end().map(drop),
            Self::Peer(daemon) => peer::end(daemon).map(drop),
        }
    }
}

/// Measures.
pub(super) fn measure(plan: &Plan, ground: &Ground) -> Result<Section> {
    let mut progress = Progress::begin("events: reading what is there, by files that are watched");
    let mut infill = Infill::start(plan, &[&ground.store()], &ground.dir("events")?, &[&["--shards=1"], &NO_MORE[..]].concat())?;
    let (_, blob) = infill.attach(ONE)?;
    prime(&blob, &ground.blob(), PAGES)?;
    let unwatched = ground.copy_of_blob("events-unwatched")?;
    let mut servers: Vec<(&str, PathBuf, Server)> =
        vec![("unwatched", unwatched, Server::Nobody), ("infill", blob, Server::Infill(infill))];
    for kind in Kind::ALL {
        let file = ground.copy_of_blob(&format!("events-{}", kind.name()))?;
        let daemon = peer::start(plan, kind, &file, None, 1)?;
        servers.push((kind.name(), file, Server::Peer(daemon)));
    }
    let mut samples = Samples::default();
    for round in 0..plan.rounds {
        progress.update(|| format!("round {}", round + 1));
        for &readers in &plan.readers {
            for (name, file, server) in &servers {
                let before_ns = server.cpu_ns()?;
                let seen = read_randomly(file, PAGES, readers, Until::Over(plan.time))?;
                let daemon_cpu_us = (server.cpu_ns()? - before_ns) as f64 / 1e3 / seen.reads as f64;
                let watched = !matches!(server, Server::Nobody);
                if watched && daemon_cpu_us <= 0.0 {
                    return Err(failed(format!("{name} was not asked for {}", file.display())));
                }
                let mut figures = vec![
                    ("reads_per_s", seen.reads_per_s),
                    ("p50_us", seen.p50_us),
                    ("p99_us", seen.p99_us),
                    ("reader_cpu_us", seen.cpu_us),
                ];
                if watched {
                    figures.extend([("events_per_s", seen.reads_per_s), ("daemon_cpu_us", daemon_cpu_us)]);
                }
                samples.add(name, readers, figures);
            }
        }
    }
    servers.into_iter().try_for_each(|(_, _, server)| server.end())?;
    progress.finish("done");
    let title = format!("random reads of 4 KiB that are in the page cache, {:.1} s each; one shard, one thread", plan.time.as_secs_f64());
    Ok(samples.section(Subject::Events, title, &["events_per_s", "daemon_cpu_us", "p50_us", "p99_us", "reader_cpu_us", "reads_per_s"]))
}
