//! `cargo bench --bench engine [-- --json]`: what `infill bench engine` measures, and memory allocations counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use infill::lab::bench::engine;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, counted.
struct Counting;

// SAFETY: every call goes to the system's allocator unchanged, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: `memory` came from `System` with this layout, says the caller.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.iter().position(|arg| arg == "--pass").and_then(|at| args.get(at + 1)?.parse().ok()) {
        Some(requests) => engine::pass(requests),
        None => engine::measure(Some(|| ALLOCATIONS.load(Ordering::Relaxed)), &["--pass"]).map(|report| {
            print!("{}", report.table());
            if args.iter().any(|arg| arg == "--json") {
                println!("{}", serde_json::to_string(&report).unwrap_or_default());
            }
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("infill: {error}");
            ExitCode::FAILURE
        }
    }
}
