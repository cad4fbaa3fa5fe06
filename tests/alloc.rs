//! The hot path allocates no memory in steady state: the real shard loop, with and without a ring, under an allocator that
//! counts for each thread.

use infill::lab::bench::engine::{Behind, allocations};

#[path = "../benches/common/counting.rs"]
mod counting;

/// Requests of a run, or as many as fit into memory; the later three quarters are counted.
const REQUESTS: u64 = 20_000;
/// Lists that grow by doubling have a bound, but reach it late where it is up to a window that adapts, or to the order in
/// which worker threads end, how long they are: a few times in all.
const GROWTHS_MAX: u64 = 8;

/// Not files with a window that adapts: it brings what is asked later, and only there is asked for what is there already.
#[test]
fn a_request_allocates_nothing() {
    let runs = [
        (Behind::Nothing, false, 0),
        (Behind::Devices, false, 0),
        (Behind::Nothing, true, GROWTHS_MAX),
        (Behind::Devices, true, GROWTHS_MAX),
        (Behind::Files, false, GROWTHS_MAX),
    ];
    for (behind, adapts, most) in runs {
        let count = allocations(behind, REQUESTS, adapts, counting::allocations).expect("an engine");
        println!("{behind:?}, window that adapts: {adapts}: {count}");
        assert!(count <= most, "{count} allocations, {behind:?}, window that adapts: {adapts}");
    }
}
