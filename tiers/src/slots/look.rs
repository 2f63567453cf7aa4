//! Looking up: which blocks are readable.

use kvstore_plane::{SequenceHash, SlotEntry, SlotKey, SlotRef, SlotState};

use super::{Presence, SlabMemory, Slots};

impl<S: SlabMemory> Slots<S> {
    pub(super) fn find(&self, key: &SlotKey) -> Option<(SlotRef, &SlotEntry)> {
        let hash = key.table_hash(self.seed);
        let slot = self.table.find(hash, |slot| self.entry(slot).is_some_and(|entry| entry.is_key(key)))?;
        Some((slot, self.entry(slot)?))
    }

    /// Where a block is that is readable or on its way.
    pub fn find_slot(&self, key: &SlotKey) -> Option<SlotRef> {
        self.find(key).map(|(slot, _)| slot)
    }

    /// Whether a block is readable, on its way, or neither.
    pub fn presence(&self, key: &SlotKey) -> Presence {
        match self.find(key).map(|(_, entry)| entry.state()) {
            Some(SlotState::Resident) => Presence::Resident,
            Some(SlotState::Filling) => Presence::InFlight,
            _ => Presence::Absent,
        }
    }

    /// The presence of each block of a prefix, into `out`. Loads the cache lines of a run of blocks side
    /// by side before it looks at the first.
    pub fn presence_of_run(&self, layout: u32, group: u16, hashes: &[SequenceHash], out: &mut Vec<Presence>) {
        const SIDE_BY_SIDE: usize = 32;
        let table = self.table.view();
        let mut table_hashes = [0u64; SIDE_BY_SIDE];
        for run in hashes.chunks(SIDE_BY_SIDE) {
            for (to, hash) in table_hashes.iter_mut().zip(run) {
                *to = SlotKey { layout, group, hash: *hash }.table_hash(self.seed);
                table.prefetch(*to);
            }
            for hash in table_hashes.iter().take(run.len()) {
                if let Some(entry) = table.hint(*hash).and_then(|slot| self.entry(slot)) {
                    kvstore_plane::prefetch(entry);
                }
            }
            for (table_hash, hash) in table_hashes.iter().zip(run) {
                let key = SlotKey { layout, group, hash: *hash };
                let mut state = None;
                table.find(*table_hash, |slot| {
                    let entry = self.entry(slot).filter(|entry| entry.is_key(&key));
                    state = entry.map(|entry| entry.state());
                    state.is_some()
                });
                out.push(match state {
                    Some(SlotState::Resident) => Presence::Resident,
                    Some(SlotState::Filling) => Presence::InFlight,
                    _ => Presence::Absent,
                });
            }
        }
    }
}
