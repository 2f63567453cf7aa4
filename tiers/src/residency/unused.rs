//! Blocks that nobody uses leave after a while, where the namespace has such a time. A block that is used keeps its whole prefix.
//!
//! Time comes in seconds, told by whoever ticks. What a reader without asking read is known a tick later.

use kvstore_plane::{SlotEntry, SlotRef, SlotState};

use super::{Residency, SlabMemory};
use crate::eviction::BlockIndex;
use crate::pool::{Pool, PoolId};

impl<S: SlabMemory> Residency<S> {
    /// It is `second` now, and blocks that are unused for `ttl` seconds are to leave: see [`Self::sweep_unused`].
    pub fn set_second(&mut self, second: u32, ttl: Option<u32>) {
        self.second = second;
        if self.ttl.is_some() != ttl.is_some() {
            // What is there counts as used when the time was set.
            self.pools.iter_mut().for_each(|pool| pool.used_at = Vec::new());
        }
        if self.ttl.is_none() && ttl.is_some() {
            let numbers = 0..self.slabs.len() as u32;
            let slots = numbers.flat_map(|slab| self.slots_of(slab)).collect::<Vec<_>>();
            self.ttl = ttl;
            slots.into_iter().for_each(|slot| self.mark_used(slot));
        }
        self.ttl = ttl;
    }

    pub(super) fn mark_used(&mut self, slot: SlotRef) {
        if self.ttl.is_none() {
            return;
        }
        let second = self.second;
        if let Some((pool, block)) = self.place(slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            let at = block.0 as usize;
            if pool.used_at.len() <= at {
                // As far as the pool's slots go: one allocation for many blocks.
                pool.used_at.resize((at + 1).max(pool.slots), 0);
            }
            if let Some(used) = pool.used_at.get_mut(at) {
                *used = second;
            }
        }
    }

    fn slots_of(&self, number: u32) -> Vec<SlotRef> {
        let entries = self.slab(number).map(SlabMemory::directory).unwrap_or_default();
        let resident = (0u32..).zip(entries).filter(|(_, entry)| entry.state() == SlotState::Resident);
        resident.map(|(slot, _)| SlotRef { slab: number, slot }).collect()
    }

    /// Seconds before this one are too long ago.
    fn since(&self) -> Option<u32> {
        self.second.checked_sub(self.ttl?)
    }

    /// The prefixes of the blocks of a slab that are used count as used as late as those.
    pub fn renew_prefixes(&mut self, number: u32) {
        let Some(since) = self.since() else { return };
        for slot in self.slots_of(number) {
            let Some((pool, block)) = self.place(slot) else { continue };
            if let Some(pool) = self.pools.get_mut(pool.0) {
                renew_prefix(pool, block, since);
            }
        }
    }

    /// Evicts the blocks of a slab that nobody used in time, once the prefixes of all slabs are renewed.
    pub fn sweep_unused(&mut self, number: u32) -> usize {
        let Some(since) = self.since() else { return 0 };
        let is_old = |slot: &SlotRef| {
            let used_at =
                |(pool, block): (PoolId, BlockIndex)| self.pools.get(pool.0)?.used_at.get(block.0 as usize).copied();
            let entry: Option<&SlotEntry> = self.entry(*slot);
            entry.is_some_and(|entry| entry.pins() == 0) && self.place(*slot).and_then(used_at).unwrap_or(0) < since
        };
        let old: Vec<SlotRef> = self.slots_of(number).into_iter().filter(is_old).collect();
        if old.is_empty() { 0 } else { self.evict_slots(&old).len() }
    }
}

fn renew_prefix(pool: &mut Pool, block: BlockIndex, since: u32) {
    let used_at = |pool: &Pool, block: BlockIndex| pool.used_at.get(block.0 as usize).copied().unwrap_or(0);
    let used = used_at(pool, block);
    let mut at = block;
    while used >= since
        && let Some(parent) = pool.policy.parent(at)
        && used_at(pool, parent) < since
    {
        if let Some(place) = pool.used_at.get_mut(parent.0 as usize) {
            *place = used;
        }
        at = parent;
    }
}
