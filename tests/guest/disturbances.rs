//! Things happen to the daemon, its readers, its disks and the clock, from outside. Nobody hangs, nobody reads a wrong
//! byte, and all is well again afterwards.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::Pid;

use crate::bad_disk::BadDisk;
use crate::failures::expect_errors;
use crate::guest::{ASKED_OFTEN, AT_WORK, Guest, ReadCount, data, drop_caches, with_blob};
use crate::readers::{How, Readers, expect_equal};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("fault_cache_disk_fails_and_recovers", cache_disk_fails),
    ("fault_replaced_blob_is_served_as_it_was_opened", replaced_blob),
    ("fault_stopped_daemon_goes_on_when_continued", stopped_daemon),
    ("fault_killed_readers_hold_nobody_up", killed_readers),
    ("fault_clock_jumps_do_not_matter", clock_jumps),
];

/// How long a daemon stays stopped.
const PAUSE: Duration = Duration::from_secs(1);
/// How far the clock jumps, in seconds: forth, and then back to before where it was.
const JUMPS: [i64; 2] = [100 * 86_400, -200 * 86_400];

/// The disk of the cache takes no more writes; then it does again. The kernel gives the cache up, so infill has to be
/// started anew.
fn cache_disk_fails(guest: &mut Guest) -> Outcome {
    let mut disk = BadDisk::make(&guest.cache)?;
    guest.stock(&["one.img", "one.blob", "tiny.img"])?;
    guest.serve(&[])?;
    let options = with_blob("one.img", "one.blob");
    let at = guest.mount(&options)?;
    disk.spoil_data()?;
    expect_errors(&at, &[Errno::EIO, Errno::ENOBUFS])?;
    disk.heal()?;
    guest.umount(&at)?;
    guest.terminate()?;
    drop_caches()?;
    disk.renew()?;

    guest.serve(&[])?;
    guest.expect_whole(&options, "one.json", (2, How::Read))?;
    guest.stop()?;
    disk.remove()
}

/// Another file takes the place of the blob while it is served; as an image builder would do it.
fn replaced_blob(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    guest.serve(&[])?;
    let at = guest.mount(&with_blob("one.img", "one.blob"))?;
    let (blob, other) = (guest.store.join("one.blob"), guest.store.join("other"));
    let len = usize::try_from(fs::metadata(&blob)?.size())?;
    fs::write(&other, vec![0x55; len])?;
    fs::rename(&other, &blob)?;
    expect_equal(&at, &data("one.json"), 4, How::Read)?;
    guest.umount(&at)?;
    guest.stop()?;
    Ok(())
}

fn signal(guest: &Guest, signal: Signal) -> Outcome {
    Ok(kill(Pid::from_raw(guest.daemon_pid()?.cast_signed()), signal)?)
}

/// Serves a large tree to eight readers, has something happen while they are at work, and ends in peace.
fn under_readers(guest: &Guest, disturb: impl FnOnce(&Path, Readers, &ReadCount) -> Outcome) -> Outcome {
    guest.stock(&["tree.img", "tree.blob"])?;
    guest.serve(&ASKED_OFTEN)?;
    let at = guest.mount(&with_blob("tree.img", "tree.blob"))?;
    let count = ReadCount::start()?;
    let readers = Readers::start(&at, &data("tree.json"), 8, How::Read)?;
    count.await_more(AT_WORK)?;
    disturb(&at, readers, &count)?;
    guest.umount(&at)?;
    guest.stop()?;
    Ok(())
}

fn stopped_daemon(guest: &mut Guest) -> Outcome {
    under_readers(guest, |_, readers, count| {
        for _ in 0..3 {
            signal(guest, Signal::SIGSTOP)?;
            std::thread::sleep(PAUSE);
            signal(guest, Signal::SIGCONT)?;
            count.await_more(AT_WORK)?;
        }
        Ok(readers.expect_equal()?)
    })
}

/// Readers that wait for the daemon can be killed, and the answers to them harm nobody.
fn killed_readers(guest: &mut Guest) -> Outcome {
    under_readers(guest, |at, readers, _| {
        signal(guest, Signal::SIGSTOP)?;
        std::thread::sleep(PAUSE);
        readers.kill()?;
        signal(guest, Signal::SIGCONT)?;
        expect_equal(at, &data("tree.json"), 8, How::Read)
    })
}

fn clock_jumps(guest: &mut Guest) -> Outcome {
    under_readers(guest, |_, readers, _| {
        for seconds in JUMPS {
            let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
            clock_settime(ClockId::CLOCK_REALTIME, now + TimeSpec::new(seconds, 0))?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(readers.expect_equal()?)
    })
}
