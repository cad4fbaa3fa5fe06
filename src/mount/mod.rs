//! Images that infill mounts itself, from files: what has to be there before, and what becomes of it after.
//!
//! | file | subject |
//! |---|---|
//! | `blobs` | the files of blobs: made, served, watched, let go |
//! | `restore` | going on with what a dead daemon served |
//! | `poisoned` | mounts that nobody watches |
//! | `space` | removing what nobody has mounted |
//! | `service` | what a daemon does for images |
//! | `control` | how a verb asks a daemon |
//! | `fsmount` | mounting EROFS from files |

mod blobs;
pub mod control;
mod fsmount;
mod poisoned;
mod restore;
mod service;
mod space;

pub use self::blobs::{AttachError, Blobs, BlobsError, Pinned};
pub use self::fsmount::{FsMountError, Source, mount};
pub use self::poisoned::{Poisoned, poisoned};
pub use self::restore::{Restored, contents, is_bag};
pub use self::service::{Prepared, Service};
pub use self::space::BlobCache;
