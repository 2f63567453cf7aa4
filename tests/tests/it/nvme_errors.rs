//! Errors of the device that are not damage, and a sync that fails under a block that moves: nothing is dropped for either.

use kvstore_tests::tier::{Got, TierOptions, Tiers, now};
use kvstore_tiers::below::Ask;
use kvstore_tiers::slots::Delete;
use kvstore_transfer::volume::{Fault, Faults};

use crate::nvme_faults::{faulty, fill};

/// A disk that cannot read a part of itself while a lost index is built again: what it held was forgotten, and a restart did not look
/// again, because the index was complete. It is said, and the next start finds it; but not what was deleted meanwhile.
#[test]
fn what_a_scan_could_not_read_is_found_by_the_next_start() {
    let disk = tempfile::tempdir().unwrap();
    fill(disk.path(), 0..30);
    std::fs::remove_dir_all(disk.path().join("index")).unwrap();
    let bytes = std::fs::metadata(disk.path().join("blocks")).unwrap().len();
    let segments = (bytes - (64 << 10)) / (4 << 20);
    let faults = Faults::none();
    // The headers are read, and the first page of the scan; then nothing.
    faults.arm(Fault::ReadsFail, segments + 2);
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    tiers.until_state("SERVING");
    let volume = tiers.nvme.status().volumes.remove(0);
    assert!(volume.io_errors > 0 && volume.reason.unwrap().contains("could not be read"), "it is said");
    faults.disarm();
    assert!(!tiers.is_on_disk(5) && !tiers.is_on_disk(6), "the fault hit nothing");
    assert_eq!(tiers.delete(5), Delete::Deleted, "it may be there");
    assert!(tiers.sync());
    tiers.close();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    tiers.until_state("SERVING");
    let lost: Vec<u64> = (0..30).filter(|id| *id != 5 && tiers.get(*id).bytes().is_none()).collect();
    assert!(lost.is_empty(), "{lost:?} are lost");
    assert_eq!(tiers.get(5), Got::Miss, "a deleted block came back");
    tiers.close();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    assert_eq!(tiers.nvme.status().volumes[0].state, "SERVING", "nothing is left to scan");
    tiers.close();
}

/// A block is copied out of a segment that is to be emptied; the copy never reaches the disk, and the sync that was to cover it fails.
/// The index had the copy's place by then, and the old one was given up: a LOCAL block was lost.
#[test]
fn a_move_whose_sync_failed_is_taken_back() {
    let name = kvstore_tests::tier::hash;
    let hot: Vec<_> = (1..4).map(name).collect();
    let (mut hits, mut moved) = (0, 0);
    for n in (520..1500).step_by(89) {
        let disk = tempfile::tempdir().unwrap();
        let faults = Faults::none();
        let options = TierOptions { host_bytes: 8 << 20, ..faulty(&faults) };
        let tiers = Tiers::open(disk.path(), &options).unwrap();
        (0..5).for_each(|id| assert!(tiers.put(id, true)));
        faults.arm(Fault::LostAndUnsynced, n);
        for id in 5..1500 {
            tiers.put(id, false);
            tiers.ask(&hot, Ask::Read);
            if id % 50 == 49 {
                tiers.settle();
            }
        }
        hits += faults.hit();
        faults.disarm();
        tiers.until_state("SERVING");
        tiers.until_synced();
        moved += tiers.nvme.status().volumes[0].reinserted_blocks;
        let copy = kvstore_tests::tier::as_killed(disk.path());
        let later = Tiers::open(copy.path(), &options).unwrap();
        for tiers in [&tiers, &later] {
            let there = tiers.nvme.presence(&tiers.layout, 0, &hot);
            assert_eq!(there, [true; 3], "write {n} was lost");
            (1..4).for_each(|id| assert!(tiers.get(id).bytes().is_some(), "write {n} was lost: block {id}"));
        }
        later.close();
        tiers.close();
    }
    assert!(hits > 0 && moved > 0, "{hits} faults, {moved} blocks moved");
}

/// A read error is not damage: a verification, and the check after a failed sync, dropped what they could not read, pinned or not.
#[test]
fn what_cannot_be_read_for_a_moment_is_not_dropped() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..10).for_each(|id| assert!(tiers.put(id, true)));
    tiers.nvme.pin(1, &[tiers.block(4)], now().plus_ms(600_000), true, now()).unwrap();
    faults.arm(Fault::ReadsFail, 1);
    let mut report = kvstore_tiers::nvme::VerifyReport::default();
    for (volume, segment) in tiers.nvme.blocks_to_verify() {
        tiers.nvme.verify_segment(volume, segment, &mut report);
    }
    faults.disarm();
    assert_eq!((report.verified, report.corrupt), (10, 10), "none could be read");
    let volume = tiers.nvme.status().volumes.remove(0);
    assert_eq!((volume.state, volume.corrupt_blocks, volume.io_errors), ("SERVING", 0, 10));
    assert!((0..10).all(|id| tiers.is_on_disk(id)), "dropped for an error of the device");
    tiers.close();
}
