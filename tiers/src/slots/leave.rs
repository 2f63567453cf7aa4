//! Leaving: deletion, quarantine, eviction.

use kvstore_plane::{SlotKey, SlotRef, SlotState};

use super::write_back::Offer;
use super::{Delete, Evicted, Incoming, SlabMemory, Slots};
use crate::caps;
use crate::eviction::Removal;
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
    /// one look at what they read serves all. Empty when every block is read, pinned, or on its way.
    pub fn evict(&mut self, pool: PoolId) -> Vec<Evicted> {
        let batch = if self.readers.is_empty() { 1 } else { caps::EVICT_BATCH };
        let batch = self.pools.get(pool.0).map_or(1, |pool| batch.min(pool.slots / caps::EVICT_PARTS + 1));
        loop {
            let victims = self.victims(pool, batch);
            if victims.is_empty() {
                return Vec::new();
            }
            let evicted = self.evict_slots(&victims);
            if !evicted.is_empty() {
                return evicted;
            }
        }
    }

    /// The next blocks that `pool`'s policy gives up and that no call keeps, held.
    fn victims(&mut self, pool: PoolId, count: usize) -> Vec<SlotRef> {
        let mut victims = Vec::with_capacity(count);
        while victims.len() < count {
            let Some(state) = self.pools.get_mut(pool.0) else { break };
            let Some(slot) = state.policy.victim().and_then(|victim| state.slot_ref(victim)) else { break };
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
                Offer::None => victims.push(slot),
            }
        }
        victims
    }

    /// True where making room for a block would push out one that is worth more.
    pub fn would_push_out_better(&mut self, incoming: &Incoming) -> bool {
        let key_hash = incoming.key.table_hash(self.seed);
        let Some(pool) = self.pools.get_mut(incoming.pool.0) else { return false };
        let victim = pool.policy.victim();
        victim.is_some_and(|victim| pool.policy.outranks(victim, key_hash, incoming.kind.eviction()))
    }

    /// True where a block would have left, were it not leased or demoting.
    pub fn has_parked(&self) -> bool {
        !self.parked.is_empty()
    }

    /// Evicts blocks by name, where nothing keeps them: how the shards of one block leave together.
    pub fn evict_keys(&mut self, keys: impl Iterator<Item = SlotKey>) -> Vec<Evicted> {
        let mut slots: Vec<SlotRef> = keys.filter_map(|key| self.find_slot(&key)).collect();
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
