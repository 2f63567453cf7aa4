//! Tables of spans, for runs that more holders have than a run has room for.
//!
//! A table is some lines side by side, a power of two of them; its first word counts those that are in use. The spans of a tag lie from where
//! the tag says on, up to the first word that is empty. So what is said of one holder is found at once, however many there are, and
//! readers pass all of them in the order of memory. What a holder had stays as a word that says nothing, until another needs it or the table
//! becomes too full and is made anew.

use std::sync::OnceLock;

use super::parts::Span;
use super::pool::Budget;
use crate::apart::Apart;
use crate::caps;
use crate::prefetch::prefetch;
use crate::slab::Slab;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::{READ, WRITE};

const WORDS: usize = 16;
/// Sizes of tables: of up to 512 lines, which is a slab of the smallest index, for 6,000 spans.
const SIZES: usize = 10;
/// Lines whose spans are told at once.
const LINES_AT_ONCE: usize = 4;
/// Lines that are brought at once.
const LINES_AHEAD: usize = 8;

#[cfg_attr(all(target_os = "linux", not(shuttle)), derive(zerocopy::FromZeros))]
#[repr(align(128))]
pub struct Line([AtomicU64; WORDS]);

#[cfg(any(not(target_os = "linux"), shuttle))]
impl Default for Line {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// A table.
#[derive(Clone, Copy)]
pub struct Table<'a>(&'a [Line]);

impl<'a> Table<'a> {
    fn used(self) -> Option<&'a AtomicU64> {
        self.0.first()?.0.first()
    }

    /// All words for spans.
    #[inline(always)]
    pub fn words(self) -> impl Iterator<Item = &'a AtomicU64> {
        self.0.iter().flat_map(|line| &line.0).skip(1)
    }

    /// Some of its spans after the other, until `tell` says false. Empty words lie anywhere between: a processor that foresees nothing
    /// of them goes on faster without a branch for each.
    #[inline(always)]
    pub fn each_some(self, mut tell: impl FnMut(&[u64]) -> bool) {
        let mut head = 1;
        for lines in self.0.chunks(LINES_AT_ONCE) {
            let (mut spans, mut count) = ([0; LINES_AT_ONCE * WORDS], 0);
            for word in lines.iter().flat_map(|line| &line.0).skip(head) {
                let word = word.load(Ordering::Relaxed);
                if let Some(to) = spans.get_mut(count) {
                    *to = word;
                }
                count += usize::from(Span::is(word));
            }
            head = 0;
            if !tell(spans.get(..count).unwrap_or_default()) {
                return;
            }
        }
    }

    fn len(self) -> usize {
        self.0.len() * WORDS - 1
    }

    /// The words that may say something of a tag, in the order in which they are filled: all, from one on.
    #[inline(always)]
    fn from(self, tag: u16) -> impl Iterator<Item = &'a AtomicU64> {
        let first = usize::from(tag) % self.len();
        let at = (first..self.len()).chain(0..first).map(|at| at + 1);
        at.filter_map(move |at| self.0.get(at / WORDS)?.0.get(at % WORDS))
    }

    /// The words that say something of a tag or of others.
    #[inline(always)]
    pub fn of(self, tag: u16) -> impl Iterator<Item = &'a AtomicU64> {
        self.from(tag).take_while(|word| word.load(Ordering::Relaxed) != 0)
    }

    /// A word for one span more of a tag; `None`: too few are empty.
    pub fn vacant(self, tag: u16) -> Option<&'a AtomicU64> {
        let word = self.from(tag).find(|word| Span::of(word.load(Ordering::Relaxed)).is_none())?;
        if word.load(Ordering::Relaxed) == 0 {
            let used = self.used()?;
            let more = used.load(Ordering::Relaxed) + 1;
            if more > (self.len() * 3 / 4) as u64 {
                return None;
            }
            used.store(more, Ordering::Relaxed);
        }
        Some(word)
    }

    fn clear(self) {
        self.0.iter().flat_map(|line| &line.0).for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// What says the spans is on its way from memory.
    #[inline(always)]
    pub fn prefetch(self) {
        self.0.iter().take(LINES_AHEAD).for_each(prefetch);
    }
}

/// See the head of this file. A table's number is that of its first line, behind its size; 0 is none.
pub struct Tables {
    slabs: Box<[OnceLock<Slab<Line>>]>,
    /// Lines of a slab: so many bits of a number.
    bits: u32,
    counts: Apart<Counts>,
}

struct Counts {
    made: AtomicU32,
    /// Of each size, the first that is free; its first word says the next one.
    free: [AtomicU32; SIZES],
    free_lines: AtomicU32,
}

impl Tables {
    /// With the first slab: see [`super::pool::Pool::new`].
    pub fn new(budget: &Budget) -> Self {
        let of_slab = budget.slab_bytes() / size_of::<Line>() as u64;
        let bits = if cfg!(shuttle) { 3 } else { of_slab.ilog2() };
        let slabs = (budget.most() / budget.slab_bytes()).min(1 << (caps::NUMBER_BITS - bits));
        let slabs: Box<[_]> = (0..slabs).map(|_| OnceLock::new()).collect();
        if let Some(first) = slabs.first().filter(|_| budget.take(budget.slab_bytes())) {
            first.get_or_init(|| Slab::new(1 << bits));
        }
        let none = || AtomicU32::new(0);
        let free = std::array::from_fn(|_| none());
        let counts = Counts { made: AtomicU32::new(1), free, free_lines: none() };
        Self { slabs, bits, counts: Apart(counts) }
    }

    #[inline(always)]
    pub fn get(&self, number: u32) -> Option<Table<'_>> {
        let (size, first) = (number >> caps::NUMBER_BITS, number & ((1 << caps::NUMBER_BITS) - 1));
        let at = first as usize & ((1 << self.bits) - 1);
        let slab = self.slabs.get((first >> self.bits) as usize).filter(|_| first != 0)?;
        slab.get()?.get(at..at + (1 << size)).map(Table)
    }

    fn number(size: usize, first: u32) -> u32 {
        (size as u32) << caps::NUMBER_BITS | first
    }

    /// An empty one of the least size for so many spans, and some more.
    pub fn take(&self, spans: usize, budget: &Budget) -> Option<u32> {
        let size = (spans * 3 / 2 + 1).div_ceil(WORDS).next_power_of_two().ilog2() as usize;
        let number = self.pop(size).or_else(|| self.make(size, budget)).or_else(|| self.split(size))?;
        self.get(number)?.clear();
        Some(number)
    }

    fn pop(&self, size: usize) -> Option<u32> {
        let free = self.counts.free.get(size)?;
        let number = free.load(Ordering::Relaxed);
        let next = self.get(number)?.used()?.load(Ordering::Relaxed);
        free.store(next as u32, Ordering::Relaxed);
        self.counts.free_lines.store(self.counts.free_lines.load(Ordering::Relaxed) - (1 << size), Ordering::Relaxed);
        Some(number)
    }

    /// Lines of the last slab that were never given out.
    fn left(&self) -> u32 {
        let of_slab = self.counts.made.load(READ) & ((1 << self.bits) - 1);
        if of_slab == 0 { 0 } else { (1 << self.bits) - of_slab }
    }

    fn make(&self, size: usize, budget: &Budget) -> Option<u32> {
        if size >= SIZES.min(self.bits as usize + 1) {
            return None;
        }
        if self.left() > 0 && self.left() < 1 << size {
            // What is left is free, in pieces.
            while self.left() > 0 {
                let size = self.left().ilog2().min(SIZES as u32 - 1) as usize;
                let first = self.counts.made.load(READ);
                self.counts.made.store(first + (1 << size), WRITE);
                self.give_back(Self::number(size, first));
            }
        }
        let first = self.counts.made.load(READ);
        let slab = self.slabs.get((first >> self.bits) as usize)?;
        if slab.get().is_none() {
            if !budget.take(budget.slab_bytes()) {
                return None;
            }
            slab.get_or_init(|| Slab::new(1 << self.bits));
        }
        self.counts.made.store(first + (1 << size), WRITE);
        Some(Self::number(size, first))
    }

    /// One that is larger becomes several.
    fn split(&self, size: usize) -> Option<u32> {
        let (larger, number) = (size + 1..SIZES).find_map(|larger| Some((larger, self.pop(larger)?)))?;
        let first = number & ((1 << caps::NUMBER_BITS) - 1);
        (size..larger).for_each(|size| self.give_back(Self::number(size, first + (1 << size))));
        Some(Self::number(size, first))
    }

    pub fn give_back(&self, number: u32) {
        let size = (number >> caps::NUMBER_BITS) as usize;
        let (Some(free), Some(link)) = (self.counts.free.get(size), self.get(number).and_then(Table::used)) else {
            return;
        };
        link.store(u64::from(free.load(Ordering::Relaxed)), Ordering::Relaxed);
        free.store(number, Ordering::Relaxed);
        self.counts.free_lines.store(self.counts.free_lines.load(Ordering::Relaxed) + (1 << size), Ordering::Relaxed);
    }

    /// True where so many of the smallest can be taken.
    pub fn has(&self, count: u32, budget: &Budget) -> bool {
        let is_there = self.counts.free_lines.load(Ordering::Relaxed) + self.left() >= count;
        is_there
            || (((self.counts.made.load(READ) >> self.bits) as usize) < self.slabs.len()
                && budget.has(budget.slab_bytes()))
    }

    /// What is there beside the slabs.
    pub fn fixed_bytes(&self) -> u64 {
        (self.slabs.len() * size_of::<OnceLock<Slab<Line>>>()) as u64
    }
}
