//! Looking up a chain: a few blocks of it at a time, all on their way from memory together, and closer where holders drop out.

use super::chains::Holes;
use super::holders::HolderId;
use super::{Match, PrefixIndex, table};
use crate::caps;

/// Blocks that are looked at side by side.
const PROBES: usize = 16;

/// A look-up under way.
struct Find<'a> {
    index: &'a PrefixIndex,
    names: &'a [u64],
    seen: u64,
    matches: &'a mut Vec<Match>,
}

impl PrefixIndex {
    /// How much of a chain each holder has, those that have the first block at all, the longest first. `names`: of a prompt's
    /// blocks, in order. Never waits.
    pub fn find(&self, names: &[u64], matches: &mut Vec<Match>) {
        matches.clear();
        let seen = self.holders.generation();
        let Some(first) = names.first().and_then(|name| self.table.seen(table::mixed(*name), &self.cells)) else {
            return;
        };
        let mut tags = Vec::with_capacity(8);
        first.tags(&mut tags);
        let mut find = Find { index: self, names, seen, matches };
        let mut open = find.closed(tags);
        for _ in 0..caps::READ_TRIES {
            open = find.open(open);
        }
        matches.sort_unstable_by(|a, b| b.blocks.cmp(&a.blocks).then(a.holder.cmp(&b.holder)));
    }
}

impl PrefixIndex {
    /// Tells `visit` of each block of `names` who has it, in order, until it says false. Never waits; a block that changes meanwhile may
    /// be missed.
    pub fn each(&self, names: &[u64], mut visit: impl FnMut(usize, &[HolderId]) -> bool) {
        let seen = self.holders.generation();
        let (mut tags, mut holders) = (Vec::with_capacity(8), Vec::with_capacity(8));
        for (run, names) in names.chunks(PROBES).enumerate() {
            names.iter().for_each(|name| self.table.touch(table::mixed(*name)));
            for (at, name) in names.iter().enumerate() {
                tags.clear();
                holders.clear();
                if let Some(found) = self.table.seen(table::mixed(*name), &self.cells) {
                    found.tags(&mut tags);
                }
                holders.extend(tags.iter().filter_map(|tag| self.holders.holder(*tag, seen)));
                if !visit(run * PROBES + at, &holders) {
                    return;
                }
            }
        }
    }
}

impl Find<'_> {
    fn key(&self, at: usize) -> u64 {
        table::mixed(self.names.get(at).copied().unwrap_or_default())
    }

    /// Looks for those that have, with each block, its parent; the others are left.
    fn closed(&mut self, tags: Vec<u16>) -> Vec<u16> {
        let holes = |tag: &u16| self.index.holes.of(*tag);
        let (closed, mut open): (Vec<u16>, Vec<u16>) = tags.into_iter().partition(|tag| holes(tag).is_closed());
        let before: Vec<Holes> = closed.iter().map(holes).collect();
        if !closed.is_empty() {
            let mut found = Vec::with_capacity(closed.len());
            self.between(0, self.names.len(), closed.clone(), &mut found);
            for (tag, blocks) in found {
                let was = closed.iter().zip(&before).find(|(known, _)| **known == tag).map(|(_, holes)| *holes);
                match was.filter(|was| was.is_closed() && *was == self.index.holes.of(tag)) {
                    Some(_) => self.add(tag, blocks),
                    None => open.push(tag),
                }
            }
        }
        open
    }

    /// Looks for the others, block by block; those whose holes changed meanwhile are left.
    fn open(&mut self, tags: Vec<u16>) -> Vec<u16> {
        if tags.is_empty() {
            return tags;
        }
        let before: Vec<Holes> = tags.iter().map(|tag| self.index.holes.of(*tag)).collect();
        let mut left = Vec::new();
        for (tag, blocks) in self.walk(tags.clone()) {
            let was = tags.iter().zip(&before).find(|(known, _)| **known == tag).map(|(_, holes)| *holes);
            match was.filter(|was| was.is_still() && *was == self.index.holes.of(tag)) {
                Some(_) => self.add(tag, blocks),
                None => left.push(tag),
            }
        }
        left
    }

    /// `tags` have the block at `low`, and all before it; where each ends, before `high`, goes into `found`.
    fn between(&self, low: usize, high: usize, mut tags: Vec<u16>, found: &mut Vec<(u16, usize)>) {
        let gap = (high - low).div_ceil(PROBES).max(1);
        // The last of them, and some on the way there.
        let probes = || (1..PROBES).map(move |at| low + at * gap).filter(move |at| *at + 1 < high).chain([high - 1]);
        probes().for_each(|at| self.index.table.touch(self.key(at)));
        let mut before = low;
        for at in probes() {
            if at <= before {
                continue;
            }
            let seen = self.index.table.seen(self.key(at), &self.index.cells);
            if seen.as_ref().is_some_and(|seen| seen.has_all(&tags)) {
                before = at;
                continue;
            }
            let (stay, leave): (Vec<u16>, Vec<u16>) = match seen {
                Some(seen) => tags.into_iter().partition(|tag| seen.has(*tag)),
                None => (Vec::new(), tags),
            };
            if !leave.is_empty() {
                match at - before {
                    1 => found.extend(leave.into_iter().map(|tag| (tag, at))),
                    _ => self.between(before, at, leave, found),
                }
            }
            if stay.is_empty() {
                return;
            }
            (tags, before) = (stay, at);
        }
        found.extend(tags.into_iter().map(|tag| (tag, before + 1)));
    }

    /// Where each of `tags` ends, block by block.
    fn walk(&self, mut tags: Vec<u16>) -> Vec<(u16, usize)> {
        let mut found = Vec::with_capacity(tags.len());
        for run in 0..self.names.len().div_ceil(PROBES) {
            let ids = run * PROBES..self.names.len().min((run + 1) * PROBES);
            ids.clone().for_each(|at| self.index.table.touch(self.key(at)));
            for at in ids {
                let seen = self.index.table.seen(self.key(at), &self.index.cells);
                if seen.as_ref().is_some_and(|seen| seen.has_all(&tags)) {
                    continue;
                }
                let leaves = |tag: &u16| seen.as_ref().is_none_or(|seen| !seen.has(*tag));
                let (leave, stay): (Vec<u16>, Vec<u16>) = tags.into_iter().partition(leaves);
                found.extend(leave.into_iter().map(|tag| (tag, at)));
                tags = stay;
                if tags.is_empty() {
                    return found;
                }
            }
        }
        found.extend(tags.into_iter().map(|tag| (tag, self.names.len())));
        found
    }

    fn add(&mut self, tag: u16, blocks: usize) {
        let holder: Option<HolderId> = self.index.holders.holder(tag, self.seen);
        if let Some(holder) = holder.filter(|_| blocks > 0) {
            self.matches.push(Match { holder, blocks: blocks as u32 });
        }
    }
}
