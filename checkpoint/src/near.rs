//! Where chunks may lie nearer than in the store: in the memory or on the disk of this node's daemon.

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::digest::Digest;

/// A place that may have chunks. What it gives is verified by whoever asks.
pub trait Near: Send + Sync {
    /// The bytes of a chunk; `None` where it is not there, or cannot be had soon.
    fn chunk(&self, name: Digest, bytes: u64) -> BoxFuture<'_, Option<Bytes>>;

    /// What it gave is not the chunk.
    fn damaged(&self, name: Digest, bytes: u64) -> BoxFuture<'_, ()>;
}
