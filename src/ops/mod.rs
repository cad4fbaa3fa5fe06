//! What an operator meets: confinement, the doctor, limits, space, signals, the log, exit codes, who holds the device,
//! and who keeps it over a restart.
//!
//! | file | its subject |
//! |---|---|
//! | `doctor` | whether this host can serve, and what to do if not |
//! | `tune` | what could be set differently on this host, and setting it |
//! | `confine`, `limits` | what the daemon gives up, and how much it may have |
//! | `space` | how full the cache may become, and what goes |
//! | `keep`, `keeper`, `passing`, `notify`, `state` | the device over a restart: systemd or a process keeps it |
//! | `mounting`, `seeding` | images that are mounted, and blobs that are in the cache beforehand |
//! | `processes`, `signals`, `log`, `exit` | the host's processes, and what passes between it and this one |
//! | `status`, `metrics` | what a daemon is and does, for people and for Prometheus |
//! | `erofs`, `extsize`, `inode`, `reflink`, `xattr` | what file systems are asked beside reading and writing |
//! | `files` | files for others to look into, written in one step |

pub mod bag;
pub mod confine;
pub mod doctor;
pub mod erofs;
pub mod exit;
pub mod extsize;
pub mod files;
pub mod inode;
pub mod keep;
pub mod keeper;
pub mod limits;
pub mod log;
pub mod metrics;
pub mod mounting;
pub mod notify;
pub mod passing;
pub mod processes;
pub mod reflink;
pub mod seeding;
pub mod signals;
pub mod space;
pub mod state;
pub mod status;
pub mod tune;
pub mod xattr;
