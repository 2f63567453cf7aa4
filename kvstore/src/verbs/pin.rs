//! Pin and Unpin: a promise not to evict a prefix for a while.
//!
//! With an Nvme tier, the disk keeps the promise, and the pin survives a restart. Blocks that are only in memory are written to
//! disk, and stay in memory too. Without an Nvme tier, memory keeps the promise. With an Object tier, the daemon also records the
//! pin in the bucket, so that no node's collector deletes the blocks. That alone holds blocks that are only in the bucket.

use std::sync::Arc;

use bytes::Bytes;
use kvstore_proto::v1::{PinRequest, PinResponse, UnpinRequest, UnpinResponse};
use kvstore_tiers::caps::PIN_TTL_MS_MAX;
use kvstore_tiers::host::{HoldId, HoldKind, NamespaceId, RegisteredLayout};
use kvstore_tiers::object::Trouble;
use kvstore_tiers::residency::Presence;
use kvstore_tiers::{BlockRef, SequenceHash};
use tonic::Status;

use super::until_synced;
use crate::daemon::{Daemon, random_hold_id};
use crate::{caps, clock, wire};

/// Times that a pin looks again, where blocks leave between the look and the hold.
const ATTEMPTS: usize = 3;

/// Pins the leading readable run of a prefix. With an Nvme tier, the pin's record is synced before the answer.
pub async fn pin(daemon: &Daemon, namespace: NamespaceId, request: &PinRequest) -> Result<PinResponse, Status> {
    let layout = wire::known_layout(daemon, namespace, &request.layout_digest)?;
    let (group, _) = wire::known_group(&layout, request.group)?;
    let hashes = wire::hashes(&request.sequence_hashes, caps::HASHES_PER_LOOKUP_MAX)?;
    if !(1..=PIN_TTL_MS_MAX).contains(&request.ttl_ms) {
        return Err(wire::invalid(
            "ttl_ms",
            format!("{} is out of range: it must be 1 to {PIN_TTL_MS_MAX} ms", request.ttl_ms),
        ));
    }
    let now = clock::now();
    let expires = now.plus_ms(request.ttl_ms);
    for _ in 0..ATTEMPTS {
        let presences = daemon.host.presence(&layout, group, &hashes);
        let on_disk = match &daemon.nvme {
            Some(nvme) => nvme.presence(&layout, group, &hashes),
            None => vec![false; hashes.len()],
        };
        let in_bucket = match &daemon.object {
            Some(object) => object.presence(&layout, group, &hashes),
            None => vec![false; hashes.len()],
        };
        let is_here = |at: usize| presences.get(at) == Some(&Presence::Resident) || on_disk.get(at) == Some(&true);
        let run = (0..hashes.len()).take_while(|at| is_here(*at) || in_bucket.get(*at) == Some(&true)).count();
        let rests_on_bucket = !(0..run).all(is_here);
        let above: Vec<_> = (0..run)
            .filter(|at| is_here(*at) && on_disk.get(*at) != Some(&true))
            .filter_map(|at| hashes.get(at).copied())
            .collect();
        let id = random_hold_id();
        let runs = [(&*layout, group, above.as_slice())];
        let held = daemon.host.hold(namespace, id, HoldKind::Pin, &runs, expires).map_err(wire::hold_error)?;
        let release = || daemon.host.release_hold(namespace, id, HoldKind::Pin);
        if run == 0 {
            release();
            return Ok(PinResponse { pin: Bytes::new(), pinned_blocks: 0 });
        }
        if held.blocks < above.len() {
            release();
            continue;
        }
        if let Some(nvme) = &daemon.nvme {
            let block = |hash: &_| BlockRef { layout: &layout, group, hash: *hash };
            let blocks: Vec<BlockRef<'_>> = hashes.iter().take(run).map(block).collect();
            if let Err(refused) = nvme.pin(id.0, &blocks, expires, true, now) {
                release();
                return Err(Status::resource_exhausted(format!(
                    "{refused}: unpin other blocks, or wait until a pin expires"
                )));
            }
            let above_disk = |at: usize| is_here(at) && on_disk.get(at) == Some(&false);
            // A pin that is to survive needs the bytes on disk.
            for (at, hash) in hashes.iter().enumerate().take(run).filter(|(at, _)| above_disk(*at)) {
                let parent = at.checked_sub(1).and_then(|before| hashes.get(before)).copied();
                nvme.write_back(&block(hash), parent, Vec::new(), false);
            }
        }
        if let Err(trouble) =
            refer(daemon, id, &layout, group, hashes.get(..run).unwrap_or_default(), request.ttl_ms).await
        {
            if rests_on_bucket {
                release();
                daemon.nvme.iter().for_each(|nvme| _ = nvme.unpin(id.0));
                let problem = format!(
                    "some blocks are only in the object store, and the daemon could not record the pin there: {trouble}"
                );
                return Err(Status::unavailable(problem));
            }
            tracing::warn!(%trouble, "a pin could not be recorded in the bucket: a collector may delete its blocks there, but this node keeps them");
        }
        until_synced(daemon).await?;
        return Ok(PinResponse { pin: wire::hold_bytes(id), pinned_blocks: run as u32 });
    }
    Err(Status::resource_exhausted("blocks left memory while they were being pinned: try again"))
}

/// The bucket is told of a pin.
async fn refer(
    daemon: &Daemon,
    id: HoldId,
    layout: &Arc<RegisteredLayout>,
    group: u16,
    hashes: &[SequenceHash],
    ttl_ms: u64,
) -> Result<(), Trouble> {
    match &daemon.object {
        Some(object) => object.refer(id.0, layout, group, hashes, ttl_ms).await,
        None => Ok(()),
    }
}

/// Ends a pin before its time.
pub fn unpin(daemon: &Daemon, namespace: NamespaceId, request: &UnpinRequest) -> Result<UnpinResponse, Status> {
    let id = wire::hold_id("pin", &request.pin)?;
    let mut unpinned = daemon.host.release_hold(namespace, id, HoldKind::Pin);
    // After a restart only the disk knows the pin; a ticket's name must not end here as a pin.
    if !daemon.host.has_hold(namespace, id)
        && let Some(nvme) = &daemon.nvme
    {
        unpinned |= nvme.unpin(id.0);
    }
    if let Some(object) = &daemon.object {
        // Where it fails the reference ends by its time.
        object.end_reference(id.0);
    }
    Ok(UnpinResponse { unpinned })
}
