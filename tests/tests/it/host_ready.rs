//! Memory that is made ready ahead of need: within the bound, taken by pools that grow, and given back where the bound shrinks.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use kvstore_tests::memory::Memory;
use kvstore_tiers::BootTime;
use kvstore_tiers::host::{HostLimits, HostStatus};

const MIB: u64 = 1 << 20;

fn limits(bytes: u64) -> HostLimits {
    HostLimits { bytes, high_watermark_percent: 99, low_watermark_percent: 98 }
}

/// Waits until the tier is as `is` wants it; at every moment it is within its bound.
fn until(memory: &Memory, is: impl Fn(&HostStatus) -> bool) -> HostStatus {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let status = memory.host.status();
        assert!(status.bytes_mapped + status.bytes_ready <= status.bytes_max, "{status:?}");
        if is(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{status:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The first pass through a daemon's memory ran at a third of the steady rate: each slab was made while its first block waited.
#[test]
fn a_pool_that_grows_takes_memory_that_is_ready_and_more_is_made() {
    let memory = Memory::new(128 * MIB, 64 << 10, 1);
    memory.host.set_ready_bytes(16 * MIB);
    memory.host.keep_ready(|| u64::MAX).unwrap();
    // The goal, in slabs of 4 MiB.
    until(&memory, |status| status.bytes_ready == 16 * MIB);
    assert!(memory.put(1, None).is_some());
    let status = until(&memory, |status| status.bytes_ready == 16 * MIB);
    assert!((1..=4 * MIB).contains(&status.bytes_mapped), "one slab: {status:?}");
    // All of the memory is used by blocks in the end, and none is kept for those to come.
    for id in 2..3000 {
        assert!(memory.put(id, None).is_some(), "block {id}");
        memory.host.tick(BootTime(id));
    }
    let status = until(&memory, |status| status.bytes_ready == 0);
    assert!(status.bytes_mapped > 120 * MIB, "{status:?}");
    assert!((2000..3000).all(|id| memory.get(id)), "blocks are whole");
}

#[test]
fn what_is_ready_goes_with_the_goal_and_with_the_bound() {
    let memory = Memory::new(128 * MIB, 64 << 10, 1);
    memory.host.set_ready_bytes(64 * MIB);
    memory.host.keep_ready(|| u64::MAX).unwrap();
    until(&memory, |status| status.bytes_ready == 64 * MIB);
    memory.host.set_ready_bytes(8 * MIB);
    memory.host.tick(BootTime(1));
    until(&memory, |status| status.bytes_ready == 8 * MIB);
    memory.host.set_limits(limits(4 * MIB));
    until(&memory, |status| status.bytes_ready <= 4 * MIB);
    memory.host.set_limits(limits(128 * MIB));
    until(&memory, |status| status.bytes_ready == 8 * MIB);
    memory.host.set_ready_bytes(0);
    memory.host.tick(BootTime(2));
    until(&memory, |status| status.bytes_ready == 0);
    assert!(memory.put(1, None).is_some(), "slabs are made without it, too");
}

/// Blocks that are larger than what is ready need a slab of their own, for which it makes room.
#[test]
fn memory_that_is_too_small_for_a_block_makes_room_for_it() {
    let memory = Memory::new(64 * MIB, 40 << 20, 1);
    memory.host.set_ready_bytes(60 * MIB);
    memory.host.keep_ready(|| u64::MAX).unwrap();
    until(&memory, |status| status.bytes_ready >= 48 * MIB);
    assert!(memory.put(1, None).is_some());
    let status = until(&memory, |status| status.bytes_mapped >= 40 * MIB);
    assert!(memory.get(1), "{status:?}");
}

/// The thread that makes memory ready ends with the tier, and its memory goes with it.
#[test]
fn it_ends_with_the_tier() {
    let memory = Memory::new(64 * MIB, 64 << 10, 1);
    memory.host.set_ready_bytes(8 * MIB);
    memory.host.keep_ready(|| u64::MAX).unwrap();
    until(&memory, |status| status.bytes_ready == 8 * MIB);
    let host = std::sync::Arc::downgrade(&memory.host);
    drop(memory);
    let deadline = Instant::now() + Duration::from_secs(30);
    while host.strong_count() > 0 {
        assert!(Instant::now() < deadline, "somebody keeps the tier");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What others on the machine need is left to them.
#[test]
fn no_memory_is_made_ready_where_there_is_none_to_spare() {
    let memory = Memory::new(64 * MIB, 64 << 10, 1);
    memory.host.set_ready_bytes(64 * MIB);
    let left = Mutex::new(4);
    let to_spare = move || {
        let mut left = left.lock().unwrap();
        *left = u64::saturating_sub(*left, 1);
        *left * 4 * MIB
    };
    memory.host.keep_ready(to_spare).unwrap();
    until(&memory, |status| status.bytes_ready == 12 * MIB);
    std::thread::sleep(Duration::from_millis(100));
    until(&memory, |status| status.bytes_ready == 12 * MIB);
    assert!(memory.put(1, None).is_some());
}

/// Staging memory of clients has its room even where all of the tier's memory is ready.
#[test]
fn staging_memory_pushes_out_what_is_ready() {
    let memory = Memory::new(64 * MIB, 64 << 10, 1);
    memory.host.set_ready_bytes(64 * MIB);
    memory.host.keep_ready(|| u64::MAX).unwrap();
    until(&memory, |status| status.bytes_ready >= 56 * MIB);
    let staging = memory.host.staging(7 * MIB);
    assert!(staging.is_some());
    let status = until(&memory, |status| status.bytes_mapped >= 7 * MIB);
    assert!(status.bytes_ready <= 57 * MIB, "{status:?}");
}
