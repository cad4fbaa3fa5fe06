//! The host's side: cells become boots, some of them at a time.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::data::Data;
use super::peer::Peer;
use super::{CACHE_EXTENTS, CELL_FILE, Cell, CellResult, LISTING_FILE, RESULT_MARK, STORE_EXTENTS};
use crate::lab::guest::{environment, initramfs};
use crate::lab::init::{BEGIN_MARK, INIT_PROGRAM, Job, KERNEL_ARGUMENTS};
use crate::lab::kernel::Kernel;
use crate::lab::qemu::{Accelerator, Machine};
use crate::lab::{LabError, Result, Trying, last_lines};

/// Guest memory: the initramfs twice while it is unpacked, both disks, the page cache.
const MEMORY_MIB: u32 = 2048;
/// Nothing that differs from boot to boot, and the one clock that counts instructions.
const ARGUMENTS: &str = "quiet nokaslr norandmaps tsc=reliable clocksource=tsc random.trust_cpu=on";
/// How long a boot may take on this machine. A cell prints nothing while it works.
const LIMIT: Duration = Duration::from_secs(900);
/// Lines of the console shown for a failed cell.
const CONSOLE_LINES: usize = 20;

/// All cells of a run.
#[derive(Debug)]
pub struct Grid<'a> {
    /// What boots.
    pub kernel: &'a Kernel,
    /// The infill program to put inside.
    pub infill: &'a Path,
    /// What the services of cells name by index.
    pub peers: &'a [Peer],
    /// What is read.
    pub data: &'a Data,
    /// What is measured.
    pub cells: Vec<Cell>,
}

impl Grid<'_> {
    /// Runs all cells, `jobs` at a time, and tells `done` of each. Results are in the cells' order.
    #[must_use]
    pub fn run(
        &self,
        scratch: &Path,
        jobs: usize,
        done: &(dyn Fn(&Cell, &Result<CellResult>, Duration) + Sync),
    ) -> Vec<Result<CellResult>> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(cell) = self.cells.get(index) else { return };
                let began = Instant::now();
                let result = self.boot(cell, &scratch.join(format!("cell-{index}")));
                done(cell, &result, began.elapsed());
                results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((index, result));
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..jobs.max(1) {
                scope.spawn(work);
            }
        });
        let mut results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        results.sort_by_key(|(index, _)| *index);
        results.into_iter().map(|(_, result)| result).collect()
    }

    fn boot(&self, cell: &Cell, scratch: &Path) -> Result<CellResult> {
        std::fs::create_dir_all(scratch).trying(|| format!("cannot make {}", scratch.display()))?;
        let machine = Machine {
            kernel: self.kernel.image.clone(),
            initrd: Some(self.initramfs(cell, scratch)?),
            disks: Vec::new(),
            memory_mib: MEMORY_MIB,
            cpus: cell.cpus,
            append: format!("{ARGUMENTS} {KERNEL_ARGUMENTS}"),
            monitor: None,
            idle_limit: LIMIT,
            total_limit: LIMIT,
        };
        let mut result = None;
        let mut console = Vec::new();
        let mut working = false;
        let accelerator = if cell.cpus == 1 { Accelerator::TcgCounting } else { Accelerator::Tcg };
        let ending = machine.run(accelerator, &mut |line| {
            working |= line == BEGIN_MARK;
            match line.strip_prefix(RESULT_MARK) {
                Some(text) => result = serde_json::from_str(text).ok(),
                None => console.push(line.to_owned()),
            }
            working
        });
        // Whatever is left is only in the way.
        let _ = std::fs::remove_dir_all(scratch);
        let ending = ending?;
        result.ok_or_else(|| {
            let tail = last_lines(&console.join("\n"), CONSOLE_LINES);
            LabError::Failed(format!("the guest gave no result ({ending}); its console ended with:\n{tail}"))
        })
    }

    fn initramfs(&self, cell: &Cell, scratch: &Path) -> Result<PathBuf> {
        let text = serde_json::to_vec(cell).map_err(|e| LabError::Failed(format!("cannot write the cell: {e}")))?;
        let argv = [INIT_PROGRAM, "bench", "cell"].map(str::to_owned).into();
        let job = Job { argv, env: environment(), mounts: Vec::new() };
        let peer = cell.service.peer.and_then(|index| self.peers.get(index));
        let store = peer.and_then(|peer| peer.store.as_deref()).unwrap_or_else(|| self.data.store());
        let mut files: Vec<(&str, &[u8])> = vec![
            (CELL_FILE, &text),
            (LISTING_FILE, self.data.listing(cell.scenario)),
            (CACHE_EXTENTS, self.data.cache(cell.cache_fs)),
            (STORE_EXTENTS, store),
        ];
        files.extend(peer.iter().flat_map(|peer| &peer.files).map(|(path, text)| (&**path, text.as_bytes())));
        let programs: Vec<(&str, &Path)> = peer.iter().flat_map(|peer| &peer.programs).map(|(path, from)| (&**path, &**from)).collect();
        initramfs(scratch, self.infill, &programs, &files, &job)
    }
}
