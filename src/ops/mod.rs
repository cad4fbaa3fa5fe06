//! What operators meet: whether this host can run the daemon.

pub mod doctor;
