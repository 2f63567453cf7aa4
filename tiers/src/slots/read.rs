//! Reading: leases, recency, and pins.

use kvstore_plane::{SlotKey, SlotRecord, SlotRef, SlotState};

use super::{Pinned, SlabMemory, Slots};
use crate::eviction::Touch;
use crate::pool::PoolId;

impl<S: SlabMemory> Slots<S> {
    /// A lease on a readable block: until it is released, its bytes stay as they are.
    pub fn lease(&mut self, key: &SlotKey) -> Option<(SlotRef, SlotRecord)> {
        let (slot, entry) = self.find(key)?;
        let record = entry.read()?;
        self.change(slot, |entry| entry.set_leases(entry.leases() + 1));
        Some((slot, record))
    }

    /// Ends a lease.
    pub fn release(&mut self, slot: SlotRef) {
        let released = self.change(slot, |entry| {
            let left = entry.leases().saturating_sub(1);
            entry.set_leases(left);
            (left, entry.state(), entry.pins() > 0)
        });
        let Some((0, state, pinned)) = released else { return };
        match state {
            SlotState::Doomed => self.free_unread(slot),
            _ if self.parked.remove(&slot) && !pinned && !self.waiting.is_parked(slot) => {
                self.set_held(slot, false);
            }
            _ => {}
        }
    }

    /// A request read `slots`, given in prefix order.
    pub fn touch(&mut self, slots: &[SlotRef]) {
        let mut after = None;
        for slot in slots.iter().rev() {
            let first = if after.is_none() { slots.first().copied() } else { None };
            self.touch_before(*slot, after.replace(*slot), first);
        }
    }

    /// A request read `slot`, and behind it `after`, where that was named just before. With `first`, it is the last block of what it
    /// reads, or of a part, which begins there.
    pub fn touch_before(&mut self, slot: SlotRef, after: Option<SlotRef>, first: Option<SlotRef>) {
        if self.entry(slot).is_none_or(|entry| entry.state() != SlotState::Resident) {
            return;
        }
        let Some((pool, _)) = self.place(slot) else { return };
        let block_of = |slot: SlotRef| self.place(slot).filter(|(of, _)| *of == pool).map(|(_, block)| block);
        let touch = match (first.and_then(block_of), after.and_then(block_of)) {
            (Some(first), after) => Touch::HitFrom { first, after },
            (None, Some(after)) => Touch::HitBefore(after),
            (None, None) => Touch::Hit,
        };
        self.touch_one(slot, touch);
    }

    /// True where `slot` has the block before that of `after`.
    pub fn is_before(&self, slot: SlotRef, after: SlotRef) -> bool {
        self.parent_slot(after) == Some(slot)
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
            && let Some(pool) = self.pool_now(pool)
        {
            pool.policy.touch(block, touch);
            self.mark_used(slot);
        }
    }

    /// Promises not to evict the block, until [`Self::unpin`]. `None` where it is not readable.
    pub fn pin(&mut self, key: &SlotKey) -> Option<Pinned> {
        let (slot, _) = self.find(key).filter(|(_, entry)| entry.state() == SlotState::Resident)?;
        let serial = self.slabs.get(slot.slab as usize)?.as_ref()?.serial;
        let (pins, length, generation) = self.change(slot, |entry| {
            let pins = entry.pins();
            entry.set_pins(pins + 1);
            (pins, entry.length(), entry.generation())
        })?;
        if pins == 0 {
            self.pinned_bytes += u64::from(length);
            self.set_held(slot, true);
        }
        Some(Pinned { slot, serial, generation })
    }

    /// Takes one pin back. Where its block was dropped as damaged there is none to take back: what is there now, if anything, is
    /// another, whoever pinned that. A pinned block's generation stays what it is.
    pub fn unpin(&mut self, pinned: &Pinned) {
        let slot = pinned.slot;
        let place = self.slabs.get(slot.slab as usize).and_then(Option::as_ref);
        if place.is_none_or(|place| place.serial != pinned.serial) {
            return;
        }
        let unpinned = self.change(slot, |entry| {
            let pins = entry.pins();
            if entry.generation() != pinned.generation || pins == 0 {
                return None;
            }
            entry.set_pins(pins - 1);
            Some((pins, entry.length()))
        });
        if let Some((1, length)) = unpinned.flatten() {
            self.pinned_bytes = self.pinned_bytes.saturating_sub(u64::from(length));
            self.parked.remove(&slot);
            self.waiting.unpark(slot);
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
