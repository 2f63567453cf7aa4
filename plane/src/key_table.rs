//! The key table: from a key's hash to the slots that may hold it. A hint: whoever follows it compares
//! the key in the slot's directory entry.
//!
//! 256 shards by the hash's top byte, each a run of 64-byte buckets: a count of keys that overflowed past
//! the bucket, and seven slots of a 16-bit fingerprint with a 48-bit slot reference. A look-up goes on to
//! the next bucket only where the count says that some key did. A full shard is rebuilt half as large
//! again, alone: growth never stops the table for longer than one shard takes.

#![expect(
    clippy::indexing_slicing,
    reason = "shards are numbered by one byte, buckets modulo their number, slots by 1..8"
)]

use std::sync::atomic::{AtomicU64, Ordering};

const SHARDS: usize = 256;
/// Slots in a bucket.
const WAYS: usize = 7;
/// A shard grows when it is this full, in percent: 9% of look-ups then touch a second cache line.
const FULL_PERCENT: usize = 85;

/// Where a slot is: the slab's number (20 bits) and the slot in it (28 bits).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct SlotRef {
    /// The daemon's number for the slab, below 2^20.
    pub slab: u32,
    /// The slot in the slab, below 2^28.
    pub slot: u32,
}

impl SlotRef {
    fn pack(self, fingerprint: u64) -> u64 {
        fingerprint << 48 | u64::from(self.slab) << 28 | u64::from(self.slot)
    }

    fn unpack(word: u64) -> Self {
        Self { slab: (word >> 28) as u32 & 0xF_FFFF, slot: word as u32 & 0x0FFF_FFFF }
    }
}

/// An empty slot: fingerprints are never 0.
const VACANT: u64 = 0;

#[repr(C, align(64))]
struct Bucket {
    overflowed: AtomicU64,
    slots: [AtomicU64; WAYS],
}

#[derive(Default)]
struct Shard {
    buckets: Box<[Bucket]>,
    used: usize,
}

/// One namespace's key table.
pub struct KeyTable {
    shards: Vec<Shard>,
    len: usize,
}

fn fingerprint(hash: u64) -> u64 {
    // 16 bits that neither pick the shard (the top byte) nor, mostly, the bucket.
    (hash & 0xFFFF).max(1)
}

fn shard_of(hash: u64) -> usize {
    (hash >> 56) as usize
}

impl Shard {
    fn home(&self, hash: u64) -> usize {
        let spread = hash << 8 >> 24;
        ((u128::from(spread) * self.buckets.len() as u128) >> 40) as usize
    }

    fn step(&self, bucket: usize) -> usize {
        if bucket + 1 == self.buckets.len() { 0 } else { bucket + 1 }
    }

    fn with_buckets(buckets: usize) -> Self {
        let bucket = |_| Bucket { overflowed: AtomicU64::new(0), slots: Default::default() };
        Self { buckets: (0..buckets).map(bucket).collect(), used: 0 }
    }

    fn insert(&mut self, hash: u64, word: u64) {
        let mut at = self.home(hash);
        loop {
            let bucket = &mut self.buckets[at];
            if let Some(slot) = bucket.slots.iter().find(|slot| slot.load(Ordering::Relaxed) == VACANT) {
                slot.store(word, Ordering::Release);
                self.used += 1;
                return;
            }
            *bucket.overflowed.get_mut() += 1;
            at = self.step(at);
        }
    }
}

impl Default for KeyTable {
    fn default() -> Self {
        Self::new()
    }
}

impl KeyTable {
    /// An empty table.
    pub fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Shard::default()).collect(), len: 0 }
    }

    /// Keys in the table.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without a key.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Asks the processor to load the bucket that [`Self::find`] starts from.
    pub fn prefetch(&self, hash: u64) {
        let shard = &self.shards[shard_of(hash)];
        if !shard.buckets.is_empty() {
            crate::prefetch(&shard.buckets[shard.home(hash)]);
        }
    }

    /// The first slot filed under `hash` that `is_key` confirms.
    pub fn find(&self, hash: u64, mut is_key: impl FnMut(SlotRef) -> bool) -> Option<SlotRef> {
        let shard = &self.shards[shard_of(hash)];
        if shard.buckets.is_empty() {
            return None;
        }
        let wanted = fingerprint(hash);
        let mut at = shard.home(hash);
        for _ in 0..shard.buckets.len() {
            let bucket = &shard.buckets[at];
            for slot in &bucket.slots {
                let word = slot.load(Ordering::Acquire);
                if word >> 48 == wanted && is_key(SlotRef::unpack(word)) {
                    return Some(SlotRef::unpack(word));
                }
            }
            if bucket.overflowed.load(Ordering::Acquire) == 0 {
                return None;
            }
            at = shard.step(at);
        }
        None
    }

    /// The slot most likely filed under `hash`, unconfirmed: to prefetch what confirms it.
    pub fn hint(&self, hash: u64) -> Option<SlotRef> {
        let shard = &self.shards[shard_of(hash)];
        let bucket = shard.buckets.get(shard.home(hash))?;
        let wanted = fingerprint(hash);
        let word = bucket.slots.iter().map(|slot| slot.load(Ordering::Relaxed)).find(|word| word >> 48 == wanted)?;
        Some(SlotRef::unpack(word))
    }

    /// Files `slot` under `hash`. `hash_of` gives the hash of a key filed earlier, where the shard must
    /// be rebuilt.
    pub fn insert(&mut self, hash: u64, slot: SlotRef, hash_of: impl Fn(SlotRef) -> u64) {
        let shard = &mut self.shards[shard_of(hash)];
        if (shard.used + 1) * 100 > shard.buckets.len() * WAYS * FULL_PERCENT {
            let mut larger = Shard::with_buckets(shard.buckets.len() + shard.buckets.len() / 2 + 1);
            for word in shard.buckets.iter().flat_map(|bucket| &bucket.slots).map(|slot| slot.load(Ordering::Relaxed)) {
                if word != VACANT {
                    larger.insert(hash_of(SlotRef::unpack(word)), word);
                }
            }
            *shard = larger;
        }
        shard.insert(hash, slot.pack(fingerprint(hash)));
        self.len += 1;
    }

    /// Takes `slot` out from under `hash`; false when it is not there.
    pub fn remove(&mut self, hash: u64, slot: SlotRef) -> bool {
        let shard = &mut self.shards[shard_of(hash)];
        if shard.buckets.is_empty() {
            return false;
        }
        let word = slot.pack(fingerprint(hash));
        let home = shard.home(hash);
        let mut at = home;
        for _ in 0..shard.buckets.len() {
            if let Some(found) = shard.buckets[at].slots.iter().find(|slot| slot.load(Ordering::Relaxed) == word) {
                found.store(VACANT, Ordering::Release);
                let mut passed = home;
                while passed != at {
                    *shard.buckets[passed].overflowed.get_mut() -= 1;
                    passed = shard.step(passed);
                }
                shard.used -= 1;
                self.len -= 1;
                return true;
            }
            if shard.buckets[at].overflowed.load(Ordering::Relaxed) == 0 {
                return false;
            }
            at = shard.step(at);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A count that only grew would make every look-up of an absent key walk through the shard in the end.
    #[test]
    fn removals_take_back_what_overflowed() {
        let mut table = KeyTable::new();
        let hash = |id: u32| u64::from(id % 11).wrapping_mul(0x0001_2345_6789_ABCD);
        let slot = |id: u32| SlotRef { slab: 0, slot: id };
        for id in 0..2000 {
            table.insert(hash(id), slot(id), |slot| hash(slot.slot));
        }
        let overflowed = |table: &KeyTable| -> u64 {
            let buckets = table.shards.iter().flat_map(|shard| shard.buckets.iter());
            buckets.map(|bucket| bucket.overflowed.load(Ordering::Relaxed)).sum()
        };
        assert!(overflowed(&table) > 0);
        for id in (0..2000).rev() {
            assert!(table.remove(hash(id), slot(id)));
        }
        assert_eq!((overflowed(&table), table.len()), (0, 0));
    }
}
