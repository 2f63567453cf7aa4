//! Eviction policies on real traces: how much of the distance from LRU to the optimum is closed, and what deciding costs.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use kvstore::replay;
use kvstore::trace::{self, TraceRequest};
use kvstore_tiers::eviction::{
    BlockIndex, Claim, EvictionKind, EvictionPolicy, NewBlock, Origin, PolicyKind, Removal, Touch,
};

use crate::figure::{self, median};

/// Engines' largest prompts among the agents' requests: what follows is cut off.
const BLOCKS_MAX: usize = 4096;
/// Blocks of the pool in which decisions are timed.
const POOL: usize = 1_000_000;
/// Blocks of a chain there.
const CHAIN: usize = 32;

/// A trace, what its figures' names begin with, and the capacities with what the policy should close at them.
struct Case {
    trace: Vec<TraceRequest>,
    prefix: &'static str,
    capacities: &'static [(usize, Option<&'static str>)],
}

const CONVERSATION: &[(usize, Option<&str>)] =
    &[(1000, None), (5000, Some(">= 0.24")), (10_000, Some(">= 0.17")), (30_000, None), (50_000, None)];
const AGENTS: &[(usize, Option<&str>)] = &[
    (1000, None),
    (2000, Some(">= 0.40")),
    (4096, Some(">= 0.35")),
    (8192, None),
    (10_000, Some(">= 0.20")),
    (20_000, None),
    (30_000, None),
];
const MIXED: &[(usize, Option<&str>)] =
    &[(2000, Some(">= 0.25")), (4096, Some(">= 0.20")), (5000, None), (10_000, Some(">= 0.10")), (30_000, None)];

/// Measures the group.
pub fn measure(conversation: &Path, agents: &Path, rounds: usize) -> anyhow::Result<()> {
    let (conversation, agents) = (trace::read(conversation)?, read_agents(agents)?);
    let mixed = mix(&conversation, &agents);
    for case in [
        Case { trace: conversation, prefix: "", capacities: CONVERSATION },
        Case { trace: agents, prefix: "agents_", capacities: AGENTS },
        Case { trace: mixed, prefix: "mixed_", capacities: MIXED },
    ] {
        case.measure();
    }
    decisions(rounds.min(5));
    Ok(())
}

impl Case {
    fn measure(&self) {
        for (capacity, target) in self.capacities {
            let run = replay::simulate(&self.trace, *capacity, PolicyKind::default());
            let name = |what: &str| format!("{}{what}_{capacity}", self.prefix);
            figure::note("eviction", &name("hit_ratio"), run.hit_ratio);
            figure::note("eviction", &name("lru_hit_ratio"), run.lru_hit_ratio);
            figure::note("eviction", &name("optimum_hit_ratio"), run.optimum_hit_ratio);
            figure::note("eviction", &name("prefill_saved"), run.prefill_saved);
            figure::note("eviction", &name("lru_prefill_saved"), run.lru_prefill_saved);
            let above = run.hit_ratio - run.lru_hit_ratio;
            if let Some(target) = target {
                figure::print("eviction", &name("closed"), above / (run.optimum_hit_ratio - run.lru_hit_ratio), target);
            }
            figure::print("eviction", &name("above_lru"), above, ">= -0.001");
        }
    }
}

/// The agents' requests: each begins as an earlier one, and goes on with blocks of its own.
fn read_agents(path: &Path) -> anyhow::Result<Vec<TraceRequest>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let (mut whole, mut fresh): (Vec<Vec<u64>>, u64) = (Vec::new(), 0);
    let mut requests = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let numbers: Vec<i64> = line.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let [at_ms, parent, shared, new] = numbers[..] else { anyhow::bail!("{line:?} has no four numbers") };
        let parent = usize::try_from(parent).ok().and_then(|parent| whole.get(parent));
        let mut blocks: Vec<u64> = parent.into_iter().flatten().take(shared as usize).copied().collect();
        blocks.extend((fresh..).take(new as usize));
        fresh += new as u64;
        let cut = blocks.iter().take(BLOCKS_MAX).copied().collect();
        requests.push(TraceRequest { timestamp_ms: at_ms as u64, blocks: cut });
        whole.push(blocks);
    }
    Ok(requests)
}

/// Both on one time line, in one pool: a block is a block.
fn mix(conversation: &[TraceRequest], agents: &[TraceRequest]) -> Vec<TraceRequest> {
    let apart = |request: &TraceRequest| TraceRequest {
        timestamp_ms: request.timestamp_ms,
        blocks: request.blocks.iter().map(|block| block + (1 << 40)).collect(),
    };
    let mut mixed: Vec<TraceRequest> = conversation.iter().cloned().chain(agents.iter().map(apart)).collect();
    mixed.sort_by_key(|request| request.timestamp_ms);
    mixed
}

/// What the policies' decisions take in a large pool: blocks stored while others leave, and blocks read.
fn decisions(rounds: usize) {
    let mut pools: Vec<(PolicyKind, Timed)> =
        PolicyKind::ALL.into_iter().map(|kind| (kind, Timed::full(kind))).collect();
    let mut times: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); pools.len()];
    for _ in 0..rounds {
        for ((_, pool), (stored, read)) in pools.iter_mut().zip(&mut times) {
            stored.push(pool.store(POOL / 4));
            read.push(pool.read(POOL / 4));
        }
    }
    for ((kind, _), (stored, read)) in pools.iter().zip(times) {
        let target = if *kind == PolicyKind::default() { "<= 150" } else { "none" };
        let name = |what: &str| format!("{}_{what}_ns_a_block", kind.name());
        figure::print("eviction", &name("store"), median(stored), target);
        figure::print("eviction", &name("read"), median(read), target);
    }
}

/// A pool of which only the decisions are timed.
struct Timed {
    policy: Box<dyn EvictionPolicy>,
    /// By block: its key's hash and its chain, side by side, as both are read when it leaves.
    blocks: Vec<(u64, usize)>,
    chains: Vec<Vec<u32>>,
    fresh: u64,
    now_ms: u64,
}

impl Timed {
    fn full(kind: PolicyKind) -> Self {
        let policy = kind.build(POOL);
        let mut pool = Self { policy, blocks: Vec::with_capacity(POOL), chains: Vec::new(), fresh: 0, now_ms: 0 };
        pool.store(POOL + POOL / 2);
        pool
    }

    /// Nanoseconds a block.
    fn store(&mut self, blocks: usize) -> f64 {
        let started = Instant::now();
        for _ in 0..blocks.div_ceil(CHAIN) {
            self.now_ms += 10;
            self.policy.at(self.now_ms);
            let (mut origin, mut chain) = (Origin::Root, Vec::with_capacity(CHAIN));
            for at in 0..CHAIN {
                self.fresh += 1;
                let key_hash = self.fresh.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(32) ^ self.fresh;
                let new = NewBlock {
                    origin,
                    key_hash,
                    kind: EvictionKind::Attention,
                    tail: at + 1 == CHAIN,
                    claim: Claim::Stored,
                };
                let Some(block) = self.room_for(&new) else { break };
                self.policy.insert(BlockIndex(block), new);
                origin = Origin::After(BlockIndex(block));
                chain.push(block);
            }
            self.chains.push(chain);
        }
        started.elapsed().as_nanos() as f64 / blocks as f64
    }

    fn room_for(&mut self, new: &NewBlock) -> Option<u32> {
        let incoming = (new.key_hash, self.chains.len());
        if self.blocks.len() < POOL {
            self.blocks.push(incoming);
            return Some(self.blocks.len() as u32 - 1);
        }
        let Some(victim) = self.policy.victim(Some(new)) else {
            self.policy.refused(new);
            return None;
        };
        let (key_hash, chain) = std::mem::replace(self.blocks.get_mut(victim.0 as usize)?, incoming);
        self.policy.remove(victim, Removal::Evicted { key_hash });
        self.chains.get_mut(chain)?.pop();
        Some(victim.0)
    }

    fn read(&mut self, blocks: usize) -> f64 {
        let (mut read, mut random) = (0, 1u64);
        let started = Instant::now();
        while read < blocks {
            self.now_ms += 10;
            self.policy.at(self.now_ms);
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Of the newer half, of which most are there.
            let half = self.chains.len() / 2;
            let Some(chain) = self.chains.get(half + (random >> 33) as usize % half.max(1)) else { continue };
            let mut touch = Touch::Hit;
            for block in chain.iter().rev() {
                self.policy.touch(BlockIndex(*block), touch);
                touch = Touch::HitBefore(BlockIndex(*block));
            }
            read += chain.len().max(1);
        }
        started.elapsed().as_nanos() as f64 / read as f64
    }
}
