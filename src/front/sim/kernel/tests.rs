//! The rules of the real kernel, one by one.

use std::sync::Arc;

use super::*;
use crate::front::sim::blob::{PAGE_BYTES, SimBlob};
use crate::front::sim::sink::FLAVOURS;
use crate::store::SourceMode;

const LEN: u64 = 4 * PAGE_BYTES;

struct Opened {
    kernel: Kernel,
    blob: Arc<SimBlob>,
    msg_id: u32,
    object: u32,
    fd: u32,
}

fn delivered(flavour: usize) -> Opened {
    let blob = Arc::new(SimBlob::whole_file(0, LEN, SourceMode::Buffered));
    let mut kernel = Kernel::new(FLAVOURS[flavour], 0);
    let cookie = kernel.add_cookie(Cookie::new(0, "a".into(), Some(blob.clone()), PAGE_BYTES));
    kernel.mount(cookie);
    let Ok(Some(Message::Open { msg_id, object, fd, .. })) = kernel.read(ReadFault::None) else {
        panic!("no OPEN");
    };
    Opened { kernel, blob, msg_id, object, fd }
}

fn live(flavour: usize) -> Opened {
    let mut opened = delivered(flavour);
    opened.kernel.copen(opened.msg_id, LEN as i64).unwrap();
    assert!(opened.kernel.work(0));
    opened
}

fn page(blob: &SimBlob) -> SinkWrite<'_> {
    SinkWrite { offset: 0, len: PAGE_BYTES, position: 0, content: blob, address: 0, at_most: None }
}

fn ask(opened: &mut Opened) -> (usize, u32) {
    let reader = opened.kernel.add_reader(Reader::new(0, Some(0..PAGE_BYTES), LEN));
    opened.kernel.run_reader(reader);
    let Ok(Some(Message::Read { msg_id, .. })) = opened.kernel.read(ReadFault::None) else {
        panic!("no READ");
    };
    (reader, msg_id)
}

#[test]
fn writes_fail_until_the_copen_was_worked_on() {
    let mut opened = delivered(2);
    let blob = opened.blob.clone();
    assert_eq!(opened.kernel.write(opened.fd, &page(&blob)), Err(Errno::ENOBUFS));
    opened.kernel.copen(opened.msg_id, LEN as i64).unwrap();
    assert_eq!(opened.kernel.write(opened.fd, &page(&blob)), Err(Errno::ENOBUFS));
    assert!(opened.kernel.work(0));
    assert_eq!(opened.kernel.write(opened.fd, &page(&blob)), Ok(PAGE_BYTES));
}

#[test]
fn copen_takes_only_a_delivered_open_and_only_once() {
    let mut opened = delivered(2);
    assert_eq!(opened.kernel.copen(opened.msg_id + 1, 0), Err(Errno::EINVAL));
    assert_eq!(opened.kernel.copen(opened.msg_id, LEN as i64), Ok(()));
    assert_eq!(opened.kernel.copen(opened.msg_id, LEN as i64), Err(Errno::EINVAL));
}

#[test]
fn a_failed_first_open_spoils_the_mount() {
    for size in [-2, -5000] {
        let mut opened = delivered(2);
        let result = opened.kernel.copen(opened.msg_id, size);
        assert_eq!(result.is_ok(), size == -2);
        assert_eq!(opened.kernel.cookies()[0].phase, Phase::Failed);
    }
}

#[test]
fn read_complete_wants_the_objects_own_fd_and_a_waiting_read() {
    let mut opened = live(2);
    let (reader, msg_id) = ask(&mut opened);
    let kernel = &mut opened.kernel;
    assert_eq!(kernel.read_complete(opened.fd + 1, msg_id), Err(Errno::EINVAL));
    assert_eq!(kernel.read_complete(opened.fd, msg_id + 1), Err(Errno::EINVAL));
    assert_eq!(kernel.read_complete(opened.fd, msg_id), Ok(()));
    assert_eq!(kernel.read_complete(opened.fd, msg_id), Err(Errno::EINVAL));
    assert_eq!(kernel.readers()[reader].doing, Doing::Looking { again: true });
}

#[test]
fn the_request_of_a_killed_reader_is_gone() {
    let mut opened = live(2);
    let (reader, msg_id) = ask(&mut opened);
    opened.kernel.kill(reader);
    assert_eq!(opened.kernel.read_complete(opened.fd, msg_id), Err(Errno::EINVAL));
}

#[test]
fn a_read_of_a_closed_object_opens_it_again_with_a_new_id() {
    let mut opened = live(2);
    let kernel = &mut opened.kernel;
    kernel.close_fd(opened.fd);
    let reader = kernel.add_reader(Reader::new(0, Some(0..PAGE_BYTES), LEN));
    kernel.run_reader(reader);
    assert_eq!(kernel.read(ReadFault::None), Ok(None), "it only starts the re-opening");
    assert!(!kernel.is_readable());
    assert!(kernel.work(0));
    assert_eq!(kernel.read(ReadFault::NoDescriptor), Err(Errno::EMFILE));
    assert_eq!(kernel.read(ReadFault::None), Ok(None), "and again after a lost OPEN");
    assert!(kernel.work(0));
    let Ok(Some(Message::Open { msg_id, object, .. })) = kernel.read(ReadFault::None) else {
        panic!("no OPEN");
    };
    assert_ne!(object, opened.object);
    kernel.copen(msg_id, LEN as i64).unwrap();
    assert!(matches!(kernel.read(ReadFault::None), Ok(Some(Message::Read { .. }))));
}

#[test]
fn a_close_whose_fd_is_gone_has_no_object_or_is_not_sent() {
    for (flavour, expected) in [(1, Some(Message::Close { object: NO_OBJECT })), (2, None)] {
        let mut opened = live(flavour);
        opened.kernel.umount(0);
        opened.kernel.close_fd(opened.fd);
        assert_eq!(opened.kernel.read(ReadFault::None), Ok(expected));
        assert_eq!(opened.kernel.cookies()[0].phase, Phase::Idle);
    }
}

#[test]
fn a_delivered_close_ends_every_read_of_the_object() {
    let mut opened = live(2);
    let (reader, msg_id) = ask(&mut opened);
    opened.kernel.umount(0);
    assert_eq!(opened.kernel.read(ReadFault::None), Ok(Some(Message::Close { object: opened.object })));
    assert_eq!(opened.kernel.readers()[reader].doing, Doing::Failed(Errno::EIO));
    assert_eq!(opened.kernel.read_complete(opened.fd, msg_id), Err(Errno::EINVAL));
    assert_eq!(opened.kernel.write(opened.fd, &page(&opened.blob)), Err(Errno::ENOBUFS));
}

#[test]
fn restore_delivers_again_and_an_open_whose_fd_lives_is_lost() {
    let mut opened = live(2);
    let (_, msg_id) = ask(&mut opened);
    opened.kernel.restore();
    assert!(matches!(opened.kernel.read(ReadFault::None), Ok(Some(Message::Read { msg_id: id, .. })) if id == msg_id));
    let mut opened = delivered(2);
    opened.kernel.restore();
    assert_eq!(opened.kernel.read(ReadFault::None), Err(Errno::EEXIST));
}
