//! EROFS images as they lie on disk.

pub mod superblock;
