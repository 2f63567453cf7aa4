//! The prefix index: which holders have how much of a chain of blocks.
//!
//! A *holder* is a place that blocks lie in: the memory of an engine, a tier of a node, the bucket of all. A block is named by its
//! sequence hash, which names its whole prefix. The index is one flat table from a block to the set of its holders:
//!
//! - **Blocks** lie in buckets of two cache lines: eight names in one, their holders in the other (a bit for each of 56 neighbours, up
//!   to five tags, or the number of a *cell* that has more: `sets.rs`). Buckets lie in units of 66 KiB, units in slabs of 2 MiB, which
//!   are added one at a time as groups of units fill: no moment of growth needs twice the memory.
//! - **One writer at a time, readers never wait.** A reader sees a block's name, its holders, and the name again; a cell has a
//!   version. What changes under a reader's eyes is read again, a few times, and then counts as not there: the index may miss a
//!   block in a race, and never makes one up.
//! - **A look-up walks the chain**, some blocks ahead on their way from memory, until nobody is left who has all of it. Removal in the
//!   middle of a chain is what it is: the chain is that long for that holder, and long again once the block is back. Nothing is kept of
//!   blocks that have no holder, nor of what stands before or behind a block.
//! - **A holder that leaves** is gone at once: its tag is dead. Its blocks are swept a unit with each later event; a tag is given
//!   out again only after that, and never to somebody whom a reader that began before could take for the old one.
//! - **The bound** in bytes holds at every moment. Where it is reached, a full group gives up a block that nobody looked up since
//!   the hand passed it twice (CLOCK).

#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a failure in a test is a failed test"))]

pub mod caps;
mod cells;
mod find;
mod group;
mod holders;
pub mod names;
mod opaque;
mod places;
mod prefetch;
mod sets;
mod slab;
mod sync;
mod table;
mod unit;

pub use holders::HolderId;
pub use opaque::UnknownParent;

use cells::Cells;
use holders::{Holders, Owners};
use sets::{Set, Tags};
use table::{At, Home, Table};
use unit::Found;

use crate::sync::{Mutex, Ordering};

/// How much of a chain a holder has: its first `blocks` blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct Match {
    /// Who.
    pub holder: HolderId,
    /// At least one.
    pub blocks: u32,
}

/// There are as many holders as there may be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the index has {} holders, which is the most it supports", caps::HOLDERS_MAX)]
pub struct TooManyHolders;

/// What an index holds now, and what became of the rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IndexStatus {
    /// Blocks.
    pub blocks: u64,
    /// Pairs of a block and a holder, those of holders that left and are yet to be swept included.
    pub pairs: u64,
    /// Bytes of memory.
    pub bytes: u64,
    /// The bound on that.
    pub bytes_max: u64,
    /// Blocks that were given up at the bound.
    pub evicted: u64,
    /// Pairs that found no room.
    pub refused: u64,
}

/// See the head of this file. Shared by reference.
pub struct PrefixIndex {
    table: Table,
    /// From engines' own hashes to names: see `opaque.rs`.
    opaque: Table,
    cells: Cells,
    owners: Owners,
    writer: Mutex<Writer>,
}

struct Writer {
    holders: Holders,
    /// Where the sweep is.
    swept: usize,
    /// ... and that of engines' hashes.
    swept_opaque: usize,
    /// Units of those in which some may mean blocks that lost their last holder otherwise than by an engine's word.
    to_forget: usize,
    evicted: u64,
    refused: u64,
    blocks: u64,
    pairs: u64,
}

impl PrefixIndex {
    /// An empty index that takes `bytes_max` bytes at most, and 1 MiB at least: of blocks that the router can name.
    pub fn new(bytes_max: u64) -> Self {
        let bytes_max = bytes_max.max(caps::INDEX_BYTES_MIN);
        Self::with(bytes_max, 0)
    }

    /// The same, of blocks that engines name by hashes of their own, too, which takes half of the bound.
    pub fn with_opaque_names(bytes_max: u64) -> Self {
        let bytes_max = bytes_max.max(caps::INDEX_BYTES_MIN);
        Self::with(bytes_max - bytes_max / 2, bytes_max / 2)
    }

    fn with(bytes_max: u64, opaque_bytes_max: u64) -> Self {
        // Cells take from the same bound: an eighth of it at most.
        Self {
            table: Table::new(bytes_max - bytes_max / 8),
            opaque: Table::new(opaque_bytes_max),
            cells: Cells::new(bytes_max / 8),
            owners: Owners::new(),
            writer: Mutex::new(Writer {
                holders: Holders::new(),
                swept: 0,
                swept_opaque: 0,
                to_forget: 0,
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
            self.table.each_home(names, |home| _ = self.remove_one(&mut writer, one, home));
        });
        self.sweep(&mut writer, caps::UNITS_SWEPT_PER_EVENT);
    }

    /// True where nobody has the block then.
    #[inline(always)]
    fn remove_one(&self, writer: &mut Writer, one: Tags, home: &Home<'_>) -> bool {
        let Found::There(slot) = home.look_for() else { return true };
        let had = home.set_of(slot);
        let (set, gone) = self.cells.without_one(had, home.key(), one);
        writer.pairs -= gone;
        if set.is_empty() {
            writer.blocks -= 1;
            home.clear(slot);
        } else if set != had {
            home.write(slot, set);
        }
        set.is_empty()
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
        writer.to_forget = self.opaque.units();
    }

    /// Takes tags of holders that left out of the next units; tags that are in none any more may be given out again.
    fn sweep(&self, writer: &mut Writer, units: usize) {
        for _ in 0..units {
            self.sweep_opaque(writer);
            if !writer.holders.has_dead() {
                return;
            }
            writer.to_forget = self.opaque.units();
            let all = self.table.units();
            writer.swept = if writer.swept >= all { 0 } else { writer.swept };
            self.sweep_unit(writer, self.table.nth(writer.swept));
            writer.swept += 1;
            writer.holders.unit_swept();
        }
    }

    /// Hashes that mean nothing any more are forgotten, a unit at a time.
    fn sweep_opaque(&self, writer: &mut Writer) {
        if writer.to_forget > 0 {
            let all = self.opaque.units();
            writer.swept_opaque = if writer.swept_opaque >= all { 0 } else { writer.swept_opaque };
            self.forget(self.opaque.nth(writer.swept_opaque));
            writer.swept_opaque += 1;
            writer.to_forget -= 1;
        }
    }

    fn sweep_unit(&self, writer: &mut Writer, unit: u32) {
        let dead = writer.holders.dead();
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

    /// Which of these blocks the holder has.
    pub fn has(&self, holder: HolderId, names: &[u64]) -> Vec<bool> {
        let mut has = Vec::with_capacity(names.len());
        self.each(names, |_, holders| {
            has.push(holders.contains(&holder));
            true
        });
        has
    }

    /// The index at this moment.
    pub fn status(&self) -> IndexStatus {
        let writer = self.writer.lock();
        IndexStatus {
            blocks: writer.blocks,
            pairs: writer.pairs,
            bytes: self.table.bytes() + self.opaque.bytes() + self.cells.bytes() + self.owners.bytes(),
            bytes_max: self.table.bytes_max() + self.opaque.bytes_max() + self.cells.bytes_max() + self.owners.bytes(),
            evicted: writer.evicted,
            refused: writer.refused,
        }
    }
}

/// The order of what readers see: a name, then what is said of it, then the name again.
const READ: Ordering = Ordering::Acquire;
const WRITE: Ordering = Ordering::Release;

#[cfg(test)]
mod tests;
