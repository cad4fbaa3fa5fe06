//! `infill tune --apply` and `--revert` on made-up hosts below a directory: whatever was there before is there again afterwards, also
//! when something fails on the way or a crash leaves it half done.

#![allow(clippy::unwrap_used, reason = "a test that cannot prepare its host fails")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use infill::ops::tune::TuneError;
use infill::ops::tune::apply::{apply, revert};
use infill::ops::tune::files::wanted;
use infill::ops::tune::knob::{State, Value, values};
use infill::ops::tune::profile::{Name, Profile, Target};
use infill::ops::tune::record::{Change, RECORD, Record};
use infill::ops::tune::root::Root;
use proptest::prelude::*;

/// A made-up host.
struct Host {
    dir: tempfile::TempDir,
    root: Root,
}

/// Everything below a directory: directories, and files with their texts.
type Snapshot = BTreeMap<PathBuf, Option<String>>;

impl Host {
    /// With these values of the kernel's, by their paths.
    fn new(values: &[(PathBuf, String)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("proc/sys")).unwrap();
        let host = Self { root: Root::new(dir.path()), dir };
        for (path, value) in values {
            host.put(path, value);
        }
        host
    }

    /// One whose kernel has all that any profile sets, each of them 1.
    fn whole() -> Self {
        Self::new(&kernel_paths().into_iter().map(|path| (path, "1".to_owned())).collect::<Vec<_>>())
    }

    fn put(&self, path: &Path, text: &str) {
        let at = self.root.at(path);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, text).unwrap();
    }

    fn snapshot(&self) -> Snapshot {
        fn walk(dir: &Path, base: &Path, found: &mut Snapshot) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(base).unwrap().to_owned();
                if path.is_dir() {
                    found.insert(name, None);
                    walk(&path, base, found);
                } else {
                    // A kernel's file says a value with a newline, and takes it without.
                    found.insert(name, Some(fs::read_to_string(&path).unwrap().trim_end().to_owned()));
                }
            }
        }
        let mut found = Snapshot::new();
        walk(self.dir.path(), self.dir.path(), &mut found);
        found
    }
}

/// The kernel's files that some profile sets.
fn kernel_paths() -> Vec<PathBuf> {
    let of = |target: Target| match target {
        Target::Sysctl { name, .. } => Some(PathBuf::from(format!("/proc/sys/{}", name.replace('.', "/")))),
        Target::Sysfs { path, .. } => Some(path.into()),
        _ => None,
    };
    let mut paths: Vec<_> = Name::ALL.into_iter().flat_map(|name| Profile::of(name).knobs).filter_map(|knob| of(knob.set)).collect();
    paths.sort();
    paths.dedup();
    paths
}

/// The files that some profile writes.
fn all_files() -> Vec<PathBuf> {
    let of = |name| wanted(&Profile::of(name).knobs.iter().collect::<Vec<_>>());
    Name::ALL.into_iter().flat_map(of).map(|file| file.path).collect()
}

fn any_name() -> impl Strategy<Value = Name> {
    prop::sample::select(&Name::ALL[..])
}

/// Values of some of the kernel's files; the others are missing.
fn any_kernel() -> impl Strategy<Value = Vec<(PathBuf, String)>> {
    let value = prop::option::weighted(0.8, prop_oneof![Just(0_u64), Just(1024), Just(1 << 20), any::<u32>().prop_map(u64::from)]);
    let paths = kernel_paths();
    prop::collection::vec(value, paths.len()).prop_map(move |values| {
        paths.iter().zip(values).filter_map(|(path, value)| Some((path.clone(), format!("{}\n", value?)))).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn after_any_profiles_a_revert_leaves_what_was_there(
        kernel in any_kernel(),
        names in prop::collection::vec(any_name(), 1..4),
        others in prop::collection::vec(prop::sample::select(&["/etc/sysctl.d/10-mine.conf", "/etc/infill/config.toml", "/var/lib/infill/x"][..]), 0..3),
    ) {
        let host = Host::new(&kernel);
        for other in others {
            host.put(Path::new(other), "# mine\n");
        }
        let before = host.snapshot();
        for &name in &names {
            apply(&host.root, name).unwrap();
            // Everything that is here is as the profile says, and a second time changes nothing.
            let profile = Profile::of(name);
            for knob in &profile.knobs {
                let found = knob.look(&host.root);
                prop_assert!(found.state != State::Change, "{name}: {found:?}");
            }
            let after = host.snapshot();
            prop_assert_eq!(apply(&host.root, name).unwrap().changed, Vec::<PathBuf>::new());
            prop_assert_eq!(host.snapshot(), after);
        }
        revert(&host.root).unwrap();
        prop_assert_eq!(host.snapshot(), before);
        prop_assert!(matches!(revert(&host.root), Err(TuneError::NothingApplied(_))));
    }

    /// A crash may come between any two changes, and after each note of one that was not made.
    #[test]
    fn what_a_crash_leaves_is_reverted(kernel in any_kernel(), first in any_name(), second in any_name(), made in prop::collection::vec(any::<bool>(), 32), again: bool) {
        let host = Host::new(&kernel);
        let before = host.snapshot();
        apply(&host.root, first).unwrap();
        let text = |path: &Path| fs::read_to_string(host.root.at(path)).ok();
        let after_first: BTreeMap<PathBuf, Option<String>> = kernel_paths().into_iter().chain(all_files()).map(|path| (path.clone(), text(&path))).collect();
        apply(&host.root, second).unwrap();
        let mut record = Record::load(&host.root).unwrap().unwrap();
        for (change, made) in record.changes.iter_mut().zip(made) {
            // What the second one noted of it and did not do.
            match (&after_first[change.path()], &mut *change) {
                _ if made => {}
                (was, Change::File { older, path, .. }) => {
                    older.clone_from(was);
                    match was {
                        Some(was) => fs::write(host.root.at(path), was).unwrap(),
                        None => fs::remove_file(host.root.at(path)).unwrap(),
                    }
                }
                (was, Change::Value { path, .. }) => fs::write(host.root.at(path), was.as_ref().unwrap()).unwrap(),
            }
        }
        record.save(&host.root).unwrap();
        if again {
            apply(&host.root, second).unwrap();
        }
        revert(&host.root).unwrap();
        prop_assert_eq!(host.snapshot(), before);
    }
}

#[test]
fn a_step_that_fails_takes_back_those_before_it() {
    for name in Name::ALL {
        let profile = Profile::of(name);
        let knobs: Vec<_> = profile.knobs.iter().collect();
        for file in wanted(&knobs) {
            let host = Host::whole();
            // There is no room for the file that is to become it.
            let mut new = host.root.at(&file.path).into_os_string();
            new.push(".infill-new");
            fs::create_dir_all(new).unwrap();
            let before = host.snapshot();
            let error = apply(&host.root, name).unwrap_err();
            assert!(matches!(&error, TuneError::Failed { .. }) && error.to_string().contains(file.path.to_str().unwrap()), "{error}");
            assert_eq!(host.snapshot(), before, "{name}: {error}");
        }
        for Value { path, .. } in values(&knobs, &Host::whole().root) {
            let host = Host::whole();
            let at = host.root.at(&path);
            fs::remove_file(&at).unwrap();
            // A value that cannot be set: writing to this file of the kernel's is an I/O error.
            symlink("/proc/version", &at).unwrap();
            let before = host.snapshot();
            let error = apply(&host.root, name).unwrap_err();
            assert!(error.to_string().contains("changed back") && error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert_eq!(host.snapshot(), before, "{name}: {error}");
            assert_eq!(error.to_string().lines().count(), 1);
        }
    }
}

#[test]
fn a_file_of_somebody_else_is_never_touched() {
    for name in Name::ALL {
        let profile = Profile::of(name);
        let knobs: Vec<_> = profile.knobs.iter().collect();
        for file in wanted(&knobs) {
            let host = Host::whole();
            host.put(&file.path, "# mine\n");
            let before = host.snapshot();
            let error = apply(&host.root, name).unwrap_err();
            assert!(matches!(error, TuneError::Foreign(_)) && error.exit_code() == 78, "{error}");
            assert_eq!(host.snapshot(), before, "{name}");
            // One that was ours and was changed since.
            fs::remove_file(host.root.at(&file.path)).unwrap();
            let untouched = Host::whole().snapshot();
            apply(&host.root, name).unwrap();
            host.put(&file.path, "# mine now\n");
            assert!(matches!(apply(&host.root, name), Err(TuneError::Foreign(_))));
            let error = revert(&host.root).unwrap_err();
            assert!(matches!(error, TuneError::Changed(_)) && error.to_string().contains(file.path.to_str().unwrap()), "{error}");
            assert_eq!(fs::read_to_string(host.root.at(&file.path)).unwrap(), "# mine now\n");
            fs::remove_file(host.root.at(&file.path)).unwrap();
            revert(&host.root).unwrap();
            let left = host.snapshot();
            assert!(untouched.iter().all(|(path, text)| left.get(path) == Some(text)), "{name}: {left:?}");
            assert!(left.keys().filter(|path| !untouched.contains_key(*path)).all(|path| host.dir.path().join(path).is_dir()), "{left:?}");
        }
    }
}

#[test]
fn more_than_enough_is_left_alone() {
    let host = Host::whole();
    let before = host.snapshot();
    let path = Path::new("/proc/sys/fs/nr_open");
    let value = || host.root.value(path).unwrap().unwrap();
    apply(&host.root, Name::DenseHost).unwrap();
    assert_eq!(value(), "1048576");
    host.put(path, "2000000\n");
    apply(&host.root, Name::DenseHost).unwrap();
    assert_eq!(value(), "2000000");
    assert!(!host.root.at(Path::new("/etc/sysctl.d/60-infill.conf")).exists(), "it would be lowered at the next start");
    revert(&host.root).unwrap();
    assert_eq!(host.snapshot(), before);
}

#[test]
fn an_image_gets_all_files_and_no_values() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::new(dir.path());
    for name in Name::ALL {
        apply(&root, name).unwrap();
        let profile = Profile::of(name);
        for file in wanted(&profile.knobs.iter().collect::<Vec<_>>()) {
            assert_eq!(fs::read_to_string(root.at(&file.path)).unwrap(), file.text);
        }
    }
    assert!(!dir.path().join("proc").exists() && !dir.path().join("sys").exists());
    revert(&root).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_record_that_is_none_is_named() {
    let host = Host::whole();
    host.put(Path::new(RECORD), "{\"version\":99}");
    for error in [apply(&host.root, Name::SmallVm).unwrap_err(), revert(&host.root).unwrap_err()] {
        assert!(error.exit_code() == 78 && error.to_string().contains("tune.json"), "{error}");
    }
}

fn infill(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infill"));
    command.arg("tune").args(args);
    command
}

fn one_line(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(code) && text.lines().count() == 1 && words.iter().all(|word| text.contains(word)), "{output:?}");
}

#[test]
fn the_command_shows_applies_and_reverts() {
    let host = Host::whole();
    let root = host.dir.path().to_str().unwrap();
    let before = host.snapshot();
    let run = |args: &[&str]| infill(&[&["--root", root], args].concat()).output().unwrap();
    let shown = run(&[]);
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.status.success() && text.starts_with("profile ") && text.contains("->"), "{shown:?}");
    assert_eq!(host.snapshot(), before, "a look changes nothing");
    one_line(&run(&["--revert"]), 1, &["tune.json", "nothing is applied"]);
    let applied = run(&["--apply", "--profile", "small-vm", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&applied.stdout).unwrap();
    assert!(answer["done"]["changed"].as_array().is_some_and(|changed| !changed.is_empty()), "{answer}");
    assert!(answer["knobs"].as_array().unwrap().iter().all(|knob| knob["state"] == "ok" && knob["command"].is_string()), "{answer}");
    // Two at a time: the second one changes nothing.
    let other = nix::fcntl::Flock::lock(fs::File::open(host.dir.path()).unwrap(), nix::fcntl::FlockArg::LockExclusiveNonblock).unwrap();
    one_line(&run(&["--revert"]), 75, &["another infill tune", "try again"]);
    one_line(&run(&["--apply"]), 75, &["another infill tune"]);
    drop(other);
    assert!(run(&["--revert"]).status.success());
    assert_eq!(host.snapshot(), before);
    one_line(&infill(&["--root", "/no/such/root"]).output().unwrap(), 78, &["/no/such/root"]);
    assert_eq!(infill(&["--apply", "--revert"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn the_host_is_for_root_to_change() {
    if !nix::unistd::geteuid().is_root() {
        return one_line(&infill(&["--apply"]).output().unwrap(), 77, &["root"]);
    }
    // The program may lie where nobody else can look.
    let copy = tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir().unwrap();
    let program = copy.path().join("infill");
    fs::copy(env!("CARGO_BIN_EXE_infill"), &program).unwrap();
    for what in ["--apply", "--revert"] {
        one_line(&Command::new(&program).args(["tune", what]).uid(65534).gid(65534).output().unwrap(), 77, &["root"]);
    }
}
