//! The default policy: evicts the block whose stay earns the fewest hits per block-time, as learnt
//! from the pool's own past (see [`super::lifetimes`]). Three things set it apart from LRU:
//!
//! - **Classes.** Blocks are told apart by kind, by how often they were read, and by whether they end
//!   their request. A conversation read twice tends to come back; a partial last block hardly ever does.
//! - **Ghosts.** A block that returns after it was evicted goes on where it left off, and teaches
//!   how long blocks of its class really wait: without them a small cache never sees a long pause.
//! - **Prefixes.** An attention block with resident children stays: only leaves are candidates, so a
//!   chain shrinks from its end and what is left of it can still be read.
//!
//! Ages are relative to the pool's capacity, and what a class is worth is learnt while running. The few
//! constants were chosen with one production trace and some synthetic ones in view: `docs/design/eviction.md`.

#![expect(
    clippy::indexing_slicing,
    reason = "nodes are grown by insert(); class and epoch numbers are bounded by Lifetimes"
)]

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::ghosts::Ghosts;
use super::lifetimes::{CLASSES, CLASSES_PER_KIND, EPOCHS, Lifetime, Lifetimes, TICK_ACCESSES};
use super::links::Lists;
use super::{ANCESTORS_MAX, BlockIndex, EvictionKind, EvictionPolicy, NewBlock, Removal, Touch};

const NONE: u32 = u32::MAX;
/// Ghosts remembered for each block that fits: four bytes each; they reach pauses several times as long as LRU's.
const GHOSTS_PER_BLOCK: usize = 3;
/// The order of cells is worked out anew after this fraction of the pool was evicted.
const REORDERS_PER_CAPACITY: usize = 64;

#[derive(Clone, Copy)]
struct Node {
    parent: u32,
    children: u32,
    last_tick: u32,
    /// Tells a parent from a later block in the same place. A match by chance (1 in 65,536, and only
    /// after a deletion in the middle of a chain) lets a leaf look like one child too few.
    parent_birth: u16,
    birth: u16,
    /// Kind, and place among the kind's classes.
    class: u8,
    touches: u8,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Vacant,
    Resident,
    Held,
}

impl Node {
    fn kind(&self) -> usize {
        usize::from(self.class) / CLASSES_PER_KIND
    }

    fn needs_prefix(&self) -> bool {
        self.kind() == EvictionKind::Attention.ordinal()
    }
}

const VACANT: Node = Node {
    parent: NONE,
    children: 0,
    last_tick: 0,
    parent_birth: 0,
    birth: 0,
    class: 0,
    touches: 0,
    state: State::Vacant,
};

/// A cell (class and epoch) and what its blocks were worth when the order was worked out.
struct Candidate {
    worth: f32,
    cell: u32,
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Candidate {}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Candidate {
    /// The least worth is the greatest candidate.
    fn cmp(&self, other: &Self) -> Ordering {
        other.worth.total_cmp(&self.worth).then(other.cell.cmp(&self.cell))
    }
}

/// The learning policy; see the head of this file.
pub struct Hazard {
    nodes: Vec<Node>,
    births: u16,
    one_in: u64,
    lifetimes: Lifetimes,
    ghosts: Ghosts,
    /// One list per cell: the evictable blocks of a class that were last touched in an epoch.
    cells: Lists,
    order: BinaryHeap<Candidate>,
    /// Evictions until the order is worked out anew.
    order_good_for: usize,
    capacity: usize,
    /// One bit a kind.
    kinds_seen: u8,
}

impl Hazard {
    /// A policy for a pool of about `capacity_blocks`.
    pub fn new(capacity_blocks: usize) -> Self {
        Self::of_sample(capacity_blocks, 1)
    }

    /// A small model of such a policy: one block in `one_in` of a larger pool, and every access to it. It has room for
    /// `capacity_blocks` and learns as the larger one would.
    pub fn of_sample(capacity_blocks: usize, one_in: u64) -> Self {
        let mut policy = Self {
            nodes: Vec::new(),
            births: 0,
            one_in: one_in.max(1),
            lifetimes: Lifetimes::new(capacity_blocks, one_in),
            ghosts: Ghosts::default(),
            cells: Lists::new((CLASSES * EPOCHS) as u32),
            order: BinaryHeap::with_capacity(CLASSES * EPOCHS),
            order_good_for: 0,
            capacity: 0,
            kinds_seen: 0,
        };
        policy.set_capacity(capacity_blocks);
        policy
    }

    /// The class among those of the kind whose ordinal is `kind`.
    fn class_of(kind: usize, touches: u8, tail: bool) -> u8 {
        let within = if tail { 0 } else { usize::from(touches).clamp(1, CLASSES_PER_KIND - 1) };
        (kind * CLASSES_PER_KIND + within) as u8
    }

    fn life(&self, at: u32) -> Lifetime {
        let node = &self.nodes[at as usize];
        Lifetime { class: node.class, touches: node.touches, last_tick: node.last_tick }
    }

    fn begin_life(&mut self, at: u32, class: u8, touches: u8) {
        let life = self.lifetimes.start(class, touches);
        let node = &mut self.nodes[at as usize];
        (node.class, node.touches, node.last_tick) = (life.class, life.touches, life.last_tick);
    }

    fn cell_of(&self, at: u32) -> u32 {
        let life = self.life(at);
        (usize::from(life.class) * EPOCHS + self.lifetimes.place_of(life)) as u32
    }

    /// A new lifetime for a block whose last one was just accounted for.
    fn renew(&mut self, at: u32, class: u8, touches: u8) {
        let linked = self.cells.unlink(at);
        self.begin_life(at, class, touches);
        if linked {
            self.link(at);
        }
    }

    /// Links a block that may leave into its cell.
    fn link(&mut self, at: u32) -> Option<u32> {
        let node = &self.nodes[at as usize];
        let protected = node.children > 0 && node.needs_prefix();
        if node.state != State::Resident || protected || self.cells.is_linked(at) {
            return None;
        }
        let cell = self.cell_of(at);
        // What was touched just now is the youngest of its cell. What becomes a candidate later, because
        // its last child left, goes next, so that a chain shrinks as a whole.
        if self.lifetimes.is_newest(cell as usize % EPOCHS) {
            self.cells.push_front(cell, at);
        } else {
            self.cells.push_back(cell, at);
        }
        Some(cell)
    }

    fn parent_of(&self, at: u32) -> Option<u32> {
        let node = &self.nodes[at as usize];
        let parent = self.nodes.get(node.parent as usize)?;
        (parent.state != State::Vacant && parent.birth == node.parent_birth).then_some(node.parent)
    }

    /// A child left: its parent may have become a leaf, and then a candidate.
    fn lose_child(&mut self, parent: u32) {
        let node = &mut self.nodes[parent as usize];
        node.children = node.children.saturating_sub(1);
        if let Some(cell) = self.link(parent) {
            let (class, place) = (cell as usize / EPOCHS, cell as usize % EPOCHS);
            self.order.push(Candidate { worth: self.lifetimes.worth(class, self.lifetimes.age_of_place(place)), cell });
        }
    }

    /// A child arrived: the parent is no leaf, and not the end of its request.
    fn gain_child(&mut self, parent: u32) {
        self.nodes[parent as usize].children += 1;
        let node = self.nodes[parent as usize];
        if node.needs_prefix() {
            self.cells.unlink(parent);
        }
        let class = Self::class_of(node.kind(), node.touches, false);
        if class != node.class {
            self.lifetimes.close(self.life(parent));
            self.renew(parent, class, node.touches);
        }
    }

    fn advance(&mut self) {
        if self.lifetimes.advance() {
            while let Some(merge) = self.lifetimes.merge_one() {
                for class in 0..CLASSES {
                    let cell = |place: usize| (class * EPOCHS + place) as u32;
                    self.cells.prepend(cell(merge.into), cell(merge.from));
                }
            }
            self.order_good_for = 0;
        }
        if self.lifetimes.relearn_if_due() {
            self.order_good_for = 0;
        }
    }

    /// Classes of the kinds that were ever seen.
    fn used_classes(&self) -> impl Iterator<Item = usize> + use<> {
        let kinds = self.kinds_seen;
        (0..CLASSES).filter(move |class| kinds >> (class / CLASSES_PER_KIND) & 1 == 1)
    }

    fn reorder(&mut self) {
        self.order.clear();
        for (place, age) in self.lifetimes.places() {
            for class in self.used_classes() {
                let cell = (class * EPOCHS + place) as u32;
                if self.cells.back(cell).is_some() {
                    self.order.push(Candidate { worth: self.lifetimes.worth(class, age), cell });
                }
            }
        }
        self.order_good_for = (self.capacity / REORDERS_PER_CAPACITY).max(8);
    }
}

impl EvictionPolicy for Hazard {
    fn insert(&mut self, block: BlockIndex, new: NewBlock) {
        let at = block.0;
        self.cells.ensure(at);
        if self.nodes.len() <= at as usize {
            super::grow(&mut self.nodes, at as usize + 1, VACANT);
        }
        self.kinds_seen |= 1 << new.kind.ordinal();
        self.advance();
        let ghost = self.ghosts.take(new.key_hash, self.lifetimes.now_tick());
        if let Some(life) = ghost {
            self.lifetimes.end_by_hit(life);
        }
        let touches = ghost.map_or(1, |life| life.touches.saturating_add(1));
        self.births = self.births.wrapping_add(1);
        let parent = new
            .parent
            .map(|parent| parent.0)
            .filter(|parent| self.nodes.get(*parent as usize).is_some_and(|node| node.state != State::Vacant));
        self.nodes[at as usize] = Node {
            parent: parent.unwrap_or(NONE),
            parent_birth: parent.map_or(0, |parent| self.nodes[parent as usize].birth),
            birth: self.births,
            state: State::Resident,
            ..VACANT
        };
        self.begin_life(at, Self::class_of(new.kind.ordinal(), touches, new.tail), touches);
        if let Some(parent) = parent {
            self.gain_child(parent);
        }
        self.link(at);
    }

    fn touch(&mut self, block: BlockIndex, touch: Touch) {
        let mut at = block.0;
        if self.nodes.get(at as usize).is_none_or(|node| node.state == State::Vacant) {
            return;
        }
        if touch == Touch::Hit {
            self.advance();
            self.lifetimes.end_by_hit(self.life(at));
            let node = self.nodes[at as usize];
            let touches = node.touches.saturating_add(1);
            return self.renew(at, Self::class_of(node.kind(), touches, false), touches);
        }
        for _ in 0..ANCESTORS_MAX {
            self.lifetimes.close(self.life(at));
            let node = self.nodes[at as usize];
            self.renew(at, node.class, node.touches);
            match self.parent_of(at) {
                Some(parent) => at = parent,
                None => break,
            }
        }
    }

    fn remove(&mut self, block: BlockIndex, removal: Removal) {
        let at = block.0;
        if self.nodes.get(at as usize).is_none_or(|node| node.state == State::Vacant) {
            return;
        }
        let (life, parent) = (self.life(at), self.parent_of(at));
        self.cells.unlink(at);
        match removal {
            Removal::Dropped => self.lifetimes.close(life),
            Removal::Evicted { key_hash } => {
                let now_tick = self.lifetimes.now_tick();
                self.lifetimes.close(life);
                if let Some((remembered, forgotten)) = self.ghosts.insert(key_hash, life, now_tick) {
                    self.lifetimes.reopen(remembered);
                    forgotten.into_iter().for_each(|ghost| self.lifetimes.end_unknown(ghost));
                }
                self.order_good_for = self.order_good_for.saturating_sub(1);
            }
        }
        self.nodes[at as usize] = VACANT;
        if let Some(parent) = parent {
            self.lose_child(parent);
        }
    }

    fn hold(&mut self, block: BlockIndex, held: bool) {
        let at = block.0;
        let Some(node) = self.nodes.get_mut(at as usize).filter(|node| node.state != State::Vacant) else { return };
        node.state = if held { State::Held } else { State::Resident };
        if held {
            self.cells.unlink(at);
        } else {
            self.link(at);
            self.order_good_for = 0;
        }
    }

    fn victim(&mut self) -> Option<BlockIndex> {
        let mut fresh = self.order_good_for == 0;
        if fresh {
            self.reorder();
        }
        loop {
            while let Some(best) = self.order.peek() {
                match self.cells.back(best.cell) {
                    Some(at) => return Some(BlockIndex(at)),
                    None => self.order.pop(),
                };
            }
            if fresh {
                return None;
            }
            self.reorder();
            fresh = true;
        }
    }

    fn parent(&self, block: BlockIndex) -> Option<BlockIndex> {
        let node = self.nodes.get(block.0 as usize).filter(|node| node.state != State::Vacant);
        node.and_then(|_| self.parent_of(block.0)).map(BlockIndex)
    }

    /// As its class and age are worth now, against a block that was read just now, as often in all as its ghost says: that somebody
    /// hopes to read it is no read.
    fn outranks(&self, block: BlockIndex, key_hash: u64, kind: EvictionKind) -> bool {
        if self.nodes.get(block.0 as usize).is_none_or(|node| node.state == State::Vacant) {
            return false;
        }
        let cell = self.cell_of(block.0) as usize;
        let worth = self.lifetimes.worth(cell / EPOCHS, self.lifetimes.age_of_place(cell % EPOCHS));
        let touches = self.ghosts.touches_of(key_hash).unwrap_or(1);
        let newest = self.lifetimes.places().map(|(_, age)| age).min().unwrap_or_default();
        let class = Self::class_of(kind.ordinal(), touches, false);
        worth > self.lifetimes.worth(usize::from(class), newest)
    }

    fn set_capacity(&mut self, blocks: usize) {
        self.capacity = blocks;
        let whole = blocks as u64 * self.one_in;
        self.lifetimes.set_capacity(whole as usize);
        let now_tick = self.lifetimes.now_tick();
        let ticks = u32::try_from(whole / TICK_ACCESSES).unwrap_or(u32::MAX);
        for forgotten in self.ghosts.resize(blocks * GHOSTS_PER_BLOCK, ticks, now_tick) {
            self.lifetimes.end_unknown(forgotten);
        }
    }
}
