//! infill against real kernels: every promise that only a kernel can confirm, on Linux 6.12 and 6.1 through cachefiles, on
//! Linux 7.2 from files, with the cache on ext4 and on XFS, in QEMU; and as a unit of a real systemd.
//!
//! One program, three roles. Started by `cargo test` it is the host: it boots a guest for each kernel and
//! file system and turns what the guest prints into test results. Inside the guest it runs the tests, each
//! in a process of its own. And it is the reader processes of those tests.
//!
//! `INFILL_CONSOLE=1` shows what the guests print. `INFILL_GUEST=skip` leaves all of this out (reported as ignored):
//! building the kernels takes some minutes the first time, and needs Debian's source packages.

mod author;
mod bad_disk;
mod confine;
mod density;
mod disturbances;
mod failures;
mod fixtures;
mod from_files;
mod guest;
mod guide;
mod hang;
mod host;
mod lifecycle;
mod matrix;
mod mounting;
mod power_cut;
mod readers;
mod replaced;
mod restart;
mod runner;
mod seed;
mod seed_in_use;
mod serve;
mod sources;
mod space;
mod systemd;

use std::error::Error;
use std::process::ExitCode;

use guest::Guest;
use infill::lab::kernel::FROM_FILES;

/// What a test gives; `?` takes any error.
type Outcome = Result<(), Box<dyn Error>>;

/// A test: its name and what it does in the guest.
type Test = (&'static str, fn(&mut Guest) -> Outcome);

/// The tests of a series of kernels, in the order they run.
fn tests_of(series: &str) -> Vec<Test> {
    if series == FROM_FILES { [from_files::TESTS, power_cut::TESTS].concat() } else { through_cachefiles().collect() }
}

/// All tests.
fn tests() -> impl Iterator<Item = Test> {
    tests_of(FROM_FILES).into_iter().chain(through_cachefiles()).chain([guide::TESTS, systemd::TESTS, systemd::NEWER_TESTS].concat())
}

fn through_cachefiles() -> impl Iterator<Item = Test> {
    [
        serve::TESTS,
        sources::TESTS,
        matrix::TESTS,
        failures::TESTS,
        disturbances::TESTS,
        hang::TESTS,
        confine::TESTS,
        lifecycle::TESTS,
        mounting::TESTS,
        seed::TESTS,
        seed_in_use::TESTS,
        restart::TESTS,
        author::TESTS,
        replaced::TESTS,
        space::TESTS,
        density::TESTS,
    ]
    .into_iter()
    .flatten()
    .copied()
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((role, names)) if role == runner::INSIDE => runner::run_all(names),
        Some((role, rest)) if role == runner::ONE => runner::run_one(&rest[0]),
        Some((role, rest)) if role == readers::READER => readers::reader_main(rest),
        Some((role, _)) if role == readers::HOLDER => readers::holder_main(),
        Some((role, rest)) if role == restart::AS_SERVICE => restart::as_service_main(rest),
        _ => host::main(),
    }
}
