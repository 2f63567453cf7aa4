//! Room: what is given up at the bound, and what is swept of holders that left.

use super::parts::{CHUNK, Run, Span};
use super::{Runs, Writer};
use crate::caps::{self, AHEAD};
use crate::sync::Ordering;

/// Chunks, runs or tables that the next names of an event take at most.
const EACH: u32 = AHEAD as u32 + 1;

impl Runs {
    /// True where the next names of an event may find no room.
    #[inline(always)]
    pub(super) fn is_short(&self, writer: &Writer) -> bool {
        self.is_short_of_blocks(writer) || !self.tables.has(EACH, &self.budget)
    }

    #[inline(always)]
    fn is_short_of_blocks(&self, writer: &Writer) -> bool {
        let has_hashes = self.hashes.is_none() || self.hash_chunks.has(2 * EACH, &self.budget);
        let has_blocks = self.chunks.has(EACH, &self.budget) && self.runs.has(EACH, &self.budget);
        writer.is_full || !has_hashes || !has_blocks
    }

    /// Blocks go that nobody looked up, until there is room for some names.
    #[cold]
    pub(super) fn make_room(&self, writer: &mut Writer) {
        let mut given_up = 0;
        for _ in 0..2 * AHEAD {
            if writer.is_full && given_up >= AHEAD as u64 {
                writer.is_full = false;
            }
            // Which runs have tables nobody knows: for these, one goes at a time.
            let has_enough = !self.is_short_of_blocks(writer) && given_up > 0;
            if has_enough || !self.is_short(writer) {
                return;
            }
            let Some(number) = self.victim(writer) else { return };
            given_up += self.give_up(writer, number);
        }
    }

    /// A run that nobody looked up since the hand passed it twice.
    fn victim(&self, writer: &mut Writer) -> Option<u32> {
        let mut other = None;
        for _ in 0..caps::RUNS_PASSED {
            let number = writer.hand;
            let made = self.runs.made();
            writer.hand = if number + 1 < made { number + 1 } else { 1 };
            let Some(run) = self.runs.get(number).filter(|run| run.len() > 0) else { continue };
            let looked = run.looked.load(Ordering::Relaxed);
            if looked & 3 == 0 {
                return Some(number);
            }
            // What was looked up before the last time is forgotten.
            run.looked.store(looked << 1 & 2, Ordering::Relaxed);
            other = Some(number);
        }
        other
    }

    /// A run gives up its last blocks: how many.
    fn give_up(&self, writer: &mut Writer, number: u32) -> u64 {
        let Some(run) = self.runs.get(number) else { return 0 };
        let (len, before) = (run.len(), writer.blocks);
        // Whole chunks.
        let from = len.saturating_sub(caps::GIVEN_UP) / CHUNK * CHUNK;
        let mut spans = Vec::new();
        self.each_span(run, |span| spans.extend((span.to > from).then_some(span)));
        self.owners.lose(spans.iter().map(|span| span.tag), || {
            for span in &spans {
                let mut part = Span { from: from.max(span.from), ..*span };
                writer.pairs -= u64::from(self.uncover(run, &mut part));
            }
            self.bury(writer, number, from, len);
        });
        writer.evicted += before - writer.blocks;
        before - writer.blocks
    }

    /// Steps of a sweep through all runs.
    pub(super) fn sweeps(&self) -> usize {
        self.runs.made().div_ceil(caps::RUNS_SWEPT) as usize
    }

    /// Takes tags of holders that left out of the next runs; tags that are in none any more may be given out again.
    #[inline(always)]
    pub(super) fn sweep(&self, writer: &mut Writer) {
        if writer.holders.has_dead() {
            self.sweep_some(writer);
        }
    }

    pub(super) fn sweep_all(&self, writer: &mut Writer) {
        for _ in 0..self.sweeps() {
            self.sweep(writer);
        }
    }

    #[cold]
    fn sweep_some(&self, writer: &mut Writer) {
        let mut dead = [0u64; caps::HOLDERS_MAX.div_ceil(64)];
        for tag in writer.holders.dead() {
            if let Some(word) = dead.get_mut(usize::from(tag / 64)) {
                *word |= 1 << (tag % 64);
            }
        }
        let is_dead = |tag: u16| dead.get(usize::from(tag / 64)).is_some_and(|word| word >> (tag % 64) & 1 == 1);
        for _ in 0..caps::RUNS_SWEPT {
            if writer.swept >= self.sweeps() as u32 * caps::RUNS_SWEPT {
                writer.swept = 0;
            }
            let number = writer.swept;
            writer.swept += 1;
            if let Some(run) = self.runs.get(number).filter(|run| number > 0 && run.len() > 0) {
                self.sweep_run(writer, number, run, &is_dead);
            }
        }
        writer.holders.unit_swept();
    }

    fn sweep_run(&self, writer: &mut Writer, number: u32, run: &Run, is_dead: &impl Fn(u16) -> bool) {
        let mut swept = 0;
        self.each_word(run, |word| {
            if let Some(span) = Span::of(word.load(Ordering::Relaxed)).filter(|span| is_dead(span.tag)) {
                word.store(Span::NONE, Ordering::Relaxed);
                swept += span.to - span.from;
            }
        });
        writer.pairs -= u64::from(swept);
        if swept > 0 {
            self.bury(writer, number, 0, run.len());
        }
    }

    /// True where the index may come to its bound, and counts what was looked up: before, nothing is noted.
    #[inline(always)]
    pub(super) fn notes(&self) -> bool {
        self.budget.used() * 2 > self.budget.most()
    }
}
