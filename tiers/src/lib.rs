//! Placement of blocks.
pub mod eviction;
pub mod simulate;
