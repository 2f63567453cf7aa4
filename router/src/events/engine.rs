//! What one engine has in its own memory, as its events say.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::learnt::Learnt;
use super::vllm::{Batch, Event, GroupKind, Stored};
use crate::caps;
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
    /// Where they are.
    pub memory: Memory,
    /// Who holds them in the index.
    pub holder: HolderId,
}

/// Memories of an engine's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// What it computes in.
    Device,
    /// A second tier in the host's memory: vLLM's `CPU`, SGLang's host pool.
    Host,
}

impl Memory {
    /// By the name that events give it; none for disks and for what is shared.
    fn named(medium: Option<&str>) -> Option<Self> {
        match medium {
            None | Some("GPU" | "gpu" | "HBM") => Some(Self::Device),
            Some("CPU" | "cpu" | "CPU_PINNED") => Some(Self::Host),
            _ => None,
        }
    }
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

/// What is known of a group's blocks beside who holds them.
#[derive(Default)]
struct Blocks {
    /// Copies beyond the first, of blocks that have any: a prompt of whole blocks has its last one computed again at each repetition, and an
    /// engine announces each copy's beginning and end.
    copies: HashMap<u64, u32>,
    learnt: Learnt,
}

#[derive(Default)]
struct State {
    groups: Vec<EngineGroup>,
    /// By holder.
    blocks: HashMap<HolderId, Blocks>,
    counts: EngineCounts,
    /// Tokens of the blocks of attention; 0 until one was stored.
    block_tokens: u32,
    /// ... and of others, which may have another size.
    other_block_tokens: u32,
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

    /// Whether events of several ranks have come.
    pub fn has_ranks(&self) -> bool {
        let state = self.state.lock();
        state.groups.iter().any(|group| state.groups.first().is_some_and(|first| first.rank != group.rank))
    }

    /// What was counted.
    pub fn counts(&self) -> EngineCounts {
        self.state.lock().counts
    }

    /// Tokens of its blocks, those of attention where it has any; 0 until it stored one.
    pub fn block_tokens(&self) -> u32 {
        let state = self.state.lock();
        if state.block_tokens > 0 { state.block_tokens } else { state.other_block_tokens }
    }

    /// Takes what a message says. `rank`: whose messages these are, where it does not say.
    pub fn apply(&self, batch: &Batch, rank: u32) {
        let rank = batch.rank.unwrap_or(rank);
        self.state.lock().counts.batches += 1;
        for event in &batch.events {
            match event {
                Event::Stored(stored) if Memory::named(stored.medium.as_deref()).is_some() => self.store(rank, stored),
                Event::Removed { hashes, medium, group } if Memory::named(medium.as_deref()).is_some() => {
                    let memory = Memory::named(medium.as_deref());
                    for known in self.groups() {
                        let is_meant = known.rank == rank && Some(known.memory) == memory;
                        if is_meant && group.is_none_or(|group| group == known.group) {
                            self.remove(&known, hashes);
                        }
                    }
                    self.state.lock().counts.removed += hashes.len() as u64;
                }
                Event::Cleared => {
                    let groups = self.groups();
                    groups.iter().filter(|known| known.rank == rank).for_each(|known| self.clear(known));
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
        if stored.kind == GroupKind::Other {
            self.state.lock().counts.passed_over += 1;
            return;
        }
        let Some(group) = self.group(rank, stored) else { return };
        let each = self.block_size(stored);
        self.count_copies(&group, &stored.hashes);
        let orphan = match self.naming {
            _ if self.is_learnt(stored, each) => {
                let names = self.state.lock().blocks.entry(group.holder).or_default().learnt.store(stored, each);
                names.as_ref().inspect(|names| self.index.store(group.holder, names)).is_none()
            }
            Naming::Computed => {
                self.index.store_behind(group.holder, stored.parent, &stored.hashes);
                false
            }
            Naming::Opaque { domain } => {
                let seed = names::adapter_seed(stored.adapter.as_deref());
                let tokens = stored.tokens.chunks_exact(stored.block_tokens.max(1) as usize);
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
    }

    /// Tokens of the blocks that prompts are asked for in, as far as is known with this event.
    fn block_size(&self, stored: &Stored) -> u32 {
        let mut state = self.state.lock();
        match stored.kind {
            // The first says it: groups of attention with larger blocks come behind.
            GroupKind::Attention if state.block_tokens == 0 || stored.group == 0 => {
                state.block_tokens = stored.block_tokens;
            }
            GroupKind::Attention => {}
            _ => state.other_block_tokens = stored.block_tokens,
        }
        if state.block_tokens > 0 { state.block_tokens } else { stored.block_tokens }
    }

    /// Whether its blocks are named by what their tokens say, and their hashes by what they were when they came.
    fn is_learnt(&self, stored: &Stored, each: u32) -> bool {
        let of_other_kind = stored.kind != GroupKind::Attention || stored.block_tokens != each;
        match self.naming {
            Naming::Computed => stored.adapter.is_some(),
            Naming::Opaque { .. } => of_other_kind,
        }
    }

    /// Blocks that are there already are there once more. A run that repeats something does so at one of its ends: others are not looked up.
    fn count_copies(&self, group: &EngineGroup, hashes: &[u64]) {
        let ends: Vec<u64> =
            hashes.first().into_iter().chain(hashes.last().filter(|_| hashes.len() > 1)).copied().collect();
        if !self.present(group, &ends).contains(&true) {
            return;
        }
        let present = self.present(group, hashes);
        let mut state = self.state.lock();
        let copies = &mut state.blocks.entry(group.holder).or_default().copies;
        for (hash, _) in hashes.iter().zip(present).filter(|(_, present)| *present) {
            if copies.len() < caps::COPIES_MAX || copies.contains_key(hash) {
                *copies.entry(*hash).or_default() += 1;
            }
        }
    }

    fn present(&self, group: &EngineGroup, hashes: &[u64]) -> Vec<bool> {
        let mut present = match self.naming {
            Naming::Computed => self.index.has(group.holder, hashes),
            Naming::Opaque { domain } => self.index.has_opaque(group.holder, domain, hashes),
        };
        let state = self.state.lock();
        if let Some(blocks) = state.blocks.get(&group.holder).filter(|blocks| !blocks.learnt.is_empty()) {
            present.iter_mut().zip(hashes).for_each(|(present, hash)| *present |= blocks.learnt.has(*hash));
        }
        present
    }

    fn remove(&self, group: &EngineGroup, hashes: &[u64]) {
        let (mut last, mut learnt) = (None, Vec::new());
        if let Some(blocks) = self.state.lock().blocks.get_mut(&group.holder) {
            if !blocks.copies.is_empty() {
                last =
                    Some(hashes.iter().copied().filter(|hash| is_last(&mut blocks.copies, *hash)).collect::<Vec<_>>());
            }
            learnt = blocks.learnt.remove(last.as_deref().unwrap_or(hashes));
        }
        let hashes = last.as_deref().unwrap_or(hashes);
        if !learnt.is_empty() {
            self.index.remove(group.holder, &learnt);
        }
        match self.naming {
            Naming::Computed => self.index.remove(group.holder, hashes),
            Naming::Opaque { domain } => self.index.remove_opaque(group.holder, domain, hashes),
        }
    }

    fn group(&self, rank: u32, stored: &Stored) -> Option<EngineGroup> {
        let mut state = self.state.lock();
        let memory = Memory::named(stored.medium.as_deref())?;
        let known =
            state.groups.iter().find(|known| (known.rank, known.group, known.memory) == (rank, stored.group, memory));
        if let Some(known) = known {
            return Some(*known);
        }
        match self.index.add_holder() {
            Ok(holder) => {
                let group = EngineGroup { rank, group: stored.group, kind: stored.kind, memory, holder };
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
        groups.iter().for_each(|known| self.clear(known));
    }

    fn clear(&self, group: &EngineGroup) {
        self.state.lock().blocks.remove(&group.holder);
        self.index.clear(group.holder);
    }
}

impl Drop for EngineView {
    fn drop(&mut self) {
        self.state.get_mut().groups.iter().for_each(|known| self.index.remove_holder(known.holder));
    }
}

/// Whether no other copy of a block is there, of which one goes.
fn is_last(copies: &mut HashMap<u64, u32>, hash: u64) -> bool {
    match copies.get_mut(&hash) {
        None => true,
        Some(1) => {
            copies.remove(&hash);
            false
        }
        Some(more) => {
            *more -= 1;
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::vllm::salt_extra;
    use crate::hashing::Hashing;
    use kvstore_proto::hashes::Sha256Cbor;

    fn view(naming: Naming) -> EngineView {
        EngineView::new(Arc::new(PrefixIndex::with_opaque_names(1 << 22)), naming)
    }

    fn stored(hashes: &[u64], parent: Option<u64>, tokens: &[u32]) -> Stored {
        Stored { hashes: hashes.to_vec(), parent, tokens: tokens.to_vec(), block_tokens: 16, ..Stored::default() }
    }

    fn say(view: &EngineView, events: Vec<Event>) {
        view.apply(&Batch { events, ..Batch::default() }, 0);
    }

    fn removed(hashes: &[u64], group: u32) -> Event {
        Event::Removed { hashes: hashes.to_vec(), medium: None, group: Some(group) }
    }

    /// How many of a chain's blocks each group has, from the first on.
    fn found(view: &EngineView, names: &[u64], group: u32) -> usize {
        let group = view.groups().into_iter().find(|known| known.group == group).unwrap();
        view.index.has(group.holder, names).iter().take_while(|has| **has).count()
    }

    /// An engine computed the last block of a repeated prompt again, and evicted one of the two: the block counted as gone, although the
    /// engine went on serving it.
    #[test]
    fn a_block_is_there_until_its_last_copy_leaves() {
        let tokens: Vec<u32> = (0..48).collect();
        for naming in [Naming::Computed, Naming::Opaque { domain: 7 }] {
            let view = view(naming);
            let names = match naming {
                Naming::Computed => vec![1, 2, 3],
                Naming::Opaque { .. } => Hashing::Engine.chain(&tokens, 16, None, None).unwrap().names,
            };
            say(&view, vec![Event::Stored(stored(&[1, 2, 3], None, &tokens))]);
            say(&view, vec![Event::Stored(stored(&[3], Some(2), &tokens[32..]))]);
            say(&view, vec![removed(&[3], 0)]);
            assert_eq!(found(&view, &names, 0), 3, "{naming:?}: one copy is there");
            say(&view, vec![removed(&[3], 0)]);
            assert_eq!(found(&view, &names, 0), 2, "{naming:?}: none is");
            // With log-probabilities of the prompt, all of it is there twice.
            say(&view, vec![Event::Stored(stored(&[1, 2, 3], None, &tokens)), removed(&[1, 2], 0)]);
            assert_eq!(found(&view, &names, 0), 3, "{naming:?}");
            say(&view, vec![Event::Stored(stored(&[3], Some(2), &tokens[32..])), Event::Cleared]);
            assert_eq!(found(&view, &names, 0), 0, "{naming:?}");
            say(&view, vec![Event::Stored(stored(&[1, 2, 3], None, &tokens)), removed(&[3], 0)]);
            assert_eq!(found(&view, &names, 0), 2, "{naming:?}: copies are forgotten with all else");
        }
    }

    /// An adapter's path is in its hashes and in no event: the router looked for hashes without it, and found nothing.
    #[test]
    fn an_adapters_blocks_are_learnt_from_its_events() {
        let tokens: Vec<u32> = (0..64).collect();
        let view = view(Naming::Computed);
        let chain = |adapter, salt| {
            let sha = Hashing::Sha256Cbor(Sha256Cbor::default());
            sha.chain(&tokens, 16, adapter, salt).unwrap().names
        };
        let of = |hashes: &[u64], parent, tokens: &[u32], extras: &[u64]| {
            let adapter = Some("a".to_owned());
            Event::Stored(Stored { adapter, extras: extras.to_vec(), ..stored(hashes, parent, tokens) })
        };
        say(&view, vec![of(&[1, 2], None, &tokens[..32], &[]), of(&[3, 4], Some(2), &tokens[32..], &[])]);
        let has = |adapter, salt| found(&view, &chain(adapter, salt), 0);
        assert_eq!(
            [has(Some("a"), None), has(Some("b"), None), has(None, None), has(Some("a"), Some("s"))],
            [4, 0, 0, 0]
        );
        say(&view, vec![removed(&[4], 0), of(&[11, 12], None, &tokens[..32], &[salt_extra("s"), 0])]);
        assert_eq!([has(Some("a"), None), has(Some("a"), Some("s"))], [3, 2]);
        say(&view, vec![of(&[9], Some(8), &tokens[..16], &[])]);
        assert_eq!(view.counts().orphans, 1, "its parent is not known");
    }

    /// Groups that keep the ends of prompts list fewer blocks than their span has, of a size of their own: such events were not read, and
    /// their sizes were taken for that of all blocks.
    #[test]
    fn windows_and_states_name_spans_in_blocks_of_their_own() {
        let tokens: Vec<u32> = (0..256).collect();
        let view = view(Naming::Opaque { domain: 7 });
        let of = |hashes: &[u64], block_tokens, group, kind| {
            Event::Stored(Stored { block_tokens, group, kind, ..stored(hashes, None, &tokens) })
        };
        say(&view, vec![of(&[1, 2, 3, 4], 64, 0, GroupKind::Attention)]);
        say(&view, vec![of(&[14, 15], 16, 1, GroupKind::Window(32)), of(&[22], 128, 2, GroupKind::State)]);
        say(&view, vec![of(&[31, 32], 128, 3, GroupKind::Window(256)), of(&[99], 8, 4, GroupKind::Other)]);
        let names = Hashing::Engine.chain(&tokens, 64, None, None).unwrap().names;
        let has = |group: u32| {
            let group = view.groups().into_iter().find(|known| known.group == group).unwrap();
            view.index.has(group.holder, &names)
        };
        assert_eq!((view.block_tokens(), view.groups().len()), (64, 4));
        assert_eq!([has(0), has(3)], [[true; 4], [true; 4]]);
        assert_eq!([has(1), has(2)], [[false, false, false, true], [false, false, false, true]]);
        say(&view, vec![removed(&[14], 1), removed(&[31], 3)]);
        assert_eq!([has(1), has(3)], [vec![false; 4], vec![false, false, true, true]]);
    }
}
