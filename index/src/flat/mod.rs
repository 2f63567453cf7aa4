//! The flat form: one table from a block to the set of its holders.
//!
//! - **Blocks** lie in buckets of two cache lines: eight names in one, their holders in the other (a bit for each of 56 neighbours, up
//!   to five tags, or the number of a *cell* that has more: `sets.rs`). Buckets lie in units of 66 KiB, units in slabs of 2 MiB, which
//!   are added one at a time as groups of units fill: no moment of growth needs twice the memory.
//! - A reader sees a block's name, its holders, and the name again; a cell has a version.
//! - **A look-up walks the chain**, some blocks ahead on their way from memory, until nobody is left who has all of it. Nothing is kept of
//!   what stands before or behind a block.

mod cells;
mod find;
mod places;
mod sets;
mod table;
mod unit;

use cells::Cells;
use sets::{Set, Tags, WINDOWS};
use table::{At, Home, Table};
use unit::Found;

use crate::holders::{HolderId, Holders, Owners};
use crate::sync::Mutex;
use crate::{IndexStatus, TooManyHolders, caps};

/// See the head of this file. Shared by reference.
pub struct Flat {
    table: Table,
    cells: Cells,
    owners: Owners,
    writer: Mutex<Writer>,
}

struct Writer {
    holders: Holders,
    /// Where the sweep is.
    swept: usize,
    evicted: u64,
    refused: u64,
    blocks: u64,
    pairs: u64,
}

impl Flat {
    /// An empty index that takes `bytes_max` bytes at most, and 1 MiB at least.
    pub fn new(bytes_max: u64) -> Self {
        let bytes_max = bytes_max.max(caps::INDEX_BYTES_MIN);
        // Cells take from the same bound: an eighth of it at most.
        Self {
            table: Table::new(bytes_max - bytes_max / 8),
            cells: Cells::new(bytes_max / 8),
            owners: Owners::new(),
            writer: Mutex::new(Writer {
                holders: Holders::new(),
                swept: 0,
                evicted: 0,
                refused: 0,
                blocks: 0,
                pairs: 0,
            }),
        }
    }

    /// A holder without blocks.
    pub fn add_holder(&self) -> Result<HolderId, TooManyHolders> {
        let mut writer = self.writer.lock();
        loop {
            match writer.holders.add(&self.owners) {
                Some(holder) => return Ok(holder),
                // Tags of those that left wait to be swept: sweep now.
                None if writer.holders.has_dead() => self.sweep(&mut writer, self.table.units()),
                None => return Err(TooManyHolders),
            }
        }
    }

    /// The holder has no blocks any more: it restarted, or lost them all. Costs nothing; what it had is swept later.
    pub fn clear(&self, holder: HolderId) {
        let mut writer = self.writer.lock();
        while !writer.holders.retag(&self.owners, holder, self.table.units()) {
            // Every tag is in use or waits to be swept, the one of just now at least: sweep now.
            self.sweep(&mut writer, self.table.units());
        }
    }

    /// The holder is no more.
    pub fn remove_holder(&self, holder: HolderId) {
        self.writer.lock().holders.remove(&self.owners, holder, self.table.units());
    }

    /// The holder has these blocks now.
    pub fn store(&self, holder: HolderId, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = writer.holders.tag(holder) else { return };
        let one = Tags::one(tag);
        self.table.each_home(names, |home| self.store_one(&mut writer, one, home));
        self.sweep(&mut writer, caps::UNITS_SWEPT_PER_EVENT);
    }

    /// The holder does not have these blocks any more.
    pub fn remove(&self, holder: HolderId, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = writer.holders.tag(holder) else { return };
        let one = Tags::one(tag);
        self.owners.lose([tag].into_iter(), || {
            self.table.each_home(names, |home| self.remove_one(&mut writer, one, home));
        });
        self.sweep(&mut writer, caps::UNITS_SWEPT_PER_EVENT);
    }

    #[inline(always)]
    fn remove_one(&self, writer: &mut Writer, one: Tags, home: &Home<'_>) {
        let Found::There(slot) = home.look_for() else { return };
        let had = home.set_of(slot);
        let (set, gone) = self.cells.without_one(had, home.key(), one);
        writer.pairs -= gone;
        if set.is_empty() {
            writer.blocks -= 1;
            home.clear(slot);
        } else if set != had {
            home.write(slot, set);
        }
    }

    #[inline(always)]
    fn store_one(&self, writer: &mut Writer, one: Tags, home: &Home<'_>) {
        let Some(home) = self.table.now(*home) else { return };
        let found = home.look_for();
        if let Found::There(slot) = found {
            let had = home.set_of(slot);
            match self.cells.with(had, home.key(), one) {
                Some((set, added)) => {
                    writer.pairs += u64::from(added);
                    if set != had {
                        home.write(slot, set);
                    }
                }
                None => writer.refused += 1,
            }
        } else if let table::Insert::Done = self.table.insert(&home, Set::window(one), found) {
            writer.blocks += 1;
            writer.pairs += 1;
        } else {
            self.make_room(writer, one, home);
        }
    }

    /// Where a block that is not there finds no place: its group grows, or another one goes.
    #[cold]
    fn make_room(&self, writer: &mut Writer, one: Tags, home: Home<'_>) {
        let mut home = home;
        loop {
            match self.table.insert(&home, Set::window(one), home.look_for()) {
                table::Insert::Done => {
                    writer.blocks += 1;
                    writer.pairs += 1;
                    return;
                }
                table::Insert::Full => {
                    self.grow(writer, home.key());
                    let Some(now) = self.table.home(home.key()) else { return };
                    home = now;
                }
                table::Insert::NoRoom(Some(victim)) => self.give_up(writer, victim),
                table::Insert::NoRoom(None) => {
                    writer.refused += 1;
                    return;
                }
            }
        }
    }

    /// A block goes, to make room for another.
    fn give_up(&self, writer: &mut Writer, victim: At) {
        let holders = self.cells.windows(victim.set(), victim.key()).unwrap_or_default();
        self.owners.lose(holders.iter().flat_map(|tags| tags.each()), || {
            self.table.clear(victim);
            self.cells.give_up(victim.set());
        });
        writer.pairs -= holders.iter().map(|tags| tags.len() as u64).sum::<u64>();
        writer.evicted += 1;
        writer.blocks -= 1;
    }

    /// Takes tags of holders that left out of the next units; tags that are in none any more may be given out again.
    fn sweep(&self, writer: &mut Writer, units: usize) {
        for _ in 0..units {
            if !writer.holders.has_dead() {
                return;
            }
            let all = self.table.units();
            writer.swept = if writer.swept >= all { 0 } else { writer.swept };
            self.sweep_unit(writer, self.table.nth(writer.swept));
            writer.swept += 1;
            writer.holders.unit_swept();
        }
    }

    fn sweep_unit(&self, writer: &mut Writer, unit: u32) {
        let mut dead: [Tags; WINDOWS] = std::array::from_fn(|window| Tags::of_window(window, 0));
        for tags in writer.holders.dead().map(Tags::one) {
            if let Some(known) = dead.get_mut(tags.window()) {
                *known = known.or(tags);
            }
        }
        let is_dead = |tags: Tags| dead.get(tags.window()).copied().unwrap_or(tags.but(tags));
        self.table.each_of(unit, |at| {
            let (set, gone) = self.cells.without(at.set(), at.key(), is_dead);
            writer.pairs -= gone;
            if set.is_empty() {
                writer.blocks -= 1;
                self.table.clear(at);
            } else if set != at.set() {
                self.table.write(at, set);
            }
        });
    }

    /// A full group grows, or becomes two. What moves has no tags of holders that left before.
    fn grow(&self, writer: &mut Writer, key: u64) {
        if writer.holders.has_dead() {
            let units = self.table.group_of(key);
            units.into_iter().for_each(|unit| self.sweep_unit(writer, unit));
        }
        let before = self.table.units();
        self.table.grow(key);
        writer.holders.units_made(self.table.units() - before);
    }

    /// The index at this moment.
    pub fn status(&self) -> IndexStatus {
        let writer = self.writer.lock();
        IndexStatus {
            blocks: writer.blocks,
            pairs: writer.pairs,
            bytes: self.table.bytes() + self.cells.bytes() + self.owners.bytes(),
            bytes_max: self.table.bytes_max() + self.cells.bytes_max() + self.owners.bytes(),
            evicted: writer.evicted,
            refused: writer.refused,
        }
    }
}
