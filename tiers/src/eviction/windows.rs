//! Windows: how far requests got that may read on. A client reads a long prompt in parts, and the daemon sends it in parts; to a policy
//! they are one request. Owns a fixed number of places, in which a later request's may take an earlier one's; knows nothing of runs.

use super::BlockIndex;

/// Requests that may be under way, about.
const PLACES: usize = 1024;
/// A part is used, or sent, before the next is read; what is missing comes from a disk or a bucket meanwhile.
pub(super) const WINDOW_MS: u64 = 10_000;

#[derive(Clone, Copy, Default)]
struct Reached {
    until_ms: u64,
    block: BlockIndex,
}

/// See the head of this file. Empty until the first part is read.
#[derive(Default)]
pub(super) struct Windows(Vec<Reached>);

impl Windows {
    fn place(&mut self, block: BlockIndex) -> Option<&mut Reached> {
        self.0.get_mut(block.0 as usize % PLACES)
    }

    /// A request read up to `block`.
    pub(super) fn note(&mut self, block: BlockIndex, now_ms: u64) {
        if self.0.is_empty() {
            self.0 = vec![Reached::default(); PLACES];
        }
        if let Some(place) = self.place(block) {
            *place = Reached { until_ms: now_ms + WINDOW_MS, block };
        }
    }

    /// True where a request got to `block` a moment ago, and goes on from there now.
    pub(super) fn take(&mut self, block: BlockIndex, now_ms: u64) -> bool {
        let reached = self.place(block).filter(|reached| reached.block == block && now_ms < reached.until_ms);
        reached.map(|reached| reached.until_ms = 0).is_some()
    }
}
