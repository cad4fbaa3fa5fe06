//! Objects that nobody waits for: which of them give up their descriptors when these are scarce.

use super::{Handle, Machine, Object};

impl Object {
    /// Nobody waits for it, and it is not picked already.
    fn is_idle(&self) -> bool {
        !self.closed && !self.leaving && self.jobs.is_empty()
    }
}

impl<T> Machine<T> {
    /// Picks up to `count` objects that nobody waits for and that have nothing on its way, to be closed so that
    /// their descriptors are free: complete ones first (`complete_only`: no others), then those that were asked for
    /// longest ago. They are not picked again before [`Machine::stays`].
    pub fn pick_idle(&mut self, count: usize, complete_only: bool, picked: &mut Vec<Handle>) {
        picked.clear();
        let fits = |object: &Object| object.is_idle() && (object.present.is_full() || !complete_only);
        picked.extend(self.objects.iter().filter(|(_, object)| fits(object)).map(|(key, _)| Handle(key)));
        if count < picked.len() {
            let objects = &self.objects;
            picked.select_nth_unstable_by_key(count, |handle| {
                let object = &objects[handle.0];
                (!object.present.is_full(), object.last_need, handle.0)
            });
            picked.truncate(count);
        }
        picked.iter().for_each(|handle| self.leaves(*handle));
    }

    /// Picks one object, as [`Machine::pick_idle`] does, if nobody waits for it.
    pub fn pick(&mut self, object: Handle) -> bool {
        let is_idle = self.objects.get(object.0).is_some_and(Object::is_idle);
        if is_idle {
            self.leaves(object);
        }
        is_idle
    }

    fn leaves(&mut self, object: Handle) {
        self.objects[object.0].leaving = true;
        self.drop_background(object);
    }

    /// An object that was picked stays after all.
    pub fn stays(&mut self, object: Handle) {
        if let Some(found) = self.objects.get_mut(object.0) {
            found.leaving = false;
            self.resume_background(object);
        }
    }
}
