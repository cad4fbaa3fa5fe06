//! The limits: only the kernel's part of what [`super::rig::Behind::Devices`] does for a request, in the largest batches,
//! with nobody who decides anything; and what it costs to wake a thread on another core.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Serialize;

use super::machine::PAGE_BYTES;
use super::memdisk::own_cpu_ns;
use super::rig::DEPTH;
use crate::engine::buffers::Buffers;
use crate::engine::io::{FileRef, Io, Kind, Op, Watch};
use crate::engine::placement::{pin, seats};
use crate::engine::ring::{Ring, Settings, explain};
use crate::lab::{LabError, Result, Trying};

/// Batches of a run.
const BATCHES: u64 = 1 << 14;
/// Longest wait for a batch.
const PATIENCE: Duration = Duration::from_secs(10);

/// Wake-ups of a run.
const HOPS: u64 = 1 << 15;

/// What it costs when work goes from core to core one piece at a time.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct WakeFigures {
    /// From a write(2) to an eventfd until the thread on another core that slept in read(2) has answered by one of its own,
    /// halved.
    pub hop_us: f64,
    /// CPU time of both together for one.
    pub cpu_us: f64,
}

/// Measures it. `None`: there is one core only.
///
/// # Errors
/// There is no eventfd.
pub(super) fn wake() -> Result<Option<WakeFigures>> {
    let [here, there, ..] = &seats()[..] else { return Ok(None) };
    let pair = || EventFd::new().trying(|| "cannot make an eventfd");
    let (ask, answer) = (pair()?, pair()?);
    let hops = |cpu: usize, first: Option<&EventFd>, from: &EventFd, to: &EventFd| -> nix::Result<()> {
        pin(&[cpu]);
        first.map_or(Ok(8), |first| first.write(1))?;
        (0..HOPS / 2).try_for_each(|_| from.read().and_then(|_| to.write(1)).map(drop))
    };
    let (began, began_ns) = (Instant::now(), own_cpu_ns()?);
    thread::scope(|scope| {
        let other = scope.spawn(|| hops(there.cpu, None, &ask, &answer));
        let this = scope.spawn(|| hops(here.cpu, Some(&ask), &answer, &ask));
        [other, this].into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(nix::Error::ECANCELED)))
    })
    .trying(|| "cannot wake a thread by an eventfd")?;
    let each = |us: f64| us / HOPS as f64;
    Ok(Some(WakeFigures { hop_us: each(began.elapsed().as_secs_f64() * 1e6), cpu_us: each((own_cpu_ns()? - began_ns) as f64 / 1e3) }))
}

/// What a bare ring does.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LimitFigures {
    /// Messages read, pages copied from /dev/zero to /dev/null and answers written in a second of CPU time.
    pub requests_per_cpu_s: f64,
}

/// Measures it. `None`: there is no ring.
///
/// # Errors
/// An operation failed.
pub(super) fn measure() -> Result<Option<LimitFigures>> {
    let depth = u32::try_from(DEPTH).unwrap_or(u32::MAX);
    let page = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
    let buffers = Buffers::new(2 * depth, page).trying(|| "cannot map memory")?;
    let flags = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let device = EventFd::from_flags(flags).trying(|| "cannot make an eventfd")?;
    let wake = EventFd::new().trying(|| "cannot make an eventfd")?;
    let settings = Settings { depth, receives: depth, workers: 1, sinks_block: false, sinks_copy: false, receives_aside: false, near: &[] };
    let watch = Watch { requests: &[device.as_fd()], wake: wake.as_fd() };
    let mut ring = match Ring::new(settings, &buffers.whole(), watch) {
        Ok(ring) => ring,
        Err(error) => {
            eprintln!("infill: the limit is not measured: {}", explain(&error));
            return Ok(None);
        }
    };
    let source = OpenOptions::new().read(true).open("/dev/zero").trying(|| "cannot open /dev/zero")?;
    let sink = OpenOptions::new().write(true).open("/dev/null").trying(|| "cannot open /dev/null")?;
    let (from, to) = (ring.add_file(source.as_fd()), FileRef::plain(sink.as_fd()));
    let mut done = Vec::new();
    device.write(DEPTH).trying(|| "cannot write to an eventfd")?;
    let began_ns = own_cpu_ns()?;
    for _ in 0..BATCHES {
        for slot in 0..depth {
            let memory = buffers.slot(depth + slot, 0, page);
            let file = FileRef::plain(device.as_fd());
            ring.push(Op { key: slot.into(), kind: Kind::Receive, file, offset: 0, memory, then: None });
            let memory = buffers.slot(slot, 0, page);
            ring.push(Op { key: slot.into(), kind: Kind::Read, file: from, offset: 0, memory, then: Some((to, 0)) });
        }
        while done.len() < 2 * depth as usize {
            ring.wait(Some(PATIENCE), &mut done).trying(|| "a ring failed")?;
        }
        if let Some(failed) = done.iter().find(|done| done.result < 0) {
            return Err(LabError::Failed(format!("an operation of the bare ring failed: {failed:?}")));
        }
        done.clear();
        for _ in 0..depth {
            device.write(1).trying(|| "cannot write to an eventfd")?;
        }
    }
    let cpu_s = (own_cpu_ns()? - began_ns) as f64 / 1e9;
    Ok(Some(LimitFigures { requests_per_cpu_s: (BATCHES * DEPTH) as f64 / cpu_s }))
}
