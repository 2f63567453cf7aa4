//! `advise` beside whole simulations of the same trace: how far it is off, what it costs.

use std::path::Path;
use std::time::Instant;

use kvstore::trace;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::sampled::SampledAccesses;
use kvstore_tiers::simulate::simulate;

use crate::figure::{Figure, median};

/// Sizes at which they are compared, in blocks.
const SIZES: [u64; 6] = [1_000, 3_000, 5_000, 10_000, 20_000, 30_000];

/// Measures the group.
pub fn measure(path: &Path, rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let trace = trace::read(path)?;
    let policy = PolicyKind::default();
    let (mut whole, mut estimates) = (Vec::new(), Vec::new());
    let mut times = Vec::new();
    let mut kept = 0;
    for _ in 0..rounds.min(5) {
        let started = Instant::now();
        whole = SIZES
            .iter()
            .map(|size| {
                let requests = trace.iter().map(|request| request.blocks.as_slice());
                simulate(policy.build(*size as usize), requests, *size as usize).ratio()
            })
            .collect();
        let simulated = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let mut sample = SampledAccesses::new(kvstore::advise::ONE_IN, kvstore::caps::ACCESSES_KEPT_MAX);
        trace.iter().for_each(|request| sample.request(request.blocks.iter().copied()));
        estimates = sample.curve(policy, &SIZES).iter().map(|point| point.hit_ratio).collect();
        kept = sample.len();
        times.push(started.elapsed().as_secs_f64() / simulated);
    }
    let mut figures = Vec::new();
    let mut worst = 0.0f64;
    for ((size, whole), estimate) in SIZES.iter().zip(&whole).zip(&estimates) {
        worst = worst.max((whole - estimate).abs());
        figures.push(Figure::note("advise", &format!("hit_ratio_{size}"), *estimate));
        figures.push(Figure::note("advise", &format!("simulated_hit_ratio_{size}"), *whole));
    }
    figures.push(Figure::new("advise", "worst_difference_at_six_sizes", worst, "<= 0.02"));
    figures.push(Figure::new("advise", "time_of_simulation", median(times), "<= 0.05"));
    figures.push(Figure::note("advise", "sampled_accesses", kept as f64));
    Ok(figures)
}
