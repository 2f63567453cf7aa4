//! The stack of tiers: memory, and the tiers below it, fast to slow. Decides what moves between them, when, and from where; the
//! tiers move the bytes.
//!
//! - `promote`: a block comes into memory from the fastest tier that gives it. One flight serves all who ask.
//! - `run`: the blocks of a call come in a window, ahead of the one that is used.
//! - `demote`: a copy is offered to the tiers below: is it there? is it worth it? is there room? then it is written.
//! - `admit`: what is worth a write, by namespace and tier.
//! - `room`: calls wait while too much has yet to be written.
//! - `hold`: pins and tickets keep blocks in the tiers that have them.
//! - `delete`: blocks leave every tier, and no crash brings them back.
//!
//! Knows no wire and no configuration file; time is told by the clock that it is given.

pub mod admit;
mod delete;
mod demote;
mod hold;
mod promote;
mod room;
mod run;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::below::{Ask, Below, Known, Searching};
use crate::block::{BlockRef, Run};
use crate::clock::BootTime;
use crate::host::{HostTier, NamespaceId};
use crate::tier::{Tier, TierSet};

pub use admit::{Admission, AdmissionRules, NamespaceRules, Occasion};
pub use delete::Deleted;
pub use demote::{Copies, Copy};
pub use hold::{Found, HoldRefused, Taken, Term};
pub use promote::{Batch, Coming, Promotion};
pub use room::{Level, Wish};
pub use run::{Asked, Policy, Window};

/// A tier below memory.
struct Lower {
    tier: Tier,
    store: Arc<dyn Below>,
}

/// See the head of this file. Shared by `Arc`.
pub struct Stack {
    host: Arc<HostTier>,
    /// Fast to slow.
    below: Vec<Lower>,
    admitter: Mutex<admit::Admitter>,
    /// A promotion ended.
    landed: Notify,
    /// Blocks that were not worth a write, or beyond its budget.
    not_admitted: AtomicU64,
    clock: fn() -> BootTime,
}

impl Stack {
    /// Memory, and the tiers below it, fast to slow. Everything is admitted until [`Self::set_rules`] says otherwise.
    pub fn new(
        host: &Arc<HostTier>,
        below: impl IntoIterator<Item = (Tier, Arc<dyn Below>)>,
        clock: fn() -> BootTime,
    ) -> Arc<Self> {
        Arc::new(Self {
            host: Arc::clone(host),
            below: below.into_iter().map(|(tier, store)| Lower { tier, store }).collect(),
            admitter: Mutex::new(admit::Admitter::new(clock())),
            landed: Notify::new(),
            not_admitted: AtomicU64::new(0),
            clock,
        })
    }

    /// True where there is this tier below memory.
    pub fn has(&self, tier: Tier) -> bool {
        self.lower(tier).is_some()
    }

    /// True where there is any tier below memory.
    pub fn has_below(&self) -> bool {
        !self.below.is_empty()
    }

    fn lower(&self, tier: Tier) -> Option<&Lower> {
        self.below.iter().find(|lower| lower.tier == tier)
    }

    /// In which tiers below memory each block of a run is, as far as they know.
    pub fn below(&self, run: &Run<'_>, ask: Ask) -> Vec<TierSet> {
        let mut found = vec![TierSet::NONE; run.hashes.len()];
        for lower in &self.below {
            lower.store.presence(run, ask).add_to(lower.tier, &mut found);
        }
        found
    }

    /// Looks for what is not known of a run in tiers that can be searched; each search ends by itself.
    pub fn search(&self, run: &Run<'_>) -> Vec<Searching> {
        // No tier has chunks that it does not know of: they are in the bucket under names of their own.
        if run.layout.is_of_chunks(run.group) {
            return Vec::new();
        }
        let now = (self.clock)();
        self.below.iter().filter_map(|lower| lower.store.presence(run, Ask::Search(now)).searching).collect()
    }

    /// The fastest tier below memory that has a block, but for those in `but`.
    fn source(&self, block: &BlockRef<'_>, but: TierSet) -> Option<&Lower> {
        let has = |lower: &&Lower| !but.has(lower.tier) && lower.has(block, Ask::Look);
        self.below.iter().find(has)
    }

    /// True where a tier below memory has a block, or is about to.
    pub fn will_have(&self, block: &BlockRef<'_>) -> bool {
        self.below.iter().any(|lower| lower.has(block, Ask::Coming))
    }

    /// Blocks that were not written below, because they were not worth it or beyond the budget.
    pub fn not_admitted(&self) -> u64 {
        self.not_admitted.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// By these rules copies are admitted from now on.
    pub fn set_rules(&self, rules: AdmissionRules) {
        let now = (self.clock)();
        self.admitter.lock().set(rules, now);
    }

    /// Which blocks of a namespace go to a tier; none where there is no such tier.
    pub fn admission(&self, namespace: NamespaceId, tier: Tier) -> Admission {
        match self.has(tier) {
            true => self.admitter.lock().admission(namespace, tier),
            false => Admission::Asked,
        }
    }
}

impl Lower {
    fn has(&self, block: &BlockRef<'_>, ask: Ask) -> bool {
        let run = Run { layout: block.layout, group: block.group, hashes: &[block.hash] };
        self.store.presence(&run, ask).there == [true]
    }
}

impl Known {
    fn add_to(&self, tier: Tier, found: &mut [TierSet]) {
        for (found, there) in found.iter_mut().zip(&self.there) {
            if *there {
                *found = found.with(tier);
            }
        }
    }
}
