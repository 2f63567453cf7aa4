//! The `kvstore` binary as a process: as an operator meets it, and killed under load.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

mod crash;
mod pins;
mod process;
mod snapshots;
