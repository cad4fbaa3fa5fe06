//! Finding an object by its id. Ids are small numbers that a front end counts up, so nobody can choose them to collide, and
//! this is done for each request: one multiplication is enough of a hash.

use std::hash::{BuildHasherDefault, Hasher};

/// A hash of one number. See the module's description.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct IdHasher(u64);

/// For a map whose keys are ids.
pub(super) type BuildIdHasher = BuildHasherDefault<IdHasher>;

/// 2^64 divided by the golden ratio: multiples of it lie apart from each other in their upper bits, which a map looks at first.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    fn write_u32(&mut self, id: u32) {
        let hash = (self.0 ^ u64::from(id)).wrapping_mul(GOLDEN);
        // A map takes its place from the lower bits.
        self.0 = hash ^ hash >> 32;
    }
}
