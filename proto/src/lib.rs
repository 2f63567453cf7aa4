//! The contract: the messages and services of `kvstore.v1`, the framing of their byte streams, the hashes by
//! which engines name blocks, and what of ZeroMQ events travel over.
//!
//! Opens no connection. Both sides of the wire use it; nothing below the wire does.

pub mod chunks;
pub mod data_stream;
pub mod hashes;
pub mod zmtp;

/// The generated messages and services.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
    tonic::include_proto!("kvstore.v1");
}

/// The compiled descriptors of `kvstore.v1`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kvstore_v1.descriptors"));
