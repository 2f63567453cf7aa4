//! How far a run goes on as a chain does.

use super::Runs;
use super::facts::{Facts, GROUP};
use super::find::Seen;
use super::parts::{CHUNK, Chunk, Place};
use crate::names::{name_behind, next_name};
use crate::sync::Ordering;

/// Blocks of a chain that are looked at in one go where it may end: the fewer there are, the more goes it takes.
const LOOKS: usize = 8;
/// So many are looked at chunk by chunk instead, which the processor foresees.
const STEPS: u32 = 8 * CHUNK;
/// Where so many blocks are left, groups of chunks are passed: of fewer, all are on their way from memory before a group's last one is.
const GROUPS_FROM: u32 = 2 * GROUP * CHUNK;

/// A chain and a run, from a block on that is in both.
struct Along<'a> {
    seen: &'a Seen<'a>,
    place: Place,
}

impl Along<'_> {
    /// Where the block so many blocks on is, if chunks stand one behind the other in memory.
    #[inline(always)]
    fn guess(&self, more: u32) -> Place {
        let blocks = self.place.at + more;
        Place { chunk: self.place.chunk.wrapping_add(blocks / CHUNK), at: blocks % CHUNK }
    }
}

/// A chain that is looked up.
pub(super) trait Chain {
    /// The name of the first block that is not known yet; those before are.
    fn name(&self) -> Option<u64>;
    /// Blocks that are known.
    fn at(&self) -> usize;
    /// How many of its blocks, from the one that is at `place` on, are in that place's run, one behind the other: they are
    /// known then. At least one.
    fn go_along(&mut self, index: &Runs, seen: &Seen<'_>, place: Place) -> u32;
}

/// Whose names are known.
#[derive(Clone, Copy)]
pub(super) struct Names<'a> {
    names: &'a [u64],
    at: usize,
}

impl<'a> Names<'a> {
    pub fn new(names: &'a [u64]) -> Self {
        Self { names, at: 0 }
    }

    #[inline(always)]
    fn is(&self, chunk: &Chunk, at: u32, block: usize) -> bool {
        self.names.get(block).is_some_and(|name| chunk.is(at, *name))
    }

    /// Blocks that are those of a chunk, from a place in it on.
    #[inline(always)]
    fn same(&self, chunk: &Chunk, at: u32, block: usize, most: u32) -> u32 {
        let most = most.min(chunk.live_from(at));
        (0..most).take_while(|more| self.is(chunk, at + more, block + *more as usize)).count() as u32
    }

    /// Where the block that is `more` blocks on is, if it is in the run at the position as many on. Chunks that were made one after the other often
    /// stand so: if a guess is right, the map is not asked.
    #[inline(always)]
    fn place_of(&self, index: &Runs, along: &Along<'_>, more: u32) -> Option<Place> {
        let position = along.seen.position + more;
        let name = *self.names.get(self.at + more as usize)?;
        let is_in_run = |chunk: &Chunk| chunk.run.load(Ordering::Acquire) == along.seen.number;
        let guess = along.guess(more);
        if let Some(chunk) = index.chunks.get(guess.chunk).filter(|chunk| is_in_run(chunk))
            && chunk.base() + guess.at == position
        {
            return (chunk.is(guess.at, name) && chunk.live_from(guess.at) > 0).then_some(guess);
        }
        // The map has the first name of each chunk.
        let at = position % CHUNK;
        let first = *self.names.get(self.at + more.checked_sub(at)? as usize)?;
        let place = Place { at, ..index.locate(first).filter(|place| place.at == 0)? };
        let chunk = index.chunks.get(place.chunk).filter(|chunk| is_in_run(chunk))?;
        (chunk.base() + at == position && chunk.is(at, name) && chunk.live_from(at) > 0).then_some(place)
    }

    /// The same as [`Self::search`], where the chain may part from the run as another one did.
    #[inline(always)]
    fn search_from_branch(&self, index: &Runs, along: &Along<'_>, last: Place, least: u32, most: u32) -> u32 {
        let branch = along.seen.run.branch.load(Ordering::Relaxed).saturating_sub(along.seen.position);
        if branch <= least || branch >= most {
            return self.search(index, along, last, least, most);
        }
        let child = Place::of(along.seen.run.child.load(Ordering::Relaxed));
        for place in [along.guess(branch - 1), along.guess(branch), child] {
            if let Some(chunk) = index.chunks.get(place.chunk) {
                chunk.prefetch(place.at);
            }
        }
        match self.place_of(index, along, branch - 1) {
            None => self.search(index, along, last, least, branch),
            Some(_) if self.place_of(index, along, branch).is_none() => branch,
            Some(last) => self.search(index, along, last, branch, most),
        }
    }

    /// Of `most` blocks that may be those of a run, how many are; the first `least` are, up to the one at `last`.
    fn search(&self, index: &Runs, along: &Along<'_>, last: Place, least: u32, most: u32) -> u32 {
        let of = |more: u32| self.place_of(index, along, more);
        if of(most - 1).is_some() {
            return most;
        }
        // Those up to `same` are the run's, the last of which is at `last`; the one at `other` is not.
        let (mut last, mut same, mut other) = (last, least, most - 1);
        while other - same > STEPS {
            let look = |at: u32| same + (u64::from(other - same) * u64::from(at + 1) / (LOOKS as u64 + 1)) as u32;
            let looks: [u32; LOOKS] = std::array::from_fn(|at| look(at as u32));
            for more in looks {
                let guess = along.guess(more);
                if let Some(chunk) = index.chunks.get(guess.chunk) {
                    chunk.prefetch(guess.at);
                }
            }
            for more in looks {
                match of(more) {
                    Some(place) => (last, same) = (place, more + 1),
                    None => {
                        other = more;
                        break;
                    }
                }
            }
        }
        self.step(index, last, same, other)
    }

    /// The same, chunk by chunk.
    fn step(&self, index: &Runs, last: Place, least: u32, most: u32) -> u32 {
        let (mut last, mut same) = (last, least);
        while same < most {
            let Some(next) = index.next_place(last) else { break };
            let Some(chunk) = index.chunks.get(next.chunk) else { break };
            index.prefetch_later(next);
            let more = self.same(chunk, next.at, self.at + same as usize, most - same);
            if more == 0 {
                break;
            }
            same += more;
            last = Place { chunk: next.chunk, at: next.at + more - 1 };
        }
        same
    }
}

impl Chain for Names<'_> {
    #[inline(always)]
    fn name(&self) -> Option<u64> {
        self.names.get(self.at).copied()
    }

    #[inline(always)]
    fn at(&self) -> usize {
        self.at
    }

    #[inline(always)]
    fn go_along(&mut self, index: &Runs, seen: &Seen<'_>, place: Place) -> u32 {
        let Some(chunk) = index.chunks.get(place.chunk) else { return 0 };
        let most = (seen.len - seen.position).min((self.names.len() - self.at) as u32);
        let mut same = self.same(chunk, place.at, self.at, most);
        if same < most && place.at + same == CHUNK {
            let last = Place { chunk: place.chunk, at: CHUNK - 1 };
            let is_whole = seen.run.whole_from.load(Ordering::Relaxed) <= seen.position;
            same = if is_whole && most - same > STEPS {
                self.search_from_branch(index, &Along { seen, place }, last, same, most)
            } else {
                self.step(index, last, same, most)
            };
        }
        self.at += same as usize;
        same
    }
}

/// Whose names are yet to be worked out, from the hashes of its blocks' tokens.
#[derive(Clone, Copy)]
pub(super) struct Tokens<'a> {
    tokens_hashes: &'a [u64],
    at: usize,
    before: Option<u64>,
}

impl<'a> Tokens<'a> {
    pub fn new(tokens_hashes: &'a [u64]) -> Self {
        Self { tokens_hashes, at: 0, before: None }
    }
}

impl Chain for Tokens<'_> {
    #[inline(always)]
    fn name(&self) -> Option<u64> {
        self.tokens_hashes.get(self.at).map(|tokens_hash| next_name(self.before, *tokens_hash))
    }

    #[inline(always)]
    fn at(&self) -> usize {
        self.at
    }

    /// A run says what the names would be: each is the one that its tokens make of the name before. That takes no chain of hashes, each of which
    /// waits for the one before.
    #[inline(always)]
    fn go_along(&mut self, index: &Runs, seen: &Seen<'_>, place: Place) -> u32 {
        let most = (seen.len - seen.position).min((self.tokens_hashes.len() - self.at) as u32);
        let (mut place, mut same, mut before) = (place, 0, self.before);
        let Some(mut chunk) = index.chunks.get(place.chunk) else { return 0 };
        let facts = Facts::new(self.tokens_hashes, self.at, seen.position);
        loop {
            let (position, left) = (seen.position + same, most - same);
            if let Some(skipped) = skip(index, seen, (place, chunk), (position, left), &facts) {
                same = skipped.position + CHUNK - seen.position;
                before = Some(skipped.last);
                (place, chunk) = (Place { chunk: skipped.number, at: 0 }, skipped.chunk);
                index.prefetch_later(place);
            } else {
                index.prefetch_later(place);
                let tokens = self.tokens_hashes.get(self.at + same as usize..).unwrap_or_default();
                let count = chunk.live_from(place.at).min(left);
                // The first block of all is known.
                let known = u32::from(same == 0);
                let parent = if same == 0 { chunk.name(place.at) } else { before };
                let tokens = tokens.get(known as usize..).unwrap_or_default();
                let (parent, count_left) = (parent.unwrap_or_default(), count.max(known) - known);
                let (made, last) = named(chunk, place.at + known, count_left, parent, tokens);
                let more = known + made;
                if more == 0 {
                    break;
                }
                same += more;
                before = Some(last);
                if more == CHUNK {
                    facts.say(chunk, position / CHUNK, last);
                }
                if place.at + more < CHUNK {
                    break;
                }
            }
            if same >= most {
                break;
            }
            let Some((next, follows)) = index.next_chunk(chunk) else { break };
            (place, chunk) = (Place { chunk: next, at: 0 }, follows);
        }
        self.at += same as usize;
        self.before = before;
        same
    }
}

/// Whole chunks that a chain goes along, as was said of the last one of them.
struct Skipped<'a> {
    number: u32,
    chunk: &'a Chunk,
    position: u32,
    last: u64,
}

/// Chunks that a chain goes along from a block on, as far as was said: a group, or one.
#[inline(always)]
fn skip<'a>(
    index: &'a Runs,
    seen: &Seen<'_>,
    (place, chunk): (Place, &'a Chunk),
    (position, left): (u32, u32),
    facts: &Facts<'_>,
) -> Option<Skipped<'a>> {
    if place.at != 0 || left < CHUNK {
        return None;
    }
    let nth = position / CHUNK;
    let has = |number: u32, chunk: &'a Chunk, nth: u32| {
        let last = chunk.name(CHUNK - 1)?;
        let is_it = chunk.live_from(0) == CHUNK && facts.is_said(chunk, nth, last);
        is_it.then_some(Skipped { number, chunk, position: nth * CHUNK, last })
    };
    // Chunks that were made one after the other often stand so. What has no hole need not be looked at.
    let is_group =
        nth.is_multiple_of(GROUP) && left >= GROUPS_FROM && chunk.next.load(Ordering::Relaxed) == place.chunk + 1;
    if is_group && seen.run.whole_from.load(Ordering::Relaxed) <= position {
        let (number, end) = (place.chunk.wrapping_add(GROUP - 1), nth + GROUP - 1);
        index.prefetch_group(number);
        if let Some(there) = index.chunks.get(number)
            && there.run.load(Ordering::Acquire) == seen.number
            && there.base() == end * CHUNK
            && let Some(skipped) = has(number, there, end)
        {
            facts.bring(nth, GROUP);
            return Some(skipped);
        }
    }
    has(place.chunk, chunk, nth)
}

/// How many of a chunk's blocks, of `count` from a place on, have the names that tokens make: the first of what stands behind `parent`; and
/// the name of the last that has, or `parent`. Of a whole chunk all are worked out, whether or not one is another: none waits for that.
#[inline(always)]
fn named(chunk: &Chunk, at: u32, count: u32, parent: u64, tokens_hashes: &[u64]) -> (u32, u64) {
    if let Some(tokens_hashes) = tokens_hashes.first_chunk().filter(|_| count == CHUNK) {
        return named_whole(chunk, parent, tokens_hashes);
    }
    let (mut same, mut before) = (0, parent);
    for tokens_hash in tokens_hashes.iter().take(count as usize) {
        let name = chunk.name(at + same);
        if name != Some(name_behind(before, *tokens_hash)) {
            break;
        }
        (same, before) = (same + 1, name.unwrap_or_default());
    }
    (same, before)
}

#[inline(never)]
fn named_whole(chunk: &Chunk, parent: u64, tokens_hashes: &[u64; CHUNK as usize]) -> (u32, u64) {
    let names = chunk.names.each_ref().map(|name| name.load(Ordering::Acquire));
    let (mut others, mut before) = (0, parent);
    for (at, (name, tokens_hash)) in names.iter().zip(tokens_hashes).enumerate() {
        others |= u32::from(*name != name_behind(before, *tokens_hash)) << at;
        before = *name;
    }
    let same = others.trailing_zeros().min(CHUNK);
    (same, same.checked_sub(1).and_then(|last| names.get(last as usize).copied()).unwrap_or(parent))
}

impl Runs {
    /// Chunks that were made one after the other often stand so.
    #[inline(always)]
    fn prefetch_later(&self, place: Place) {
        if let Some(later) = self.chunks.get(place.chunk.wrapping_add(6)) {
            later.prefetch(0);
            later.prefetch(CHUNK - 1);
        }
    }

    /// The last chunks of the next groups are on their way from memory.
    #[inline(always)]
    fn prefetch_group(&self, last: u32) {
        for groups in 1..3 {
            if let Some(later) = self.chunks.get(last.wrapping_add(groups * GROUP)) {
                later.prefetch(CHUNK - 1);
            }
        }
    }

    /// Where the block behind another may be, for readers.
    #[inline(always)]
    pub(super) fn next_place(&self, place: Place) -> Option<Place> {
        if place.at + 1 < CHUNK {
            return Some(Place { chunk: place.chunk, at: place.at + 1 });
        }
        self.next_chunk(self.chunks.get(place.chunk)?).map(|(chunk, _)| Place { chunk, at: 0 })
    }

    /// The chunk whose first block is behind another's last.
    #[inline(always)]
    fn next_chunk(&self, chunk: &Chunk) -> Option<(u32, &Chunk)> {
        let next = chunk.next.load(Ordering::Acquire);
        let follows = self.chunks.get(next)?;
        (next != 0 && follows.base() == chunk.base() + CHUNK).then_some((next, follows))
    }
}
