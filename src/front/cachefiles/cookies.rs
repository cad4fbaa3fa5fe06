//! Which blobs the kernel works with right now: fscache's lists in `/proc`.
//!
//! Whoever is going to be confined opens them before ([`Lists::open`]) and keeps them: no rule of Landlock would last,
//! because procfs makes another inode whenever its dentry was shrunk (`proc_get_inode`, fs/proc/inode.c), and a rule belongs to
//! an inode.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use super::cache_dir::CacheDirError;
use super::layout::{Place, VOLUME_PREFIX, volume_key};
use crate::hex::{hex, unhex};
use crate::key::Key;

/// fscache's volumes, a header of two lines and then one each (`fscache_volumes_seq_show`). Since Linux 6.8 the
/// directory is a link to `/proc/fs/netfs`.
const VOLUMES: &str = "/proc/fs/fscache/volumes";

/// fscache's cookies, in the same form (`fscache_cookies_seq_show`).
const COOKIES: &str = "/proc/fs/fscache/cookies";

/// The state of a cookie that has given its object back (`fscache_cookie_states`, the last one).
const DROPPED: &str = "D";

/// Whether the kernel has `key` open, as part of a mounted image or of one that is being mounted or unmounted.
///
/// # Errors
/// The lists cannot be read; where there are none, nothing is in use.
pub(super) fn in_use(key: &Key) -> Result<bool, CacheDirError> {
    let Lists { volumes, cookies } = Lists::open()?;
    Ok(listed(&volumes.read()?, &cookies.read()?, key))
}

/// Both lists, open.
#[derive(Debug)]
pub struct Lists {
    volumes: List,
    cookies: List,
}

impl Lists {
    /// Opens them, for as long as they are wanted.
    ///
    /// # Errors
    /// They cannot be opened. That there are none is fine: then nothing is in use.
    pub fn open() -> Result<Self, CacheDirError> {
        Ok(Self { volumes: List::open(VOLUMES.as_ref())?, cookies: List::open(COOKIES.as_ref())? })
    }

    /// The places of all blobs that the kernel has open now.
    ///
    /// # Errors
    /// The lists cannot be read.
    pub fn live(&self) -> Result<HashSet<Place>, CacheDirError> {
        Ok(live_in(&self.volumes.read()?, &self.cookies.read()?))
    }
}

/// One list. Its path is only for messages.
#[derive(Debug)]
struct List {
    /// `None`: there is no such list.
    file: Option<File>,
    path: &'static Path,
}

impl List {
    fn open(path: &'static Path) -> Result<Self, CacheDirError> {
        match File::open(path) {
            Ok(file) => Ok(Self { file: Some(file), path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self { file: None, path }),
            Err(error) => Err(CacheDirError::io(path, "open the list of what the kernel has open")(error)),
        }
    }

    /// Its text as it is now: a read from the beginning makes the kernel list anew (`seq_read_iter`, fs/seq_file.c).
    fn read(&self) -> Result<Vec<u8>, CacheDirError> {
        let mut text = Vec::new();
        let Some(mut file) = self.file.as_ref() else { return Ok(text) };
        let read = file.rewind().and_then(|()| file.read_to_end(&mut text));
        read.map(|_| text).map_err(CacheDirError::io(self.path, "read what the kernel has open"))
    }
}

/// Looks `key` up in the two lists. The volume's key ends its line and is not escaped, so a strange domain may
/// be found in the line of another one: then more counts as in use, never less.
#[must_use]
pub fn listed(volumes: &[u8], cookies: &[u8], key: &Key) -> bool {
    let wanted = [b" ", &volume_key(key)[..]].concat();
    let volumes: Vec<_> = lines(volumes).filter(|line| line.ends_with(&wanted)).filter_map(|line| fields(line).next()).collect();
    let name = hex(key.name());
    !volumes.is_empty()
        && lines(cookies).any(|line| {
            // COOKIE VOLUME REF ACT ACC S FL KEY
            let fields: Vec<_> = fields(line).collect();
            matches!(fields[..], [_, volume, _, _, _, state, _, key, ..]
                if volumes.contains(&volume) && state != DROPPED.as_bytes() && key == name.as_bytes())
        })
}

/// See [`Lists::live`]. A volume whose key holds a newline is not found; the kernel still refuses to cull what is in use.
#[must_use]
pub fn live_in(volumes: &[u8], cookies: &[u8]) -> HashSet<Place> {
    let marker = [b" ", VOLUME_PREFIX].concat();
    let domain = |line: &[u8]| line.windows(marker.len()).position(|part| part == marker).map(|at| line[at + marker.len()..].to_vec());
    let domains: HashMap<_, _> = lines(volumes).filter_map(|line| Some((fields(line).next()?.to_vec(), domain(line)?))).collect();
    let place = |line| {
        let fields: Vec<_> = fields(line).collect();
        let [_, volume, _, _, _, state, _, key, ..] = fields[..] else { return None };
        let domain = domains.get(volume).filter(|_| state != DROPPED.as_bytes())?;
        Place::of(&Key::new(domain, &unhex(key)?)).ok()
    };
    lines(cookies).filter_map(place).collect()
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUMES_TEXT: &[u8] = b"\
VOLUME   REF   nCOOK ACC FL CACHE           KEY
======== ===== ===== === == =============== ================
00000001     3     2   1 00 infill          erofs,dom
00000002     2     1   1 00 infill          erofs,a.img
";

    const COOKIES_TEXT: &[u8] = b"\
COOKIE   VOLUME   REF ACT ACC S FL DEF             
======== ======== === === === = == ================
00000001 00000001   2   1   1 A 4008 612e696d67
00000002 00000001   1   0   0 D 4008 622e696d67
00000003 00000002   1   1   1 L 4000 612e696d67
";

    #[test]
    fn only_a_live_cookie_of_the_same_volume_is_in_use() {
        for (domain, name, expected) in [
            ("dom", "a.img", true),
            ("a.img", "a.img", true),
            ("dom", "b.img", false),
            ("dom", "c.img", false),
            ("om", "a.img", false),
            ("b.img", "a.img", false),
        ] {
            let key = Key::new(domain.as_bytes(), name.as_bytes());
            assert_eq!(listed(VOLUMES_TEXT, COOKIES_TEXT, &key), expected, "{key}");
        }
        assert!(!listed(b"", b"", &Key::new(b"dom", b"a.img")));
    }

    /// With a list that every kernel has.
    #[test]
    fn an_open_list_is_read_as_it_is_now() {
        let list = List::open("/proc/thread-self/comm".as_ref()).unwrap();
        let before = list.read().unwrap();
        assert!(!before.is_empty() && list.read().unwrap() == before);
        std::fs::write("/proc/thread-self/comm", b"listed").unwrap();
        assert_eq!(list.read().unwrap(), b"listed\n");
        assert!(List::open("/proc/no/such/list".as_ref()).unwrap().read().unwrap().is_empty());
    }

    #[test]
    fn the_places_of_live_cookies_are_found() {
        let place = |domain: &[u8]| Place::of(&Key::new(domain, b"a.img")).unwrap();
        let found = live_in(VOLUMES_TEXT, COOKIES_TEXT);
        assert_eq!(found, HashSet::from([place(b"dom"), place(b"a.img")]));
        assert!(live_in(b"", COOKIES_TEXT).is_empty());
    }
}
