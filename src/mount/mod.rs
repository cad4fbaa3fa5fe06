//! Images that infill mounts itself, from files: what has to be there before, and what becomes of it after.
//!
//! | file | subject |
//! |---|---|
//! | `blobs` | the files of blobs: made, served, watched, let go |
//! | `claims` | who makes which of them |
//! | `opening` | having the engine open one |
//! | `restore`, `resume` | going on with what a dead daemon served |
//! | `space` | removing what nobody has mounted |
//! | `mounted` | mounts of the cache's files, as the kernel lists them |
//! | `notes` | what they were mounted of |
//! | `loops` | loop devices over the cache's files, which bypass us |
//! | `service` | what a daemon does for images |
//! | `images` | what clients may ask of it |
//! | `leases` | what is ready stays so until it is mounted |
//! | `prefetch` | bringing images whole |
//! | `fsmount` | mounting EROFS from files |
//! | `metadata` | whether the kernel asks for metadata |
//! | `read_ahead` | how much the kernel asks for at a time |

mod blobs;
mod claims;
mod error;
mod fsmount;
mod images;
mod leases;
pub mod loops;
pub mod metadata;
mod mounted;
mod notes;
mod opening;
mod prefetch;
mod read_ahead;
mod restore;
mod resume;
mod service;
mod space;

pub use self::blobs::{Blobs, Pinned, groups_wanted};
pub use self::error::{AttachError, BlobsError};
pub use self::fsmount::{Detached, FsMountError, Source, make, mount};
pub use self::mounted::{Mounted, is_of_cache, mounted, mounted_at, mounted_everywhere};
pub use self::read_ahead::ReadAheadError;
pub use self::restore::{Restored, contents, is_bag};
pub use self::service::{Service, ServiceSettings};
pub use self::space::BlobCache;
