//! Simulation of an eviction policy on metadata alone, beside its two yardsticks.
//!
//! A request names its blocks in prefix order. A block hits when it and all its predecessors in the
//! request are resident. The optimum is Belady's on single blocks (L. A. Belady, 1966): of all blocks,
//! the one whose next use is farthest leaves, and a block that is never used again is not admitted.

#![expect(clippy::indexing_slicing, reason = "positions come from enumerating the same slices")]

use std::collections::{BTreeSet, HashMap};

use crate::eviction::{BlockIndex, Claim, EvictionKind, EvictionPolicy, NewBlock, Origin, Removal, Touch};

/// Hits and blocks of a simulated run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SimulatedHits {
    /// Blocks that hit.
    pub hits: u64,
    /// Blocks asked for.
    pub blocks: u64,
    /// The part of the time that prefilling all of them takes which the hits save, 0 to 1, as far as it can be estimated.
    pub prefill_saved: f64,
}

/// Blocks of a chain after which attending to them takes as long as all else that a block's prefill takes.
const ATTENTION_BLOCKS: f64 = 1024.0;

/// How long prefilling the first `blocks` of a chain takes, in blocks that attend to nothing.
fn prefill_of(blocks: usize) -> f64 {
    let blocks = blocks as f64;
    blocks + blocks * blocks / (2.0 * ATTENTION_BLOCKS)
}

impl SimulatedHits {
    /// Hits per block, 0 to 1.
    pub fn ratio(self) -> f64 {
        if self.blocks == 0 { 0.0 } else { self.hits as f64 / self.blocks as f64 }
    }
}

/// A request: when it comes, in milliseconds, and its blocks' names, in prefix order.
#[derive(Clone, Copy, Debug)]
pub struct SimulatedRequest<'a> {
    /// Never before the one before it.
    pub at_ms: u64,
    /// A chain.
    pub blocks: &'a [u64],
}

/// Runs `requests` through `policy` with room for `capacity_blocks`.
pub fn simulate<'a>(
    mut policy: Box<dyn EvictionPolicy>,
    requests: impl Iterator<Item = SimulatedRequest<'a>>,
    capacity_blocks: usize,
) -> SimulatedHits {
    policy.set_capacity(capacity_blocks);
    let mut pool = SimulatedPool { policy, resident: HashMap::new(), names: Vec::new(), free: Vec::new() };
    let (mut hits, mut blocks) = (0, 0);
    let mut prefill = (0.0, 0.0);
    for SimulatedRequest { at_ms, blocks: chain } in requests {
        pool.policy.at(at_ms);
        let of_request = pool.request(chain, capacity_blocks);
        hits += of_request as u64;
        blocks += chain.len() as u64;
        prefill = (prefill.0 + prefill_of(of_request), prefill.1 + prefill_of(chain.len()));
    }
    let prefill_saved = if prefill.1 == 0.0 { 0.0 } else { prefill.0 / prefill.1 };
    SimulatedHits { hits, blocks, prefill_saved }
}

struct SimulatedPool {
    policy: Box<dyn EvictionPolicy>,
    resident: HashMap<u64, BlockIndex>,
    names: Vec<u64>,
    free: Vec<BlockIndex>,
}

impl SimulatedPool {
    /// As the daemon does it: what is there of the chain's beginning is read, and the rest stored as far as the policy gives room.
    fn request(&mut self, chain: &[u64], capacity_blocks: usize) -> usize {
        let hits = chain.iter().take_while(|name| self.resident.contains_key(name)).count();
        let mut origin = Origin::Root;
        if let Some(last) = hits.checked_sub(1).and_then(|last| self.resident.get(&chain[last])) {
            self.policy.touch(*last, Touch::Hit);
            origin = Origin::After(*last);
        }
        for (position, name) in chain.iter().enumerate().skip(hits) {
            let tail = position + 1 == chain.len();
            let new =
                NewBlock { origin, key_hash: mix(*name), kind: EvictionKind::Attention, tail, claim: Claim::Stored };
            origin = Origin::Absent;
            if self.resident.len() >= capacity_blocks && !self.evict_one(&new) {
                continue;
            }
            let block = self.place(*name);
            self.policy.insert(block, new);
            origin = Origin::After(block);
        }
        hits
    }

    fn place(&mut self, name: u64) -> BlockIndex {
        let block = self.free.pop().unwrap_or(BlockIndex(self.names.len() as u32));
        if self.names.len() <= block.0 as usize {
            self.names.push(name);
        }
        self.names[block.0 as usize] = name;
        self.resident.insert(name, block);
        block
    }

    fn evict_one(&mut self, incoming: &NewBlock) -> bool {
        let Some(victim) = self.policy.victim(Some(incoming)) else {
            self.policy.refused(incoming);
            return false;
        };
        let name = self.names[victim.0 as usize];
        self.policy.remove(victim, Removal::Evicted { key_hash: mix(name) });
        self.resident.remove(&name);
        self.free.push(victim);
        true
    }
}

/// Spreads small consecutive names over 64 bits (the finaliser of SplitMix64).
fn mix(name: u64) -> u64 {
    let mut x = name.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Belady's optimum on the same requests.
pub fn optimum<'a>(requests: impl Iterator<Item = &'a [u64]>, capacity_blocks: usize) -> SimulatedHits {
    let sequence: Vec<u64> = requests.flatten().copied().collect();
    let next_use = next_uses(&sequence);
    let mut resident: HashMap<u64, usize> = HashMap::new();
    let mut by_next_use: BTreeSet<(usize, u64)> = BTreeSet::new();
    let mut hits = 0;
    for (position, name) in sequence.iter().enumerate() {
        if let Some(expected) = resident.remove(name) {
            hits += 1;
            by_next_use.remove(&(expected, *name));
        }
        let Some(next) = next_use[position] else { continue };
        resident.insert(*name, next);
        by_next_use.insert((next, *name));
        if resident.len() > capacity_blocks
            && let Some((_, farthest)) = by_next_use.pop_last()
        {
            resident.remove(&farthest);
        }
    }
    SimulatedHits { hits, blocks: sequence.len() as u64, prefill_saved: 0.0 }
}

fn next_uses(sequence: &[u64]) -> Vec<Option<usize>> {
    let mut later: HashMap<u64, usize> = HashMap::new();
    let mut next_use = vec![None; sequence.len()];
    for (position, name) in sequence.iter().enumerate().rev() {
        next_use[position] = later.insert(*name, position);
    }
    next_use
}
