//! The programs the lab needs, and how a Debian machine gets those it lacks.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::progress::Progress;
use super::{LabError, Result, run};

/// Something that must be on the machine: a program, or a file if it starts with `/`.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    name: &'static str,
    package: &'static str,
}

const fn tool(name: &'static str, package: &'static str) -> Tool {
    Tool { name, package }
}

/// For building a kernel from Debian's source package.
pub const KERNEL_TOOLS: &[Tool] = &[
    tool("gcc", "gcc"),
    tool("/usr/include/stdlib.h", "libc6-dev"),
    tool("ld", "binutils"),
    tool("make", "make"),
    tool("flex", "flex"),
    tool("bison", "bison"),
    tool("bc", "bc"),
    tool("xz", "xz-utils"),
    tool("tar", "tar"),
    tool("perl", "perl"),
    tool("kmod", "kmod"),
    tool("/usr/include/libelf.h", "libelf-dev"),
    tool("dpkg", "dpkg"),
    tool("apt-get", "apt"),
];

/// For making images.
pub const IMAGE_TOOLS: &[Tool] = &[tool("mkfs.erofs", "erofs-utils")];

/// For making disks and images and booting them.
pub const GUEST_TOOLS: &[Tool] = &[
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool("/usr/share/seabios/bios-256k.bin", "seabios"),
    tool("mkfs.erofs", "erofs-utils"),
    tool("mke2fs", "e2fsprogs"),
    tool("mkfs.xfs", "xfsprogs"),
    tool("ldd", "libc-bin"),
    tool("strip", "binutils"),
];

/// For making the root file system of a guest with systemd.
pub const ROOT_TOOLS: &[Tool] = &[tool("apt-get", "apt"), tool("dpkg-deb", "dpkg"), tool("tar", "tar"), tool("mke2fs", "e2fsprogs")];

/// For counting instructions.
pub const BENCH_TOOLS: &[Tool] = &[tool("valgrind", "valgrind")];

/// Where a program is: on `PATH`, or in one of the `sbin` directories that a user's `PATH` leaves out.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn present(tool: Tool) -> bool {
    if tool.name.starts_with('/') { Path::new(tool.name).exists() } else { find(tool.name).is_some() }
}

/// The packages whose tools are missing, each once, sorted.
#[must_use]
pub fn missing(tools: &[Tool]) -> Vec<&'static str> {
    let mut packages: Vec<_> = tools.iter().filter(|t| !present(**t)).map(|t| t.package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Makes sure that all `tools` are there: installs what is missing as root on a machine with apt-get.
///
/// # Errors
/// Something is missing and cannot be installed from here; the message has the command that would.
pub fn ensure(tools: &[Tool]) -> Result<()> {
    let packages = missing(tools);
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    let by_hand = format!("apt-get install --no-install-recommends {list}");
    if !nix::unistd::geteuid().is_root() || find("apt-get").is_none() {
        return Err(LabError::Failed(format!(
            "programs are missing; as root on Debian, run: {by_hand}\n(elsewhere, install what provides: {})",
            absent(tools).join(" ")
        )));
    }
    let progress = Progress::begin(format!("installing {list}"));
    // The package lists may be absent or too old: refresh them only when the first try fails.
    if install(&packages).is_err() {
        update_lists()?;
        install(&packages)?;
    }
    let still = absent(tools);
    if !still.is_empty() {
        return Err(LabError::Failed(format!("installed {list}, but still missing: {}", still.join(" "))));
    }
    progress.finish("done");
    Ok(())
}

fn absent(tools: &[Tool]) -> Vec<&'static str> {
    let gone = tools.iter().filter(|t| !present(**t));
    gone.map(|t| t.name).collect()
}

fn install(packages: &[&str]) -> Result<()> {
    let mut command = apt_get();
    command.args(["install", "-y", "--no-install-recommends"]);
    run(command.args(packages)).map(drop)
}

/// `apt-get update`, for lists that are missing or old. Needs root.
///
/// # Errors
/// What apt-get said.
pub fn update_lists() -> Result<()> {
    run(apt_get().arg("update")).map(drop)
}

/// `apt-get`, told to ask nothing.
#[must_use]
pub fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").arg("-q");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_names_each_package_once_and_nothing_that_is_there() {
        let tools = [tool("sh", "dash"), tool("/nonexistent/a", "one"), tool("no-such-program-here", "two"), tool("/nonexistent/b", "one")];
        assert_eq!(missing(&tools), ["one", "two"]);
    }
}
