//! Chunks of snapshots that a daemon has: where `kvstore snapshot restore` looks first.

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use kvstore_checkpoint::digest::Digest;
use kvstore_checkpoint::near::Near;
use kvstore_client::Chunks;

/// See the head of this file.
pub(super) struct DaemonChunks(pub(super) Chunks);

impl Near for DaemonChunks {
    fn chunk(&self, name: Digest, bytes: u64) -> BoxFuture<'_, Option<Bytes>> {
        self.0.get(name.0, bytes).boxed()
    }

    fn damaged(&self, name: Digest, bytes: u64) -> BoxFuture<'_, ()> {
        // Where it cannot be told, it is found damaged again.
        self.0.forget(name.0, bytes).map(|_| ()).boxed()
    }
}
