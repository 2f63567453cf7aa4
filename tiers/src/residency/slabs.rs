//! Slabs and pools: memory comes and goes.

use std::collections::HashMap;

use kvstore_plane::{SlotEntry, SlotRef, SlotState};

use super::write_back::Offer;
use super::{Residency, SlabMemory, SlabPlace};
use crate::caps;
use crate::eviction::BlockIndex;
use crate::pool::{Pool, PoolId};

impl<S: SlabMemory> Residency<S> {
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
        self.pools.get(pool.0).map_or((0, 0, 0), |pool| (pool.slot_bytes, pool.slots, pool.used()))
    }

    /// True where `pool` has a slot to give away.
    pub fn has_free_slot(&self, pool: PoolId) -> bool {
        self.pools.get(pool.0).is_some_and(|pool| pool.free > 0)
    }

    /// Takes in a slab whose slots are all free. `None` when the residency has as many as it can number;
    /// else the slab's number.
    pub fn add_slab(&mut self, pool: PoolId, memory: S) -> Option<u32> {
        let number = self.slabs.iter().position(Option::is_none).unwrap_or(self.slabs.len());
        let slots = memory.directory().len() as u32;
        let state = self.pools.get_mut(pool.0).filter(|state| state.accepts(slots) && number < caps::SLABS_MAX)?;
        let ordinal = state.add_slab(number as u32, memory.directory());
        if number == self.slabs.len() {
            self.slabs.push(None);
        }
        if let Some(place) = self.slabs.get_mut(number) {
            *place = Some(SlabPlace { memory, pool, ordinal, used: 0 });
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

    /// True when something in a slab can't leave now: it is leased, pinned, demoting, or being filled.
    /// Looks at every slot.
    pub fn slab_is_stuck(&self, number: u32) -> bool {
        let entries = self.slab(number).map(SlabMemory::directory).unwrap_or_default();
        entries.iter().any(|entry| match entry.state() {
            SlotState::Free => false,
            SlotState::Resident => entry.leases() > 0 || entry.pins() > 0 || entry.is_demoting(),
            SlotState::Filling | SlotState::Doomed => true,
        }) || self.slab_is_read(number)
    }

    /// Evicts every block of slab `number` and lets go of it. `None`, with some blocks gone perhaps, when
    /// one of them can't leave now.
    pub fn withdraw_slab(&mut self, number: u32) -> Option<S> {
        let count = self.slab(number)?.directory().len() as u32;
        let slots: Vec<SlotRef> = (0..count).map(|slot| SlotRef { slab: number, slot }).collect();
        // All are asked: what is offered now need not be waited for the next time.
        if slots.iter().filter(|slot| !matches!(self.offer_below(**slot), Offer::None)).count() > 0 {
            return None;
        }
        self.evict_slots(&slots);
        if self.slab_used(number) > 0 {
            return None;
        }
        let place = self.slabs.get_mut(number as usize)?.take()?;
        let in_pool = self.slabs.iter().flatten().filter(|slab| slab.pool == place.pool);
        let directories: HashMap<u32, &[SlotEntry]> =
            in_pool.chain([&place]).map(|slab| (slab.ordinal, slab.memory.directory())).collect();
        if let Some(pool) = self.pools.get_mut(place.pool.0) {
            let entry = |ordinal: u32, slot: u32| directories.get(&ordinal)?.get(slot as usize);
            pool.remove_slab(place.ordinal, place.memory.directory().len(), entry);
        }
        Some(place.memory)
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
