//! A unit of the table: buckets of two cache lines, eight blocks to each.

use crate::caps;
use crate::flat::sets::Set;
use crate::prefetch::prefetch;
use crate::sync::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use crate::{READ, WRITE};

const SLOTS: usize = 8;
const BUCKETS: usize = caps::UNIT_BUCKETS;
/// Blocks in a unit, at most.
pub const UNIT_SLOTS: usize = BUCKETS * SLOTS;

/// Eight names in a cache line, and in the one beside it, which comes from memory at the same time, each one's holders. A name of 0 is
/// none.
#[cfg_attr(all(target_os = "linux", not(shuttle)), derive(zerocopy::FromZeros))]
#[repr(align(128))]
struct Bucket {
    names: [AtomicU64; SLOTS],
    sets: [AtomicU64; SLOTS],
}

/// The places of some words, as bits: without a branch for each, which no processor could foretell.
#[inline(always)]
pub fn places(words: &[AtomicU64; SLOTS], of: u64) -> u32 {
    let [a, b, c, d, e, f, g, h] = words.each_ref().map(|word| u32::from(word.load(READ) == of));
    (a | b << 1 | c << 2 | d << 3) | (e | f << 1 | g << 2 | h << 3) << 4
}

/// The place of the one word that is it, or [`SLOTS`]. For a name that is there once: half the instructions of [`places`].
#[inline(always)]
fn place(words: &[AtomicU64; SLOTS], of: u64) -> usize {
    let mut place = SLOTS;
    for (at, word) in words.iter().enumerate() {
        place = if word.load(READ) == of { at } else { place };
    }
    place
}

/// Of what is said of the slots of a bucket: whether somebody looked its block up since the hand passed it last, and (above) whether
/// somebody did so between the two times before.
const LOOKED_BEFORE: usize = SLOTS;

/// See the head of this file. All zeros: an empty one.
#[cfg_attr(all(target_os = "linux", not(shuttle)), derive(zerocopy::FromZeros))]
pub struct Unit {
    buckets: [Bucket; BUCKETS],
    /// By bucket: blocks that belong there or before, and lie behind.
    behind: [AtomicU8; BUCKETS],
    /// By bucket: see [`LOOKED_BEFORE`].
    looked: [AtomicU16; BUCKETS],
    hand: AtomicU32,
    used: AtomicU32,
    /// Its group grows at so many blocks.
    full: AtomicU32,
    /// The group that has it.
    group: AtomicU32,
}

/// A slot of a unit: in one word, as many of these are handed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u32);

impl Slot {
    #[inline(always)]
    fn new(bucket: usize, place: usize) -> Self {
        Self((bucket * SLOTS + place) as u32)
    }

    #[inline(always)]
    fn bucket(self) -> usize {
        self.0 as usize / SLOTS % BUCKETS
    }

    #[inline(always)]
    fn place(self) -> usize {
        self.0 as usize % SLOTS
    }
}

/// What [`Unit::look_for`] found: where a block is; or where it would go.
#[derive(Clone, Copy)]
pub enum Found {
    There(Slot),
    Vacant(Slot),
    /// Neither it nor room for it.
    Nowhere,
}

#[inline(always)]
fn home(key: u64) -> usize {
    key as usize % BUCKETS
}

#[inline(always)]
fn behind(key: u64, distance: usize) -> usize {
    (home(key) + distance) % BUCKETS
}

#[cfg(any(not(target_os = "linux"), shuttle))]
impl Default for Unit {
    fn default() -> Self {
        let bucket = |_| Bucket {
            names: std::array::from_fn(|_| AtomicU64::new(0)),
            sets: std::array::from_fn(|_| AtomicU64::new(0)),
        };
        Self {
            buckets: std::array::from_fn(bucket),
            behind: std::array::from_fn(|_| AtomicU8::new(0)),
            looked: std::array::from_fn(|_| AtomicU16::new(0)),
            hand: AtomicU32::new(0),
            used: AtomicU32::new(0),
            full: AtomicU32::new(0),
            group: AtomicU32::new(0),
        }
    }
}

impl Unit {
    pub const BYTES: u64 = size_of::<Self>() as u64;

    /// A group has it, which grows where one of its units has `full` blocks.
    pub fn give(&self, group: u32, full: u32) {
        self.group.store(group, Ordering::Relaxed);
        self.full.store(full, Ordering::Relaxed);
    }

    /// The group that has it.
    pub fn group(&self) -> u32 {
        self.group.load(Ordering::Relaxed)
    }

    /// Blocks in it.
    pub fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }

    /// True where its group is to grow.
    #[inline(always)]
    pub fn is_full(&self) -> bool {
        self.used() >= self.full.load(Ordering::Relaxed)
    }

    /// Lets it have some blocks more before it is full; false where it has three quarters of what there is room for.
    pub fn may_get_ahead(&self) -> bool {
        let full = self.full.load(Ordering::Relaxed) + UNIT_SLOTS as u32 / 64;
        let may = full <= UNIT_SLOTS as u32 / 4 * 3;
        if may {
            self.full.store(full, Ordering::Relaxed);
        }
        may
    }

    /// Nothing is in it any more.
    pub fn wipe(&self) {
        self.used.store(0, Ordering::Relaxed);
        for (bucket, behind) in self.buckets.iter().zip(&self.behind) {
            bucket.names.iter().chain(&bucket.sets).for_each(|word| word.store(0, WRITE));
            behind.store(0, WRITE);
        }
    }

    /// The lines that a name belongs in are on their way from memory.
    #[inline(always)]
    pub fn prefetch(&self, key: u64) {
        if let Some(bucket) = self.buckets.get(home(key)) {
            prefetch(&bucket.names);
            prefetch(&bucket.sets);
        }
    }

    #[inline(always)]
    fn name(&self, slot: Slot) -> Option<&AtomicU64> {
        self.buckets.get(slot.bucket())?.names.get(slot.place())
    }

    #[inline(always)]
    fn set(&self, slot: Slot) -> Option<&AtomicU64> {
        self.buckets.get(slot.bucket())?.sets.get(slot.place())
    }

    #[inline(always)]
    fn overflows(&self, bucket: usize) -> bool {
        self.behind.get(bucket).is_some_and(|behind| behind.load(READ) > 0)
    }

    // ------------------------------------------------------------------------------- the writer

    /// Where a block is, or where it would go.
    #[inline(always)]
    pub fn look_for(&self, key: u64) -> Found {
        let mut vacant = None;
        for distance in 0..2 {
            let bucket = behind(key, distance);
            let Some(words) = self.buckets.get(bucket) else { break };
            let named = place(&words.names, key);
            if named < SLOTS {
                return Found::There(Slot::new(bucket, named));
            }
            if vacant.is_none() {
                let empty = place(&words.names, 0);
                vacant = (empty < SLOTS).then(|| Slot::new(bucket, empty));
            }
            if !self.overflows(bucket) {
                match vacant {
                    Some(slot) => return Found::Vacant(slot),
                    None => break,
                }
            }
        }
        self.look_further(key)
    }

    #[cold]
    fn look_further(&self, key: u64) -> Found {
        let mut vacant = None;
        let mut may_be = true;
        for bucket in (0..=caps::PROBES_MAX).map(|distance| behind(key, distance)) {
            let Some(words) = self.buckets.get(bucket) else { break };
            let named = if may_be { place(&words.names, key) } else { SLOTS };
            if named < SLOTS {
                return Found::There(Slot::new(bucket, named));
            }
            let empty = place(&words.names, 0);
            if vacant.is_none() && empty < SLOTS {
                vacant = Some(Slot::new(bucket, empty));
            }
            may_be = may_be && self.overflows(bucket);
            if !may_be && vacant.is_some() {
                break;
            }
        }
        vacant.map_or(Found::Nowhere, Found::Vacant)
    }

    /// The holders of the block in a slot, for the writer.
    #[inline(always)]
    pub fn set_of(&self, slot: Slot) -> Set {
        self.set(slot).map_or(Set::EMPTY, |set| Set(set.load(Ordering::Relaxed)))
    }

    /// A block in a vacant slot of those that [`Self::look_for`] names.
    #[inline(always)]
    pub fn fill(&self, slot: Slot, key: u64, set: Set) {
        // Before it can be found: whoever does not find it looks no further than this says.
        self.count_behind(slot, key, true);
        if let (Some(name), Some(holders)) = (self.name(slot), self.set(slot)) {
            name.store(key, WRITE);
            holders.store(set.0, WRITE);
            // There is one writer: nothing is locked for it.
            self.used.store(self.used() + 1, Ordering::Relaxed);
        }
    }

    /// Other holders for a block.
    #[inline(always)]
    pub fn write(&self, slot: Slot, set: Set) {
        if let Some(word) = self.set(slot) {
            word.store(set.0, WRITE);
        }
    }

    /// The block has no holder any more.
    #[inline(always)]
    pub fn clear(&self, slot: Slot, key: u64) {
        self.write(slot, Set::EMPTY);
        if let Some(name) = self.name(slot) {
            name.store(0, WRITE);
        }
        self.count_behind(slot, key, false);
        self.used.store(self.used().saturating_sub(1), Ordering::Relaxed);
    }

    /// Counts a block that lies behind its own bucket, or no longer does. A count that is full stays: readers look on in vain.
    #[inline(always)]
    fn count_behind(&self, slot: Slot, key: u64, more: bool) {
        let distance = (slot.bucket() + BUCKETS - home(key)) % BUCKETS;
        if distance > 0 {
            self.count_some_behind(distance, key, more);
        }
    }

    #[inline(never)]
    fn count_some_behind(&self, distance: usize, key: u64, more: bool) {
        for behind in (0..distance).filter_map(|distance| self.behind.get(behind(key, distance))) {
            match (behind.load(Ordering::Relaxed), more) {
                (u8::MAX, _) | (0, false) => {}
                (count, true) => behind.store(count + 1, WRITE),
                (count, false) => behind.store(count - 1, WRITE),
            }
        }
    }

    /// A block that is not there, and for which there is room.
    #[inline(always)]
    pub fn place(&self, key: u64, set: Set) {
        for bucket in (0..=caps::PROBES_MAX).map(|distance| behind(key, distance)) {
            let empty = self.buckets.get(bucket).map_or(SLOTS, |words| place(&words.names, 0));
            if empty < SLOTS {
                return self.fill(Slot::new(bucket, empty), key, set);
            }
        }
    }

    /// What a slot holds, if it does.
    pub fn held(&self, slot: Slot) -> Option<(u64, Set)> {
        let name = self.name(slot)?.load(Ordering::Relaxed);
        (name != 0).then(|| (name, self.set_of(slot)))
    }

    /// Tells of each block where it is, its name, and its holders.
    #[inline(always)]
    pub fn each(&self, mut tell: impl FnMut(Slot, u64, Set)) {
        for (bucket, words) in self.buckets.iter().enumerate() {
            for (slot, (name, set)) in words.names.iter().zip(&words.sets).enumerate() {
                let name = name.load(Ordering::Relaxed);
                if name != 0 {
                    tell(Slot::new(bucket, slot), name, Set(set.load(Ordering::Relaxed)));
                }
            }
        }
    }

    /// One of the slots that are in the way of `key`, whose block nobody looked up since the hand passed it twice: with each that is asked
    /// for the hand moves on by one slot.
    pub fn victim(&self, key: u64) -> Option<Slot> {
        let hand = self.hand.fetch_add(1, Ordering::Relaxed) as usize;
        self.pass(Slot::new(hand / SLOTS % BUCKETS, hand % SLOTS));
        let slots = (caps::PROBES_MAX + 1) * SLOTS;
        let places = (0..slots).map(|step| (hand + step) % slots);
        let mut slots = places.map(|place| Slot::new(behind(key, place / SLOTS), place % SLOTS));
        let first = slots.next()?;
        if !self.was_looked(first) {
            return Some(first);
        }
        slots.find(|slot| !self.was_looked(*slot)).or(Some(first))
    }

    fn was_looked(&self, slot: Slot) -> bool {
        let bits = 1 << slot.place() | 1 << (LOOKED_BEFORE + slot.place());
        self.looked.get(slot.bucket()).is_some_and(|looked| looked.load(Ordering::Relaxed) & bits != 0)
    }

    /// The hand passes a slot: what was looked up before the last time is forgotten.
    fn pass(&self, slot: Slot) {
        let Some(looked) = self.looked.get(slot.bucket()) else { return };
        let (now, before) = (1u16 << slot.place(), 1u16 << (LOOKED_BEFORE + slot.place()));
        let was = looked.fetch_and(!(now | before), Ordering::Relaxed);
        if was & now != 0 {
            looked.fetch_or(before, Ordering::Relaxed);
        }
    }

    // ------------------------------------------------------------------------------- readers

    /// A block's holders where a first look tells them all: the block is in its own bucket, and the word says who. `note`: see [`Self::look`].
    #[inline(always)]
    pub fn glance(&self, key: u64, note: bool) -> Option<Set> {
        let bucket = home(key);
        let words = self.buckets.get(bucket)?;
        let slot = place(&words.names, key);
        let Some(holders) = words.sets.get(slot) else { return (!self.overflows(bucket)).then_some(Set::EMPTY) };
        let set = Set(holders.load(READ));
        let is_still = words.names.get(slot)?.load(READ) == key;
        if note {
            self.note(bucket, slot);
        }
        (is_still && set.is_inline()).then_some(set)
    }

    /// What a block's word may be, for who begins to load what it means.
    #[inline(always)]
    pub fn peek(&self, key: u64) -> Set {
        let words = self.buckets.get(home(key));
        let word = words.and_then(|words| words.sets.get(place(&words.names, key)));
        word.map_or(Set::EMPTY, |word| Set(word.load(Ordering::Relaxed)))
    }

    /// One look at a block's holders: `None` where it has none, or changes all the time. `of`: what a set says, `None` where that
    /// changes under its eyes. `note`: that it was looked up counts at the bound.
    pub fn look<T>(&self, key: u64, note: bool, mut of: impl FnMut(Set) -> Option<T>) -> Option<T> {
        for distance in 0..=caps::PROBES_MAX {
            let bucket = behind(key, distance);
            let words = self.buckets.get(bucket)?;
            let mut named = places(&words.names, key);
            while named != 0 {
                let slot = named.trailing_zeros() as usize % SLOTS;
                named &= named - 1;
                let (name, holders) = (words.names.get(slot)?, words.sets.get(slot)?);
                for _ in 0..caps::READ_TRIES {
                    let set = Set(holders.load(READ));
                    if set.is_empty() || name.load(READ) != key {
                        break;
                    }
                    if let Some(seen) = of(set)
                        && (set.is_inline() || holders.load(READ) == set.0)
                    {
                        if note {
                            self.note(bucket, slot);
                        }
                        return Some(seen);
                    }
                }
            }
            if !self.overflows(bucket) {
                return None;
            }
        }
        None
    }

    fn note(&self, bucket: usize, slot: usize) {
        let Some(looked) = self.looked.get(bucket) else { return };
        if looked.load(Ordering::Relaxed) >> slot & 1 == 0 {
            looked.fetch_or(1 << slot, Ordering::Relaxed);
        }
    }
}
