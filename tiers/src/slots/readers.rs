//! Readers that ask nobody: clients that map the slabs name the slots that they read in memory of their own.
//!
//! A slot that was readable is given away, or its block leaves for good, only after this order: the entry becomes
//! unreadable, a fence, and no reader names the slot. One fence and one look serve a batch of slots. A block that is
//! named stays what it was: its entry becomes readable again.
//!
//! Slots that wait for their readers are looked at again without the lock: their entries were made unreadable before, under the
//! lock, and the fence comes after that. What was found holds for a slot only as long as its generation is the same.

use std::collections::{BTreeMap, HashSet};

use kvstore_plane::{SlotKey, SlotRef, SlotState, withdrawn};

use super::{Evicted, SlabMemory, Slots};
use crate::caps;
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

/// What waits in a slot until no reader names it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// A resident block that the eviction policy named: a candidate again then.
    Parked,
    /// What a block that left has left behind: a free slot then.
    Doomed,
}

/// Slots that wait until no reader names them.
#[derive(Default)]
pub(super) struct Waiting {
    slots: BTreeMap<SlotRef, Wait>,
    /// Where the next look begins: there may be more of them than one look takes.
    next: Option<SlotRef>,
}

impl Waiting {
    pub(super) fn is_parked(&self, slot: SlotRef) -> bool {
        self.slots.get(&slot) == Some(&Wait::Parked)
    }

    /// The block in `slot` is pinned no more, or has left.
    pub(super) fn unpark(&mut self, slot: SlotRef) {
        if self.is_parked(slot) {
            self.slots.remove(&slot);
        }
    }
}

/// Some slots that wait for their readers, with their generations as they were.
pub struct Waits(Vec<(SlotRef, u64)>);

impl Waits {
    /// True without any.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which of them a reader names. Needs no lock.
    pub fn named(&self, readers: &dyn Readers) -> HashSet<SlotRef> {
        named_among(readers, self.0.iter().map(|(slot, _)| *slot))
    }
}

/// Which of `slots`, all unreadable by now, a reader names.
fn named_among(readers: &dyn Readers, slots: impl Iterator<Item = SlotRef>) -> HashSet<SlotRef> {
    if readers.is_empty() {
        return HashSet::new();
    }
    withdrawn();
    let wanted: HashSet<SlotRef> = slots.collect();
    let mut named = HashSet::new();
    readers.named(&mut |slot| {
        if wanted.contains(&slot) {
            named.insert(slot);
        }
    });
    named
}

impl<S: SlabMemory> Slots<S> {
    /// Evicts those of `slots` that nothing keeps. Of one prefix, the deepest comes first: where a reader names a block, those before it
    /// stay as well.
    pub(super) fn evict_slots(&mut self, slots: &[SlotRef]) -> Vec<Evicted> {
        let leaving: Vec<SlotRef> = slots.iter().copied().filter(|slot| self.may_leave(*slot)).collect();
        for entry in leaving.iter().filter_map(|slot| self.entry(*slot)) {
            entry.suspend();
        }
        let named = named_among(&*self.readers, leaving.iter().copied());
        let mut evicted = Vec::with_capacity(leaving.len());
        let mut leaving = leaving.into_iter().peekable();
        // The block before one that stays.
        let mut needed = None;
        for slot in slots {
            let Some(entry) = self.entry(*slot) else { continue };
            let may_leave = leaving.next_if_eq(slot).is_some();
            if may_leave && needed != Some(*slot) && !named.contains(slot) {
                let (key, copies) = (entry.key(), entry.copies());
                evicted.push(self.evict_slot(*slot, key, copies));
                continue;
            }
            if may_leave {
                entry.restore();
            }
            if named.contains(slot) {
                self.park_for_readers(*slot);
            } else if may_leave && !self.waiting.is_parked(*slot) {
                self.set_held(*slot, false);
            }
            needed = self.parent_slot(*slot);
        }
        evicted
    }

    fn evict_slot(&mut self, slot: SlotRef, key: SlotKey, copies: u8) -> Evicted {
        self.forget(slot, Removal::Evicted { key_hash: key.table_hash(self.seed) });
        self.free(slot);
        self.counts.evicted += 1;
        Evicted { key, copies }
    }

    pub(super) fn may_leave(&self, slot: SlotRef) -> bool {
        self.entry(slot).is_some_and(|entry| {
            entry.state() == SlotState::Resident && entry.leases() == 0 && entry.pins() == 0 && !entry.is_demoting()
        })
    }

    /// The block is read: no candidate before that ends, which [`Self::look_again`] finds out.
    fn park_for_readers(&mut self, slot: SlotRef) {
        if self.waiting.slots.insert(slot, Wait::Parked).is_none() {
            self.set_held(slot, true);
        }
    }

    /// The block in `slot` has left and no call reads it: frees the slot, now or once no reader names it.
    pub(super) fn free_unread(&mut self, slot: SlotRef) {
        if self.readers.is_empty() {
            self.free(slot);
        } else {
            self.waiting.slots.insert(slot, Wait::Doomed);
        }
    }

    /// Looks which of the slots that waited for readers are read no more, a lock's worth of them. True where a slot was freed,
    /// or a block may leave again.
    pub fn look_again(&mut self) -> bool {
        let waits = self.next_waiting();
        let named = waits.named(&*self.readers);
        self.end_waiting(&waits, &named)
    }

    /// The next slots that wait for readers, as many as one look takes, round and round.
    pub fn next_waiting(&mut self) -> Waits {
        let from = self.waiting.next.unwrap_or(SlotRef { slab: 0, slot: 0 });
        let slots = &self.waiting.slots;
        let round = slots.range(from..).chain(slots.range(..from)).map(|(slot, _)| *slot);
        let next: Vec<SlotRef> = round.take(caps::KEYS_PER_LOCK + 1).collect();
        self.waiting.next = next.get(caps::KEYS_PER_LOCK).copied();
        let with_generation = |slot: &SlotRef| Some((*slot, self.entry(*slot)?.generation()));
        Waits(next.iter().take(caps::KEYS_PER_LOCK).filter_map(with_generation).collect())
    }

    /// Those of `waits` that are not `named`, and are what they were, wait no more. True where a slot was freed, or a block may
    /// leave again.
    pub fn end_waiting(&mut self, waits: &Waits, named: &HashSet<SlotRef>) -> bool {
        let mut moved = false;
        for (slot, generation) in waits.0.iter().filter(|(slot, _)| !named.contains(slot)) {
            // A slot that was freed since, used, and left again waits anew: this look knows nothing of its readers.
            if self.entry(*slot).is_none_or(|entry| entry.generation() != *generation) {
                continue;
            }
            match self.waiting.slots.remove(slot) {
                Some(Wait::Doomed) => self.free(*slot),
                Some(Wait::Parked) => {
                    let pinned = self.entry(*slot).is_some_and(|entry| entry.pins() > 0);
                    if !pinned && !self.parked.contains(slot) {
                        self.set_held(*slot, false);
                    }
                }
                None => continue,
            }
            moved = true;
        }
        moved
    }

    /// Slots that a reader names, and that wait for it.
    pub fn waiting_for_readers(&self) -> usize {
        self.waiting.slots.len()
    }

    /// True where a reader names a slot of this slab: a hint, which the next moment may change.
    pub(super) fn slab_is_read(&self, number: u32) -> bool {
        let mut read = false;
        self.readers.named(&mut |slot| read |= slot.slab == number);
        read
    }
}
