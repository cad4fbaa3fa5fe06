//! infill serves the data of EROFS images on demand.
//!
//! Data flows one way, front end -> shard -> store -> sink -> answer; nothing calls back up.

pub mod cli;
pub mod config;
pub mod engine;
pub mod front;
pub mod key;
pub mod lab;
pub mod ops;
pub mod range;
pub mod store;
