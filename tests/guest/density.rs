//! Far more mounted objects than the daemon may have descriptors.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use infill::engine::plan::{Complete, Completion, Window};
use infill::engine::{Engine, Settings};
use infill::front::FrontEnd;
use infill::front::cachefiles::{BindOptions, Device};
use infill::lab::bench::Findings;
use infill::lab::bench::density::Crowd;
use infill::store::{SourceMode, Store, Stores};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

use crate::guest::{DOMAIN, Guest, INFILL, data};
use crate::{Outcome, Test};

pub(crate) const TESTS: &[Test] = &[
    ("a_thousand_objects_are_readable_under_a_budget_of_64", |g| crowd(g, 1_000, 64)),
    (TEN_THOUSAND, |g| crowd(g, 10_000, 512)),
    ("a_read_of_a_descriptor_that_was_just_given_up_is_answered", just_given_up),
];

/// Takes minutes when it is emulated, so it runs in one cell only.
pub(crate) const TEN_THOUSAND: &str = "ten_thousand_objects_are_readable_under_a_budget_of_512";
/// Blobs are made in memory: the store's disk has no room for so many.
const STORE: &str = "/tmp/density-store";
const IMAGES: &str = "/tmp/density-images";
/// Descriptors of the engine in this process, and images that are more than that.
const SMALL_BUDGET: u64 = 8;
const MANY: usize = 12;
const BLOCK_BYTES: usize = 4096;
/// How long it may take until the kernel asks.
const PATIENCE: Duration = Duration::from_secs(60);

fn crowd(guest: &mut Guest, objects: usize, fd_budget: u64) -> Outcome {
    let crowd =
        Crowd { infill: INFILL.into(), objects, fd_budget, store: STORE.into(), cache: guest.cache.clone(), at: IMAGES.into(), seed: 1 };
    let figures = crowd.run(&|far| println!("{far}"));
    let removed = [STORE, IMAGES].map(fs::remove_dir_all);
    let figures = figures?;
    println!("{}", serde_json::to_string(&figures)?);
    if !figures.is_good() || figures.reopens < objects as u64 {
        return Err(figures.table().into());
    }
    Ok(removed.into_iter().collect::<Result<_, _>>()?)
}

/// The kernel takes an object for open as long as somebody else refers to its descriptor's file, and asks for its data
/// after the engine has closed it.
fn just_given_up(guest: &mut Guest) -> Outcome {
    let names: Vec<String> = (0..MANY).map(|n| format!("{n}.img")).collect();
    names.iter().try_for_each(|name| guest.stock_as("plain.img", name))?;
    let device = Device::bind(&BindOptions::new(&guest.cache))?;
    let store: Arc<dyn Store> = Arc::new(Stores::from_specs(&[format!("dir:{}", guest.store.display()).parse()?], SourceMode::default())?);
    let front = Arc::clone(&device) as Arc<dyn FrontEnd>;
    let settings = Settings {
        fd_budget: SMALL_BUDGET,
        window: Window::Fixed(4096),
        completion: Completion { when: Complete::Off, ..Completion::default() },
        ..crate::space::settings()
    };
    let engine = Engine::start(&front, &store, &settings)?;
    let options = |name: &String| format!("fsid={name},domain_id={DOMAIN}");
    let first = guest.mount(&options(&names[0]))?;
    let pin = Pin::all_sinks()?;
    names[1..].iter().try_for_each(|name| guest.mount(&options(name)).map(drop))?;
    if engine.snapshot().evictions == 0 {
        return Err("nothing was given up".into());
    }
    let lost = || device.counts().unknown_objects;
    // Of the only file that is large enough to be whole blocks of the image.
    let reader = std::thread::spawn(move || {
        let mut block = vec![0; BLOCK_BYTES];
        File::open(first.join("big")).and_then(|file| file.read_exact_at(&mut block, 0)).map(|()| block)
    });
    let began = Instant::now();
    while lost() == 0 && !reader.is_finished() && began.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (lost, waited) = (lost(), !reader.is_finished());
    drop(pin);
    let block = reader.join().map_err(|_| "the reader died")??;
    guest.end_mounts_and_daemon();
    engine.stop(Duration::from_secs(10), || false)?;
    println!("{lost} reads were lost, and asked for again");
    if lost == 0 || !waited {
        return Err("the kernel asked for nothing that was given up".into());
    }
    if fs::read(data("plain.img"))?.chunks(BLOCK_BYTES).all(|of_image| of_image != block) {
        return Err("the reader got wrong bytes".into());
    }
    Ok(())
}

/// Refers to the files of descriptors, as a message does that is on its way.
struct Pin(#[expect(dead_code, reason = "it is held")] [std::os::fd::OwnedFd; 2]);

impl Pin {
    /// Of all objects that this process has open.
    fn all_sinks() -> Result<Self, Box<dyn std::error::Error>> {
        let is_sink = |fd: &RawFd| {
            let path = fs::read_link(format!("/proc/self/fd/{fd}"));
            path.is_ok_and(|path| path == Path::new("anon_inode:[cachefiles]"))
        };
        let numbers = fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let sinks: Vec<RawFd> = numbers.filter(is_sink).collect();
        let (from, to) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        sendmsg::<()>(from.as_raw_fd(), &[std::io::IoSlice::new(b"x")], &[ControlMessage::ScmRights(&sinks)], MsgFlags::empty(), None)?;
        match sinks.len() {
            0 => Err("the image has no open object".into()),
            _ => Ok(Self([from, to])),
        }
    }
}
