//! Which pages of an object are there: one bit a page, kept in leaves that are made when first touched.
//!
//! A leaf covers 128 MiB of 4 KiB pages in 4 KiB of memory, so a 1 TiB object that is read in a few places
//! costs a pointer table and a few leaves. All operations are O(pages) in 64-page steps and allocate only
//! when a leaf is touched for the first time.

use crate::range::ByteRange;

/// Words in a leaf: 512 x 64 pages.
const LEAF_WORDS: usize = 512;
const LEAF_PAGES: u64 = LEAF_WORDS as u64 * 64;

/// A set of pages of one object.
#[derive(Debug)]
pub struct PageSet {
    len_bytes: u64,
    /// Pages are a power of two: shifting costs a cycle where dividing costs dozens, several times a request.
    page_shift: u32,
    pages: u64,
    count: u64,
    leaves: Vec<Option<Box<[u64; LEAF_WORDS]>>>,
}

impl PageSet {
    /// An empty set for an object of `len_bytes`. `page_bytes` is a power of two.
    #[must_use]
    pub fn new(len_bytes: u64, page_bytes: u64) -> Self {
        let pages = len_bytes.div_ceil(page_bytes);
        let leaves = usize::try_from(pages.div_ceil(LEAF_PAGES)).unwrap_or(usize::MAX);
        debug_assert!(page_bytes.is_power_of_two());
        Self { len_bytes, page_shift: page_bytes.trailing_zeros(), pages, count: 0, leaves: vec![None; leaves] }
    }

    /// Adds every page that lies wholly inside `range`; the last page of the object may be partial.
    pub fn insert(&mut self, range: &ByteRange) {
        let first = self.page_after(range.start);
        let last = self.page_limit(range.end);
        self.for_each_word(first, last, |word, mask| {
            let new = mask & !*word;
            *word |= mask;
            u64::from(new.count_ones())
        });
    }

    /// Removes every page that `range` touches.
    pub fn remove(&mut self, range: &ByteRange) {
        let first = range.start >> self.page_shift;
        let last = self.page_after(range.end).min(self.pages);
        let mut page = first;
        while page < last {
            let (leaf, word, bit) = split(page);
            let n = (64 - bit).min(last - page);
            if let Some(words) = &mut self.leaves[leaf] {
                let mask = mask(bit, n);
                self.count -= u64::from((words[word] & mask).count_ones());
                words[word] &= !mask;
            }
            page += n;
        }
    }

    /// The first run of pages inside `range` that are not in the set, as a byte range of whole pages
    /// (so it may reach over both ends of `range`, and over the end of the object).
    #[must_use]
    pub fn first_absent(&self, range: &ByteRange) -> Option<ByteRange> {
        self.first(range, false)
    }

    /// The first run of pages inside `range` that are in the set, cut at the end of `range`, as a byte range of
    /// whole pages.
    #[must_use]
    pub fn first_present(&self, range: &ByteRange) -> Option<ByteRange> {
        self.first(range, true)
    }

    fn first(&self, range: &ByteRange, present: bool) -> Option<ByteRange> {
        let limit = self.page_after(range.end).min(self.pages);
        let start = self.scan(range.start >> self.page_shift, limit, present);
        if start >= limit {
            return None;
        }
        let end = self.scan(start, limit, !present);
        Some(start << self.page_shift..end << self.page_shift)
    }

    /// How many bytes of `range` (whole pages) are in the set.
    #[must_use]
    pub fn count_bytes(&self, range: &ByteRange) -> u64 {
        self.count_of(range, |leaf, word| self.word(leaf, word))
    }

    /// How many bytes of the pages that `range` touches are in the set and not in `other`, one of the same object.
    #[must_use]
    pub fn count_bytes_without(&self, range: &ByteRange, other: &Self) -> u64 {
        self.count_of(range, |leaf, word| self.word(leaf, word) & !other.word(leaf, word))
    }

    /// How many bytes of the pages that `range` touches have their bit in what `word_of` gives.
    fn count_of(&self, range: &ByteRange, word_of: impl Fn(usize, usize) -> u64) -> u64 {
        let limit = self.page_after(range.end).min(self.pages);
        let mut page = range.start >> self.page_shift;
        let mut count = 0;
        while page < limit {
            let (leaf, word, bit) = split(page);
            let n = (64 - bit).min(limit - page);
            count += u64::from((word_of(leaf, word) & mask(bit, n)).count_ones());
            page += n;
        }
        count << self.page_shift
    }

    fn word(&self, leaf: usize, word: usize) -> u64 {
        self.leaves[leaf].as_ref().map_or(0, |words| words[word])
    }

    /// Whether every page that `range` touches is in the set.
    #[must_use]
    pub fn contains(&self, range: &ByteRange) -> bool {
        self.first_absent(range).is_none()
    }

    /// Whether every page of the object is in the set.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.count == self.pages
    }

    /// How many pages are in the set.
    #[must_use]
    pub const fn page_count(&self) -> u64 {
        self.count
    }

    /// The same in bytes, as whole pages.
    #[must_use]
    pub const fn present_bytes(&self) -> u64 {
        self.count << self.page_shift
    }

    /// First page at or after `page` (below `limit`) whose membership is `wanted`; `limit` if there is none.
    fn scan(&self, mut page: u64, limit: u64, wanted: bool) -> u64 {
        while page < limit {
            let (leaf, word, bit) = split(page);
            let n = (64 - bit).min(limit - page);
            let bits = self.leaves[leaf].as_ref().map_or(0, |words| words[word]);
            let hits = (if wanted { bits } else { !bits }) & mask(bit, n);
            if hits != 0 {
                return page - bit + u64::from(hits.trailing_zeros());
            }
            page += n;
        }
        limit
    }

    /// The first page that begins at or after `offset`.
    const fn page_after(&self, offset: u64) -> u64 {
        let whole = offset >> self.page_shift;
        whole + (offset > whole << self.page_shift) as u64
    }

    /// Page index after the last page that `end` completes.
    const fn page_limit(&self, end: u64) -> u64 {
        if end >= self.len_bytes { self.pages } else { end >> self.page_shift }
    }

    fn for_each_word(&mut self, first: u64, last: u64, mut change: impl FnMut(&mut u64, u64) -> u64) {
        let mut page = first;
        while page < last {
            let (leaf, word, bit) = split(page);
            let n = (64 - bit).min(last - page);
            let words = self.leaves[leaf].get_or_insert_with(|| Box::new([0; LEAF_WORDS]));
            self.count += change(&mut words[word], mask(bit, n));
            page += n;
        }
    }
}

/// Leaf, word and bit of a page.
#[allow(clippy::cast_possible_truncation, reason = "the leaf index was checked when the table was made")]
const fn split(page: u64) -> (usize, usize, u64) {
    ((page / LEAF_PAGES) as usize, (page % LEAF_PAGES / 64) as usize, page % 64)
}

/// `n` ones from `bit` on.
const fn mask(bit: u64, n: u64) -> u64 {
    (u64::MAX >> (64 - n)) << bit
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGE: u64 = 4096;

    #[test]
    fn the_partial_last_page_counts_when_its_bytes_are_covered() {
        let mut set = PageSet::new(PAGE + 100, PAGE);
        set.insert(&(PAGE..PAGE + 100));
        assert_eq!(set.first_absent(&(0..PAGE + 100)), Some(0..PAGE));
        set.insert(&(0..PAGE));
        assert!(set.is_full());
        set.remove(&(PAGE..PAGE + 1));
        set.insert(&(PAGE..PAGE + 99));
        assert!(!set.is_full());
    }

    #[test]
    fn a_huge_object_costs_little_until_it_is_touched() {
        let mut set = PageSet::new(1 << 40, PAGE);
        set.insert(&((1 << 39)..(1 << 39) + PAGE));
        assert_eq!(set.leaves.iter().flatten().count(), 1);
        assert_eq!(set.first_absent(&((1 << 39)..(1 << 39) + 2 * PAGE)), Some((1 << 39) + PAGE..(1 << 39) + 2 * PAGE));
    }

    proptest! {
        /// Against the plainest possible set: same members, same first absent run, same count.
        #[test]
        fn agrees_with_a_set_of_page_numbers(
            pages in 0u64..70_000,
            ops in prop::collection::vec((any::<bool>(), 0u64..70_000, 0u64..300), 0..40),
            asks in prop::collection::vec((0u64..70_000, 0u64..400), 1..20),
        ) {
            let mut set = PageSet::new(pages * PAGE, PAGE);
            let mut model = BTreeSet::new();
            for (insert, start, n) in ops {
                let end = (start + n).min(pages);
                let range = start * PAGE..(start + n) * PAGE;
                if insert {
                    set.insert(&range);
                    model.extend(start..end);
                } else {
                    set.remove(&range);
                    model.retain(|page| !(start..end.max(start)).contains(page));
                }
            }
            prop_assert_eq!(set.page_count(), model.len() as u64);
            for (start, n) in asks {
                let limit = (start + n).min(pages);
                let first = (start..limit).find(|page| !model.contains(page));
                let expected = first.map(|first| {
                    let end = (first..limit).find(|page| model.contains(page)).unwrap_or(limit);
                    first * PAGE..end * PAGE
                });
                prop_assert_eq!(set.first_absent(&(start * PAGE..(start + n) * PAGE)), expected);
                let first = (start..limit).find(|page| model.contains(page));
                let expected = first.map(|first| {
                    let end = (first..limit).find(|page| !model.contains(page)).unwrap_or(limit);
                    first * PAGE..end * PAGE
                });
                prop_assert_eq!(set.first_present(&(start * PAGE..(start + n) * PAGE)), expected);
                let count = (start..limit).filter(|page| model.contains(page)).count() as u64;
                prop_assert_eq!(set.count_bytes(&(start * PAGE..(start + n) * PAGE)), count * PAGE);
            }
        }
    }
}
