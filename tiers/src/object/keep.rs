//! Keeping what waits to be uploaded: in memory by a lease that counts, or on disk by a hold, and bringing it back from there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kvstore_plane::{SequenceHash, SlotKey};
use tokio::time::Instant;

use super::ObjectTier;
use super::upload::Batch;
use crate::caps;
use crate::host::{LeasedBlock, RegisteredLayout};
use crate::nvme::{BlockRef, Promote};
use crate::residency::Priority;

/// How often an upload that waits for room in memory looks again.
const BRING_POLL: Duration = Duration::from_millis(20);
/// A hold on the disk lasts until its upload is done; this is longer than any outage that is waited for.
const HOLD_MS: u64 = 30 * 24 * 3600 * 1000;

/// A lease that counts.
struct Held {
    block: LeasedBlock,
    count: Arc<AtomicU64>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.block
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.count.fetch_sub(self.block.len() as u64, Ordering::AcqRel);
    }
}

impl ObjectTier {
    /// Blocks that are not in memory are brought there.
    pub(super) async fn bring(&self, batch: &mut Batch) {
        let Batch { layout, group, members, .. } = batch;
        let until = Instant::now() + Duration::from_millis(caps::OBJECT_STALL_MS * 2);
        for member in members.iter_mut().filter(|member| member.block.is_none()) {
            let key = SlotKey { layout: layout.ordinal, group: *group, hash: member.hash };
            let block = match self.host.lease_quietly(layout.namespace, &key) {
                Some(block) => Some(block),
                None => self.bring_from_disk(layout, *group, member.hash, until).await,
            };
            member.block = block.map(|block| self.held(block));
        }
    }

    pub(super) fn held(&self, block: LeasedBlock) -> Bytes {
        self.leased_bytes.fetch_add(block.len() as u64, Ordering::AcqRel);
        Bytes::from_owner(Held { block, count: Arc::clone(&self.leased_bytes) })
    }

    async fn bring_from_disk(
        &self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        hash: SequenceHash,
        until: Instant,
    ) -> Option<LeasedBlock> {
        let nvme = self.nvme.as_ref()?;
        let key = SlotKey { layout: layout.ordinal, group, hash };
        while Instant::now() < until {
            let now = (self.clock)();
            let deadline = now.plus_ms(caps::OBJECT_STALL_MS);
            match nvme.promote(&BlockRef { layout, group, hash }, Priority::Writeback, deadline, now) {
                Promote::Started(block) => return tokio::time::timeout_at(until, block).await.ok()?.ok()?,
                Promote::Absent => return self.host.lease_quietly(layout.namespace, &key),
                Promote::Resident => {
                    if let Some(block) = self.host.lease_quietly(layout.namespace, &key) {
                        return Some(block);
                    }
                }
                Promote::NeedsSlab(plan) => {
                    let host = Arc::clone(&self.host);
                    let _ = tokio::task::spawn_blocking(move || host.make_slab(plan)).await;
                }
                Promote::InFlight | Promote::Busy | Promote::Outranked => tokio::time::sleep(BRING_POLL).await,
            }
        }
        None
    }

    /// The Nvme tier holds the blocks of a batch instead of leases, so that memory can turn over.
    pub(super) fn hold_on_disk(&self, batch: &mut Batch) {
        let Some(nvme) = &self.nvme else { return };
        if !batch.held_on_disk {
            let blocks: Vec<BlockRef<'_>> = batch
                .members
                .iter()
                .map(|member| BlockRef { layout: &batch.layout, group: batch.group, hash: member.hash })
                .collect();
            let now = (self.clock)();
            batch.held_on_disk = nvme.pin(batch.id, &blocks, now.plus_ms(HOLD_MS), false, now).is_ok();
        }
        if batch.held_on_disk {
            for member in &mut batch.members {
                if nvme.presence(&batch.layout, batch.group, &[member.hash]) == [true] {
                    member.block = None;
                }
            }
        }
    }

    /// The Nvme tier need not hold the batch's blocks any more.
    pub(super) fn let_go(&self, batch: &Batch) {
        if batch.held_on_disk
            && let Some(nvme) = &self.nvme
        {
            nvme.unpin(batch.id);
        }
    }
}
