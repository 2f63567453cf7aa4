//! Memory as the kernel counts it: in a process of its own, as no other test may take any meanwhile.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use kvstore_index::PrefixIndex;

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Small indexes once took a huge page for each of their tables, several times their bound.
#[test]
fn a_small_index_is_resident_within_its_bound() {
    let before = resident();
    let indexes: Vec<PrefixIndex> = (0..40).map(|_| PrefixIndex::with_opaque_names(1 << 20)).collect();
    for index in &indexes {
        let holder = index.add_holder().unwrap();
        (0..5000u64).for_each(|name| index.store(holder, &[name * 7919 + 1]));
    }
    let bound: u64 = indexes.iter().map(|index| index.status().bytes_max).sum();
    let taken = resident() - before;
    assert!(taken <= bound, "{taken} bytes are resident, {bound} are allowed");
}
