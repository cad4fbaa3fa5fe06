//! The hot path allocates no memory in steady state: the real shard loop, with and without a ring, under an allocator that
//! counts for each thread.

use infill::lab::bench::engine::{Behind, allocations};

#[path = "../benches/common/counting.rs"]
mod counting;

/// Requests of a run, or as many as fit into memory; the later three quarters are counted.
const REQUESTS: u64 = 20_000;
/// Lists of fills that are ahead of the readers have a bound, but reach it late, and grow by doubling: a few times in all.
const GROWTHS_MAX: u64 = 8;

#[test]
fn a_request_allocates_nothing() {
    for behind in [Behind::Nothing, Behind::Devices, Behind::Files] {
        for (adapts, most) in [(false, 0), (true, GROWTHS_MAX)] {
            let count = allocations(behind, REQUESTS, adapts, counting::allocations).expect("an engine");
            println!("{behind:?}, window that adapts: {adapts}: {count}");
            assert!(count <= most, "{count} allocations, {behind:?}, window that adapts: {adapts}");
        }
    }
}
