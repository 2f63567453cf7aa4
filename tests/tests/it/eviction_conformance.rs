//! What every eviction policy keeps to, whatever it thinks a block is worth.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use kvstore::{replay, trace};
use kvstore_tests::random::Random;
use kvstore_tiers::eviction::{
    BlockIndex, Claim, EvictionKind, EvictionPolicy, NewBlock, Origin, PolicyKind, Removal, Touch,
};
use proptest::prelude::*;

fn new_block(id: u32, parent: Option<u32>) -> NewBlock {
    let key_hash = u64::from(id).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let origin = parent.map_or(Origin::Root, |parent| Origin::After(BlockIndex(parent)));
    NewBlock { origin, key_hash, kind: EvictionKind::Attention, tail: id.is_multiple_of(7), claim: Claim::Stored }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u32, Option<u32>),
    Hit(u32),
    Refresh(u32),
    Evict(Option<u32>),
    Pass(u64),
    Drop(u32),
    Hold(u32, bool),
    Capacity(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let id = 0..60u32;
    let step = prop_oneof![
        4 => (id.clone(), proptest::option::of(id.clone())).prop_map(|(id, parent)| Step::Insert(id, parent)),
        2 => id.clone().prop_map(Step::Hit),
        1 => id.clone().prop_map(Step::Refresh),
        3 => proptest::option::of(id.clone()).prop_map(Step::Evict),
        1 => (0..100_000u64).prop_map(Step::Pass),
        1 => id.clone().prop_map(Step::Drop),
        1 => (id, any::<bool>()).prop_map(|(id, held)| Step::Hold(id, held)),
        1 => (0..200usize).prop_map(Step::Capacity),
    ];
    proptest::collection::vec(step, 1..400)
}

/// Only residents that are not held are named; whoever is evictable is found in the end; naming a victim
/// changes nothing.
fn keeps_its_word(policy: PolicyKind, steps: &[Step]) {
    let mut under_test = policy.build(32);
    let mut resident: HashMap<u32, Option<u32>> = HashMap::new();
    let mut held: HashSet<u32> = HashSet::new();
    let mut now_ms = 0;
    let evict = |under_test: &mut Box<dyn EvictionPolicy>,
                 resident: &mut HashMap<u32, Option<u32>>,
                 held: &HashSet<u32>,
                 parent: Option<u32>| {
        // For one of the next blocks of this one's chain, or for anybody.
        let incoming = parent.map(|parent| new_block(1000 + parent, Some(parent)));
        let victim = under_test.victim(incoming.as_ref());
        assert_eq!(under_test.victim(incoming.as_ref()), victim, "naming a victim changed something");
        let Some(victim) = victim else { return false };
        assert!(resident.contains_key(&victim.0), "{victim:?} is not resident");
        assert!(!held.contains(&victim.0), "{victim:?} is held");
        let orphan = resident.iter().find(|(_, parent)| **parent == Some(victim.0));
        assert!(orphan.is_none(), "{orphan:?} outlives {victim:?}");
        under_test.remove(victim, Removal::Evicted { key_hash: new_block(victim.0, None).key_hash });
        resident.remove(&victim.0);
        true
    };
    for step in steps {
        match *step {
            Step::Insert(id, parent) if !resident.contains_key(&id) => {
                let parent = parent.filter(|parent| *parent != id && resident.contains_key(parent));
                under_test.insert(BlockIndex(id), new_block(id, parent));
                resident.insert(id, parent);
            }
            Step::Insert(..) => {}
            Step::Hit(id) => under_test.touch(BlockIndex(id), Touch::Hit),
            Step::Refresh(id) => under_test.touch(BlockIndex(id), Touch::Refresh),
            Step::Evict(parent) => {
                let parent = parent.filter(|parent| resident.contains_key(parent));
                evict(&mut under_test, &mut resident, &held, parent);
            }
            Step::Pass(ms) => {
                now_ms += ms;
                under_test.at(now_ms);
            }
            Step::Drop(id) => {
                under_test.remove(BlockIndex(id), Removal::Dropped);
                resident.remove(&id);
                held.remove(&id);
                // Nothing in the pool precedes its children any more.
                resident.values_mut().filter(|parent| **parent == Some(id)).for_each(|parent| *parent = None);
            }
            Step::Hold(id, hold) if resident.contains_key(&id) => {
                under_test.hold(BlockIndex(id), hold);
                if hold {
                    held.insert(id)
                } else {
                    held.remove(&id)
                };
            }
            Step::Hold(..) => {}
            Step::Capacity(blocks) => under_test.set_capacity(blocks),
        }
    }
    for id in held.drain() {
        under_test.hold(BlockIndex(id), false);
    }
    while evict(&mut under_test, &mut resident, &held, None) {}
    assert!(resident.is_empty(), "{policy:?} cannot evict {resident:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_policy_keeps_its_word(steps in steps()) {
        for policy in PolicyKind::ALL {
            keeps_its_word(policy, &steps);
        }
    }
}

/// A chain shrinks from its end: what is left can still be read. (A refresh makes the root the most
/// recent, so LRU does it too.)
#[test]
fn leaves_go_before_their_root() {
    for policy in PolicyKind::ALL {
        let mut under_test = policy.build(100);
        for id in 0..100u32 {
            let parent = (id % 10 > 0).then(|| id - 1);
            under_test.insert(BlockIndex(id), new_block(id, parent));
            if id % 10 == 9 {
                under_test.touch(BlockIndex(id), Touch::Refresh);
            }
        }
        let mut left: HashSet<u32> = (0..100).collect();
        while let Some(victim) = under_test.victim(None) {
            let child = victim.0 + 1;
            assert!(
                child.is_multiple_of(10) || !left.contains(&child),
                "{policy:?} evicted {victim:?} before its child"
            );
            under_test.remove(victim, Removal::Evicted { key_hash: 0 });
            left.remove(&victim.0);
        }
        assert!(left.is_empty());
    }
}

/// Blocks that no other block needs are free to go in any order: a state replaces the one before it.
#[test]
fn recurrent_states_do_not_wait_for_their_children() {
    for policy in PolicyKind::ALL {
        let mut under_test = policy.build(10);
        for id in 0..10u32 {
            let new = NewBlock { kind: EvictionKind::RecurrentState, ..new_block(id, id.checked_sub(1)) };
            under_test.insert(BlockIndex(id), new);
            under_test.hold(BlockIndex(id), id > 0);
        }
        assert_eq!(under_test.victim(None), Some(BlockIndex(0)), "{policy:?}");
    }
}

fn conversation_trace() -> Vec<trace::TraceRequest> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/traces/conversation_trace.jsonl");
    trace::read(&path).unwrap()
}

/// Published reference values: whoever reads our ratios can compare them with others'.
#[test]
fn the_yardsticks_are_right() {
    let trace = conversation_trace();
    let reference = [
        (1000, 0.0445, 0.1907),
        (5000, 0.1118, 0.3412),
        (10_000, 0.2116, 0.3664),
        (30_000, 0.3257, 0.3664),
        (50_000, 0.3546, 0.3664),
    ];
    for (capacity, lru, optimum) in reference {
        let run = replay::simulate(&trace, capacity, PolicyKind::Lru);
        assert!((run.lru_hit_ratio - lru).abs() < 0.0005, "{run:?}");
        assert!((run.optimum_hit_ratio - optimum).abs() < 0.0005, "{run:?}");
        assert_eq!(run.hit_ratio, run.lru_hit_ratio);
    }
}

/// The default policy earns its place.
#[test]
fn the_default_policy_beats_lru_where_memory_is_short() {
    let trace = conversation_trace();
    for (capacity, closes) in [(1000, 0.12), (5000, 0.18), (10_000, 0.08), (30_000, 0.0), (50_000, 0.0)] {
        let run = replay::simulate(&trace, capacity, PolicyKind::Sessions);
        let closed = (run.hit_ratio - run.lru_hit_ratio) / (run.optimum_hit_ratio - run.lru_hit_ratio);
        assert!(closed >= closes, "{closed:.3} of the distance at {capacity}: {run:?}");
        assert!(run.hit_ratio <= run.optimum_hit_ratio);
    }
}

/// A scan of new blocks through a small pool must not wash out what is read again and again.
#[test]
fn a_scan_does_not_wash_out_what_is_in_use() {
    let mut requests = Vec::new();
    let mut fresh = 1_000_000u64;
    for round in 0..3000u64 {
        let session = round % 10;
        requests.push(trace::TraceRequest {
            timestamp_ms: round * 1000,
            blocks: (session * 100..session * 100 + 20).collect(),
        });
        for _ in 0..2 {
            requests.push(trace::TraceRequest { timestamp_ms: round * 1000, blocks: (fresh..fresh + 30).collect() });
            fresh += 30;
        }
    }
    let run = replay::simulate(&requests, 400, PolicyKind::Sessions);
    assert!(run.hit_ratio > 0.8 * run.optimum_hit_ratio, "{run:?}");
    assert!(run.lru_hit_ratio < 0.01, "{run:?}");
}

/// A pool as the daemon has it, and what of a chain can be read.
struct Pool {
    policy: Box<dyn EvictionPolicy>,
    resident: HashMap<u64, BlockIndex>,
    names: Vec<u64>,
    parents: HashMap<u64, Option<u64>>,
    capacity: usize,
    now_ms: u64,
}

impl Pool {
    fn new(policy: PolicyKind, capacity: usize) -> Self {
        let policy = policy.build(capacity);
        Self { policy, resident: HashMap::new(), names: Vec::new(), parents: HashMap::new(), capacity, now_ms: 0 }
    }

    fn usable(&self, chain: &[u64]) -> usize {
        chain.iter().take_while(|name| self.resident.contains_key(name)).count()
    }

    /// A request reads what is there and stores the rest.
    fn request(&mut self, chain: &[u64], gap_ms: u64) -> usize {
        self.now_ms += gap_ms;
        self.policy.at(self.now_ms);
        let hits = self.usable(chain);
        if let Some(last) = hits.checked_sub(1) {
            self.policy.touch(self.resident[&chain[last]], Touch::Hit);
        }
        (hits..chain.len()).for_each(|at| self.put(chain, at));
        hits
    }

    fn put(&mut self, chain: &[u64], at: usize) {
        let name = chain[at];
        let parent = at.checked_sub(1).map(|parent| chain[parent]);
        let origin = match parent {
            None => Origin::Root,
            Some(parent) => self.resident.get(&parent).map_or(Origin::Absent, |parent| Origin::After(*parent)),
        };
        let key_hash = name.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let new = NewBlock {
            origin,
            key_hash,
            kind: EvictionKind::Attention,
            tail: at + 1 == chain.len(),
            claim: Claim::Stored,
        };
        let block = if self.resident.len() < self.capacity {
            BlockIndex(self.resident.len() as u32)
        } else {
            let Some(victim) = self.policy.victim(Some(&new)) else { return self.policy.refused(&new) };
            let left = self.names[victim.0 as usize];
            let key_hash = left.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            self.policy.remove(victim, Removal::Evicted { key_hash });
            self.resident.remove(&left);
            victim
        };
        self.names.resize(self.names.len().max(block.0 as usize + 1), 0);
        self.names[block.0 as usize] = name;
        self.resident.insert(name, block);
        self.parents.insert(name, parent);
        self.policy.insert(block, new);
    }

    fn assert_whole(&self) {
        for name in self.resident.keys() {
            let parent = self.parents[name];
            assert!(parent.is_none_or(|parent| self.resident.contains_key(&parent)), "{name} outlives {parent:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Sessions that go on, part, share beginnings and are longer than the pool: what is there of a chain is its beginning, always.
    #[test]
    fn a_block_never_outlives_its_parent(
        steps in proptest::collection::vec((0..12usize, 0..4u8, 1..40usize, 0..600_000u64), 1..300),
        capacity in 8..120usize,
    ) {
        for policy in PolicyKind::ALL {
            let mut pool = Pool::new(policy, capacity);
            let mut sessions: Vec<Vec<u64>> = vec![Vec::new(); 12];
            let mut fresh = 0u64;
            for (session, what, blocks, gap_ms) in &steps {
                let other = sessions[(session + blocks) % 12].clone();
                let chain = &mut sessions[*session];
                match what {
                    // It goes on, goes on elsewhere, begins as another does, begins anew.
                    0 | 1 => {}
                    2 => chain.truncate(chain.len().saturating_sub(*blocks)),
                    _ if blocks % 2 == 0 => *chain = other[..other.len() / 2].to_vec(),
                    _ => chain.clear(),
                }
                chain.extend((fresh..).take(*blocks));
                fresh += *blocks as u64;
                let hits = pool.request(&chain.clone(), *gap_ms);
                prop_assert!(hits <= capacity && pool.resident.len() <= capacity);
                pool.assert_whole();
            }
        }
    }
}

/// A long chain does not flush its own beginning, however it is put.
#[test]
fn a_chain_of_twice_the_pool_leaves_the_pool_usable() {
    const CAPACITY: usize = 256;
    let chain: Vec<u64> = (1..=2 * CAPACITY as u64).collect();
    for policy in PolicyKind::ALL {
        let at_once = |pool: &mut Pool| {
            pool.request(&chain, 1000);
        };
        let one_by_one = |pool: &mut Pool| (0..chain.len()).for_each(|at| pool.put(&chain, at));
        let repeated = |pool: &mut Pool| {
            for _ in 0..4 {
                pool.request(&chain, 1000);
            }
        };
        let ways: [&dyn Fn(&mut Pool); 3] = [&at_once, &one_by_one, &repeated];
        for (way, put) in ways.iter().enumerate() {
            // Into an empty pool, and into one that others had.
            for others in [0, 20u64] {
                let mut pool = Pool::new(policy, CAPACITY);
                for other in 1..=others {
                    pool.request(&(other * 1_000_000..other * 1_000_000 + 40).collect::<Vec<_>>(), 1000);
                }
                put(&mut pool);
                let usable = pool.usable(&chain);
                assert!(usable * 100 >= CAPACITY * 98, "{policy:?}, way {way}, {others} others: {usable} usable");
            }
        }
    }
}

/// Blocks whose beginning was deleted go before all others.
#[test]
fn what_has_lost_its_beginning_goes_first() {
    for policy in PolicyKind::ALL {
        let mut pool = Pool::new(policy, 100);
        let (old, new): (Vec<u64>, Vec<u64>) = ((1..=50).collect(), (101..=150).collect());
        pool.request(&old, 1000);
        pool.request(&new, 1000);
        // The newest chain loses its third block, and a branch of it hangs on the fifth.
        pool.policy.remove(pool.resident[&103], Removal::Dropped);
        pool.resident.remove(&103);
        for _ in 0..47 {
            let victim = pool.policy.victim(None).unwrap();
            let name = pool.names[victim.0 as usize];
            assert!((104..=150).contains(&name), "{policy:?} evicted {name} first");
            pool.policy.remove(victim, Removal::Evicted { key_hash: name });
        }
        let victim = pool.policy.victim(None).unwrap();
        assert!(!(104..=150).contains(&pool.names[victim.0 as usize]));
    }
}

/// The field's LRU, written down again as simply as can be: of the blocks that no other follows, and that the request does not use,
/// the one leaves whose last use is oldest; a block without its parent does not come.
fn lru_by_the_book(requests: &[Vec<u64>], capacity: usize) -> u64 {
    let mut used: HashMap<u64, usize> = HashMap::new();
    let mut parents: HashMap<u64, Option<u64>> = HashMap::new();
    let (mut hits, mut clock) = (0, 0);
    for chain in requests {
        let there = chain.iter().take_while(|name| used.contains_key(name)).count();
        hits += there as u64;
        let mut uses = |used: &mut HashMap<u64, usize>, name: u64| {
            clock += 1;
            used.insert(name, clock);
        };
        chain[..there].iter().for_each(|name| uses(&mut used, *name));
        for at in there..chain.len() {
            if used.len() >= capacity {
                let has_child = |name: &u64| used.keys().any(|child| parents[child] == Some(*name));
                let free = used.keys().filter(|name| !chain.contains(name) && !has_child(name));
                let Some(victim) = free.min_by_key(|name| used[name]).copied() else { break };
                used.remove(&victim);
            }
            parents.insert(chain[at], at.checked_sub(1).map(|parent| chain[parent]));
            uses(&mut used, chain[at]);
        }
    }
    hits
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lru_is_the_fields(
        steps in proptest::collection::vec((0..6usize, 0..4u8, 1..12usize), 1..60),
        capacity in 4..40usize,
    ) {
        let mut sessions: Vec<Vec<u64>> = vec![Vec::new(); 6];
        let (mut fresh, mut requests) = (0u64, Vec::new());
        for (session, what, blocks) in steps {
            let other = sessions[(session + blocks) % 6].clone();
            let chain = &mut sessions[session];
            match what {
                0 | 1 => {}
                2 => chain.truncate(chain.len().saturating_sub(blocks)),
                _ => *chain = other[..other.len() / 2].to_vec(),
            }
            chain.extend((fresh..).take(blocks));
            fresh += blocks as u64;
            requests.push(chain.clone());
        }
        let mut pool = Pool::new(PolicyKind::Lru, capacity);
        let hits: usize = requests.iter().map(|chain| pool.request(chain, 1000)).sum();
        prop_assert_eq!(hits as u64, lru_by_the_book(&requests, capacity));
    }
}

/// A block's place is used again after it was dropped, perhaps by a block behind one that was behind it: what is before a block was
/// looked for in circles then, until the memory was full.
#[test]
fn places_that_are_used_again_make_no_circles() {
    const PLACES: u32 = 48;
    for (kind, seed) in PolicyKind::ALL.into_iter().flat_map(|kind| (0..20).map(move |seed| (kind, seed))) {
        let mut random = Random(seed);
        let mut policy = kind.build(PLACES as usize);
        let mut there: Vec<Option<u64>> = vec![None; PLACES as usize];
        for step in 1..20_000u64 {
            policy.at(step * 7);
            let at = BlockIndex(random.below(u64::from(PLACES)) as u32);
            let other = BlockIndex(random.below(u64::from(PLACES)) as u32);
            match there[at.0 as usize] {
                None => {
                    let parent = there[other.0 as usize].map(|_| other.0);
                    policy.insert(at, new_block(step as u32, parent));
                    there[at.0 as usize] = Some(step);
                }
                Some(_) if random.below(4) == 0 => {
                    policy.remove(at, Removal::Dropped);
                    there[at.0 as usize] = None;
                }
                Some(_) => policy.touch(at, Touch::Hit),
            }
        }
    }
}
