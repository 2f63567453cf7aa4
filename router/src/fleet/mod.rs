//! The workers and the nodes, and how much of a prompt each would find where.

mod conversations;
mod node;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arc_swap::ArcSwap;
use kvstore_client::{GroupRun, usable_prefix, window_blocks};
use parking_lot::RwLock;

pub use conversations::Conversations;
pub use node::{Node, NodeStatus};
pub use worker::{Evidence, Role, Served, Worker, WorkerSpec, read_served};

use crate::cost::Cached;
use crate::events::vllm::GroupKind;
use crate::events::{EngineGroup, Memory, Naming};
use crate::hashing::{Chain, Hashing};
use crate::index::{HolderId, Match, PrefixIndex};

/// What the indexes may take.
#[derive(Clone, Copy, Debug)]
pub struct FleetOptions {
    /// Bytes of the index of engines' memory.
    pub engine_index_bytes: u64,
    /// Bytes of the index of nodes' tiers.
    pub node_index_bytes: u64,
}

impl Default for FleetOptions {
    fn default() -> Self {
        // Some ten million blocks each.
        Self { engine_index_bytes: 1 << 30, node_index_bytes: 1 << 30 }
    }
}

#[derive(Default)]
struct State {
    workers: BTreeMap<String, Arc<Worker>>,
    nodes: BTreeMap<String, Arc<Node>>,
    /// Engines' numbers, by URL.
    numbers: HashMap<String, usize>,
    /// The next number.
    next: usize,
}

impl State {
    /// The number of the engine at a URL. One that is known for its blocks alone is its own.
    fn number(&mut self, url: &str) -> usize {
        let next = self.next;
        let number = match url.trim_end_matches('/') {
            "" => next,
            url => *self.numbers.entry(url.to_owned()).or_insert(next),
        };
        self.next += usize::from(number == next);
        number
    }

    /// Forgets the numbers of engines that are gone.
    fn forget_numbers(&mut self) {
        let known: Vec<usize> = self.workers.values().map(|worker| worker.number).collect();
        self.numbers.retain(|_, number| known.contains(number));
    }
}

/// See the head of this file. Shared by `Arc`.
pub struct Fleet {
    engines: Arc<PrefixIndex>,
    tiers: Arc<PrefixIndex>,
    hashing: Hashing,
    state: RwLock<State>,
    conversations: Conversations,
    /// Adapters by name, and the base model of each where that was said.
    adapters: ArcSwap<BTreeMap<String, Option<String>>>,
}

impl Fleet {
    /// Of nobody yet.
    pub fn new(hashing: Hashing, options: FleetOptions) -> Arc<Self> {
        let engines = match &hashing {
            Hashing::Sha256Cbor(_) => PrefixIndex::new(options.engine_index_bytes),
            Hashing::Engine => PrefixIndex::with_opaque_names(options.engine_index_bytes),
        };
        Arc::new(Self {
            engines: Arc::new(engines),
            tiers: Arc::new(PrefixIndex::of_single_blocks(options.node_index_bytes)),
            hashing,
            state: RwLock::default(),
            conversations: Conversations::default(),
            adapters: ArcSwap::default(),
        })
    }

    /// How its engines name blocks.
    pub fn hashing(&self) -> &Hashing {
        &self.hashing
    }

    /// The index of engines' memory.
    pub fn engine_index(&self) -> &PrefixIndex {
        &self.engines
    }

    /// The index of nodes' tiers.
    pub fn tier_index(&self) -> &PrefixIndex {
        &self.tiers
    }

    /// Which workers had which conversations.
    pub fn conversations(&self) -> &Conversations {
        &self.conversations
    }

    /// All workers, in the order of their names.
    pub fn workers(&self) -> Vec<Arc<Worker>> {
        self.state.read().workers.values().cloned().collect()
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.state.read().nodes.values().cloned().collect()
    }

    /// One worker.
    pub fn worker(&self, id: &str) -> Option<Arc<Worker>> {
        self.state.read().workers.get(id).cloned()
    }

    /// The workers are these from now on: those that are new or changed are followed anew, those that are gone are forgotten. Call it in a runtime.
    pub fn set_workers(&self, specs: &[WorkerSpec]) {
        let mut state = self.state.write();
        let wanted: BTreeMap<&str, &WorkerSpec> = specs.iter().map(|spec| (spec.id.as_str(), spec)).collect();
        state.workers.retain(|id, worker| wanted.get(id.as_str()) == Some(&&worker.spec));
        let nodes: std::collections::BTreeSet<&str> = specs.iter().filter_map(|spec| spec.node.as_deref()).collect();
        state.nodes.retain(|address, _| nodes.contains(address.as_str()));
        for address in nodes {
            if !state.nodes.contains_key(address)
                && let Some(node) = Node::follow(address, Arc::clone(&self.tiers))
            {
                state.nodes.insert(address.to_owned(), node);
            }
        }
        for (id, spec) in wanted {
            if !state.workers.contains_key(id) {
                let node = spec.node.as_ref().and_then(|address| state.nodes.get(address).cloned());
                let number = state.number(&spec.url);
                let worker = Worker::follow(spec.clone(), number, node, Arc::clone(&self.engines), self.naming(spec));
                state.workers.insert(id.to_owned(), worker);
            }
        }
        state.forget_numbers();
    }

    /// Adapters (LoRA) that engines serve under names of their own, and the base model of each where it is known.
    pub fn set_adapters(&self, adapters: BTreeMap<String, Option<String>>) {
        self.adapters.store(Arc::new(adapters));
    }

    /// Whether a model is an adapter, by the configuration or by a worker's word.
    pub fn is_adapter(&self, model: &str) -> bool {
        let says =
            |worker: &Arc<Worker>| worker.served().iter().any(|served| served.id == model && served.parent.is_some());
        self.adapters.load().contains_key(model) || self.state.read().workers.values().any(says)
    }

    /// Workers that serve a model, in the order of their names: those that are configured for it, or say that they serve it; of an adapter of
    /// which none says so, those of its base model. All, where the model is empty.
    pub fn serving(&self, model: &str) -> Vec<Arc<Worker>> {
        let state = self.state.read();
        let mut found: Vec<&Arc<Worker>> =
            state.workers.values().filter(|worker| model.is_empty() || worker.serves(model)).collect();
        let adapters = self.adapters.load();
        if found.is_empty()
            && let Some(base) = adapters.get(model)
        {
            let is_base = |worker: &&Arc<Worker>| match base {
                Some(base) => worker.serves(base),
                None => !adapters.contains_key(&worker.spec.model),
            };
            found = state.workers.values().filter(is_base).collect();
        }
        found.into_iter().cloned().collect()
    }

    /// Names of all models: of workers, of what they say, and of adapters. Sorted.
    pub fn models(&self) -> Vec<String> {
        let state = self.state.read();
        let configured = state.workers.values().map(|worker| worker.spec.model.clone());
        let served = state
            .workers
            .values()
            .flat_map(|worker| worker.served().iter().map(|served| served.id.clone()).collect::<Vec<_>>());
        let mut names: Vec<String> = configured.chain(served).chain(self.adapters.load().keys().cloned()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Adds one worker, or changes it.
    pub fn add_worker(&self, spec: WorkerSpec) {
        let mut specs: Vec<WorkerSpec> = self.workers().iter().map(|worker| worker.spec.clone()).collect();
        specs.retain(|known| known.id != spec.id);
        specs.push(spec);
        self.set_workers(&specs);
    }

    /// Forgets one worker; false where it is not known.
    pub fn remove_worker(&self, id: &str) -> bool {
        let mut specs: Vec<WorkerSpec> = self.workers().iter().map(|worker| worker.spec.clone()).collect();
        let before = specs.len();
        specs.retain(|known| known.id != id);
        self.set_workers(&specs);
        specs.len() < before
    }

    fn naming(&self, spec: &WorkerSpec) -> Naming {
        match self.hashing {
            Hashing::Sha256Cbor(_) => Naming::Computed,
            Hashing::Engine => Naming::Opaque { domain: xxhash_rust::xxh3::xxh3_64(spec.model.as_bytes()) },
        }
    }

    /// How much of a prompt each of `workers` would find, in the same order.
    pub fn locate(&self, chain: &Chain, workers: &[Arc<Worker>]) -> Vec<Cached> {
        let mut matches = Vec::new();
        self.engines.find(&chain.names, &mut matches);
        let engines: Vec<InRank> = workers.iter().map(|worker| self.in_engine(chain, worker, &matches)).collect();
        if !self.hashing.reaches_the_store() || chain.hashes.is_empty() {
            return engines.iter().map(|of| of.cached(chain)).collect();
        }
        // Several workers share a node, and all nodes a bucket.
        let tiers = node::Tiers::of(&self.tiers, chain, workers);
        let of = |(worker, in_rank): (&Arc<Worker>, InRank)| {
            let beyond = tiers.beyond(chain, worker, in_rank.device);
            let own = in_rank.cached(chain);
            if own.engine_host_tokens > 0 && own.tokens() >= beyond.tokens() { own } else { beyond }
        };
        workers.iter().zip(engines).map(of).collect()
    }

    /// Whether a worker may find a longer prefix than this one, which is some prompt's beginning. `false` where nobody has all of this.
    pub fn may_have_more(&self, model: &str, chain: &Chain) -> bool {
        let workers = self.serving(model);
        if !workers.iter().all(|worker| worker.needs_all_blocks()) {
            return true;
        }
        // A node's blocks may be larger than the engine's: the last of them need not be whole here.
        let larger = workers.iter().filter_map(|worker| worker.node.as_ref()?.block_tokens(&worker.spec.model)).max();
        let whole = tokens(chain.names.len(), chain)
            .saturating_sub(u64::from(larger.unwrap_or(0)).saturating_sub(u64::from(chain.block_tokens)));
        whole == 0 || self.locate(chain, &workers).iter().any(|cached| cached.tokens() >= whole)
    }

    /// Tokens of a model's blocks, as its workers' engines have them, or its nodes; `None` until somebody says.
    pub fn block_tokens(&self, model: &str) -> Option<u32> {
        let workers = self.serving(model);
        let of_engines = workers.iter().find_map(|worker| worker.block_tokens());
        of_engines.or_else(|| workers.iter().find_map(|worker| worker.node.as_ref()?.block_tokens(&worker.spec.model)))
    }

    /// Tokens of a prompt that each rank of a worker's engine has.
    pub fn engine_tokens_by_rank(&self, chain: &Chain, worker: &Worker) -> Vec<(u32, u64)> {
        let mut matches = Vec::new();
        self.engines.find(&chain.names, &mut matches);
        let ranks = self.blocks_by_rank(chain, worker, &matches);
        ranks.into_iter().map(|(rank, blocks)| (rank, tokens(blocks.device, chain))).collect()
    }

    /// The rank of a worker's engine that has more of a prompt than its others have; none where that is no single one, or not known.
    pub fn rank_of(&self, chain: &Chain, worker: &Worker) -> Option<u32> {
        if chain.names.is_empty() || !worker.view.has_ranks() {
            return None;
        }
        let ranks = self.engine_tokens_by_rank(chain, worker);
        let most = ranks.iter().map(|(_, tokens)| *tokens).max().filter(|most| *most > 0)?;
        let mut best = ranks.iter().filter(|(_, tokens)| *tokens == most);
        let (rank, _) = best.next()?;
        best.next().is_none().then_some(*rank)
    }

    /// Blocks that a worker's engine has, on the rank that has most.
    fn in_engine(&self, chain: &Chain, worker: &Worker, matches: &[Match]) -> InRank {
        let ranks = self.blocks_by_rank(chain, worker, matches).into_iter();
        ranks
            .map(|(_, blocks)| blocks)
            .max_by_key(|blocks| (blocks.device + blocks.host, blocks.device))
            .unwrap_or_default()
    }

    fn blocks_by_rank(&self, chain: &Chain, worker: &Worker, matches: &[Match]) -> Vec<(u32, InRank)> {
        let groups = worker.view.groups();
        let mut ranks: Vec<u32> = groups.iter().map(|group| group.rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let of_rank = |rank: u32| {
            let of = |memory: Memory| -> Vec<&EngineGroup> {
                groups.iter().filter(|group| group.rank == rank && group.memory == memory).collect()
            };
            let (of_device, of_host) = (of(Memory::Device), of(Memory::Host));
            let device = if of_device.is_empty() { 0 } else { self.in_rank(chain, &of_device, matches) };
            let host = if of_host.is_empty() { 0 } else { self.with_host(chain, &of_device, &of_host) };
            (rank, InRank { device, host: host.saturating_sub(device) })
        };
        ranks.into_iter().map(of_rank).collect()
    }

    /// Blocks of a prompt's beginning that a rank has in one of its memories.
    fn with_host(&self, chain: &Chain, device: &[&EngineGroup], host: &[&EngineGroup]) -> usize {
        let mut numbers: Vec<(u32, GroupKind)> =
            device.iter().chain(host).map(|group| (group.group, group.kind)).collect();
        numbers.sort_unstable_by_key(|(number, _)| *number);
        numbers.dedup_by_key(|(number, _)| *number);
        let present = |number: u32| -> Vec<bool> {
            let mut present = vec![false; chain.names.len()];
            for group in device.iter().chain(host).filter(|group| group.group == number) {
                let has = self.engines.has(group.holder, &chain.names);
                present.iter_mut().zip(has).for_each(|(present, has)| *present |= has);
            }
            present
        };
        let present: Vec<Vec<bool>> = numbers.iter().map(|(number, _)| present(*number)).collect();
        let runs: Vec<GroupRun<'_>> = numbers
            .iter()
            .zip(&present)
            .map(|((_, kind), present)| GroupRun { needed: needed(*kind, chain.block_tokens), present })
            .collect();
        usable_prefix(&runs)
    }

    fn in_rank(&self, chain: &Chain, groups: &[&EngineGroup], matches: &[Match]) -> usize {
        let run = |holder: HolderId| {
            matches.iter().find(|found| found.holder == holder).map_or(0, |found| found.blocks as usize)
        };
        if groups.iter().all(|group| group.kind == GroupKind::Attention) {
            return groups.iter().map(|group| run(group.holder)).min().unwrap_or(0);
        }
        let present: Vec<Vec<bool>> = groups
            .iter()
            .map(|group| match group.kind {
                GroupKind::Attention => {
                    let run = run(group.holder);
                    (0..chain.names.len()).map(|at| at < run).collect()
                }
                _ => self.engines.has(group.holder, &chain.names),
            })
            .collect();
        let runs: Vec<GroupRun<'_>> = groups
            .iter()
            .zip(&present)
            .map(|(group, present)| GroupRun { needed: needed(group.kind, chain.block_tokens), present })
            .collect();
        usable_prefix(&runs)
    }
}

/// Blocks of a prompt that a rank of an engine has.
#[derive(Clone, Copy, Default)]
struct InRank {
    device: usize,
    /// Beyond those.
    host: usize,
}

impl InRank {
    fn cached(self, chain: &Chain) -> Cached {
        let (engine_tokens, engine_host_tokens) = (tokens(self.device, chain), tokens(self.host, chain));
        Cached { engine_tokens, engine_host_tokens, ..Cached::default() }
    }
}

fn tokens(blocks: usize, chain: &Chain) -> u64 {
    blocks as u64 * u64::from(chain.block_tokens)
}

/// Blocks before the end of a prefix that must be there.
fn needed(kind: GroupKind, block_tokens: u32) -> usize {
    match kind {
        GroupKind::Attention => usize::MAX,
        GroupKind::Window(tokens) => window_blocks(tokens, block_tokens),
        GroupKind::State => 1,
        GroupKind::Other => 0,
    }
}

#[cfg(test)]
mod tests {
    use kvstore_proto::hashes::Sha256Cbor;

    use super::*;
    use crate::events::vllm::{Batch, Event, Stored};

    fn fleet() -> (Arc<Fleet>, Arc<Worker>, Chain) {
        let fleet = Fleet::new(Hashing::Sha256Cbor(Sha256Cbor::default()), FleetOptions::default());
        fleet.set_workers(&[WorkerSpec { block_tokens: 16, ..WorkerSpec::new("a", "http://a:1", "m") }]);
        let worker = fleet.worker("a").unwrap();
        let chain = fleet.hashing().chain(&(0..160).collect::<Vec<u32>>(), 16, None, None).unwrap();
        (fleet, worker, chain)
    }

    fn stored(worker: &Worker, rank: u32, medium: &str, hashes: &[u64]) {
        let medium = Some(medium.to_owned());
        let stored = Stored { hashes: hashes.to_vec(), block_tokens: 16, medium, ..Stored::default() };
        worker.view.apply(&Batch { events: vec![Event::Stored(stored)], rank: Some(rank), ..Batch::default() }, 0);
    }

    fn removed(worker: &Worker, rank: u32, medium: &str, hashes: &[u64]) {
        let event = Event::Removed { hashes: hashes.to_vec(), medium: Some(medium.into()), group: None };
        worker.view.apply(&Batch { events: vec![event], rank: Some(rank), ..Batch::default() }, 0);
    }

    /// A block that an engine moves to the host's memory was gone for the router.
    #[tokio::test]
    async fn what_an_engine_has_in_the_hosts_memory_is_not_gone() {
        let (fleet, worker, chain) = fleet();
        let located = || {
            let cached = fleet.locate(&chain, std::slice::from_ref(&worker))[0];
            (cached.engine_tokens, cached.engine_host_tokens)
        };
        stored(&worker, 0, "GPU", &chain.names);
        assert_eq!(located(), (160, 0));
        stored(&worker, 0, "CPU", &chain.names[2..8]);
        assert_eq!(located(), (160, 0));
        removed(&worker, 0, "GPU", &chain.names[3..6]);
        assert_eq!(located(), (48, 112), "the rest is in either");
        removed(&worker, 0, "CPU", &chain.names[5..6]);
        assert_eq!(located(), (48, 32));
        // SGLang's name for it.
        stored(&worker, 0, "CPU_PINNED", &chain.names[5..6]);
        stored(&worker, 0, "DISK", &chain.names[3..4]);
        removed(&worker, 0, "GPU", &chain.names[..1]);
        assert_eq!(located(), (0, 0), "nobody has the first");
        stored(&worker, 0, "CPU", &chain.names[..1]);
        assert_eq!(located(), (0, 160));
    }

    #[tokio::test]
    async fn the_rank_that_has_most_is_known() {
        let (fleet, worker, chain) = fleet();
        stored(&worker, 0, "GPU", &chain.names[..4]);
        assert_eq!(fleet.rank_of(&chain, &worker), None, "it has one");
        stored(&worker, 1, "GPU", &chain.names[..4]);
        assert_eq!(fleet.rank_of(&chain, &worker), None, "they have the same");
        stored(&worker, 1, "GPU", &chain.names[4..6]);
        assert_eq!(fleet.rank_of(&chain, &worker), Some(1));
        assert_eq!(fleet.rank_of(&Chain::default(), &worker), None);
        removed(&worker, 1, "GPU", &chain.names[..6]);
        assert_eq!(fleet.rank_of(&chain, &worker), Some(0));
    }
}
