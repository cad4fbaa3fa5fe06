//! Where blobs come from, and whether their blocks can be shared with the cache.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{Check, Id, Verdict};
use crate::front::cachefiles::cache_dir::nameless;
use crate::ops::reflink::clone_whole;
use crate::store::{SourceMode, StoreSpec, open_store};

/// Bytes of the file that is shared for a try: a block.
const PROBE_BYTES: usize = 4096;

/// Looks at a store, and at what it and the cache have in common.
#[must_use]
pub fn checks(spec: &StoreSpec, cache_dir: &Path) -> Vec<Check> {
    let check = store_check(spec);
    let is_there = check.verdict == Verdict::Ready;
    let mut checks = vec![check];
    let cache = cache_dir.ancestors().find(|path| path.is_dir());
    checks.extend(cache.filter(|_| is_there).map(|cache| reflink_check(spec, cache)));
    checks
}

fn store_check(spec: &StoreSpec) -> Check {
    match open_store(spec, SourceMode::default()) {
        Ok(store) => Check::ok(Id::Store, format!("{} can be read", store.name())),
        Err(error) => Check::fail(
            Id::Store,
            Verdict::Failed,
            error.to_string(),
            "mount or make it, let infill's user read it, or name another with --store",
        ),
    }
}

/// Only informs: where blocks cannot be shared, bytes are copied.
fn reflink_check(spec: &StoreSpec, cache: &Path) -> Check {
    const ID: Id = Id::StoreReflink;
    let device = |path: &Path| fs::metadata(path).ok().map(|found| found.dev());
    if device(spec.path()) != device(cache) {
        return Check::ok(ID, format!("{spec}: another file system than the cache's, so blobs are copied"));
    }
    if can_share(cache) {
        return Check::ok(ID, format!("{spec}: blobs can be shared with the cache and need not be copied (reflink; docs/seeding.md)"));
    }
    Check::ok(ID, format!("{spec}: the cache's file system cannot share blocks (XFS and btrfs can), so blobs are copied"))
}

/// Tries it with two files that have no name.
fn can_share(dir: &Path) -> bool {
    let (Ok(from), Ok(to)) = (nameless(dir), nameless(dir)) else { return false };
    from.write_all_at(&[1; PROBE_BYTES], 0).is_ok() && clone_whole(to.as_fd(), from.as_fd()).is_ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn provoked() -> Vec<Check> {
        let spec: StoreSpec = "dir:/no/such/store".parse().unwrap();
        vec![store_check(&spec), reflink_check(&spec, Path::new("/"))]
    }

    #[test]
    fn a_store_that_is_missing_is_named_and_another_file_system_only_told() {
        let cache = tempfile::tempdir().unwrap();
        let missing = checks(&"dir:/no/such/store".parse().unwrap(), cache.path());
        assert!(missing.len() == 1 && missing[0].found.contains("/no/such/store") && !missing[0].remedy.is_empty(), "{missing:?}");
        let elsewhere = checks(&"dir:/dev".parse().unwrap(), cache.path());
        assert!(elsewhere[1].found.contains("another file system"), "{elsewhere:?}");
        let beside = checks(&format!("dir:{}", cache.path().display()).parse().unwrap(), &cache.path().join("not/yet"));
        assert!(beside[1].found.contains("share"), "{beside:?}");
    }
}
