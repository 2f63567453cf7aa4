//! Looking up a chain: block by block, some ahead on their way from memory, until nobody is left who has all of it.

use smallvec::SmallVec;

use super::holders::HolderId;
use super::{Match, PrefixIndex, table};
use crate::caps;

/// Blocks that are loaded side by side.
const PROBES: usize = 16;

type Tags = SmallVec<[u16; 32]>;

impl PrefixIndex {
    /// How much of a chain each holder has, those that have the first block at all, the longest first. `names`: of a prompt's
    /// blocks, in order. Never waits.
    pub fn find(&self, names: &[u64], matches: &mut Vec<Match>) {
        matches.clear();
        let seen = self.holders.generation();
        let Some(first) = names
            .first()
            .and_then(|name| self.table.home(table::mixed(*name)))
            .and_then(|home| self.table.seen(&home, &self.cells))
        else {
            return;
        };
        let mut open = Tags::new();
        first.each(|tag| open.push(tag));
        // Who lost blocks meanwhile is looked up again: else a chain could seem longer than it ever was.
        for _ in 0..caps::READ_TRIES {
            if open.is_empty() {
                break;
            }
            let losses: SmallVec<[u64; 32]> = open.iter().map(|tag| self.holders.losses(*tag)).collect();
            let mut left = Tags::new();
            let before = open.clone();
            self.walk(names, open, |tag, blocks| {
                let at = before.iter().position(|known| *known == tag);
                let was = at.and_then(|at| losses.get(at)).copied().unwrap_or(1);
                match was.is_multiple_of(2) && was == self.holders.losses(tag) {
                    true if blocks > 0 => {
                        let holder = self.holders.holder(tag, seen);
                        matches.extend(holder.map(|holder| Match { holder, blocks: blocks as u32 }));
                    }
                    true => {}
                    false => left.push(tag),
                }
            });
            open = left;
        }
        matches.sort_unstable_by(|a, b| b.blocks.cmp(&a.blocks).then(a.holder.cmp(&b.holder)));
    }

    /// Tells of each of `tags` how many of the first blocks it has.
    fn walk(&self, names: &[u64], mut tags: Tags, mut ended: impl FnMut(u16, usize)) {
        for (run, names) in names.chunks(PROBES).enumerate() {
            let homes = self.table.homes(names.iter().map(|name| table::mixed(*name)));
            for (at, home) in homes.iter().enumerate() {
                let mut left = Tags::new();
                let mut all = true;
                for some in tags.chunks(64) {
                    let which = self.table.which(home, &self.cells, some);
                    all &= which == u64::MAX >> (64 - some.len());
                    if all && tags.len() <= 64 {
                        break;
                    }
                    for (bit, tag) in some.iter().enumerate() {
                        match which >> bit & 1 {
                            1 => left.push(*tag),
                            _ => ended(*tag, run * PROBES + at),
                        }
                    }
                }
                if !all || tags.len() > 64 {
                    tags = left;
                }
                if tags.is_empty() {
                    return;
                }
            }
        }
        tags.into_iter().for_each(|tag| ended(tag, names.len()));
    }

    /// Tells `visit` of each block of `names` who has it, in order, until it says false. Never waits; a block that changes meanwhile may
    /// be missed.
    pub fn each(&self, names: &[u64], mut visit: impl FnMut(usize, &[HolderId]) -> bool) {
        let seen = self.holders.generation();
        let mut holders: SmallVec<[HolderId; 32]> = SmallVec::new();
        for (run, names) in names.chunks(PROBES).enumerate() {
            let homes = self.table.homes(names.iter().map(|name| table::mixed(*name)));
            for (at, home) in homes.iter().enumerate() {
                holders.clear();
                if let Some(found) = self.table.seen(home, &self.cells) {
                    found.each(|tag| holders.extend(self.holders.holder(tag, seen)));
                }
                if !visit(run * PROBES + at, &holders) {
                    return;
                }
            }
        }
    }
}
