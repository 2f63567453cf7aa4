//! What a delete, a pin or a LOCAL put promised holds after kill -9, in every state of the volume; and where it cannot be promised,
//! the answer says so.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvstore_tests::tier::{Got, TierOptions, Tiers, as_killed, now};
use kvstore_tiers::slots::Delete;
use kvstore_transfer::volume::{Fault, Faults};

fn faulty(faults: &Arc<Faults>) -> TierOptions {
    TierOptions { faults: Some(Arc::clone(faults)), ..TierOptions::default() }
}

/// The tiers that a daemon finds which starts after a kill -9 at this moment. The folder stays with them.
fn after_kill(folder: &Path) -> (tempfile::TempDir, Tiers) {
    let copy = as_killed(folder);
    let tiers = Tiers::open(copy.path(), &TierOptions::default()).unwrap();
    tiers.until_state("SERVING");
    (copy, tiers)
}

fn volume(tiers: &Tiers) -> kvstore_tiers::nvme::VolumeStatus {
    tiers.nvme.status().volumes.remove(0)
}

/// An index that takes no writes: a delete is not acknowledged, also not when it is tried again and the block is gone from memory
/// already; and once the index takes writes again, nobody has to ask a second time.
#[test]
fn a_deletion_that_the_index_does_not_take_is_owed_until_it_does() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..10).for_each(|id| assert!(tiers.put(id, true)));
    faults.arm(Fault::IndexFails, 1);
    assert_eq!(tiers.delete(3), Delete::Deleted);
    assert!(!tiers.sync(), "promised by an index that takes nothing");
    assert_eq!(tiers.delete(3), Delete::Deleted, "the index still has it: a second try must wait for it, too");
    std::thread::sleep(Duration::from_millis(100));
    assert!(!tiers.sync(), "still not");
    assert_eq!(volume(&tiers).state, "INDEX_CLOSED", "and it does not pretend in between");
    faults.disarm();
    tiers.until_state("SERVING");
    tiers.until_synced();
    let (_copy, later) = after_kill(disk.path());
    assert!(!later.is_on_disk(3), "it came back");
    assert!((0..10).filter(|id| *id != 3).all(|id| later.get(id).bytes().is_some()));
    assert_eq!(tiers.delete(3), Delete::Absent);
}

/// A pin that began, and one that ended, while the index took no writes: they were in the batch that failed, and nobody wrote them
/// again.
#[test]
fn pins_outlast_an_index_that_takes_no_writes() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..10).for_each(|id| assert!(tiers.put(id, true)));
    let pin = |pin: u128, id: u64| tiers.nvme.pin(pin, &[tiers.block(id)], now().plus_ms(600_000), true, now());
    pin(1, 1).unwrap();
    assert!(tiers.sync());
    faults.arm(Fault::IndexFails, 1);
    pin(2, 2).unwrap();
    assert!(!tiers.sync());
    assert!(tiers.nvme.unpin(1, true));
    assert!(!tiers.sync());
    faults.disarm();
    tiers.until_synced();
    let (_copy, later) = after_kill(disk.path());
    assert_eq!(later.delete(1), Delete::Deleted, "its pin had ended");
    assert_eq!(later.delete(2), Delete::Pinned, "its pin is lost");
    later.close();
}

/// The data's sync fails in the round that has the deletion: the deletion was taken for written, whatever the index had said.
#[test]
fn a_deletion_outlasts_a_sync_that_fails() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..10).for_each(|id| assert!(tiers.put(id, true)));
    faults.arm(Fault::SyncFails, 1);
    assert!(!tiers.put(10, true));
    assert_eq!(tiers.delete(4), Delete::Deleted);
    tiers.until_synced();
    let (_copy, later) = after_kill(disk.path());
    assert!(!later.is_on_disk(4));
    later.close();
}

/// A block that is deleted on its way to disk: its write may end in the same round as the deletion's sync, and the entry was written
/// there, to be deleted in the next round. A kill in between brought the block back.
#[test]
fn blocks_deleted_on_their_way_are_gone_when_the_sync_says_so() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    for round in 0..4u64 {
        let ids = round * 100..round * 100 + 60;
        for id in ids.clone() {
            assert!(tiers.put(id, false));
            assert_eq!(tiers.delete(id), Delete::Deleted);
        }
        assert!(tiers.sync());
        let (_copy, later) = after_kill(disk.path());
        let back: Vec<u64> = ids.filter(|id| later.is_on_disk(*id)).collect();
        assert!(back.is_empty(), "round {round}: {back:?} came back");
        later.close();
    }
    tiers.close();
}

/// Deleted, not taken by the index, put again: the deletion that is still owed must not reach the newer copy.
#[test]
fn a_block_that_is_put_again_outlives_an_owed_deletion() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..5).for_each(|id| assert!(tiers.put(id, true)));
    faults.arm(Fault::IndexFails, 1);
    assert_eq!(tiers.delete(2), Delete::Deleted);
    assert!(!tiers.sync());
    faults.disarm();
    tiers.put_until_local(2);
    tiers.until_synced();
    let (_copy, later) = after_kill(disk.path());
    assert!(later.get(2).bytes().is_some(), "LOCAL, and lost");
    later.close();
}

/// A scan that finds a lost index's blocks again does not find what was deleted meanwhile, though it comes across it later; and a
/// kill -9 in the middle of the scan costs nothing: the next start goes on with it. It took a half-built index for a whole one.
#[test]
fn a_scan_does_not_bring_back_what_is_deleted_while_it_goes_on() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    (0..100).for_each(|id| assert!(tiers.put(id, true)));
    tiers.close();
    std::fs::remove_dir_all(disk.path().join("index")).unwrap();
    let bytes = std::fs::metadata(disk.path().join("blocks")).unwrap().len();
    let segments = (bytes - (64 << 10)) / (4 << 20);
    let faults = Faults::none();
    // The headers are read, the scan waits.
    faults.arm(Fault::ReadsWait, segments + 1);
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    assert_eq!(volume(&tiers).state, "REBUILDING");
    assert!(!tiers.is_on_disk(5), "not found yet");
    assert_eq!(tiers.delete(5), Delete::Deleted, "it may be there");
    assert_eq!(tiers.delete(7), Delete::Deleted);
    assert!(tiers.sync());
    tiers.put_until_local(7);

    let check = |tiers: &Tiers, story: &str| {
        let lost: Vec<u64> = (0..100).filter(|id| *id != 5 && tiers.get(*id).bytes().is_none()).collect();
        assert!(lost.is_empty(), "{story}: {lost:?} are lost");
        assert_eq!(tiers.get(5), Got::Miss, "{story}: it came back");
    };
    let (copy, later) = after_kill(disk.path());
    check(&later, "killed in the middle of the scan");
    later.close();
    let later = Tiers::open(copy.path(), &TierOptions::default()).unwrap();
    assert_eq!(volume(&later).state, "SERVING", "nothing is left to scan");
    check(&later, "started once more");
    later.close();

    faults.disarm();
    tiers.until_state("SERVING");
    check(&tiers, "after the scan");
    tiers.close();
    std::fs::remove_dir_all(disk.path().join("index")).unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    tiers.until_state("SERVING");
    check(&tiers, "the index was lost once more");
    tiers.close();
}

/// The index takes nothing while a scan goes on: blocks are served as they are found, and the index has them once it can; it never
/// did, and the next start knew nothing of them.
#[test]
fn what_a_scan_found_reaches_an_index_that_failed_meanwhile() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    (0..60).for_each(|id| assert!(tiers.put(id, true)));
    tiers.close();
    std::fs::remove_dir_all(disk.path().join("index")).unwrap();
    let faults = Faults::none();
    faults.arm(Fault::IndexFails, 1);
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    for id in 0..60 {
        for _ in 0..12_000 {
            if tiers.is_on_disk(id) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(tiers.get(id).bytes().is_some(), "block {id} is served");
    }
    faults.disarm();
    tiers.until_state("SERVING");
    tiers.until_synced();
    let (_copy, later) = after_kill(disk.path());
    let lost: Vec<u64> = (0..60).filter(|id| later.get(*id).bytes().is_none()).collect();
    assert!(lost.is_empty(), "{lost:?} are lost");
    later.close();
    tiers.close();
}

/// One sync failed, and a second one, of the same data, was taken for a promise 9 ms later: the kernel had marked the data clean.
/// What the failed one covered is LOCAL again only once it was written anew; and a restart does not forget that.
#[test]
fn nothing_is_local_by_a_second_sync_of_the_same_data() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    assert!(tiers.put(3, false));
    tiers.settle();
    faults.arm(Fault::SyncFails, 1);
    assert!(!tiers.put(11, true), "acknowledged by a sync that failed");
    let before = volume(&tiers);
    tiers.put_until_local(11);
    let after = volume(&tiers);
    assert_eq!(after.admitted_blocks, before.admitted_blocks + 1, "LOCAL without having been written again");
    assert!(after.reason.is_some_and(|reason| reason.contains("sync failed")), "health says so");
    assert!(tiers.get(3).bytes().is_some(), "what was read back is served");
    tiers.until_synced();

    let (_copy, later) = after_kill(disk.path());
    assert!(later.is_on_disk(3) && later.put(3, true));
    assert_eq!(volume(&later).admitted_blocks, 1, "LOCAL over a restart without having been written again");
    assert!(later.put(11, true));
    assert_eq!(volume(&later).admitted_blocks, 1, "and what was written anew is written once");
    later.close();
    tiers.close();
}

/// While what a failed sync covered is checked, nothing is promised, and the disk is not asked to sync again.
#[test]
fn nothing_is_synced_while_a_failed_sync_is_checked() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..3).for_each(|id| assert!(tiers.put(id, true)));
    for failure in 1..=3 {
        faults.arm(Fault::SyncFails, 1);
        assert!(!tiers.put(100 + failure, true));
        assert!(tiers.put_in_memory(200 + failure));
        if failure < 3 {
            tiers.put_until_local(100 + failure);
        }
    }
    let before = volume(&tiers);
    assert_eq!(before.state, "READ_ONLY");
    // The third one is for good.
    assert!(!tiers.put(1, true) && !tiers.sync());
    assert_eq!(tiers.delete(2), Delete::Deleted);
    assert!(!tiers.sync());
    assert_eq!(volume(&tiers).sync_failures, 3);
    std::thread::sleep(Duration::from_millis(1100));
    let (_copy, later) = after_kill(disk.path());
    assert!(!later.is_on_disk(2), "the index took it all the same");
    later.close();
    tiers.close();
}

/// Writes that fail now and then, with good ones in between, were counted as errors in a row as long as nobody read: after sixteen,
/// over any time, the volume left.
#[test]
fn writes_that_fail_now_and_then_do_not_cost_the_volume() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    assert!(tiers.put(0, true));
    for round in 1..25u64 {
        faults.arm(Fault::Eio, 1);
        assert!(!tiers.put(round * 10, true), "round {round}");
        tiers.put_until_local(round * 10 + 1);
        assert_eq!(volume(&tiers).state, "SERVING", "round {round}");
    }
    tiers.close();
}

/// The data's sync and the index's log fail in one round: nothing of it is promised, and what was owed is written later.
#[test]
fn data_and_index_that_fail_in_one_round_promise_nothing_and_lose_nothing() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..10).for_each(|id| assert!(tiers.put(id, true)));
    faults.arm(Fault::SyncAndIndexFail, 1);
    assert!(!tiers.put(10, true), "acknowledged by neither");
    assert_eq!(tiers.delete(4), Delete::Deleted);
    assert!(!tiers.sync());
    faults.disarm();
    let failed = volume(&tiers);
    assert!(failed.sync_failures > 0 && failed.index_failures > 0, "{failed:?}");
    tiers.put_until_local(10);
    tiers.until_synced();
    let (_copy, later) = after_kill(disk.path());
    assert!(!later.is_on_disk(4), "it came back");
    let lost: Vec<u64> = (0..11).filter(|id| *id != 4 && later.get(*id).bytes().is_none()).collect();
    assert!(lost.is_empty(), "{lost:?} are lost");
    assert_eq!(volume(&later).index_rebuilds, 0);
    later.close();
    tiers.close();
}

/// The index fails and is opened again: what it had taken before, and its log had not synced, is in it all the same, and can be
/// made LOCAL by a sync alone.
#[test]
fn what_an_index_had_taken_before_it_failed_is_there_after_it_is_opened_again() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..20).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    faults.arm(Fault::IndexFails, 1);
    assert_eq!(tiers.delete(0), Delete::Deleted);
    assert!(!tiers.sync());
    faults.disarm();
    tiers.until_state("SERVING");
    tiers.until_synced();
    (1..20).for_each(|id| assert!(tiers.put(id, true)));
    assert_eq!(volume(&tiers).admitted_blocks, 20, "none was written anew");
    let (_copy, later) = after_kill(disk.path());
    let lost: Vec<u64> = (1..20).filter(|id| later.get(*id).bytes().is_none()).collect();
    assert!(lost.is_empty() && !later.is_on_disk(0), "{lost:?} are lost");
    assert_eq!(volume(&later).index_rebuilds, 0);
    later.close();
    tiers.close();
}

/// The disk is gone: a deletion of what it holds is not promised, and neither is a pin.
#[test]
fn a_volume_that_left_promises_nothing() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &TierOptions { host_bytes: 4 << 20, ..faulty(&faults) }).unwrap();
    (0..100).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    faults.arm(Fault::Gone, 1);
    (0..60).for_each(|id| _ = tiers.get(id));
    tiers.until_state("LEFT");
    assert_eq!(tiers.delete(70), Delete::Deleted, "it may come back with the disk");
    assert!(!tiers.sync());
    let _ = tiers.nvme.pin(1, &[tiers.block(71)], now().plus_ms(600_000), true, now());
    assert!(!tiers.sync());
    tiers.close();
}
