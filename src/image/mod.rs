//! EROFS images as they lie on disk.

pub mod devices;
pub mod superblock;
