//! Long work in memory lets others in: thousands of blocks are pinned, expire, are evicted with their slab or swept, and whoever wants
//! the lock meanwhile gets it after a few of them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvstore_tests::tier::{TierOptions, Tiers, hash};
use kvstore_tiers::host::{HoldError, HoldId, HoldKind, HostLimits, HostStatus, Leasing, NamespaceId, NamespaceLimits};
use kvstore_tiers::slots::{Delete, Presence};
use kvstore_tiers::{BootTime, SequenceHash};

const NAMESPACE: NamespaceId = NamespaceId(0);
const BLOCKS: u64 = 12_000;

fn tiers(folder: &std::path::Path) -> Tiers {
    let options = TierOptions { block_bytes: 4096, host_bytes: 128 << 20, ..TierOptions::default() };
    Tiers::open(folder, &options).unwrap()
}

fn names(ids: std::ops::Range<u64>) -> Vec<SequenceHash> {
    ids.map(hash).collect()
}

fn hold(tiers: &Tiers, id: u128, names: &[SequenceHash], expires: u64) -> Result<usize, HoldError> {
    let runs = [(&*tiers.layout, 0, names)];
    tiers.host.hold(NAMESPACE, HoldId(id), HoldKind::Pin, &runs, BootTime(expires)).map(|held| held.blocks)
}

/// Runs `work` again and again, each time after `prepare`, until a thread that asks for the tier's state all the time sees it half
/// done. Work that is done under one lock is never seen so.
fn assert_lets_others_in(tiers: &Tiers, of: fn(&HostStatus) -> u64, prepare: impl Fn(), work: impl Fn()) {
    // A busy machine may not let the other thread run in the few milliseconds of one try.
    let until = Instant::now() + Duration::from_secs(60);
    while Instant::now() < until {
        prepare();
        let (stop, seen) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        let before = of(&tiers.host.status());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Acquire) {
                    seen.lock().unwrap().push(of(&tiers.host.status()));
                }
            });
            while seen.lock().unwrap().is_empty() {
                std::thread::yield_now();
            }
            work();
            stop.store(true, Ordering::Release);
        });
        let after = of(&tiers.host.status());
        if seen.into_inner().unwrap().iter().any(|value| *value != before && *value != after) {
            return;
        }
    }
    panic!("nobody ever got the lock in the midst of it");
}

/// A hold of thousands of blocks was made, ended, and expired under one lock.
#[test]
fn a_large_hold_is_made_and_ended_in_steps() {
    let folder = tempfile::tempdir().unwrap();
    let tiers = tiers(folder.path());
    assert!((0..BLOCKS).all(|id| tiers.put_in_memory(id)));
    let names = names(0..BLOCKS);
    let pinned: fn(&HostStatus) -> u64 = |status| status.pinned_bytes;
    let release = || tiers.host.release_hold(NAMESPACE, HoldId(1), HoldKind::Pin);
    let make = || assert_eq!(hold(&tiers, 1, &names, u64::MAX), Ok(BLOCKS as usize));
    assert_lets_others_in(&tiers, pinned, || _ = release(), make);
    release();
    assert_lets_others_in(&tiers, pinned, make, || assert!(release()));
    // Many small holds that expire together are as much work as a large one.
    let small = || {
        for (id, part) in names.chunks(40).enumerate() {
            hold(&tiers, 10 + id as u128, part, 10).unwrap();
        }
    };
    assert_lets_others_in(&tiers, pinned, small, || tiers.host.tick(BootTime(10)));
    assert_eq!((tiers.host.status().pinned_bytes, (tiers.host.pins().len(), tiers.host.ticket_count())), (0, (0, 0)));
    tiers.close();
}

/// A tier that shrinks looked at all of its slabs again for each that left, and evicted all blocks of all of them, under one lock.
#[test]
fn a_tier_shrinks_in_steps() {
    let folder = tempfile::tempdir().unwrap();
    let tiers = tiers(folder.path());
    let limits = tiers.host.limits();
    let fill = || {
        tiers.host.set_limits(limits);
        assert!((0..BLOCKS).all(|id| tiers.put_in_memory(id)));
        tiers.host.set_limits(HostLimits { bytes: 8 << 20, ..limits });
    };
    assert_lets_others_in(&tiers, |status| status.blocks, fill, || tiers.host.tick(BootTime(1)));
    let status = tiers.host.status();
    assert!(status.bytes_mapped <= 8 << 20, "{status:?}");
    assert!(status.blocks > 1000, "the fullest slabs stay: {status:?}");
    tiers.close();
}

/// Blocks that nobody used leave a few at a time, all of them; what was used keeps its prefix, however long, and though the walk up to
/// its root takes more than one lock's worth of steps.
#[test]
fn unused_blocks_leave_in_steps_and_a_long_prefix_stays() {
    let folder = tempfile::tempdir().unwrap();
    let tiers = tiers(folder.path());
    let ttl = NamespaceLimits { ttl_ms: Some(60_000), ..NamespaceLimits::default() };
    tiers.host.set_namespace_limits(std::iter::once(ttl));
    tiers.host.tick(BootTime(1_000_000));
    assert!((0..5000).all(|id| tiers.put_after(id, id.checked_sub(1))));
    assert!((10_000..15_000).all(|id| tiers.put_in_memory(id)));
    tiers.host.tick(BootTime(1_050_000));
    assert!(matches!(
        tiers.host.lease_run(&tiers.layout, 0, &[hash(4999)], BootTime(1_050_000))[0],
        Leasing::Leased(_)
    ));
    tiers.host.tick(BootTime(1_100_000));
    let there = |ids| {
        let presences = tiers.host.presence(&tiers.layout, 0, &names(ids));
        presences.into_iter().filter(|presence| *presence == Presence::Resident).count()
    };
    assert_eq!((there(0..5000), there(10_000..15_000)), (5000, 0));
    tiers.host.tick(BootTime(1_200_000));
    assert_eq!(tiers.host.status().blocks, 0);
    tiers.close();
}

/// A hold that turns out to be too large takes back all that its steps had pinned; others that fit are made beside it.
#[test]
fn a_large_hold_that_is_refused_pins_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let tiers = tiers(folder.path());
    assert!((0..BLOCKS).all(|id| tiers.put_in_memory(id)));
    let limits = tiers.host.limits();
    // A third of the blocks may be pinned; none of them need leave for the smaller bound before the next tick.
    tiers.host.set_limits(HostLimits { bytes: 2 * 4096 * BLOCKS / 3, ..limits });
    // Nothing else is pinned, so to wait for an end of pins does not help.
    let refused = hold(&tiers, 2, &names(0..BLOCKS), u64::MAX);
    assert!(matches!(refused, Err(HoldError::TooLarge { percent: 50, .. })), "{refused:?}");
    assert_eq!(hold(&tiers, 1, &names(0..100), u64::MAX), Ok(100));
    let refused = hold(&tiers, 2, &names(0..BLOCKS), u64::MAX);
    assert!(matches!(refused, Err(HoldError::TooManyBytes { held_bytes: 409_600, .. })), "{refused:?}");
    assert!(!tiers.host.has_hold(NAMESPACE, HoldId(2)));
    assert_eq!(
        (tiers.host.status().pinned_bytes, (tiers.host.pins().len(), tiers.host.ticket_count())),
        (409_600, (1, 0))
    );
    let deleted = tiers.host.delete(&tiers.layout, 0, &names(0..BLOCKS));
    assert!(deleted[..100].iter().all(|outcome| *outcome == Delete::Pinned));
    assert!(deleted[100..].iter().all(|outcome| *outcome == Delete::Deleted));
    // What a refused hold had reserved of the bound on names is free again: it would be used up by the second.
    for _ in 0..200 {
        assert!(hold(&tiers, 3, &names(0..BLOCKS), u64::MAX).is_ok_and(|blocks| blocks == 100));
        assert!(tiers.host.release_hold(NAMESPACE, HoldId(3), HoldKind::Pin));
    }
    tiers.close();
}

/// Everything at once: holds that come, go and expire in steps, puts that evict, deletes, leases, and a tier that shrinks and grows.
/// What is held is there, at any moment, and in the end nothing is held, and nothing leaked.
#[test]
fn holds_keep_their_blocks_whatever_happens_between_their_steps() {
    let folder = tempfile::tempdir().unwrap();
    let options = TierOptions { block_bytes: 4096, host_bytes: 32 << 20, ..TierOptions::default() };
    let tiers = Tiers::open(folder.path(), &options).unwrap();
    let limits = tiers.host.limits();
    let (stop, held_rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let (until, most) = (Instant::now() + Duration::from_secs(2), Instant::now() + Duration::from_secs(60));
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let (tiers, stop, held_rounds) = (&tiers, &stop, &held_rounds);
            scope.spawn(move || {
                for round in 0.. {
                    if stop.load(Ordering::Acquire) {
                        break;
                    }
                    let id = u128::from(thread) << 64 | round;
                    let own = names(thread * 1500..thread * 1500 + 3000);
                    let Ok(blocks) = hold(tiers, id, &own, u64::MAX) else { continue };
                    let there = tiers.host.presence(&tiers.layout, 0, &own[..blocks]);
                    assert!(there.iter().all(|presence| *presence == Presence::Resident), "a held block left");
                    held_rounds.fetch_add(u64::from(blocks > 150), Ordering::Relaxed);
                    assert!(tiers.host.release_hold(NAMESPACE, HoldId(id), HoldKind::Pin));
                    hold(tiers, id, &own, 1).ok();
                }
            });
        }
        scope.spawn(|| {
            for id in (0..9000).cycle() {
                if stop.load(Ordering::Acquire) {
                    break;
                }
                tiers.put_in_memory(if id % 3 == 0 { id } else { id % 4500 });
                if id % 500 == 0 {
                    tiers.host.delete(&tiers.layout, 0, &names(id % 4500 + 700..id % 4500 + 703));
                    let leased = tiers.host.lease_run(&tiers.layout, 0, &names(0..1100), BootTime(1));
                    assert!(
                        leased.iter().all(|leasing| !matches!(leasing, Leasing::Leased(block) if block.len() != 4096))
                    );
                }
            }
        });
        for round in 0.. {
            // Threads that got no turn in two seconds get more.
            let end = if held_rounds.load(Ordering::Relaxed) > 10 { until } else { most };
            if Instant::now() >= end {
                break;
            }
            let bytes = if round % 8 < 6 { limits.bytes } else { limits.bytes / 2 };
            tiers.host.set_limits(HostLimits { bytes, ..limits });
            tiers.host.tick(BootTime(2));
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Release);
    });
    assert!(held_rounds.load(Ordering::Relaxed) > 10, "nothing was held");
    tiers.host.tick(BootTime(2));
    let status = tiers.host.status();
    assert_eq!(
        (status.pinned_bytes, (tiers.host.pins().len(), tiers.host.ticket_count()), status.flights),
        (0, (0, 0), 0)
    );
    let all = tiers.host.delete(&tiers.layout, 0, &names(0..9000));
    assert!(all.iter().all(|outcome| *outcome != Delete::Pinned));
    let status = tiers.host.status();
    assert_eq!((status.blocks, status.pools[0].used), (0, 0), "{status:?}");
    tiers.close();
}
