//! The key table: from a key's hash to the slots that may hold it. A hint: whoever follows it compares
//! the key in the slot's directory entry.
//!
//! It lies in memory that readers in other processes map. One writer, the daemon, under its lock. 256 shards by the
//! hash's top byte, each a run of 64-byte buckets: a count of keys that overflowed past the bucket, and seven
//! slots of a 16-bit fingerprint with a 48-bit slot reference. A look-up goes on to the next bucket only where the
//! count says that some key did, and never further than [`PROBE_BUCKETS_MAX`]. A full shard is rebuilt half as large
//! again in another place, alone, and then announced by one store: growth stops the table for no longer than one shard
//! takes, and readers not at all. Who still reads the old place finds words that name other keys or none: a miss at
//! worst, since every word is a hint.
//!
//! ```text
//! 0       256 shard words: first bucket (32 bits), buckets (32 bits)
//! 4096    buckets
//! ```

#![expect(
    clippy::indexing_slicing,
    reason = "shards are numbered by one byte, buckets modulo their number, slots by 1..8; readers of shared memory \
              go through `bucket`, which checks"
)]

use crate::key::SlotKey;
use crate::sync::{AtomicU64, Ordering};

const SHARDS: usize = 256;
/// Slots in a bucket.
const WAYS: usize = 7;
const BUCKET_WORDS: usize = 8;
/// A shard grows when it is this full, in percent: 9% of look-ups then touch a second cache line.
const FULL_PERCENT: usize = 85;
/// Words before the first bucket: one page.
const HEAD_WORDS: usize = 512;
/// Buckets that a key may lie behind its home. Random keys come nowhere near it; chosen ones, of a client that
/// knows the seed, make the table no slower than this, and are refused beyond.
pub const PROBE_BUCKETS_MAX: usize = 64;

/// Where a slot is: the slab's number (20 bits) and the slot in it (28 bits).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct SlotRef {
    /// The daemon's number for the slab, below 2^20.
    pub slab: u32,
    /// The slot in the slab, below 2^28.
    pub slot: u32,
}

impl SlotRef {
    /// As the low 48 bits of a word.
    pub fn to_word(self) -> u64 {
        u64::from(self.slab) << 28 | u64::from(self.slot)
    }

    /// From the low 48 bits of a word.
    pub fn from_word(word: u64) -> Self {
        Self { slab: (word >> 28) as u32 & 0xF_FFFF, slot: word as u32 & 0x0FFF_FFFF }
    }

    fn pack(self, fingerprint: u64) -> u64 {
        fingerprint << 48 | self.to_word()
    }
}

/// Memory for a key table: 8-byte words, zero at first, of which readers may have mappings of their own.
pub trait TableMemory {
    /// All of it.
    fn words(&self) -> &[AtomicU64];
}

/// A key table's memory on the heap: nobody else reads it.
pub struct HeapTable(Box<[AtomicU64]>);

impl HeapTable {
    /// Room for `keys` keys, however they come.
    pub fn new(keys: usize) -> Self {
        Self((0..KeyTable::bytes_for(keys as u64) / 8).map(|_| AtomicU64::new(0)).collect())
    }
}

impl TableMemory for HeapTable {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

/// An empty slot: fingerprints are never 0.
const VACANT: u64 = 0;

fn fingerprint(hash: u64) -> u64 {
    // 16 bits that neither pick the shard (the top byte) nor, mostly, the bucket.
    (hash & 0xFFFF).max(1)
}

fn shard_of(hash: u64) -> usize {
    (hash >> 56) as usize
}

/// Where a shard lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Extent {
    first: u32,
    buckets: u32,
}

impl Extent {
    fn from_word(word: u64) -> Self {
        Self { first: (word >> 32) as u32, buckets: word as u32 }
    }

    fn to_word(self) -> u64 {
        u64::from(self.first) << 32 | u64::from(self.buckets)
    }

    /// The bucket from which a key with this hash is looked for.
    fn home(self, hash: u64) -> u32 {
        let spread = hash << 8 >> 24;
        ((u128::from(spread) * u128::from(self.buckets)) >> 40) as u32
    }

    fn step(self, bucket: u32) -> u32 {
        if bucket + 1 >= self.buckets { 0 } else { bucket + 1 }
    }
}

/// A reader's view of a key table's memory. Whatever the memory says, it reads inside of it.
#[derive(Clone, Copy)]
pub struct TableView<'a> {
    words: &'a [AtomicU64],
}

impl<'a> TableView<'a> {
    /// A view of `words`.
    pub fn new(words: &'a [AtomicU64]) -> Self {
        Self { words }
    }

    fn shard(&self, hash: u64) -> Extent {
        self.words.get(shard_of(hash)).map(|word| Extent::from_word(word.load(Ordering::Acquire))).unwrap_or_default()
    }

    fn bucket(&self, extent: Extent, at: u32) -> Option<&'a [AtomicU64; BUCKET_WORDS]> {
        let first = HEAD_WORDS + (extent.first as usize + at as usize) * BUCKET_WORDS;
        self.words.get(first..first + BUCKET_WORDS)?.try_into().ok()
    }

    fn home(&self, hash: u64) -> Option<&'a [AtomicU64; BUCKET_WORDS]> {
        let extent = self.shard(hash);
        if extent.buckets == 0 { None } else { self.bucket(extent, extent.home(hash)) }
    }

    /// Asks the processor to load the bucket that [`Self::find`] starts from.
    pub fn prefetch(&self, hash: u64) {
        if let Some(bucket) = self.home(hash) {
            crate::prefetch(&bucket[0]);
        }
    }

    /// The slot most likely filed under `hash`, unconfirmed: to prefetch what confirms it.
    pub fn hint(&self, hash: u64) -> Option<SlotRef> {
        let wanted = fingerprint(hash);
        let slots = self.home(hash)?[1..].iter().map(|slot| slot.load(Ordering::Relaxed));
        slots.into_iter().find(|word| word >> 48 == wanted).map(SlotRef::from_word)
    }

    /// The first slot filed under `hash` that `is_key` confirms.
    pub fn find(&self, hash: u64, mut is_key: impl FnMut(SlotRef) -> bool) -> Option<SlotRef> {
        let extent = self.shard(hash);
        if extent.buckets == 0 {
            return None;
        }
        let wanted = fingerprint(hash);
        let mut at = extent.home(hash);
        for _ in 0..PROBE_BUCKETS_MAX.min(extent.buckets as usize) {
            let bucket = self.bucket(extent, at)?;
            for slot in &bucket[1..] {
                let word = slot.load(Ordering::Acquire);
                if word >> 48 == wanted && is_key(SlotRef::from_word(word)) {
                    return Some(SlotRef::from_word(word));
                }
            }
            if bucket[0].load(Ordering::Acquire) == 0 {
                return None;
            }
            at = extent.step(at);
        }
        None
    }
}

/// Why a key was not filed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableFull;

/// One namespace's key table, as its writer has it.
pub struct KeyTable {
    memory: Box<dyn TableMemory + Send + Sync>,
    used: Vec<u32>,
    /// Runs of buckets that shards left, by place.
    free: Vec<Extent>,
    /// Buckets from here on were never used, and are zero.
    fresh: u32,
    len: usize,
}

impl KeyTable {
    /// An empty table in `memory`, which is zero.
    pub fn new(memory: Box<dyn TableMemory + Send + Sync>) -> Self {
        Self { memory, used: vec![0; SHARDS], free: Vec::new(), fresh: 0, len: 0 }
    }

    /// Bytes of memory that hold `keys` keys, however they come: shards between full and half as large again,
    /// and room to rebuild in that others left.
    pub fn bytes_for(keys: u64) -> u64 {
        let buckets = keys * 100 / (FULL_PERCENT as u64 * WAYS as u64) * 2 + 16 * SHARDS as u64;
        (HEAD_WORDS as u64 * 8 + buckets * BUCKET_WORDS as u64 * 8).next_multiple_of(4096)
    }

    /// As readers see it.
    pub fn view(&self) -> TableView<'_> {
        TableView::new(self.memory.words())
    }

    /// Keys in the table.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without a key.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// See [`TableView::find`].
    pub fn find(&self, hash: u64, is_key: impl FnMut(SlotRef) -> bool) -> Option<SlotRef> {
        self.view().find(hash, is_key)
    }

    fn bucket_count(&self) -> u32 {
        (self.memory.words().len().saturating_sub(HEAD_WORDS) / BUCKET_WORDS) as u32
    }

    /// Puts `word` into a bucket of `extent`; false where it would lie too far from its home.
    fn place(&self, extent: Extent, hash: u64, word: u64) -> bool {
        let view = self.view();
        let home = extent.home(hash);
        let mut at = home;
        for _ in 0..PROBE_BUCKETS_MAX.min(extent.buckets as usize) {
            let Some(bucket) = view.bucket(extent, at) else { return false };
            if let Some(slot) = bucket[1..].iter().find(|slot| slot.load(Ordering::Relaxed) == VACANT) {
                let mut passed = home;
                // Counts first: a reader that sees a bucket's count looks further than it must, at worst.
                while passed != at {
                    let Some(bucket) = view.bucket(extent, passed) else { return false };
                    bucket[0].store(bucket[0].load(Ordering::Relaxed) + 1, Ordering::Release);
                    passed = extent.step(passed);
                }
                slot.store(word, Ordering::Release);
                return true;
            }
            at = extent.step(at);
        }
        false
    }

    /// Files `slot` under `hash`. `hash_of` gives the hash of a key filed earlier, where the shard must
    /// be rebuilt. Fails where the memory is full, or where too many keys have nearly one hash.
    pub fn insert(&mut self, hash: u64, slot: SlotRef, hash_of: impl Fn(SlotRef) -> u64) -> Result<(), TableFull> {
        let number = shard_of(hash);
        let extent = self.view().shard(hash);
        let extent = if (self.used[number] as usize + 1) * 100 > extent.buckets as usize * WAYS * FULL_PERCENT {
            self.grow(number, extent, hash_of)?
        } else {
            extent
        };
        if !self.place(extent, hash, slot.pack(fingerprint(hash))) {
            return Err(TableFull);
        }
        self.used[number] += 1;
        self.len += 1;
        Ok(())
    }

    fn grow(&mut self, number: usize, old: Extent, hash_of: impl Fn(SlotRef) -> u64) -> Result<Extent, TableFull> {
        let new = self.take(old.buckets + old.buckets / 2 + 1)?;
        for at in 0..old.buckets {
            let words: [u64; WAYS] = match self.view().bucket(old, at) {
                Some(bucket) => std::array::from_fn(|way| bucket[1 + way].load(Ordering::Relaxed)),
                None => return Err(TableFull),
            };
            for word in words.into_iter().filter(|word| *word != VACANT) {
                // Further from home than a look-up goes: the key is a miss from now on, and its slot is freed
                // like any other.
                if !self.place(new, hash_of(SlotRef::from_word(word)), word) {
                    self.used[number] = self.used[number].saturating_sub(1);
                    self.len -= 1;
                }
            }
        }
        if let Some(word) = self.memory.words().get(number) {
            word.store(new.to_word(), Ordering::Release);
        }
        self.give(old);
        Ok(new)
    }

    /// A run of empty buckets: the first that fits among those that shards left, or a fresh one.
    fn take(&mut self, buckets: u32) -> Result<Extent, TableFull> {
        if let Some(at) = self.free.iter().position(|run| run.buckets >= buckets) {
            let run = self.free[at];
            let taken = Extent { first: run.first, buckets };
            if run.buckets == buckets {
                self.free.remove(at);
            } else {
                self.free[at] = Extent { first: run.first + buckets, buckets: run.buckets - buckets };
            }
            for at in 0..buckets {
                let bucket = self.view().bucket(taken, at).ok_or(TableFull)?;
                bucket.iter().for_each(|word| word.store(VACANT, Ordering::Relaxed));
            }
            return Ok(taken);
        }
        if self.bucket_count() - self.fresh < buckets {
            return Err(TableFull);
        }
        let first = self.fresh;
        self.fresh += buckets;
        Ok(Extent { first, buckets })
    }

    /// Takes back a run, and joins it with those beside it.
    fn give(&mut self, run: Extent) {
        if run.buckets == 0 {
            return;
        }
        let at = self.free.partition_point(|other| other.first < run.first);
        self.free.insert(at, run);
        for at in [at, at.saturating_sub(1)] {
            if let [left, right, ..] = self.free[at..]
                && left.first + left.buckets == right.first
            {
                self.free[at].buckets += right.buckets;
                self.free.remove(at + 1);
            }
        }
    }

    /// Takes `slot` out from under `hash`; false when it is not there.
    pub fn remove(&mut self, hash: u64, slot: SlotRef) -> bool {
        let view = TableView::new(self.memory.words());
        let extent = view.shard(hash);
        if extent.buckets == 0 {
            return false;
        }
        let word = slot.pack(fingerprint(hash));
        let home = extent.home(hash);
        let mut at = home;
        for _ in 0..PROBE_BUCKETS_MAX.min(extent.buckets as usize) {
            let Some(bucket) = view.bucket(extent, at) else { return false };
            if let Some(found) = bucket[1..].iter().find(|slot| slot.load(Ordering::Relaxed) == word) {
                found.store(VACANT, Ordering::Release);
                let mut passed = home;
                while passed != at {
                    let Some(bucket) = view.bucket(extent, passed) else { break };
                    bucket[0].store(bucket[0].load(Ordering::Relaxed).saturating_sub(1), Ordering::Release);
                    passed = extent.step(passed);
                }
                let number = shard_of(hash);
                self.used[number] = self.used[number].saturating_sub(1);
                self.len -= 1;
                return true;
            }
            if bucket[0].load(Ordering::Relaxed) == 0 {
                return false;
            }
            at = extent.step(at);
        }
        false
    }

    /// The hash by which a table with this seed files `key`.
    pub fn hash(key: &SlotKey, seed: u64) -> u64 {
        key.table_hash(seed)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
mod tests {
    use super::*;

    fn slot(id: u32) -> SlotRef {
        SlotRef { slab: 0, slot: id }
    }

    fn overflowed(table: &KeyTable) -> u64 {
        let shards = (0..SHARDS).map(|shard| table.view().shard((shard as u64) << 56));
        shards
            .flat_map(|extent| (0..extent.buckets).map(move |at| (extent, at)))
            .map(|(extent, at)| table.view().bucket(extent, at).unwrap()[0].load(Ordering::Relaxed))
            .sum()
    }

    /// A count that only grew would make every look-up of an absent key walk through the shard in the end.
    #[test]
    fn removals_take_back_what_overflowed() {
        let mut table = KeyTable::new(Box::new(HeapTable::new(20_000)));
        let hash = |id: u32| u64::from(id % 11).wrapping_mul(0x0001_2345_6789_ABCD);
        let filed: Vec<u32> =
            (0..2000).filter(|id| table.insert(hash(*id), slot(*id), |slot| hash(slot.slot)).is_ok()).collect();
        assert!(overflowed(&table) > 0);
        for id in filed.iter().rev() {
            assert!(table.remove(hash(*id), slot(*id)));
        }
        assert_eq!((overflowed(&table), table.len()), (0, 0));
    }

    /// A client knows its own table's seed: keys that it chose to have one hash are refused in the end, and no
    /// look-up walks through them all.
    #[test]
    fn keys_of_one_hash_are_refused_beyond_the_longest_probe() {
        let mut table = KeyTable::new(Box::new(HeapTable::new(100_000)));
        let filed = (0..100_000).filter(|id| table.insert(7, slot(*id), |_| 7).is_ok()).count();
        assert!((WAYS..=PROBE_BUCKETS_MAX * WAYS).contains(&filed), "{filed}");
        let mut looked = 0;
        table.find(7, |_| {
            looked += 1;
            false
        });
        assert!(looked <= PROBE_BUCKETS_MAX * WAYS);
    }

    /// Shards grow one by one into what others left: the memory that `bytes_for` names is always enough.
    #[test]
    fn the_announced_memory_holds_the_announced_keys() {
        let keys = 50_000u32;
        let hash = |slot: SlotRef| xxhash_rust::xxh3::xxh3_64(&slot.slot.to_le_bytes());
        let mut table = KeyTable::new(Box::new(HeapTable::new(keys as usize)));
        for id in 0..keys {
            table.insert(hash(slot(id)), slot(id), hash).unwrap();
        }
        assert!((0..keys).all(|id| table.find(hash(slot(id)), |found| found == slot(id)).is_some()));
        assert_eq!(table.len(), keys as usize);
    }

    /// Memory that a confused or hostile writer filled with anything: a reader stays inside, and ends.
    #[test]
    fn a_view_of_garbage_reads_inside_of_it() {
        let mut random = 1u64;
        for words in [0, 10, 256, 600, 5000] {
            let garbage: Vec<AtomicU64> = (0..words)
                .map(|_| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    AtomicU64::new(random)
                })
                .collect();
            let view = TableView::new(&garbage);
            for shard in 0..256u64 {
                let hash = shard << 56 | 0x1234_5678_9ABC;
                view.prefetch(hash);
                view.hint(hash);
                assert_eq!(view.find(hash, |_| false), None);
            }
        }
    }
}
