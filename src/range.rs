//! Byte ranges and their alignment.

use std::ops::Range;

use nix::unistd::{SysconfVar, sysconf};

/// A half-open range of bytes of one object.
pub type ByteRange = Range<u64>;

/// The machine's page size in bytes.
#[must_use]
pub fn page_bytes() -> u64 {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(4096)
}

/// `value` rounded down to a multiple of `unit` (a power of two).
#[must_use]
pub const fn align_down(value: u64, unit: u64) -> u64 {
    value & !(unit - 1)
}

/// `value` rounded up to a multiple of `unit` (a power of two); the highest multiple if it would overflow.
#[must_use]
pub const fn align_up(value: u64, unit: u64) -> u64 {
    match value.checked_add(unit - 1) {
        Some(sum) => align_down(sum, unit),
        None => align_down(u64::MAX, unit),
    }
}

/// The part that two ranges have in common, if any.
#[must_use]
pub fn intersect(a: &ByteRange, b: &ByteRange) -> Option<ByteRange> {
    let common = a.start.max(b.start)..a.end.min(b.end);
    (common.start < common.end).then_some(common)
}

/// Length of a range in bytes (0 if it is empty or reversed).
#[must_use]
pub const fn len(range: &ByteRange) -> u64 {
    range.end.saturating_sub(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_does_not_overflow() {
        assert_eq!(align_up(1, 4096), 4096);
        assert_eq!(align_up(4096, 4096), 4096);
        assert_eq!(align_up(u64::MAX, 4096), u64::MAX - 4095);
        assert_eq!(align_down(4097, 4096), 4096);
    }

    #[test]
    fn touching_ranges_do_not_intersect() {
        assert_eq!(intersect(&(0..10), &(10..20)), None);
        assert_eq!(intersect(&(0..11), &(10..20)), Some(10..11));
    }
}
