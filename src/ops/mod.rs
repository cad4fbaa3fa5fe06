//! What an operator meets: confinement, the doctor, limits, space, signals, the log, exit codes, and who holds the device.

pub mod confine;
pub mod doctor;
pub mod erofs;
pub mod exit;
pub mod extsize;
pub mod holder;
pub mod limits;
pub mod log;
pub mod reflink;
pub mod seeding;
pub mod signals;
pub mod space;
pub mod xattr;
