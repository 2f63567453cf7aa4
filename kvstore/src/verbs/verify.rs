//! Verify: reads every block and compares it with its checksum.

use std::sync::Arc;

use kvstore_proto::v1::VerifyProgress;
use kvstore_tiers::SlotKey;
use kvstore_tiers::host::NamespaceId;
use tokio::sync::mpsc;

use crate::caps;
use crate::daemon::Daemon;
use crate::telemetry;

/// Verifies what is in memory now; a report after each batch, the last with `done`. Ends early when
/// nobody listens any more.
pub async fn verify(daemon: Arc<Daemon>, reports: mpsc::Sender<VerifyProgress>) {
    let mut progress = VerifyProgress { blocks: daemon.host.status().blocks, ..VerifyProgress::default() };
    for (namespace, slab) in daemon.host.slabs() {
        for batch in daemon.host.keys_of_slab(namespace, slab).chunks(caps::VERIFY_BATCH) {
            for key in batch {
                check(&daemon, namespace, key, &mut progress);
            }
            if reports.send(progress).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
    progress.done = true;
    let _ = reports.send(progress).await;
}

fn check(daemon: &Daemon, namespace: NamespaceId, key: &SlotKey, progress: &mut VerifyProgress) {
    let Some(block) = daemon.host.lease_quietly(namespace, key) else { return };
    progress.verified += 1;
    progress.verified_bytes += block.len() as u64;
    if kvstore_tiers::crc32(&block) != block.crc32() {
        progress.corrupt += 1;
        telemetry::add(&daemon.traffic.quarantined, 1);
        tracing::error!(hash = %key.hash, "a block's bytes do not match their checksum: dropped");
        drop(block);
        daemon.host.drop_key(namespace, key);
    }
}
