//! Eviction policies on a real trace: how much of the distance from LRU to the optimum is closed.

use std::path::Path;

use kvstore::{replay, trace};

use crate::figure;

/// Measures the group.
pub fn measure(path: &Path) -> anyhow::Result<()> {
    let trace = trace::read(path)?;
    for (capacity, target) in
        [(1000, None), (5000, Some(">= 0.20")), (10_000, Some(">= 0.12")), (30_000, None), (50_000, None)]
    {
        let run = replay::simulate(&trace, capacity, Default::default());
        let name = |what: &str| format!("{what}_{capacity}");
        figure::note("eviction", &name("hit_ratio"), run.hit_ratio);
        figure::note("eviction", &name("lru_hit_ratio"), run.lru_hit_ratio);
        figure::note("eviction", &name("optimum_hit_ratio"), run.optimum_hit_ratio);
        if let Some(target) = target {
            let closed = (run.hit_ratio - run.lru_hit_ratio) / (run.optimum_hit_ratio - run.lru_hit_ratio);
            figure::print("eviction", &name("closed"), closed, target);
        }
        let above = run.hit_ratio - run.lru_hit_ratio;
        figure::print("eviction", &name("above_lru"), above, ">= -0.002");
    }
    Ok(())
}
