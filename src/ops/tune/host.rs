//! What kind of machine this is, and so which profile is for it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::profile::Name;
use crate::engine::placement::usable_cpus;

/// Where the kernel lists block devices by number.
const DEVICES: &str = "/sys/dev/block";
/// Processors of a small virtual machine at most.
const SMALL_CPUS: usize = 4;

/// A disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// What lies on it.
    pub dir: PathBuf,
    /// Its name.
    pub name: String,
    /// Whether it says that it turns. Many virtual ones say so, too.
    pub turns: bool,
}

/// What decides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Host {
    /// Whether it is a virtual machine.
    pub is_virtual: bool,
    /// Processors that may be used.
    pub cpus: usize,
    /// The disks of the stores, as far as they can be seen.
    pub stores: Vec<Disk>,
}

impl Host {
    /// Looks at this host, with its stores in these directories.
    #[must_use]
    pub fn read(stores: &[&Path]) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let is_flagged =
            cpuinfo.lines().any(|line| line.starts_with("flags") && line.split_ascii_whitespace().any(|flag| flag == "hypervisor"));
        Self {
            is_virtual: is_flagged || Path::new("/sys/hypervisor/type").exists(),
            cpus: usable_cpus().len(),
            stores: stores.iter().filter_map(|dir| disk(dir)).collect(),
        }
    }

    /// The profile for it, and why.
    #[must_use]
    pub fn guess(&self) -> (Name, String) {
        let Self { is_virtual, cpus, stores } = self;
        let machine = if *is_virtual { "a virtual machine" } else { "a machine of its own" };
        if let Some(Disk { dir, name, .. }) = stores.iter().find(|disk| disk.turns && !is_virtual) {
            return (Name::HddStore, format!("{} lies on {name}, a disk that turns", dir.display()));
        }
        if *is_virtual && *cpus <= SMALL_CPUS {
            return (Name::SmallVm, format!("this is {machine} with {cpus} CPUs"));
        }
        match stores.iter().find(|disk| disk.name.starts_with("nvme")) {
            Some(Disk { dir, name, .. }) if !is_virtual => {
                (Name::BareMetalNvme, format!("this is {machine}, and {} lies on {name}", dir.display()))
            }
            _ => (Name::DenseHost, format!("this is {machine} with {cpus} CPUs")),
        }
    }
}

/// The disk under a directory; `None`: none that can be seen (a network, memory).
fn disk(dir: &Path) -> Option<Disk> {
    let device = fs::metadata(dir).ok()?.dev();
    let own = fs::canonicalize(format!("{DEVICES}/{}:{}", major(device), minor(device))).ok()?;
    // A partition has no queue: its disk does, one directory above.
    let whole = own.ancestors().take(2).find(|path| path.join("queue").is_dir())?;
    let turns = fs::read_to_string(whole.join("queue/rotational")).is_ok_and(|text| text.trim() == "1");
    Some(Disk { dir: dir.to_owned(), name: whole.file_name()?.to_string_lossy().into_owned(), turns })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_host_has_its_profile_and_a_reason() {
        let disk = |name: &str, turns| Disk { dir: "/srv".into(), name: name.into(), turns };
        for (is_virtual, cpus, stores, name, word) in [
            (true, 2, vec![disk("vda", true)], Name::SmallVm, "2 CPUs"),
            (true, 64, vec![disk("vda", true)], Name::DenseHost, "64 CPUs"),
            (false, 32, vec![disk("nvme0n1", false)], Name::BareMetalNvme, "nvme0n1"),
            (false, 32, vec![disk("nvme0n1", false), disk("sda", true)], Name::HddStore, "sda"),
            (false, 96, vec![], Name::DenseHost, "96 CPUs"),
        ] {
            let (found, why) = Host { is_virtual, cpus, stores }.guess();
            assert!(found == name && why.contains(word), "{found}: {why}");
        }
        assert!(Host::read(&[Path::new("/"), Path::new("/no/such")]).cpus > 0);
    }
}
