//! Looking up a chain: block by block, the next ones on their way from memory, until nobody is left who has all of it.

use smallvec::SmallVec;

use super::Flat;
use crate::flat::sets::{Tags, Windows, put};
use crate::flat::table::mixed;
use crate::holders::HolderId;
use crate::sync::{Ordering, fence};
use crate::{Match, caps, names};

/// Tags, and how many of the first blocks they have: the shortest first.
type Ended = SmallVec<[(Tags, u32); 32]>;

fn end(ended: &mut Ended, tags: Tags, blocks: usize) {
    if !tags.is_empty() && blocks > 0 {
        ended.push((tags, blocks as u32));
    }
}

impl Flat {
    /// How much of a chain each holder has, those that have the first block at all, the longest first. `names`: of a prompt's
    /// blocks, in order. Never waits.
    pub fn find(&self, names: &[u64], matches: &mut Vec<Match>) {
        self.find_keys(|| names.iter().map(|name| mixed(*name)), matches);
    }

    /// The same of a chain whose names are yet to be worked out, from its blocks' own hashes ([`names::tokens_hash`]): no more of them
    /// than somebody has, and some.
    pub fn find_tokens(&self, tokens_hashes: &[u64], matches: &mut Vec<Match>) {
        let keys = || {
            let mut before = None;
            tokens_hashes.iter().map(move |tokens_hash| {
                let name = names::next_name(before, *tokens_hash);
                before = Some(name);
                mixed(name)
            })
        };
        self.find_keys(keys, matches);
    }

    #[inline(always)]
    fn find_keys<I: Iterator<Item = u64>>(&self, keys: impl Fn() -> I, matches: &mut Vec<Match>) {
        matches.clear();
        let seen = self.owners.generation();
        let mut open = None;
        for attempt in 0..caps::READ_TRIES {
            let (losses, moves) = (self.owners.losses(), self.table.moves());
            let mut ended = Ended::new();
            self.walk(keys(), open.clone(), &mut ended);
            fence(Ordering::Acquire);
            if self.table.moves() != moves {
                // One block's holders may have been taken for another's, which lay there before or after.
                continue;
            }
            // Who lost blocks meanwhile is looked up again: else a chain could seem longer than it ever was.
            let mut again = Windows::new();
            for (tags, blocks) in ended.iter().rev() {
                for tag in tags.each() {
                    if self.owners.lost_since(tag, losses) {
                        put(&mut again, Tags::one(tag));
                    } else if let Some(holder) = self.owners.holder(tag, seen) {
                        matches.push(Match { holder, blocks: *blocks });
                    }
                }
            }
            if attempt > 0 {
                matches.sort_by_key(|found| std::cmp::Reverse(found.blocks));
            }
            if again.is_empty() {
                return;
            }
            open = Some(again);
        }
    }

    /// Tells of each of the tags in `open`, or else of all that have the first block, how many of the first blocks it has.
    #[inline(always)]
    fn walk(&self, keys: impl Iterator<Item = u64>, open: Option<Windows>, ended: &mut Ended) {
        let mut places = self.table.places(keys);
        let mut blocks = 0;
        let mut open = open.unwrap_or_else(|| {
            blocks = 1;
            places.windows(&self.cells).unwrap_or_default()
        });
        let mut left: SmallVec<[u64; 4]> = open.iter().map(|_| 0).collect();
        while open.len() > 1 {
            let Some(()) = places.among_all(&self.cells, &open, &mut left) else { break };
            if open.iter().zip(&left).any(|(open, left)| open.mask() != *left) {
                for (open, left) in open.iter_mut().zip(&left) {
                    let left = Tags::of_window(open.window(), *left);
                    end(ended, open.but(left), blocks);
                    *open = left;
                }
                open.retain(|tags| !tags.is_empty());
                left.truncate(open.len());
            }
            blocks += 1;
        }
        if let [tags] = open.as_slice() {
            let mut tags = *tags;
            while let Some(left) = places.among(&self.cells, tags) {
                if left != tags {
                    end(ended, tags.but(left), blocks);
                    tags = left;
                    if tags.is_empty() {
                        return;
                    }
                }
                blocks += 1;
            }
            open = Windows::from_slice(&[tags]);
        }
        open.into_iter().for_each(|tags| end(ended, tags, blocks));
    }

    /// Tells `visit` of each block of `names` who has it, in order, until it says false. Never waits; a block that changes meanwhile may
    /// be missed.
    pub fn each(&self, names: &[u64], mut visit: impl FnMut(usize, &[HolderId]) -> bool) {
        let seen = self.owners.generation();
        let mut holders: SmallVec<[HolderId; 32]> = SmallVec::new();
        let mut places = self.table.places(names.iter().map(|name| mixed(*name)));
        let mut at = 0;
        loop {
            let (losses, moves) = (self.owners.losses(), self.table.moves());
            let Some(windows) = places.windows(&self.cells) else { return };
            fence(Ordering::Acquire);
            holders.clear();
            if self.table.moves() == moves {
                let tags = windows.iter().flat_map(|tags| tags.each());
                let tags = tags.filter(|tag| !self.owners.lost_since(*tag, losses));
                holders.extend(tags.filter_map(|tag| self.owners.holder(tag, seen)));
            }
            if !visit(at, &holders) {
                return;
            }
            at += 1;
        }
    }
}
