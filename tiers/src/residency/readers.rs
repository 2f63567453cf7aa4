//! Readers that ask nobody: clients that map the slabs name the slots that they read in memory of their own.
//!
//! A slot that was readable is given away, or its block leaves for good, only after this order: the entry becomes
//! unreadable, a fence, and no reader names the slot. One fence and one look serve a batch of slots. A block that is
//! named stays what it was: its entry becomes readable again.

use std::collections::HashSet;

use kvstore_plane::{SlotRef, SlotState, withdrawn};

use super::{Evicted, Residency, SlabMemory};
use crate::eviction::Removal;

/// Everybody who reads slots without asking.
pub trait Readers: Send + Sync {
    /// True without any.
    fn is_empty(&self) -> bool;
    /// Every slot that one of them names now.
    fn named(&self, each: &mut dyn FnMut(SlotRef));
}

/// Nobody does.
pub struct NoReaders;

impl Readers for NoReaders {
    fn is_empty(&self) -> bool {
        true
    }

    fn named(&self, _each: &mut dyn FnMut(SlotRef)) {}
}

/// Slots that wait until no reader names them.
#[derive(Default)]
pub(super) struct Waiting {
    /// Resident blocks that the eviction policy named: candidates again then.
    pub(super) parked: HashSet<SlotRef>,
    /// Slots of blocks that left: free then.
    pub(super) doomed: HashSet<SlotRef>,
}

impl<S: SlabMemory> Residency<S> {
    /// Which of `slots`, all unreadable by now, a reader names.
    fn named_among(&self, slots: &[SlotRef]) -> HashSet<SlotRef> {
        if self.readers.is_empty() {
            return HashSet::new();
        }
        withdrawn();
        let wanted: HashSet<SlotRef> = slots.iter().copied().collect();
        let mut named = HashSet::new();
        self.readers.named(&mut |slot| {
            if wanted.contains(&slot) {
                named.insert(slot);
            }
        });
        named
    }

    /// Evicts those of `slots` that nothing keeps.
    pub(super) fn evict_slots(&mut self, slots: &[SlotRef]) -> Vec<Evicted> {
        let leaving: Vec<SlotRef> = slots.iter().copied().filter(|slot| self.may_leave(*slot)).collect();
        for entry in leaving.iter().filter_map(|slot| self.entry(*slot)) {
            entry.suspend();
        }
        let named = self.named_among(&leaving);
        let mut evicted = Vec::with_capacity(leaving.len());
        for slot in leaving {
            let Some(entry) = self.entry(slot) else { continue };
            if named.contains(&slot) {
                entry.restore();
                self.park_for_readers(slot);
                continue;
            }
            let (key, copies) = (entry.key(), entry.copies());
            self.forget(slot, Removal::Evicted { key_hash: key.table_hash(self.seed) });
            self.free(slot);
            self.counts.evicted += 1;
            evicted.push(Evicted { key, copies });
        }
        evicted
    }

    fn may_leave(&self, slot: SlotRef) -> bool {
        self.entry(slot).is_some_and(|entry| {
            entry.state() == SlotState::Resident && entry.leases() == 0 && entry.pins() == 0 && !entry.is_demoting()
        })
    }

    /// The block is read: no candidate before that ends, which [`Self::look_again`] finds out.
    fn park_for_readers(&mut self, slot: SlotRef) {
        if self.waiting.parked.insert(slot) {
            self.set_held(slot, true);
        }
    }

    /// The block in `slot` has left and no call reads it: frees the slot, now or once no reader names it.
    pub(super) fn free_unread(&mut self, slot: SlotRef) {
        if self.readers.is_empty() {
            self.free(slot);
        } else {
            self.waiting.doomed.insert(slot);
        }
    }

    /// Looks which of the slots that waited for readers are read no more. True where a slot was freed, or a block may
    /// leave again.
    pub fn look_again(&mut self) -> bool {
        if self.waiting.parked.is_empty() && self.waiting.doomed.is_empty() {
            return false;
        }
        let waiting: Vec<SlotRef> = self.waiting.parked.iter().chain(&self.waiting.doomed).copied().collect();
        let named = self.named_among(&waiting);
        let mut moved = false;
        for slot in waiting.into_iter().filter(|slot| !named.contains(slot)) {
            moved = true;
            if self.waiting.doomed.remove(&slot) {
                self.free(slot);
            } else if self.waiting.parked.remove(&slot) {
                let kept = self.parked.contains(&slot) || self.entry(slot).is_some_and(|entry| entry.pins() > 0);
                if !kept {
                    self.set_held(slot, false);
                }
            }
        }
        moved
    }

    /// Slots that a reader names, and that wait for it.
    pub fn waiting_for_readers(&self) -> usize {
        self.waiting.parked.len() + self.waiting.doomed.len()
    }

    /// True where a reader names a slot of this slab: a hint, which the next moment may change.
    pub(super) fn slab_is_read(&self, number: u32) -> bool {
        let mut read = false;
        self.readers.named(&mut |slot| read |= slot.slab == number);
        read
    }
}
