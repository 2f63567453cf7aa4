//! Verify: reads every block and compares it with its checksum.

use std::sync::Arc;

use kvstore_proto::v1::VerifyProgress;
use tokio::sync::mpsc;

use crate::caps;
use crate::daemon::Daemon;
use crate::telemetry;

/// Verifies what is in memory now; a report after each batch, the last with `done`. Ends early when
/// nobody listens any more.
pub async fn verify(daemon: Arc<Daemon>, reports: mpsc::Sender<VerifyProgress>) {
    let keys = daemon.host.keys();
    let mut progress = VerifyProgress { blocks: keys.len() as u64, ..VerifyProgress::default() };
    for batch in keys.chunks(caps::VERIFY_BATCH) {
        for (namespace, key) in batch {
            let Some(block) = daemon.host.lease_quietly(*namespace, key) else { continue };
            progress.verified += 1;
            progress.verified_bytes += block.len() as u64;
            if kvstore_tiers::crc32(&block) != block.crc32() {
                progress.corrupt += 1;
                telemetry::add(&daemon.traffic.quarantined, 1);
                tracing::error!(hash = %key.hash, "a block's bytes do not match their checksum: dropped");
                drop(block);
                daemon.host.drop_key(*namespace, key);
            }
        }
        if reports.send(progress).await.is_err() {
            return;
        }
        tokio::task::yield_now().await;
    }
    progress.done = true;
    let _ = reports.send(progress).await;
}
