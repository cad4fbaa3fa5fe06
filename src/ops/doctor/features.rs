//! What is compiled into the kernel and its modules.
//!
//! The configuration that a kernel was built with is not the last word: both on-demand options are parts of
//! modules, and modules can be rebuilt. So the code itself is looked for first, in the running kernel and in
//! the module's file, and the configuration asked only if neither can be seen.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Check, Id, Verdict, read};

/// What to do about a missing option where the driver is a module.
const REBUILD: &str = "rebuild the modules cachefiles and erofs with CONFIG_CACHEFILES_ONDEMAND and \
                       CONFIG_EROFS_FS_ONDEMAND (docs/kernels.md has the recipe), or boot a kernel with both";
/// What to do about it where it is not.
const REPLACE: &str = "boot a kernel with both CONFIG_CACHEFILES_ONDEMAND and CONFIG_EROFS_FS_ONDEMAND (docs/kernels.md)";

/// Where the kernel tells which program loads modules; not there if it cannot load any.
const MODPROBE: &str = "/proc/sys/kernel/modprobe";

/// Longest file of a module that is searched, in bytes after decompression.
const MODULE_MAX_BYTES: u64 = 256 << 20;

/// The value of an option of the kernel's configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Setting {
    /// Built in, or switched on.
    Yes,
    /// A module.
    Module,
    /// Not there.
    No,
}

/// A kernel's configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The file it was read from.
    pub origin: String,
    /// Its text.
    pub text: String,
}

impl Config {
    fn read(release: &str) -> Option<Self> {
        let origin = "/proc/config.gz".to_owned();
        if let Some(bytes) = File::open(&origin).ok().and_then(|file| filter("gzip", file)) {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            return Some(Self { origin, text });
        }
        [format!("/boot/config-{release}"), format!("/lib/modules/{release}/config")].into_iter().find_map(|origin| {
            let text = read(&origin)?;
            Some(Self { origin, text })
        })
    }

    /// The value of `CONFIG_<name>`.
    #[must_use]
    pub fn setting(&self, name: &str) -> Setting {
        self.text
            .lines()
            .find_map(|line| {
                let value = line.strip_prefix("CONFIG_")?.strip_prefix(name)?.strip_prefix('=')?;
                Some(match value.trim_end() {
                    "y" => Setting::Yes,
                    "m" => Setting::Module,
                    _ => Setting::No,
                })
            })
            .unwrap_or(Setting::No)
    }
}

/// Where a driver is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Driver {
    /// At work, loaded or built in.
    Running,
    /// A module that can be loaded, from this file (none if it is built in but silent).
    Loadable(Option<String>),
    /// Nowhere.
    Absent,
}

/// Whether code is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Code {
    /// Seen at the place named.
    Present(String),
    /// Missing at the place named.
    Absent(String),
    /// Nothing could be looked at.
    Unknown,
}

/// What was found of one driver and its on-demand part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Feature {
    /// Where the driver is.
    pub driver: Driver,
    /// Its on-demand part.
    pub ondemand: Code,
    /// Whether the driver is, or could be, a module that can be exchanged.
    pub is_module: bool,
}

/// What the checks need to know about the kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its configuration, if it can be found.
    pub config: Option<Config>,
    /// The driver behind `/dev/cachefiles`.
    pub cachefiles: Feature,
    /// The file system.
    pub erofs: Feature,
}

impl Kernel {
    /// Looks at the running kernel.
    #[must_use]
    pub fn read(release: &str) -> Self {
        let config = Config::read(release);
        let symbols = read("/proc/kallsyms").unwrap_or_default();
        let lists = |path, word: &str| read(path).is_some_and(|text: String| text.split_ascii_whitespace().any(|w| w == word));
        let has_modules = Path::new(MODPROBE).exists();
        let look = |module, running, symbol, option: &str| {
            let driver = if running { Driver::Running } else { loadable(module) };
            let ondemand = find_code(symbol, option, &driver, &symbols, config.as_ref());
            let base = option.trim_end_matches("_ONDEMAND");
            let builtin = config.as_ref().is_some_and(|c| c.setting(base) == Setting::Yes);
            Feature { driver, ondemand, is_module: has_modules && !builtin }
        };
        Self {
            cachefiles: look("cachefiles", lists("/proc/misc", "cachefiles"), "cachefiles_ondemand_daemon_read", "CACHEFILES_ONDEMAND"),
            erofs: look("erofs", lists("/proc/filesystems", "erofs"), "erofs_fscache_register_fs", "EROFS_FS_ONDEMAND"),
            config,
        }
    }

    /// The findings.
    #[must_use]
    pub fn checks(&self) -> Vec<Check> {
        vec![
            self.fscache(),
            driver(Id::Cachefiles, "CONFIG_CACHEFILES", &self.cachefiles.driver),
            ondemand(Id::CachefilesOndemand, "CACHEFILES_ONDEMAND", &self.cachefiles),
            driver(Id::Erofs, "CONFIG_EROFS_FS", &self.erofs.driver),
            ondemand(Id::ErofsOndemand, "EROFS_FS_ONDEMAND", &self.erofs),
        ]
    }

    fn fscache(&self) -> Check {
        const ID: Id = Id::Fscache;
        match self.config.as_ref().map(|config| (config, config.setting("FSCACHE"))) {
            // cachefiles cannot exist without it.
            _ if self.cachefiles.driver == Driver::Running => Check::ok(ID, "in use by cachefiles"),
            Some((config, Setting::No)) => {
                let found = format!("CONFIG_FSCACHE is not set ({})", config.origin);
                Check::fail(ID, Verdict::Unavailable, found, "boot a kernel that has CONFIG_FSCACHE")
            }
            Some((config, Setting::Yes)) => Check::ok(ID, format!("built in ({})", config.origin)),
            Some((config, Setting::Module)) => Check::ok(ID, format!("a module ({})", config.origin)),
            None => Check::unknown(
                ID,
                "the kernel's configuration was not found",
                "run as root, with /proc/config.gz or /boot/config-* of this kernel",
            ),
        }
    }
}

fn driver(id: Id, option: &str, driver: &Driver) -> Check {
    match driver {
        Driver::Running => Check::ok(id, "loaded or built in"),
        Driver::Loadable(_) => Check::ok(id, format!("can be loaded (modprobe {id})")),
        Driver::Absent => {
            let found = format!("neither loaded nor a module that could be ({option})");
            let remedy = format!("install the package with this kernel's modules if there is one, or boot a kernel that has {option}");
            Check::fail(id, Verdict::Unavailable, found, remedy)
        }
    }
}

fn ondemand(id: Id, option: &str, feature: &Feature) -> Check {
    match &feature.ondemand {
        Code::Present(place) => Check::ok(id, format!("CONFIG_{option}: in {place}")),
        Code::Absent(place) => {
            let found = format!("CONFIG_{option}: not in {place}");
            let remedy = if feature.is_module { REBUILD } else { REPLACE };
            Check::fail(id, Verdict::Unavailable, found, remedy)
        }
        Code::Unknown => {
            let found = format!("CONFIG_{option}: neither code nor configuration can be looked at");
            Check::unknown(id, found, "run as root, with this kernel's modules installed")
        }
    }
}

/// Looks for on-demand code; see the head of this file for the order.
fn find_code(symbol: &str, option: &str, driver: &Driver, symbols: &str, config: Option<&Config>) -> Code {
    if has_symbol(symbols, symbol) {
        return Code::Present("the running kernel".to_owned());
    }
    match driver {
        Driver::Running | Driver::Loadable(None) if !symbols.is_empty() => {
            return Code::Absent("the running kernel".to_owned());
        }
        Driver::Loadable(Some(path)) => {
            if let Some(bytes) = module_bytes(path) {
                return if contains(&bytes, symbol.as_bytes()) { Code::Present(path.clone()) } else { Code::Absent(path.clone()) };
            }
        }
        _ => {}
    }
    match config {
        None => Code::Unknown,
        Some(config) if config.setting(option) == Setting::No => Code::Absent(config.origin.clone()),
        Some(config) => Code::Present(config.origin.clone()),
    }
}

/// Whether `/proc/kallsyms` names a function.
fn has_symbol(symbols: &str, symbol: &str) -> bool {
    symbols.lines().any(|line| line.split_ascii_whitespace().nth(2) == Some(symbol))
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Asks modprobe, without loading anything.
fn loadable(module: &str) -> Driver {
    let Some(modprobe) = read(MODPROBE).filter(|path| !path.is_empty()) else {
        return Driver::Absent;
    };
    let mut command = Command::new(modprobe);
    command.args(["--show-depends", module]).stderr(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => parse_depends(&String::from_utf8_lossy(&output.stdout)),
        _ => Driver::Absent,
    }
}

/// The last line of `modprobe --show-depends`: `insmod PATH [OPTIONS]` or `builtin NAME`.
fn parse_depends(output: &str) -> Driver {
    let mut words = output.lines().last().unwrap_or_default().split_ascii_whitespace();
    match (words.next(), words.next()) {
        (Some("insmod"), Some(path)) => Driver::Loadable(Some(path.to_owned())),
        (Some("builtin"), _) => Driver::Loadable(None),
        _ => Driver::Absent,
    }
}

/// The contents of a module's file, decompressed by the program for its suffix.
fn module_bytes(path: &str) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    match path.rsplit_once('.')?.1 {
        "ko" => {
            let mut bytes = Vec::new();
            file.take(MODULE_MAX_BYTES).read_to_end(&mut bytes).ok()?;
            Some(bytes)
        }
        "gz" => filter("gzip", file),
        "xz" => filter("xz", file),
        "zst" => filter("zstd", file),
        _ => None,
    }
}

/// What a decompressor makes of a file; `None` if it is missing or fails.
fn filter(program: &str, file: File) -> Option<Vec<u8>> {
    let output = Command::new(program).arg("-dc").stdin(file).stderr(Stdio::null()).output().ok()?;
    output.status.success().then_some(output.stdout)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Status;
    use super::*;

    /// A kernel without any of it, and one that hides itself.
    pub(in super::super) fn provoked() -> Vec<Check> {
        let absent = || Feature { driver: Driver::Absent, ondemand: Code::Absent("/boot/config-test".into()), is_module: true };
        let hidden = || Feature { driver: Driver::Loadable(None), ondemand: Code::Unknown, is_module: false };
        let without = Kernel { config: Some(config("# CONFIG_FSCACHE is not set\n")), cachefiles: absent(), erofs: absent() };
        let silent = Kernel { config: None, cachefiles: hidden(), erofs: hidden() };
        [without.checks(), silent.checks()].concat()
    }

    fn config(text: &str) -> Config {
        Config { origin: "/boot/config-test".into(), text: text.into() }
    }

    #[test]
    fn a_configuration_is_read_by_whole_names() {
        let config = config(
            "# CONFIG_CACHEFILES_ONDEMAND is not set\nCONFIG_FSCACHE=m\nCONFIG_EROFS_FS_ZIP=y\n\
             CONFIG_EROFS_FS=y\nCONFIG_LSM=\"landlock\"\n",
        );
        assert_eq!(config.setting("FSCACHE"), Setting::Module);
        assert_eq!(config.setting("EROFS_FS"), Setting::Yes);
        for absent in ["CACHEFILES_ONDEMAND", "CACHEFILES", "EROFS", "LSM"] {
            assert_eq!(config.setting(absent), Setting::No, "{absent}");
        }
    }

    #[test]
    fn code_that_is_seen_outweighs_the_configuration() {
        let off = config("# CONFIG_X_ONDEMAND is not set\n");
        let on = config("CONFIG_X_ONDEMAND=y\n");
        let symbols = "0000000000000000 T x_ondemand_read\t[x]\n0000000000000000 t other\n";
        let find = |driver: &Driver, symbols, config| match find_code("x_ondemand_read", "X_ONDEMAND", driver, symbols, config) {
            Code::Present(_) => Some(true),
            Code::Absent(_) => Some(false),
            Code::Unknown => None,
        };
        let file = Driver::Loadable(Some("/no/such/module.ko".into()));
        // Rebuilt modules are loaded: the old configuration does not matter.
        assert_eq!(find(&Driver::Running, symbols, Some(&off)), Some(true));
        assert_eq!(find(&Driver::Running, "0 T x_ondemand_read_not\n", Some(&on)), Some(false));
        assert_eq!(find(&file, "", Some(&on)), Some(true));
        assert_eq!(find(&file, "", Some(&off)), Some(false));
        assert_eq!(find(&Driver::Running, "", None), None);
    }

    #[test]
    fn a_module_that_is_not_loaded_is_searched() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("x.ko");
        std::fs::write(&plain, b"\x7fELF\0x_ondemand_read\0").unwrap();
        let mut files = vec![plain.clone()];
        if Command::new("gzip").arg("-k").arg(&plain).status().is_ok_and(|s| s.success()) {
            files.push(dir.path().join("x.ko.gz"));
        }
        for path in files {
            let path = path.to_str().unwrap().to_owned();
            let driver = Driver::Loadable(Some(path.clone()));
            let found = |symbol| find_code(symbol, "X", &driver, "", None);
            assert_eq!(found("x_ondemand_read"), Code::Present(path.clone()));
            assert_eq!(found("x_ondemand_write"), Code::Absent(path.clone()));
        }
    }

    #[test]
    fn modprobe_is_understood() {
        assert_eq!(
            parse_depends("insmod /lib/modules/x/netfs.ko \ninsmod /lib/modules/x/cachefiles.ko.xz debug=0\n"),
            Driver::Loadable(Some("/lib/modules/x/cachefiles.ko.xz".into()))
        );
        assert_eq!(parse_depends("builtin erofs\n"), Driver::Loadable(None));
        assert_eq!(parse_depends(""), Driver::Absent);
    }

    #[test]
    fn missing_parts_are_named_with_the_way_out() {
        let judge = |is_module| {
            let feature = Feature { driver: Driver::Running, ondemand: Code::Absent("the running kernel".into()), is_module };
            ondemand(Id::ErofsOndemand, "EROFS_FS_ONDEMAND", &feature)
        };
        let check = judge(true);
        assert_eq!((check.status, check.verdict), (Status::Fail, Verdict::Unavailable));
        assert_eq!(check.found, "CONFIG_EROFS_FS_ONDEMAND: not in the running kernel");
        assert!(check.remedy.contains("rebuild"));
        assert!(!judge(false).remedy.contains("rebuild"));
    }
}
