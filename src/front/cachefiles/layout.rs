//! Where and how the kernel keeps a blob below its cache directory. Pure.
//!
//! ```text
//! DIR/cache/Ierofs,DOMAIN/@4a/Dimg1
//!           |             |   `- the object: the blob's name, encoded (fs/cachefiles/key.c)
//!           |             `- low byte of the cookie's hash (fs/cachefiles/namei.c)
//!           `- the volume: "I" and the volume key (fs/cachefiles/volume.c)
//! ```
//! Object and volume carry an extended attribute, here called their mark (fs/cachefiles/xattr.c). None of this
//! changed between Linux 5.19 and 7.1: a cache outlives a change of kernel.

use std::ffi::{CStr, OsStr, OsString};
use std::os::unix::ffi::OsStringExt;

use super::wire::COOKIE_KEY_MAX_BYTES;
pub(super) use super::wire::VOLUME_PREFIX;
use crate::key::Key;
use crate::range::align_up;

/// The kernel's mark on objects and volumes.
pub const MARK: &CStr = c"user.CacheFiles.cache";

/// Length of an object's mark in bytes: `struct cachefiles_xattr`, and EROFS adds nothing.
pub const OBJECT_MARK_BYTES: usize = 18;

/// The mark of a volume: `struct cachefiles_vol_xattr`, reserved and zero, and EROFS adds nothing.
pub const VOLUME_MARK: [u8; 4] = [0; 4];

/// What an object's length is rounded up to, in bytes: `CACHEFILES_DIO_BLOCK_SIZE` (fs/cachefiles/internal.h).
pub const OBJECT_ALIGN_BYTES: u64 = 4096;

/// `CACHEFILES_COOKIE_TYPE_DATA` (fs/cachefiles/xattr.c).
const TYPE_DATA: u8 = 1;

/// Longest name of a file or directory in bytes (`NAME_MAX`).
const NAME_MAX_BYTES: usize = 255;

/// `GOLDEN_RATIO_32` (include/linux/hash.h).
const GOLDEN_RATIO: u32 = 0x61C8_8647;

/// `cachefiles_charmap` (fs/cachefiles/key.c).
const CHARMAP: &[u8; 64] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-";

/// Why a key has no place in a cache: the kernel could not mount it either.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoPlace {
    /// One of its parts has no bytes.
    #[error("domain and name must not be empty")]
    Empty,
    /// The domain would lead out of the cache, or end early.
    #[error("a domain with '/' or a NUL byte cannot be a directory; mount with another domain_id")]
    BadDomain,
    /// `Ierofs,` and the domain would be too long.
    #[error("the domain is {0} bytes long and at most {max} are possible; mount with a shorter domain_id", max = NAME_MAX_BYTES - VOLUME_PREFIX.len() - 1)]
    DomainTooLong(usize),
    /// The name, encoded, would be too long.
    #[error("the name is too long for the cache, as a file it would have {0} bytes; mount with a shorter fsid or device name")]
    NameTooLong(usize),
}

/// Where a blob's object is, from the directory `cache` on.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Place {
    /// Name of the volume's directory.
    pub volume: OsString,
    /// Number of the directory in the volume.
    pub fanout: u8,
    /// Name of the object's file.
    pub object: OsString,
}

impl Place {
    /// Where the kernel looks for `key`.
    ///
    /// # Errors
    /// Nowhere; see [`NoPlace`].
    pub fn of(key: &Key) -> Result<Self, NoPlace> {
        let (domain, name) = (key.domain(), key.name());
        if domain.is_empty() || name.is_empty() {
            return Err(NoPlace::Empty);
        }
        if domain.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(NoPlace::BadDomain);
        }
        let volume_key = volume_key(key);
        let volume = [b"I", &volume_key[..]].concat();
        if volume.len() > NAME_MAX_BYTES {
            return Err(NoPlace::DomainTooLong(domain.len()));
        }
        let object = object_name(name);
        if object.len() > NAME_MAX_BYTES || name.len() > COOKIE_KEY_MAX_BYTES {
            return Err(NoPlace::NameTooLong(object.len()));
        }
        let [fanout, ..] = cookie_hash(volume_hash(&volume_key), name).to_le_bytes();
        Ok(Self { volume: OsString::from_vec(volume), fanout, object: OsString::from_vec(object) })
    }
}

/// Name of a volume's directory number `fanout`.
#[must_use]
pub fn fanout_name(fanout: u8) -> String {
    format!("@{fanout:02x}")
}

/// The number of a volume's directory; `None`: the kernel knows no such directory.
#[must_use]
pub fn fanout_of(name: &OsStr) -> Option<u8> {
    let number = u8::from_str_radix(name.to_str()?.strip_prefix('@')?, 16).ok()?;
    (*fanout_name(number) == *name).then_some(number)
}

/// The name under which fscache knows the volume of `key` (`erofs_fscache_register_volume`, fs/erofs/fscache.c).
#[must_use]
pub fn volume_key(key: &Key) -> Vec<u8> {
    [VOLUME_PREFIX, key.domain()].concat()
}

/// The mark of an object whose blob is `len_bytes` long and whose data is there or not, as its holes tell
/// (`cachefiles_set_object_xattr`).
#[must_use]
pub fn object_mark(len_bytes: u64) -> [u8; OBJECT_MARK_BYTES] {
    let mut mark = [0; OBJECT_MARK_BYTES];
    mark[..8].copy_from_slice(&len_bytes.to_be_bytes());
    // Bytes 8..16 are the zero point, and 17 the content: 0 but for network file systems.
    mark[16] = TYPE_DATA;
    mark
}

/// Length in bytes of the object of a blob that is `len_bytes` long (`cachefiles_create_tmpfile`).
#[must_use]
pub const fn object_len_bytes(len_bytes: u64) -> u64 {
    align_up(len_bytes, OBJECT_ALIGN_BYTES)
}

/// `fscache_alloc_volume`: the key with its length before it, padded with at least one zero. The caller
/// checked the length.
fn volume_hash(volume_key: &[u8]) -> u32 {
    let [len, ..] = volume_key.len().to_le_bytes();
    hash(0, &[&[len], volume_key, &[0]].concat())
}

/// `fscache_set_key`.
fn cookie_hash(volume_hash: u32, cookie_key: &[u8]) -> u32 {
    hash(volume_hash, cookie_key)
}

/// `fscache_hash` (fs/netfs/fscache_main.c), of data padded with zeros to whole words.
fn hash(salt: u32, data: &[u8]) -> u32 {
    let (mut x, mut y) = (0_u32, salt);
    for word in words(data) {
        x ^= u32::from_le_bytes(word);
        y ^= x;
        x = x.rotate_left(7).wrapping_add(y);
        y = y.rotate_left(20).wrapping_mul(9);
    }
    let fold = |value: u32| value.wrapping_mul(GOLDEN_RATIO);
    fold(y ^ fold(x))
}

/// The words of `data`, the last one filled up with zeros.
fn words(data: &[u8]) -> impl Iterator<Item = [u8; 4]> {
    data.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        word
    })
}

/// `cachefiles_cook_key`: the key itself where it is printable, else the shorter of hexadecimal words and
/// base 64.
fn object_name(key: &[u8]) -> Vec<u8> {
    if key.iter().all(|byte| matches!(byte, 33..=46 | 48..=127)) {
        return [b"D", key].concat();
    }
    let big = hex_name('S', words(key).map(u32::from_be_bytes));
    let little = hex_name('T', words(key).map(u32::from_le_bytes));
    let base64_len = 2 + 4 * key.len().div_ceil(3);
    let hex = if big.len() <= little.len() { big } else { little };
    if hex.len() < base64_len { hex.into_bytes() } else { base64_name(key) }
}

/// `S` or `T`, then the words without leading zeros, with commas between them; a zero is left out.
fn hex_name(kind: char, words: impl Iterator<Item = u32>) -> String {
    let words: Vec<_> = words.map(|word| if word == 0 { String::new() } else { format!("{word:x}") }).collect();
    format!("{kind}{}", words.join(","))
}

/// `E`, the number of bytes that are missing to whole groups of three, then four characters a group, lowest bits
/// first.
fn base64_name(key: &[u8]) -> Vec<u8> {
    let missing = key.len().div_ceil(3) * 3 - key.len();
    let mut name = vec![b'E', CHARMAP[missing]];
    for group in key.chunks(3) {
        let bits = group.iter().rev().fold(0, |bits, byte| bits << 8 | usize::from(*byte));
        name.extend((0..4).map(|digit| CHARMAP[bits >> (6 * digit) & 63]));
    }
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Volume key, cookie key and their hashes. The low bytes of most were seen as directories that kernels 6.1
    /// and 6.12 made; `erofs,test` and `erofs,dom0` were computed by the kernel's own function in user space.
    #[test]
    fn hashes_are_those_of_the_kernel() {
        let digest = "359e5b3766e0e2ba0c51a95692aea7ec7da8cd36cff50a9cc64281afaa3d1413";
        for (domain, name, volume, cookie, place) in [
            ("dom1", "img1", 0x0af1_241f, 0x9ea4_db4a, "@4a"),
            ("dom1", digest, 0x0af1_241f, 0x6e0e_6bd3, "@d3"),
            ("test.img", "test.img", 0xd13a_83f4, 0x69ef_6ef7, "@f7"),
            ("dom", "meta.img", 0x4c8e_d830, 0x1869_f63b, "@3b"),
            ("dom", "blob0", 0x4c8e_d830, 0x667e_df5a, "@5a"),
            ("test", "test.img", 0x6c5d_5056, 0xa9e0_0f73, "@73"),
            ("dom0", "test.img", 0x4d68_0e2f, 0x1853_d014, "@14"),
            ("dom0", "0123456789abcdef", 0x4d68_0e2f, 0xb39f_198e, "@8e"),
        ] {
            let key = Key::new(domain.as_bytes(), name.as_bytes());
            let of_volume = volume_hash(&volume_key(&key));
            assert_eq!((of_volume, cookie_hash(of_volume, key.name())), (volume, cookie), "{key}");
            let found = Place::of(&key).unwrap();
            assert_eq!(fanout_name(found.fanout), place, "{key}");
            assert_eq!(found.volume.into_string().unwrap(), format!("Ierofs,{domain}"));
            assert_eq!(found.object.into_string().unwrap(), format!("D{name}"));
        }
    }

    /// What the kernel's own function gives for these keys.
    #[test]
    fn names_are_encoded_as_the_kernel_does() {
        for (key, name) in [
            (&b"plain-Name.1~\x7f"[..], &b"Dplain-Name.1~\x7f"[..]),
            (b" ", b"T20"),
            (b"\xff", b"Tff"),
            (b"\x01\x01\x01\x01", b"S1010101"),
            (b"\0\0\0\x01", b"S1"),
            (b"/a/b", b"S2f612f62"),
            (b"\x01\x01\x01\x01\x01", b"E114g01400"),
            (b"img 1", b"E1FRSpw430"),
            (b"\xff\xfe\xfd", b"E0-Xv-"),
            (b"\xc3\xa9b\xc3\xa9", b"E13DGo3Da0"),
        ] {
            assert_eq!(object_name(key).escape_ascii().to_string(), name.escape_ascii().to_string());
        }
    }

    #[test]
    fn marks_are_those_of_the_kernel() {
        let seen = [0, 0, 0, 0, 0, 5, 0x50, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        assert_eq!(object_mark(348_160), seen);
        assert_eq!((object_len_bytes(1), object_len_bytes(4096), object_len_bytes(4097)), (4096, 4096, 8192));
    }

    #[test]
    fn keys_that_no_kernel_mounts_have_no_place() {
        let place = |domain: &[u8], name: &[u8]| Place::of(&Key::new(domain, name)).map(|_| ());
        assert_eq!(place(b"", b"a"), Err(NoPlace::Empty));
        assert_eq!(place(b"d", b""), Err(NoPlace::Empty));
        assert_eq!(place(b"../d", b"a"), Err(NoPlace::BadDomain));
        assert_eq!(place(b"d\0", b"a"), Err(NoPlace::BadDomain));
        assert_eq!(place(&[b'd'; 248], b"a"), Ok(()));
        assert_eq!(place(&[b'd'; 249], b"a"), Err(NoPlace::DomainTooLong(249)));
        assert_eq!(place(b"d", &[b'a'; 252]), Ok(()));
        assert_eq!(place(b"d", &[b'a'; 253]), Err(NoPlace::NameTooLong(254)));
        assert_eq!(place(b"d", &[0xff; 189]), Ok(()));
        assert_eq!(place(b"d", &[0xff; 190]), Err(NoPlace::NameTooLong(258)));
        assert!(NoPlace::DomainTooLong(249).to_string().contains("at most 248"));
    }

    proptest! {
        #[test]
        fn a_name_is_one_component_and_tells_keys_apart(
            a in proptest::collection::vec(1_u8.., 1..189),
            b in proptest::collection::vec(1_u8.., 1..189),
        ) {
            let (name_a, name_b) = (object_name(&a), object_name(&b));
            prop_assert!(name_a.len() <= NAME_MAX_BYTES);
            prop_assert!(name_a.iter().all(|byte| !matches!(byte, b'/' | 0)));
            prop_assert_eq!(a == b, name_a == name_b);
        }
    }
}
