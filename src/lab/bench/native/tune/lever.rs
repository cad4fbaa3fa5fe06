//! How a knob is turned, and turned back.

use std::fs;

use crate::lab::{Result, Trying};
use crate::ops::tune::root::chosen;

/// A file of the kernel's, and its two values.
#[derive(Clone, Copy, Debug)]
pub(super) struct KernelFile {
    /// Where it is.
    pub(super) path: &'static str,
    /// Its value without the knob.
    pub(super) off: &'static str,
    /// And with it.
    pub(super) on: &'static str,
}

/// What is turned.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lever {
    /// Files that are written, and written back afterwards.
    pub(super) files: &'static [KernelFile],
    /// Flags of `infill serve`, without the knob and with it.
    pub(super) flags: [&'static [&'static str]; 2],
    /// Read-ahead of the mount in KiB, without the knob and with it.
    pub(super) mount_read_ahead_kib: Option<[u32; 2]>,
    /// That of the store's disk.
    pub(super) store_read_ahead_kib: Option<[u32; 2]>,
}

/// It is turned, until this is dropped.
#[derive(Debug)]
pub(super) struct Turned {
    pub(super) flags: &'static [&'static str],
    pub(super) mount_read_ahead_kib: Option<u32>,
    pub(super) store_read_ahead_kib: Option<u32>,
    /// Files, and what was in them.
    before: Vec<(&'static str, String)>,
}

impl Lever {
    /// Turns it on, or off.
    pub(super) fn turn(&self, on: bool) -> Result<Turned> {
        let side = usize::from(on);
        let mut turned = Turned {
            flags: self.flags[side],
            mount_read_ahead_kib: self.mount_read_ahead_kib.map(|kib| kib[side]),
            store_read_ahead_kib: self.store_read_ahead_kib.map(|kib| kib[side]),
            before: Vec::new(),
        };
        for KernelFile { path, off, on: of_on } in self.files {
            let before = fs::read_to_string(path).trying(|| format!("cannot read {path}"))?;
            turned.before.push((path, chosen(&before).to_owned()));
            let value = if on { of_on } else { off };
            fs::write(path, value).trying(|| format!("cannot write {value} to {path}"))?;
        }
        Ok(turned)
    }
}

impl Drop for Turned {
    fn drop(&mut self) {
        for (path, value) in self.before.iter().rev() {
            if let Err(error) = fs::write(path, value) {
                eprintln!("infill: {path} is not what it was before: cannot write {value} to it: {error}");
            }
        }
    }
}
