//! What a read(2) of a fanotify group gives, and what is written to it, as bytes. Pure.
//!
//! Layouts are those of include/uapi/linux/fanotify.h: events one behind the other, each a fixed part and records of
//! any kind. Nothing is believed: every length is checked before it is used. An event carries a descriptor, which is ours
//! from the moment the event was read, whatever else it says.

use std::os::fd::RawFd;

use nix::errno::Errno;

use crate::range::ByteRange;

/// Bytes of an event with its range: the fixed part and one record (`FAN_PRE_ACCESS`, fs/notify/fanotify/fanotify_user.c).
pub const EVENT_BYTES: usize = METADATA_BYTES + RANGE_BYTES;
/// `FAN_EVENT_METADATA_LEN`.
const METADATA_BYTES: usize = 24;
/// `struct fanotify_event_info_range`.
const RANGE_BYTES: usize = 24;
/// Bytes of a record's header: type, padding, length.
const HEADER_BYTES: usize = 4;
/// `FANOTIFY_METADATA_VERSION`.
const VERSION: u8 = 3;
/// `FAN_EVENT_INFO_TYPE_RANGE`, Linux 6.14.
const TYPE_RANGE: u8 = 6;
/// `FAN_PRE_ACCESS`, Linux 6.14: somebody is about to read or write a range of a file.
pub const PRE_ACCESS: u64 = 0x0010_0000;
/// `FAN_Q_OVERFLOW`: events were lost, and who waited for them was let through.
pub const OVERFLOW: u64 = 0x4000;
/// `FAN_ALLOW`.
const ALLOW: u32 = 1;
/// `FAN_DENY`.
const DENY: u32 = 2;
/// Where an answer has the error that the reader gets (`FAN_DENY_ERRNO`).
const ERRNO_SHIFT: u32 = 24;

/// One event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Open for the file that is read, and the name of the event in its answer; `None`: it wants no answer.
    pub fd: Option<RawFd>,
    /// What happened.
    pub mask: u64,
    /// Which part of the file is wanted, as the kernel says it: it may be empty, and reach beyond the end.
    pub range: Option<ByteRange>,
}

/// The events that a read gave. What cannot be an event ends them.
#[derive(Clone, Debug)]
pub struct Events<'a> {
    rest: &'a [u8],
}

impl<'a> Events<'a> {
    /// Those in `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many bytes at the end are none; 0 when all went well.
    #[must_use]
    pub const fn left_over(&self) -> usize {
        self.rest.len()
    }
}

impl Iterator for Events<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let len = usize::try_from(u32_at(self.rest, 0)?).ok()?;
        let records_at = usize::from(u16::from_ne_bytes(*self.rest.get(6..)?.first_chunk()?));
        if len < METADATA_BYTES || records_at < METADATA_BYTES || self.rest.get(4) != Some(&VERSION) {
            return None;
        }
        let event = self.rest.get(..len)?;
        let fd = u32_at(event, 16)?.cast_signed();
        let (mask, range) = (u64_at(event, 8)?, event.get(records_at..).and_then(range_of));
        self.rest = &self.rest[len..];
        Some(Event { fd: (fd >= 0).then_some(fd), mask, range })
    }
}

/// The range among an event's records.
fn range_of(mut records: &[u8]) -> Option<ByteRange> {
    while records.len() >= HEADER_BYTES {
        let len = usize::from(u16::from_ne_bytes(*records[2..].first_chunk()?));
        let record = records.get(..len).filter(|record| record.len() >= HEADER_BYTES)?;
        if record[0] == TYPE_RANGE {
            let (offset, count) = (u64_at(record, 8)?, u64_at(record, 16)?);
            return Some(offset..offset.saturating_add(count));
        }
        records = &records[len..];
    }
    None
}

/// The answer to the event that is named by `fd`: its reader goes on, or gets an error.
#[must_use]
pub fn response(fd: RawFd, result: Result<(), Errno>) -> [u8; 8] {
    let response = match result {
        Ok(()) => ALLOW,
        Err(errno) => DENY | (allowed(errno) as u32) << ERRNO_SHIFT,
    };
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&fd.to_ne_bytes());
    bytes[4..].copy_from_slice(&response.to_ne_bytes());
    bytes
}

/// The error that says it best among those that the kernel takes (`process_access_response`, fs/notify/fanotify/fanotify_user.c).
const fn allowed(errno: Errno) -> Errno {
    match errno {
        Errno::EPERM | Errno::EBUSY | Errno::ETXTBSY | Errno::EAGAIN | Errno::ENOSPC | Errno::EDQUOT => errno,
        _ => Errno::EIO,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An event as the kernel writes it.
    pub(in super::super) fn event(fd: RawFd, mask: u64, range: Option<(u64, u64)>) -> Vec<u8> {
        let mut bytes = vec![0; METADATA_BYTES];
        if let Some((offset, count)) = range {
            bytes.extend([TYPE_RANGE, 0, RANGE_BYTES as u8, 0, 0, 0, 0, 0]);
            bytes.extend(offset.to_ne_bytes());
            bytes.extend(count.to_ne_bytes());
        }
        let len = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes[4] = VERSION;
        bytes[6..8].copy_from_slice(&24u16.to_ne_bytes());
        bytes[8..16].copy_from_slice(&mask.to_ne_bytes());
        bytes[16..20].copy_from_slice(&fd.to_ne_bytes());
        bytes
    }

    #[test]
    fn events_are_taken_one_by_one_with_their_ranges() {
        let mut bytes = event(9, PRE_ACCESS, Some((4096, 8192)));
        assert_eq!(bytes.len(), EVENT_BYTES);
        bytes.extend(event(-1, OVERFLOW, None));
        bytes.extend(event(10, PRE_ACCESS, Some((u64::MAX - 1, 4096))));
        let mut events = Events::new(&bytes);
        assert_eq!(events.next(), Some(Event { fd: Some(9), mask: PRE_ACCESS, range: Some(4096..12288) }));
        assert_eq!(events.next(), Some(Event { fd: None, mask: OVERFLOW, range: None }));
        assert_eq!(events.next().unwrap().range, Some(u64::MAX - 1..u64::MAX));
        assert_eq!((events.next(), events.left_over()), (None, 0));
    }

    #[test]
    fn an_answer_has_only_errors_that_the_kernel_takes() {
        assert_eq!(response(7, Ok(())), [7, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(response(7, Err(Errno::ENOSPC)), [7, 0, 0, 0, 2, 0, 0, 28]);
        assert_eq!(response(7, Err(Errno::ETIMEDOUT)), [7, 0, 0, 0, 2, 0, 0, 5]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_borne(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), version in any::<bool>(), len in 0u32..100) {
            if version && bytes.len() > 8 {
                bytes[..4].copy_from_slice(&len.to_ne_bytes());
                bytes[4] = VERSION;
                bytes[7] = 0;
            }
            let mut events = Events::new(&bytes);
            let count = events.by_ref().count();
            prop_assert!(count * METADATA_BYTES + events.left_over() <= bytes.len());
        }

        #[test]
        fn what_was_written_is_read(events in proptest::collection::vec((0i32..1 << 20, any::<u64>(), 0u64..1 << 40), 0..20)) {
            let bytes: Vec<u8> = events.iter().flat_map(|&(fd, offset, count)| event(fd, PRE_ACCESS, Some((offset, count)))).collect();
            let read: Vec<_> = Events::new(&bytes).map(|event| (event.fd.unwrap(), event.range.unwrap())).collect();
            let written: Vec<_> = events.iter().map(|&(fd, offset, count)| (fd, offset..offset.saturating_add(count))).collect();
            prop_assert_eq!(read, written);
        }
    }
}
