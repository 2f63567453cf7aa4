//! A node: the store's daemon there, what its tiers hold, and how fast they are read.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use kvstore_client::v1::{BlockKind, WatchLayout, WatchTier};
use kvstore_client::{Client, GroupRef, GroupRun, Watch, WatchEvent, event_name, usable_prefix};
use parking_lot::Mutex;
use tokio::task::AbortHandle;

use super::{Worker, needed, tokens};
use crate::cost::{Cached, TIERS, TierRate};
use crate::events::vllm::GroupKind;
use crate::hashing::Chain;
use crate::index::{HolderId, PrefixIndex};

/// A node at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NodeStatus {
    /// What is known is whole: a snapshot came, and the connection holds.
    pub whole: bool,
    /// It refuses new work.
    pub draining: bool,
    /// By tier, in the order of [`TIERS`].
    pub rates: [TierRate; 3],
    /// Layouts that it knows.
    pub layouts: usize,
}

#[derive(Default)]
struct State {
    layouts: Vec<Arc<WatchLayout>>,
    status: NodeStatus,
}

/// See the head of this file.
pub struct Node {
    /// As clients name it.
    pub address: String,
    client: Client,
    /// By tier.
    holders: [HolderId; 3],
    index: Arc<PrefixIndex>,
    state: Mutex<State>,
    task: Mutex<Option<AbortHandle>>,
}

/// Which of [`TIERS`].
fn tier_at(tier: i32) -> Option<usize> {
    match WatchTier::try_from(tier) {
        Ok(WatchTier::Host) => Some(0),
        Ok(WatchTier::Nvme) => Some(1),
        Ok(WatchTier::Object) => Some(2),
        _ => None,
    }
}

impl Node {
    pub(super) fn follow(address: &str, index: Arc<PrefixIndex>) -> Option<Arc<Self>> {
        let client = match Client::lazy(address) {
            Ok(client) => client,
            Err(error) => {
                tracing::error!(address, %error, "the node's address is not valid, so the router does not know its blocks");
                return None;
            }
        };
        let holders = TIERS.map(|_| index.add_holder());
        let [Ok(host), Ok(nvme), Ok(object)] = holders else {
            tracing::error!(address, "there are too many nodes, so the router does not know the blocks of this one");
            holders.into_iter().flatten().for_each(|holder| index.remove_holder(holder));
            return None;
        };
        let node = Arc::new(Self {
            address: address.to_owned(),
            client: client.clone(),
            holders: [host, nvme, object],
            index,
            state: Mutex::default(),
            task: Mutex::new(None),
        });
        // The task keeps no node alive.
        let task = tokio::spawn(follow(Arc::downgrade(&node), client.watch()));
        *node.task.lock() = Some(task.abort_handle());
        Some(node)
    }

    /// The node at this moment.
    pub fn status(&self) -> NodeStatus {
        let state = self.state.lock();
        NodeStatus { layouts: state.layouts.len(), ..state.status }
    }

    fn take(&self, event: WatchEvent) {
        let mut state = self.state.lock();
        match event {
            WatchEvent::Reset => {
                state.layouts.clear();
                state.status.whole = false;
                self.holders.iter().for_each(|holder| self.index.clear(*holder));
            }
            WatchEvent::Layout(layout) => state.layouts.push(Arc::new(layout)),
            WatchEvent::Snapshot(snapshot) => {
                if let Some(holder) = tier_at(snapshot.tier).and_then(|at| self.holders.get(at)) {
                    self.index.store(*holder, &snapshot.names);
                }
            }
            WatchEvent::SnapshotEnd(_) | WatchEvent::Resumed => state.status.whole = true,
            WatchEvent::Changes(changes) => {
                for tier in changes.tiers {
                    if let Some(holder) = tier_at(tier.tier).and_then(|at| self.holders.get(at)) {
                        // Removals first, where there is little room.
                        self.index.remove(*holder, &tier.removed);
                        self.index.store(*holder, &tier.stored);
                    }
                }
            }
            WatchEvent::Rates(rates) => {
                state.status.draining = rates.draining;
                for rate in rates.tiers {
                    if let Some(known) = tier_at(rate.tier).and_then(|at| state.status.rates.get_mut(at)) {
                        *known = TierRate {
                            bytes_per_second: rate.bytes_per_second,
                            latency_seconds: rate.latency_seconds,
                            queued_bytes: rate.queued_bytes,
                        };
                    }
                }
            }
            WatchEvent::Lost(error) => {
                if state.status.whole {
                    tracing::warn!(node = self.address, %error, "the node does not answer; the router does not count on its blocks until it does");
                }
                state.status.whole = false;
            }
        }
    }

    /// The layouts of the shards of a model's tensor-parallel group, those that were registered last: an engine registers its layout when it starts.
    fn family(&self, model: &str) -> Vec<Arc<WatchLayout>> {
        let model = short_name(model);
        let state = self.state.lock();
        if !state.status.whole || state.status.draining {
            return Vec::new();
        }
        let of_model = |layout: &&Arc<WatchLayout>| layout.layout.as_ref().is_some_and(|layout| layout.model == model);
        let Some(last) = state.layouts.iter().rev().find(of_model) else { return Vec::new() };
        state.layouts.iter().filter(|layout| are_shards(layout, last)).cloned().collect()
    }

    /// Whether no block of a model is of use without all that stand before it.
    pub(super) fn needs_all_blocks(&self, model: &str) -> bool {
        let family = self.family(model);
        let Some(first) = family.first() else { return true };
        (0..first.name_seeds.len()).any(|group| kind_of(first, group) == Some(GroupKind::Attention))
    }

    /// Tokens of the blocks of a model that is stored there.
    pub(super) fn block_tokens(&self, model: &str) -> Option<u32> {
        self.family(model).first()?.layout.as_ref().map(|layout| layout.block_tokens)
    }

    /// Asks the node to bring a prompt's blocks into its memory, since a request that needs them is on its way there.
    pub async fn prefetch(&self, model: &str, chain: &Chain) {
        for layout in self.family(model) {
            let Some(step) = step_of(&layout, chain) else { continue };
            let hashes: Vec<Bytes> = every(step, &chain.hashes).map(|hash| Bytes::copy_from_slice(hash)).collect();
            for group in 0..layout.name_seeds.len() as u32 {
                let group = GroupRef { layout_digest: layout.layout_digest.clone(), group };
                if let Err(error) = self.client.prefetch(&group, &hashes, crate::caps::PREFETCH_DEADLINE_MS).await {
                    tracing::debug!(node = self.address, %error, "the node did not take a prefetch hint");
                }
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
        self.holders.iter().for_each(|holder| self.index.remove_holder(*holder));
    }
}

async fn follow(node: std::sync::Weak<Node>, mut watch: Watch) {
    loop {
        let event = watch.next().await;
        let Some(node) = node.upgrade() else { return };
        node.take(event);
    }
}

/// What the store calls a model: the last part of its name, 64 bytes of it at most.
fn short_name(model: &str) -> Vec<u8> {
    let name = model.trim_end_matches('/').rsplit('/').next().unwrap_or(model).as_bytes();
    name.get(name.len().saturating_sub(64)..).unwrap_or_default().to_vec()
}

/// True where two layouts differ in their shard alone.
fn are_shards(a: &WatchLayout, b: &WatchLayout) -> bool {
    let (Some(a), Some(b)) = (&a.layout, &b.layout) else { return false };
    let count = |layout: &kvstore_client::v1::Layout| layout.shard.map_or(1, |shard| shard.count);
    let apart = |layout: &kvstore_client::v1::Layout| kvstore_client::v1::Layout { shard: None, ..layout.clone() };
    count(a) == count(b) && apart(a) == apart(b)
}

/// How many of the prompt's blocks are one of the layout's.
fn step_of(layout: &WatchLayout, chain: &Chain) -> Option<usize> {
    let tokens = layout.layout.as_ref()?.block_tokens;
    (chain.block_tokens > 0 && tokens >= chain.block_tokens && tokens.is_multiple_of(chain.block_tokens))
        .then(|| (tokens / chain.block_tokens) as usize)
}

/// Every `step`-th of a prompt's hashes: those of a layout's larger blocks.
fn every(step: usize, hashes: &[[u8; 32]]) -> impl Iterator<Item = &[u8; 32]> {
    hashes.iter().skip(step - 1).step_by(step)
}

fn kind_of(layout: &WatchLayout, group: usize) -> Option<GroupKind> {
    let group = layout.layout.as_ref()?.groups.get(group)?;
    match group.kind() {
        BlockKind::Attention => Some(GroupKind::Attention),
        BlockKind::SlidingWindow => Some(GroupKind::Window(group.window_tokens)),
        BlockKind::RecurrentState => Some(GroupKind::State),
        _ => None,
    }
}

/// Where the blocks of one layer group of one family are, for every node: the fastest tier of each block and its shards' slowest.
struct GroupPlaces {
    kind: GroupKind,
    /// Bytes of a block, of all shards.
    block_bytes: u64,
    /// By node; of each block 0 for nowhere, or 1 and its place in [`TIERS`].
    places: HashMap<String, Vec<u8>>,
    /// The same of the bucket, as any node knows it.
    bucket: Vec<bool>,
}

/// The size of a family's blocks in those of the prompt, and its groups.
type Places = (usize, Arc<Vec<GroupPlaces>>);

/// What all nodes have of a prompt.
pub(super) struct Tiers {
    /// By node and model.
    families: HashMap<(String, String), Places>,
}

impl Tiers {
    pub fn of(index: &PrefixIndex, chain: &Chain, workers: &[Arc<Worker>]) -> Self {
        let mut nodes: Vec<&Arc<Node>> = workers.iter().filter_map(|worker| worker.node.as_ref()).collect();
        nodes.sort_by(|a, b| a.address.cmp(&b.address));
        nodes.dedup_by(|a, b| a.address == b.address);
        let mut holders: HashMap<HolderId, (usize, u8)> = HashMap::new();
        for (at, node) in nodes.iter().enumerate() {
            for (holder, tier) in node.holders.iter().zip(1u8..) {
                holders.insert(*holder, (at, tier));
            }
        }
        let mut families = HashMap::new();
        // One look for all nodes that know the same layouts.
        let mut looked: HashMap<Vec<Bytes>, Places> = HashMap::new();
        for worker in workers {
            let Some(node) = &worker.node else { continue };
            let key = (node.address.clone(), worker.spec.model.clone());
            if families.contains_key(&key) {
                continue;
            }
            let family = node.family(&worker.spec.model);
            let Some(step) = family.first().and_then(|layout| step_of(layout, chain)) else { continue };
            let shards = family.first().and_then(|layout| layout.layout.as_ref()?.shard).map_or(1, |shard| shard.count);
            if family.len() < shards as usize {
                continue;
            }
            let digests: Vec<Bytes> = family.iter().map(|layout| layout.layout_digest.clone()).collect();
            let found = looked.entry(digests).or_insert_with(|| {
                let look = Look { index, chain, step, holders: &holders, nodes: &nodes };
                (step, Arc::new(look.groups(&family)))
            });
            families.insert(key, found.clone());
        }
        Self { families }
    }

    /// What a worker would find beyond `engine` blocks.
    pub fn beyond(&self, chain: &Chain, worker: &Worker, engine: usize) -> Cached {
        let engine_tokens = tokens(engine, chain);
        let nothing = Cached { engine_tokens, ..Cached::default() };
        let Some(node) = &worker.node else { return nothing };
        let key = (node.address.clone(), worker.spec.model.clone());
        let Some((step, groups)) = self.families.get(&key) else { return nothing };
        let whole = chain.hashes.len() / step;
        let in_engine = engine / step;
        let place = |group: &GroupPlaces, at: usize| -> u8 {
            let here = group.places.get(&node.address).and_then(|places| places.get(at)).copied().unwrap_or(0);
            let in_bucket = group.bucket.get(at).copied().unwrap_or(false);
            if here == 0 && in_bucket { 3 } else { here }
        };
        // What the engine has need not be in the store.
        let present: Vec<Vec<bool>> =
            groups.iter().map(|group| (0..whole).map(|at| at < in_engine || place(group, at) > 0).collect()).collect();
        let runs: Vec<GroupRun<'_>> = groups
            .iter()
            .zip(&present)
            .map(|(group, present)| GroupRun { needed: needed(group.kind, chain.block_tokens * *step as u32), present })
            .collect();
        let usable = usable_prefix(&runs);
        if usable <= in_engine {
            return nothing;
        }
        let mut cached = nothing;
        cached.fetched_tokens = tokens(usable * step, chain).saturating_sub(engine_tokens);
        for (number, group) in groups.iter().enumerate() {
            let first = usable.saturating_sub(needed(group.kind, chain.block_tokens * *step as u32)).max(in_engine);
            for at in first..usable {
                let tier = usize::from(place(group, at)).checked_sub(1);
                if let Some(bytes) = tier.and_then(|tier| cached.fetched_bytes.get_mut(tier)) {
                    *bytes += group.block_bytes;
                }
                if let Some(found) = tier.and_then(|tier| cached.tier_tokens.get_mut(tier)).filter(|_| number == 0) {
                    *found += tokens(*step, chain);
                }
            }
        }
        cached
    }
}

struct Look<'a> {
    index: &'a PrefixIndex,
    chain: &'a Chain,
    step: usize,
    holders: &'a HashMap<HolderId, (usize, u8)>,
    nodes: &'a [&'a Arc<Node>],
}

impl Look<'_> {
    fn groups(&self, family: &[Arc<WatchLayout>]) -> Vec<GroupPlaces> {
        let Some(first) = family.first() else { return Vec::new() };
        let groups = (0..first.name_seeds.len()).filter_map(|group| Some((group, kind_of(first, group)?)));
        groups.map(|(group, kind)| self.group(family, group, kind)).collect()
    }

    fn group(&self, family: &[Arc<WatchLayout>], group: usize, kind: GroupKind) -> GroupPlaces {
        let blocks = self.chain.hashes.len() / self.step;
        // By node and block: the slowest shard's tier, 0 once one lacks it.
        let mut slowest = vec![vec![1u8; blocks]; self.nodes.len()];
        let mut bucket = vec![true; blocks];
        for layout in family {
            let seed = layout.name_seeds.get(group).copied().unwrap_or(0);
            let names: Vec<u64> = every(self.step, &self.chain.hashes).map(|hash| event_name(seed, hash)).collect();
            self.index.each(&names, |at, holders| {
                let mut here = vec![0u8; self.nodes.len()];
                let mut shared = false;
                for (node, tier) in holders.iter().filter_map(|holder| self.holders.get(holder)) {
                    shared |= *tier == 3;
                    if let Some(best) = here.get_mut(*node) {
                        *best = if *best == 0 { *tier } else { (*best).min(*tier) };
                    }
                }
                for (slowest, here) in slowest.iter_mut().zip(here) {
                    if let Some(place) = slowest.get_mut(at) {
                        *place = if *place == 0 || here == 0 { 0 } else { (*place).max(here) };
                    }
                }
                if let Some(place) = bucket.get_mut(at) {
                    *place &= shared;
                }
                true
            });
        }
        let block_bytes = family.iter().filter_map(|layout| layout.block_bytes.get(group)).sum();
        let places = self.nodes.iter().map(|node| node.address.clone()).zip(slowest).collect();
        GroupPlaces { kind, block_bytes, places, bucket }
    }
}
