//! What an operator meets: limits, signals, the log.

pub mod limits;
pub mod log;
pub mod signals;
