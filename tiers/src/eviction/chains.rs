//! Chains: the blocks of a pool in runs. A run is the part of a chain, without a hole, that one request was the last to use: it
//! grows and shrinks at its end, the deepest block, and what a later request reads of it becomes part of that request's run. Owns
//! the blocks' places and the order in which runs were used; knows nothing of what a run is worth.
//!
//! A block whose child is there is never the end of a run that may shrink, so that no block outlives its parent.

#![expect(
    clippy::indexing_slicing,
    reason = "blocks are grown by insert(), runs by new_run(); links are kept between those that are there"
)]

use super::links::Lists;
use super::{ANCESTORS_MAX, BlockIndex, NewBlock, Origin};

pub(super) const NONE: u32 = u32::MAX;

const HELD: u8 = 1;
const TAIL: u8 = 2;
/// The block needs its prefix.
const NEEDS_PREFIX: u8 = 4;
/// The block needs a prefix that was not there when it came.
const ORPHAN: u8 = 8;
/// A request read the block since it came.
const READ: u8 = 16;
/// Blocks between it and its parent are on their way: it is deeper than its parent by more than one.
const AHEAD: u8 = 32;

#[derive(Clone, Copy)]
struct Node {
    /// `NONE`: there is no block here.
    run: u32,
    /// The next block of the run, deeper by one.
    down: u32,
    parent: u32,
    /// Children that need it, in whatever run.
    children: u32,
    /// Blocks before it in its chain, as far as they were there.
    depth: u32,
    /// Tells a parent from a later block in the same place. A match by chance (1 in 65,536, and only
    /// after a deletion in the middle of a chain) lets a leaf look like one child too few.
    parent_birth: u16,
    birth: u16,
    flags: u8,
    kind: u8,
    /// What a guard knows it by; `NONE` where it does not look at it.
    sample: u32,
    /// The next block before it that a guard looks at.
    sampled_up: u32,
}

const VACANT: Node = Node {
    run: NONE,
    down: NONE,
    parent: NONE,
    children: 0,
    depth: 0,
    parent_birth: 0,
    birth: 0,
    flags: 0,
    kind: 0,
    sample: NONE,
    sampled_up: NONE,
};

/// See [`Run::used`].
const BEFORE_ALL: u64 = 0;

/// A run's ends.
#[derive(Clone, Copy)]
struct Run {
    /// `NONE`: there is no run here.
    head: u32,
    end: u32,
    /// When it was last used, as a number in the order of uses; [`BEFORE_ALL`]: it has no beginning, whatever uses it.
    used: u64,
}

/// How a request got to the block that it read last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Reached {
    /// The run that ends with that block now.
    pub(super) run: u32,
    /// What was below it, where that was parted: a run of its own.
    pub(super) below: Option<u32>,
    /// The run is new; what was below it keeps the old one.
    pub(super) branched: bool,
}

/// A block that left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Left {
    pub(super) run: u32,
    /// The run has no block any more, and is no more.
    pub(super) run_is_gone: bool,
    /// The run whose end is a candidate since then, where it is another one.
    pub(super) parents_run: Option<u32>,
    /// A run that lost its beginning.
    pub(super) orphan: Option<u32>,
    /// What a guard knew it by.
    pub(super) sample: Option<u32>,
}

/// See [`Chains::own_run`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct NoBeginning;

/// See the head of this file.
pub(super) struct Chains {
    nodes: Vec<Node>,
    runs: Vec<Run>,
    free_runs: Vec<u32>,
    births: u16,
    uses: u64,
    /// Runs that may shrink, the one used last first; some that may not, which go when they are met.
    order: Lists,
    /// Runs of which a request took the last block along.
    absorbed: Vec<u32>,
    /// A block was dropped whose children are the heads of other runs.
    lost_beginnings: bool,
}

const ORDER: u32 = 0;
/// Places by which a run that may shrink again is looked for in the order of uses.
const PLACES_LOOKED: usize = 64;

impl Chains {
    pub(super) fn new() -> Self {
        Self {
            nodes: Vec::new(),
            runs: Vec::new(),
            free_runs: Vec::new(),
            births: 0,
            uses: BEFORE_ALL + 1,
            order: Lists::new(1),
            absorbed: Vec::new(),
            lost_beginnings: false,
        }
    }

    fn node(&self, at: u32) -> Option<&Node> {
        self.nodes.get(at as usize).filter(|node| node.run != NONE)
    }

    pub(super) fn is_there(&self, at: u32) -> bool {
        self.node(at).is_some()
    }

    /// The run of a block that is there.
    pub(super) fn run_of(&self, at: u32) -> Option<u32> {
        self.node(at).map(|node| node.run)
    }

    pub(super) fn end_of(&self, run: u32) -> u32 {
        self.runs[run as usize].end
    }

    pub(super) fn depth_of(&self, at: u32) -> u32 {
        self.nodes[at as usize].depth
    }

    /// Blocks of a run.
    pub(super) fn len_of(&self, run: u32) -> u32 {
        let run = self.runs[run as usize];
        self.nodes[run.end as usize].depth - self.nodes[run.head as usize].depth + 1
    }

    pub(super) fn is_tail(&self, at: u32) -> bool {
        self.nodes[at as usize].flags & TAIL != 0
    }

    pub(super) fn set_read(&mut self, at: u32) {
        self.nodes[at as usize].flags |= READ;
    }

    pub(super) fn was_read(&self, at: u32) -> bool {
        self.nodes[at as usize].flags & READ != 0
    }

    pub(super) fn set_sample(&mut self, at: u32, sample: u32) {
        self.nodes[at as usize].sample = sample;
    }

    /// What a guard knows the blocks of the chain up to `at` by, deepest first, as far as it looks at them.
    pub(super) fn sampled(&self, at: u32) -> impl Iterator<Item = u32> + '_ {
        let sampled = |at: u32| self.node(at).filter(|node| node.sample != NONE);
        let node = &self.nodes[at as usize];
        // Whatever is in the place of a block that was dropped: what is before a block is less deep, so that this ends.
        let up = move |of: &Node| sampled(of.sampled_up).filter(|up| up.depth < of.depth);
        let first = if node.sample == NONE { up(node) } else { Some(node) };
        std::iter::successors(first, move |node| up(node)).map(|node| node.sample)
    }

    pub(super) fn needs_prefix(&self, at: u32) -> bool {
        self.nodes[at as usize].flags & NEEDS_PREFIX != 0
    }

    pub(super) fn kind_of(&self, at: u32) -> usize {
        usize::from(self.nodes[at as usize].kind)
    }

    pub(super) fn parent_of(&self, at: u32) -> Option<u32> {
        let node = self.node(at)?;
        let parent = self.node(node.parent)?;
        // Whatever happens to be in a parent's place: a run's depths rise by one.
        let fits = node.flags & NEEDS_PREFIX == 0
            || parent.depth + 1 == node.depth
            || (node.flags & AHEAD != 0 && parent.depth < node.depth);
        (parent.birth == node.parent_birth && fits).then_some(node.parent)
    }

    fn new_run(&mut self, head: u32, end: u32) -> u32 {
        let run = Run { head, end, used: self.uses };
        if let Some(at) = self.free_runs.pop() {
            self.runs[at as usize] = run;
            return at;
        }
        let at = self.runs.len() as u32;
        super::grow(&mut self.runs, at as usize + 1, run);
        self.order.ensure(at);
        at
    }

    /// Frees the records of runs that are no more: the caller is through with them.
    pub(super) fn free_run(&mut self, run: u32) {
        self.order.unlink(run);
        self.runs[run as usize].head = NONE;
        if self.free_runs.len() == self.free_runs.capacity() {
            self.free_runs.reserve_exact(64.max(self.free_runs.len() / 8));
        }
        self.free_runs.push(run);
    }

    /// A run that a request took along whole, with whatever the caller knows of it; then [`Self::free_run`] it.
    pub(super) fn take_absorbed(&mut self) -> Option<u32> {
        self.absorbed.pop()
    }

    /// True where the run's end may leave.
    pub(super) fn may_shrink(&self, run: u32) -> bool {
        let end = &self.nodes[self.runs[run as usize].end as usize];
        end.flags & HELD == 0 && (end.children == 0 || end.flags & NEEDS_PREFIX == 0)
    }

    /// The run was used just now.
    pub(super) fn use_now(&mut self, run: u32) {
        if self.runs[run as usize].used == BEFORE_ALL {
            return self.list(run);
        }
        self.uses += 1;
        self.runs[run as usize].used = self.uses;
        self.order.unlink(run);
        self.order.push_front(ORDER, run);
    }

    /// A run that may shrink, perhaps since just now, is among those that do.
    pub(super) fn list(&mut self, run: u32) {
        if self.order.is_linked(run) || !self.may_shrink(run) {
            return;
        }
        let used = self.runs[run as usize].used;
        let mut after = self.order.back(ORDER);
        for _ in 0..PLACES_LOOKED {
            match after {
                Some(at) if self.runs[at as usize].used < used => after = self.order.before(at),
                _ => break,
            }
        }
        match after {
            Some(at) => self.order.insert_after(at, run),
            None => self.order.push_front(ORDER, run),
        }
    }

    /// The run counts as used before all others.
    pub(super) fn put_last(&mut self, run: u32) {
        self.runs[run as usize].used = BEFORE_ALL;
        self.order.unlink(run);
        self.list(run);
    }

    /// Of the runs that may shrink, the one that was used longest ago; not `but`.
    pub(super) fn oldest(&mut self, but: u32) -> Option<u32> {
        let mut at = self.order.back(ORDER);
        while let Some(run) = at {
            at = self.order.before(run);
            if !self.may_shrink(run) {
                self.order.unlink(run);
            } else if run != but {
                return Some(run);
            }
        }
        None
    }

    /// `at` becomes the end of `run`, as the child of its end; or the one block of a new run, `missing` blocks ahead of what is
    /// there of its chain.
    pub(super) fn insert(&mut self, at: u32, new: &NewBlock, run: Option<u32>, missing: u32) -> u32 {
        if self.nodes.len() <= at as usize {
            super::grow(&mut self.nodes, at as usize + 1, VACANT);
        }
        self.births = self.births.wrapping_add(1);
        let needs_prefix = new.kind.needs_prefix();
        let parent = match new.origin {
            Origin::After(parent) if self.is_there(parent.0) => Some(parent.0),
            _ => None,
        };
        let mut node = Node {
            birth: self.births,
            flags: if new.tail { TAIL } else { 0 } | if needs_prefix { NEEDS_PREFIX } else { 0 },
            kind: new.kind.ordinal() as u8,
            ..VACANT
        };
        if missing > 0 && needs_prefix {
            node.flags |= AHEAD;
            node.depth = missing;
        }
        if let Some(parent_at) = parent {
            let parent = &mut self.nodes[parent_at as usize];
            (node.parent, node.parent_birth) = (parent_at, parent.birth);
            if needs_prefix {
                parent.children += 1;
                parent.flags &= !TAIL;
                node.depth += parent.depth + 1;
                node.sampled_up = if parent.sample != NONE { parent_at } else { parent.sampled_up };
            }
        }
        if parent.is_none() && needs_prefix && new.origin != Origin::Root {
            node.flags |= ORPHAN;
        }
        match run {
            Some(run) => {
                let end = std::mem::replace(&mut self.runs[run as usize].end, at);
                self.nodes[end as usize].down = at;
                node.run = run;
            }
            None => node.run = self.new_run(at, at),
        }
        self.nodes[at as usize] = node;
        node.run
    }

    /// Makes `at`, which needs its prefix, the end of a run that has its ancestors, too. `goes_on` says whether what reads it is what
    /// used the run before, given the run and how many blocks of it are below `at`.
    pub(super) fn reach(&mut self, at: u32, goes_on: impl FnOnce(&Self, u32, u32) -> bool) -> Reached {
        let run = self.nodes[at as usize].run;
        let below = self.nodes[self.runs[run as usize].end as usize].depth - self.nodes[at as usize].depth;
        let goes_on = goes_on(self, run, below);
        let reached = if !goes_on {
            let new = self.new_run(NONE, at);
            if self.runs[run as usize].used == BEFORE_ALL {
                self.runs[new as usize].used = BEFORE_ALL;
            }
            self.move_up_to(at, new);
            Reached { run: new, below: None, branched: true }
        } else if below > 0 {
            Reached { run, below: Some(self.part_below(at)), branched: false }
        } else {
            Reached { run, below: None, branched: false }
        };
        self.gather(reached.run);
        reached
    }

    /// What is below `at` in its run becomes a run of its own, used when that was.
    fn part_below(&mut self, at: u32) -> u32 {
        let run = self.nodes[at as usize].run;
        let Run { end, used, .. } = self.runs[run as usize];
        let first = std::mem::replace(&mut self.nodes[at as usize].down, NONE);
        let new = self.new_run(first, end);
        self.runs[new as usize].used = used;
        let mut next = first;
        while next != NONE {
            self.nodes[next as usize].run = new;
            next = self.nodes[next as usize].down;
        }
        self.runs[run as usize].end = at;
        new
    }

    /// Moves `at` and what precedes it in its run to the front of `to`, whose head is its child, or to an empty one.
    fn move_up_to(&mut self, at: u32, to: u32) {
        let from = self.nodes[at as usize].run;
        let head = self.runs[from as usize].head;
        let rest = self.nodes[at as usize].down;
        let mut next = at;
        loop {
            self.nodes[next as usize].run = to;
            if next == head {
                break;
            }
            next = self.nodes[next as usize].parent;
        }
        self.nodes[at as usize].down = std::mem::replace(&mut self.runs[to as usize].head, head);
        if rest == NONE {
            self.order.unlink(from);
            self.absorbed.push(from);
        } else {
            self.runs[from as usize].head = rest;
        }
    }

    /// The ancestors of a run, as many as one call may move, become part of it.
    fn gather(&mut self, run: u32) {
        let mut moves = ANCESTORS_MAX as u32;
        loop {
            let head = self.runs[run as usize].head;
            // A block that stands for itself begins a run, whatever is before it; and so does one that came ahead of its chain.
            let goes_up = self.needs_prefix(head) && !self.is_ahead(head);
            let Some(parent) = self.parent_of(head).filter(|_| goes_up) else { break };
            let from = self.nodes[parent as usize].run;
            let blocks =
                self.nodes[parent as usize].depth - self.nodes[self.runs[from as usize].head as usize].depth + 1;
            if from == run || blocks > moves {
                break;
            }
            moves -= blocks;
            self.move_up_to(parent, run);
        }
    }

    /// Moves the blocks of a run from its head up to `at` behind the end of `to`, which is before that head. True where nothing is left
    /// of the run: then [`Self::free_run`] it.
    pub(super) fn append(&mut self, at: u32, to: u32) -> bool {
        let from = self.nodes[at as usize].run;
        let (head, rest) = (self.runs[from as usize].head, self.nodes[at as usize].down);
        let mut next = head;
        while next != rest {
            self.nodes[next as usize].run = to;
            next = self.nodes[next as usize].down;
        }
        self.nodes[at as usize].down = NONE;
        let end = std::mem::replace(&mut self.runs[to as usize].end, at);
        self.nodes[end as usize].down = head;
        if rest == NONE {
            self.order.unlink(from);
            return true;
        }
        self.runs[from as usize].head = rest;
        false
    }

    /// True where blocks before `at` are on their way.
    pub(super) fn is_ahead(&self, at: u32) -> bool {
        self.nodes[at as usize].flags & AHEAD != 0
    }

    /// `at` came, which is before `follower`: that one came ahead of it, and heads a run, which is returned.
    pub(super) fn link(&mut self, at: u32, follower: u32) -> Option<u32> {
        let (parent, node) = (*self.node(at)?, *self.node(follower)?);
        let is_head = self.runs[node.run as usize].head == follower;
        if node.flags & AHEAD == 0 || !is_head || node.run == parent.run || parent.depth >= node.depth {
            return None;
        }
        if let Some(before) = self.parent_of(follower) {
            let before = &mut self.nodes[before as usize];
            before.children = before.children.saturating_sub(1);
        }
        let parent = &mut self.nodes[at as usize];
        parent.children += 1;
        parent.flags &= !TAIL;
        let (birth, depth, sample) = (parent.birth, parent.depth, parent.sample);
        let child = &mut self.nodes[follower as usize];
        (child.parent, child.parent_birth) = (at, birth);
        if depth + 1 == child.depth {
            child.flags &= !AHEAD;
        }
        if sample != NONE {
            self.set_sampled_up(follower, at);
        }
        Some(node.run)
    }

    /// Of the run that `first` heads, all up to the first that a guard looks at.
    fn set_sampled_up(&mut self, first: u32, sampled_up: u32) {
        let mut next = first;
        while next != NONE {
            let node = &mut self.nodes[next as usize];
            node.sampled_up = sampled_up;
            next = if node.sample == NONE { node.down } else { NONE };
        }
    }

    /// A block that heads nothing else goes before the head of `to`, which follows it.
    pub(super) fn prepend(&mut self, at: u32, to: u32) {
        self.move_up_to(at, to);
    }

    /// The block before a run's head.
    pub(super) fn before_run(&self, run: u32) -> Option<u32> {
        self.parent_of(self.runs[run as usize].head)
    }

    /// `at` leaves, wherever in its run it is.
    pub(super) fn remove(&mut self, at: u32) -> Option<Left> {
        let node = *self.node(at)?;
        let run = node.run;
        let Run { head, end, .. } = self.runs[run as usize];
        let mut left = Left {
            run,
            run_is_gone: false,
            parents_run: None,
            orphan: None,
            sample: Some(node.sample).filter(|sample| *sample != NONE),
        };
        let parent = self.parent_of(at);
        if at == end && at == head {
            left.run_is_gone = true;
            self.order.unlink(run);
        } else if at == end {
            let parent = node.parent;
            self.nodes[parent as usize].down = NONE;
            self.runs[run as usize].end = parent;
        } else if at == head {
            self.runs[run as usize].head = node.down;
            left.orphan = Some(run);
        } else {
            left.orphan = Some(self.part_below(at));
            let parent = node.parent;
            self.nodes[parent as usize].down = NONE;
            self.runs[run as usize].end = parent;
        }
        let in_run = u32::from(node.down != NONE);
        self.lost_beginnings |= node.flags & NEEDS_PREFIX != 0 && node.children > in_run;
        self.nodes[at as usize] = VACANT;
        if let Some(parent) = parent.filter(|_| node.flags & NEEDS_PREFIX != 0) {
            let parent = &mut self.nodes[parent as usize];
            let next = parent.parent;
            parent.children = parent.children.saturating_sub(1);
            left.parents_run = Some(parent.run).filter(|of| *of != run);
            // A prefix leaves from its end: this one is next but one.
            if let Some(next) = self.nodes.get(next as usize) {
                kvstore_plane::prefetch(next);
            }
        }
        Some(left)
    }

    /// True once after a block was dropped whose children head other runs.
    pub(super) fn take_lost_beginnings(&mut self) -> bool {
        std::mem::take(&mut self.lost_beginnings)
    }

    /// Places of runs, some of them empty.
    pub(super) fn run_places(&self) -> std::ops::Range<u32> {
        0..self.runs.len() as u32
    }

    /// True where the run is there and has no beginning: its head lost its parent, or came without.
    pub(super) fn has_no_beginning(&self, run: u32) -> bool {
        let Some(head) = self.runs.get(run as usize).map(|run| run.head).filter(|head| *head != NONE) else {
            return false;
        };
        let node = &self.nodes[head as usize];
        // What is ahead of its chain's first block never had a parent.
        let had_parent = node.depth > 0 && (node.flags & AHEAD == 0 || node.parent != NONE);
        node.flags & ORPHAN != 0 || (had_parent && self.parent_of(head).is_none())
    }

    /// A request read `at`, and `child` behind it: where what was before `child` had left, `at` is that again. The run of `child` then,
    /// which has its beginning again.
    pub(super) fn adopt(&mut self, at: u32, child: u32) -> Option<u32> {
        let (parent, node) = (*self.node(at)?, *self.node(child)?);
        let lost = node.flags & NEEDS_PREFIX != 0 && node.depth > 0 && self.parent_of(child).is_none();
        if !lost || parent.flags & NEEDS_PREFIX == 0 || parent.depth + 1 != node.depth {
            return None;
        }
        self.nodes[at as usize].children += 1;
        let child = &mut self.nodes[child as usize];
        (child.parent, child.parent_birth) = (at, parent.birth);
        self.order.unlink(node.run);
        if !self.has_no_beginning(node.run) {
            self.uses += 1;
            self.runs[node.run as usize].used = self.uses;
        }
        Some(node.run)
    }

    /// The run that a block comes behind, where that is there. `Err`: nothing precedes it, though something should; nobody can read it,
    /// and it takes room from nothing.
    pub(super) fn own_run(&self, incoming: Option<&NewBlock>) -> Result<Option<u32>, NoBeginning> {
        let Some(incoming) = incoming else { return Ok(None) };
        match incoming.origin {
            Origin::Absent if incoming.kind.needs_prefix() => Err(NoBeginning),
            Origin::After(parent) => match self.run_of(parent.0) {
                Some(run) if incoming.kind.needs_prefix() && self.has_no_beginning(run) => Err(NoBeginning),
                run => Ok(run),
            },
            Origin::Root | Origin::Absent => Ok(None),
        }
    }

    pub(super) fn hold(&mut self, at: u32, held: bool) -> Option<u32> {
        let run = self.run_of(at)?;
        let node = &mut self.nodes[at as usize];
        node.flags = if held { node.flags | HELD } else { node.flags & !HELD };
        Some(run)
    }

    pub(super) fn parent(&self, block: BlockIndex) -> Option<BlockIndex> {
        self.parent_of(block.0).filter(|_| !self.is_ahead(block.0)).map(BlockIndex)
    }

    /// The block before `block` in its run, where only `block` follows it and nothing holds it.
    pub(super) fn before_victim(&self, block: BlockIndex) -> Option<BlockIndex> {
        let node = self.node(block.0).filter(|node| node.flags & (NEEDS_PREFIX | AHEAD) == NEEDS_PREFIX)?;
        let at = self.parent_of(block.0)?;
        let parent = self.node(at)?;
        let alone = parent.children == 1 && parent.run == node.run && parent.flags & HELD == 0;
        alone.then_some(BlockIndex(at))
    }
}
