//! Runs a trace through an eviction policy, on metadata alone.

use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::simulate as simulated;
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
}

/// Simulates `policy`, LRU and the optimum.
pub fn simulate(trace: &[TraceRequest], capacity_blocks: usize, policy: PolicyKind) -> Simulation {
    let requests = || trace.iter().map(|request| request.blocks.as_slice());
    let with = |policy: PolicyKind| simulated::simulate(policy.build(capacity_blocks), requests(), capacity_blocks);
    let outcome = with(policy);
    Simulation {
        requests: trace.len(),
        blocks: outcome.blocks,
        capacity_blocks,
        policy: policy.name(),
        hit_ratio: outcome.ratio(),
        lru_hit_ratio: with(PolicyKind::Lru).ratio(),
        optimum_hit_ratio: simulated::optimum(requests(), capacity_blocks).ratio(),
    }
}
