//! What a daemon does for images that are mounted from files: makes them ready, and lets go of them when they are not
//! mounted any more.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::blobs::{AttachError, Blobs, Pinned};
use super::control::{Question, Reply};
use crate::engine::Entry;
use crate::image::devices;
use crate::key::Key;
use crate::ops::mounting::Image;
use crate::store::Store;

/// How often what is in the cache is made durable, and so how much of it a loss of power may cost.
const SAVE_EVERY: Duration = Duration::from_secs(2);
/// How often blobs that are not mounted any more are looked for.
const RELEASE_EVERY: Duration = Duration::from_secs(10);

/// An image that is ready: what is to be mounted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// The image's file.
    pub image: PathBuf,
    /// Those of its devices, in order.
    pub devices: Vec<PathBuf>,
    /// Bytes of all of them, and how many of those are there.
    pub len_bytes: u64,
    /// See `len_bytes`.
    pub present_bytes: u64,
}

/// See the module's description.
#[derive(Debug)]
pub struct Service {
    blobs: Arc<Blobs>,
    entry: Entry,
    store: Arc<dyn Store>,
    /// The kernel asks for metadata too ([`super::metadata`]).
    asked_for_metadata: bool,
    patience: Duration,
}

impl Service {
    /// Serves `blobs` from `store` by the engine behind `entry`. No step for an image may take longer than `patience`.
    #[must_use]
    pub const fn new(blobs: Arc<Blobs>, entry: Entry, store: Arc<dyn Store>, asked_for_metadata: bool, patience: Duration) -> Self {
        Self { blobs, entry, store, asked_for_metadata, patience }
    }

    /// Where the bytes come from.
    #[must_use]
    pub const fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Does what has to be done from time to time, until the process ends.
    ///
    /// # Errors
    /// No thread.
    pub fn watch(self: &Arc<Self>) -> io::Result<()> {
        let service = Arc::clone(self);
        let run = move || {
            let mut released = Instant::now();
            loop {
                std::thread::sleep(SAVE_EVERY);
                service.blobs.save();
                if released.elapsed() >= RELEASE_EVERY {
                    service.release();
                    released = Instant::now();
                }
            }
        };
        Builder::new().name("infill-mounts".into()).spawn(run).map(drop)
    }

    /// Makes durable what the cache holds.
    pub fn save(&self) {
        self.blobs.save();
    }

    /// Answers a question; what it makes ready goes to `pins`, and stays so as long as they.
    pub(super) fn answer(&self, question: &Question, pins: &mut Vec<Pinned>) -> Reply {
        match question {
            Question::Release => Reply::Released(self.release()),
            Question::Attach { image, domain, devices } => {
                let image = Image { name: image.clone(), domain: domain.clone(), devices: devices.clone() };
                self.attach(&image).map_or_else(
                    |error| {
                        tracing::warn!(image = image.name, "not made ready: {error}");
                        Reply::Error(error.to_string())
                    },
                    |(prepared, pinned)| {
                        pins.extend(pinned);
                        Reply::Attached(prepared)
                    },
                )
            }
        }
    }

    /// Makes an image ready: all of it on demand, but its own file whole where the kernel does not ask for metadata.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(&self, image: &Image) -> Result<(Prepared, Vec<Pinned>), AttachError> {
        let own = image.key();
        let found = self.store.open(&own)?.ok_or(AttachError::NotFound(own))?;
        let named = devices::names_of(&*found);
        if image.devices.is_empty() && named.iter().any(Vec::is_empty) {
            return Err(AttachError::Nameless { image: image.name.clone(), devices: named.len() });
        }
        let pin = |(at, key): (usize, &Key)| {
            let whole = at == 0 && !self.asked_for_metadata;
            self.blobs.attach(&self.entry, &*self.store, key, whole, self.patience)
        };
        let pins = image.keys(&named).iter().enumerate().map(pin).collect::<Result<Vec<_>, _>>()?;
        let mut paths = pins.iter().map(|pin| pin.file().path().to_owned());
        let prepared = Prepared {
            image: paths.next().unwrap_or_default(),
            devices: paths.collect(),
            len_bytes: pins.iter().map(|pin| pin.file().len_bytes()).sum(),
            present_bytes: pins.iter().map(|pin| pin.file().map().present_bytes()).sum(),
        };
        Ok((prepared, pins))
    }

    fn release(&self) -> usize {
        let released = self.blobs.release(&self.entry);
        if released > 0 {
            tracing::info!(blobs = released, "not mounted any more");
        }
        released
    }
}
