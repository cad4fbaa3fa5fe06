//! infill serves the data of EROFS images on demand.
//!
//! Data flows one way, front end -> shard -> store -> sink -> answer; nothing calls back up.
//!
//! | room | what is in it |
//! |---|---|
//! | `front` | how a kernel asks and is answered; `front::sim` is a model kernel for tests |
//! | `engine` | what to do for a request, and doing it |
//! | `store` | where the bytes of blobs are |
//! | `image` | EROFS images as they lie on disk |
//! | `mount` | images that infill mounts itself, from files |
//! | `control` | how a daemon is asked and told: HTTP on a unix socket |
//! | `ops`, `config`, `cli` | the host, the settings, the verbs |
//! | `lab` | real kernels in virtual machines, for the demo, the tests and the benchmarks |
//! | `key`, `range`, `hex` | words that all of them use |
//!
//! The way of one request, file by file, is drawn in docs/architecture.md.

pub mod cli;
pub mod config;
pub mod control;
pub mod engine;
pub mod front;
pub mod hex;
pub mod image;
pub mod key;
pub mod lab;
pub mod mount;
pub mod ops;
pub mod range;
pub mod store;
