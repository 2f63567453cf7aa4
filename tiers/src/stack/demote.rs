//! Demotion: copies of blocks that are readable in memory go to the tiers below.
//!
//! Each copy is decided in one order, whatever brought it about: is the block there? is it worth a write? is there room? Then it is
//! written. So a block that is there costs nothing of the budget, and what counts is its length; where that is not known because the block
//! is in no call, the usual length of its group. What requests read in memory is asked about only while a disk has room.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvstore_plane::{SequenceHash, SlotKey};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::admit::{Admission, Occasion};
use super::room::Wish;
use super::{Lower, Stack};
use crate::below::{Ask, Write, Written};
use crate::block::{Block, BlockRef, Run};
use crate::caps;
use crate::host::{LeasedBlock, LeavingBlock, NamespaceId};
use crate::tier::Tier;

/// A block that is readable in memory, to be copied.
pub struct Copy {
    /// Which.
    pub block: Block,
    /// The block before it.
    pub parent: Option<SequenceHash>,
    /// The checksums of its sections, where they were taken.
    pub sums: Vec<u32>,
    /// Its bytes, where the caller has leased them.
    pub leased: Option<LeasedBlock>,
}

/// What somebody waits for: each tells true once the copy is safe in its tier, false where it is not for now.
#[derive(Default)]
pub struct Copies {
    /// LOCAL.
    pub local: Option<oneshot::Receiver<bool>>,
    /// DURABLE.
    pub durable: Option<oneshot::Receiver<bool>>,
}

impl Stack {
    /// A block was stored, or found stored: it goes where `wish` and the rules say. Whoever calls has waited for room.
    pub fn stored(&self, copy: Copy, wish: &Wish) -> Copies {
        let Copy { block, parent, sums, mut leased } = copy;
        let length = leased.as_ref().map_or_else(|| usual_length(&block.as_ref()), |leased| leased.len() as u64);
        let mut copies = Copies::default();
        for lower in &self.below {
            let awaited = wish.awaits(lower.tier);
            let occasion = if wish.demands(lower.tier) { Occasion::Must } else { Occasion::Stored };
            if !self.wants(lower, &block.as_ref(), length, occasion, awaited) {
                continue;
            }
            // The last tier may keep the lease; the others take their own.
            let leased = if lower.tier == Tier::Object { leased.take() } else { None };
            let has_waited = self.waits_for(lower, wish);
            let write = Write { block: block.clone(), parent, sums: sums.clone(), leased, awaited, has_waited };
            let Written::Coming(waiting) = Arc::clone(&lower.store).write(write) else { continue };
            match lower.tier {
                Tier::Host => {}
                Tier::Nvme => copies.local = waiting,
                Tier::Object => copies.durable = waiting,
            }
        }
        copies
    }

    /// A request asks for a run of blocks that are in memory: those that tiers below lack, and that were asked for often enough, go
    /// there now.
    pub fn asked_for(&self, run: &Run<'_>) {
        for lower in &self.below {
            if self.admission(run.layout.namespace, lower.tier) != Admission::Reused {
                continue;
            }
            let there = lower.store.presence(run, Ask::Coming).there;
            let mut parent = None;
            for (block, there) in run.blocks().zip(there) {
                if !there {
                    // A disk has little room for long; a bucket takes what is on disk beyond its room in memory.
                    if lower.tier == Tier::Nvme && !lower.store.room(false).is_there {
                        break;
                    }
                    let length = usual_length(&block);
                    if self.admits(lower.tier, &block, length, Occasion::AskedFor) {
                        let write = background(block.owned(), parent);
                        let written = Arc::clone(&lower.store).write(write);
                        if lower.tier == Tier::Object && matches!(written, Written::Refused) {
                            break;
                        }
                    }
                }
                parent = Some(block.hash);
            }
        }
    }

    /// A block was read from a slow tier, for somebody who asked for it: it may be worth a copy in the tiers between.
    pub(super) fn copy_up(
        &self,
        from: Tier,
        block: &BlockRef<'_>,
        parent: Option<SequenceHash>,
        sums: Vec<u32>,
        length: u64,
    ) {
        for lower in self.below.iter().filter(|lower| lower.tier < from) {
            if self.wants(lower, block, length, Occasion::Promoted, false) {
                let write = Write { sums: sums.clone(), has_waited: true, ..background(block.owned(), parent) };
                let _ = Arc::clone(&lower.store).write(write);
            }
        }
    }

    /// A block is to leave memory: it goes to the tiers below that want it then. Where they have no room until `until`, it is lost to
    /// them: it is a cache.
    pub async fn leaving(&self, leaving: LeavingBlock, until: Instant) {
        let LeavingBlock { layout, group, hash, parent, block: leased } = leaving;
        let block = Block { layout, group, hash };
        let (length, mut leased) = (leased.len() as u64, Some(leased));
        for lower in &self.below {
            if self.admission(block.layout.namespace, lower.tier) != Admission::Evicted
                || !self.wants(lower, &block.as_ref(), length, Occasion::Leaving, false)
            {
                continue;
            }
            let has_waited = lower.until_room(until, true).await;
            if !has_waited && lower.tier == Tier::Nvme {
                continue;
            }
            let leased = if lower.tier == Tier::Object { leased.take() } else { None };
            let write = Write { leased, has_waited, ..background(block.clone(), parent) };
            if matches!(Arc::clone(&lower.store).write(write), Written::Refused) {
                tracing::debug!(
                    tier = lower.tier.name(),
                    "a block left memory without a copy below: too much waits there"
                );
            }
        }
    }

    /// The daemon stops: what memory alone has of namespaces that write back goes below, as far as it gets within `time`.
    pub async fn all_leaving(&self, time: Duration) {
        let until = Instant::now() + time;
        let writes_back = |namespace: NamespaceId| {
            self.below.iter().any(|lower| self.admission(namespace, lower.tier) == Admission::Evicted)
        };
        let (mut offered, mut left) = (0u64, 0u64);
        for (namespace, slab) in self.host.slabs().into_iter().filter(|(namespace, _)| writes_back(*namespace)) {
            for key in self.host.keys_of_slab(namespace, slab) {
                if Instant::now() >= until {
                    left += 1;
                } else if let Some(leaving) = self.as_leaving(namespace, &key) {
                    self.leaving(leaving, until).await;
                    offered += 1;
                }
            }
        }
        if offered + left > 0 {
            tracing::info!(offered, left, "wrote back blocks that may have been only in memory");
        }
    }

    /// Writes what is to leave memory, until the runtime ends.
    pub async fn write_back_forever(self: Arc<Self>) {
        loop {
            let more = self.host.leaving();
            tokio::pin!(more);
            more.as_mut().enable();
            for leaving in self.host.take_leaving() {
                self.leaving(leaving, Instant::now() + caps::ROOM_BELOW_WITHIN).await;
            }
            more.await;
        }
    }

    fn as_leaving(&self, namespace: NamespaceId, key: &SlotKey) -> Option<LeavingBlock> {
        let layout = self.host.layout_at(namespace, key.layout)?;
        let parent = self.host.parent_of(namespace, key);
        let block = self.host.lease_quietly(namespace, key)?;
        Some(LeavingBlock { layout, group: key.group, hash: key.hash, parent, block })
    }

    /// The first two questions: a block that is there is written only for somebody who waits, who is told once it is safe; else it
    /// must be worth a write, which then counts.
    fn wants(&self, lower: &Lower, block: &BlockRef<'_>, length: u64, occasion: Occasion, awaited: bool) -> bool {
        match lower.has(block, Ask::Coming) {
            true => awaited,
            false => self.admits(lower.tier, block, length, occasion),
        }
    }

    fn admits(&self, tier: Tier, block: &BlockRef<'_>, length: u64, occasion: Occasion) -> bool {
        // A chunk came from an object store, and is there still.
        if tier == Tier::Object && block.is_chunk() {
            return false;
        }
        let now = (self.clock)();
        let admitted = self.admitter.lock().admits(tier, block, length, occasion, now);
        if !admitted && tier == Tier::Nvme {
            self.not_admitted.fetch_add(1, Ordering::Relaxed);
        }
        admitted
    }
}

/// Nobody waits for it.
fn background(block: Block, parent: Option<SequenceHash>) -> Write {
    Write { block, parent, sums: Vec::new(), leased: None, awaited: false, has_waited: false }
}

/// The bytes of a block, where they are not at hand: those of its layout, or the most.
fn usual_length(block: &BlockRef<'_>) -> u64 {
    block.layout.group(u32::from(block.group)).map_or(0, |group| group.block_bytes)
}
