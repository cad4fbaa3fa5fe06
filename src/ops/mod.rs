//! What operators meet: exit codes, who holds a device, and small edges to the host.

pub mod exit;
pub mod holder;
pub mod xattr;
