//! What the kernel's author tests of a daemon (lostjeffle/demand-read-cachefilesd) and no other test here does, by his numbers.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use infill::engine::Engine;
use infill::front::cachefiles::{BindOptions, Device};
use infill::front::{Caps, Found, FrontEnd, FrontError, Request, Sink};
use infill::lab::tree::{Content, Entry, Manifest};
use infill::store::dir::DirStore;
use infill::store::{SourceMode, Store};
use nix::errno::Errno;

use crate::guest::{Guest, data, with_blob};
use crate::readers::{How, READ_LIMIT, Readers};
use crate::space::settings;
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[("author_11_the_device_is_closed_before_its_objects", device_closed_before_objects)];

/// Exit code of infill, from sysexits.h.
const UNAVAILABLE: i32 = 69;

/// The device, and every object that was ever opened.
struct Holding {
    device: Arc<Device>,
    sinks: Mutex<Vec<Arc<dyn Sink>>>,
}

impl FrontEnd for Holding {
    fn name(&self) -> &'static str {
        self.device.name()
    }

    fn caps(&self) -> Caps {
        self.device.caps()
    }

    fn requests(&self) -> BorrowedFd<'_> {
        self.device.requests()
    }

    fn parse(&self, read: Result<&[u8], Errno>, requests: &mut Vec<Request>) -> Result<Found, FrontError> {
        let found = self.device.parse(read, requests)?;
        let mut sinks = self.sinks.lock().map_err(|_| FrontError::Malformed("a thread died".to_owned()))?;
        sinks.extend(requests.iter().filter_map(|request| match request {
            Request::Open(open) => Some(Arc::clone(&open.sink)),
            _ => None,
        }));
        Ok(found)
    }

    fn settle(&self) -> bool {
        self.device.settle()
    }
}

/// 11: a daemon lets go of the device while it has descriptors of objects, and somebody reads. Readers get errors and none
/// hangs; as long as one of the objects is open the kernel keeps the cache, and says so to the next daemon; when the last is
/// closed, the next one serves.
fn device_closed_before_objects(guest: &mut Guest) -> Outcome {
    guest.stock(&["one.img", "one.blob"])?;
    let device = Device::bind(&BindOptions::new(&guest.cache))?;
    let holding = Arc::new(Holding { device, sinks: Mutex::default() });
    let front: Arc<dyn FrontEnd> = Arc::clone(&holding) as Arc<dyn FrontEnd>;
    let store: Arc<dyn Store> = Arc::new(DirStore::new("dir:test".to_owned(), &guest.store, SourceMode::Auto)?);
    let engine = Engine::start(&front, &store, &settings())?;
    let options = with_blob("one.img", "one.blob");
    let at = guest.mount(&options)?;
    read_one_file(&at)?;
    // So that requests wait that nobody has read when the device goes.
    engine.stop(Duration::from_secs(10), || false)?;
    let readers = Readers::start(&at, &data("one.json"), 4, How::Read)?;
    std::thread::sleep(Duration::from_millis(200));
    drop(front);
    let sinks = match Arc::try_unwrap(holding) {
        Ok(Holding { device, sinks }) => {
            drop(device);
            sinks.into_inner()?
        }
        Err(_) => return Err("the engine has stopped and still holds the device".into()),
    };
    if sinks.is_empty() {
        return Err("no object was opened".into());
    }
    let complaints = readers.finish(READ_LIMIT)?;
    let is_io_error = |line: &String| line.contains("os error 5)") || line.contains("os error 105)");
    if complaints.is_empty() || !complaints.iter().all(is_io_error) {
        return Err(format!("readers of a cache without a daemon: {complaints:?}").into());
    }
    let (code, log) = guest.refused(&guest.serve_arguments(&[]))?;
    if code != UNAVAILABLE {
        return Err(format!("with an object still open infill ended with {code}:\n{log}").into());
    }
    drop(sinks);
    guest.serve(&[])?;
    guest.umount(&at)?;
    guest.expect_whole(&options, "one.json", (4, How::Read))?;
    guest.stop()?;
    Ok(())
}

/// So that the open of the blob has been answered.
fn read_one_file(at: &Path) -> Outcome {
    let manifest = Manifest::load(&data("one.json"))?;
    let has_data = |entry: &&Entry| matches!(entry.content, Content::File { len_bytes: 1.., .. });
    std::fs::read(at.join(&manifest.entries.iter().find(has_data).ok_or("no file with data")?.path))?;
    Ok(())
}
