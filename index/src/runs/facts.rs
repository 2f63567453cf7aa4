//! Facts: which tokens a name was made of. Whoever worked that out says so in the chunk that the name is the last one of, and whoever comes
//! later compares a hash of the tokens, which takes an eighth of the time and no look at the names between.
//!
//! The fact of every eighth chunk of a run is about these eight, which are passed with a look at it; the facts of others are about their own blocks.
//! A fact is true of a name and tokens, wherever it is kept: if a chunk gets other blocks, it does not fit their last name.

use super::parts::{CHUNK, Chunk};
use crate::lanes::{self, hash};
use crate::prefetch::prefetch;
use crate::sync::Ordering;

/// Chunks that the fact of the last of them is about.
pub const GROUP: u32 = 8;
const _: () = assert!((CHUNK as usize).is_multiple_of(lanes::LANES));
/// Blocks of a chain whose tokens are brought ahead of those that are looked at.
const TOKENS_AHEAD: usize = 256;
const TOKENS_OF_LINE: usize = 8;

/// A chain's tokens, by the chunks of a run that it goes along.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    tokens_hashes: &'a [u64],
    /// Block of the chain that would be the run's first.
    shift: u32,
}

impl<'a> Facts<'a> {
    /// Of a chain whose block `at` is at a position of the run.
    #[inline(always)]
    pub fn new(tokens_hashes: &'a [u64], at: usize, position: u32) -> Self {
        Self { tokens_hashes, shift: (at as u32).wrapping_sub(position) }
    }

    /// Chunks that the fact of one is about, by its place in the run.
    #[inline(always)]
    fn chunks(nth: u32) -> u32 {
        if nth % GROUP == GROUP - 1 { GROUP } else { 1 }
    }

    /// What is so of the last name of a chunk, if the chain's tokens made it; `None`: the chain has too few blocks.
    #[inline(always)]
    fn fact(&self, nth: u32, last: u64) -> Option<u64> {
        let chunks = Self::chunks(nth);
        let first = ((nth + 1 - chunks) * CHUNK).wrapping_add(self.shift) as usize;
        let tokens = self.tokens_hashes.get(first..first + (chunks * CHUNK) as usize)?;
        Some(last.wrapping_add(hash(tokens)).max(1))
    }

    /// True where somebody found that the chain's tokens made the last name of a chunk.
    #[inline(always)]
    pub fn is_said(&self, chunk: &Chunk, nth: u32, last: u64) -> bool {
        let said = chunk.fact.load(Ordering::Relaxed);
        said != 0 && self.fact(nth, last) == Some(said)
    }

    /// The chain's tokens made this name, the last one of a chunk, which may have become another.
    #[inline(always)]
    pub fn say(&self, chunk: &Chunk, nth: u32, last: u64) {
        if let Some(fact) = self.fact(nth, last) {
            chunk.fact.store(fact, Ordering::Relaxed);
        }
    }

    /// The tokens of some chunks, far ahead, are on their way from memory: a processor that reads ahead by itself stops at the end of a page.
    #[inline(always)]
    pub fn bring(&self, nth: u32, chunks: u32) {
        let first = (nth * CHUNK).wrapping_add(self.shift) as usize + TOKENS_AHEAD;
        for later in (first..first + (chunks * CHUNK) as usize).step_by(TOKENS_OF_LINE) {
            if let Some(later) = self.tokens_hashes.get(later) {
                prefetch(later);
            }
        }
    }
}
