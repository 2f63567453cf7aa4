//! What runs are made of.
//!
//! A *run* is blocks one behind the other, as they were stored, in *chunks* of 12. Who has which part of a run is said by *spans* in words: a
//! tag, from where, and up to where. The engines' own hashes of a chunk's blocks are in *hash chunks* beside it: as many as there are different
//! hashes for the same blocks.

use super::pool::Linked;
use crate::prefetch::prefetch;
use crate::sync::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use crate::{READ, WRITE};

/// Blocks of a chunk: what two lines have room for beside the chunk's head.
pub const CHUNK: u32 = 12;
/// Spans that a run has room for itself.
pub const SPANS: usize = 4;
const POSITION_BITS: u32 = 26;
/// Blocks of a run, at most.
pub const RUN_MAX: u32 = (1 << POSITION_BITS) - CHUNK;
/// Chunks that the writer brings ahead of the one that it looks at.
pub const BESIDE: i32 = 4;
/// Of a place, which of a chunk's blocks it is.
const AT_BITS: u32 = 4;

/// A block: its chunk, and which of the chunk's it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub chunk: u32,
    pub at: u32,
}

impl Place {
    #[inline(always)]
    pub fn of(word: u32) -> Self {
        Self { chunk: word >> AT_BITS, at: word & ((1 << AT_BITS) - 1) }
    }

    #[inline(always)]
    pub fn word(self) -> u32 {
        self.chunk << AT_BITS | self.at
    }
}

/// A holder has blocks of a run: from one position up to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    pub tag: u16,
    pub from: u32,
    pub to: u32,
}

impl Span {
    #[inline(always)]
    pub fn word(self) -> u64 {
        u64::from(self.tag) << (2 * POSITION_BITS) | u64::from(self.from) << POSITION_BITS | u64::from(self.to)
    }

    /// A word that says nothing, where one is empty only if it never said anything.
    pub const NONE: u64 = 1 << POSITION_BITS;

    /// True where a word says anything: it ends behind a block.
    #[inline(always)]
    pub fn is(word: u64) -> bool {
        word & ((1 << POSITION_BITS) - 1) != 0
    }

    /// What a word says.
    #[inline(always)]
    pub fn of(word: u64) -> Option<Self> {
        let position = |word: u64| word as u32 & ((1 << POSITION_BITS) - 1);
        let span = Self {
            tag: (word >> (2 * POSITION_BITS)) as u16,
            from: position(word >> POSITION_BITS),
            to: position(word),
        };
        Self::is(word).then_some(span)
    }

    /// Blocks of both.
    pub fn common(self, from: u32, to: u32) -> u32 {
        self.to.min(to).saturating_sub(self.from.max(from))
    }
}

#[cfg_attr(all(target_os = "linux", not(shuttle)), derive(zerocopy::FromZeros))]
#[repr(align(128))]
pub struct Chunk {
    pub run: AtomicU32,
    /// The position of its first block in the run.
    pub base: AtomicU32,
    pub next: AtomicU32,
    pub before: AtomicU32,
    /// A bit for each block that somebody has.
    pub live: AtomicU16,
    /// ... and for each that the map of names has. The writer's.
    pub named: AtomicU16,
    /// Its first hash chunk.
    pub hashes: AtomicU32,
    /// What somebody worked out of its last name; 0: nothing. See `facts.rs`.
    pub fact: AtomicU64,
    pub names: [AtomicU64; CHUNK as usize],
}

impl Chunk {
    #[inline(always)]
    pub fn name(&self, at: u32) -> Option<u64> {
        self.names.get(at as usize).map(|name| name.load(READ))
    }

    #[inline(always)]
    pub fn is(&self, at: u32, name: u64) -> bool {
        self.name(at) == Some(name)
    }

    /// Its head and a name are on their way from memory.
    #[inline(always)]
    pub fn prefetch(&self, at: u32) {
        prefetch(&self.run);
        if let Some(name) = self.names.get(at as usize) {
            prefetch(name);
        }
    }

    /// Blocks that are there one behind the other, from a place on.
    #[inline(always)]
    pub fn live_from(&self, at: u32) -> u32 {
        (u32::from(self.live.load(READ)) >> at).trailing_ones()
    }

    #[inline(always)]
    pub fn is_live(&self, at: u32) -> bool {
        self.live.load(Ordering::Relaxed) >> at & 1 == 1
    }

    #[inline(always)]
    pub fn base(&self) -> u32 {
        self.base.load(Ordering::Relaxed)
    }
}

#[cfg_attr(all(target_os = "linux", not(shuttle)), derive(zerocopy::FromZeros))]
#[repr(align(128))]
pub struct HashChunk {
    /// Whose blocks' these are.
    pub chunk: AtomicU32,
    pub next: AtomicU32,
    /// 0: none.
    pub hashes: [AtomicU64; CHUNK as usize],
}

impl HashChunk {
    #[inline(always)]
    pub fn prefetch(&self) {
        prefetch(&self.chunk);
        if let Some(last) = self.hashes.last() {
            prefetch(last);
        }
    }

    #[inline(always)]
    pub fn hash(&self, at: u32) -> u64 {
        self.hashes.get(at as usize).map_or(0, |hash| hash.load(Ordering::Relaxed))
    }

    #[inline(always)]
    pub fn set(&self, at: u32, hash: u64) {
        if let Some(to) = self.hashes.get(at as usize) {
            to.store(hash, Ordering::Relaxed);
        }
    }
}

#[cfg_attr(all(target_os = "linux", not(shuttle)), derive(zerocopy::FromZeros))]
#[repr(align(64))]
pub struct Run {
    /// Odd while what was there ceases to be: blocks, chunks, spans that become one.
    pub version: AtomicU32,
    /// The position behind its last block; 0: there is no such run.
    pub len: AtomicU32,
    pub last: AtomicU32,
    /// Spans that it has no room for.
    pub table: AtomicU32,
    /// Whether somebody looked it up since the hand passed it, and (the second bit) between the two times before.
    pub looked: AtomicU32,
    /// From this position on, every block is there.
    pub whole_from: AtomicU32,
    /// Where a chain went on otherwise the last time, and the first block of that: a reader tries it first.
    pub branch: AtomicU32,
    pub child: AtomicU32,
    pub spans: [AtomicU64; SPANS],
}

impl Run {
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.len.load(READ)
    }

    /// The writer takes something away: readers who looked at the run look again.
    #[inline(always)]
    pub fn change<T>(&self, change: impl FnOnce() -> T) -> T {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        crate::sync::fence(Ordering::Release);
        let changed = change();
        self.version.store(version.wrapping_add(2), WRITE);
        changed
    }
}

impl Linked for Chunk {
    fn link(&self) -> &AtomicU32 {
        &self.next
    }
}

impl Linked for HashChunk {
    fn link(&self) -> &AtomicU32 {
        &self.next
    }
}

impl Linked for Run {
    fn link(&self) -> &AtomicU32 {
        &self.last
    }
}

#[cfg(any(not(target_os = "linux"), shuttle))]
mod zeroed {
    use super::*;

    fn none() -> AtomicU32 {
        AtomicU32::new(0)
    }

    fn words<const N: usize>() -> [AtomicU64; N] {
        std::array::from_fn(|_| AtomicU64::new(0))
    }

    impl Default for Chunk {
        fn default() -> Self {
            Self {
                run: none(),
                base: none(),
                next: none(),
                before: none(),
                live: AtomicU16::new(0),
                named: AtomicU16::new(0),
                hashes: none(),
                fact: AtomicU64::new(0),
                names: words(),
            }
        }
    }

    impl Default for HashChunk {
        fn default() -> Self {
            Self { chunk: none(), next: none(), hashes: words() }
        }
    }

    impl Default for Run {
        fn default() -> Self {
            Self {
                version: none(),
                len: none(),
                last: none(),
                table: none(),
                looked: none(),
                whole_from: none(),
                branch: none(),
                child: none(),
                spans: words(),
            }
        }
    }
}
