//! The form of runs: blocks lie one behind the other as they were stored, and who has which part of a run is said once.
//!
//! - **A run** is chunks of blocks' names (`parts.rs`). A block that is stored behind the last of a run becomes the last of that run; one that
//!   stands behind another begins a run of its own. So what an engine stores in one go, and what a session adds later, are one run; a run is
//!   never split, and need not be a chain.
//! - **A map** (`map.rs`) knows the place of every block by its name, and a second one by engines' hashes. A word of it is half of the
//!   hash and the place; the name is at the place.
//! - **Spans** say who has which part of a run (`spans.rs`).
//! - **A look-up** (`find.rs`) asks the map for the first block, and then only where a run goes on otherwise than the chain. As a
//!   name names all that stands before it, a block of the run that has a name of the chain says the same of all before it.
//! - A run has a version, which is odd while something of it ceases to be. A reader who sees another one afterwards looks again.

mod facts;
mod find;
mod map;
mod named;
mod opaque;
mod parts;
mod pool;
mod query;
mod remove;
mod room;
mod spans;
mod store;
mod tables;
mod tags;

pub use opaque::UnknownParent;

use map::{Look, Map};
use parts::{Chunk, HashChunk, Place, Run};
use pool::{Budget, Pool};
use tables::Tables;

use crate::apart::Apart;
use crate::holders::{HolderId, Holders, Owners};
use crate::sync::{Mutex, Ordering};
use crate::{IndexStatus, TooManyHolders, caps};

/// See the head of this file. Shared by reference.
pub struct Runs {
    names: Map,
    /// By engines' hashes: places of hash chunks.
    hashes: Option<Map>,
    chunks: Pool<Chunk>,
    hash_chunks: Pool<HashChunk>,
    runs: Pool<Run>,
    tables: Tables,
    budget: Budget,
    owners: Owners,
    writer: Apart<Mutex<Writer>>,
}

pub(super) struct Writer {
    holders: Holders,
    /// The run that the sweep comes to next.
    swept: u32,
    /// ... and the hand.
    hand: u32,
    /// The map of names has all blocks; else only those that nothing of their run leads to, and the first one of each chunk.
    names_all: bool,
    /// Whose hashes were stored, and whether there were others.
    domain: Option<u64>,
    has_domains: bool,
    /// A map could not grow.
    is_full: bool,
    evicted: u64,
    refused: u64,
    blocks: u64,
    pairs: u64,
}

impl Runs {
    pub fn new(bytes_max: u64, opaque: bool) -> Self {
        let budget = Budget::new(bytes_max.max(caps::INDEX_BYTES_MIN));
        Self {
            names: Map::new(&budget),
            hashes: opaque.then(|| Map::new(&budget)),
            chunks: Pool::new(&budget),
            hash_chunks: if opaque { Pool::new(&budget) } else { Pool::empty(&budget) },
            runs: Pool::new(&budget),
            tables: Tables::new(&budget),
            owners: Owners::new(),
            writer: Apart(Mutex::new(Writer {
                holders: Holders::new(),
                swept: 1,
                hand: 1,
                names_all: !opaque,
                domain: None,
                has_domains: false,
                is_full: false,
                evicted: 0,
                refused: 0,
                blocks: 0,
                pairs: 0,
            })),
            budget,
        }
    }

    pub fn add_holder(&self) -> Result<HolderId, TooManyHolders> {
        let mut writer = self.writer.lock();
        loop {
            match writer.holders.add(&self.owners) {
                Some(holder) => return Ok(holder),
                // Tags of those that left wait to be swept: sweep now.
                None if writer.holders.has_dead() => self.sweep_all(&mut writer),
                None => return Err(TooManyHolders),
            }
        }
    }

    pub fn clear(&self, holder: HolderId) {
        let mut writer = self.writer.lock();
        while !writer.holders.retag(&self.owners, holder, self.sweeps()) {
            // Every tag is in use or waits to be swept, the one of just now at least: sweep now.
            self.sweep_all(&mut writer);
        }
    }

    pub fn remove_holder(&self, holder: HolderId) {
        self.writer.lock().holders.remove(&self.owners, holder, self.sweeps());
    }

    pub fn status(&self) -> IndexStatus {
        let writer = self.writer.lock();
        let pools = self.chunks.fixed_bytes()
            + self.hash_chunks.fixed_bytes()
            + self.runs.fixed_bytes()
            + self.tables.fixed_bytes()
            + self.owners.bytes();
        let maps = || std::iter::once(&self.names).chain(&self.hashes);
        IndexStatus {
            blocks: writer.blocks,
            pairs: writer.pairs,
            bytes: self.budget.used() + pools + maps().map(Map::fixed_bytes).sum::<u64>(),
            bytes_max: self.budget.most() + pools + maps().map(Map::fixed_bytes_max).sum::<u64>(),
            evicted: writer.evicted,
            refused: writer.refused,
        }
    }

    /// Engines' hashes that are remembered.
    #[cfg(test)]
    pub fn hashes_len(&self) -> usize {
        self.hashes.as_ref().map_or(0, Map::len)
    }

    /// Names that the map has.
    #[cfg(test)]
    pub fn names_len(&self) -> usize {
        self.names.len()
    }

    /// Where a block is.
    #[inline(always)]
    fn locate(&self, name: u64) -> Option<Place> {
        match self.look(name) {
            Look::There(word) => Some(Place::of(word)),
            Look::Vacant(_) => None,
        }
    }

    #[inline(always)]
    fn look(&self, name: u64) -> Look<'_> {
        self.names.look(map::half(crate::mix::mixed(name)), |word| {
            let place = Place::of(word);
            let chunk = self.chunks.get(place.chunk);
            chunk.is_some_and(|chunk| {
                chunk.prefetch(place.at);
                chunk.is(place.at, name)
            })
        })
    }

    /// Chunks that were made one after the other often stand so: one that is some chunks off is on its way from memory.
    #[inline(always)]
    fn bring_beside(&self, number: u32, chunk: &Chunk, by: i32) {
        if let Some(beside) = self.chunks.get(number.wrapping_add_signed(by)) {
            beside.prefetch(parts::CHUNK - 1);
        }
        let hashes = chunk.hashes.load(Ordering::Relaxed);
        if let Some(beside) = self.hash_chunks.get(hashes.wrapping_add_signed(by)).filter(|_| hashes != 0) {
            beside.prefetch();
        }
    }

    /// Where the block behind another is, as its run has it. The writer's.
    #[inline(always)]
    fn after(&self, place: Place) -> Option<Place> {
        let chunk = self.chunks.get(place.chunk)?;
        if place.at + 1 < parts::CHUNK {
            return chunk.is_live(place.at + 1).then_some(Place { chunk: place.chunk, at: place.at + 1 });
        }
        let next = chunk.next.load(Ordering::Relaxed);
        let follows = self.chunks.get(next)?;
        self.bring_beside(next, follows, parts::BESIDE);
        let is_there = next != 0 && follows.base() == chunk.base() + parts::CHUNK && follows.is_live(0);
        is_there.then_some(Place { chunk: next, at: 0 })
    }

    /// Where the block before another is. The writer's.
    #[inline(always)]
    fn before(&self, place: Place) -> Option<Place> {
        let chunk = self.chunks.get(place.chunk)?;
        if place.at > 0 {
            return chunk.is_live(place.at - 1).then_some(Place { chunk: place.chunk, at: place.at - 1 });
        }
        let before = chunk.before.load(Ordering::Relaxed);
        let leads = self.chunks.get(before)?;
        self.bring_beside(before, leads, -parts::BESIDE);
        let at = parts::CHUNK - 1;
        let is_there = before != 0 && leads.base() + parts::CHUNK == chunk.base() && leads.is_live(at);
        is_there.then_some(Place { chunk: before, at })
    }
}
