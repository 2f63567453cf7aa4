//! The baseline: least recently used.
//!
//! Definition: a request's blocks are touched from its last to its first, so that the root is the most
//! recent of them; the victim is the block touched longest ago. A request that stores the end of a chain
//! touches the whole chain. Hits and refreshes count alike.

use super::links::Lists;
use super::{ANCESTORS_MAX, BlockIndex, EvictionKind, EvictionPolicy, NewBlock, Removal, Touch};

const RECENCY: u32 = 0;
const NONE: u32 = u32::MAX;

/// A block's parent, and what tells it from a later block in the same place.
#[derive(Clone, Copy)]
struct Node {
    parent: u32,
    parent_birth: u32,
    /// 0 while there is no block here.
    birth: u32,
}

const VACANT: Node = Node { parent: NONE, parent_birth: 0, birth: 0 };

/// Least recently used.
pub struct Lru {
    lists: Lists,
    nodes: Vec<Node>,
    births: u32,
}

impl Lru {
    /// An empty policy.
    pub fn new() -> Self {
        Self { lists: Lists::new(1), nodes: Vec::new(), births: 0 }
    }

    fn node(&self, at: u32) -> Node {
        self.nodes.get(at as usize).copied().unwrap_or(VACANT)
    }

    fn move_to_front(&mut self, at: u32) {
        if self.lists.unlink(at) {
            self.lists.push_front(RECENCY, at);
        }
    }
}

impl Default for Lru {
    fn default() -> Self {
        Self::new()
    }
}

impl EvictionPolicy for Lru {
    fn insert(&mut self, block: BlockIndex, new: NewBlock) {
        let at = block.0;
        self.lists.ensure(at);
        if self.nodes.len() <= at as usize {
            super::grow(&mut self.nodes, at as usize + 1, VACANT);
        }
        self.births = self.births.wrapping_add(1).max(1);
        let parent = new.parent.map_or(NONE, |parent| parent.0);
        let node = Node { parent, parent_birth: self.node(parent).birth, birth: self.births };
        if let Some(place) = self.nodes.get_mut(at as usize) {
            *place = node;
        }
        self.lists.push_front(RECENCY, at);
    }

    fn touch(&mut self, block: BlockIndex, touch: Touch) {
        let mut node = self.node(block.0);
        if node.birth == 0 {
            return;
        }
        self.move_to_front(block.0);
        let ancestors = if touch == Touch::Refresh { ANCESTORS_MAX } else { 0 };
        for _ in 0..ancestors {
            let (at, parent) = (node.parent, self.node(node.parent));
            if parent.birth == 0 || parent.birth != node.parent_birth {
                break;
            }
            self.move_to_front(at);
            node = parent;
        }
    }

    fn remove(&mut self, block: BlockIndex, _removal: Removal) {
        if let Some(node) = self.nodes.get_mut(block.0 as usize) {
            *node = VACANT;
            self.lists.unlink(block.0);
        }
    }

    fn hold(&mut self, block: BlockIndex, held: bool) {
        if self.node(block.0).birth == 0 {
            return;
        }
        if held {
            self.lists.unlink(block.0);
        } else if !self.lists.is_linked(block.0) {
            self.lists.push_front(RECENCY, block.0);
        }
    }

    fn victim(&mut self) -> Option<BlockIndex> {
        self.lists.back(RECENCY).map(BlockIndex)
    }

    fn parent(&self, block: BlockIndex) -> Option<BlockIndex> {
        let node = self.node(block.0);
        let parent = self.node(node.parent);
        (node.birth != 0 && parent.birth != 0 && parent.birth == node.parent_birth).then_some(BlockIndex(node.parent))
    }

    /// What comes is always more recent than what is there.
    fn outranks(&self, _block: BlockIndex, _key_hash: u64, _kind: EvictionKind) -> bool {
        false
    }

    fn set_capacity(&mut self, _blocks: usize) {}
}
