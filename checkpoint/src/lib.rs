//! What bytes mean together: snapshots of folders and of weights in memory, as manifests and chunks in an object store; and decode sessions,
//! as logs there.
//!
//! Owns the formats (`docs/design/snapshot.md`, `docs/design/session.md`), what a save writes and in which order, what a restore reads, and what may be collected.
//! Knows the bucket (`kvstore_bucket`), and neither gRPC nor the command line.

mod buffers;
pub mod cache;
pub mod caps;
pub mod codec;
pub mod collect;
pub mod copy;
pub mod cut;
pub mod describe;
pub mod diff;
pub mod digest;
mod fill;
pub mod manifest;
pub mod memory;
pub mod near;
pub mod progress;
pub mod remove;
pub mod restore;
pub mod save;
pub mod sessions;
pub mod source;
pub mod store;
pub mod tensors;
