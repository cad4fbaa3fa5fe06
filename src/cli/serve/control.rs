//! The daemon's sockets, and what clients see of it there.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use super::reload::Shown;
use crate::cli::Failure;
use crate::config::{Config, FrontEndKind};
use crate::control::routes::Site;
use crate::control::{self, Access, Daemon, Images, Listening, Metrics, SocketError, Users};
use crate::ops::state::DEFAULT_STATE_DIR;
use crate::ops::status::Look;
use crate::ops::{exit, metrics};

/// Names by which a socket unit passes its sockets (`FileDescriptorName=`).
const CONTROL: &str = "control";
/// See [`CONTROL`].
const METRICS: &str = "metrics";

/// Sockets on which nobody is answered yet.
pub(super) struct Sockets {
    listening: Vec<Listening>,
    /// Whose members may do everything.
    group: Option<u32>,
}

impl Sockets {
    /// Takes out of what systemd `passed` the daemon's sockets, and makes those that are not there.
    pub(super) fn open(config: &Config, passed: &mut Vec<(String, OwnedFd)>) -> Result<Self, Failure> {
        Self::of(config, passed).map_err(|error| Failure::new(error.exit_code(), error))
    }

    fn of(config: &Config, passed: &mut Vec<(String, OwnedFd)>) -> Result<Self, SocketError> {
        let group = config.control_group.as_deref().map(|name| control::group_id(name).map(|gid| (name, gid))).transpose()?;
        let users = group.map_or(Users::Own, |(name, gid)| Users::Group(name, gid));
        let bind = |setting, path: &Path, users| is_wanted(config, path).then(|| control::bind(setting, path, users)).transpose();
        let control = match control::take_passed(passed, CONTROL, false)? {
            None => bind("control_socket", &config.control_socket, users)?,
            found => found,
        };
        let metrics = match control::take_passed(passed, METRICS, true)? {
            None => bind("metrics_socket", &config.metrics_socket, Users::All)?,
            found => found,
        };
        let port = config.metrics_listen.map(|address| control::listen_tcp("metrics_listen", address)).transpose()?;
        let all = [(Site::Control, control), (Site::Metrics, metrics), (Site::Metrics, port)];
        let listening = all.into_iter().filter_map(|(site, listener)| Some(Listening { site, listener: listener? })).collect();
        Ok(Self { listening, group: group.map(|(_, gid)| gid) })
    }

    /// Answers on them, from now on; the process is the user by now that it stays.
    pub(super) fn serve(self, daemon: Daemon) -> Result<(), Failure> {
        control::start(self.listening, Arc::new(daemon), Access::new(self.group))
            .map_err(|error| Failure::new(exit::FAILED, format!("no client can be answered: {error}; raise LimitNOFILE= or TasksMax=")))
    }
}

/// Tests that serve a model kernel run many at a time, and have no state directory but one that they name.
fn is_wanted(config: &Config, path: &Path) -> bool {
    config.front_end != FrontEndKind::Sim || !path.starts_with(DEFAULT_STATE_DIR)
}

/// What clients see.
pub(super) fn daemon(look: Look, settings: Shown, images: Option<Arc<dyn Images>>) -> Daemon {
    let front_end = look.front_end();
    let scraped = look.clone();
    let metrics = move || Metrics { content_type: metrics::CONTENT_TYPE, body: metrics::render(scraped.status()) };
    let statistics = move || serde_json::to_value(look.status()).unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }));
    Daemon {
        front_end,
        statistics: Box::new(statistics),
        metrics: Box::new(metrics),
        config: Box::new(move || settings.lock().unwrap_or_else(PoisonError::into_inner).clone().into()),
        images,
    }
}
