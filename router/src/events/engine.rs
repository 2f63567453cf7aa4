//! What one engine has in its own memory, as its events say.

use std::sync::Arc;

use parking_lot::Mutex;

use super::vllm::{Batch, Event, GroupKind, Stored};
use crate::index::{HolderId, PrefixIndex};
use crate::names;

/// How an engine names blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Naming {
    /// By hashes that the router computes as well: see [`crate::hashing::Hashing`].
    Computed,
    /// By hashes of its own. Engines of one domain mean the same by the same hash.
    Opaque {
        /// Which.
        domain: u64,
    },
}

/// A layer group of one of an engine's ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EngineGroup {
    /// Which rank.
    pub rank: u32,
    /// Which group.
    pub group: u32,
    /// How its blocks are used.
    pub kind: GroupKind,
    /// Who holds them in the index.
    pub holder: HolderId,
}

/// Counts since the router started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EngineCounts {
    /// Messages.
    pub batches: u64,
    /// Blocks that came.
    pub stored: u64,
    /// Blocks that left.
    pub removed: u64,
    /// Runs of blocks whose parent is not known: they were stored before the router listened.
    pub orphans: u64,
    /// Events that concern another place than the engine's own memory, or are unknown here.
    pub passed_over: u64,
    /// Messages, and events, that could not be read.
    pub unread: u64,
    /// Times that everything was forgotten: the engine restarted, or events were lost for good.
    pub fences: u64,
}

#[derive(Default)]
struct State {
    groups: Vec<EngineGroup>,
    counts: EngineCounts,
    block_tokens: u32,
}

/// See the head of this file. Shared by `Arc`.
pub struct EngineView {
    index: Arc<PrefixIndex>,
    naming: Naming,
    state: Mutex<State>,
}

impl EngineView {
    /// Of an engine that is known to have nothing yet.
    pub fn new(index: Arc<PrefixIndex>, naming: Naming) -> Self {
        Self { index, naming, state: Mutex::default() }
    }

    /// Its groups, as far as they are known.
    pub fn groups(&self) -> Vec<EngineGroup> {
        self.state.lock().groups.clone()
    }

    /// What was counted.
    pub fn counts(&self) -> EngineCounts {
        self.state.lock().counts
    }

    /// Tokens of its blocks; 0 until it stored one.
    pub fn block_tokens(&self) -> u32 {
        self.state.lock().block_tokens
    }

    /// Takes what a message says. `rank`: whose messages these are, where it does not say.
    pub fn apply(&self, batch: &Batch, rank: u32) {
        let rank = batch.rank.unwrap_or(rank);
        self.state.lock().counts.batches += 1;
        for event in &batch.events {
            match event {
                Event::Stored(stored) if is_own_memory(stored.medium.as_deref()) => self.store(rank, stored),
                Event::Removed { hashes, medium, group } if is_own_memory(medium.as_deref()) => {
                    for known in self.groups() {
                        if known.rank == rank && group.is_none_or(|group| group == known.group) {
                            self.remove(&known, hashes);
                        }
                    }
                    self.state.lock().counts.removed += hashes.len() as u64;
                }
                Event::Cleared => {
                    let groups = self.groups();
                    groups.iter().filter(|known| known.rank == rank).for_each(|known| self.index.clear(known.holder));
                }
                Event::Unread(_) => self.passed_over(1),
                _ => self.state.lock().counts.passed_over += 1,
            }
        }
    }

    /// So much of what the engine said could not be read.
    pub fn passed_over(&self, count: u64) {
        self.state.lock().counts.unread += count;
    }

    fn store(&self, rank: u32, stored: &Stored) {
        let Some(group) = self.group(rank, stored) else { return };
        let orphan = match self.naming {
            Naming::Computed => {
                self.index.store(group.holder, &stored.hashes);
                false
            }
            Naming::Opaque { domain } => {
                let each = stored.block_tokens.max(1) as usize;
                let seed = names::adapter_seed(stored.adapter.as_deref());
                let tokens = stored.tokens.chunks_exact(each);
                let extras = stored.extras.iter().copied().chain(std::iter::repeat(0));
                let blocks: Vec<(u64, u64)> = stored
                    .hashes
                    .iter()
                    .zip(tokens.zip(extras))
                    .map(|(hash, (tokens, extra))| (*hash, names::tokens_hash(tokens, seed) ^ extra))
                    .collect();
                self.index.store_opaque(group.holder, domain, stored.parent, &blocks).is_err()
            }
        };
        let mut state = self.state.lock();
        state.counts.orphans += u64::from(orphan);
        state.counts.stored += stored.hashes.len() as u64;
        state.block_tokens = stored.block_tokens;
    }

    fn remove(&self, group: &EngineGroup, hashes: &[u64]) {
        match self.naming {
            Naming::Computed => self.index.remove(group.holder, hashes),
            Naming::Opaque { domain } => self.index.remove_opaque(group.holder, domain, hashes),
        }
    }

    fn group(&self, rank: u32, stored: &Stored) -> Option<EngineGroup> {
        let mut state = self.state.lock();
        let known = state.groups.iter().find(|known| (known.rank, known.group) == (rank, stored.group));
        if let Some(known) = known {
            return Some(*known);
        }
        match self.index.add_holder() {
            Ok(holder) => {
                let group = EngineGroup { rank, group: stored.group, kind: stored.kind, holder };
                state.groups.push(group);
                Some(group)
            }
            Err(error) => {
                tracing::error!(%error, "the engine's blocks cannot be indexed");
                None
            }
        }
    }

    /// Nothing that is known of the engine holds any more: it restarted, or events were lost for good.
    pub fn fence(&self) {
        let groups = {
            let mut state = self.state.lock();
            state.counts.fences += 1;
            state.groups.clone()
        };
        groups.iter().for_each(|known| self.index.clear(known.holder));
    }
}

impl Drop for EngineView {
    fn drop(&mut self) {
        self.state.get_mut().groups.iter().for_each(|known| self.index.remove_holder(known.holder));
    }
}

fn is_own_memory(medium: Option<&str>) -> bool {
    matches!(medium, None | Some("GPU" | "gpu" | "HBM"))
}
