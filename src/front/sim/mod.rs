//! A model kernel, for tests: the rules of cachefiles in on-demand mode without a kernel.
//!
//! ```text
//!   rng       the seed                           readers   processes that read a mounted image
//!   content   which bytes are where              objects   cookies and their states
//!   blob      what the bytes should be           queue     requests to the daemon, ids, delivery
//!   sink      the cache file and its write rules kernel    all of them together, as one device
//! ```
//! Three things are made of it: `world`, where everything goes wrong by chance; `timed`, where operations take time; and
//! `socket`, where the daemon is the real one.

pub mod blob;
pub mod content;
pub mod kernel;
pub mod objects;
pub mod queue;
pub mod readers;
pub mod rng;
pub mod sink;
pub mod socket;
pub mod timed;
pub mod world;
