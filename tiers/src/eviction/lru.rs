//! The baseline: least recently used.
//!
//! Definition: a request's blocks are touched from its last to its first, so that the root is the most
//! recent of them; the victim is the block touched longest ago. Hits and refreshes count alike.

use super::links::Lists;
use super::{BlockIndex, EvictionPolicy, NewBlock, Removal, Touch};

const RECENCY: u32 = 0;

/// Least recently used. Touches and victims are O(1).
pub struct Lru {
    lists: Lists,
}

impl Lru {
    /// An empty policy.
    pub fn new() -> Self {
        Self { lists: Lists::new(1) }
    }
}

impl Default for Lru {
    fn default() -> Self {
        Self::new()
    }
}

impl EvictionPolicy for Lru {
    fn insert(&mut self, block: BlockIndex, _new: NewBlock) {
        self.lists.ensure(block.0);
        self.lists.push_front(RECENCY, block.0);
    }

    fn touch(&mut self, block: BlockIndex, _touch: Touch) {
        if self.lists.unlink(block.0) {
            self.lists.push_front(RECENCY, block.0);
        }
    }

    fn remove(&mut self, block: BlockIndex, _removal: Removal) {
        self.lists.unlink(block.0);
    }

    fn hold(&mut self, block: BlockIndex, held: bool) {
        if held {
            self.lists.unlink(block.0);
        } else if !self.lists.is_linked(block.0) {
            self.lists.push_front(RECENCY, block.0);
        }
    }

    fn victim(&mut self) -> Option<BlockIndex> {
        self.lists.back(RECENCY).map(BlockIndex)
    }

    fn set_capacity(&mut self, _blocks: usize) {}
}
