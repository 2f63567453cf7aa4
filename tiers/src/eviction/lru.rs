//! The baseline: least recently used, as the field defines it.
//!
//! Definition: a request uses the whole chain up to the last block that it reads or stores. Of the blocks that no other block in the
//! pool follows, the victim is the one used longest ago; a request's own blocks never displace one another. This is the LRU of
//! kvcache-simulator 0.1.3 (by Mooncake's team), hit for hit. Hits and refreshes count alike.

use super::chains::{Chains, NONE};
use super::{ANCESTORS_MAX, BlockIndex, EvictionPolicy, NewBlock, Origin, Place, Removal, Touch};

/// Least recently used.
pub struct Lru {
    chains: Chains,
}

impl Lru {
    /// An empty policy.
    pub fn new() -> Self {
        Self { chains: Chains::new() }
    }

    fn reach(&mut self, at: u32) -> u32 {
        let reached = self.chains.reach(at, |_, _, below| below == 0);
        self.drop_absorbed();
        reached.below.into_iter().for_each(|below| self.chains.list(below));
        self.chains.use_now(reached.run);
        reached.run
    }

    fn drop_absorbed(&mut self) {
        while let Some(run) = self.chains.take_absorbed() {
            self.chains.free_run(run);
        }
    }

    /// `follower` came ahead of `at`, which is before it.
    fn follow(&mut self, at: u32, follower: u32) {
        let (Some(run), Some(own)) = (self.chains.link(at, follower), self.chains.run_of(at)) else { return };
        if self.chains.is_ahead(at) {
            self.chains.prepend(at, run);
            self.drop_absorbed();
        } else if self.chains.end_of(own) == at {
            self.chains.append(self.chains.end_of(run), own);
            self.chains.free_run(run);
            self.chains.use_now(own);
        }
    }
}

impl Default for Lru {
    fn default() -> Self {
        Self::new()
    }
}

impl EvictionPolicy for Lru {
    fn at(&mut self, _now_ms: u64) {}

    fn insert(&mut self, block: BlockIndex, new: NewBlock) {
        let parent = match new.origin {
            Origin::After(parent) if new.kind.needs_prefix() && self.chains.is_there(parent.0) => Some(parent.0),
            _ => None,
        };
        let run = parent.map(|parent| self.reach(parent));
        let run = self.chains.insert(block.0, &new, run, 0);
        self.chains.use_now(run);
        if parent.is_none() && new.origin != Origin::Root && new.kind.needs_prefix() {
            self.chains.put_last(run);
        }
    }

    fn insert_at(&mut self, block: BlockIndex, new: NewBlock, place: Place<'_>) {
        if place.missing == 0 || !new.kind.needs_prefix() {
            self.insert(block, new);
        } else {
            let run = self.chains.insert(block.0, &new, None, place.missing);
            self.chains.use_now(run);
            if new.origin == Origin::Absent {
                self.chains.put_last(run);
            }
        }
        place.followers.iter().for_each(|follower| self.follow(block.0, follower.0));
    }

    fn touch(&mut self, block: BlockIndex, touch: Touch) {
        let mut at = block.0;
        let Some(run) = self.chains.run_of(at) else { return };
        if self.chains.needs_prefix(at) {
            let after = touch.after();
            if let Some(healed) = after.and_then(|after| self.chains.adopt(at, after.0)) {
                self.chains.list(healed);
            }
            if after.is_none_or(|after| self.chains.parent_of(after.0) != Some(at)) {
                self.reach(at);
            }
            return;
        }
        self.chains.use_now(run);
        let ancestors = if touch == Touch::Refresh { ANCESTORS_MAX } else { 0 };
        for _ in 0..ancestors {
            let Some(parent) = self.chains.parent_of(at) else { break };
            let Some(run) = self.chains.run_of(parent) else { break };
            self.chains.use_now(run);
            at = parent;
        }
    }

    fn remove(&mut self, block: BlockIndex, _removal: Removal) {
        let Some(left) = self.chains.remove(block.0) else { return };
        if left.run_is_gone {
            self.chains.free_run(left.run);
        } else {
            self.chains.list(left.run);
        }
        left.parents_run.into_iter().for_each(|run| self.chains.list(run));
        left.orphan.into_iter().for_each(|run| self.chains.put_last(run));
    }

    fn hold(&mut self, block: BlockIndex, held: bool) {
        if let Some(run) = self.chains.hold(block.0, held) {
            self.chains.list(run);
        }
    }

    fn victim(&mut self, incoming: Option<&NewBlock>) -> Option<BlockIndex> {
        if self.chains.take_lost_beginnings() {
            for run in self.chains.run_places() {
                if self.chains.has_no_beginning(run) {
                    self.chains.put_last(run);
                }
            }
        }
        let own = self.chains.own_run(incoming).ok()?;
        self.chains.oldest(own.unwrap_or(NONE)).map(|run| BlockIndex(self.chains.end_of(run)))
    }

    fn refused(&mut self, _incoming: &NewBlock) {}

    fn before_victim(&self, block: BlockIndex) -> Option<BlockIndex> {
        self.chains.before_victim(block)
    }

    fn parent(&self, block: BlockIndex) -> Option<BlockIndex> {
        self.chains.parent(block)
    }

    fn set_capacity(&mut self, _blocks: usize) {}
}
