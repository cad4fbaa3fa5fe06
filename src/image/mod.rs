//! EROFS images as they lie on disk: where the metadata is (`superblock`), and which blobs hold the data (`devices`).

pub mod devices;
pub mod superblock;
