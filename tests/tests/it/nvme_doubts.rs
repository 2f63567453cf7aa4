//! What a volume cannot know, it does not promise: after a kill, with several volumes, with an index that fails, while it closes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_tests::disk_use;
use kvstore_tests::tier::{TierOptions, Tiers, as_killed, now};
use kvstore_tiers::nvme::{BegunWrite, PinRefused};
use kvstore_tiers::slots::Delete;
use kvstore_transfer::volume::{Fault, Faults};

fn faulty(faults: &Arc<Faults>) -> TierOptions {
    TierOptions { faults: Some(Arc::clone(faults)), ..TierOptions::default() }
}

/// A kill came between a block's write and the sync of it, and the index's log had the block. The next daemon took it for safe,
/// and called it LOCAL without ever asking the disk.
#[test]
fn what_an_earlier_life_did_not_sync_is_synced_before_it_is_local() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    assert!(tiers.put(3, false));
    tiers.settle();
    let copy = as_killed(disk.path());
    let faults = Faults::none();
    faults.arm(Fault::SyncFails, 1);
    let later = Tiers::open(copy.path(), &faulty(&faults)).unwrap();
    assert!(later.is_on_disk(3));
    assert!(!later.put(3, true), "LOCAL, and the disk was not asked");
    later.put_until_local(3);
    later.close();
    tiers.close();
}

/// A pin on one volume, and another volume that cannot say whether it has the block: the delete was answered as done.
#[test]
fn a_pin_on_one_volume_keeps_the_block_on_all() {
    let disks = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let two = |faults: &Arc<Faults>| TierOptions { more_folders: vec![disks[1].path().to_owned()], ..faulty(faults) };
    let faults = Faults::none();
    let tiers = Tiers::open(disks[0].path(), &two(&faults)).unwrap();
    (0..40).for_each(|id| assert!(tiers.put(id, true)));
    tiers.close();
    // The second one scans its only segment, and waits for the first page of it.
    std::fs::remove_dir_all(disks[1].path().join("index")).unwrap();
    let bytes = std::fs::metadata(disks[1].path().join("blocks")).unwrap().len();
    faults.arm(Fault::ReadsWait, (bytes - (64 << 10)) / (4 << 20) + 1);
    let tiers = Tiers::open(disks[0].path(), &two(&faults)).unwrap();
    let here: Vec<u64> = (0..40).filter(|id| tiers.is_on_disk(*id)).collect();
    assert!(!here.is_empty() && here.len() < 40, "{here:?} are on the first volume");
    for id in here {
        tiers.nvme.pin(u128::from(id), &[tiers.block(id)], now().plus_ms(600_000), true, now()).unwrap();
        assert_eq!(tiers.delete(id), Delete::Pinned, "block {id}");
        assert!(tiers.is_on_disk(id));
    }
    faults.disarm();
    tiers.close();
}

/// The bound was lowered while the index took nothing. Once it did, nobody told the volume, and without any traffic its disk space
/// stayed beyond the bound.
#[test]
fn a_smaller_bound_is_reached_on_an_idle_node_once_the_index_is_open_again() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &TierOptions { nvme_bytes: 96 << 20, ..faulty(&faults) }).unwrap();
    (0..700).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    assert!(tiers.sync());
    faults.arm(Fault::IndexFails, 1);
    assert_eq!(tiers.delete(699), Delete::Deleted);
    tiers.until_state("INDEX_CLOSED");
    tiers.nvme.set_limits(48 << 20, 8 << 20);
    std::thread::sleep(Duration::from_millis(100));
    faults.disarm();
    tiers.until_state("SERVING");
    let until = Instant::now() + Duration::from_secs(60);
    while disk_use(disk.path()) > 48 << 20 {
        assert!(Instant::now() < until, "{} bytes are still taken", disk_use(disk.path()));
        std::thread::sleep(Duration::from_millis(20));
    }
    tiers.close();
}

/// A pin that is refused for its size was ended in the index, too, which had never heard of it: while the index took nothing, each
/// refusal was remembered.
#[test]
fn a_refused_pin_owes_the_index_nothing() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    (0..400).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    tiers.until_synced();
    let written = || tiers.nvme.status().volumes[0].index_written_bytes;
    let before = written();
    let blocks: Vec<_> = (0..400).map(|id| tiers.block(id)).collect();
    for id in 0..20 {
        let refused = tiers.nvme.pin(id, &blocks, now().plus_ms(600_000), true, now());
        assert!(matches!(refused, Err(PinRefused::TooLarge { .. })), "{refused:?}");
    }
    assert!(tiers.sync());
    // An empty batch has a head of some bytes.
    assert!(written() - before <= 40, "{} bytes", written() - before);
    assert_eq!(tiers.delete(399), Delete::Deleted, "and it holds nothing");
    tiers.close();
}

/// Puts that come while the tier closes: each is answered. Some waited for ever for a committer that had gone.
#[test]
fn puts_are_answered_while_the_tier_closes() {
    for round in 0..5u64 {
        let disk = tempfile::tempdir().unwrap();
        let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
        assert!(tiers.put(0, true));
        std::thread::scope(|scope| {
            for thread in 1..4u64 {
                let tiers = &tiers;
                scope.spawn(move || {
                    let ids = (0..60).map(|id| thread * 1000 + id);
                    ids.for_each(|id| _ = tiers.put(id, true));
                    // Also of blocks that are on the disk.
                    (0..20).for_each(|_| _ = tiers.put(0, true));
                });
            }
            std::thread::sleep(Duration::from_millis(3 * round));
            tiers.nvme.close();
        });
    }
}

/// Two write the same block, of which memory has no copy. The first had said that it is on its way before it looked; the second then
/// waited for that write, and heard nothing.
#[test]
fn nobody_waits_for_a_write_that_cannot_be() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20_000 {
                    let written = tiers.nvme.begin_write(&tiers.block(1), None, Vec::new(), true);
                    assert!(matches!(written, BegunWrite::Refused), "it is nowhere, and told to be on its way");
                }
            });
        }
    });
    tiers.close();
}
