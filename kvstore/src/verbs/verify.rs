//! Verify: reads every block, in memory and on disk, and compares it with its checksums.

use std::sync::Arc;

use kvstore_proto::v1::VerifyProgress;
use kvstore_tiers::SlotKey;
use kvstore_tiers::host::NamespaceId;
use kvstore_tiers::nvme::VerifyReport;
use tokio::sync::mpsc;

use crate::caps;
use crate::daemon::Daemon;
use crate::telemetry;

/// Verifies what is in memory now; a report after each batch, the last with `done`. Ends early when
/// nobody listens any more, or takes no report for a while.
pub async fn verify(daemon: Arc<Daemon>, reports: mpsc::Sender<VerifyProgress>) {
    let tell = async |progress| reports.send_timeout(progress, caps::REPORT_STALL).await.is_ok();
    let on_disk = daemon.nvme.as_ref().map_or(0, |nvme| nvme.blocks());
    let mut progress = VerifyProgress { blocks: daemon.host.status().blocks + on_disk, ..VerifyProgress::default() };
    for (namespace, slab) in daemon.host.slabs() {
        for batch in daemon.host.keys_of_slab(namespace, slab).chunks(caps::VERIFY_BATCH) {
            for key in batch {
                check(&daemon, namespace, key, &mut progress);
            }
            if !tell(progress).await {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
    if let Some(nvme) = &daemon.nvme {
        for (volume, segment) in nvme.blocks_to_verify() {
            let nvme = std::sync::Arc::clone(nvme);
            let checked = tokio::task::spawn_blocking(move || {
                let mut report = VerifyReport::default();
                nvme.verify_segment(volume, segment, &mut report);
                report
            });
            let report = match checked.await {
                Ok(report) => report,
                Err(error) => {
                    tracing::error!(%error, "a segment could not be verified, so the verification ended early");
                    return;
                }
            };
            progress.verified += report.verified;
            progress.verified_bytes += report.verified_bytes;
            progress.corrupt += report.corrupt;
            if report.verified > 0 && !tell(progress).await {
                return;
            }
        }
    }
    progress.done = true;
    tell(progress).await;
}

fn check(daemon: &Daemon, namespace: NamespaceId, key: &SlotKey, progress: &mut VerifyProgress) {
    let Some(block) = daemon.host.lease_quietly(namespace, key) else { return };
    progress.verified += 1;
    progress.verified_bytes += block.len() as u64;
    if kvstore_tiers::crc32(&block) != block.crc32() {
        progress.corrupt += 1;
        telemetry::add(&daemon.traffic.quarantined, 1);
        tracing::error!(hash = %key.hash, "dropped a block whose bytes do not match its checksum");
        drop(block);
        daemon.host.drop_key(namespace, key);
    }
}
