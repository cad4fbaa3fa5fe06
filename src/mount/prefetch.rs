//! Images that are brought whole in the background, one after the other.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::service::Service;
use crate::control::wire::{Prefetch, Stage, Wanted};
use crate::control::{Kind, Refusal};
use crate::ops::mounting::Image;

/// What is asked of the engine at a time: so little that readers, who come in between, hardly wait, and that it is there long
/// before a request times out.
const PIECE_BYTES: u64 = 4 << 20;
/// Images that are brought or were, and so the longest list.
const PREFETCHES_MAX: usize = 256;

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Prefetches {
    all: Mutex<VecDeque<Prefetch>>,
    more: Condvar,
}

impl Prefetches {
    /// Adds an image, if it is not on its way.
    pub(super) fn add(&self, image: &Image) -> Result<Prefetch, Refusal> {
        let (wanted, mut all) = (Wanted::from(image), self.all());
        let has_ended = |stage| matches!(stage, Stage::Done | Stage::Failed);
        if let Some(at) = all.iter().position(|known| known.wanted == wanted) {
            if !has_ended(all[at].stage) {
                return Ok(all[at].clone());
            }
            // It goes to the end: perhaps something is missing again.
            all.remove(at);
        }
        if all.len() >= PREFETCHES_MAX {
            let Some(at) = all.iter().position(|known| has_ended(known.stage)) else {
                return Err(Refusal::new(Kind::Busy, format!("{PREFETCHES_MAX} images are being brought already; try again later")));
            };
            all.remove(at);
        }
        let prefetch = Prefetch { wanted, stage: Stage::Waiting, error: None };
        all.push_back(prefetch.clone());
        self.more.notify_one();
        Ok(prefetch)
    }

    pub(super) fn list(&self) -> Vec<Prefetch> {
        self.all().iter().cloned().collect()
    }

    /// Waits for one that is to be brought.
    fn next(&self) -> Wanted {
        let mut all = self.all();
        loop {
            if let Some(next) = all.iter_mut().find(|known| known.stage == Stage::Waiting) {
                next.stage = Stage::Running;
                return next.wanted.clone();
            }
            all = self.more.wait(all).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self, wanted: &Wanted, error: Option<String>) {
        if let Some(known) = self.all().iter_mut().find(|known| known.wanted == *wanted) {
            known.stage = if error.is_none() { Stage::Done } else { Stage::Failed };
            known.error = error;
        }
    }

    fn all(&self) -> MutexGuard<'_, VecDeque<Prefetch>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings what is to be brought, until the process ends.
pub(super) fn work(service: &Service) -> ! {
    loop {
        let wanted = service.prefetches.next();
        let error = bring_whole(service, &wanted.clone().into()).err();
        match &error {
            None => tracing::info!(image = wanted.image, "brought whole"),
            Some(why) => tracing::warn!(image = wanted.image, "not brought whole: {why}"),
        }
        service.prefetches.end(&wanted, error);
    }
}

fn bring_whole(service: &Service, image: &Image) -> Result<(), String> {
    let (_, pins) = service.attach(image).map_err(|error| error.to_string())?;
    for pin in &pins {
        let len_bytes = pin.file().len_bytes();
        for start in (0..len_bytes).step_by(usize::try_from(PIECE_BYTES).unwrap_or(usize::MAX)) {
            let piece = start..len_bytes.min(start + PIECE_BYTES);
            service.bring(pin, piece).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_on_its_way_once_and_can_be_asked_for_again() {
        let prefetches = Prefetches::default();
        let image = |n: usize| Image { name: format!("{n}"), domain: None, devices: Vec::new() };
        for _ in 0..2 {
            assert_eq!(prefetches.add(&image(0)).unwrap().stage, Stage::Waiting);
        }
        let wanted = prefetches.next();
        assert_eq!(prefetches.add(&image(0)).unwrap().stage, Stage::Running);
        prefetches.end(&wanted, Some("why".into()));
        assert_eq!(prefetches.list()[0].error.as_deref(), Some("why"));
        (1..PREFETCHES_MAX).for_each(|n| drop(prefetches.add(&image(n)).unwrap()));
        // What has ended makes room.
        prefetches.add(&image(PREFETCHES_MAX)).unwrap();
        assert_eq!(prefetches.add(&image(0)).unwrap_err().kind, Kind::Busy);
        assert_eq!(prefetches.list().len(), PREFETCHES_MAX);
    }
}
