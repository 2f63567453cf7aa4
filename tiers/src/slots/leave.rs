//! Leaving: deletion, quarantine, eviction.

use std::collections::HashSet;

use kvstore_plane::{SlotKey, SlotRef, SlotState};

use super::write_back::Offer;
use super::{Delete, Evicted, Incoming, SlabMemory, Slots};
use crate::caps;
use crate::eviction::{Claim, NewBlock, Removal};
use crate::pool::PoolId;

impl<S: SlabMemory> Slots<S> {
    /// Makes a block unreadable at once. A flight of it is superseded.
    pub fn delete(&mut self, key: &SlotKey) -> Delete {
        let Some((slot, entry)) = self.find(key) else { return Delete::Absent };
        if entry.pins() > 0 {
            return Delete::Pinned;
        }
        match entry.state() {
            SlotState::Filling => self.supersede(slot),
            _ => self.drop_resident(slot, Removal::Dropped),
        }
        self.counts.deleted += 1;
        Delete::Deleted
    }

    /// True where a pin or a ticket keeps the block.
    pub fn is_held(&self, key: &SlotKey) -> bool {
        self.find(key).is_some_and(|(_, entry)| entry.pins() > 0)
    }

    /// Drops a resident block whose bytes turned out damaged, whatever promises were made of it.
    pub fn quarantine(&mut self, key: &SlotKey) {
        let Some((slot, entry)) = self.find(key).filter(|(_, entry)| entry.state() == SlotState::Resident) else {
            return;
        };
        if entry.pins() > 0 {
            self.pinned_bytes = self.pinned_bytes.saturating_sub(u64::from(entry.length()));
        }
        self.drop_resident(slot, Removal::Dropped);
    }

    /// Evicts the block of `pool` that its policy gives up first; where others read without asking, a few more, since
    /// one look at what they read serves all. Empty when every block is read, pinned, or on its way; or, where it is for a block that
    /// comes, worth more than that one may take.
    pub fn evict(&mut self, pool: PoolId, incoming: Option<(&Incoming, Claim)>) -> Vec<Evicted> {
        self.evict_some(pool, incoming, caps::EVICT_BATCH)
    }

    /// The same, `most` blocks at most.
    pub fn evict_some(&mut self, pool: PoolId, incoming: Option<(&Incoming, Claim)>, most: usize) -> Vec<Evicted> {
        let batch = if self.readers.is_empty() { 1 } else { most };
        let batch = self.pools.get(pool.0).map_or(1, |pool| batch.min(pool.slots / caps::EVICT_PARTS + 1));
        let incoming = incoming
            .map(|(incoming, claim)| NewBlock { claim, ..self.new_block(incoming, self.origin_of(incoming), false) });
        loop {
            let victims = self.victims(pool, incoming.as_ref(), batch);
            if victims.is_empty() {
                return Vec::new();
            }
            let evicted = self.evict_slots(&victims);
            if !evicted.is_empty() {
                return evicted;
            }
        }
    }

    /// The next blocks that `pool`'s policy gives up and that no call keeps, held. Of one prefix, the deepest is the first.
    fn victims(&mut self, pool: PoolId, incoming: Option<&NewBlock>, count: usize) -> Vec<SlotRef> {
        let mut victims = Vec::with_capacity(count);
        while victims.len() < count {
            let Some(state) = self.pool_now(pool) else { break };
            let victim = state.policy.victim(incoming);
            let Some(slot) = victim.and_then(|victim| state.slot_ref(victim)) else { break };
            self.set_held(slot, true);
            if self.entry(slot).is_some_and(|entry| entry.leases() > 0 || entry.is_demoting()) {
                // Not a candidate again before that ends.
                self.parked.insert(slot);
                continue;
            }
            match self.offer_below(slot) {
                Offer::Made => {}
                Offer::NotNow => {
                    self.set_held(slot, false);
                    break;
                }
                Offer::None => {
                    victims.push(slot);
                    self.add_those_before(pool, slot, &mut victims, count);
                }
            }
        }
        victims
    }

    /// What may leave with `slot`'s block: those before it in its prefix, as far as nothing keeps or follows them, and each was offered.
    fn add_those_before(&mut self, pool: PoolId, slot: SlotRef, victims: &mut Vec<SlotRef>, count: usize) {
        let mut last = slot;
        while victims.len() < count {
            let before = self.place(last).zip(self.pools.get(pool.0)).and_then(|((_, block), state)| {
                state.policy.before_victim(block).and_then(|before| state.slot_ref(before))
            });
            let Some(before) = before.filter(|before| self.may_leave(*before) && !self.wants_offer(*before)) else {
                break;
            };
            self.set_held(before, true);
            victims.push(before);
            last = before;
        }
    }

    /// A block of a request finds no room after all.
    pub fn refused(&mut self, incoming: &Incoming) {
        let new = self.new_block(incoming, self.origin_of(incoming), false);
        if let Some(state) = self.pool_now(incoming.pool) {
            state.policy.refused(&new);
        }
    }

    /// True where a block would have left, were it not leased or demoting.
    pub fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Evicts blocks by name, where nothing keeps them: how the shards of one block leave together.
    pub fn evict_keys(&mut self, keys: impl Iterator<Item = SlotKey>) -> Vec<Evicted> {
        // Two shards that leave at once name a third one twice. A slot that left twice would be given away twice.
        let mut named = HashSet::new();
        let mut slots: Vec<SlotRef> =
            keys.filter_map(|key| self.find_slot(&key)).filter(|slot| named.insert(*slot)).collect();
        slots.retain(|slot| matches!(self.offer_below(*slot), Offer::None));
        self.evict_slots(&slots)
    }

    pub(super) fn drop_resident(&mut self, slot: SlotRef, removal: Removal) {
        let Some(entry) = self.entry(slot) else { return };
        let leases = entry.leases();
        self.forget(slot, removal);
        if leases == 0 {
            self.free_unread(slot);
        }
    }

    /// The block in `slot` is found no more; its slot is yet to be freed.
    pub(super) fn forget(&mut self, slot: SlotRef, removal: Removal) {
        let withdrawn = self.change(slot, |entry| {
            entry.withdraw(SlotState::Doomed);
            entry.key()
        });
        let Some(key) = withdrawn else { return };
        self.unfile(slot, &key);
        self.tell_watcher(&key, false);
        self.parked.remove(&slot);
        self.waiting.unpark(slot);
        if let Some((pool, block)) = self.place(slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            pool.policy.remove(block, removal);
        }
    }
}
