//! EROFS images as they lie on disk: where the metadata is (`superblock`), which blobs hold the data (`devices`), and the
//! smallest one (`minimal`).

pub mod devices;
pub mod minimal;
pub mod superblock;
