//! What clients may ask of a [`Service`].

use std::path::Path;
use std::time::Instant;

use super::blobs::Pinned;
use super::error::AttachError;
use super::leases::LEASE_MAX;
use super::service::Service;
use crate::control::wire::{ImageList, Prefetch, Prepared, Ready};
use crate::control::{Images, Kind, Refusal};
use crate::ops::mounting::Image;
use crate::store::{Cause, StoreError};

impl Images for Service {
    fn attach(&self, image: &Image) -> Result<Ready, Refusal> {
        let (prepared, pins) = self.make_ready(image)?;
        self.lend(prepared, pins)
    }

    /// Makes an image ready of which a mount is known, and no more.
    fn repair(&self, file: &Path) -> Result<Ready, Refusal> {
        let conflict = |why: &str| Refusal::new(Kind::Conflict, format!("{why}; unmount it, and mount the image anew with infill mount"));
        let images = file.file_name().and_then(|name| name.to_str()).map(|name| self.noted(name)).unwrap_or_default();
        match &images[..] {
            [] => Err(conflict("the cache does not say what it was mounted of")),
            [image] => {
                let (prepared, pins) = self.make_ready(image)?;
                if prepared.image.file_name() != file.file_name() {
                    return Err(conflict(&format!("the store has another image {} now", image.name)));
                }
                self.lend(prepared, pins)
            }
            [image, ..] => Err(conflict(&format!("the image {} was mounted with other devices too", image.name))),
        }
    }

    fn end_lease(&self, id: &str) -> bool {
        self.leases.end(id, Instant::now())
    }

    fn release(&self) -> usize {
        self.let_go()
    }

    fn prefetch(&self, image: &Image) -> Result<Prefetch, Refusal> {
        self.prefetches.add(image)
    }

    fn list(&self) -> ImageList {
        ImageList { blobs: self.blobs.list(), prefetches: self.prefetches.list() }
    }
}

impl Service {
    fn make_ready(&self, image: &Image) -> Result<(Prepared, Vec<Pinned>), Refusal> {
        let not_ready = |error: AttachError| {
            tracing::warn!(image = image.name, "not made ready: {error}");
            Refusal::new(kind_of(&error), error)
        };
        Service::attach(self, image).map_err(not_ready)
    }

    fn lend(&self, prepared: Prepared, pins: Vec<Pinned>) -> Result<Ready, Refusal> {
        let lease = self.leases.begin(pins, Instant::now());
        let lease =
            lease.ok_or_else(|| Refusal::new(Kind::Busy, "too many images are about to be mounted, or the daemon ends; try again soon"))?;
        Ok(Ready { prepared, lease, lease_ms: u64::try_from(LEASE_MAX.as_millis()).unwrap_or(u64::MAX) })
    }
}

const fn kind_of(error: &AttachError) -> Kind {
    match error {
        AttachError::NotFound(_) => Kind::NotFound,
        AttachError::Nameless { .. } | AttachError::Store(StoreError { source: Cause::Name(_), .. }) => Kind::Unusable,
        AttachError::TooManyWays(_) => Kind::Conflict,
        AttachError::TimedOut(_) => Kind::TimedOut,
        AttachError::Store(_)
        | AttachError::Cache { .. }
        | AttachError::Mark { .. }
        | AttachError::Refused { .. }
        | AttachError::Unkept { .. } => Kind::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::name::FileName;

    #[test]
    fn a_name_that_no_blob_can_have_is_not_the_daemons_failure() {
        let of = |source| kind_of(&AttachError::Store(StoreError { store: "dir:/s".into(), key: "a/b".into(), source }));
        for name in [&b""[..], b"..", b"a/b", b"a\0b"] {
            assert_eq!(of(FileName::new(name).unwrap_err().into()), Kind::Unusable);
        }
        assert_eq!(of(Cause::Gone("/s".into())), Kind::Failed);
    }
}
