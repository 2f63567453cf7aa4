//! Keeping what waits to be uploaded: in memory by a lease that counts, or on disk by a hold, and bringing it back from there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::ObjectTier;
use super::upload::Batch;
use crate::block::BlockRef;
use crate::caps;
use crate::host::{LeasedBlock, Leasing};
use crate::slots::Priority;
use crate::stack::Promotion;

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
        let deadline = Instant::now() + Duration::from_millis(caps::OBJECT_STALL_MS * 2);
        let (stack, layout) = (Arc::clone(&self.above), Arc::clone(layout));
        let promotion = Promotion { stack, layout, group: *group, priority: Priority::Background, deadline };
        for member in members.iter_mut().filter(|member| member.block.is_none()) {
            let block = match promotion.bring(member.hash).await {
                Leasing::Leased(block) => Some(block),
                Leasing::InFlight | Leasing::Miss => None,
            };
            member.block = block.map(|block| self.held(block));
        }
    }

    pub(super) fn held(&self, block: LeasedBlock) -> Bytes {
        self.leased_bytes.fetch_add(block.len() as u64, Ordering::AcqRel);
        Bytes::from_owner(Held { block, count: Arc::clone(&self.leased_bytes) })
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
            nvme.unpin(batch.id, false);
        }
    }
}
