use super::setup::reason;
use super::*;
use crate::engine::buffers::Buffers;
use nix::sys::eventfd::EventFd;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

fn ring(buffers: &Buffers, wake: &EventFd) -> Option<Ring> {
    let watch = Watch { requests: &[], wake: wake.as_fd() };
    match Ring::new(
        Settings { depth: 4, receives: 4, workers: 2, near: &[], sinks_block: true, sinks_copy: false, receives_aside: false },
        &buffers.whole(),
        watch,
    ) {
        Ok(ring) => Some(ring),
        Err(error) => {
            eprintln!("not run: {}", explain(&error));
            None
        }
    }
}

fn wait_for(ring: &mut Ring, n: usize) -> Vec<(u64, i32)> {
    let mut done = Vec::new();
    for _ in 0..100 {
        if done.len() >= n {
            break;
        }
        ring.wait(Some(Duration::from_millis(100)), &mut done).unwrap();
    }
    done.iter().map(|done| (done.op.key, done.result)).collect()
}

#[test]
fn copies_a_file_through_fixed_files_and_buffers() {
    let (buffers, wake) = (Buffers::new(4, 65536).unwrap(), EventFd::new().unwrap());
    let Some(mut ring) = ring(&buffers, &wake) else { return };
    let data: Vec<u8> = (0..65536u32).map(|i| (i % 251) as u8).collect();
    let (source, sink) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    source.write_all_at(&data, 0).unwrap();
    let (from, to) = (ring.add_file(source.as_fd()), ring.add_file(sink.as_fd()));
    ring.push(Op { key: 7, kind: Kind::Read, file: from, offset: 0, memory: buffers.slot(1, 0, 65536), then: None });
    assert_eq!(wait_for(&mut ring, 1), [(7, 65536)]);
    ring.push(Op { key: 8, kind: Kind::Write, file: to, offset: 4096, memory: buffers.slot(1, 0, 65536), then: None });
    assert_eq!(wait_for(&mut ring, 1), [(8, 65536)]);
    let mut got = vec![0; 65536];
    sink.read_exact_at(&mut got, 4096).unwrap();
    assert!(got == data);
    ring.remove_file(from);
    ring.remove_file(to);
}

#[test]
fn replies_are_written_in_one_call_and_say_how_each_of_them_went() {
    let (buffers, wake) = (Buffers::new(4, 65536).unwrap(), EventFd::new().unwrap());
    let (to, nobody) = (EventFd::new().unwrap(), RawFd::MAX);
    let requests = [to.as_fd()];
    for receives_aside in [false, true] {
        let settings = Settings { depth: 4, receives: 4, workers: 2, near: &[], sinks_block: true, sinks_copy: false, receives_aside };
        let Ok(mut ring) = Ring::new(settings, &buffers.whole(), Watch { requests: &requests, wake: wake.as_fd() }) else {
            return eprintln!("not run: no ring");
        };
        let reply = |to: RawFd, count: u64| Reply { to, bytes: count.to_ne_bytes() };
        // More than the queue has room for at once.
        let mut replies: Vec<_> = (0..REPLIES_MAX as u64).map(|count| reply(to.as_raw_fd(), count)).collect();
        replies[7].to = nobody;
        let mut results = Vec::new();
        for _ in 0..3 {
            assert!(ring.reply(&replies, &mut results));
            let expected: Vec<_> = (0..REPLIES_MAX).map(|n| if n == 7 { -libc::EBADF } else { 8 }).collect();
            assert_eq!(results, expected);
            assert_eq!(to.read().unwrap(), (0..REPLIES_MAX as u64).sum::<u64>() - 7);
        }
        // What completed meanwhile is told of, and descriptors are closed.
        let gone = tempfile::tempfile().unwrap();
        let (raw, inode) = (gone.as_raw_fd(), gone.metadata().unwrap().ino());
        ring.close(gone.into());
        to.write(1).unwrap();
        ring.watch(0);
        let (mut done, mut ready) = (Vec::new(), Ready::default());
        for _ in 0..3 {
            let now = ring.wait(Some(Duration::from_millis(50)), &mut done).unwrap();
            ready.requests |= now.requests;
        }
        assert_eq!((ready.requests, done.len()), (1, 0));
        drop(ring);
        // Whoever has its number now has another file.
        let link = std::fs::read_link(format!("/proc/self/fd/{raw}"));
        assert!(link.is_err() || std::fs::metadata(format!("/proc/self/fd/{raw}")).map_or(true, |now| now.ino() != inode));
        to.read().unwrap();
    }
}

#[test]
fn a_write_follows_its_read_by_itself_if_that_gave_everything() {
    let (buffers, wake) = (Buffers::new(4, 65536).unwrap(), EventFd::new().unwrap());
    let Some(mut ring) = ring(&buffers, &wake) else { return };
    let (source, sink) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    source.write_all_at(&[7; 8192], 0).unwrap();
    let (file, to) = (FileRef::plain(source.as_fd()), FileRef::plain(sink.as_fd()));
    for (slot, offset) in [(0, 0), (1, 4096)] {
        let memory = buffers.slot(slot, 0, 8192);
        ring.push(Op { key: slot.into(), kind: Kind::Read, file, offset, memory, then: Some((to, 4096)) });
    }
    let mut done = Vec::new();
    while done.len() < 2 {
        ring.wait(Some(Duration::from_millis(100)), &mut done).unwrap();
    }
    let mut ended: Vec<_> = done.iter().map(|done| (done.op.key, done.result, done.copied)).collect();
    ended.sort_unstable();
    let copied = ring.features().links;
    assert_eq!(ended, [(0, 8192, copied), (1, 4096, false)]);
    assert!(ring.ops.is_empty() && ring.wait(Some(Duration::from_millis(20)), &mut done).is_ok() && done.len() == 2);
    assert_eq!(sink.metadata().unwrap().len(), if copied { 12288 } else { 0 });
}

#[test]
fn messages_come_in_order_and_an_empty_device_is_not_waited_for() {
    let (buffers, wake) = (Buffers::new(5, 4096).unwrap(), EventFd::new().unwrap());
    let Some(mut ring) = ring(&buffers, &wake) else { return };
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    // A file that cannot say that it is empty, as cachefiles' device.
    let plain = std::fs::File::open("/proc/version").unwrap();
    for len in 1..=3 {
        theirs.send(&[0; 3][..len]).unwrap();
    }
    let mut receive = |fd: BorrowedFd<'_>, n: u32| {
        for key in 0..n {
            let memory = buffers.slot(key, 0, 1024);
            ring.push(Op { key: key.into(), kind: Kind::Receive, file: FileRef::plain(fd), offset: 0, memory, then: None });
        }
        let mut done = Vec::new();
        ring.wait(Some(Duration::ZERO), &mut done).unwrap();
        done.iter().map(|done| (done.op.key, done.result)).collect::<Vec<_>>()
    };
    let empty = -libc::EAGAIN;
    assert_eq!(receive(ours.as_fd(), 5), [(0, 1), (1, 2), (2, 3), (3, empty), (4, empty)]);
    assert_eq!(receive(plain.as_fd(), 2), [(0, -libc::EINTR), (1, -libc::EINTR)]);
    assert!(receive(plain.as_fd(), 1)[0].1 > 0);
}

#[test]
fn a_wake_up_ends_the_wait_and_can_be_repeated() {
    let (buffers, wake) = (Buffers::new(1, 4096).unwrap(), EventFd::new().unwrap());
    let Some(mut ring) = ring(&buffers, &wake) else { return };
    for _ in 0..3 {
        wake.write(1).unwrap();
        let mut woken = false;
        for _ in 0..100 {
            woken |= ring.wait(Some(Duration::from_millis(100)), &mut Vec::new()).unwrap().woken;
            if woken {
                break;
            }
        }
        assert!(woken);
        wake.read().unwrap();
    }
}

#[test]
fn an_operation_that_is_not_needed_is_forbidden() {
    let (buffers, wake) = (Buffers::new(1, 4096).unwrap(), EventFd::new().unwrap());
    let Some(mut ring) = ring(&buffers, &wake) else { return };
    if !ring.features().restricted {
        return eprintln!("not run: this kernel does not restrict rings");
    }
    ring.submit(opcode::Nop::new().build().user_data(3));
    ring.enter(1, Some(Duration::from_secs(5))).unwrap();
    let results: Vec<_> = ring.ring.0.completion().filter(|cqe| cqe.user_data() == 3).map(|cqe| cqe.result()).collect();
    assert_eq!(results, [-libc::EACCES]);
}

#[test]
fn more_operations_than_the_queue_holds_are_all_done() {
    let (buffers, wake) = (Buffers::new(1, 4096).unwrap(), EventFd::new().unwrap());
    let Some(mut ring) = ring(&buffers, &wake) else { return };
    let file = tempfile::tempfile().unwrap();
    let to = ring.add_file(file.as_fd());
    for key in 0..100 {
        ring.push(Op { key, kind: Kind::Write, file: to, offset: key * 4096, memory: buffers.zeros(4096), then: None });
    }
    let mut keys: Vec<_> = wait_for(&mut ring, 100).iter().map(|done| done.0).collect();
    keys.sort_unstable();
    assert_eq!(keys, (0..100).collect::<Vec<_>>());
}

/// The kernel keeps completions that the queue has no room for (`IORING_FEAT_NODROP`).
#[test]
fn fault_completions_that_overflow_the_queue_are_not_lost() {
    let (buffers, wake) = (Buffers::new(1, 4096).unwrap(), EventFd::new().unwrap());
    let Some(mut ring) = ring(&buffers, &wake) else { return };
    let capacity = ring.ring.0.params().cq_entries() as u64;
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let from = ring.add_file(file.as_fd());
    let count = 4 * capacity;
    for key in 0..count {
        ring.push(Op { key, kind: Kind::Read, file: from, offset: 0, memory: buffers.slot(0, 0, 4096), then: None });
    }
    // Nothing is taken out meanwhile.
    for _ in 0..count {
        ring.flush_backlog();
        ring.enter(0, None).unwrap();
    }
    assert!(ring.ring.0.submission().cq_overflow(), "{count} completions fit into {capacity}");
    let mut done = wait_for(&mut ring, usize::try_from(count).unwrap());
    done.sort_unstable();
    assert_eq!(done, (0..count).map(|key| (key, 4096)).collect::<Vec<_>>());
}

#[test]
fn a_refusal_names_who_refused() {
    assert!(reason(libc::EPERM, Some("2"), false).contains("kernel.io_uring_disabled=2"));
    assert!(reason(libc::EPERM, Some("0"), true).contains("seccomp"));
    assert!(reason(libc::ENOSYS, None, true).contains("seccomp"));
    assert!(reason(libc::ENOSYS, None, false).contains("CONFIG_IO_URING"));
    assert!(reason(libc::ENOMEM, Some("0"), false).contains("MEMLOCK"));
}
