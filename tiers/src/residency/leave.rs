//! Leaving: deletion, quarantine, eviction.

use kvstore_plane::{SlotKey, SlotRef, SlotState};

use super::{Delete, Evicted, Residency, SlabMemory};
use crate::eviction::Removal;
use crate::pool::PoolId;

impl<S: SlabMemory> Residency<S> {
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

    /// Evicts the block of `pool` that its policy gives up first. `None` when every block is leased,
    /// pinned, or on its way.
    pub fn evict(&mut self, pool: PoolId) -> Option<Evicted> {
        loop {
            let state = self.pools.get_mut(pool.0)?;
            let victim = state.policy.victim()?;
            let slot = state.slot_ref(victim)?;
            if let Some(evicted) = self.evict_slot(slot) {
                return Some(evicted);
            }
            // Leased or being demoted: not a candidate again before that ends.
            self.parked.insert(slot);
            self.set_held(slot, true);
        }
    }

    /// Evicts the block in `slot`, where nothing keeps it.
    pub(super) fn evict_slot(&mut self, slot: SlotRef) -> Option<Evicted> {
        let entry = self.entry(slot)?;
        let stays = entry.leases() > 0 || entry.pins() > 0 || entry.is_demoting();
        if entry.state() != SlotState::Resident || stays {
            return None;
        }
        let evicted = Evicted { key: entry.key(), copies: entry.copies() };
        let key_hash = evicted.key.table_hash(self.seed);
        self.drop_resident(slot, Removal::Evicted { key_hash });
        self.counts.evicted += 1;
        Some(evicted)
    }

    /// Evicts a block by name, where nothing keeps it: how the shards of one block leave together.
    pub fn evict_key(&mut self, key: &SlotKey) -> Option<Evicted> {
        let (slot, _) = self.find(key)?;
        self.evict_slot(slot)
    }

    pub(super) fn drop_resident(&mut self, slot: SlotRef, removal: Removal) {
        let Some(entry) = self.entry(slot) else { return };
        let (key, leases) = (entry.key(), entry.leases());
        entry.withdraw(SlotState::Doomed);
        self.unfile(slot, &key);
        self.parked.remove(&slot);
        if let Some((pool, block)) = self.place(slot)
            && let Some(pool) = self.pools.get_mut(pool.0)
        {
            pool.policy.remove(block, removal);
        }
        if leases == 0 {
            self.free(slot);
        }
    }
}
