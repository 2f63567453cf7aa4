//! The prefix index: which holders have how much of a chain of blocks.
//!
//! A *holder* is a place that blocks lie in: the memory of an engine, a tier of a node, the bucket of all. A block is named by its
//! sequence hash, which names its whole prefix. There are two forms under one face:
//!
//! - **Runs** (`runs/`), for engines: blocks lie one behind the other as they were stored, and who has which part of a run is said once.
//!   A session that adds a few blocks to thousands costs what the few cost, and a look-up passes the thousands in a few looks.
//! - **Flat** (`flat/`), for tiers of nodes, whose blocks come and go one by one in any order: a table from a block to its holders.
//!
//! Both hold the same promises:
//!
//! - **One writer at a time, readers never wait.** What changes under a reader's eyes is read again, a few times, and then counts as not
//!   there: the index may miss a block in a race, and never makes one up.
//! - Removal in the middle of a chain is what it is: the chain is that long for that holder, and long again once the block is back. Nothing is
//!   kept of blocks that have no holder.
//! - **A holder that leaves** is gone at once: its tag is dead. Its blocks are swept a unit with each later event; a tag is given
//!   out again only after that, and never to somebody whom a reader that began before could take for the old one.
//! - **The bound** in bytes holds at every moment. Where it is reached, blocks go that nobody looked up since the hand passed them twice
//!   (CLOCK).

#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a failure in a test is a failed test"))]

mod apart;
pub mod caps;
mod flat;
mod group;
mod holders;
mod lanes;
mod mix;
pub mod names;
mod prefetch;
mod runs;
mod slab;
mod sync;

pub use holders::HolderId;
pub use runs::UnknownParent;

use crate::flat::Flat;
use crate::runs::Runs;
use crate::sync::Ordering;

/// How much of a chain a holder has: its first `blocks` blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct Match {
    /// Who.
    pub holder: HolderId,
    /// At least one.
    pub blocks: u32,
}

/// There are as many holders as there may be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the index has {} holders, which is the most it supports", caps::HOLDERS_MAX)]
pub struct TooManyHolders;

/// What an index holds now, and what became of the rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IndexStatus {
    /// Blocks.
    pub blocks: u64,
    /// Pairs of a block and a holder, those of holders that left and are yet to be swept included.
    pub pairs: u64,
    /// Bytes of memory.
    pub bytes: u64,
    /// The bound on that.
    pub bytes_max: u64,
    /// Blocks that were given up at the bound.
    pub evicted: u64,
    /// Pairs that found no room.
    pub refused: u64,
}

/// See the head of this file. Shared by reference.
pub struct PrefixIndex(Form);

enum Form {
    Runs(Box<Runs>),
    Flat(Box<Flat>),
}

macro_rules! of_form {
    ($index:expr, $form:ident => $what:expr) => {
        match &$index.0 {
            Form::Runs($form) => $what,
            Form::Flat($form) => $what,
        }
    };
}

impl PrefixIndex {
    /// An empty index that takes `bytes_max` bytes at most, and 1 MiB at least: of chains of blocks that the router can name.
    pub fn new(bytes_max: u64) -> Self {
        Self(Form::Runs(Box::new(Runs::new(bytes_max, false))))
    }

    /// The same, of blocks that engines name by hashes of their own, too.
    pub fn with_opaque_names(bytes_max: u64) -> Self {
        Self(Form::Runs(Box::new(Runs::new(bytes_max, true))))
    }

    /// The same, of blocks that come and go one by one, in any order.
    pub fn of_single_blocks(bytes_max: u64) -> Self {
        Self(Form::Flat(Box::new(Flat::new(bytes_max))))
    }

    /// A holder without blocks.
    pub fn add_holder(&self) -> Result<HolderId, TooManyHolders> {
        of_form!(self, form => form.add_holder())
    }

    /// The holder has no blocks any more: it restarted, or lost them all. Costs nothing; what it had is swept later.
    pub fn clear(&self, holder: HolderId) {
        of_form!(self, form => form.clear(holder));
    }

    /// The holder is no more.
    pub fn remove_holder(&self, holder: HolderId) {
        of_form!(self, form => form.remove_holder(holder));
    }

    /// The holder has these blocks now: in the order of their chain, but for an index of single blocks.
    pub fn store(&self, holder: HolderId, names: &[u64]) {
        self.store_behind(holder, None, names);
    }

    /// The same of blocks that stand behind the block `parent`, where there is one: a chain that goes on is looked up faster.
    pub fn store_behind(&self, holder: HolderId, parent: Option<u64>, names: &[u64]) {
        match &self.0 {
            Form::Runs(runs) => runs.store(holder, parent, names),
            Form::Flat(flat) => flat.store(holder, names),
        }
    }

    /// The holder does not have these blocks any more.
    pub fn remove(&self, holder: HolderId, names: &[u64]) {
        of_form!(self, form => form.remove(holder, names));
    }

    /// The holder stored a run of blocks behind `parent`: of each the engine's hash, and the hash of its tokens. Of an index with engines'
    /// names.
    pub fn store_opaque(
        &self,
        holder: HolderId,
        domain: u64,
        parent: Option<u64>,
        blocks: &[(u64, u64)],
    ) -> Result<(), UnknownParent> {
        match &self.0 {
            Form::Runs(runs) => runs.store_opaque(holder, domain, parent, blocks),
            Form::Flat(_) => Ok(()),
        }
    }

    /// The holder does not have these blocks any more, named by the engine.
    pub fn remove_opaque(&self, holder: HolderId, domain: u64, hashes: &[u64]) {
        if let Form::Runs(runs) = &self.0 {
            runs.remove_opaque(holder, domain, hashes);
        }
    }

    /// How much of a chain each holder has, those that have the first block at all, the longest first. `names`: of a prompt's
    /// blocks, in order. Never waits.
    pub fn find(&self, names: &[u64], matches: &mut Vec<Match>) {
        of_form!(self, form => form.find(names, matches));
    }

    /// The same of a chain whose names are yet to be worked out, from its blocks' own hashes ([`names::tokens_hash`]): no more of them
    /// than somebody has, and some.
    pub fn find_tokens(&self, tokens_hashes: &[u64], matches: &mut Vec<Match>) {
        of_form!(self, form => form.find_tokens(tokens_hashes, matches));
    }

    /// Tells `visit` of each block of `names` who has it, in order, until it says false. Never waits; a block that changes meanwhile may
    /// be missed. An index with engines' names may miss blocks of a chain whose beginning is not among `names`.
    pub fn each(&self, names: &[u64], visit: impl FnMut(usize, &[HolderId]) -> bool) {
        of_form!(self, form => form.each(names, visit));
    }

    /// Which of these blocks the holder has.
    pub fn has(&self, holder: HolderId, names: &[u64]) -> Vec<bool> {
        let mut has = Vec::with_capacity(names.len());
        self.each(names, |_, holders| {
            has.push(holders.contains(&holder));
            true
        });
        has
    }

    /// Which of these blocks the holder has, named by the engine.
    pub fn has_opaque(&self, holder: HolderId, domain: u64, hashes: &[u64]) -> Vec<bool> {
        match &self.0 {
            Form::Runs(runs) => runs.has_opaque(holder, domain, hashes),
            Form::Flat(_) => vec![false; hashes.len()],
        }
    }

    /// The index at this moment.
    pub fn status(&self) -> IndexStatus {
        of_form!(self, form => form.status())
    }
}

/// The order of what readers see: a name, then what is said of it, then the name again.
const READ: Ordering = Ordering::Acquire;
const WRITE: Ordering = Ordering::Release;

#[cfg(test)]
mod tests;
