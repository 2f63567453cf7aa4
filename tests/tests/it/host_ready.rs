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
    eventually(memory, |status| {
        assert!(status.bytes_mapped + status.bytes_ready <= status.bytes_max, "{status:?}");
        is(status)
    })
}

/// The same, where the bound was larger a moment ago.
fn eventually(memory: &Memory, is: impl Fn(&HostStatus) -> bool) -> HostStatus {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = memory.host.status();
        if is(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{status:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Puts a block, as soon as there is memory that is on its way.
fn put(memory: &Memory, id: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while memory.put(id, None).is_none() {
        assert!(Instant::now() < deadline, "block {id}: {:?}", memory.host.status());
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
    put(&memory, 1);
    let status = until(&memory, |status| status.bytes_ready == 16 * MIB);
    assert!((1..=4 * MIB).contains(&status.bytes_mapped), "one slab: {status:?}");
    // All of the memory is used by blocks in the end, and none is kept for those to come.
    for id in 2..3000 {
        put(&memory, id);
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
    eventually(&memory, |status| status.bytes_ready <= 4 * MIB);
    memory.host.set_limits(limits(128 * MIB));
    until(&memory, |status| status.bytes_ready == 8 * MIB);
    memory.host.set_ready_bytes(0);
    memory.host.tick(BootTime(2));
    until(&memory, |status| status.bytes_ready == 0);
    put(&memory, 1);
}

/// Blocks that are larger than what is ready need a slab of their own, for which it makes room.
#[test]
fn memory_that_is_too_small_for_a_block_makes_room_for_it() {
    let memory = Memory::new(64 * MIB, 40 << 20, 1);
    memory.host.set_ready_bytes(60 * MIB);
    memory.host.keep_ready(|| u64::MAX).unwrap();
    until(&memory, |status| status.bytes_ready >= 48 * MIB);
    put(&memory, 1);
    let status = until(&memory, |status| status.bytes_mapped >= 40 * MIB);
    assert!(memory.get(1), "{status:?}");
}

/// The thread that makes memory ready ends with the tier, even where it waits for memory.
#[test]
fn the_thread_ends_with_the_tier() {
    for to_spare in [u64::MAX, 0] {
        let memory = Memory::new(64 * MIB, 64 << 10, 1);
        memory.host.set_ready_bytes(8 * MIB);
        let thread = memory.host.keep_ready(move || to_spare).unwrap();
        until(&memory, |status| status.bytes_ready == to_spare.min(8 * MIB));
        drop(memory);
        thread.join().unwrap();
    }
}

/// Pools that grew at once, and a piece of memory that was just being made, took the tier beyond its bound.
#[test]
fn pools_that_grow_at_once_stay_within_the_bound() {
    let memory = Memory::new(64 * MIB, 64 << 10, 1);
    let sizes = [4 << 10, 24 << 10, 200 << 10, 1 << 20, 3 << 20, 9 << 20];
    let layouts = sizes.map(|bytes| Memory::register(&memory.host, &format!("of {bytes}"), bytes, 1));
    memory.host.set_ready_bytes(64 * MIB);
    memory.host.keep_ready(|| u64::MAX).unwrap();
    std::thread::scope(|scope| {
        let pools = layouts.map(|layout| Memory { host: memory.host.clone(), layout });
        let put = |pool: &Memory, id| {
            let stored = pool.put(id, None).is_some();
            if !stored {
                // It would have to wait for memory.
                std::thread::sleep(Duration::from_millis(1));
            }
            stored
        };
        // One that got nothing in all of these tries, as a busy machine gave memory no time to become ready, tries on.
        let put_all = move |pool: &Memory| {
            let deadline = Instant::now() + Duration::from_secs(60);
            let mut stored = (0..400).filter(|id| put(pool, *id)).count();
            while stored == 0 && Instant::now() < deadline {
                stored += usize::from(put(pool, 400));
            }
            stored
        };
        let puts = pools.map(|pool| scope.spawn(move || put_all(&pool)));
        while puts.iter().any(|put| !put.is_finished()) {
            until(&memory, |_| true);
        }
        for put in puts {
            assert!(put.join().unwrap() > 0, "each pool had its part");
        }
    });
    // Slabs and memory on their way were counted to the last byte.
    memory.host.set_ready_bytes(0);
    memory.host.set_limits(limits(4 * MIB));
    eventually(&memory, |status| {
        memory.host.tick(BootTime(1));
        status.bytes_mapped + status.bytes_ready <= 4 * MIB
    });
}

/// A plan for a large slab that nobody made threw away what was ready.
#[test]
fn a_plan_that_is_dropped_costs_nothing_that_was_ready() {
    let memory = Memory::new(64 * MIB, 40 << 20, 1);
    memory.host.set_ready_bytes(64 * MIB);
    let thread = memory.host.keep_ready(|| u64::MAX).unwrap();
    let before = until(&memory, |status| status.bytes_ready == 60 * MIB);
    assert!(!thread.is_finished());
    memory.plan_and_drop(1);
    let after = memory.host.status();
    assert_eq!((after.bytes_ready, after.bytes_mapped), (before.bytes_ready, 0));
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
    put(&memory, 1);
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
