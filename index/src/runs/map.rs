//! From a hash to the place of a block: half of the hash and the place in a word, eight words to a line.
//!
//! Whoever looks verifies at the place whether it is the block: a word alone says that it may be. Half of a hash says which unit and which line,
//! so that nothing but the words is looked at when a full unit becomes two (extendible hashing). A word keeps its line then: the
//! halves are written in the order in which the whole is read.
//! A word lies behind its own line only while all lines between are full: what leaves a full line makes room for one from behind.

use std::sync::OnceLock;

use smallvec::SmallVec;

use super::pool::Budget;
use crate::caps;
use crate::group::fullness;
use crate::prefetch::prefetch;
use crate::slab::{HUGE_BYTES, Slab};
use crate::sync::{AtomicU32, AtomicU64, Mutex, Ordering};
use crate::{READ, WRITE};

const WORDS: usize = 8;
const LINES: usize = caps::MAP_UNIT_LINES;
/// Words of a unit.
const UNIT_WORDS: usize = LINES * WORDS;
/// Levels of the directory, at most: what is left of half of a hash finds the line.
const LEVELS: u32 = 32 - LINES.ilog2();
/// Of a unit's number, its place in its slab.
const PLACE_BITS: u32 = 5;
const UNITS_OF_HUGE: usize = if cfg!(shuttle) { 2 } else { HUGE_BYTES / size_of::<Unit>() };
const _: () = assert!(UNITS_OF_HUGE <= 1 << PLACE_BITS);

/// The half of a hash that a map keeps, of a name that is mixed. Names that follow one another are spread over units and lines alike.
#[inline(always)]
pub fn half(key: u64) -> u32 {
    (key.wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 32) as u32
}

#[cfg_attr(all(target_os = "linux", not(shuttle)), derive(zerocopy::FromZeros))]
#[repr(align(64))]
struct Line([AtomicU64; WORDS]);

impl Line {
    /// The words with this half, as bits, and those that are empty.
    #[inline(always)]
    fn look(&self, half: u32) -> (u32, u32) {
        let (mut of, mut empty) = (0, 0);
        for (at, word) in self.0.iter().enumerate() {
            let word = word.load(READ);
            of |= u32::from((word >> 32) as u32 == half) << at;
            empty |= u32::from(word == 0) << at;
        }
        (of & !empty, empty)
    }
}

#[cfg_attr(all(target_os = "linux", not(shuttle)), derive(zerocopy::FromZeros))]
pub struct Unit {
    lines: [Line; LINES],
    used: AtomicU32,
    full: AtomicU32,
    /// So many leading bits are the same in all of its hashes.
    depth: AtomicU32,
}

#[cfg(any(not(target_os = "linux"), shuttle))]
impl Default for Unit {
    fn default() -> Self {
        let none = || AtomicU32::new(0);
        let line = |_| Line(std::array::from_fn(|_| AtomicU64::new(0)));
        Self { lines: std::array::from_fn(line), used: none(), full: none(), depth: none() }
    }
}

/// What [`Map::look`] found.
pub enum Look<'a> {
    There(u32),
    /// It is not there; where it would go, if there is room.
    Vacant(Option<Vacant<'a>>),
}

/// A word for a block, until the map changes.
pub struct Vacant<'a> {
    unit: &'a Unit,
    word: &'a AtomicU64,
}

#[inline(always)]
fn home(half: u32) -> usize {
    half as usize % LINES
}

impl Unit {
    #[inline(always)]
    fn line(&self, at: usize) -> Option<&Line> {
        self.lines.get(at % LINES)
    }

    fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }

    /// The place of a block, where `is` says that it is the one, or the word for it.
    #[inline(always)]
    fn look(&self, half: u32, mut is: impl FnMut(u32) -> bool) -> Look<'_> {
        for distance in 0..=caps::MAP_PROBES_MAX {
            let Some(line) = self.line(home(half) + distance) else { break };
            let (mut of, empty) = line.look(half);
            while let Some(word) = line.0.get(of.trailing_zeros() as usize) {
                let place = word.load(READ) as u32;
                of &= of - 1;
                if is(place) {
                    return Look::There(place);
                }
            }
            if let Some(word) = line.0.get(empty.trailing_zeros() as usize) {
                return Look::Vacant(Some(Vacant { unit: self, word }));
            }
        }
        Look::Vacant(None)
    }

    #[inline(always)]
    fn insert(&self, half: u32, place: u32) -> bool {
        for distance in 0..=caps::MAP_PROBES_MAX {
            let Some(line) = self.line(home(half) + distance) else { return false };
            let (_, empty) = line.look(half);
            if let Some(word) = line.0.get(empty.trailing_zeros() as usize) {
                word.store(u64::from(half) << 32 | u64::from(place), WRITE);
                self.used.store(self.used() + 1, Ordering::Relaxed);
                return true;
            }
        }
        false
    }

    #[inline(always)]
    fn remove(&self, half: u32, place: u32) {
        let of = u64::from(half) << 32 | u64::from(place);
        for at in (0..=caps::MAP_PROBES_MAX).map(|distance| home(half) + distance) {
            let Some(line) = self.line(at) else { return };
            let (mut is, mut empty) = (0, 0);
            for (at, word) in line.0.iter().enumerate() {
                let word = word.load(Ordering::Relaxed);
                is |= u32::from(word == of) << at;
                empty |= u32::from(word == 0) << at;
            }
            if let Some(word) = line.0.get(is.trailing_zeros() as usize) {
                self.used.store(self.used().saturating_sub(1), Ordering::Relaxed);
                if empty != 0 {
                    return word.store(0, WRITE);
                }
                return self.fill_up(at, word);
            }
            if empty != 0 {
                return;
            }
        }
    }

    /// The line behind the one that a hash belongs in is on its way from memory, if that is full: words are filled from the first on.
    #[inline(always)]
    fn bring_behind(&self, half: u32) {
        let is_full = self.line(home(half)).and_then(|line| line.0.last()).is_some_and(|word| word.load(READ) != 0);
        if let Some(behind) = self.line(home(half) + 1).filter(|_| is_full) {
            prefetch(behind);
        }
    }

    /// A word of a full line is free: one that lies behind for lack of room comes back, and so on.
    #[cold]
    fn fill_up(&self, at: usize, word: &AtomicU64) {
        let (mut at, mut gap) = (at, word);
        'next: loop {
            for distance in 1..=caps::MAP_PROBES_MAX {
                let Some(line) = self.line(at + distance) else { break };
                let (_, empty) = line.look(0);
                let behind = line.0.iter().find(|word| {
                    let word = word.load(Ordering::Relaxed);
                    word != 0 && (at + distance + LINES - home((word >> 32) as u32)) % LINES >= distance
                });
                if let Some(word) = behind {
                    // It is there twice for a moment, rather than not at all.
                    gap.store(word.load(Ordering::Relaxed), WRITE);
                    if empty != 0 {
                        return word.store(0, WRITE);
                    }
                    (at, gap) = (at + distance, word);
                    continue 'next;
                }
                if empty != 0 {
                    break;
                }
            }
            return gap.store(0, WRITE);
        }
    }

    fn each(&self, mut tell: impl FnMut(u32, u32)) {
        for word in self.lines.iter().flat_map(|line| &line.0) {
            let word = word.load(Ordering::Relaxed);
            if word != 0 {
                tell((word >> 32) as u32, word as u32);
            }
        }
    }
}

/// See the head of this file.
pub struct Map {
    levels: Box<[OnceLock<Box<[AtomicU32]>>]>,
    level: AtomicU32,
    slabs: Box<[OnceLock<Slab<Unit>>]>,
    of_slab: usize,
    made: AtomicU32,
    /// Units that no place of the directory has.
    free: Mutex<Vec<u32>>,
}

impl Map {
    pub fn new(budget: &Budget) -> Self {
        let is_large = budget.slab_bytes() == HUGE_BYTES as u64;
        let of_slab = if is_large { UNITS_OF_HUGE } else { 1 };
        let slabs = (budget.most() / (of_slab * size_of::<Unit>()) as u64).max(1);
        let slabs = if cfg!(shuttle) { slabs.min(16) } else { slabs };
        let units = (slabs as usize * of_slab).next_power_of_two();
        let levels = (units.trailing_zeros() + caps::MAP_DEPTH_SPREAD).min(LEVELS);
        let map = Self {
            levels: (0..=levels).map(|_| OnceLock::new()).collect(),
            level: AtomicU32::new(0),
            slabs: (0..slabs).map(|_| OnceLock::new()).collect(),
            of_slab,
            made: AtomicU32::new(0),
            free: Mutex::new(Vec::new()),
        };
        map.add_level(1, |_| 0);
        if let [first] = map.take(&mut map.free.lock(), 1, budget)[..] {
            map.publish(first, 0, 0);
        }
        map
    }

    fn take(&self, free: &mut Vec<u32>, count: usize, budget: &Budget) -> SmallVec<[u32; 2]> {
        while free.len() < count {
            let made = self.made.load(Ordering::Relaxed) as usize;
            let Some(slab) = self.slabs.get(made / self.of_slab) else { return SmallVec::new() };
            if slab.get().is_none() {
                if !budget.take(self.slab_bytes()) {
                    return SmallVec::new();
                }
                slab.get_or_init(|| Slab::new(self.of_slab));
            }
            self.made.store(made as u32 + 1, WRITE);
            free.push(((made / self.of_slab) << PLACE_BITS | (made % self.of_slab)) as u32);
        }
        let left = free.len() - count;
        free.drain(left..).collect()
    }

    fn slab_bytes(&self) -> u64 {
        if self.of_slab == UNITS_OF_HUGE { HUGE_BYTES as u64 } else { (self.of_slab * size_of::<Unit>()) as u64 }
    }

    /// What is there beside the slabs, where all levels of the directory are.
    pub fn fixed_bytes_max(&self) -> u64 {
        (self.slabs.len() * (size_of::<OnceLock<Slab<Unit>>>() + self.of_slab * size_of::<u32>())) as u64
            + (8 << (self.levels.len() - 1))
    }

    /// ... and now.
    pub fn fixed_bytes(&self) -> u64 {
        let units = self.made.load(Ordering::Relaxed) as usize * size_of::<u32>();
        (self.slabs.len() * size_of::<OnceLock<Slab<Unit>>>() + units) as u64
            + (8 << self.level.load(Ordering::Relaxed))
    }

    fn add_level(&self, level: u32, of: impl Fn(usize) -> u32) {
        let directory = (0..1 << level).map(|place| AtomicU32::new(of(place))).collect();
        if self.levels.get(level as usize).is_some_and(|known| known.set(directory).is_ok()) {
            self.level.store(level, WRITE);
        }
    }

    /// All hashes with the same `depth` leading bits as one are in a unit.
    fn publish(&self, at: u32, depth: u32, half: u32) {
        let level = self.level.load(Ordering::Relaxed);
        let Some(directory) = self.levels.get(level as usize).and_then(OnceLock::get) else { return };
        let Some(unit) = self.unit(at) else { return };
        unit.depth.store(depth, Ordering::Relaxed);
        unit.full.store(fullness(at as usize, depth as usize, UNIT_WORDS, 0.50, 0.16), Ordering::Relaxed);
        let places = directory.len() >> depth;
        let first = (half >> (32 - level)) as usize & !(places - 1);
        directory.iter().skip(first).take(places).for_each(|place| place.store(at, WRITE));
    }

    #[inline(always)]
    fn unit(&self, at: u32) -> Option<&Unit> {
        self.slabs.get((at >> PLACE_BITS) as usize)?.get()?.get(at as usize % (1 << PLACE_BITS))
    }

    #[inline(always)]
    fn place(&self, half: u32) -> Option<&AtomicU32> {
        let level = self.level.load(READ);
        self.levels.get(level as usize)?.get()?.get((half >> (32 - level)) as usize)
    }

    #[inline(always)]
    fn home(&self, half: u32) -> Option<&Unit> {
        self.unit(self.place(half)?.load(READ))
    }

    /// The line that a hash belongs in is on its way from memory.
    #[inline(always)]
    pub fn prefetch(&self, half: u32) {
        if let Some(line) = self.home(half).and_then(|unit| unit.line(home(half))) {
            prefetch(line);
        }
    }

    /// What [`Self::remove`] may look at behind the line of a hash is on its way from memory.
    #[inline(always)]
    pub fn bring_behind(&self, half: u32) {
        if let Some(unit) = self.home(half) {
            unit.bring_behind(half);
        }
    }

    /// The place of a block, where `is` says that it is the one, or the word for it.
    #[inline(always)]
    pub fn look(&self, half: u32, is: impl FnMut(u32) -> bool) -> Look<'_> {
        self.home(half).map_or(Look::Vacant(None), |unit| unit.look(half, is))
    }

    /// A block goes where [`Self::look`] said. `false`: there is no room, or it is time to make some (`is_full`).
    #[inline(always)]
    pub fn fill(&self, vacant: Option<Vacant<'_>>, half: u32, place: u32, budget: &Budget, is_full: &mut bool) -> bool {
        match vacant {
            Some(Vacant { unit, word }) if unit.used() < unit.full.load(Ordering::Relaxed) => {
                word.store(u64::from(half) << 32 | u64::from(place), WRITE);
                unit.used.store(unit.used() + 1, Ordering::Relaxed);
                true
            }
            _ => self.insert(half, place, budget, is_full),
        }
    }

    /// A block that is not there. `false`: there is no room, or it is time to make some (`is_full`).
    #[inline(never)]
    pub fn insert(&self, half: u32, place: u32, budget: &Budget, is_full: &mut bool) -> bool {
        let Some(mut unit) = self.home(half) else { return false };
        if unit.used() >= unit.full.load(Ordering::Relaxed) {
            *is_full |= !self.grow(half, budget);
            let Some(now) = self.home(half) else { return false };
            unit = now;
        }
        if unit.insert(half, place) {
            return true;
        }
        let has_grown = self.grow(half, budget);
        *is_full |= !has_grown;
        has_grown && self.home(half).is_some_and(|unit| unit.insert(half, place))
    }

    /// The block is not there any more.
    #[inline(always)]
    pub fn remove(&self, half: u32, place: u32) {
        if let Some(unit) = self.home(half) {
            unit.remove(half, place);
        }
    }

    /// The unit of a hash becomes two; false where there is no memory for that.
    #[cold]
    fn grow(&self, half: u32, budget: &Budget) -> bool {
        let Some(full) = self.home(half) else { return false };
        let depth = full.depth.load(Ordering::Relaxed) + 1;
        let level = self.level.load(Ordering::Relaxed);
        if depth as usize >= self.levels.len() {
            return false;
        }
        let Some(at) = self.place(half).map(|place| place.load(Ordering::Relaxed)) else { return false };
        let mut free = self.free.lock();
        let [lower, upper] = self.take(&mut free, 2, budget)[..] else { return false };
        let (Some(low), Some(high)) = (self.unit(lower), self.unit(upper)) else { return false };
        let bit = 1 << (32 - depth);
        full.each(|half, place| {
            (if half & bit == 0 { low } else { high }).insert(half, place);
        });
        if level < depth {
            let Some(directory) = self.levels.get(level as usize).and_then(OnceLock::get) else { return false };
            self.add_level(level + 1, |place| directory.get(place / 2).map_or(0, |at| at.load(Ordering::Relaxed)));
        }
        self.publish(lower, depth, half & !bit);
        self.publish(upper, depth, half | bit);
        full.used.store(0, Ordering::Relaxed);
        full.lines.iter().flat_map(|line| &line.0).for_each(|word| word.store(0, WRITE));
        free.push(at);
        true
    }

    /// Words in it.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        let mut words = 0;
        let made = self.made.load(Ordering::Relaxed) as usize;
        let units = (0..made).map(|made| ((made / self.of_slab) << PLACE_BITS | (made % self.of_slab)) as u32);
        units.filter_map(|unit| self.unit(unit)).for_each(|unit| unit.each(|_, _| words += 1));
        words
    }
}
