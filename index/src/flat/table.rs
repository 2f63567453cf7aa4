//! The table: from a block's name to the set of its holders.
//!
//! Names lie in units of 66 KiB, three to five of which are a group. The leading bits of a name find its group, and the next six which of
//! the group's units: the directory says both in one. A group that fills up gets one unit more, which takes an even part of each of the
//! others'; one that has five is split in two of three (extendible hashing). So it is never full, and never much too large.

use std::sync::OnceLock;

use smallvec::SmallVec;

use crate::caps::{self, UNITS_MAX, UNITS_MIN};
use crate::flat::sets::Set;
use crate::flat::unit::{Found, Slot, UNIT_SLOTS, Unit};
use crate::group::{Group, PART_BITS};
pub use crate::mix::mixed;
use crate::slab::{HUGE_BYTES, Slab};
use crate::sync::{AtomicU32, Mutex, Ordering, fence};
use crate::{READ, WRITE};

/// Units that a huge page has room for.
const UNITS_OF_HUGE: usize = if cfg!(shuttle) { 2 } else { HUGE_BYTES / size_of::<Unit>() };
/// A group grows where so much of a unit is in use: with more than six in ten slots, too many names lie in buckets behind their own.
fn fullness(group: usize, count: usize) -> u32 {
    crate::group::fullness(group, count, UNIT_SLOTS, 0.53, 0.06)
}

/// Of a unit's number, its place in its slab.
const PLACE_BITS: u32 = 5;
const _: () = assert!(UNITS_OF_HUGE <= 1 << PLACE_BITS);

/// Where a block is, and what was said of it when the writer looked.
#[derive(Clone, Copy, Debug)]
pub struct At {
    unit: u32,
    slot: Slot,
    key: u64,
    set: Set,
}

impl At {
    /// Its holders.
    pub fn set(&self) -> Set {
        self.set
    }

    /// Its name, mixed.
    pub fn key(&self) -> u64 {
        self.key
    }
}

/// What came of an insertion.
pub enum Insert {
    Done,
    /// The group is full: let it grow, then try again.
    Full,
    /// It is full, and the table as large as it may be: this one may go instead.
    NoRoom(Option<At>),
}

/// By the leading bits of a name: its unit. Each level is twice as fine as the one before.
type Level = OnceLock<Box<[AtomicU32]>>;

/// What the writer knows.
#[derive(Default)]
struct Plan {
    groups: Vec<Group>,
    /// Units that no group has. A reader may look into one all the same: it finds nothing that is not so.
    free: Vec<u32>,
    /// Room for what moves when a group grows: large memory, which an allocator had better not be asked for each time.
    moved: Vec<At>,
}

/// See the head of this file.
pub struct Table {
    levels: Box<[Level]>,
    level: AtomicU32,
    slabs: Box<[OnceLock<Slab<Unit>>]>,
    /// Units in a slab.
    of_slab: usize,
    made: AtomicU32,
    plan: Mutex<Plan>,
    /// How often names moved.
    moves: AtomicU32,
}

impl Table {
    pub fn new(bytes_max: u64) -> Self {
        // Of each unit its own part of the directory.
        let most = (bytes_max / (Unit::BYTES + 512)).max(UNITS_MIN as u64) as usize;
        let most = if cfg!(shuttle) { most.min(16) } else { most };
        // As many to a slab as a huge page has room for; a table that has no more is one slab.
        let of_slab = most.min(UNITS_OF_HUGE);
        let slabs = most / of_slab;
        let most = slabs * of_slab;
        let groups = most.div_ceil(UNITS_MIN).next_power_of_two();
        // Twice as fine as there are groups: names are spread evenly, but not that evenly.
        let bits = (groups.trailing_zeros() + 1 + PART_BITS).min(caps::DIRECTORY_BITS);
        let table = Self {
            levels: (0..=bits).map(|_| OnceLock::new()).collect(),
            level: AtomicU32::new(0),
            slabs: (0..slabs).map(|_| OnceLock::new()).collect(),
            of_slab,
            made: AtomicU32::new(0),
            plan: Mutex::new(Plan::default()),
            moves: AtomicU32::new(0),
        };
        let mut plan = table.plan.lock();
        let units = table.take(&mut plan, UNITS_MIN);
        plan.groups.push(Group { units: units.into_iter().collect(), depth: 0 });
        table.add_level(PART_BITS, |_| 0);
        table.publish(&plan, 0, 0);
        drop(plan);
        table
    }

    /// Units that no group has: so many, or none.
    fn take(&self, plan: &mut Plan, count: usize) -> SmallVec<[u32; 2 * UNITS_MIN]> {
        while plan.free.len() < count {
            let made = self.made.load(Ordering::Relaxed);
            let Some(slab) = self.slabs.get(made as usize / self.of_slab) else { return SmallVec::new() };
            slab.get_or_init(|| Slab::new(self.of_slab));
            self.made.store(made + 1, WRITE);
            plan.free.push(self.nth(made as usize));
        }
        let left = plan.free.len() - count;
        plan.free.drain(left..).collect()
    }

    fn add_level(&self, level: u32, of: impl Fn(usize) -> u32) {
        let directory = (0..1 << level).map(|place| AtomicU32::new(of(place))).collect();
        if self.levels.get(level as usize).is_some_and(|known| known.set(directory).is_ok()) {
            self.level.store(level, WRITE);
        }
    }

    /// The directory says of the names of a group, one of which is `key`, where they are.
    fn publish(&self, plan: &Plan, at: usize, key: u64) {
        let Some(group) = plan.groups.get(at) else { return };
        let full = fullness(at, group.units.len());
        group.units.iter().filter_map(|unit| self.unit(*unit)).for_each(|unit| unit.give(at as u32, full));
        let (directory, shift) = self.directory();
        // Of the places in the directory, so many are the group's, and so many each part's.
        let (places, part_places) = (directory.len() >> group.depth, directory.len() >> (group.depth + PART_BITS));
        let first = (key >> 1 >> shift) as usize & !(places - 1);
        for (at, place) in directory.iter().skip(first).take(places).enumerate() {
            place.store(group.unit_at(at, part_places).unwrap_or(0), WRITE);
        }
    }

    /// Units that there are.
    pub fn units(&self) -> usize {
        self.made.load(READ) as usize
    }

    /// The number of the unit that was made after so many others.
    pub fn nth(&self, made: usize) -> u32 {
        ((made / self.of_slab) << PLACE_BITS | (made % self.of_slab)) as u32
    }

    pub fn bytes(&self) -> u64 {
        let slabs = self.units().div_ceil(self.of_slab);
        self.slabs_bytes(slabs) + self.fixed_bytes(self.level.load(Ordering::Relaxed))
    }

    pub fn bytes_max(&self) -> u64 {
        self.slabs_bytes(self.slabs.len()) + self.fixed_bytes(self.levels.len() as u32 - 1)
    }

    fn slabs_bytes(&self, slabs: usize) -> u64 {
        let slab = self.of_slab as u64 * Unit::BYTES;
        slabs as u64 * if self.of_slab == UNITS_OF_HUGE { HUGE_BYTES as u64 } else { slab }
    }

    /// True where it may come to its bound, and counts what was looked up: before, nothing is noted.
    pub fn notes(&self) -> bool {
        self.made.load(Ordering::Relaxed) as usize * 2 > self.units_max()
    }

    /// Units, at most.
    fn units_max(&self) -> usize {
        self.slabs.len() * self.of_slab
    }

    fn fixed_bytes(&self, level: u32) -> u64 {
        // All levels up to this one; of each unit what finds it, and its part of what the writer knows.
        let unit = size_of::<Group>() / UNITS_MIN + size_of::<u32>();
        (8 << level) + (self.units_max() * unit + self.slabs.len() * size_of::<OnceLock<Slab<Unit>>>()) as u64
    }

    #[inline(always)]
    pub fn unit(&self, at: u32) -> Option<&Unit> {
        self.slabs.get((at >> PLACE_BITS) as usize)?.get()?.get(at as usize % (1 << PLACE_BITS))
    }

    /// The finest level of the directory, and by how much a name is shifted, once by one and once by this, to be a place in it.
    #[inline(always)]
    pub fn directory(&self) -> (&[AtomicU32], u32) {
        let level = self.level.load(READ);
        (self.levels.get(level as usize).and_then(OnceLock::get).map_or(&[], Box::as_ref), 63 - level)
    }

    /// How often names moved. A reader notes it first, and what it put together of several words holds where it is the same after.
    #[inline(always)]
    pub fn moves(&self) -> u32 {
        self.moves.load(READ)
    }

    /// Where a name belongs. What is looked for there may have moved since: [`Self::now`].
    #[inline(always)]
    pub fn home(&self, key: u64) -> Option<Home<'_>> {
        let (directory, shift) = self.directory();
        let moves = self.moves.load(Ordering::Relaxed);
        let at = directory.get((key >> 1 >> shift) as usize)?.load(READ);
        Some(Home { unit: self.unit(at)?, at, moves, key })
    }

    /// Where a name belongs now, for the writer.
    #[inline(always)]
    pub fn now<'a>(&'a self, home: Home<'a>) -> Option<Home<'a>> {
        if home.moves == self.moves.load(Ordering::Relaxed) { Some(home) } else { self.home(home.key) }
    }

    /// Where [`AHEAD`] names at most belong, whose lines are on their way from memory then.
    #[inline(always)]
    pub fn begin<'a>(&'a self, keys: impl Iterator<Item = u64>, homes: &mut [Option<Home<'a>>; AHEAD]) {
        for (to, key) in homes.iter_mut().zip(keys) {
            *to = self.home(key);
            if let Some(home) = to {
                home.unit.prefetch(key);
            }
        }
    }

    // ------------------------------------------------------------------------------- the writer

    /// Tells of some names, in their order, where each belongs, in steps of [`AHEAD`].
    #[inline(always)]
    pub fn each_home<'a>(&'a self, names: &[u64], mut tell: impl FnMut(&Home<'a>)) {
        let mut homes = [None; AHEAD];
        for names in names.chunks(AHEAD) {
            self.begin(names.iter().map(|name| mixed(*name)), &mut homes);
            homes.iter().take(names.len()).flatten().for_each(&mut tell);
        }
    }

    /// Puts a block that is not there, where [`Home::look_for`] said.
    #[inline(always)]
    pub fn insert(&self, home: &Home<'_>, set: Set, found: Found) -> Insert {
        match found {
            Found::Vacant(slot) if !home.unit.is_full() => home.unit.fill(slot, home.key, set),
            found => return self.insert_in_full(home, set, found),
        }
        Insert::Done
    }

    fn insert_in_full(&self, home: &Home<'_>, set: Set, found: Found) -> Insert {
        let plan = self.plan.lock();
        let at = home.unit.group() as usize;
        if let (Found::Vacant(slot), Some(group)) = (found, plan.groups.get(at)) {
            // One unit gets ahead of the others by chance: it waits for them.
            let used: u32 = group.units.iter().filter_map(|unit| self.unit(*unit)).map(Unit::used).sum();
            if used < fullness(at, group.units.len()) * group.units.len() as u32 && home.unit.may_get_ahead() {
                home.unit.fill(slot, home.key, set);
                return Insert::Done;
            }
        }
        let can_grow = plan.groups.get(at).is_some_and(|group| {
            let left = plan.free.len() + self.units_max() - self.units();
            match group.units.len() {
                UNITS_MAX => (group.depth + 1 + PART_BITS) < self.levels.len() as u32 && left >= 2 * UNITS_MIN,
                _ => left > 0,
            }
        });
        match found {
            _ if can_grow => Insert::Full,
            Found::Vacant(slot) => {
                home.unit.fill(slot, home.key, set);
                Insert::Done
            }
            _ => Insert::NoRoom(home.unit.victim(home.key).and_then(|slot| {
                let (key, set) = home.unit.held(slot)?;
                Some(At { unit: home.at, slot, key, set })
            })),
        }
    }

    /// Other holders for a block.
    pub fn write(&self, at: At, set: Set) {
        if let Some(unit) = self.unit(at.unit) {
            unit.write(at.slot, set);
        }
    }

    /// The block has no holder any more.
    pub fn clear(&self, at: At) {
        if let Some(unit) = self.unit(at.unit) {
            unit.clear(at.slot, at.key);
        }
    }

    /// Tells of each block of a unit, which may be written or cleared meanwhile.
    pub fn each_of(&self, at: u32, mut tell: impl FnMut(At)) {
        if let Some(unit) = self.unit(at) {
            unit.each(|slot, key, set| tell(At { unit: at, slot, key, set }));
        }
    }

    /// The units that may have names which lie where `key` belongs.
    pub fn group_of(&self, key: u64) -> SmallVec<[u32; UNITS_MAX]> {
        let group = self.home(key).map(|home| home.unit.group() as usize);
        group.and_then(|group| Some(self.plan.lock().groups.get(group)?.units.clone())).unwrap_or_default()
    }

    /// The group of a name gets another unit, or is split, where [`Self::insert`] said so.
    pub fn grow(&self, key: u64) {
        let Some(at) = self.home(key).map(|home| home.unit.group() as usize) else { return };
        let mut plan = self.plan.lock();
        let Some(group) = plan.groups.get(at).cloned() else { return };
        self.moves.store(self.moves.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        // Whoever sees anything that is written from now on sees that, too.
        fence(Ordering::Release);
        if group.units.len() == UNITS_MAX {
            return self.split(&mut plan, at, group, key);
        }
        let Some(new) = self.take(&mut plan, 1).pop() else { return };
        let Some(upper) = self.unit(new) else { return };
        let mut grown = group.clone();
        grown.units.push(new);
        let mut moved = std::mem::take(&mut plan.moved);
        for at in &group.units {
            let Some(unit) = self.unit(*at) else { continue };
            unit.each(|slot, key, set| {
                if group.moves_on(key) {
                    upper.place(key, set);
                    moved.push(At { unit: *at, slot, key, set });
                }
            });
        }
        if let Some(group) = plan.groups.get_mut(at) {
            *group = grown;
        }
        self.publish(&plan, at, key);
        moved.drain(..).for_each(|at| self.clear(at));
        plan.moved = moved;
    }

    fn split(&self, plan: &mut Plan, at: usize, group: Group, key: u64) {
        let depth = group.depth + 1;
        let units = self.take(plan, 2 * UNITS_MIN);
        let Some((lower, upper)) = units.split_at_checked(UNITS_MIN) else { return };
        let [lower, upper] = [lower, upper].map(|units| Group { units: units.iter().copied().collect(), depth });
        let bit = 1 << (64 - depth);
        for unit in group.units.iter().filter_map(|unit| self.unit(*unit)) {
            unit.each(|_, key, set| {
                let half = if key & bit == 0 { &lower } else { &upper };
                if let Some(unit) = half.unit_of(key).and_then(|unit| self.unit(unit)) {
                    unit.place(key, set);
                }
            });
        }
        let (directory, _) = self.directory();
        let level = directory.len().trailing_zeros();
        if level < depth + PART_BITS {
            self.add_level(level + 1, |place| directory.get(place / 2).map_or(0, |at| at.load(Ordering::Relaxed)));
        }
        let new = plan.groups.len();
        plan.groups.push(upper);
        if let Some(group) = plan.groups.get_mut(at) {
            *group = lower;
        }
        self.publish(plan, at, key & !bit);
        self.publish(plan, new, key | bit);
        group.units.iter().filter_map(|unit| self.unit(*unit)).for_each(Unit::wipe);
        plan.free.extend(group.units);
    }
}

/// Where a name belongs.
#[derive(Clone, Copy)]
pub struct Home<'a> {
    unit: &'a Unit,
    at: u32,
    /// How often names had moved by then.
    moves: u32,
    key: u64,
}

impl Home<'_> {
    /// The name, mixed.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Where the block is, or where it would go.
    #[inline(always)]
    pub fn look_for(&self) -> Found {
        self.unit.look_for(self.key)
    }

    /// The holders of the block in a slot of here.
    #[inline(always)]
    pub fn set_of(&self, slot: Slot) -> Set {
        self.unit.set_of(slot)
    }

    /// Other holders for the block in a slot of here.
    #[inline(always)]
    pub fn write(&self, slot: Slot, set: Set) {
        self.unit.write(slot, set);
    }

    /// The block in a slot of here has no holder any more.
    #[inline(always)]
    pub fn clear(&self, slot: Slot) {
        self.unit.clear(slot, self.key);
    }
}

/// Blocks whose lines are on their way from memory side by side: as many as a core has under way at once.
pub const AHEAD: usize = 16;
