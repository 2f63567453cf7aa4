//! Reading: leases, recency, and pins.

use kvstore_plane::{SlotKey, SlotRecord, SlotRef, SlotState};

use super::{Residency, SlabMemory};
use crate::eviction::Touch;
use crate::pool::PoolId;

impl<S: SlabMemory> Residency<S> {
    /// A lease on a readable block: until it is released, its bytes stay as they are.
    pub fn lease(&mut self, key: &SlotKey) -> Option<(SlotRef, SlotRecord)> {
        let (slot, entry) = self.find(key)?;
        let record = entry.read()?;
        entry.set_leases(entry.leases() + 1);
        Some((slot, record))
    }

    /// Ends a lease.
    pub fn release(&mut self, slot: SlotRef) {
        let Some(entry) = self.entry(slot) else { return };
        let left = entry.leases().saturating_sub(1);
        entry.set_leases(left);
        if left > 0 {
            return;
        }
        let (state, pinned) = (entry.state(), entry.pins() > 0);
        match state {
            SlotState::Doomed => self.free_unread(slot),
            _ if self.parked.remove(&slot) && !pinned && !self.waiting.parked.contains(&slot) => {
                self.set_held(slot, false);
            }
            _ => {}
        }
    }

    /// A request read `slots`, given in prefix order.
    pub fn touch(&mut self, slots: &[SlotRef]) {
        for slot in slots.iter().rev() {
            self.touch_one(*slot, Touch::Hit);
        }
    }

    /// A reader that asked nobody read `slot`; the leaf of its prefix was named first.
    pub fn touch_leaf_first(&mut self, slot: SlotRef) {
        if self.entry(slot).is_some_and(|entry| entry.state() == SlotState::Resident) {
            self.touch_one(slot, Touch::Hit);
        }
    }

    /// How many of `slots` each pool has.
    pub fn pools_of(&self, slots: &[SlotRef]) -> Vec<(PoolId, usize)> {
        let mut pools: Vec<(PoolId, usize)> = Vec::new();
        for (pool, _) in slots.iter().filter_map(|slot| self.place(*slot)) {
            match pools.iter_mut().find(|(known, _)| *known == pool) {
                Some((_, blocks)) => *blocks += 1,
                None => pools.push((pool, 1)),
            }
        }
        pools
    }

    /// A request stored a chain that ends with `key`: the whole chain is as recent as it.
    pub fn refresh(&mut self, key: &SlotKey) {
        if let Some((slot, entry)) = self.find(key)
            && entry.state() == SlotState::Resident
        {
            self.touch_one(slot, Touch::Refresh);
        }
    }

    pub(super) fn touch_one(&mut self, slot: SlotRef, touch: Touch) {
        if let Some((pool, block)) = self.place(slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            pool.policy.touch(block, touch);
            self.mark_used(slot);
        }
    }

    /// Promises not to evict the block. Its length in bytes; `None` where it is not readable.
    pub fn pin(&mut self, key: &SlotKey) -> Option<u32> {
        let (slot, entry) = self.find(key).filter(|(_, entry)| entry.state() == SlotState::Resident)?;
        let (pins, length) = (entry.pins(), entry.length());
        entry.set_pins(pins + 1);
        if pins == 0 {
            self.pinned_bytes += u64::from(length);
            self.set_held(slot, true);
        }
        Some(length)
    }

    /// Takes one pin back.
    pub fn unpin(&mut self, key: &SlotKey) {
        let Some((slot, entry)) = self.find(key) else { return };
        let pins = entry.pins();
        if pins == 0 {
            return;
        }
        entry.set_pins(pins - 1);
        if pins == 1 {
            let length = u64::from(entry.length());
            self.pinned_bytes = self.pinned_bytes.saturating_sub(length);
            self.parked.remove(&slot);
            self.waiting.parked.remove(&slot);
            self.set_held(slot, false);
        }
    }

    /// Bytes of blocks that are pinned.
    pub fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    pub(super) fn set_held(&mut self, slot: SlotRef, held: bool) {
        if let Some((pool, block)) = self.place(slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            pool.policy.hold(block, held);
        }
    }
}
