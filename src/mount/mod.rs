//! Images that infill mounts itself, from files: what has to be there before, and what becomes of it after.
//!
//! | file | subject |
//! |---|---|
//! | `blobs` | the files of blobs: made, served, watched |
//! | `fsmount` | mounting EROFS from files |

mod blobs;
mod fsmount;

pub use self::blobs::{AttachError, Blobs};
pub use self::fsmount::{FsMountError, Source, mount};
