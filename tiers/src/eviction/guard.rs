//! The guard: what LRU and what the learnt order hit, each on a small model of the pool, over a sample of the blocks, one in so many,
//! with every access to them. The pool goes by LRU until the learnt order has earned more, and again once it has lost that: as many
//! hits as some tens of requests differ by. ("Cache Modeling and Optimization using Miniature Simulations", Waldspurger, Saemundsson,
//! Ahmad, Park, USENIX ATC 2017, for the models.)

#![expect(clippy::indexing_slicing, reason = "places are kept below the sizes that new() gives")]

use super::lifetimes::Lifetimes;
use super::links::Lists;
use super::sessions::Sessions;
use super::{BlockIndex, Claim, EvictionKind, EvictionPolicy, NewBlock, Origin, Removal, Touch};

const NONE: u32 = u32::MAX;
/// Blocks of a model, about.
const BLOCKS: usize = 4096;

/// The learnt order counts once it has gained as many hits as the two differ by in so many requests, ...
const PROOF: f32 = 24.0;
/// ... and until all of that is lost; what is gained beyond so many requests' worth is no credit.
const CREDIT: f32 = 72.0;
/// Hits for each block asked for that do not count as gained: where next to everything hits, LRU is as good.
const LEAST_GAIN: f32 = 0.004;
/// By how many hits the two differ in a request: its mean takes over this part a request, ...
const DIFFER_WEIGHT: f32 = 1.0 / 256.0;
/// ... and is no less than this.
const DIFFER_LEAST: f32 = 0.01;
/// Of what LRU's stay is now, its mean takes over this part a request.
const STAY_WEIGHT: f32 = 0.1;

/// Places of hashes: open addressing, at most half full.
struct Places {
    table: Vec<u32>,
    /// By place.
    hashes: Vec<u64>,
}

impl Places {
    fn new(capacity: usize) -> Self {
        Self { table: vec![NONE; (2 * capacity + 2).next_power_of_two()], hashes: vec![0; capacity + 1] }
    }

    fn home(&self, key_hash: u64) -> usize {
        (key_hash ^ key_hash >> 32) as usize & (self.table.len() - 1)
    }

    fn find(&self, key_hash: u64) -> Option<u32> {
        let mut at = self.home(key_hash);
        while self.table[at] != NONE {
            if self.hashes[self.table[at] as usize] == key_hash {
                return Some(self.table[at]);
            }
            at = (at + 1) & (self.table.len() - 1);
        }
        None
    }

    /// `key_hash` is in none yet.
    fn insert(&mut self, key_hash: u64, place: u32) {
        let mut at = self.home(key_hash);
        while self.table[at] != NONE {
            at = (at + 1) & (self.table.len() - 1);
        }
        self.table[at] = place;
        self.hashes[place as usize] = key_hash;
    }

    /// Forgets what is at `place`.
    fn erase(&mut self, place: u32) {
        let mask = self.table.len() - 1;
        let mut at = self.home(self.hashes[place as usize]);
        while self.table[at] != place {
            if self.table[at] == NONE {
                return;
            }
            at = (at + 1) & mask;
        }
        let mut next = (at + 1) & mask;
        while self.table[next] != NONE {
            let home = self.home(self.hashes[self.table[next] as usize]);
            // It may move up where its home is not between the gap and it.
            if (next.wrapping_sub(home) & mask) >= (next.wrapping_sub(at) & mask) {
                self.table[at] = self.table[next];
                at = next;
            }
            next = (next + 1) & mask;
        }
        self.table[at] = NONE;
    }
}

/// LRU, block by block.
struct LruModel {
    capacity: usize,
    places: Places,
    used_ms: Vec<u64>,
    order: Lists,
    len: usize,
}

impl LruModel {
    fn new(capacity: usize) -> Self {
        let mut order = Lists::new(1);
        order.ensure(capacity as u32);
        Self { capacity, places: Places::new(capacity), used_ms: vec![0; capacity + 1], order, len: 0 }
    }

    fn request(&mut self, key_hashes: &[u64], now_ms: u64) -> usize {
        let hits = key_hashes.iter().take_while(|hash| self.places.find(**hash).is_some()).count();
        for hash in key_hashes.iter().take(self.capacity).rev() {
            let place = match self.places.find(*hash) {
                Some(place) => place,
                None => self.make_place(*hash),
            };
            self.order.unlink(place);
            self.order.push_front(0, place);
            self.used_ms[place as usize] = now_ms;
        }
        hits
    }

    fn make_place(&mut self, key_hash: u64) -> u32 {
        let place = if self.len < self.capacity {
            self.len += 1;
            self.len as u32 - 1
        } else {
            let oldest = self.order.back(0).unwrap_or(0);
            self.places.erase(oldest);
            oldest
        };
        self.places.insert(key_hash, place);
        place
    }

    /// How long a block stays that is not used again; `None` before the first would leave.
    fn stay_ms(&self, now_ms: u64) -> Option<u64> {
        let oldest = self.order.back(0).filter(|_| self.len == self.capacity)?;
        Some(now_ms - self.used_ms[oldest as usize])
    }
}

/// The learnt order.
struct OwnModel {
    policy: Sessions,
    places: Places,
    free: Vec<u32>,
}

impl OwnModel {
    fn new(capacity: usize, one_in: u64) -> Self {
        let policy = Sessions::model(capacity, one_in);
        Self { policy, places: Places::new(capacity), free: (0..capacity as u32).rev().collect() }
    }

    /// `goes_on`: it is not a turn of its own.
    fn request(&mut self, key_hashes: &[u64], goes_on: bool, ends: bool, now_ms: u64) -> usize {
        self.policy.at(now_ms);
        let mut last = None;
        let mut hits = 0;
        while let Some(place) = key_hashes.get(hits).and_then(|hash| self.places.find(*hash)) {
            last = Some(BlockIndex(place));
            hits += 1;
        }
        if let Some(last) = last {
            self.policy.touch(last, if goes_on { Touch::Refresh } else { Touch::Hit });
        }
        for (at, key_hash) in key_hashes.iter().enumerate().skip(hits) {
            // It is behind what is not there: in the pool, what was before it was dropped once.
            if let Some(place) = self.places.find(*key_hash) {
                self.policy.remove(BlockIndex(place), Removal::Dropped);
                self.places.erase(place);
                self.free.push(place);
                last = last.filter(|last| last.0 != place);
            }
            let origin = last.map_or(Origin::Root, Origin::After);
            let tail = ends && at + 1 == key_hashes.len();
            let new =
                NewBlock { origin, key_hash: *key_hash, kind: EvictionKind::Attention, tail, claim: Claim::Stored };
            if self.free.is_empty() {
                let Some(victim) = self.policy.victim(Some(&new)) else {
                    self.policy.refused(&new);
                    break;
                };
                let key_hash = self.places.hashes[victim.0 as usize];
                self.places.erase(victim.0);
                self.policy.remove(victim, Removal::Evicted { key_hash });
                self.free.push(victim.0);
            }
            let Some(place) = self.free.pop() else { break };
            self.places.insert(*key_hash, place);
            self.policy.insert(BlockIndex(place), new);
            last = Some(BlockIndex(place));
        }
        hits
    }
}

/// See the head of this file.
pub(super) struct Guard {
    /// Of the pool.
    capacity: usize,
    one_in: u64,
    lru: LruModel,
    own: OwnModel,
    /// Hashes of the sampled blocks of the request that is under way, in prefix order.
    path: Vec<u64>,
    /// Those of it that found no room.
    refused: Vec<u64>,
    /// Hits of the learnt order less those of LRU, within bounds.
    gain: f32,
    /// By how many they differ in a request, whichever way.
    differ: f32,
    earns: bool,
    stay_ms: f32,
}

impl Guard {
    /// Of a pool of `capacity_blocks`.
    pub(super) fn new(capacity_blocks: usize) -> Self {
        let one_in = (capacity_blocks / BLOCKS).max(1).next_power_of_two() as u64;
        let capacity = (capacity_blocks as f64 / one_in as f64).round().max(1.0) as usize;
        Self {
            capacity: capacity_blocks,
            one_in,
            lru: LruModel::new(capacity),
            own: OwnModel::new(capacity, one_in),
            path: Vec::with_capacity(BLOCKS),
            refused: Vec::with_capacity(BLOCKS),
            gain: 0.0,
            differ: 0.0,
            earns: false,
            stay_ms: 0.0,
        }
    }

    /// The pool has another size now: the models begin anew, unless that is right to a quarter.
    pub(super) fn set_capacity(&mut self, capacity_blocks: usize) {
        let was = self.capacity;
        if (was - was / 4..=was + was / 4).contains(&capacity_blocks) {
            return;
        }
        *self = Self::new(capacity_blocks);
    }

    /// True where the block is in the sample. Other bits than those by which tables find their places.
    pub(super) fn has(&self, key_hash: u64) -> bool {
        (key_hash.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) & (self.one_in - 1) == 0
    }

    /// A block of the request that is under way found no room.
    pub(super) fn refuse(&mut self, key_hash: u64) {
        let is_new = self.refused.last() != Some(&key_hash) && self.refused.len() < self.path.capacity();
        if is_new && self.has(key_hash) {
            self.refused.push(key_hash);
        }
    }

    /// The request that was under way is over: it asked for these, deepest first, and those that were refused. Of the first `told` of
    /// them it was told before.
    pub(super) fn request(
        &mut self,
        deepest_first: impl Iterator<Item = u64>,
        told: usize,
        ends: bool,
        lifetimes: &Lifetimes,
    ) {
        self.path.clear();
        self.path.extend(deepest_first);
        self.path.reverse();
        self.path.append(&mut self.refused);
        if self.path.is_empty() {
            return;
        }
        let now_ms = lifetimes.now_ms();
        let lru = self.lru.request(&self.path, now_ms).saturating_sub(told);
        let own = self.own.request(&self.path, told > 0, ends, now_ms).saturating_sub(told);
        if let Some(stay) = self.lru.stay_ms(now_ms) {
            self.stay_ms += (stay as f32 - self.stay_ms) * STAY_WEIGHT;
        }
        let asked = self.path.len().saturating_sub(told);
        if asked == 0 {
            return;
        }
        let gain = own as f32 - lru as f32;
        self.differ += (gain.abs() - self.differ) * DIFFER_WEIGHT;
        let request = self.differ.max(DIFFER_LEAST);
        self.gain = (self.gain + gain - LEAST_GAIN * asked as f32).clamp(0.0, CREDIT * request);
        if self.gain >= PROOF * request {
            self.earns = true;
        } else if self.gain <= 0.0 {
            self.earns = false;
        }
    }

    /// True where the learnt order is the better one.
    pub(super) fn earns(&self) -> bool {
        self.earns
    }

    /// How long LRU keeps a block that is not used again.
    pub(super) fn stay_ms(&self) -> f32 {
        self.stay_ms
    }

    /// The index was learnt anew.
    pub(super) fn relearnt(&mut self, lifetimes: &Lifetimes) {
        self.own.policy.learn_from(lifetimes);
    }
}
