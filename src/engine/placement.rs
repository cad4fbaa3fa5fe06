//! Where shards run: each on a CPU of its own, with its ring's workers on the CPUs that share that one's cache.
//!
//! What the host looks like comes from sysfs (Documentation/ABI/stable/sysfs-devices-system-cpu and
//! sysfs-devices-node), and is asked only about CPUs that this process may use (sched_getaffinity(2)), so that
//! `taskset`, `CPUAffinity=` and cpusets have their way. Where sysfs says nothing all CPUs count as equally near.

use std::collections::HashMap;
use std::fs;
use std::hash::Hash;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Where the kernel describes the host.
const SYSFS: &str = "/sys/devices/system";
/// CPUs that workers need at least: with one alone they would only wait for their shard, or it for them.
const NEAR_MIN: usize = 2;

/// A shard's place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seat {
    /// The CPU of the shard's own thread.
    pub cpu: usize,
    /// The CPUs of its workers, in order: those that share the last cache with it, or its memory where these are too few.
    pub near: Vec<usize>,
}

/// A CPU, by the least one of those that it shares something with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cpu {
    id: usize,
    core: usize,
    cache: usize,
    node: usize,
}

/// The CPUs that this process may use, in order.
#[must_use]
pub fn usable_cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect()
}

/// A place on each of them, in the order in which shards take them: far from each other, and one on each core before the
/// second on any.
#[must_use]
pub fn seats() -> Vec<Seat> {
    seats_of(look(Path::new(SYSFS), &usable_cpus()))
}

/// Ties the calling thread to some CPUs. A host that does not allow it serves all the same.
pub fn pin(cpus: &[usize]) {
    let mut set = CpuSet::new();
    if cpus.iter().try_for_each(|cpu| set.set(*cpu)).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)).is_err() {
        tracing::warn!(
            ?cpus,
            "cannot pin a shard to its CPUs, so the scheduler moves it; allow sched_setaffinity(2), or narrow CPUAffinity="
        );
    }
}

/// What sysfs below `root` says of CPUs.
fn look(root: &Path, cpus: &[usize]) -> Vec<Cpu> {
    let list = |path: &Path| parse_list(&fs::read_to_string(path).ok()?);
    let nodes: HashMap<usize, usize> = fs::read_dir(root.join("node"))
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let node = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            Some(list(&entry.path().join("cpulist"))?.into_iter().map(move |cpu| (cpu, node)))
        })
        .flatten()
        .collect();
    let describe = |&id: &usize| {
        let least_of = |name: &str| list(&root.join(format!("cpu/cpu{id}/{name}"))).and_then(|cpus| cpus.first().copied());
        let node = nodes.get(&id).copied().unwrap_or(0);
        Cpu {
            id,
            core: least_of("topology/thread_siblings_list").unwrap_or(id),
            // Without such a cache its node is the next thing that it shares; no CPU has this number.
            cache: least_of("cache/index3/shared_cpu_list").unwrap_or(usize::MAX),
            node,
        }
    };
    cpus.iter().map(describe).collect()
}

/// Parses the kernel's form of a list, as `0-3,8`, in order. `None`: it is none, or has numbers that no CPU has.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::count() {
            return None;
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    Some(cpus)
}

/// The order of places: nodes take turns, then the caches of a node, then the cores of a cache, then the threads of a core.
fn seats_of(mut cpus: Vec<Cpu>) -> Vec<Seat> {
    cpus.sort_unstable_by_key(|cpu| cpu.id);
    // How many threads of a core were seen, cores of a cache (by how many of their threads), caches of a node.
    let (mut threads, mut cores, mut caches) = (HashMap::new(), HashMap::new(), HashMap::new());
    let mut known = HashMap::new();
    let mut ranked: Vec<_> = cpus
        .iter()
        .map(|cpu| {
            let thread = next(&mut threads, cpu.core);
            let core = next(&mut cores, (cpu.node, cpu.cache, thread));
            let cache = *known.entry((cpu.node, cpu.cache)).or_insert_with(|| next(&mut caches, cpu.node));
            ((thread, core, cache, cpu.node, cpu.id), cpu)
        })
        .collect();
    ranked.sort_unstable_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, cpu)| Seat { cpu: cpu.id, near: near(cpu, &cpus) }).collect()
}

/// How many had the same key before.
fn next<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: K) -> usize {
    let count = counts.entry(key).or_default();
    *count += 1;
    *count - 1
}

fn near(cpu: &Cpu, cpus: &[Cpu]) -> Vec<usize> {
    let those = |is_near: &dyn Fn(&Cpu) -> bool| cpus.iter().filter(|other| is_near(other)).map(|other| other.id).collect::<Vec<_>>();
    let mut near = those(&|other| (other.node, other.cache) == (cpu.node, cpu.cache));
    if near.len() < NEAR_MIN {
        near = those(&|other| other.node == cpu.node);
    }
    if near.len() < NEAR_MIN { those(&|_| true) } else { near }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A host as sysfs shows it: siblings of each CPU, CPUs of each cache, of each node.
    fn host(cores: &[&str], caches: &[&str], nodes: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: String, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        };
        for (lists, name) in [(cores, "topology/thread_siblings_list"), (caches, "cache/index3/shared_cpu_list")] {
            for list in lists {
                parse_list(list).unwrap().iter().for_each(|cpu| write(format!("cpu/cpu{cpu}/{name}"), list));
            }
        }
        nodes.iter().enumerate().for_each(|(node, list)| write(format!("node/node{node}/cpulist"), list));
        fs::create_dir_all(root.path().join("node/power")).unwrap();
        root
    }

    fn order(root: &tempfile::TempDir, usable: &[usize]) -> Vec<usize> {
        seats_of(look(root.path(), usable)).iter().map(|seat| seat.cpu).collect()
    }

    fn near_of(root: &tempfile::TempDir, usable: &[usize], cpu: usize) -> Vec<usize> {
        seats_of(look(root.path(), usable)).into_iter().find(|seat| seat.cpu == cpu).unwrap().near
    }

    #[test]
    fn lists_of_the_kernel() {
        assert_eq!(parse_list("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse_list("\n"), Some(vec![]), "a node of memory alone");
        for wrong in ["3-1", "a", "1-", "-1", "0-4294967295", "1 2"] {
            assert_eq!(parse_list(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn shards_spread_over_nodes_caches_and_cores_before_they_share_one() {
        // Two nodes of two caches of two cores of two threads; siblings are numbered eight apart.
        let cores: Vec<_> = (0..8).map(|cpu| format!("{cpu},{}", cpu + 8)).collect();
        let cores: Vec<_> = cores.iter().map(String::as_str).collect();
        let root = host(&cores, &["0-1,8-9", "2-3,10-11", "4-5,12-13", "6-7,14-15"], &["0-3,8-11", "4-7,12-15"]);
        let all: Vec<_> = (0..16).collect();
        assert_eq!(order(&root, &all), [0, 4, 2, 6, 1, 5, 3, 7, 8, 12, 10, 14, 9, 13, 11, 15]);
        assert_eq!(near_of(&root, &all, 5), [4, 5, 12, 13]);
        // Of what this process may not use nothing is used.
        assert_eq!(order(&root, &[1, 2, 3, 6, 9]), [1, 6, 2, 3, 9]);
        assert_eq!(near_of(&root, &[1, 2, 3, 6, 9], 9), [1, 9]);
    }

    #[test]
    fn neighbouring_siblings_are_not_taken_before_free_cores() {
        let root = host(&["0-1", "2-3", "4-5"], &["0-5"], &["0-5"]);
        assert_eq!(order(&root, &[0, 1, 2, 3, 4, 5]), [0, 2, 4, 1, 3, 5]);
    }

    #[test]
    fn workers_alone_in_a_cache_get_the_node_and_alone_in_a_node_everything() {
        // As virtual machines are often shown: each CPU has a cache for itself.
        let root = host(&[], &["0", "1", "2"], &["0-1", "2"]);
        assert_eq!(near_of(&root, &[0, 1, 2], 0), [0, 1]);
        assert_eq!(near_of(&root, &[0, 1, 2], 2), [0, 1, 2]);
        assert_eq!(near_of(&root, &[1], 1), [1]);
    }

    #[test]
    fn a_host_that_tells_nothing_is_one_group() {
        let root = host(&[], &[], &[]);
        assert_eq!(order(&root, &[1, 4, 7]), [1, 4, 7]);
        assert_eq!(near_of(&root, &[1, 4, 7], 4), [1, 4, 7]);
        let here = usable_cpus();
        assert!(seats().len() == here.len() && seats().iter().all(|seat| seat.near.contains(&seat.cpu)));
    }

    proptest! {
        #[test]
        fn every_cpu_has_one_place_near_itself(cpus in proptest::collection::vec((0..4usize, 0..4usize, 0..3usize), 1..40)) {
            let cpus: Vec<_> = cpus.into_iter().enumerate().map(|(id, (core, cache, node))| Cpu { id, core, cache, node }).collect();
            let seats = seats_of(cpus.clone());
            let mut ids: Vec<_> = seats.iter().map(|seat| seat.cpu).collect();
            ids.sort_unstable();
            prop_assert_eq!(ids, (0..cpus.len()).collect::<Vec<_>>());
            for seat in seats {
                prop_assert!(seat.near.contains(&seat.cpu) && seat.near.is_sorted());
                prop_assert!(seat.near.len() >= NEAR_MIN.min(cpus.len()));
            }
        }

        #[test]
        fn no_text_is_too_odd(text in "[-0-9, a\n]{0,20}") {
            let _ = parse_list(&text);
        }
    }
}
