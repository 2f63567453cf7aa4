//! What leaves: blocks of one holder, and blocks that nobody has any more.

use smallvec::SmallVec;

use super::map::half;
use super::parts::{CHUNK, Chunk, Place, Run, Span};
use super::{Runs, Writer};
use crate::WRITE;
use crate::caps::AHEAD;
use crate::holders::HolderId;
use crate::mix::mixed;
use crate::sync::Ordering;

/// Blocks one behind the other that one holder loses.
struct Part {
    first: Place,
    last: Place,
}

/// Tells of the bits of a word.
#[inline(always)]
fn each_bit(bits: u16, mut tell: impl FnMut(u32)) {
    let mut left = bits;
    while left != 0 {
        tell(left.trailing_zeros());
        left &= left - 1;
    }
}

impl Runs {
    pub fn remove(&self, holder: HolderId, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = writer.holders.tag(holder) else { return };
        if !names.is_empty() {
            self.name_all(&mut writer);
        }
        self.owners.lose([tag].into_iter(), || {
            let is =
                |place: Place, name: u64| self.chunks.get(place.chunk).is_some_and(|chunk| chunk.is(place.at, name));
            let near = |name: u64| self.names.prefetch(half(mixed(name)));
            self.remove_all(&mut writer, tag, names.iter().copied(), is, near, |name| self.locate(name));
        });
        self.sweep(&mut writer);
    }

    /// Takes blocks from a holder. `is`: whether a place has one; `locate`: where it is, for which `near` begins to
    /// load what says so. An engine evicts from the end of a chain to its
    /// beginning, or the other way round: most blocks are beside the one before.
    #[inline(always)]
    pub(super) fn remove_all(
        &self,
        writer: &mut Writer,
        tag: u16,
        blocks: impl Iterator<Item = u64> + Clone,
        is: impl Fn(Place, u64) -> bool,
        near: impl Fn(u64),
        locate: impl Fn(u64) -> Option<Place>,
    ) {
        let mut part: Option<Part> = None;
        let (mut ahead, mut is_near) = (blocks.clone(), 0);
        ahead.by_ref().take(AHEAD).for_each(&near);
        for (at, block) in blocks.enumerate() {
            if let Some(part) = &mut part {
                if let Some(place) = self.before(part.first).filter(|place| is(*place, block)) {
                    part.first = place;
                    continue;
                }
                if let Some(place) = self.after(part.last).filter(|place| is(*place, block)) {
                    part.last = place;
                    continue;
                }
            }
            if let Some(part) = part.take() {
                self.remove_part(writer, tag, &part);
            }
            part = locate(block).map(|place| Part { first: place, last: place });
            // What is beside one another need not be looked for.
            if at - is_near < AHEAD {
                ahead.by_ref().take(at - is_near).for_each(&near);
            } else {
                ahead.by_ref().take(at - is_near - AHEAD).for_each(|_| {});
                ahead.by_ref().take(AHEAD).for_each(&near);
            }
            is_near = at;
        }
        if let Some(part) = part {
            self.remove_part(writer, tag, &part);
        }
    }

    fn remove_part(&self, writer: &mut Writer, tag: u16, part: &Part) {
        let (Some(first), Some(last)) = (self.chunks.get(part.first.chunk), self.chunks.get(part.last.chunk)) else {
            return;
        };
        let number = first.run.load(Ordering::Relaxed);
        let Some(run) = self.runs.get(number) else { return };
        let mut span = Span { tag, from: first.base() + part.first.at, to: last.base() + part.last.at + 1 };
        let gone = self.uncover(run, &mut span);
        writer.pairs -= u64::from(gone);
        if gone > 0 {
            self.bury_behind(writer, number, span.from, span.to, part.first.chunk);
        }
    }

    /// Blocks of a part of a run that nobody has go.
    pub(super) fn bury(&self, writer: &mut Writer, number: u32, from: u32, to: u32) {
        let Some(run) = self.runs.get(number) else { return };
        let mut chunk = run.last.load(Ordering::Relaxed);
        while let Some(here) = self.chunks.get(chunk).filter(|here| here.base() > from) {
            match here.before.load(Ordering::Relaxed) {
                0 => break,
                before => chunk = before,
            }
        }
        self.bury_behind(writer, number, from, to, chunk);
    }

    /// The same, from a chunk on that is not behind them.
    fn bury_behind(&self, writer: &mut Writer, number: u32, from: u32, to: u32, chunk: u32) {
        let Some(run) = self.runs.get(number) else { return };
        let mut chunk = chunk;
        let mut is_changing = false;
        let mut unlinked = SmallVec::<[u32; 32]>::new();
        self.each_gap(run, from, to, |from, to| {
            if !is_changing {
                is_changing = true;
                self.begin_change(run);
            }
            // What leaves at the end leaves no hole.
            if to < run.len() {
                run.whole_from.store(run.whole_from.load(Ordering::Relaxed).max(to), Ordering::Relaxed);
            }
            self.bring_in(chunk, from, to);
            while let Some(here) = self.chunks.get(chunk).filter(|here| chunk != 0 && here.base() < to) {
                let next = here.next.load(Ordering::Relaxed);
                self.bring_in(next, from, to);
                if here.base() + CHUNK > from {
                    self.bury_in(writer, chunk, from, to);
                    if here.live.load(Ordering::Relaxed) == 0 {
                        self.unlink(run, chunk);
                        unlinked.push(chunk);
                    } else if here.base() + CHUNK > to {
                        // Nothing of the run leads to the next block any more.
                        self.say_name(writer, Place { chunk, at: to - here.base() });
                        // The next part that nobody has may begin here.
                        return;
                    }
                }
                chunk = next;
            }
        });
        if is_changing {
            self.trim_changing(number, run);
            self.end_change(run);
        }
        // The last one first: what is taken next stands one behind the other again.
        unlinked.iter().rev().for_each(|chunk| self.give_back(*chunk));
    }

    fn begin_change(&self, run: &Run) {
        run.version.store(run.version.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        crate::sync::fence(Ordering::Release);
    }

    fn end_change(&self, run: &Run) {
        run.version.store(run.version.load(Ordering::Relaxed).wrapping_add(1), WRITE);
    }

    /// Blocks of a chunk in a part of its run, as bits.
    #[inline(always)]
    fn live_in(chunk: &Chunk, from: u32, to: u32) -> u16 {
        let (base, live) = (chunk.base(), chunk.live.load(Ordering::Relaxed));
        let (first, end) = (from.max(base) - base, to.clamp(base, base + CHUNK) - base);
        live & ((1u16 << end) - 1) & !((1u16 << first.min(CHUNK)) - 1)
    }

    /// What maps say of the blocks of a chunk in a part of its run is on its way from memory.
    #[inline(always)]
    fn bring_in(&self, number: u32, from: u32, to: u32) {
        let Some(chunk) = self.chunks.get(number).filter(|_| number != 0) else { return };
        let live = Self::live_in(chunk, from, to);
        each_bit(live & chunk.named.load(Ordering::Relaxed), |at| {
            self.names.prefetch(half(mixed(chunk.name(at).unwrap_or_default())));
        });
        let hashes = chunk.hashes.load(Ordering::Relaxed);
        if let (Some(known), Some(map)) = (self.hash_chunks.get(hashes).filter(|_| hashes != 0), &self.hashes) {
            each_bit(live, |at| map.prefetch(half(known.hash(at))));
        }
    }

    /// The blocks of a chunk in a part of its run are not there any more.
    fn bury_in(&self, writer: &mut Writer, number: u32, from: u32, to: u32) {
        let Some(chunk) = self.chunks.get(number) else { return };
        let gone = Self::live_in(chunk, from, to);
        let named = chunk.named.load(Ordering::Relaxed);
        each_bit(gone & named, |at| self.names.bring_behind(half(mixed(chunk.name(at).unwrap_or_default()))));
        each_bit(gone & named, |at| {
            self.names.remove(half(mixed(chunk.name(at).unwrap_or_default())), Place { chunk: number, at }.word());
        });
        let mut hashes = chunk.hashes.load(Ordering::Relaxed);
        while let (Some(known), Some(map)) = (self.hash_chunks.get(hashes).filter(|_| hashes != 0), &self.hashes) {
            each_bit(gone, |at| map.bring_behind(half(known.hash(at))));
            each_bit(gone, |at| {
                let hash = known.hash(at);
                if hash != 0 {
                    map.remove(half(hash), Place { chunk: hashes, at }.word());
                    known.set(at, 0);
                }
            });
            hashes = known.next.load(Ordering::Relaxed);
        }
        chunk.live.store(chunk.live.load(Ordering::Relaxed) & !gone, Ordering::Relaxed);
        chunk.named.store(named & !gone, Ordering::Relaxed);
        writer.blocks -= u64::from(gone.count_ones());
    }

    /// A chunk without blocks leaves its run, which is changing.
    fn unlink(&self, run: &Run, number: u32) {
        let Some(chunk) = self.chunks.get(number) else { return };
        let (before, next) = (chunk.before.load(Ordering::Relaxed), chunk.next.load(Ordering::Relaxed));
        if let Some(before) = self.chunks.get(before).filter(|_| before != 0) {
            before.next.store(next, WRITE);
        }
        match self.chunks.get(next).filter(|_| next != 0) {
            Some(next) => next.before.store(before, Ordering::Relaxed),
            None => run.last.store(before, Ordering::Relaxed),
        }
        chunk.run.store(0, Ordering::Relaxed);
    }

    /// A chunk that no run has is free.
    fn give_back(&self, number: u32) {
        let Some(chunk) = self.chunks.get(number) else { return };
        let mut hashes = chunk.hashes.load(Ordering::Relaxed);
        while let Some(known) = self.hash_chunks.get(hashes).filter(|_| hashes != 0) {
            let next = known.next.load(Ordering::Relaxed);
            self.hash_chunks.give_back(hashes);
            hashes = next;
        }
        self.chunks.give_back(number);
    }

    /// A run ends with its last block, and ceases to be where it has none.
    pub(super) fn trim(&self, number: u32) {
        if let Some(run) = self.runs.get(number) {
            run.change(|| self.trim_changing(number, run));
        }
    }

    fn trim_changing(&self, number: u32, run: &Run) {
        loop {
            let last = run.last.load(Ordering::Relaxed);
            let Some(chunk) = self.chunks.get(last).filter(|_| last != 0) else { break };
            let live = chunk.live.load(Ordering::Relaxed);
            if live != 0 {
                let len = chunk.base() + live.ilog2() + 1;
                run.whole_from.store(run.whole_from.load(Ordering::Relaxed).min(len), Ordering::Relaxed);
                run.len.store(len, WRITE);
                return;
            }
            self.unlink(run, last);
            self.give_back(last);
        }
        run.len.store(0, WRITE);
        self.tables.give_back(run.table.swap(0, Ordering::Relaxed));
        self.runs.give_back(number);
    }
}
