//! The prefix index: which holders have how much of a chain of blocks.
//!
//! A *holder* is a place that blocks lie in: the memory of an engine, a tier of a node, the bucket of all. A block is named by its
//! sequence hash, which names its whole prefix. The index is one flat table from a block to the set of its holders:
//!
//! - **Blocks** lie in buckets of one cache line, four to a bucket: 8 bytes of name, 8 of holders (up to five, or the number of a
//!   *cell* that lists more). Buckets lie in segments of 64 KiB, which split one at a time as they fill (extendible hashing): no
//!   moment of growth needs twice the memory.
//! - **One writer at a time, readers never wait.** A reader sees a block's name, its holders, and the name again; a cell has a
//!   version. What changes under a reader's eyes is read again, a few times, and then counts as not there: the index may miss a
//!   block in a race, and never makes one up.
//! - **Removal** in the middle of a chain is what it is: the chain is that long for that holder, and long again once the block is
//!   back. Nothing is kept of blocks that have no holder.
//! - **A holder that leaves** is gone at once: its tag is dead. Its blocks are swept a segment with each later event; a tag is given
//!   out again only after that, and never to somebody whom a reader that began before could take for the old one.
//! - **The bound** in bytes holds at every moment for the table and the sets, which are nearly all of it. Where it is reached, a full segment gives up a block that nobody looked up since
//!   the hand passed it twice (CLOCK).

mod cells;
mod chains;
mod find;
mod holders;
mod opaque;
mod table;

pub use holders::HolderId;
pub use opaque::UnknownParent;

use cells::Cells;
use chains::{Chains, HoleCounts, Of};
use holders::Holders;
use table::{At, Place, Set, Table};

use crate::caps;
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
    /// The bound on that, but for the lists of children and holes, which come on top.
    pub bytes_max: u64,
    /// Blocks that were given up at the bound.
    pub evicted: u64,
    /// Pairs that found no room.
    pub refused: u64,
    /// Holders with a hole in some chain: they are looked up block by block.
    pub holed: u64,
}

/// See the head of this file. Shared by reference.
pub struct PrefixIndex {
    table: Table,
    /// From engines' own hashes to names: see `opaque.rs`.
    opaque: Table,
    cells: Cells,
    holders: Holders,
    holes: HoleCounts,
    writer: Mutex<Writer>,
}

struct Writer {
    chains: Chains,
    /// Splits and evictions: blocks may lie elsewhere than before.
    moves: u64,
    /// The parent of the block that is being stored.
    spared: Option<u64>,
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
            holes: HoleCounts::new(),
            writer: Mutex::new(Writer {
                chains: Chains::default(),
                moves: 0,
                spared: None,
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
        let Some(tag) = self.holders.tag(holder) else { return };
        while !self.holders.retag(holder, self.table.segments()) {
            // Every tag is in use or waits to be swept, the one of just now at least: sweep now.
            self.sweep(writer, self.table.segments());
        }
        self.bury(writer, tag);
    }

    /// The holder is no more.
    pub fn remove_holder(&self, holder: HolderId) {
        let mut writer = self.writer.lock();
        let Some(tag) = self.holders.tag(holder) else { return };
        self.holders.remove(holder, self.table.segments());
        self.bury(&mut writer, tag);
    }

    /// What a tag's holder lacks matters no more, once the tag is nobody's: a reader that sees no hole any more sees that, too.
    fn bury(&self, writer: &mut Writer, tag: u16) {
        writer.chains.start_anew(self.of(), tag);
    }

    fn of(&self) -> Of<'_> {
        Of { table: &self.table, cells: &self.cells, counts: &self.holes }
    }

    /// The holder has these blocks now, each the child of the one before it, the first of them `parent`'s.
    pub fn store(&self, holder: HolderId, parent: Option<u64>, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = self.holders.tag(holder) else { return };
        self.ahead(names);
        let mut run = Run::begin(self, tag, parent);
        for name in names {
            run.store(self, &mut writer, *name);
        }
        run.end(self, &mut writer);
        self.sweep(&mut writer, caps::SEGMENTS_SWEPT_PER_EVENT);
    }

    /// The holder has these blocks now, of which it is not known what stands before them: a tier, which drops what it likes. What
    /// such a holder has is told by [`Self::each`] and [`Self::has`]; [`Self::find`] is not for it.
    pub fn store_scattered(&self, holder: HolderId, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = self.holders.tag(holder) else { return };
        for names in names.chunks(64) {
            self.ahead(names);
            for name in names {
                self.store_one(&mut writer, tag, table::mixed(*name));
            }
        }
        self.sweep(&mut writer, caps::SEGMENTS_SWEPT_PER_EVENT);
    }

    /// The holder does not have these blocks any more.
    pub fn remove(&self, holder: HolderId, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = self.holders.tag(holder) else { return };
        self.ahead(names);
        let leaves = Leaving::of(names.iter().copied());
        for name in names {
            self.remove_one(&mut writer, tag, *name, &leaves);
        }
        self.settle(&mut writer, tag);
        self.sweep(&mut writer, caps::SEGMENTS_SWEPT_PER_EVENT);
    }

    /// An event of a holder is over.
    fn settle(&self, writer: &mut Writer, tag: u16) {
        if writer.chains.has_holes(tag) {
            writer.chains.settle(self.of(), tag);
        }
        writer.chains.end_changes(self.of());
    }

    fn remove_one(&self, writer: &mut Writer, tag: u16, name: u64, leaves: &Leaving) {
        let found = self.table.find(table::mixed(name));
        let Some(at) = found.filter(|at| self.cells.has(at.set(), at.key(), tag)) else { return };
        writer.chains.loses(self.of(), &at, tag, |key| leaves.has(key));
        let (set, gone) = self.cells.only(at.set(), at.key(), |known| known != tag);
        if gone > 0 {
            writer.pairs -= gone;
            self.replace(writer, at, set);
        }
    }

    /// Loads the buckets of names that are about to be written side by side: they wait for memory together.
    fn ahead(&self, names: &[u64]) {
        // A dozen at a time would do; an event has some tens.
        names.iter().for_each(|name| self.table.touch_to_write(table::mixed(*name)));
    }

    /// Where the block is then; `None`: there is no room for it.
    fn store_one(&self, writer: &mut Writer, tag: u16, key: u64) -> Option<At> {
        let mut place = self.table.look_for(key);
        if let Place::Found(at) = place {
            match self.cells.with(at.set(), key, tag) {
                Some((set, added)) => {
                    writer.pairs += u64::from(added);
                    if set != at.set() {
                        self.table.write(at, set);
                    }
                    return Some(at);
                }
                None => {
                    writer.refused += 1;
                    return None;
                }
            }
        }
        loop {
            match self.table.insert(key, Set::one(tag), &place) {
                table::Insert::Done(at) => {
                    writer.blocks += 1;
                    writer.pairs += 1;
                    return Some(at);
                }
                table::Insert::NeedsSplit => {
                    self.split(writer, key);
                    place = self.table.look_for(key);
                }
                // The block's parent stays: it would be a hole at once.
                table::Insert::Full(victim) => match victim.filter(|victim| Some(victim.key()) != writer.spared) {
                    Some(victim) => {
                        for tag in self.cells.each(victim.set(), victim.key()) {
                            writer.chains.loses(self.of(), &victim, tag, |_| false);
                        }
                        writer.chains.forget(self.of(), &victim);
                        writer.moves += 1;
                        self.table.clear(victim);
                        writer.pairs -= self.cells.give_up(victim.set(), victim.key());
                        writer.evicted += 1;
                        writer.blocks -= 1;
                        place = self.table.look_for(key);
                        writer.to_forget = self.opaque.segments();
                    }
                    None => {
                        writer.refused += 1;
                        return None;
                    }
                },
            }
        }
    }

    fn replace(&self, writer: &mut Writer, at: table::At, set: Set) {
        if set.is_empty() {
            writer.blocks -= 1;
            writer.chains.forget(self.of(), &at);
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
        writer.moves += 1;
        self.table.split(key);
        self.holders.segment_made();
    }

    /// Which of these blocks the holder has.
    pub fn has(&self, holder: HolderId, names: &[u64]) -> Vec<bool> {
        let seen = self.holders.generation();
        let tag = self.holders.tag(holder).filter(|tag| self.holders.holder(*tag, seen) == Some(holder));
        let has = |name: &u64| tag.is_some_and(|tag| self.table.has(table::mixed(*name), &self.cells, tag));
        names.iter().map(has).collect()
    }

    /// The index at this moment.
    pub fn status(&self) -> IndexStatus {
        let writer = self.writer.lock();
        IndexStatus {
            blocks: writer.blocks,
            pairs: writer.pairs,
            bytes: self.table.bytes()
                + self.opaque.bytes()
                + self.cells.bytes()
                + self.holders.bytes()
                + writer.chains.bytes(),
            bytes_max: self.table.bytes_max() + self.opaque.bytes_max() + self.cells.bytes_max() + self.holders.bytes(),
            evicted: writer.evicted,
            refused: writer.refused,
            holed: writer.chains.holed() as u64,
        }
    }
}

/// Names that leave together, mixed.
struct Leaving(Vec<u64>);

impl Leaving {
    fn of(names: impl Iterator<Item = u64>) -> Self {
        let mut keys: Vec<u64> = names.map(table::mixed).collect();
        keys.sort_unstable();
        Self(keys)
    }

    fn has(&self, key: u64) -> bool {
        self.0.binary_search(&key).is_ok()
    }
}

/// Blocks of one chain that are being stored, one after the other.
struct Run {
    tag: u16,
    /// The block before: where it is, if the holder has it; its name.
    before: Option<(Option<At>, u64)>,
}

impl Run {
    fn begin(index: &PrefixIndex, tag: u16, parent: Option<u64>) -> Self {
        let before = parent.map(|parent| {
            let key = table::mixed(parent);
            let at = index.table.find(key).filter(|at| index.cells.has(at.set(), key, tag));
            (at, key)
        });
        Self { tag, before }
    }

    fn store(&mut self, index: &PrefixIndex, writer: &mut Writer, name: u64) {
        let key = table::mixed(name);
        if let Some((None, parent)) = self.before {
            writer.chains.lacks(index.of(), self.tag, parent, key);
        }
        let moves = writer.moves;
        writer.spared = self.before.as_ref().map(|(_, parent)| *parent);
        let at = index.store_one(writer, self.tag, key);
        if let (Some((Some(before), parent)), Some(at)) = (&self.before, &at) {
            if moves == writer.moves {
                writer.chains.link(index.of(), before, at.key());
                self.before = Some((Some(*at), key));
                return;
            }
            // Again: it may have moved, or gone, to make room for this one.
            match index.table.find(*parent).filter(|parent| index.cells.has(parent.set(), parent.key(), self.tag)) {
                Some(parent) => writer.chains.link(index.of(), &parent, at.key()),
                None => writer.chains.lacks(index.of(), self.tag, *parent, key),
            }
        }
        self.before = Some((at, key));
    }

    /// The next block is not stored.
    fn skip(&mut self, name: u64) {
        self.before = Some((None, table::mixed(name)));
    }

    fn end(self, index: &PrefixIndex, writer: &mut Writer) {
        index.settle(writer, self.tag);
    }
}

/// The order of what readers see: a name, then what is said of it, then the name again.
const READ: Ordering = Ordering::Acquire;
const WRITE: Ordering = Ordering::Release;

#[cfg(test)]
mod tests;
