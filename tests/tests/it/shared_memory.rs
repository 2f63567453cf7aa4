//! Formats that other processes read while the daemon writes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvstore_plane::{HeapTable, KeyTable, SequenceHash, SlotEntry, SlotKey, SlotRef, SlotState};
use proptest::prelude::*;

fn key(stamp: u64) -> SlotKey {
    let bytes: Vec<u8> = (0..4u64).flat_map(|word| (stamp * 4 + word).to_le_bytes()).collect();
    SlotKey { layout: stamp as u32, group: stamp as u16, hash: SequenceHash::new(&bytes).unwrap() }
}

/// A reader sees one block's entry whole, or nothing: never a mixture of two.
#[test]
fn no_reader_sees_a_torn_entry() {
    let entry = Arc::new(SlotEntry::free());
    let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let reader = {
        let (entry, stop, reads) = (Arc::clone(&entry), Arc::clone(&stop), Arc::clone(&reads));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if let Some(record) = entry.read() {
                    let stamp = u64::from(record.length);
                    assert_eq!(record.key, key(stamp));
                    assert_eq!(record.crc32, record.length ^ 0x5555_5555);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    };
    for stamp in 1..400_000u64 {
        entry.reserve(&key(stamp), 1);
        entry.publish(stamp as u32, stamp as u32 ^ 0x5555_5555);
        entry.withdraw(SlotState::Free);
        if stamp % 1024 == 0 {
            std::thread::yield_now();
        }
    }
    entry.reserve(&key(7), 1);
    entry.publish(7, 7 ^ 0x5555_5555);
    // It reads on for a moment, and until it has seen something.
    let until = Instant::now() + Duration::from_secs(60);
    std::thread::sleep(Duration::from_millis(20));
    while reads.load(Ordering::Relaxed) == 0 && !reader.is_finished() {
        assert!(Instant::now() < until, "the reader saw nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
    stop.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    entry.withdraw(SlotState::Doomed);
    assert_eq!(entry.read(), None);
    assert_eq!(entry.state(), SlotState::Doomed);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// The table against a map, with hashes that crowd into few buckets.
    #[test]
    fn the_key_table_agrees_with_a_map(steps in proptest::collection::vec((any::<bool>(), 0..300u64), 1..1500), crowd in 0..3u32) {
        let hash_of = |id: u64| match crowd {
            0 => id.wrapping_mul(0x9E37_79B9_7F4A_7C15),
            1 => id % 5,
            _ => (id % 3) << 56 | id,
        };
        let slot_of = |id: u64| SlotRef { slab: id as u32 % 7, slot: id as u32 };
        let mut table = KeyTable::new(Box::new(HeapTable::new(4000)));
        let mut map: HashMap<u64, SlotRef> = HashMap::new();
        for (insert, id) in steps {
            if insert && !map.contains_key(&id) {
                table.insert(hash_of(id), slot_of(id), |slot| hash_of(u64::from(slot.slot))).unwrap();
                map.insert(id, slot_of(id));
            } else {
                prop_assert_eq!(table.remove(hash_of(id), slot_of(id)), map.remove(&id).is_some());
            }
            let found = table.find(hash_of(id), |slot| slot == slot_of(id));
            prop_assert_eq!(found, map.get(&id).copied());
        }
        prop_assert_eq!(table.len(), map.len());
        for id in 0..300 {
            let found = table.find(hash_of(id), |slot| slot == slot_of(id));
            prop_assert_eq!(found, map.get(&id).copied());
        }
    }
}
