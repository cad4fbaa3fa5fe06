//! What an operator meets: confinement, the doctor, limits, space, signals, the log, exit codes, who holds the device,
//! and who keeps it over a restart.

pub mod bag;
pub mod confine;
pub mod doctor;
pub mod erofs;
pub mod exit;
pub mod extsize;
pub mod keep;
pub mod keeper;
pub mod limits;
pub mod log;
pub mod mounting;
pub mod notify;
pub mod passing;
pub mod processes;
pub mod reflink;
pub mod seeding;
pub mod signals;
pub mod space;
pub mod state;
pub mod xattr;
