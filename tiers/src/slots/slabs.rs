//! Slabs and pools: memory comes and goes.

use kvstore_plane::{SlotEntry, SlotRef, SlotState};

use super::write_back::Offer;
use super::{SlabMemory, SlabPlace, Slots, is_kept};
use crate::caps;
use crate::eviction::BlockIndex;
use crate::pool::{Pool, PoolId};

/// What a step of withdrawing a slab came to: see [`Slots::withdraw_some`].
pub enum Withdrawn<S> {
    /// Its slots are nobody's any more.
    Done(S),
    /// There is more to be done, from here on.
    More(u32),
    /// It stays, with some blocks gone perhaps: one of them can't leave now.
    Stuck,
}

impl<S: SlabMemory> Slots<S> {
    /// The pool for slots of `slot_bytes`; slabs of it have at most `stride` slots.
    pub fn pool(&mut self, slot_bytes: u64, stride: u32) -> PoolId {
        let found = self.pools.iter().position(|pool| pool.slot_bytes == slot_bytes);
        PoolId(found.unwrap_or_else(|| {
            self.pools.push(Pool::new(slot_bytes, stride, self.policy));
            self.pools.len() - 1
        }))
    }

    /// The pools, in order.
    pub fn pools(&self) -> impl Iterator<Item = PoolId> + use<S> {
        (0..self.pools.len()).map(PoolId)
    }

    /// Bytes of a slot, slots, and slots in use, of `pool`.
    pub fn pool_occupancy(&self, pool: PoolId) -> (u64, usize, usize) {
        self.pools.get(pool.0).map_or((0, 0, 0), |pool| (pool.slot_bytes, pool.slots, pool.used))
    }

    /// Slots that `pool` can give away.
    pub fn free_slots(&self, pool: PoolId) -> usize {
        self.pools.get(pool.0).map_or(0, |pool| pool.free)
    }

    /// Slabs of `pool`.
    pub fn slab_count(&self, pool: PoolId) -> usize {
        self.pools.get(pool.0).map_or(0, |pool| pool.count)
    }

    /// True where `pool` has a slot to give away.
    pub fn has_free_slot(&self, pool: PoolId) -> bool {
        self.free_slots(pool) > 0
    }

    /// Takes in a slab whose slots are all free. `None` where there are as many as can be numbered;
    /// else the slab's number.
    pub fn add_slab(&mut self, pool: PoolId, memory: S) -> Option<u32> {
        let number = self.slabs.iter().position(Option::is_none).unwrap_or(self.slabs.len());
        let slots = memory.directory().len() as u32;
        let state = self.pools.get_mut(pool.0).filter(|state| state.accepts(slots) && number < caps::SLABS_MAX)?;
        let ordinal = state.add_slab(number as u32, slots);
        if number == self.slabs.len() {
            self.slabs.push(None);
        }
        if let Some(place) = self.slabs.get_mut(number) {
            self.slabs_added += 1;
            *place = Some(SlabPlace { memory, pool, ordinal, serial: self.slabs_added, used: 0, kept: 0 });
        }
        Some(number as u32)
    }

    /// The slab numbers of `pool`.
    pub fn slab_numbers(&self, pool: PoolId) -> Vec<u32> {
        self.pools.get(pool.0).map(|pool| pool.slab_numbers().collect()).unwrap_or_default()
    }

    /// The memory of a slab.
    pub fn slab(&self, number: u32) -> Option<&S> {
        Some(&self.slabs.get(number as usize)?.as_ref()?.memory)
    }

    /// Slots of a slab that hold something.
    pub fn slab_used(&self, number: u32) -> usize {
        self.slabs.get(number as usize).and_then(Option::as_ref).map_or(0, |place| place.used)
    }

    /// True when something in a slab can't leave now: it is leased, pinned, demoting, being filled, or read.
    pub fn slab_is_stuck(&self, number: u32) -> bool {
        let Some(place) = self.slabs.get(number as usize).and_then(Option::as_ref) else { return false };
        let count = || place.memory.directory().iter().filter(|entry| is_kept(entry)).count();
        debug_assert_eq!(place.kept, count(), "what keeps slab {number} was miscounted");
        place.kept > 0 || self.slab_is_read(number)
    }

    /// True while a slab is being withdrawn.
    pub fn slab_is_leaving(&self, number: u32) -> bool {
        let place = self.slabs.get(number as usize).and_then(Option::as_ref);
        let pool = place.and_then(|place| Some((self.pools.get(place.pool.0)?, place.ordinal)));
        pool.is_some_and(|(pool, ordinal)| pool.is_closed(ordinal))
    }

    /// Evicts every block of slab `number` and lets go of it. `None`, with some blocks gone perhaps, when
    /// one of them can't leave now.
    pub fn withdraw_slab(&mut self, number: u32) -> Option<S> {
        let mut step = self.begin_withdraw(number);
        loop {
            match step {
                Withdrawn::Done(slab) => return Some(slab),
                Withdrawn::More(from) => step = self.withdraw_some(number, from),
                Withdrawn::Stuck => return None,
            }
        }
    }

    /// Begins to withdraw slab `number`: nobody gets a slot of it from now on. Then call [`Self::withdraw_some`] with what this says,
    /// and with what that says, until one of them says anything but [`Withdrawn::More`].
    pub fn begin_withdraw(&mut self, number: u32) -> Withdrawn<S> {
        if self.slab_is_leaving(number) {
            return Withdrawn::Stuck;
        }
        let Some(place) = self.slabs.get(number as usize).and_then(Option::as_ref) else { return Withdrawn::Stuck };
        if let Some(pool) = self.pools.get_mut(place.pool.0) {
            pool.close_slab(place.ordinal);
        }
        // Where blocks are offered to the tiers below, all are asked first, and none leaves: what is offered now need not be waited
        // for the next time.
        let slots = place.memory.directory().len() as u32;
        Withdrawn::More(if self.writes_back { 0 } else { slots })
    }

    /// A lock's worth of withdrawing a slab. Steps below the number of its slots offer blocks, those above evict them.
    pub fn withdraw_some(&mut self, number: u32, from: u32) -> Withdrawn<S> {
        let Some(entries) = self.slab(number).map(SlabMemory::directory) else { return Withdrawn::Stuck };
        let (count, offers) = (entries.len() as u32, from < entries.len() as u32);
        let start = if offers { from } else { from - count };
        let end = count.min(start.saturating_add(caps::CHANGES_PER_LOCK));
        let slots = (start..end).map(|slot| SlotRef { slab: number, slot });
        let is_resident = |slot: &SlotRef| self.entry(*slot).is_some_and(|e| e.state() == SlotState::Resident);
        let slots: Vec<SlotRef> = slots.filter(is_resident).collect();
        if offers {
            if slots.iter().any(|slot| matches!(self.offer_below(*slot), Offer::NotNow)) {
                return self.reopen(number);
            }
            let offered = self.slabs.get(number as usize).and_then(Option::as_ref).is_some_and(|place| place.kept > 0);
            return if end == count && offered { self.reopen(number) } else { Withdrawn::More(end) };
        }
        if self.evict_slots(&slots).len() < slots.len() {
            return self.reopen(number);
        }
        if end < count { Withdrawn::More(count + end) } else { self.end_withdraw(number) }
    }

    fn end_withdraw(&mut self, number: u32) -> Withdrawn<S> {
        if self.slab_used(number) > 0 {
            return self.reopen(number);
        }
        let Some(place) = self.slabs.get_mut(number as usize).and_then(Option::take) else { return Withdrawn::Stuck };
        if let Some(pool) = self.pools.get_mut(place.pool.0) {
            pool.remove_slab(place.ordinal);
        }
        Withdrawn::Done(place.memory)
    }

    fn reopen(&mut self, number: u32) -> Withdrawn<S> {
        if let Some(place) = self.slabs.get(number as usize).and_then(Option::as_ref)
            && let Some(pool) = self.pools.get_mut(place.pool.0)
        {
            pool.reopen_slab(place.ordinal);
        }
        Withdrawn::Stuck
    }

    pub(super) fn entry(&self, slot: SlotRef) -> Option<&SlotEntry> {
        self.slab(slot.slab)?.directory().get(slot.slot as usize)
    }

    pub(super) fn place(&self, slot: SlotRef) -> Option<(PoolId, BlockIndex)> {
        let place = self.slabs.get(slot.slab as usize)?.as_ref()?;
        let pool = self.pools.get(place.pool.0)?;
        Some((place.pool, pool.index(place.ordinal, slot.slot)))
    }
}
