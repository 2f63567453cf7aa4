//! Looking up a chain: run by run, until nobody is left who has all of it.

use smallvec::SmallVec;

use super::Runs;
use super::map::half;
use super::parts::{Chunk, Place, Run};
use super::query::{Chain, Names, Tokens};
use super::tags::{self, TagSet};
use crate::holders::HolderId;
use crate::mix::mixed;
use crate::sync::{Ordering, fence};
use crate::{Match, READ, caps};

/// Tags, and how many of the first blocks they have, where whoever asked wants to know: the tag is yet to become its holder.
struct Ended<'a>(&'a mut Vec<Match>);

impl Ended<'_> {
    #[inline(always)]
    fn push(&mut self, tag: u16, blocks: u32) {
        self.0.push(Match { holder: HolderId(u32::from(tag)), blocks });
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn truncate(&mut self, len: usize) {
        self.0.truncate(len);
    }
}

/// What a reader saw of the run that a block is in.
pub(super) struct Seen<'a> {
    pub run: &'a Run,
    pub number: u32,
    version: u32,
    /// Of the run; more than the position of the block.
    pub len: u32,
    pub position: u32,
}

impl Runs {
    pub fn find(&self, names: &[u64], matches: &mut Vec<Match>) {
        self.find_chain(|| Names::new(names), matches);
    }

    pub fn find_tokens(&self, tokens_hashes: &[u64], matches: &mut Vec<Match>) {
        self.find_chain(|| Tokens::new(tokens_hashes), matches);
    }

    #[inline(always)]
    fn find_chain<C: Chain + Copy>(&self, chain: impl Fn() -> C, matches: &mut Vec<Match>) {
        matches.clear();
        let seen = self.owners.generation();
        if self.owners.tags() <= tags::FEW as u32 * 64 {
            self.find_among::<C, { tags::FEW }>(seen, chain, matches);
        } else {
            self.find_among::<C, { tags::ALL }>(seen, chain, matches);
        }
        // Most often those who have less were found first.
        matches.reverse();
        if !matches.is_sorted_by_key(|found| std::cmp::Reverse(found.blocks)) {
            matches.sort_unstable_by_key(|found| std::cmp::Reverse(found.blocks));
        }
    }

    /// The same, of tags for which sets of so many words are enough.
    #[inline(always)]
    fn find_among<C: Chain + Copy, const WORDS: usize>(
        &self,
        seen: u64,
        chain: impl Fn() -> C,
        matches: &mut Vec<Match>,
    ) {
        let mut only: Option<TagSet<WORDS>> = None;
        for _ in 0..caps::READ_TRIES {
            let (losses, known) = (self.owners.losses(), matches.len());
            self.walk(chain(), only.as_ref(), &mut Ended(matches));
            fence(Ordering::Acquire);
            // Who lost blocks meanwhile is looked up again: else a chain could seem longer than it ever was.
            let (mut again, mut at) = (TagSet::EMPTY, 0);
            matches.retain_mut(|found| {
                at += 1;
                if at <= known {
                    return true;
                }
                let tag = found.holder.0 as u16;
                if self.owners.lost_since(tag, losses) {
                    again.put(tag);
                    return false;
                }
                let holder = self.owners.holder(tag, seen);
                found.holder = holder.unwrap_or(found.holder);
                holder.is_some()
            });
            if again.is_empty() {
                break;
            }
            only = Some(again);
        }
    }

    /// Tells of each of the tags in `only`, or else of all that have the first block, how many of the first blocks it has.
    #[inline(always)]
    fn walk<C: Chain + Copy, const WORDS: usize>(&self, chain: C, only: Option<&TagSet<WORDS>>, ended: &mut Ended<'_>) {
        let mut chain = chain;
        let (mut first, mut second, mut gone) = (only.copied().unwrap_or(TagSet::EMPTY), TagSet::EMPTY, TagSet::EMPTY);
        let (mut open, mut next) = (&mut first, &mut second);
        let (mut is_open_to_all, mut tries, mut child) = (only.is_none(), 0, 0);
        while let Some(name) = chain.name() {
            let (here, at) = (chain, chain.at() as u32);
            let place = self.is_child(child, name).or_else(|| self.locate(name));
            let Some(place) = place else { break };
            let Some(chunk) = self.chunks.get(place.chunk) else { break };
            let Some(seen) = self.see(chunk, place, name) else { break };
            let same = chain.go_along(self, &seen, place);
            child = self.bring_branch(&chain, &seen);
            let before = ended.len();
            next.clear();
            gone.clear();
            let (from, to) = (seen.position, seen.position + same);
            self.each_span(seen.run, |span| {
                let counts = span.from <= from && span.to > from && (is_open_to_all || open.has(span.tag));
                if counts && span.to >= to {
                    next.put(span.tag);
                } else if counts {
                    gone.put(span.tag);
                    ended.push(span.tag, at + span.to - from);
                }
            });
            fence(Ordering::Acquire);
            if same == 0 || seen.run.version.load(Ordering::Relaxed) != seen.version {
                // It changed meanwhile. Where it does so all the time, no more is known of those who have all so far.
                ended.truncate(before);
                (chain, child) = (here, 0);
                tries += 1;
                if tries == caps::READ_TRIES {
                    break;
                }
                continue;
            }
            tries = 0;
            if self.notes() && seen.run.looked.load(Ordering::Relaxed) & 1 == 0 {
                seen.run.looked.fetch_or(1, Ordering::Relaxed);
            }
            if at > 0 && !is_open_to_all {
                open.each_but(next, &gone, |tag| ended.push(tag, at));
            }
            is_open_to_all = false;
            std::mem::swap(&mut open, &mut next);
            if open.is_empty() {
                return;
            }
        }
        let at = chain.at() as u32;
        if at > 0 {
            open.each(|tag| ended.push(tag, at));
        }
    }

    /// Where a chain that leaves a run may go on is on its way from memory, while spans are read: the last branch of the run, which is told, and
    /// what the map says of the next block.
    #[inline(always)]
    fn bring_branch<C: Chain>(&self, chain: &C, seen: &Seen<'_>) -> u32 {
        let child = seen.run.child.load(Ordering::Relaxed);
        if let Some(name) = chain.name() {
            self.names.prefetch(half(mixed(name)));
            let place = Place::of(child);
            if let Some(chunk) = self.chunks.get(place.chunk).filter(|_| child != 0) {
                chunk.prefetch(place.at);
            }
        }
        child
    }

    /// Where a block is, if it is where chains went on from the run before: the map is not asked.
    #[inline(always)]
    fn is_child(&self, child: u32, name: u64) -> Option<Place> {
        let place = Place::of(child);
        let chunk = self.chunks.get(place.chunk).filter(|_| child != 0)?;
        (chunk.is(place.at, name) && chunk.live_from(place.at) > 0).then_some(place)
    }

    /// The run of a block, where it is there and does not change.
    #[inline(always)]
    fn see<'a>(&'a self, chunk: &'a Chunk, place: Place, name: u64) -> Option<Seen<'a>> {
        for _ in 0..caps::READ_TRIES {
            let number = chunk.run.load(READ);
            let run = self.runs.get(number)?;
            let version = run.version.load(READ);
            let position = chunk.base.load(READ) + place.at;
            let len = run.len();
            let is_it = chunk.run.load(READ) == number && chunk.is(place.at, name) && position < len;
            if version.is_multiple_of(2) && is_it {
                return Some(Seen { run, number, version, len, position });
            }
        }
        None
    }

    pub fn each(&self, names: &[u64], mut visit: impl FnMut(usize, &[HolderId]) -> bool) {
        let generation = self.owners.generation();
        let mut holders: SmallVec<[HolderId; 32]> = SmallVec::new();
        let mut before: Option<Place> = None;
        for (at, name) in names.iter().enumerate() {
            holders.clear();
            let losses = self.owners.losses();
            let mut tags = TagSet::<{ tags::ALL }>::EMPTY;
            let behind = before
                .and_then(|before| self.next_place(before))
                .filter(|place| self.is_child(place.word(), *name).is_some());
            before = behind.or_else(|| self.locate(*name));
            let seen = before.and_then(|place| self.see(self.chunks.get(place.chunk)?, place, *name));
            if let Some(seen) = seen {
                self.each_span(seen.run, |span| {
                    if span.common(seen.position, seen.position + 1) > 0 {
                        tags.put(span.tag);
                    }
                });
                fence(Ordering::Acquire);
                if seen.run.version.load(Ordering::Relaxed) == seen.version {
                    tags.each(|tag| {
                        let is_known = !self.owners.lost_since(tag, losses);
                        holders.extend(self.owners.holder(tag, generation).filter(|_| is_known));
                    });
                }
            }
            if !visit(at, &holders) {
                return;
            }
        }
    }
}
