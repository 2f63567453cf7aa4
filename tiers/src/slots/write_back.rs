//! Write-back: a block that no tier below has is offered to them before it leaves memory, once, with what precedes it in its
//! prefix. Until they took it, or said no, it stays.

use kvstore_plane::{SequenceHash, SlotEntry, SlotRef};

use super::{Leaving, SlabMemory, Slots};
use crate::caps;

/// The bit of an entry's `copies` that says: it was offered to the tiers below.
const OFFERED: u8 = 1 << 2;

/// Whether a block is to be offered before it leaves.
pub(super) enum Offer {
    /// Nobody wants it, or it was offered before.
    None,
    /// It was offered just now.
    Made,
    /// Too many are on offer.
    NotNow,
}

impl<S: SlabMemory> Slots<S> {
    /// Whether blocks are offered to the tiers below before they leave.
    pub fn set_writes_back(&mut self, writes_back: bool) {
        self.writes_back = writes_back;
    }

    /// The block in `slot` would leave: where it is to be offered first, it is, and leased and no candidate until that ends.
    pub(super) fn offer_below(&mut self, slot: SlotRef) -> Offer {
        if !self.wants_offer(slot) {
            return Offer::None;
        }
        let slots = self.place(slot).and_then(|(pool, _)| self.pools.get(pool.0)).map_or(0, |pool| pool.slots);
        let full = self.leaving.len() + caps::WRITE_BACK_RUN > caps::LEAVING_MAX;
        if full || self.parked.len() > slots / caps::PARKED_PARTS {
            return Offer::NotNow;
        }
        let ancestors = std::iter::successors(Some(slot), |slot| self.parent_slot(*slot));
        let mut run: Vec<SlotRef> =
            ancestors.take(caps::WRITE_BACK_RUN).take_while(|slot| self.is_new(*slot)).collect();
        // In the order of the prefix, as the tiers below put chains together.
        run.reverse();
        for slot in run {
            self.add_leaving(slot);
        }
        self.set_held(slot, true);
        self.parked.insert(slot);
        Offer::Made
    }

    /// True where the block in `slot` is to be offered before it leaves.
    pub(super) fn wants_offer(&self, slot: SlotRef) -> bool {
        self.writes_back && self.is_new(slot)
    }

    fn add_leaving(&mut self, slot: SlotRef) {
        let parent = self.parent_slot(slot).and_then(|parent| self.entry(parent)).map(|entry| entry.key().hash);
        let Some(record) = self.entry(slot).and_then(SlotEntry::read) else { return };
        self.change(slot, |entry| {
            entry.set_copies(entry.copies() | OFFERED);
            entry.set_leases(entry.leases() + 1);
        });
        self.leaving.push(Leaving { slot, record, parent });
    }

    fn is_new(&self, slot: SlotRef) -> bool {
        self.entry(slot).is_some_and(|entry| entry.copies() == 0 && !entry.is_demoting() && entry.read().is_some())
    }

    pub(super) fn parent_slot(&self, slot: SlotRef) -> Option<SlotRef> {
        let (pool, block) = self.place(slot)?;
        let pool = self.pools.get(pool.0)?;
        pool.slot_ref(pool.policy.parent(block)?)
    }

    /// The block before `slot`'s in its prefix, where it is in memory.
    pub fn parent_of(&self, slot: SlotRef) -> Option<SequenceHash> {
        Some(self.entry(self.parent_slot(slot)?)?.key().hash)
    }

    /// True where something is to be offered.
    pub fn has_leaving(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// What is to be offered, leased: whoever takes it releases it.
    pub fn take_leaving(&mut self) -> Vec<Leaving> {
        std::mem::take(&mut self.leaving)
    }
}
