//! Blocks that nobody uses leave after a while, where the namespace has such a time. A block that is used keeps its whole prefix.
//!
//! Time comes in seconds, told by whoever ticks. What a reader without asking read is known a tick later.

use kvstore_plane::{SlotEntry, SlotRef, SlotState};

use super::{SlabMemory, Slots};
use crate::caps;
use crate::eviction::BlockIndex;
use crate::pool::PoolId;

impl<S: SlabMemory> Slots<S> {
    /// It is `second` now, and blocks that are unused for `ttl` seconds are to leave: see [`Self::sweep_unused`].
    pub fn set_second(&mut self, second: u32, ttl: Option<u32>) {
        self.second = second;
        if self.ttl.is_some() != ttl.is_some() {
            // What is there counts as used when the time was set.
            for pool in &mut self.pools {
                (pool.used_at, pool.used_since) = (Vec::new(), second);
            }
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

    /// The resident blocks among some slots of a slab, and where the next slots begin.
    fn some_of(&self, number: u32, from: u32) -> (Vec<SlotRef>, Option<u32>) {
        let entries = self.slab(number).map(SlabMemory::directory).unwrap_or_default();
        let some = (0u32..).zip(entries).skip(from as usize).take(caps::CHANGES_PER_LOCK as usize);
        let resident = some.filter(|(_, entry)| entry.state() == SlotState::Resident);
        let next = from + caps::CHANGES_PER_LOCK;
        (
            resident.map(|(slot, _)| SlotRef { slab: number, slot }).collect(),
            Some(next).filter(|next| (*next as usize) < entries.len()),
        )
    }

    /// Seconds before this one are too long ago.
    fn since(&self) -> Option<u32> {
        self.second.checked_sub(self.ttl?)
    }

    /// The prefixes of the blocks of a slab that are used count as used as late as those: a lock's worth of them, from slot `from`
    /// on. Where to go on, if there are more.
    pub fn renew_prefixes(&mut self, number: u32, from: u32) -> Option<u32> {
        let since = self.since()?;
        let mut steps = caps::KEYS_PER_LOCK;
        if let Some((pool, block)) = self.renewing.take()
            && !self.renew_prefix(pool, block, since, &mut steps)
        {
            return Some(from);
        }
        let (slots, next) = self.some_of(number, from);
        for slot in slots {
            let Some((pool, block)) = self.place(slot) else { continue };
            if !self.renew_prefix(pool, block, since, &mut steps) {
                return Some(slot.slot + 1);
            }
        }
        next
    }

    /// Evicts the blocks of a slab that nobody used in time, once the prefixes of all slabs are renewed: a lock's worth of them, from
    /// slot `from` on. Where to go on, if there are more.
    pub fn sweep_unused(&mut self, number: u32, from: u32) -> Option<u32> {
        let since = self.since()?;
        let (slots, next) = self.some_of(number, from);
        let is_old = |slot: &SlotRef| {
            let used_at = |(pool, block): (PoolId, BlockIndex)| Some(self.pools.get(pool.0)?.used_at(block));
            let entry: Option<&SlotEntry> = self.entry(*slot);
            entry.is_some_and(|entry| entry.pins() == 0) && self.place(*slot).and_then(used_at).unwrap_or(0) < since
        };
        let old: Vec<SlotRef> = slots.into_iter().filter(is_old).collect();
        if !old.is_empty() {
            self.evict_slots(&old);
        }
        next
    }

    /// False where it took all `steps`: it is then to go on.
    fn renew_prefix(&mut self, id: PoolId, block: BlockIndex, since: u32, steps: &mut usize) -> bool {
        let Some(pool) = self.pools.get_mut(id.0) else { return true };
        let used = pool.used_at(block);
        let mut at = block;
        while used >= since
            && let Some(parent) = pool.policy.parent(at)
            && pool.used_at(parent) < since
        {
            if *steps == 0 {
                self.renewing = Some((id, at));
                return false;
            }
            *steps -= 1;
            let place = parent.0 as usize;
            if pool.used_at.len() <= place {
                pool.used_at.resize((place + 1).max(pool.slots), 0);
            }
            if let Some(place) = pool.used_at.get_mut(place) {
                *place = used;
            }
            at = parent;
        }
        true
    }
}
