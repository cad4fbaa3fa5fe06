//! The cachefiles front end: `/dev/cachefiles` in on-demand mode, which serves EROFS over fscache on
//! Linux 5.19 to 7.1.
//!
//! [`cache_dir`] and [`fsck`] prepare the directory, [`Device::bind`] takes the device, and then [`Device`] turns the
//! kernel's messages into requests. [`wire`] knows the messages, [`command`] the answers, `object` the descriptors;
//! `bind` takes the device, with the `limits` of culling, and `counters` counts what goes wrong. [`layout`] knows where the
//! kernel keeps what, so that [`seed`] can put it there beforehand; [`tree`] walks it, [`cookies`] says what of it is in
//! use, and [`cull`] has the kernel remove what is not.

pub mod cache_dir;
pub mod cull;
pub mod fsck;
pub mod layout;
pub mod seed;
pub mod tree;
pub mod wire;

mod bind;
pub mod command;
pub mod cookies;
mod counters;
mod device;
mod limits;
mod object;

pub use bind::{BindError, BindOptions, DEFAULT_DEVNODE};
pub use command::CommandError;
pub use counters::Counts;
pub use device::Device;
pub(crate) use object::take_over;

pub use limits::{BadLimits, CullLimits, Percents};
