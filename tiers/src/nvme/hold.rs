//! Holding: promises not to drop blocks, kept on the volumes that have them.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::format::PAGE;
use super::state::State;
use super::store::Store;
use super::{NvmeTier, pins};
use crate::block::{BlockRef, Digest};
use crate::clock::BootTime;

/// Too much would be pinned.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PinRefused {
    /// Bytes.
    #[error("{pinned_bytes} bytes of a volume would be pinned; at most {bytes_max} (half of the volume) may be")]
    TooManyBytes {
        /// With the refused pin.
        pinned_bytes: u64,
        /// The most.
        bytes_max: u64,
    },
    /// Bytes of this pin alone: to wait does not help.
    #[error(
        "these blocks alone are more than the {bytes_max} bytes (half of a volume) that may be pinned; name fewer blocks, or raise nvme.bytes"
    )]
    TooLarge {
        /// The most.
        bytes_max: u64,
    },
    /// Pins, or blocks that they name.
    #[error(
        "a volume would have more than {} pins and tickets, or they would name more than {} blocks",
        crate::caps::HOLDS_MAX,
        crate::caps::HELD_KEYS_MAX
    )]
    TooMany,
}

impl NvmeTier {
    /// Promises not to drop blocks until `expires`: those that are on disk, and those on their way there or
    /// still to come. With `lasting`, the promise survives a restart. Refused where more than half of a volume
    /// would be pinned, or too many blocks named.
    pub fn pin(
        &self,
        id: u128,
        blocks: &[BlockRef<'_>],
        expires: BootTime,
        lasting: bool,
        now: BootTime,
    ) -> Result<(), PinRefused> {
        for (done, store) in self.stores.iter().enumerate() {
            let digests: Vec<Digest> = blocks
                .iter()
                .filter(|block| self.stores.len() == 1 || self.is_for(store, block))
                .map(|block| self.digest(store, block))
                .collect();
            if digests.is_empty() {
                continue;
            }
            let record = lasting.then(|| pins::record(&digests, expires, &self.boot_id, now));
            let mut state = store.state.lock();
            if !state.pins.has_room(digests.len()) {
                drop(state);
                self.stores.iter().take(done).for_each(|store| _ = store.unpin(id, lasting));
                return Err(PinRefused::TooMany);
            }
            let fresh = state.pins.add(id, digests, expires, lasting);
            for digest in &fresh {
                state.extents.set_pinned(*digest, true);
            }
            let pinned_bytes = state.extents.pages().1 * PAGE;
            let bytes_max = store.bytes_max.load(Ordering::Acquire) / 100 * crate::caps::HELD_PERCENT_MAX;
            if pinned_bytes > bytes_max {
                // The index has not heard of it, and need not.
                let _ = state.end_pin(id, lasting);
                let own_bytes = pinned_bytes - state.extents.pages().1 * PAGE;
                drop(state);
                self.stores.iter().take(done).for_each(|store| _ = store.unpin(id, lasting));
                return Err(match own_bytes > bytes_max {
                    true => PinRefused::TooLarge { bytes_max },
                    false => PinRefused::TooManyBytes { pinned_bytes, bytes_max },
                });
            }
            if let Some(record) = record {
                state.owed.pin(id, record);
                drop(state);
                store.wake_committer();
            }
        }
        Ok(())
    }

    /// True where this volume has the block, or would get it.
    fn is_for(&self, store: &Arc<Store>, block: &BlockRef<'_>) -> bool {
        match self.holder(block) {
            Some(holder) => Arc::ptr_eq(holder, store),
            None => self.place_for(block).is_some_and(|(place, _)| Arc::ptr_eq(place, store)),
        }
    }

    /// Ends a pin before its time; false where there is none (any more) that lasts, or does not, as this says.
    pub fn unpin(&self, id: u128, lasting: bool) -> bool {
        self.stores.iter().map(|store| store.unpin(id, lasting)).fold(false, |any, ended| any | ended)
    }

    /// The pins that survive a restart.
    pub fn lasting_pins(&self) -> HashSet<u128> {
        self.stores.iter().flat_map(|store| store.state.lock().pins.lasting().collect::<Vec<_>>()).collect()
    }

    /// True while a pin names the block: where it is nowhere, that is a loss.
    pub fn is_pinned(&self, block: &BlockRef<'_>) -> bool {
        self.stores.iter().any(|store| store.state.lock().pins.holds(self.digest(store, block)))
    }

    /// Background work: ends the pins whose time is over, holds namespaces to what they may have. Call it a few times a second.
    pub fn tick(self: &Arc<Self>, now: BootTime) {
        self.hold_namespaces(now);
        for store in &self.stores {
            loop {
                let expired = store.state.lock().pins.next_expired(now);
                let Some((id, lasting)) = expired else { break };
                store.unpin(id, lasting);
            }
        }
    }
}

impl Store {
    fn unpin(&self, id: u128, lasting: bool) -> bool {
        let mut state = self.state.lock();
        if !state.end_pin(id, lasting) {
            return false;
        }
        if lasting {
            state.owed.unpin(id);
            drop(state);
            self.wake_committer();
        }
        true
    }
}

impl State {
    /// Ends a pin here; false where there is none.
    fn end_pin(&mut self, id: u128, lasting: bool) -> bool {
        let Some(freed) = self.pins.end(id, lasting) else { return false };
        for digest in freed {
            self.extents.set_pinned(digest, false);
        }
        true
    }
}
