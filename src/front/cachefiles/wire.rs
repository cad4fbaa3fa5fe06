//! The messages that `/dev/cachefiles` hands out, as bytes. Pure.
//!
//! Layouts are those of include/uapi/linux/cachefiles.h: native endian, naturally packed, one message a
//! read(2). Nothing in a message is believed: [`parse`] checks every length before
//! it is used, and never panics. A message that opens an object also carries a file descriptor, which is ours
//! from the moment the message was read; [`open_fd`] finds it even when the rest makes no sense.

use std::os::fd::RawFd;

use crate::key::Key;
use crate::range::{self, ByteRange};

/// Size of the buffer for one message in bytes (`CACHEFILES_MSG_MAX_SIZE`); the kernel answers a smaller
/// one with `EMSGSIZE` and keeps the message.
pub const MSG_MAX_BYTES: usize = 1024;

/// Longest volume key in bytes, with its NUL: `I` and the key must fit a file name of 255
/// (fs/cachefiles/volume.c).
pub const VOLUME_KEY_MAX_BYTES: usize = 255;

/// Longest cookie key in bytes; `cachefiles_cook_key` has a `BUG_ON` above `NAME_MAX - 3`
/// (fs/cachefiles/key.c).
pub const COOKIE_KEY_MAX_BYTES: usize = 252;

/// What EROFS puts before its domain in a volume key (`erofs_fscache_register_volume`).
const VOLUME_PREFIX: &[u8] = b"erofs,";

/// Bytes of the header before every message: `msg_id`, `opcode`, `len`, `object_id`.
const HEADER_BYTES: usize = 16;

/// Bytes of an OPEN's fixed part after the header: both key sizes, `fd`, `flags`.
const OPEN_BYTES: usize = 16;

/// Bytes of a READ's payload: `off`, `len`.
const READ_BYTES: usize = 16;

/// `enum cachefiles_opcode`.
const OP_OPEN: u32 = 0;
/// See [`OP_OPEN`].
const OP_CLOSE: u32 = 1;
/// See [`OP_OPEN`].
const OP_READ: u32 = 2;

/// What every message begins with. Enough to answer one whose payload is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Names the request in its answer; 0 is an ordinary value.
    pub msg_id: u32,
    /// Which object it is about; 0xFFFFFFFF if its descriptor was closed meanwhile.
    pub object_id: u32,
    /// Length of the whole message as the kernel states it.
    pub len_bytes: u32,
    opcode: u32,
}

impl Header {
    /// Reads the header; `None` if the message is shorter than one.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self { msg_id: u32_at(bytes, 0)?, opcode: u32_at(bytes, 4)?, len_bytes: u32_at(bytes, 8)?, object_id: u32_at(bytes, 12)? })
    }

    /// Whether the kernel waits for a `copen`.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        self.opcode == OP_OPEN
    }

    /// Whether the kernel waits for a `READ_COMPLETE`.
    #[must_use]
    pub const fn is_read(&self) -> bool {
        self.opcode == OP_READ
    }
}

/// One message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// See [`Header::msg_id`].
    pub msg_id: u32,
    /// See [`Header::object_id`].
    pub object_id: u32,
    /// What it says.
    pub body: Body,
}

/// What a message says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// An object came to life.
    Open {
        /// The descriptor the kernel installed for it; see [`open_fd`].
        fd: RawFd,
        /// Which blob it is.
        key: Key,
    },
    /// An object is gone.
    Close,
    /// A reader waits for these bytes; never empty. An end beyond 2^64 is cut to 2^64 - 1.
    Read(ByteRange),
}

/// Why a message made no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// Not even a header, or a payload of the wrong length for its opcode.
    #[error("{0} bytes do not make a message of this kind")]
    Truncated(usize),
    /// The length in the header is not the length that was read.
    #[error("the header says {said} bytes but {got} were read")]
    Length {
        /// What the header says.
        said: u32,
        /// What read(2) returned.
        got: usize,
    },
    /// No such opcode.
    #[error("unknown opcode {0}")]
    Opcode(u32),
    /// An OPEN without an open descriptor.
    #[error("there is no descriptor {0}")]
    Descriptor(u32),
    /// The keys do not fill the message, or one of them is empty or longer than the kernel can use.
    #[error("a volume key of {volume} and a cookie key of {cookie} bytes in {room} bytes")]
    KeySizes {
        /// Stated size of the volume key.
        volume: u32,
        /// Stated size of the cookie key.
        cookie: u32,
        /// Bytes there are for both.
        room: usize,
    },
    /// The volume is not one of EROFS.
    #[error("the volume key does not begin with `erofs,`")]
    NotErofs,
    /// A READ of nothing.
    #[error("an empty range at offset {0}")]
    EmptyRange(u64),
}

/// The descriptor that an OPEN carries, whatever else is wrong with the message; `None` if this is no OPEN
/// or it carries none.
#[must_use]
pub fn open_fd(bytes: &[u8]) -> Option<RawFd> {
    if !Header::parse(bytes)?.is_open() {
        return None;
    }
    let fd = RawFd::try_from(u32_at(bytes, HEADER_BYTES + 8)?).ok()?;
    (fd >= 0).then_some(fd)
}

/// Reads one message, exactly as read(2) returned it.
///
/// # Errors
/// See [`WireError`].
pub fn parse(bytes: &[u8]) -> Result<Message, WireError> {
    let header = Header::parse(bytes).ok_or(WireError::Truncated(bytes.len()))?;
    if usize::try_from(header.len_bytes) != Ok(bytes.len()) {
        return Err(WireError::Length { said: header.len_bytes, got: bytes.len() });
    }
    let payload = &bytes[HEADER_BYTES..];
    let body = match header.opcode {
        OP_OPEN => parse_open(payload)?,
        OP_CLOSE if payload.is_empty() => Body::Close,
        OP_READ if payload.len() == READ_BYTES => parse_read(payload)?,
        OP_CLOSE | OP_READ => return Err(WireError::Truncated(bytes.len())),
        other => return Err(WireError::Opcode(other)),
    };
    Ok(Message { msg_id: header.msg_id, object_id: header.object_id, body })
}

fn parse_open(payload: &[u8]) -> Result<Body, WireError> {
    let short = WireError::Truncated(HEADER_BYTES + payload.len());
    let field = |index: usize| u32_at(payload, index * 4).ok_or(short);
    // The fourth field, `flags`, is 0 in every kernel.
    let (volume_bytes, cookie_bytes, fd) = (field(0)?, field(1)?, field(2)?);
    let keys = payload.get(OPEN_BYTES..).ok_or(short)?;
    let sizes = WireError::KeySizes { volume: volume_bytes, cookie: cookie_bytes, room: keys.len() };
    // `room` bounds both, so a size that would overflow is caught without arithmetic on it.
    let volume_len = usize::try_from(volume_bytes).map_err(|_| sizes)?;
    let (volume, cookie) = keys.split_at_checked(volume_len).ok_or(sizes)?;
    if usize::try_from(cookie_bytes) != Ok(cookie.len())
        || volume.is_empty()
        || volume.len() > VOLUME_KEY_MAX_BYTES
        || cookie.is_empty()
        || cookie.len() > COOKIE_KEY_MAX_BYTES
    {
        return Err(sizes);
    }
    let volume = volume.strip_suffix(b"\0").unwrap_or(volume);
    let domain = volume.strip_prefix(VOLUME_PREFIX).ok_or(WireError::NotErofs)?;
    Ok(Body::Open { fd: RawFd::try_from(fd).map_err(|_| WireError::Descriptor(fd))?, key: Key::new(domain, cookie) })
}

fn parse_read(payload: &[u8]) -> Result<Body, WireError> {
    let short = WireError::Truncated(HEADER_BYTES + payload.len());
    let offset = u64_at(payload, 0).ok_or(short)?;
    let len_bytes = u64_at(payload, 8).ok_or(short)?;
    let range = offset..offset.saturating_add(len_bytes);
    if range::len(&range) == 0 {
        return Err(WireError::EmptyRange(offset));
    }
    Ok(Body::Read(range))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let (field, _) = bytes.get(at..)?.split_first_chunk()?;
    Some(u32::from_ne_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let (field, _) = bytes.get(at..)?.split_first_chunk()?;
    Some(u64::from_ne_bytes(*field))
}

/// The message as the kernel would write it. For tests and for model kernels; the sizes of the keys are
/// not checked.
#[must_use]
pub fn encode(message: &Message) -> Vec<u8> {
    let (opcode, payload) = match &message.body {
        Body::Open { fd, key } => (OP_OPEN, encode_open(*fd, key)),
        Body::Close => (OP_CLOSE, Vec::new()),
        Body::Read(range) => (OP_READ, [range.start, range::len(range)].map(u64::to_ne_bytes).concat()),
    };
    let len_bytes = saturating_u32(HEADER_BYTES + payload.len());
    let mut bytes = [message.msg_id, opcode, len_bytes, message.object_id].map(u32::to_ne_bytes).concat();
    bytes.extend(payload);
    bytes
}

fn encode_open(fd: RawFd, key: &Key) -> Vec<u8> {
    let volume = [VOLUME_PREFIX, key.domain(), b"\0"].concat();
    let sizes = [volume.len(), key.name().len()].map(saturating_u32);
    let mut payload = [sizes[0], sizes[1], fd.cast_unsigned(), 0].map(u32::to_ne_bytes).concat();
    payload.extend(volume);
    payload.extend(key.name());
    payload
}

fn saturating_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a 6.12.117 kernel sent for `fsid=a.img` without a domain, but for the native-endian numbers.
    fn real_open() -> Vec<u8> {
        let mut bytes = [0u32, 0, 49, 1, 12, 5, 7, 0].map(u32::to_ne_bytes).concat();
        bytes.extend(b"erofs,a.img\0a.img");
        bytes
    }

    fn put(bytes: &mut [u8], field: usize, value: u32) {
        bytes[field * 4..][..4].copy_from_slice(&value.to_ne_bytes());
    }

    #[test]
    fn a_real_open_is_understood_and_encoded_alike() {
        let message = parse(&real_open()).unwrap();
        assert_eq!(message, Message { msg_id: 0, object_id: 1, body: Body::Open { fd: 7, key: Key::new(b"a.img", b"a.img") } });
        assert_eq!(encode(&message), real_open());
    }

    #[test]
    fn a_volume_key_without_its_nul_is_taken_as_it_is() {
        let mut bytes = [1u32, 0, 41, 1, 8, 1, 7, 0].map(u32::to_ne_bytes).concat();
        bytes.extend(b"erofs,abx");
        let Body::Open { key, .. } = parse(&bytes).unwrap().body else { panic!("not an OPEN") };
        assert_eq!(key, Key::new(b"ab", b"x"));
    }

    #[test]
    fn sizes_that_lie_are_refused_and_the_descriptor_is_found() {
        let refused = |volume, cookie| {
            let mut bytes = real_open();
            put(&mut bytes, 4, volume);
            put(&mut bytes, 5, cookie);
            assert_eq!(open_fd(&bytes), Some(7));
            let room = 17;
            let wrong = WireError::KeySizes { volume, cookie, room };
            assert_eq!(parse(&bytes), Err(wrong));
        };
        refused(0, 17);
        refused(17, 0);
        refused(12, 4);
        refused(12, 6);
        refused(u32::MAX, 18);
        refused(12, u32::MAX);
        refused(u32::MAX, u32::MAX);
        refused(1 << 31, 1 << 31);
    }

    #[test]
    fn keys_that_would_crash_a_kernel_are_refused() {
        let open = |domain: usize, name: usize| {
            let body = Body::Open { fd: 3, key: Key::new(&vec![b'd'; domain], &vec![b'n'; name]) };
            let (msg_id, object_id) = (1, 1);
            parse(&encode(&Message { msg_id, object_id, body }))
        };
        assert!(open(248, 252).is_ok());
        assert!(open(249, 252).is_err());
        assert!(open(248, 253).is_err());
    }

    #[test]
    fn broken_messages_are_told_apart() {
        let mut bytes = real_open();
        bytes.push(0);
        assert_eq!(parse(&bytes), Err(WireError::Length { said: 49, got: 50 }));
        let mut bytes = real_open();
        put(&mut bytes, 1, 3);
        assert_eq!(parse(&bytes), Err(WireError::Opcode(3)));
        assert_eq!(open_fd(&bytes), None);
        let mut bytes = real_open();
        put(&mut bytes, 6, u32::MAX);
        assert_eq!(parse(&bytes), Err(WireError::Descriptor(u32::MAX)));
        assert_eq!(open_fd(&bytes), None);
        let mut bytes = real_open();
        bytes[32] = b'E';
        assert_eq!(parse(&bytes), Err(WireError::NotErofs));
        // Cut after the descriptor: no keys, not even their flags, but the descriptor is there.
        let mut bytes = real_open()[..28].to_vec();
        put(&mut bytes, 2, 28);
        assert_eq!(parse(&bytes), Err(WireError::Truncated(28)));
        assert_eq!(open_fd(&bytes), Some(7));
        assert_eq!(open_fd(&bytes[..27]), None);
    }

    #[test]
    fn a_range_past_the_end_of_numbers_is_cut() {
        let read = |offset: u64, len: u64| {
            let mut bytes = [4u32, OP_READ, 32, 1].map(u32::to_ne_bytes).concat();
            bytes.extend([offset, len].map(u64::to_ne_bytes).concat());
            parse(&bytes).map(|message| message.body)
        };
        assert_eq!(read(4096, u64::MAX), Ok(Body::Read(4096..u64::MAX)));
        assert_eq!(read(4096, 0), Err(WireError::EmptyRange(4096)));
        assert_eq!(read(u64::MAX, 1), Err(WireError::EmptyRange(u64::MAX)));
    }

    fn any_message() -> impl Strategy<Value = Message> {
        let bytes = |max| proptest::collection::vec(any::<u8>(), 0..=max);
        let open = (0..=RawFd::MAX, bytes(248), bytes(251), any::<u8>()).prop_map(|(fd, domain, mut name, last)| {
            name.push(last);
            let key = Key::new(&domain, &name);
            Body::Open { fd, key }
        });
        let read =
            (any::<u64>(), any::<u64>()).prop_filter("never empty", |(a, b)| a != b).prop_map(|(a, b)| Body::Read(a.min(b)..a.max(b)));
        let body = prop_oneof![open, read, Just(Body::Close)];
        (any::<u32>(), any::<u32>(), body).prop_map(|(msg_id, object_id, body)| Message { msg_id, object_id, body })
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_read_back(message in any_message()) {
            let bytes = encode(&message);
            prop_assert!(bytes.len() <= MSG_MAX_BYTES);
            prop_assert_eq!(parse(&bytes), Ok(message));
        }

        /// A valid message with one part overwritten and an end cut or added comes closer to the edges than
        /// bytes that are all random; both must be survived, at every alignment.
        #[test]
        fn no_bytes_cause_a_panic(
            message in any_message(),
            (at, patch) in (0usize..64, proptest::collection::vec(any::<u8>(), 0..9)),
            (keep, more) in (0usize..600, proptest::collection::vec(any::<u8>(), 0..40)),
            shift in 0usize..8,
        ) {
            let mut bytes = vec![0; shift];
            bytes.extend(encode(&message));
            bytes.truncate(shift + keep);
            bytes.extend(more);
            for (slot, byte) in bytes.iter_mut().skip(shift + at).zip(patch) {
                *slot = byte;
            }
            let bytes = &bytes[shift..];
            if let Ok(Message { body: Body::Open { fd, .. }, .. }) = parse(bytes) {
                prop_assert_eq!(open_fd(bytes), Some(fd));
            }
        }
    }
}
