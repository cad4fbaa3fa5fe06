//! Exit codes, those of sysexits.h where it has one.

/// It failed, and no other code says why.
pub const FAILED: u8 = 1;
/// The command line was wrong.
pub const USAGE: u8 = 2;
/// The kernel lacks a feature, or its device is in use.
pub const UNAVAILABLE: u8 = 69;
/// It cannot be done now, and perhaps soon.
pub const TRY_AGAIN: u8 = 75;
/// The operating system does not let this process do it.
pub const NO_PERMISSION: u8 = 77;
/// The configuration cannot work.
pub const BAD_CONFIGURATION: u8 = 78;
