//! The access log: a sample of the blocks that requests ask for. It has a bounded size, and costs a few nanoseconds per block.

use std::collections::VecDeque;

use kvstore_proto::v1::{AccessedChain, AccessesChunk};
use kvstore_tiers::host::RegisteredLayout;
use kvstore_tiers::sampled::SampledAccesses;
use kvstore_tiers::{BootTime, SequenceHash, block_name as name};
use parking_lot::Mutex;

use crate::{advise, caps};

/// An engine that asks again for the same prompt within this time means the same access.
const SAME_WITHIN_MS: u64 = 5_000;
/// Prompts that are remembered for that.
const LATELY_MAX: usize = 256;
/// Names of one chunk: half a MiB.
const NAMES_PER_CHUNK: usize = 1 << 16;

/// See the head of this file.
pub struct Accesses(Mutex<State>);

struct State {
    sample: SampledAccesses,
    lately: VecDeque<(u64, BootTime)>,
    /// Faded sums over requests: blocks, bytes, tokens.
    blocks: f64,
    bytes: f64,
    tokens: f64,
}

impl Default for Accesses {
    fn default() -> Self {
        let sample = SampledAccesses::new(advise::ONE_IN, caps::ACCESSES_KEPT_MAX);
        Self(Mutex::new(State { sample, lately: VecDeque::new(), blocks: 0.0, bytes: 0.0, tokens: 0.0 }))
    }
}

impl Accesses {
    /// A request asked for these blocks. False where it asked for them a moment ago already.
    pub fn note(&self, layout: &RegisteredLayout, hashes: &[SequenceHash], now: BootTime) -> bool {
        let Some(last) = hashes.last().map(|hash| name(layout, hash)) else { return false };
        let mut state = self.0.lock();
        while state.lately.front().is_some_and(|(_, at)| now.ms_since(*at) >= SAME_WITHIN_MS)
            || state.lately.len() >= LATELY_MAX
        {
            state.lately.pop_front();
        }
        if state.lately.iter().any(|(name, _)| *name == last) {
            return false;
        }
        state.lately.push_back((last, now));
        let each: u64 = layout.groups.iter().map(|group| group.block_bytes).sum();
        let blocks = hashes.len() as f64;
        // Fades over some thousand requests: models change.
        let fade = |sum: &mut f64, more: f64| *sum = *sum * 0.999 + more;
        fade(&mut state.blocks, blocks);
        fade(&mut state.bytes, blocks * each as f64 * f64::from(layout.layout.shard.count));
        fade(&mut state.tokens, blocks * f64::from(layout.layout.block_tokens));
        state.sample.request(now.0, hashes.iter().map(|hash| name(layout, hash)));
        true
    }

    /// All of it, in pieces.
    pub fn chunks(&self) -> Vec<AccessesChunk> {
        let state = self.0.lock();
        let average = |sum: f64| (sum / state.blocks.max(1.0)).round() as u64;
        let empty = || AccessesChunk {
            one_in: state.sample.one_in(),
            block_bytes: average(state.bytes),
            block_tokens: average(state.tokens),
            chains: Vec::new(),
            part: state.sample.part(),
        };
        let (mut chunks, mut chunk, mut names) = (Vec::new(), empty(), 0);
        for (at_ms, chain, asked) in state.sample.chains() {
            names += chain.len();
            chunk.chains.push(AccessedChain { names: chain.to_vec(), asked, at_ms });
            if names >= NAMES_PER_CHUNK {
                chunks.push(std::mem::replace(&mut chunk, empty()));
                names = 0;
            }
        }
        chunks.push(chunk);
        chunks
    }
}
