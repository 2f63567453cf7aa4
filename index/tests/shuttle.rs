//! A reader beside the writer, in many interleavings (shuttle): the writer gives a block more holders than fit its word, and then its
//! cell, takes them away, and gives its places to another block; the reader sees what was there, or less.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

use std::sync::Arc;

use kvstore_index_shuttle::PrefixIndex;
use shuttle::sync::atomic::{AtomicBool, Ordering};

/// Chain 1 is blocks 1, 2, 3, which the even holders store; chain 11 is 11, 12, the odd ones'.
#[test]
fn a_reader_makes_nothing_up() {
    shuttle::check_pct(
        || {
            let index = Arc::new(PrefixIndex::new(0));
            let holders: Vec<_> = (0..14).map(|_| index.add_holder().unwrap()).collect();
            let even: Vec<_> = holders.iter().copied().step_by(2).collect();
            let odd: Vec<_> = holders.iter().copied().skip(1).step_by(2).collect();
            let reader = {
                let (index, even, odd) = (Arc::clone(&index), even.clone(), odd.clone());
                shuttle::thread::spawn(move || {
                    let mut matches = Vec::new();
                    for _ in 0..4 {
                        index.find(&[1, 2, 3, 4], &mut matches);
                        assert!(matches.iter().all(|found| even.contains(&found.holder) && found.blocks <= 3));
                        index.find(&[11, 12, 13], &mut matches);
                        assert!(matches.iter().all(|found| odd.contains(&found.holder) && found.blocks <= 2));
                    }
                })
            };
            even.iter().for_each(|holder| index.store(*holder, &[1, 2, 3]));
            // The cells of the first chain become the second one's.
            even.iter().for_each(|holder| index.remove(*holder, &[2, 3]));
            odd.iter().for_each(|holder| index.store(*holder, &[11, 12]));
            index.clear(odd[0]);
            index.remove_holder(even[0]);
            reader.join().unwrap();
        },
        20_000,
        3,
    );
}

/// A hole opens while somebody looks, and then the chain grows behind it: the holder never had all of it. And whoever looks after the
/// block was removed knows of the hole.
#[test]
fn a_chain_is_never_longer_than_it_was_at_some_moment() {
    shuttle::check_pct(
        || {
            let index = Arc::new(PrefixIndex::new(0));
            let holder = index.add_holder().unwrap();
            let names: Vec<u64> = (1..=60).collect();
            index.store(holder, &names[..40]);
            let removed = Arc::new(AtomicBool::new(false));
            let reader = {
                let (index, names, removed) = (Arc::clone(&index), names.clone(), Arc::clone(&removed));
                shuttle::thread::spawn(move || {
                    let mut matches = Vec::new();
                    for _ in 0..3 {
                        let after = removed.load(Ordering::SeqCst);
                        index.find(&names, &mut matches);
                        let blocks = matches.first().map_or(0, |found| found.blocks);
                        assert!(blocks <= 20 || (blocks <= 40 && !after), "{blocks}, after it was removed: {after}");
                    }
                })
            };
            index.remove(holder, &names[20..21]);
            removed.store(true, Ordering::SeqCst);
            index.store(holder, &names[40..]);
            reader.join().unwrap();
        },
        20_000,
        3,
    );
}
