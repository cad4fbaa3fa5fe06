//! What a daemon does for images that are mounted from files: makes them ready, and lets go of them when they are not
//! mounted any more.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::blobs::{Blobs, Pinned};
use super::error::AttachError;
use super::leases::Leases;
use super::mounted::Mounted;
use super::notes::Notes;
use super::prefetch::{self, Prefetches};
use crate::control::wire::Prepared;
use crate::engine::Entry;
use crate::image::devices;
use crate::key::Key;
use crate::ops::mounting::Image;
use crate::range::ByteRange;
use crate::store::Store;

/// How often what is in the cache is made durable, and so how much of it a loss of power may cost.
const SAVE_EVERY: Duration = Duration::from_secs(2);
/// How often blobs that are not mounted any more are looked for.
const RELEASE_EVERY: Duration = Duration::from_secs(10);

/// See the module's description.
#[derive(Debug)]
pub struct Service {
    pub(super) blobs: Arc<Blobs>,
    entry: Entry,
    store: Arc<dyn Store>,
    settings: Mutex<ServiceSettings>,
    notes: Mutex<Notes>,
    /// Images that are mounted, and not asked for: they outlived all that an earlier daemon has left.
    owed: Mutex<Vec<Image>>,
    /// Images that are ready, and not mounted yet.
    pub(super) leases: Leases,
    /// Images that are brought whole.
    pub(super) prefetches: Prefetches,
}

/// How a [`Service`] does it.
#[derive(Clone, Copy, Debug)]
pub struct ServiceSettings {
    /// How long a step for an image may take.
    pub patience: Duration,
    /// How much the kernel shall read ahead in mounts; `None`: as it likes.
    pub read_ahead_bytes: Option<u64>,
    /// The kernel asks for metadata too ([`super::metadata`]).
    pub asked_for_metadata: bool,
}

impl Service {
    /// Serves `blobs` from `store` by the engine behind `entry`. Of what is `mounted` it serves again what nobody does.
    #[must_use]
    pub fn new(blobs: Arc<Blobs>, entry: Entry, store: Arc<dyn Store>, settings: ServiceSettings, mounted: &[Mounted]) -> Self {
        let notes = Notes::open(blobs.cache_dir());
        let mut files: Vec<_> = mounted.iter().filter_map(|mount| mount.image.file_name()?.to_str()).collect();
        files.sort_unstable();
        files.dedup();
        let owed = files.iter().filter(|file| !blobs.serves(file)).flat_map(|file| notes.find(file)).collect();
        let (settings, notes, owed) = (Mutex::new(settings), Mutex::new(notes), Mutex::new(owed));
        Self { blobs, entry, store, settings, notes, owed, leases: Leases::default(), prefetches: Prefetches::default() }
    }

    /// Where the bytes come from.
    #[must_use]
    pub const fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Makes images ready in another way from now on.
    pub fn set(&self, patience: Duration, read_ahead_bytes: Option<u64>) {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        (settings.patience, settings.read_ahead_bytes) = (patience, read_ahead_bytes);
    }

    fn settings(&self) -> ServiceSettings {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what has to be done from time to time, and brings what is to be brought, until the process ends.
    ///
    /// # Errors
    /// No thread.
    pub fn watch(self: &Arc<Self>) -> io::Result<()> {
        let service = Arc::clone(self);
        let run = move || {
            service.ask_again();
            let mut released = Instant::now();
            loop {
                std::thread::sleep(SAVE_EVERY);
                service.blobs.save();
                service.leases.expire(Instant::now());
                if released.elapsed() >= RELEASE_EVERY {
                    service.let_go();
                    service.ask_again();
                    released = Instant::now();
                }
            }
        };
        Builder::new().name("infill-mounts".into()).spawn(run)?;
        let service = Arc::clone(self);
        Builder::new().name("infill-prefetch".into()).spawn(move || prefetch::work(&service)).map(drop)
    }

    /// Makes durable what the cache holds, and keeps nothing ready any more for who has not mounted it yet: this daemon ends,
    /// and ends no lease as a valid one from now on.
    pub fn end(&self) {
        self.blobs.save();
        self.leases.end_all();
    }

    /// What the image in a file was mounted as.
    pub(super) fn noted(&self, file: &str) -> Vec<Image> {
        self.notes().find(file)
    }

    /// Has the kernel ask again for images that are mounted and that nobody serves. What was read of them meanwhile stays
    /// wrong until their mounts are replaced.
    fn ask_again(&self) {
        let owed = self.owed().clone();
        let served: Vec<_> = owed.into_iter().filter(|image| self.serve_again(image)).collect();
        self.owed().retain(|image| !served.contains(image));
    }

    fn serve_again(&self, image: &Image) -> bool {
        match self.attach(image) {
            Ok(_) => tracing::warn!(image = image.name, "its mounts are asked for again: what is read from now on is right"),
            Err(error) => {
                tracing::error!(image = image.name, "it is mounted and not served, so its readers get zeros, tried again soon: {error}");
                return false;
            }
        }
        true
    }

    /// Makes an image ready: all of it on demand, but its own file whole where the kernel does not ask for metadata.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(&self, image: &Image) -> Result<(Prepared, Vec<Pinned>), AttachError> {
        let (settings, own) = (self.settings(), image.key());
        let found = self.store.open(&own)?.ok_or(AttachError::NotFound(own))?;
        let named = devices::names_of(&*found);
        if image.devices.is_empty() && named.iter().any(Vec::is_empty) {
            return Err(AttachError::Nameless { image: image.name.clone(), devices: named.len() });
        }
        let pin = |(at, key): (usize, &Key)| {
            let whole = at == 0 && !settings.asked_for_metadata;
            self.blobs.attach(&self.entry, &*self.store, key, whole, settings.patience)
        };
        let pins = image.keys(&named).iter().enumerate().map(pin).collect::<Result<Vec<_>, _>>()?;
        let mut paths = pins.iter().map(|pin| pin.file().path().to_owned());
        let prepared = Prepared {
            image: paths.next().unwrap_or_default(),
            devices: paths.collect(),
            len_bytes: pins.iter().map(|pin| pin.file().len_bytes()).sum(),
            present_bytes: pins.iter().map(|pin| pin.file().present_bytes()).sum(),
            read_ahead_bytes: settings.read_ahead_bytes,
        };
        // Before it can be mounted.
        if let Some(file) = prepared.image.file_name()
            && !self.notes().add(file.to_string_lossy().into_owned(), image)
        {
            return Err(AttachError::TooManyWays(image.name.clone()));
        }
        Ok((prepared, pins))
    }

    /// Brings a range of a blob.
    pub(super) fn bring(&self, pin: &Pinned, range: ByteRange) -> Result<(), AttachError> {
        pin.bring(&self.entry, range, self.settings().patience)
    }

    /// Lets go of what nobody has mounted any more. Gives the number of blobs.
    pub(super) fn let_go(&self) -> usize {
        let released = self.blobs.release(&self.entry);
        if released > 0 {
            tracing::info!(blobs = released, "not mounted any more");
        }
        if self.owed().is_empty() {
            self.notes().retain(|file| self.blobs.serves(file));
        }
        released
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owed(&self) -> MutexGuard<'_, Vec<Image>> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
