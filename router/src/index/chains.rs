//! Chains: who is whose child, and which holders have a chain with a hole in it.
//!
//! A look-up does not visit every block of a chain: it looks at a few, and takes what lies between for granted (`find.rs`). That is
//! right for a holder that has, with each block, its parent. The writer keeps track of who does not: a block with its child's name,
//! or, where it has several, a list of them; and for each holder the blocks that it lacks while it has a child of them. A holder
//! with such holes is walked through, block by block.

use std::collections::{HashMap, HashSet};

use super::cells::Cells;
use super::table::{At, BRANCHES, NO_CHILD, Table};
use crate::caps;
use crate::sync::{AtomicU64, Ordering};

/// A block that a holder lacks, and children of it that it has.
struct Hole {
    key: u64,
    children: Vec<u64>,
}

impl Hole {
    /// There were too many to remember which.
    const ANY: Self = Self { key: 0, children: Vec::new() };

    fn is_any(&self) -> bool {
        self.key == 0 && self.children.is_empty()
    }
}

/// The children of one block.
#[derive(Default)]
struct Branches {
    children: HashSet<u64>,
    /// Where it has grown to this, those that are nowhere any more are dropped.
    most: usize,
}

/// The writer's part.
#[derive(Default)]
pub struct Chains {
    /// Children of blocks with more than one.
    branches: HashMap<u64, Branches>,
    /// By tag.
    holes: HashMap<u16, Vec<Hole>>,
    /// Tags whose holes are being changed.
    changing: Vec<u16>,
}

/// Children that are not looked through.
const FEW: usize = 8;

/// By tag: how many holes its holder has (lower half), and how often that changed: odd while the writer is about it.
pub struct HoleCounts(Box<[AtomicU64]>);

/// What a reader saw of a holder's holes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Holes(u64);

impl Holes {
    /// The holder has, with each block, its parent.
    pub fn is_closed(self) -> bool {
        self.0 as u32 == 0 && self.is_still()
    }

    /// Nothing was being changed.
    pub fn is_still(self) -> bool {
        (self.0 >> 32).is_multiple_of(2)
    }
}

impl HoleCounts {
    pub fn new() -> Self {
        Self((0..caps::HOLDERS_MAX).map(|_| AtomicU64::new(0)).collect())
    }

    /// A holder's holes now. What a reader found out about the holder holds where this was the same before and after.
    pub fn of(&self, tag: u16) -> Holes {
        Holes(self.0.get(usize::from(tag)).map_or(1 << 32, |word| word.load(Ordering::Acquire)))
    }

    fn set(&self, tag: u16, count: usize, versions: u64) {
        if let Some(word) = self.0.get(usize::from(tag)) {
            let version = (word.load(Ordering::Relaxed) >> 32).wrapping_add(versions);
            word.store(version << 32 | count as u64, Ordering::Release);
        }
    }
}

/// What the writer has at hand.
#[derive(Clone, Copy)]
pub struct Of<'a> {
    pub table: &'a Table,
    pub cells: &'a Cells,
    pub counts: &'a HoleCounts,
}

impl Of<'_> {
    fn has(&self, key: u64, tag: u16) -> bool {
        self.table.find(key).is_some_and(|at| self.cells.has(at.set(), key, tag))
    }

    fn is_there(&self, key: u64) -> bool {
        self.table.find(key).is_some()
    }
}

impl Chains {
    /// Bytes of the lists, about.
    pub fn bytes(&self) -> u64 {
        let children: usize = self.holes.values().flatten().map(|hole| hole.children.len()).sum();
        // Places in the map, and the smallest set of each; larger ones are of few blocks.
        let branches = self.branches.capacity() as u64 * (8 + 1 + size_of::<Branches>() as u64 + 4 * 8);
        branches + children as u64 * 8
    }

    /// `key` is a child of the block at `parent`.
    pub fn link(&mut self, of: Of<'_>, parent: &At, key: u64) {
        let known = of.table.child(parent);
        // A name that looks like one of the two words is listed.
        let is_plain = key != NO_CHILD && key != BRANCHES;
        if known == key && is_plain {
            return;
        }
        if is_plain && (known == NO_CHILD || (known != BRANCHES && !of.is_there(known))) {
            of.table.set_child(parent, key);
            return;
        }
        let branches = self.branches.entry(parent.key()).or_default();
        if known != BRANCHES {
            if known != NO_CHILD {
                branches.children.insert(known);
            }
            of.table.set_child(parent, BRANCHES);
        }
        branches.children.insert(key);
        if branches.children.len() > branches.most.max(FEW) {
            branches.children.retain(|child| of.is_there(*child));
            branches.most = 2 * branches.children.len();
        }
    }

    /// The block is nowhere any more.
    pub fn forget(&mut self, of: Of<'_>, at: &At) {
        if of.table.child(at) == BRANCHES {
            self.branches.remove(&at.key());
        }
    }

    fn children(&self, of: Of<'_>, at: &At) -> Vec<u64> {
        match of.table.child(at) {
            NO_CHILD => Vec::new(),
            BRANCHES => {
                let branches = self.branches.get(&at.key());
                branches.map(|branches| branches.children.iter().copied().collect()).unwrap_or_default()
            }
            child => vec![child],
        }
    }

    /// A holder is about to lose a block: where it has a child of it that does not leave with it, that is a hole. To be told before
    /// the block is gone. `leaves`: names that leave with it.
    pub fn loses(&mut self, of: Of<'_>, at: &At, tag: u16, leaves: impl Fn(u64) -> bool) {
        let stays = |child: &u64| !leaves(*child) && of.has(*child, tag);
        let link = of.table.child(at);
        if link == NO_CHILD || (link != BRANCHES && !stays(&link)) {
            return;
        }
        let children: Vec<u64> = self.children(of, at).into_iter().filter(stays).collect();
        if !children.is_empty() {
            self.add_hole(of, tag, Hole { key: at.key(), children });
        }
    }

    /// A holder is about to have a block without its parent.
    pub fn lacks(&mut self, of: Of<'_>, tag: u16, parent: u64, key: u64) {
        self.add_hole(of, tag, Hole { key: parent, children: vec![key] });
    }

    fn add_hole(&mut self, of: Of<'_>, tag: u16, hole: Hole) {
        let holes = self.holes.entry(tag).or_default();
        match holes.iter_mut().find(|known| known.key == hole.key) {
            Some(known) => {
                known.children.extend(hole.children);
                known.children.sort_unstable();
                known.children.dedup();
            }
            None => holes.push(hole),
        }
        let count = holes.len();
        // Too many to remember which: it is walked through until it starts anew.
        if holes.len() > caps::HOLES_MAX {
            *holes = vec![Hole::ANY];
        }
        self.changed(of, tag, count);
    }

    fn changed(&mut self, of: Of<'_>, tag: u16, count: usize) {
        let first = !self.changing.contains(&tag);
        if first {
            self.changing.push(tag);
        }
        of.counts.set(tag, count, u64::from(first));
    }

    /// An event is over: readers may rely on what they see again.
    pub fn end_changes(&mut self, of: Of<'_>) {
        for tag in self.changing.drain(..) {
            let count = self.holes.get(&tag).map_or(0, Vec::len);
            of.counts.set(tag, count, 1);
        }
    }

    /// A holder has a block now that it may have lacked, or lost one that was a child of one.
    pub fn settle(&mut self, of: Of<'_>, tag: u16) {
        let Some(mut holes) = self.holes.remove(&tag) else { return };
        for hole in holes.iter_mut().filter(|hole| !hole.is_any()) {
            hole.children.retain(|child| of.has(*child, tag));
            // Filled: from now on its block knows these children, as it was stored without them.
            if let Some(at) = of.table.find(hole.key).filter(|at| of.cells.has(at.set(), at.key(), tag)) {
                hole.children.drain(..).for_each(|child| self.link(of, &at, child));
            }
        }
        holes.retain(|hole| hole.is_any() || !hole.children.is_empty());
        let count = holes.len();
        if !holes.is_empty() {
            self.holes.insert(tag, holes);
        }
        self.changed(of, tag, count);
    }

    /// Holders that lack something.
    pub fn holed(&self) -> usize {
        self.holes.len()
    }

    /// True where a holder lacks something that it should have.
    pub fn has_holes(&self, tag: u16) -> bool {
        self.holes.contains_key(&tag)
    }

    /// The tag means another holder from now on, or none.
    pub fn start_anew(&mut self, of: Of<'_>, tag: u16) {
        if self.holes.remove(&tag).is_some() {
            of.counts.set(tag, 0, 2);
        }
    }
}
