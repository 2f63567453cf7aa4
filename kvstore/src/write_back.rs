//! Write-back: in namespaces that are configured for it, blocks go to disk and to the bucket when they leave memory, or when
//! the daemon stops.

use std::sync::Arc;
use std::time::Duration;

use kvstore_tiers::SlotKey;
use kvstore_tiers::admission::Admission;
use kvstore_tiers::host::{LeavingBlock, NamespaceId};
use kvstore_tiers::nvme::BlockRef;
use kvstore_tiers::object::{Offer, Offered};
use tokio::time::Instant;

use crate::admission::Occasion;
use crate::config::Uploads;
use crate::daemon::Daemon;
use crate::{caps, clock, telemetry};

/// Writes what is to leave, until the runtime ends.
pub async fn write_back_forever(daemon: Arc<Daemon>) {
    loop {
        let more = daemon.host.leaving();
        tokio::pin!(more);
        more.as_mut().enable();
        for leaving in daemon.host.take_leaving() {
            write_back(&daemon, leaving, Instant::now() + caps::DIRTY_WAIT).await;
        }
        more.await;
    }
}

/// Gives a block to the tiers below that want it. Where they have no room until then, it is lost to them: it is a cache.
async fn write_back(daemon: &Arc<Daemon>, leaving: LeavingBlock, until: Instant) {
    let LeavingBlock { layout, group, hash, parent, block } = leaving;
    let to_disk = daemon.admitter.admission(layout.namespace) == Admission::Evicted;
    if let Some(nvme) = daemon.nvme.as_ref().filter(|_| to_disk) {
        let is_there = nvme.will_have(&layout, group, &hash);
        let admits = || daemon.admitter.admits(&layout, group, &hash, Occasion::Leaving, clock::now());
        if !is_there && !admits() {
            telemetry::add(&daemon.traffic.not_admitted, 1);
        } else if !is_there {
            while !nvme.has_dirty_room() && Instant::now() < until {
                let _ = tokio::time::timeout(caps::ROOM_POLL, nvme.cleaned()).await;
            }
            if nvme.has_dirty_room() {
                let _ = nvme.write_back(&BlockRef { layout: &layout, group, hash }, parent, Vec::new(), false);
            }
        }
    }
    let to_bucket = daemon.uploads_of(layout.namespace) == Uploads::Evicted;
    if let Some(object) = daemon.object.as_ref().filter(|_| to_bucket) {
        while !object.has_upload_room() && object.answers() && Instant::now() < until {
            object.make_room();
            let _ = tokio::time::timeout(caps::ROOM_POLL, object.uploaded()).await;
        }
        let has_waited = object.has_upload_room();
        let offer = Offer { layout, group, hash, parent, block, sums: Vec::new(), durable: false, has_waited };
        if matches!(object.offer(offer), Offered::Full) {
            tracing::debug!("a block left memory without an upload, because too many uploads were waiting");
        }
    }
}

/// The daemon stops: what memory alone has of such namespaces goes below, as far as it gets within `time`.
pub async fn write_back_all(daemon: &Arc<Daemon>, time: Duration) {
    let until = Instant::now() + time;
    let writes_back = |namespace: &NamespaceId| {
        let to_disk = daemon.nvme.is_some() && daemon.admitter.admission(*namespace) == Admission::Evicted;
        to_disk || daemon.uploads_of(*namespace) == Uploads::Evicted
    };
    let (mut offered, mut left) = (0u64, 0u64);
    for (namespace, slab) in daemon.host.slabs().into_iter().filter(|(namespace, _)| writes_back(namespace)) {
        for key in daemon.host.keys_of_slab(namespace, slab) {
            if Instant::now() >= until {
                left += 1;
            } else if let Some(leaving) = leaving(daemon, namespace, &key) {
                write_back(daemon, leaving, until).await;
                offered += 1;
            }
        }
    }
    if offered + left > 0 {
        tracing::info!(offered, left, "wrote back blocks that may have been only in memory");
    }
}

fn leaving(daemon: &Daemon, namespace: NamespaceId, key: &SlotKey) -> Option<LeavingBlock> {
    let layout = daemon.host.layout_at(namespace, key.layout)?;
    let parent = daemon.host.parent_of(namespace, key);
    let block = daemon.host.lease_quietly(namespace, key)?;
    Some(LeavingBlock { layout, group: key.group, hash: key.hash, parent, block })
}
