//! Capabilities: all of them go, in every set, and none can come back.

use caps::{CapSet, Capability, CapsHashSet};

/// Makes the permitted capabilities of this thread effective: again after a change of user.
pub(super) fn regain() -> Result<(), String> {
    let permitted = caps::read(None, CapSet::Permitted);
    permitted.and_then(|all| caps::set(None, CapSet::Effective, &all)).map_err(|error| error.to_string())
}

/// Empties the bounding set, so that no program started from here can have a capability.
pub(super) fn empty_bounding_set() -> Result<(), String> {
    caps::clear(None, CapSet::Bounding).map_err(|error| {
        format!("the bounding set cannot be emptied: {error}; start infill as root or add CAP_SETPCAP to what it is given")
    })
}

/// What it takes to look after a cache that belongs to root, as somebody else: to enter its directories and to remove what is
/// buried there, and to note when objects were last used. Landlock and seccomp bound both to the cache.
const CACHE_POWERS: [Capability; 2] = [Capability::CAP_DAC_OVERRIDE, Capability::CAP_FOWNER];

/// Empties the other sets, the effective one before the permitted one that must cover it. With `spare_cache` the thread
/// that looks after the cache can still [`regain`] what that takes; everybody else is to [`drop_all`] first.
pub(super) fn drop_all(spare_cache: bool) -> Result<String, String> {
    let had = caps::read(None, CapSet::Permitted).map_err(|error| format!("they cannot be read: {error}"))?;
    let spared: CapsHashSet = CACHE_POWERS.into_iter().filter(|power| spare_cache && had.contains(power)).collect();
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        let left = if matches!(set, CapSet::Permitted) { spared.clone() } else { CapsHashSet::new() };
        caps::set(None, set, &left).map_err(|error| format!("the {set:?} set cannot be emptied: {error}"))?;
    }
    let names: Vec<_> = CACHE_POWERS.iter().filter(|power| spared.contains(power)).map(ToString::to_string).collect();
    Ok(if names.is_empty() {
        "none".to_owned()
    } else {
        format!("none but {}, of the thread that makes room in the cache", names.join(" and "))
    })
}

/// From now on no program that is started gains anything from set-user-ID bits or file capabilities.
pub(super) fn gain_none() -> Result<String, String> {
    nix::sys::prctl::set_no_new_privs().map_err(|errno| format!("prctl(PR_SET_NO_NEW_PRIVS) failed: {errno}"))?;
    Ok("set".to_owned())
}
