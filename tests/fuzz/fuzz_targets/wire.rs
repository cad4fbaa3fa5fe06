//! Messages of `/dev/cachefiles`, from any bytes.
//!
//! Invariants under test:
//! 1. No bytes cause a panic, an overflow or a read out of bounds, at any alignment.
//! 2. The descriptor of an OPEN that is understood is the one that is found before the message is read.
//! 3. A descriptor number is never negative.
//! 4. Keys keep to the kernel's limits, and a range is never empty or reversed.
//! 5. What is understood and encoded again is understood as the same.
//! 6. A message that is refused still tells which request to refuse, if it has a header at all.

#![no_main]

use infill::front::cachefiles::wire::{self, Body, Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // A buffer of our own at each alignment: the fuzzer's is always aligned alike.
    let shift = bytes.first().map_or(0, |byte| usize::from(byte % 8));
    let mut shifted = vec![0; shift];
    shifted.extend_from_slice(bytes);
    let bytes = &shifted[shift..];

    let fd = wire::open_fd(bytes);
    assert!(fd.is_none_or(|fd| fd >= 0));
    assert_eq!(Header::parse(bytes).is_some(), bytes.len() >= 16);

    let Ok(message) = wire::parse(bytes) else {
        return;
    };
    match &message.body {
        Body::Open { fd: carried, key } => {
            assert_eq!(fd, Some(*carried));
            assert!(key.domain().len() < wire::VOLUME_KEY_MAX_BYTES);
            assert!((1..=wire::COOKIE_KEY_MAX_BYTES).contains(&key.name().len()));
        }
        Body::Read(range) => assert!(range.start < range.end),
        Body::Close => {}
    }
    // A missing NUL at the end of a full-length volume key is the one thing that encoding adds.
    let encoded = wire::encode(&message);
    if encoded.len() <= bytes.len() {
        assert_eq!(wire::parse(&encoded), Ok(message));
    }
});
