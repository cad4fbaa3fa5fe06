//! The engine: one shard a core, the same for every front end.

pub mod fill;
pub mod machine;
pub mod plan;
pub mod presence;
