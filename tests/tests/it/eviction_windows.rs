//! A prompt is one request, however many calls it is read or put in. A client reads a long one in windows, and the daemon leases a few
//! blocks at a time: each of these was a turn of its session, milliseconds after the one before it, and the policy learnt a rhythm that
//! nobody had.

use kvstore_plane::SlotRef;
use kvstore_tests::random::Random;
use kvstore_tiers::eviction::{Claim, PolicyKind};
use kvstore_tiers::{BootTime, caps};

use crate::eviction_batches::{Forest, key};

/// How prompts are read.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    AtOnce,
    /// So many blocks at a time, one prompt after another.
    Windows(usize),
    /// The same, several prompts at a time.
    Interleaved(usize),
}

/// A pool that sessions use.
struct Traffic {
    forest: Forest,
    now_ms: u64,
    /// Blocks that leave at a time, at most.
    batch: usize,
    hits: usize,
    asked: usize,
}

impl Traffic {
    fn slots_of(&self, chain: &[u64]) -> Vec<SlotRef> {
        chain.iter().map_while(|id| self.forest.slots.find_slot(&key(*id))).collect()
    }

    fn store(&mut self, chain: &[u64], from: usize) {
        for at in from..chain.len() {
            let parent = at.checked_sub(1).map(|at| chain[at]);
            while !self.forest.store(chain[at], parent, self.now_ms) {
                let incoming = self.forest.incoming(chain[at], parent);
                let (slots, pool) = (&mut self.forest.slots, self.forest.pool);
                if slots.evict_some(pool, Some((&incoming, Claim::Stored)), self.batch).is_empty() {
                    return slots.refused(&incoming);
                }
            }
        }
    }

    /// Requests of several sessions at about the same time.
    fn requests(&mut self, chains: &[Vec<u64>], way: Way) {
        self.forest.slots.set_now(BootTime(self.now_ms));
        let found: Vec<Vec<SlotRef>> = chains.iter().map(|chain| self.slots_of(chain)).collect();
        for (chain, found) in chains.iter().zip(&found) {
            self.asked += chain.len();
            self.hits += found.len();
        }
        if let Way::Interleaved(window) = way {
            let rounds = found.iter().map(|found| found.len().div_ceil(window)).max().unwrap_or(0);
            for (round, found) in (0..rounds).flat_map(|round| found.iter().map(move |found| (round, found))) {
                if let Some(slots) = found.chunks(window).nth(round) {
                    self.forest.slots.touch(slots);
                }
            }
        }
        for (chain, found) in chains.iter().zip(&found) {
            match way {
                Way::AtOnce => self.forest.slots.touch(found),
                Way::Windows(window) => found.chunks(window).for_each(|slots| self.forest.slots.touch(slots)),
                Way::Interleaved(_) => {}
            }
            // What is there of it by now: others may have taken room meanwhile.
            let there = self.slots_of(chain).len();
            self.store(chain, there);
        }
    }
}

/// Agents that come back within seconds, with all they had and a little more, and people who ask once.
fn hit_ratio(policy: PolicyKind, way: Way, batch: usize) -> f64 {
    let mut random = Random(1);
    let mut traffic = Traffic { forest: Forest::new(policy), now_ms: 0, batch, hits: 0, asked: 0 };
    let mut fresh = 0u64;
    let mut new = |blocks: u64| {
        fresh += blocks;
        (fresh - blocks..fresh).collect::<Vec<u64>>()
    };
    let mut agents: Vec<Vec<u64>> = (0..6).map(|_| new(40)).collect();
    for _ in 0..3000 {
        traffic.now_ms += 1500;
        let mut chains: Vec<Vec<u64>> = (0..2).map(|_| new(20 + random.below(30))).collect();
        if random.below(2) == 0 {
            let at = random.below(6) as usize;
            agents[at].extend(new(1 + random.below(8)));
            if agents[at].len() > 200 {
                agents[at] = new(40);
            }
            chains.push(agents[at].clone());
        }
        traffic.requests(&chains, way);
    }
    traffic.hits as f64 / traffic.asked as f64
}

#[test]
fn a_prompt_that_is_read_in_windows_is_one_request() {
    for policy in PolicyKind::ALL {
        let at_once = hit_ratio(policy, Way::AtOnce, 1);
        for way in [Way::Windows(16), Way::Windows(50), Way::Windows(1), Way::Interleaved(16), Way::Interleaved(1)] {
            let in_windows = hit_ratio(policy, way, 1);
            let name = policy.name();
            assert!((at_once - in_windows).abs() < 0.01, "{name}: {at_once:.3} at once, {in_windows:.3} in {way:?}");
        }
    }
}

/// Where blocks leave in batches, a session that gave one block was not looked at again before it came back: what was worth most left
/// instead, and the learnt order was worse than LRU.
#[test]
fn what_leaves_in_batches_is_what_would_leave_one_by_one() {
    let [one_by_one, in_batches] =
        [1, caps::EVICT_BATCH].map(|most| hit_ratio(PolicyKind::Sessions, Way::AtOnce, most));
    assert!((one_by_one - in_batches).abs() < 0.01, "{one_by_one:.3} one by one, {in_batches:.3} in batches");
}
