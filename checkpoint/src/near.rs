//! Where chunks may lie nearer than in the store: in the memory or on the disk of this node's daemon, or in a store on its disk.

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::digest::Digest;
use crate::manifest::Extent;
use crate::store::Store;

/// A place that may have chunks. What it gives is verified by whoever asks.
pub trait Near: Send + Sync {
    /// The bytes of a chunk; `None` where it is not there, or cannot be had soon.
    fn chunk(&self, name: Digest, bytes: u64) -> BoxFuture<'_, Option<Bytes>>;

    /// What it gave is not the chunk.
    fn damaged(&self, name: Digest, bytes: u64) -> BoxFuture<'_, ()>;
}

/// A store on this node's disk. What is damaged there stays, and is not given: `verify` names it, and a save mends it.
impl Near for Store {
    fn chunk(&self, name: Digest, bytes: u64) -> BoxFuture<'_, Option<Bytes>> {
        async move { Some(self.read_extent(Extent { chunk: name, bytes }).await.ok()?.0) }.boxed()
    }

    fn damaged(&self, _name: Digest, _bytes: u64) -> BoxFuture<'_, ()> {
        std::future::ready(()).boxed()
    }
}
