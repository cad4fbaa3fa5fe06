//! Images that infill mounts itself, from files: what has to be there before, and what becomes of it after.
//!
//! | file | subject |
//! |---|---|
//! | `blobs` | the files of blobs: made, served, watched, let go |
//! | `restore` | going on with what a dead daemon served |
//! | `poisoned` | mounts that nobody watches |
//! | `service` | what a daemon does for images |
//! | `control` | how a verb asks a daemon |
//! | `fsmount` | mounting EROFS from files |
//! | `metadata` | whether the kernel asks for metadata |

mod blobs;
pub mod control;
mod fsmount;
pub mod metadata;
mod poisoned;
mod restore;
mod service;

pub use self::blobs::{AttachError, Blobs, BlobsError, Pinned};
pub use self::fsmount::{FsMountError, Source, mount};
pub use self::poisoned::{Poisoned, poisoned};
pub use self::restore::{Restored, is_bag};
pub use self::service::{Prepared, Service};
