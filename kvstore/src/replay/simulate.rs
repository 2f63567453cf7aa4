//! Runs a trace through an eviction policy, on metadata alone.

use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::simulate::{self as simulated, SimulatedRequest};
use serde::Serialize;

use crate::trace::TraceRequest;

/// A simulation's outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Simulation {
    /// Requests of the trace.
    pub requests: usize,
    /// Blocks of the trace.
    pub blocks: u64,
    /// Room, in blocks.
    pub capacity_blocks: usize,
    /// The policy.
    pub policy: &'static str,
    /// Hits per block with the policy.
    pub hit_ratio: f64,
    /// With LRU.
    pub lru_hit_ratio: f64,
    /// With Belady's optimum.
    pub optimum_hit_ratio: f64,
    /// The part of all prefill time that the policy's hits save, as estimated: the deeper a block, the more it attends to.
    pub prefill_saved: f64,
    /// With LRU.
    pub lru_prefill_saved: f64,
}

/// Simulates `policy`, LRU and the optimum.
pub fn simulate(trace: &[TraceRequest], capacity_blocks: usize, policy: PolicyKind) -> Simulation {
    let requests =
        || trace.iter().map(|request| SimulatedRequest { at_ms: request.timestamp_ms, blocks: &request.blocks });
    let with = |policy: PolicyKind| simulated::simulate(policy.build(capacity_blocks), requests(), capacity_blocks);
    let (outcome, lru) = (with(policy), with(PolicyKind::Lru));
    Simulation {
        requests: trace.len(),
        blocks: outcome.blocks,
        capacity_blocks,
        policy: policy.name(),
        hit_ratio: outcome.ratio(),
        lru_hit_ratio: lru.ratio(),
        optimum_hit_ratio: simulated::optimum(requests().map(|request| request.blocks), capacity_blocks).ratio(),
        prefill_saved: outcome.prefill_saved,
        lru_prefill_saved: lru.prefill_saved,
    }
}
