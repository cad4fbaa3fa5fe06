//! `infill serve --check-config`: what can be known to go wrong without starting.

use super::{Failure, open_stores};
use crate::config::Config;
use crate::control;
use crate::ops::confine::User;
use crate::ops::{exit, limits};

/// Looks for the stores, the user, the group, and whether the process may have the descriptors that are set.
pub(super) fn check(config: &Config) -> Result<(), Failure> {
    open_stores(config)?;
    if let Some(account) = &config.user {
        User::find(account).map_err(|error| Failure::new(error.exit_code(), error))?;
    }
    if let Some(group) = &config.control_group {
        control::group_id(group).map_err(|error| Failure::new(error.exit_code(), error))?;
    }
    let budget = limits::raise().and_then(|raised| limits::fd_budget(config.fd_budget, raised, config.shards));
    budget.map(drop).map_err(|error| Failure::new(exit::BAD_CONFIGURATION, error))
}
