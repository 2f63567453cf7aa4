//! What every eviction policy keeps to, whatever it thinks a block is worth.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use kvstore::{replay, trace};
use kvstore_tiers::eviction::{BlockIndex, EvictionKind, EvictionPolicy, NewBlock, PolicyKind, Removal, Touch};
use proptest::prelude::*;

fn new_block(id: u32, parent: Option<u32>) -> NewBlock {
    let key_hash = u64::from(id).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    NewBlock { parent: parent.map(BlockIndex), key_hash, kind: EvictionKind::Attention, tail: id.is_multiple_of(7) }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u32, Option<u32>),
    Hit(u32),
    Refresh(u32),
    Evict,
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
        3 => Just(Step::Evict),
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
    let evict =
        |under_test: &mut Box<dyn EvictionPolicy>, resident: &mut HashMap<u32, Option<u32>>, held: &HashSet<u32>| {
            let victim = under_test.victim();
            assert_eq!(under_test.victim(), victim, "naming a victim changed something");
            let Some(victim) = victim else { return false };
            assert!(resident.contains_key(&victim.0), "{victim:?} is not resident");
            assert!(!held.contains(&victim.0), "{victim:?} is held");
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
            Step::Evict => {
                evict(&mut under_test, &mut resident, &held);
            }
            Step::Drop(id) => {
                under_test.remove(BlockIndex(id), Removal::Dropped);
                resident.remove(&id);
                held.remove(&id);
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
    while evict(&mut under_test, &mut resident, &held) {}
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
        while let Some(victim) = under_test.victim() {
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
        assert_eq!(under_test.victim(), Some(BlockIndex(0)), "{policy:?}");
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
    for (capacity, closes) in [(1000, 0.05), (5000, 0.20), (10_000, 0.12), (30_000, 0.0), (50_000, 0.0)] {
        let run = replay::simulate(&trace, capacity, PolicyKind::Hazard);
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
        requests.push(trace::TraceRequest { timestamp_ms: 0, blocks: (session * 100..session * 100 + 20).collect() });
        for _ in 0..2 {
            requests.push(trace::TraceRequest { timestamp_ms: 0, blocks: (fresh..fresh + 30).collect() });
            fresh += 30;
        }
    }
    let run = replay::simulate(&requests, 400, PolicyKind::Hazard);
    assert!(run.hit_ratio > 0.8 * run.optimum_hit_ratio, "{run:?}");
    assert!(run.lru_hit_ratio < 0.01, "{run:?}");
}
