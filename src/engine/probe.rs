//! Asking a sink what it already holds.
//!
//! The kernel passes `SEEK_DATA` and `SEEK_HOLE` on a cachefiles descriptor to the cache file
//! (`cachefiles_ondemand_fd_llseek`), where a hole means "not there".

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::machine::{Handle, Machine};
use crate::front::ObjectId;
use crate::range::ByteRange;

/// How far beyond what is needed now a hole is taken note of. To note more of it costs memory and time for parts
/// that may never be read: 32 KiB for each GiB of 4 KiB pages.
const AHEAD_BYTES: u64 = 1 << 30;

/// Brings the machine's knowledge about a demand up to date, before the demand is given to it.
pub(super) fn refresh<T>(machine: &mut Machine<T>, id: ObjectId, sink: impl AsFd + Copy, demand: &ByteRange) {
    while let (Some(region), Some(object)) = (machine.unprobed(id, demand), machine.handle(id)) {
        look(machine, object, sink, &region);
    }
    if machine.believes(id, demand) {
        let mut at = demand.start;
        scan(sink, demand, |data| {
            machine.forget(id, &(at..data.start));
            at = data.end;
        });
        machine.forget(id, &(at..demand.end));
    }
}

/// Tells the machine what the sink of an object holds in `region`, and of the hole behind it, if there is one.
pub(super) fn look<T>(machine: &mut Machine<T>, object: Handle, sink: impl AsFd + Copy, region: &ByteRange) {
    let probed = scan(sink, region, |data| machine.learn_of(object, &(0..0), [data]));
    let end = probed.end.min(region.end.saturating_add(AHEAD_BYTES));
    machine.learn_of(object, &(probed.start..end), []);
}

/// Tells `found` what a sink holds inside `region`, part by part, and returns what that is all of: the region, and
/// everything behind it up to the next data. A sink that cannot be asked counts as empty.
fn scan(sink: impl AsFd + Copy, region: &ByteRange, mut found: impl FnMut(ByteRange)) -> ByteRange {
    let mut at = region.start;
    while at < region.end {
        match seek(sink, at, Whence::SeekData) {
            Ok(data) if data < region.end => {
                let hole = seek(sink, data, Whence::SeekHole).unwrap_or(data);
                if hole <= data {
                    return region.clone();
                }
                found(data..hole.min(region.end));
                at = hole;
            }
            Ok(data) => return region.start..data,
            Err(Errno::ENXIO) => return region.start..u64::MAX,
            Err(_) => break,
        }
    }
    region.clone()
}

fn seek(sink: impl AsFd, at: u64, whence: Whence) -> Result<u64, Errno> {
    let at = i64::try_from(at).map_err(|_| Errno::ENXIO)?;
    lseek(sink, at, whence).map(i64::unsigned_abs)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges that has one")]
mod tests {
    use super::*;
    use crate::engine::machine::Limits;
    use crate::store::{Blob, Data, Extent, SourceFile};
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    /// What was asked about, and what was found.
    fn scan_all(sink: impl AsFd + Copy, region: &ByteRange) -> (ByteRange, Vec<ByteRange>) {
        let mut present = Vec::new();
        let probed = scan(sink, region, |data| present.push(data));
        (probed, present)
    }

    #[test]
    fn finds_data_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 65536], 131_072).unwrap();
        let (probed, present) = scan_all(&file, &(65536..262_144));
        assert_eq!((probed.start, probed.end >= 262_144), (65536, true));
        if present.first().is_some_and(|first| first.start == 65536) {
            return eprintln!("not run: this file system does not report holes");
        }
        assert_eq!(present, vec![131_072..196_608]);
        assert_eq!(scan_all(&file, &(196_608..200_704)), (196_608..u64::MAX, vec![]));
        assert_eq!(scan_all(&file, &(0..4096)), (0..131_072, vec![]));
        assert_eq!(scan_all(&file, &(135_168..139_264)).1, vec![135_168..139_264]);
    }

    /// A blob of nothing but its length.
    #[derive(Debug)]
    struct Long(u64);

    impl Blob for Long {
        fn len_bytes(&self) -> u64 {
            self.0
        }

        fn extent(&self, offset: u64) -> Extent {
            Extent { len_bytes: self.0 - offset, data: Data::Zero }
        }

        fn files(&self) -> &[Arc<SourceFile>] {
            &[]
        }
    }

    #[test]
    fn only_what_is_near_is_taken_note_of() {
        let limits = Limits {
            page_bytes: 4096,
            fill_max_bytes: 4096,
            window: crate::engine::plan::Window::Fixed(4096),
            completion: crate::engine::plan::Completion::default(),
            slots: 1,
            fills_per_need: 1,
            timeout_ns: u64::MAX,
            probe: true,
            sinks_know: false,
        };
        let (mut machine, id) = (Machine::<()>::new(limits), ObjectId(1));
        machine.open(id, Arc::new(Long(1 << 40)));
        let sink = tempfile::tempfile().unwrap();
        refresh(&mut machine, id, &sink, &(0..4096));
        assert_eq!(machine.unprobed(id, &(4096..8192)), None);
        let far = 1 << 39;
        assert_eq!(machine.unprobed(id, &(far..far + 4096)), Some(far..far + 4096));
    }
}
