//! The prefix index: which holders have how much of a chain of blocks.
//!
//! A *holder* is a place that blocks lie in: the memory of an engine, a tier of a node, the bucket of all. A block is named by its
//! sequence hash, which names its whole prefix. The index is one flat table from a block to the set of its holders:
//!
//! - **Blocks** lie in buckets of two cache lines, seven to a bucket: 8 bytes of name, 8 of holders (up to five, or the number of a
//!   *cell* that lists more). Buckets lie in segments of 128 KiB, which split one at a time as they fill (extendible hashing): no
//!   moment of growth needs twice the memory.
//! - **One writer at a time, readers never wait.** A reader sees a block's name, its holders, and the name again; a cell has a
//!   version. What changes under a reader's eyes is read again, a few times, and then counts as not there: the index may miss a
//!   block in a race, and never makes one up.
//! - **A look-up walks the chain**, some blocks ahead on their way from memory, until nobody is left who has all of it. Removal in the
//!   middle of a chain is what it is: the chain is that long for that holder, and long again once the block is back. Nothing is kept of
//!   blocks that have no holder, nor of what stands before or behind a block.
//! - **A holder that leaves** is gone at once: its tag is dead. Its blocks are swept a segment with each later event; a tag is given
//!   out again only after that, and never to somebody whom a reader that began before could take for the old one.
//! - **The bound** in bytes holds at every moment. Where it is reached, a full segment gives up a block that nobody looked up since
//!   the hand passed it twice (CLOCK).

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a failure in a test is a failed test"))]

pub mod caps;
mod cells;
mod find;
mod holders;
pub mod names;
mod opaque;
mod sync;
mod table;

pub use holders::HolderId;
pub use opaque::UnknownParent;

use cells::Cells;
use holders::Holders;
use table::{At, Home, Place, Set, Table};

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
#[error("{} holders are known, the most at once", caps::HOLDERS_MAX)]
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
    holders: Holders,
    writer: Mutex<Writer>,
}

struct Writer {
    /// Where the sweep is.
    swept: usize,
    /// ... and that of engines' hashes.
    swept_opaque: usize,
    /// Segments of those in which some may mean blocks that lost their last holder otherwise than by an engine's word.
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
            holders: Holders::new(),
            writer: Mutex::new(Writer {
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
        let _writer = self.writer.lock();
        self.holders.add().ok_or(TooManyHolders)
    }

    /// The holder has no blocks any more: it restarted, or lost them all. Costs nothing; what it had is swept later.
    pub fn clear(&self, holder: HolderId) {
        let mut writer = self.writer.lock();
        self.clear_in(&mut writer, holder);
    }

    fn clear_in(&self, writer: &mut Writer, holder: HolderId) {
        if self.holders.tag(holder).is_none() {
            return;
        }
        while !self.holders.retag(holder, self.table.segments()) {
            // Every tag is in use or waits to be swept, the one of just now at least: sweep now.
            self.sweep(writer, self.table.segments());
        }
    }

    /// The holder is no more.
    pub fn remove_holder(&self, holder: HolderId) {
        let _writer = self.writer.lock();
        self.holders.remove(holder, self.table.segments());
    }

    /// The holder has these blocks now.
    pub fn store(&self, holder: HolderId, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = self.holders.tag(holder) else { return };
        for names in names.chunks(AHEAD) {
            let segments = self.table.segments();
            for home in self.table.homes(names.iter().map(|name| table::mixed(*name))) {
                // After a split it may be elsewhere.
                let known = (self.table.segments() == segments).then_some(home);
                self.store_one(&mut writer, tag, home.key(), known);
            }
        }
        self.sweep(&mut writer, caps::SEGMENTS_SWEPT_PER_EVENT);
    }

    /// The holder does not have these blocks any more.
    pub fn remove(&self, holder: HolderId, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = self.holders.tag(holder) else { return };
        self.holders.note_loss(tag);
        for names in names.chunks(AHEAD) {
            for home in self.table.homes(names.iter().map(|name| table::mixed(*name))) {
                self.remove_one(&mut writer, tag, &home);
            }
        }
        self.holders.note_loss(tag);
        self.sweep(&mut writer, caps::SEGMENTS_SWEPT_PER_EVENT);
    }

    /// True where nobody has the block then.
    fn remove_one(&self, writer: &mut Writer, tag: u16, home: &Home<'_>) -> bool {
        let Some(at) = self.table.find_at(home) else { return true };
        let (set, gone) = self.cells.only(at.set(), at.key(), |known| known != tag);
        if gone > 0 {
            writer.pairs -= gone;
            self.replace(writer, at, set);
        }
        set.is_empty()
    }

    fn store_one(&self, writer: &mut Writer, tag: u16, key: u64, home: Option<Home<'_>>) {
        let look_for = || self.table.home(key).map_or(Place::Nowhere, |home| self.table.look_for(&home));
        let mut place = home.map_or_else(look_for, |home| self.table.look_for(&home));
        if let Place::Found(at) = place {
            match self.cells.with(at.set(), key, tag) {
                Some((set, added)) => {
                    writer.pairs += u64::from(added);
                    if set != at.set() {
                        self.table.write(at, set);
                    }
                }
                None => writer.refused += 1,
            }
            return;
        }
        loop {
            match self.table.insert(key, Set::one(tag), &place) {
                table::Insert::Done => {
                    writer.blocks += 1;
                    writer.pairs += 1;
                    return;
                }
                table::Insert::NeedsSplit => {
                    self.split(writer, key);
                    place = look_for();
                }
                table::Insert::Full(Some(victim)) => {
                    self.give_up(writer, victim);
                    place = look_for();
                }
                table::Insert::Full(None) => {
                    writer.refused += 1;
                    return;
                }
            }
        }
    }

    /// A block goes, to make room for another.
    fn give_up(&self, writer: &mut Writer, victim: At) {
        let tags = self.cells.each(victim.set(), victim.key());
        tags.iter().for_each(|tag| self.holders.note_loss(*tag));
        self.table.clear(victim);
        writer.pairs -= self.cells.give_up(victim.set(), victim.key());
        tags.iter().for_each(|tag| self.holders.note_loss(*tag));
        writer.evicted += 1;
        writer.blocks -= 1;
        writer.to_forget = self.opaque.segments();
    }

    fn replace(&self, writer: &mut Writer, at: table::At, set: Set) {
        if set.is_empty() {
            writer.blocks -= 1;
            self.table.clear(at);
        } else if set != at.set() {
            self.table.write(at, set);
        }
    }

    /// Takes tags of holders that left out of the next segments; tags that are in none any more may be given out again.
    fn sweep(&self, writer: &mut Writer, segments: usize) {
        for _ in 0..segments {
            self.sweep_opaque(writer);
            if !self.holders.has_dead() {
                return;
            }
            writer.to_forget = self.opaque.segments();
            let all = self.table.segments();
            writer.swept = if writer.swept >= all { 0 } else { writer.swept };
            self.sweep_segment(writer, writer.swept);
            writer.swept += 1;
            self.holders.segment_swept();
        }
    }

    /// Hashes that mean nothing any more are forgotten, a segment at a time.
    fn sweep_opaque(&self, writer: &mut Writer) {
        if writer.to_forget > 0 {
            let all = self.opaque.segments();
            writer.swept_opaque = if writer.swept_opaque >= all { 0 } else { writer.swept_opaque };
            self.forget(writer.swept_opaque);
            writer.swept_opaque += 1;
            writer.to_forget -= 1;
        }
    }

    fn sweep_segment(&self, writer: &mut Writer, segment: usize) {
        let is_dead = self.holders.dead();
        for at in self.table.of_segment(segment) {
            let (set, gone) = self.cells.only(at.set(), at.key(), |tag| !is_dead(tag));
            if gone > 0 {
                writer.pairs -= gone;
                self.replace(writer, at, set);
            }
        }
    }

    /// A full segment becomes two. Neither has tags of holders that left before.
    fn split(&self, writer: &mut Writer, key: u64) {
        if self.holders.has_dead()
            && let Some(segment) = self.table.place_of(key)
        {
            self.sweep_segment(writer, segment);
        }
        self.table.split(key);
        self.holders.segment_made();
    }

    /// Which of these blocks the holder has.
    pub fn has(&self, holder: HolderId, names: &[u64]) -> Vec<bool> {
        let seen = self.holders.generation();
        let tag = self.holders.tag(holder).filter(|tag| self.holders.holder(*tag, seen) == Some(holder));
        let has = |name: &u64| {
            let home = self.table.home(table::mixed(*name));
            tag.zip(home).is_some_and(|(tag, home)| self.table.which(&home, &self.cells, &[tag]) == 1)
        };
        names.iter().map(has).collect()
    }

    /// The index at this moment.
    pub fn status(&self) -> IndexStatus {
        let writer = self.writer.lock();
        IndexStatus {
            blocks: writer.blocks,
            pairs: writer.pairs,
            bytes: self.table.bytes() + self.opaque.bytes() + self.cells.bytes() + self.holders.bytes(),
            bytes_max: self.table.bytes_max() + self.opaque.bytes_max() + self.cells.bytes_max() + self.holders.bytes(),
            evicted: writer.evicted,
            refused: writer.refused,
        }
    }
}

/// Blocks whose buckets are loaded side by side before they are written.
const AHEAD: usize = 32;

/// The order of what readers see: a name, then what is said of it, then the name again.
const READ: Ordering = Ordering::Acquire;
const WRITE: Ordering = Ordering::Release;

#[cfg(test)]
mod tests;
