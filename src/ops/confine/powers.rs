//! Capabilities: all of them go, in every set, and none can come back.

use caps::CapSet;

/// Makes the permitted capabilities effective again, as they were before a change of user.
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

/// Empties the other sets, the effective one before the permitted one that must cover it.
pub(super) fn drop_all() -> Result<String, String> {
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set).map_err(|error| format!("the {set:?} set cannot be emptied: {error}"))?;
    }
    Ok("none".to_owned())
}

/// From now on no program that is started gains anything from set-user-ID bits or file capabilities.
pub(super) fn gain_none() -> Result<String, String> {
    nix::sys::prctl::set_no_new_privs().map_err(|errno| format!("prctl(PR_SET_NO_NEW_PRIVS) failed: {errno}"))?;
    Ok("set".to_owned())
}
