//! What is known of what sinks hold: what was looked for and found, what was brought, and what turned out not to be there.

use super::{Handle, Machine};
use crate::engine::plan::{self, Window};
use crate::front::ObjectId;
use crate::range::{ByteRange, align_down, align_up, intersect};

impl<T> Machine<T> {
    /// The first part around a demand of which it is not known what the sink already holds. The driver
    /// finds out and calls [`Machine::learn`], until this gives `None`; then it calls [`Machine::need`].
    #[must_use]
    pub fn unprobed(&self, id: ObjectId, demand: &ByteRange) -> Option<ByteRange> {
        let object = &self.objects[self.handle(id)?.0];
        let len = object.blob.len_bytes();
        let range = plan::clamp(demand, len, self.limits.page_bytes)?;
        let region = match self.limits.window {
            Window::Fixed(bytes) => plan::window(&range, bytes, len, self.limits.page_bytes),
            Window::Adaptive { .. } => intersect(&object.planner.as_ref()?.reach(&range), &(0..align_up(len, self.limits.page_bytes)))?,
        };
        intersect(&object.probed.first_absent(&region)?, &region)
    }

    /// The sink was asked about `probed` and holds `present` of it. Nothing is said of an unknown object.
    pub fn learn(&mut self, id: ObjectId, probed: &ByteRange, present: impl IntoIterator<Item = ByteRange>) {
        if let Some(handle) = self.handle(id) {
            self.learn_of(handle, probed, present);
        }
    }

    /// The same for an object that was not released yet.
    pub fn learn_of(&mut self, object: Handle, probed: &ByteRange, present: impl IntoIterator<Item = ByteRange>) {
        let Some(object) = self.objects.get_mut(object.0) else { return };
        object.probed.insert(probed);
        for range in present {
            // A write of the last page may have been cut off behind the blob's end: the kernel still misses the rest.
            object.present.insert(&(range.start..align_down(range.end, self.limits.page_bytes)));
        }
    }

    /// Whether every byte of a demand is believed to be there. The kernel asks only for what is missing, so
    /// either the bytes came while the request was on its way, or the belief is wrong: the driver looks at
    /// the sink and calls [`Machine::forget`] for what is not there after all.
    #[must_use]
    pub fn believes(&self, id: ObjectId, demand: &ByteRange) -> bool {
        let Some(object) = self.handle(id).map(|handle| &self.objects[handle.0]) else { return false };
        plan::clamp(demand, object.blob.len_bytes(), self.limits.page_bytes).is_some_and(|range| object.present.contains(&range))
    }

    /// Bytes that were believed to be there are not.
    pub fn forget(&mut self, id: ObjectId, missing: &ByteRange) {
        if let Some(handle) = self.handle(id) {
            self.objects[handle.0].present.remove(missing);
        }
    }

    /// How much of an object is known to be there, in bytes of whole pages.
    #[must_use]
    pub fn present_bytes(&self, object: Handle) -> u64 {
        self.objects.get(object.0).map_or(0, |object| object.present.present_bytes())
    }

    /// What objects got since this was asked last, in bytes, where their sinks are not told. Some of them may be closed.
    pub fn grown(&mut self) -> std::vec::Drain<'_, (Handle, u64)> {
        self.grown.drain(..)
    }
}
