//! `infill serve --repair`: `infill repair`, started by the daemon for the mounts that nobody watched. A process of its own,
//! because the daemon will not be permitted to mount, and must not use what it serves.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::Builder;

use super::Failure;
use super::front::Opened;
use crate::config::Config;
use crate::ops::exit;

/// Starts it, if there is something to repair. It waits until the daemon serves.
pub(super) fn start(config: &Config, file: Option<&Path>, opened: &Opened) -> Result<Option<Child>, Failure> {
    let mut here =
        opened.mounts.mounted.iter().filter(|mount| opened.mounts.poisoned && mount.seen_by.is_none()).map(|mount| &mount.at).peekable();
    if here.peek().is_none() {
        return Ok(None);
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg0("infill").arg("repair");
    if let Some(file) = file {
        command.arg("--config").arg(file);
    }
    command.arg("--cache-dir").arg(&config.cache_dir).arg("--state-dir").arg(&config.state_dir);
    command.arg("--control-socket").arg(&config.control_socket).args(here);
    // Standard output is for those who wait for the daemon.
    command.stdin(Stdio::null()).stdout(io::stderr());
    let child = command.spawn().map_err(|error| Failure::new(exit::FAILED, format!("cannot start infill repair: {error}")))?;
    Ok(Some(child))
}

/// Waits for its end, on a thread.
pub(super) fn attend(mut child: Child) -> io::Result<()> {
    let wait = move || match child.wait() {
        Ok(status) if status.success() => tracing::info!("repaired: all mounts that nobody watched are replaced"),
        Ok(status) => tracing::error!("infill repair has ended ({status}), and not all mounts are replaced"),
        Err(error) => tracing::error!("cannot wait for infill repair: {error}"),
    };
    Builder::new().name("infill-repair".into()).spawn(wait).map(drop)
}
