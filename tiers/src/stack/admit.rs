//! Admission: which copies go to which tier. It follows the rules of the namespace, how often a block was asked for and what it
//! costs to compute again; and, for disks, a budget of bytes to write.

use kvstore_plane::SequenceHash;

use crate::admission::{Depths, Frequencies, Worth, WriteBudget, recompute_cost};
use crate::block::{BlockRef, block_name};
use crate::clock::BootTime;
use crate::host::{NamespaceId, RegisteredLayout};
use crate::tier::Tier;

pub use crate::admission::Admission;

/// What holds for a namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NamespaceRules {
    /// Which blocks go to disk.
    pub nvme: Admission,
    /// Which go to the bucket.
    pub object: Admission,
    /// What is read from the bucket goes to disk once this many requests asked for it.
    pub promote_after: u8,
}

impl Default for NamespaceRules {
    fn default() -> Self {
        Self { nvme: Admission::All, object: Admission::Asked, promote_after: 1 }
    }
}

/// What holds for all.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct AdmissionRules {
    /// By namespace, in the order of their numbers.
    pub namespaces: Vec<NamespaceRules>,
    /// Requests that make a block reused.
    pub reused_after: u8,
    /// Some rule asks how many requests asked for a block.
    pub counts: bool,
    /// Bytes a day that may be written to disk; `None`: any.
    pub write_budget: Option<u64>,
}

/// On what occasion a block may be copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Occasion {
    /// It was stored just now.
    Stored,
    /// It was asked for, and is in memory.
    AskedFor,
    /// It was read from a slower tier.
    Promoted,
    /// It is to leave memory.
    Leaving,
    /// Somebody demands it there.
    Must,
}

/// See the head of this file.
pub(super) struct Admitter {
    rules: AdmissionRules,
    /// Made when they are first needed: 2 MiB, and one.
    seen: Option<(Frequencies, Depths)>,
    budget: WriteBudget,
    worth: Worth,
}

impl Admitter {
    pub fn new(now: BootTime) -> Self {
        let budget = WriteBudget::new(None, now);
        Self { rules: AdmissionRules::default(), seen: None, budget, worth: Worth::default() }
    }

    pub fn set(&mut self, rules: AdmissionRules, now: BootTime) {
        self.budget.set(rules.write_budget, now);
        self.rules = rules;
    }

    /// A request asks for these blocks.
    pub fn count(&mut self, layout: &RegisteredLayout, hashes: &[SequenceHash]) {
        if self.rules.counts {
            let (frequencies, depths) = self.seen.get_or_insert_default();
            for (depth, hash) in hashes.iter().enumerate() {
                let name = block_name(layout, hash);
                frequencies.count(name);
                depths.note(name, depth);
            }
        }
    }

    pub fn admission(&self, namespace: NamespaceId, tier: Tier) -> Admission {
        let rules = self.rules_of(namespace);
        if tier == Tier::Object { rules.object } else { rules.nvme }
    }

    /// True where a copy goes to this tier now; then its bytes count.
    pub fn admits(&mut self, tier: Tier, block: &BlockRef<'_>, bytes: u64, occasion: Occasion, now: BootTime) -> bool {
        let budgeted = tier == Tier::Nvme;
        if occasion == Occasion::Must {
            // Beyond the budget, too; but it counts.
            if budgeted {
                self.budget.take(bytes, now);
            }
            return true;
        }
        let wanted = match self.admission(block.layout.namespace, tier) {
            Admission::Asked => false,
            Admission::All => occasion != Occasion::Leaving,
            Admission::Reused => occasion != Occasion::Leaving && self.is_reused(block),
            Admission::Evicted => occasion == Occasion::Leaving,
        };
        let promote_after = self.rules_of(block.layout.namespace).promote_after;
        let promoted = occasion != Occasion::Promoted || promote_after <= 1 || self.requests(block) >= promote_after;
        wanted && promoted && (!budgeted || self.pays(block, bytes, now))
    }

    fn pays(&mut self, block: &BlockRef<'_>, bytes: u64, now: BootTime) -> bool {
        let left = self.budget.left(now);
        let value = self.value(block, bytes);
        self.worth.admits(value, left) && self.budget.take(bytes, now)
    }

    fn rules_of(&self, namespace: NamespaceId) -> NamespaceRules {
        self.rules.namespaces.get(namespace.0).copied().unwrap_or_default()
    }

    fn is_reused(&self, block: &BlockRef<'_>) -> bool {
        self.requests(block) >= self.rules.reused_after
    }

    /// How many requests asked for the block, as far as that is counted.
    fn requests(&self, block: &BlockRef<'_>) -> u8 {
        self.seen.as_ref().map_or(0, |(frequencies, _)| frequencies.of(block_name(block.layout, &block.hash)))
    }

    /// What keeping a byte of the block saves, in tokens that attend to nothing.
    fn value(&self, block: &BlockRef<'_>, bytes: u64) -> f64 {
        let name = block_name(block.layout, &block.hash);
        let depth = self.seen.as_ref().map_or(0, |(_, depths)| depths.of(name));
        let requests = f64::from(self.requests(block).max(1));
        requests * recompute_cost(block.layout.layout.block_tokens, depth) / bytes.max(1) as f64
    }
}

impl super::Stack {
    /// A request asks for these blocks.
    pub fn count(&self, layout: &RegisteredLayout, hashes: &[SequenceHash]) {
        self.admitter.lock().count(layout, hashes);
    }
}
