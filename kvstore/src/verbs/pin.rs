//! Pin and Unpin: a promise not to evict a prefix for a while.
//!
//! With an Nvme tier, the disk keeps the promise, and the pin survives a restart. Blocks that are only in memory are written to
//! disk, and stay in memory too. Without an Nvme tier, memory keeps the promise. With an Object tier, the daemon also records the
//! pin in the bucket, so that no node's collector deletes the blocks. That alone holds blocks that are only in the bucket.

use std::sync::Arc;

use bytes::Bytes;
use kvstore_proto::v1::{PinRequest, PinResponse, UnpinRequest, UnpinResponse};
use kvstore_tiers::caps::PIN_TTL_MS_MAX;
use kvstore_tiers::host::{HoldKind, NamespaceId, RegisteredLayout};
use kvstore_tiers::nvme::{NvmeTier, WriteBack};
use kvstore_tiers::residency::Presence;
use kvstore_tiers::{BlockRef, BootTime, SequenceHash};
use tokio::sync::oneshot;
use tonic::Status;

use super::taken::Taken;
use super::until_synced;
use crate::daemon::Daemon;
use crate::{caps, clock, wire};

/// Times that a pin looks again, where blocks leave between the look and the hold.
const ATTEMPTS: usize = 3;
/// Times that a block is offered to the disk: see [`queue`].
const WRITE_ATTEMPTS: usize = 10;

/// What is to be pinned.
struct Prefix<'a> {
    layout: &'a Arc<RegisteredLayout>,
    group: u16,
    hashes: &'a [SequenceHash],
    ttl_ms: u64,
    expires: BootTime,
}

impl Prefix<'_> {
    fn block(&self, at: usize) -> Option<BlockRef<'_>> {
        Some(BlockRef { layout: self.layout, group: self.group, hash: *self.hashes.get(at)? })
    }

    fn on_disk(&self, daemon: &Daemon) -> Vec<bool> {
        let nvme = daemon.nvme.as_ref();
        nvme.map_or(vec![false; self.hashes.len()], |nvme| nvme.presence(self.layout, self.group, self.hashes))
    }
}

/// Where the leading readable run of a prefix is.
struct Run {
    blocks: usize,
    /// Those that are in memory and not on disk, by their places.
    above: Vec<usize>,
    /// Those that are on this node.
    here: Vec<usize>,
}

impl Run {
    fn of(daemon: &Daemon, prefix: &Prefix<'_>) -> Self {
        let presences = daemon.host.presence(prefix.layout, prefix.group, prefix.hashes);
        let on_disk = prefix.on_disk(daemon);
        let in_bucket = match &daemon.object {
            Some(object) => object.presence(prefix.layout, prefix.group, prefix.hashes),
            None => Vec::new(),
        };
        let is_on_disk = |at: usize| on_disk.get(at) == Some(&true);
        let is_here = |at: usize| presences.get(at) == Some(&Presence::Resident) || is_on_disk(at);
        let is_known = |at: &usize| is_here(*at) || in_bucket.get(*at) == Some(&true);
        let blocks = (0..prefix.hashes.len()).take_while(is_known).count();
        let here: Vec<usize> = (0..blocks).filter(|at| is_here(*at)).collect();
        let above = here.iter().copied().filter(|at| !is_on_disk(*at)).collect();
        Self { blocks, above, here }
    }

    fn rests_on_bucket(&self) -> bool {
        self.here.len() < self.blocks
    }
}

/// Pins the leading readable run of a prefix. With an Nvme tier, its blocks are LOCAL and the pin's record is synced before the
/// answer. Dropped before that, or where it fails, nothing is pinned.
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
    let expires = clock::now().plus_ms(request.ttl_ms);
    let prefix = Prefix { layout: &layout, group, hashes: &hashes, ttl_ms: request.ttl_ms, expires };
    for _ in 0..ATTEMPTS {
        let run = Run::of(daemon, &prefix);
        if run.blocks == 0 {
            return Ok(PinResponse { pin: Bytes::new(), pinned_blocks: 0 });
        }
        if let Some(taken) = take(daemon, namespace, &prefix, &run).await? {
            let held = "the blocks were not pinned, because the disk could not record the pin: pin them again once it takes writes";
            until_synced(daemon, held).await?;
            return Ok(PinResponse { pin: wire::hold_bytes(taken.keep()), pinned_blocks: run.blocks as u32 });
        }
    }
    Err(Status::resource_exhausted("blocks left memory while they were being pinned: try again"))
}

/// Takes the run in every tier. `None` where a block left since it was found.
async fn take<'a>(
    daemon: &'a Daemon,
    namespace: NamespaceId,
    prefix: &Prefix<'_>,
    run: &Run,
) -> Result<Option<Taken<'a>>, Status> {
    let mut taken = Taken::nothing(daemon, namespace, HoldKind::Pin);
    let above: Vec<SequenceHash> = run.above.iter().filter_map(|at| prefix.hashes.get(*at).copied()).collect();
    let runs = [(&**prefix.layout, prefix.group, above.as_slice())];
    let held = taken.in_memory(&runs, prefix.expires).map_err(wire::hold_error)?;
    if held.blocks < above.len() {
        return Ok(None);
    }
    if let Some(nvme) = &daemon.nvme {
        write(nvme, prefix, &run.above).await?;
        if !hold_on_disk(daemon, nvme, &taken, prefix, run)? {
            return Ok(None);
        }
    }
    let hashes = prefix.hashes.get(..run.blocks).unwrap_or_default();
    if let Err(trouble) = taken.in_bucket(prefix.layout, prefix.group, hashes, prefix.ttl_ms).await {
        if run.rests_on_bucket() {
            return Err(Status::unavailable(format!(
                "some blocks are only in the object store, and the daemon could not record the pin there: {trouble}"
            )));
        }
        tracing::warn!(%trouble, "a pin could not be recorded in the bucket: a collector may delete its blocks there, but this node keeps them");
    }
    Ok(Some(taken))
}

/// Writes blocks that are only in memory to disk: a pin that is to survive needs their bytes there, synced.
async fn write(nvme: &Arc<NvmeTier>, prefix: &Prefix<'_>, above: &[usize]) -> Result<(), Status> {
    let refused = || {
        Status::unavailable(
            "the blocks were not pinned, because the disk did not take those that are only in memory: pin them again once it takes writes",
        )
    };
    for part in above.chunks(caps::PIN_WRITES_MAX) {
        let mut waiting = Vec::with_capacity(part.len());
        for at in part {
            let parent = at.checked_sub(1).and_then(|before| prefix.hashes.get(before)).copied();
            let block = prefix.block(*at).ok_or_else(refused)?;
            waiting.push(queue(nvme, &block, parent).await.ok_or_else(refused)?);
        }
        for local in waiting {
            local.await.ok().filter(|local| *local).ok_or_else(refused)?;
        }
    }
    Ok(())
}

/// `None` where the disk does not take the block. A write of it that ends just now is in the way of another, and is found a moment later.
async fn queue(
    nvme: &Arc<NvmeTier>,
    block: &BlockRef<'_>,
    parent: Option<SequenceHash>,
) -> Option<oneshot::Receiver<bool>> {
    for _ in 0..WRITE_ATTEMPTS {
        if let WriteBack::Queued(Some(local)) = nvme.write_back(block, parent, Vec::new(), true) {
            return Some(local);
        }
        tokio::time::sleep(caps::ROOM_POLL).await;
    }
    None
}

/// Holds the run on disk. Its blocks are there by now, so that the bound on pinned bytes sees all of them. False where one of them
/// left before it was held.
fn hold_on_disk(
    daemon: &Daemon,
    nvme: &Arc<NvmeTier>,
    taken: &Taken<'_>,
    prefix: &Prefix<'_>,
    run: &Run,
) -> Result<bool, Status> {
    let blocks: Vec<BlockRef<'_>> = (0..run.blocks).filter_map(|at| prefix.block(at)).collect();
    nvme.pin(taken.id().0, &blocks, prefix.expires, true, clock::now()).map_err(wire::pin_refused)?;
    let on_disk = prefix.on_disk(daemon);
    Ok(run.here.iter().all(|at| on_disk.get(*at) == Some(&true)))
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
    // Any name may be told, and each costs a request to the bucket. Where too many are under way, or it fails, the reference ends by
    // its time.
    if let Some(object) = &daemon.object
        && let Ok(permit) = Arc::clone(&daemon.references).try_acquire_owned()
    {
        object.end_reference(id.0, permit);
    }
    Ok(UnpinResponse { unpinned })
}
