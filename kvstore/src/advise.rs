//! Advice on sizes: estimates from a sample of the accesses what a smaller or larger tier would bring. Pure.
//!
//! A tier also holds the blocks of the faster tiers: blocks are written through to disk, and uploaded blocks stay on disk. So a tier
//! and the tiers above it together have the hits of one cache of the tier's size.

use std::collections::{BTreeMap, BTreeSet};

use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::sampled::SampledAccesses;
use serde::Serialize;

/// One block in so many is sampled: at one in 16 the conversation trace's hit ratios are off by at most 1.6 points, the agents' by 1.2, and
/// loops' by 1.4.
pub const ONE_IN: u64 = 16;
/// Another doubling of a tier that brings less than this is not worth its price, in hits per block.
const WORTH: f64 = 0.01;
/// Sizes are told from a quarter ...
const STEPS_DOWN: u32 = 3;
/// ... to eight times a tier.
const STEPS_UP: u32 = 3;

/// What the sizes are of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting {
    /// Bytes of a block: of all its layer groups and shards.
    pub block_bytes: u64,
    /// Tokens of it.
    pub block_tokens: u64,
    /// Bytes of each tier, where there is one: memory, disk, bucket.
    pub tiers: [Option<u64>; 3],
    /// The eviction policy.
    pub policy: PolicyKind,
}

/// Names of the tiers, as in the configuration.
pub const TIERS: [&str; 3] = ["host", "nvme", "object"];

/// A size of a tier, and what comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// Times its size now.
    pub times: f64,
    /// Bytes.
    pub bytes: u64,
    /// Hits per block, in this tier and those above, 0 to 1.
    pub hit_ratio: f64,
    /// Hits per block in this tier alone: what is read from it.
    pub read_ratio: f64,
    /// Bytes that are read from it for each GB that is asked for.
    pub read_bytes_per_gb: f64,
    /// Prefill tokens that the tiers so far save, of 1,000 in prompts.
    pub tokens_saved_per_1000: f64,
}

/// What may be done with one tier.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TierAdvice {
    /// Which.
    pub tier: &'static str,
    /// Sizes, smallest first.
    pub choices: Vec<Choice>,
    /// The size beyond which another doubling brings less than a point of hits.
    pub suggested_bytes: u64,
}

/// What may be done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Advice {
    /// Blocks that were asked for.
    pub asked_blocks: u64,
    /// Accesses in the sample.
    pub sampled_accesses: usize,
    /// Hits per block were there room for everything.
    pub hit_ratio_without_bounds: f64,
    /// Each tier that there is.
    pub tiers: Vec<TierAdvice>,
}

fn times(bytes: u64, shift: i32) -> u64 {
    (bytes as f64 * 2f64.powi(shift)) as u64
}

/// Advice from a sample.
pub fn advise(sample: &SampledAccesses, setting: &Setting) -> Advice {
    let blocks = |bytes: u64| (bytes / setting.block_bytes.max(1)).max(1);
    let sizes = |bytes: u64| (-(STEPS_DOWN as i32)..=STEPS_UP as i32).map(move |shift| times(bytes, shift));
    let capacities: BTreeSet<u64> =
        setting.tiers.iter().flatten().flat_map(|bytes| sizes(*bytes)).map(blocks).collect();
    let capacities: Vec<u64> = capacities.into_iter().collect();
    let curve: BTreeMap<u64, f64> = sample
        .curve(setting.policy, &capacities)
        .into_iter()
        .map(|point| (point.capacity_blocks, point.hit_ratio))
        .collect();
    let ratio = |bytes: u64| curve.get(&blocks(bytes)).copied().unwrap_or(0.0);
    // Of the tiers above, as they are.
    let mut above = 0.0;
    let mut tiers = Vec::new();
    for (tier, bytes) in TIERS.into_iter().zip(setting.tiers) {
        let Some(bytes) = bytes else { continue };
        let choice = |shift: i32| {
            let bytes = times(bytes, shift);
            // A tier that is smaller than the one above adds nothing.
            let hit_ratio = ratio(bytes).max(above);
            Choice {
                times: 2f64.powi(shift),
                bytes,
                hit_ratio,
                read_ratio: hit_ratio - above,
                read_bytes_per_gb: (hit_ratio - above) * 1e9,
                tokens_saved_per_1000: hit_ratio * 1000.0,
            }
        };
        let choices: Vec<Choice> = (-(STEPS_DOWN as i32)..=STEPS_UP as i32).map(choice).collect();
        // The last doubling that is worth it: curves can be flat and rise again.
        let last = choices.windows(2).rposition(|pair| match pair {
            [smaller, larger] => larger.hit_ratio - smaller.hit_ratio >= WORTH,
            _ => false,
        });
        let suggested = last.map_or(0, |last| last + 1);
        let suggested_bytes = choices.get(suggested).map_or(bytes, |choice| choice.bytes);
        above = ratio(bytes).max(above);
        tiers.push(TierAdvice { tier, choices, suggested_bytes });
    }
    let hit_ratio_without_bounds = sample.hit_ratio(PolicyKind::Lru, u64::from(u32::MAX));
    Advice { asked_blocks: sample.asked(), sampled_accesses: sample.len(), hit_ratio_without_bounds, tiers }
}

impl Advice {
    /// The suggested sizes, as a part of a configuration file.
    pub fn to_toml(&self) -> String {
        let mut text = String::from(
            "# Suggested by `kvstore advise`: beyond these sizes, doubling a tier brings less than one percentage point of hits.\n",
        );
        for tier in &self.tiers {
            let size = bytesize::ByteSize(tier.suggested_bytes);
            match tier.tier {
                "object" => text.push_str(&format!("\n[object]\nkeep_bytes = \"{size:#}\"\n")),
                tier => text.push_str(&format!("\n[{tier}]\nbytes = \"{size:#}\"\n")),
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loop over 1,000 blocks: all of it fits, or little of it does.
    #[test]
    fn the_size_that_is_suggested_is_where_the_curve_ends() {
        let mut sample = SampledAccesses::new(1, usize::MAX);
        for round in 0..40u64 {
            (0..100)
                .for_each(|user| sample.request(round * 1000, (0..10u32).map(|block| user * 10 + u64::from(block))));
            // Some that come once.
            let once = |new: u64| 1_000_000 + round * 100 + new * 2;
            (0..20).for_each(|new| sample.request(round * 1000, (0..2u32).map(|block| once(new) + u64::from(block))));
        }
        let setting = Setting {
            block_bytes: 1 << 20,
            block_tokens: 16,
            tiers: [Some(512 << 20), Some(2048 << 20), None],
            policy: PolicyKind::Lru,
        };
        let advice = advise(&sample, &setting);
        let [host, nvme] = advice.tiers.as_slice() else { panic!("{advice:?}") };
        assert_eq!((host.tier, nvme.tier), ("host", "nvme"));
        let ratio = |tier: &TierAdvice, times: f64| {
            tier.choices.iter().find(|choice| choice.times == times).map(|choice| choice.hit_ratio)
        };
        assert!(ratio(host, 1.0) < Some(0.1) && ratio(host, 4.0) > Some(0.9), "{host:?}");
        assert!(ratio(nvme, 1.0) > Some(0.9) && ratio(nvme, 0.125) < Some(0.1), "{nvme:?}");
        assert_eq!(nvme.suggested_bytes, 2048 << 20);
        assert!((advice.hit_ratio_without_bounds - ratio(nvme, 1.0).unwrap()).abs() < 0.01);
        let toml = advice.to_toml();
        assert!(toml.contains("[nvme]\nbytes = \"2") && toml::from_str::<toml::Value>(&toml).is_ok(), "{toml}");
    }
}
