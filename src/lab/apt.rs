//! Packages by apt: those that the machine's own package sources offer, or those of another suite of its mirror, by
//! settings that are kept beside the machine's and change nothing of them.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{LabError, Result, Trying, packages, run};

/// Debian's signatures, on every Debian machine.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Says which release this machine has.
const OS_RELEASE: &str = "/etc/os-release";

/// Where apt looks for packages.
#[derive(Clone, Debug)]
pub struct Apt {
    options: Vec<String>,
    /// Its lists of packages are ours to refresh.
    refreshes: bool,
}

impl Apt {
    /// In the machine's own package sources. Only root may refresh its lists.
    #[must_use]
    pub fn of_machine() -> Self {
        Self { options: Vec::new(), refreshes: nix::unistd::geteuid().is_root() }
    }

    /// In another suite of the mirror that the machine has its release from, with lists and all else in `home`. What is
    /// downloaded is verified with the machine's keyring.
    ///
    /// # Errors
    /// The machine has no Debian release from a mirror, or `home` cannot be used.
    pub fn of_suite(suite: &str, home: &Path) -> Result<Self> {
        let home = home.join(format!("apt-{suite}"));
        for dir in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(home.join(dir)).trying(|| format!("cannot make {}", home.display()))?;
        }
        let list = home.join("sources.list");
        let source = format!("deb [signed-by={KEYRING} target=Packages] {} {suite} main\n", mirror()?);
        fs::write(&list, source).trying(|| format!("cannot write {}", list.display()))?;
        let options = [
            ("Dir::Etc::SourceList", list),
            ("Dir::Etc::SourceParts", "/dev/null".into()),
            ("Dir::State", home.join("state")),
            // Packages that are installed play no part.
            ("Dir::State::status", "/dev/null".into()),
            ("Dir::Cache", home.join("cache")),
        ];
        Ok(Self { options: options.map(|(name, path)| format!("-o{name}={}", path.display())).into(), refreshes: true })
    }

    /// The version of a package that would be downloaded; `None`: it is not offered, or the lists are not there.
    #[must_use]
    pub fn offered(&self, package: &str, dir: &Path) -> Option<String> {
        packages::find("apt-get")?;
        let output = run(self.get().args(["download", "--print-uris", package]).current_dir(dir)).ok()?;
        version_in_uris(&String::from_utf8_lossy(&output.stdout), package)
    }

    /// Downloads a package into `dir`. The lists are refreshed if it does not work without that.
    ///
    /// # Errors
    /// What apt-get said.
    pub fn download(&self, package: &str, dir: &Path) -> Result<()> {
        let download = || run(self.get().args(["download", package]).current_dir(dir)).map(drop);
        if download().is_ok() {
            return Ok(());
        }
        self.refresh()?;
        download()
    }

    /// The file names of these packages and of all that they depend on, as if nothing was installed; `None`: something is not
    /// offered, or the lists are not there.
    #[must_use]
    pub fn offered_with_dependencies(&self, wanted: &[&str]) -> Option<Vec<String>> {
        packages::find("apt-get")?;
        let output = run(self.get_all(wanted).arg("--print-uris")).ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.split_whitespace().filter(|word| word.ends_with(".deb")).map(str::to_owned).collect())
    }

    /// Downloads them into `dir`.
    ///
    /// # Errors
    /// What apt-get said.
    pub fn download_with_dependencies(&self, wanted: &[&str], dir: &Path) -> Result<()> {
        fs::create_dir_all(dir.join("partial")).trying(|| format!("cannot make {}", dir.display()))?;
        let download = || {
            let mut get = self.get_all(wanted);
            get.arg(format!("-oDir::Cache::archives={}", dir.display()));
            run(get.arg("--download-only")).map(drop)
        };
        if download().is_ok() {
            return Ok(());
        }
        self.refresh()?;
        download()
    }

    /// Refreshes the lists of packages, where that is ours to do.
    ///
    /// # Errors
    /// What apt-get said.
    pub fn refresh(&self) -> Result<()> {
        if self.refreshes {
            run(self.get().arg("update"))?;
        }
        Ok(())
    }

    fn get_all(&self, wanted: &[&str]) -> Command {
        let mut get = self.get();
        // Nothing is installed, so that nothing has to be locked.
        get.args(["-oDir::State::status=/dev/null", "-oDebug::NoLocking=1", "--no-install-recommends", "-y", "install"]);
        get.args(wanted);
        get
    }

    fn get(&self) -> Command {
        let mut command = packages::apt_get();
        command.args(&self.options);
        command
    }
}

/// Where the machine has its own release from, such as `http://example.org/debian`.
fn mirror() -> Result<String> {
    let release = fs::read_to_string(OS_RELEASE).trying(|| format!("cannot read {OS_RELEASE}"))?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("stable");
    let uris = run(packages::apt_get().args(["update", "--print-uris"]))?;
    mirror_in_uris(&String::from_utf8_lossy(&uris.stdout), codename).ok_or_else(|| {
        LabError::Failed(format!(
            "no package source of this machine is a Debian mirror with {codename}; newer kernels come from such a mirror"
        ))
    })
}

/// `'http://.../dists/bookworm/InRelease' ..._InRelease 0` holds the mirror.
fn mirror_in_uris(text: &str, codename: &str) -> Option<String> {
    let end = format!("/dists/{codename}/InRelease'");
    text.split_whitespace().find_map(|word| Some(word.strip_prefix('\'')?.strip_suffix(&end)?.to_owned()))
}

/// `'http://...' linux-source-6.12_6.12.9-1_all.deb 153476148 SHA256:...` holds the version.
fn version_in_uris(text: &str, package: &str) -> Option<String> {
    let version = |word: &str| Some(word.strip_prefix(package)?.strip_prefix('_')?.strip_suffix(".deb")?.split('_').next()?.to_owned());
    // An epoch's colon is escaped by apt; no other character needs care in a file name.
    text.split_whitespace().find_map(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_what_apt_prints() {
        let text = "'http://example.org/l/linux-source-6.12_6.12.9-1%7edeb12u1_all.deb' \
                    linux-source-6.12_6.12.9-1~deb12u1_all.deb 153476148 SHA256:00\n";
        assert_eq!(version_in_uris(text, "linux-source-6.12").as_deref(), Some("6.12.9-1~deb12u1"));
        assert_eq!(version_in_uris(text, "linux-source-6.1"), None);
        assert_eq!(version_in_uris("", "linux-source-6.12"), None);
    }

    #[test]
    fn the_mirror_is_that_of_the_release_and_not_of_its_updates() {
        let text = "'https://example.com/apt/dists/tools/InRelease' example.com_InRelease 0 \n\
                    'http://example.org/security/dists/bookworm-security/InRelease' example.org_security_InRelease 0 \n\
                    'http://example.org/debian/dists/bookworm/InRelease' example.org_debian_InRelease 0 \n";
        assert_eq!(mirror_in_uris(text, "bookworm").as_deref(), Some("http://example.org/debian"));
        assert_eq!(mirror_in_uris(text, "trixie"), None);
    }
}
