//! What an operator meets: limits, signals, the log, and who holds the device.

pub mod exit;
pub mod holder;
pub mod limits;
pub mod log;
pub mod signals;
pub mod xattr;
