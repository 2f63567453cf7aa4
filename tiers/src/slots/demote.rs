//! Demoting: a copy goes to a lower tier while the block stays readable.

use kvstore_plane::{SlotKey, SlotRecord, SlotRef, SlotState};

use super::{SlabMemory, Slots};

impl<S: SlabMemory> Slots<S> {
    /// Starts a copy to a lower tier: the block stays readable, and stays until [`Self::end_demote`].
    pub fn begin_demote(&mut self, key: &SlotKey) -> Option<(SlotRef, SlotRecord)> {
        let (slot, entry) = self.find(key)?;
        if entry.is_demoting() {
            return None;
        }
        let record = entry.read()?;
        self.change(slot, |entry| {
            entry.set_demoting(true);
            entry.set_leases(entry.leases() + 1);
        });
        Some((slot, record))
    }

    /// Ends it; `copies` are the lower tiers that were given the block, one bit each, in addition to those before.
    pub fn end_demote(&mut self, slot: SlotRef, copies: u8) {
        self.change(slot, |entry| {
            if entry.state() == SlotState::Resident {
                entry.set_demoting(false);
                entry.set_copies(entry.copies() | copies);
            }
        });
        self.release(slot);
    }

    /// What is known of a resident block below: see [`Evicted::copies`](super::Evicted::copies).
    pub fn copies(&self, key: &SlotKey) -> u8 {
        self.find(key).map_or(0, |(_, entry)| entry.copies())
    }
}
