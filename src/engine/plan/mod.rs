//! Which range to bring for a demand. Pure.
//!
//! | file | its subject |
//! |---|---|
//! | `mod` | clamping, windows of one size, cutting into fills; the settings |
//! | `adaptive` | the window that adapts, jump by jump |
//! | `stream` | readers in order |
//! | `simulation` | (tests) what the planner makes of whole access lists |

pub mod adaptive;
#[cfg(test)]
mod simulation;
mod stream;

use std::num::NonZeroU64;

use serde::Serialize;

use crate::range::{ByteRange, align_down, align_up, intersect};

/// The demand as far as it lies inside the object, in whole pages. `None` if nothing of it does: the
/// image asks beyond its blob.
///
/// `len_bytes` is the blob's exact length. The kernel rounds the cache file up to a page, and asks for the
/// rest of the last page too.
#[must_use]
pub fn clamp(demand: &ByteRange, len_bytes: u64, page_bytes: u64) -> Option<ByteRange> {
    let end = align_up(len_bytes, page_bytes);
    let pages = align_down(demand.start, page_bytes)..align_up(demand.end, page_bytes);
    intersect(&pages, &(0..end))
}

/// How much is brought for a demand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Window {
    /// Every aligned window of so many bytes (a power of two) that it touches; a page or less: exactly it.
    Fixed(u64),
    /// As the object's [`adaptive::Planner`] says; so much of an object, in percent, may be brought on mere bets.
    Adaptive {
        /// See above.
        budget_percent: u8,
    },
}

/// When the rest of an object is brought in the background.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Complete {
    /// The parts of which readers have asked so much that they seem to want all, as the adaptive window sees it.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Every object from its opening on.
    Always,
}

/// Bringing what nobody has asked for yet, when there is nothing better to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Completion {
    /// When.
    pub when: Complete,
    /// How fast at most, in bytes a second, for each shard.
    pub bytes_per_s: Option<NonZeroU64>,
}

/// The region around a clamped demand that is worth having: every aligned window that it touches.
#[must_use]
pub fn window(demand: &ByteRange, window_bytes: u64, len_bytes: u64, page_bytes: u64) -> ByteRange {
    let end = align_up(len_bytes, page_bytes);
    if window_bytes <= page_bytes {
        return demand.clone();
    }
    align_down(demand.start, window_bytes)..align_up(demand.end, window_bytes).min(end).max(demand.end)
}

/// Cuts the start of an absent run so that it can be one fill: not longer than `fill_max_bytes`, and not
/// across a boundary that is a multiple of it, so that neighbouring fills stay aligned and large.
#[must_use]
pub fn piece(absent: &ByteRange, fill_max_bytes: u64) -> ByteRange {
    let border = align_down(absent.start, fill_max_bytes).saturating_add(fill_max_bytes);
    absent.start..absent.end.min(border)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    #[test]
    fn a_demand_beyond_the_blob_is_not_planned() {
        assert_eq!(clamp(&(8192..12288), 5000, PAGE), None);
        assert_eq!(clamp(&(0..u64::MAX), 5000, PAGE), Some(0..8192));
        assert_eq!(clamp(&(u64::MAX - 1..u64::MAX), u64::MAX - 8192, PAGE), None);
        assert_eq!(clamp(&(0..4096), 0, PAGE), None);
    }

    #[test]
    fn a_sub_page_demand_becomes_whole_pages() {
        assert_eq!(clamp(&(1024..2048), 5000, PAGE), Some(0..4096));
    }

    proptest! {
        #[test]
        fn the_window_holds_the_demand_and_stays_inside(
            len in 1u64..1 << 30, start in 0u64..1 << 30, n in 1u64..1 << 22, shift in 0u32..12,
        ) {
            let window_bytes = PAGE << shift;
            if let Some(demand) = clamp(&(start..start + n), len, PAGE) {
                let region = window(&demand, window_bytes, len, PAGE);
                prop_assert!(region.start <= demand.start && region.end >= demand.end);
                prop_assert!(region.end <= align_up(len, PAGE));
                prop_assert!(region.start.is_multiple_of(PAGE) && region.end.is_multiple_of(PAGE));
                let first = piece(&region, window_bytes);
                prop_assert!(first.end > first.start && first.end - first.start <= window_bytes);
            }
        }
    }
}
