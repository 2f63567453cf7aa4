//! The Nvme tier under every fault that a disk has: never a wrong byte, no acknowledged block lost beyond the
//! contract, and service goes on.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_tests::loop_mount::LoopMount;
use kvstore_tests::tier::{Got, TierOptions, Tiers};
use kvstore_tiers::below::Ask;
use kvstore_transfer::frame::{FrameHeader, FrameIdentity};
use kvstore_transfer::volume::{Fault, Faults};

pub fn faulty(faults: &Arc<Faults>) -> TierOptions {
    TierOptions { faults: Some(Arc::clone(faults)), ..TierOptions::default() }
}

/// A life of a tier: blocks are put, some LOCAL, written behind, read back from disk, deleted, put beyond what
/// fits. What was acknowledged as LOCAL and not deleted since.
fn a_life(tiers: &Tiers, blocks: u64) -> BTreeSet<u64> {
    let mut local = BTreeSet::new();
    for id in 0..blocks {
        if tiers.put(id, id % 3 == 0) && id % 3 == 0 {
            local.insert(id);
        }
        if id % 7 == 6 {
            let _ = tiers.get(id / 2);
        }
        if id % 11 == 10 {
            tiers.nvme.delete(&tiers.layout, 0, &[kvstore_tests::tier::hash(id - 10)]);
            tiers.host.delete(&tiers.layout, 0, &[kvstore_tests::tier::hash(id - 10)]);
            local.remove(&(id - 10));
        }
    }
    tiers.settle();
    for id in 0..blocks {
        let _ = tiers.get(id);
    }
    local
}

/// The n-th read, write, sync or index write fails, for every n over a whole life and a restart: no byte is
/// wrong, no LOCAL block is lost, deleted blocks stay deleted, and the tier takes blocks again afterwards.
#[test]
fn the_nth_operation_fails_for_every_n() {
    for fault in [Fault::Eio, Fault::NoSpace] {
        for n in 1.. {
            let disk = tempfile::tempdir().unwrap();
            let faults = Faults::none();
            let options = TierOptions { host_bytes: 4 << 20, ..faulty(&faults) };
            let story = format!("{fault:?} at operation {n}");
            let tiers = Tiers::open(disk.path(), &options).unwrap();
            faults.arm(fault, n);
            let local = a_life(&tiers, 25);
            let reached = faults.hit() > 0;
            faults.disarm();
            // A second life on the same folder; what was LOCAL is there.
            tiers.until_state("SERVING");
            let retried = (0..6000).any(|_| {
                tiers.put(1000, true) || {
                    std::thread::sleep(Duration::from_millis(10));
                    false
                }
            });
            assert!(retried, "{story}: takes blocks again: {:?}", tiers.nvme.status());
            tiers.close();
            let tiers = Tiers::open(disk.path(), &options).unwrap();
            tiers.until_state("SERVING");
            for id in &local {
                assert!(tiers.get(*id).bytes().is_some(), "{story}: LOCAL block {id} is lost");
            }
            assert_eq!(tiers.get(0), Got::Miss, "{story}: a deleted block came back");
            tiers.close();
            if !reached {
                assert!(n > 40, "a life has more operations than {n}");
                break;
            }
        }
    }
}

/// The same while the folder is being opened and read after a restart.
#[test]
fn the_nth_operation_fails_while_recovering() {
    for lose_index in [false, true] {
        for n in 1..40 {
            let disk = tempfile::tempdir().unwrap();
            fill(disk.path(), 0..30);
            if lose_index {
                std::fs::remove_dir_all(disk.path().join("index")).unwrap();
            }
            let faults = Faults::none();
            faults.arm(Fault::Eio, n);
            let Ok(tiers) = Tiers::open(disk.path(), &faulty(&faults)) else { panic!("n = {n}: not opened") };
            tiers.until_state("SERVING");
            // A block that could not be read is a miss; all others are there, and all are what they were.
            let there = (0..30).filter(|id| tiers.get(*id).bytes().is_some()).count();
            let lost = 30 - there;
            // A read that failed in a scan is made again; only the read of a block that is wanted just now costs that one.
            assert!(lost <= usize::from(faults.hit() > 0), "index lost: {lose_index}, n = {n}: {lost} blocks lost");
            faults.disarm();
            tiers.close();
            let again = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
            again.until_state("SERVING");
            (0..30).for_each(|id| assert!(again.put(id, true)));
            again.close();
        }
    }
}

/// Writes that are reported as done and never were, or half; reads that come back flipped.
#[test]
fn lying_disks_cost_blocks_and_never_bytes() {
    for fault in [Fault::Torn, Fault::Lost, Fault::Flipped] {
        for n in 1..60 {
            let disk = tempfile::tempdir().unwrap();
            let faults = Faults::none();
            let options = TierOptions { host_bytes: 4 << 20, ..faulty(&faults) };
            let tiers = Tiers::open(disk.path(), &options).unwrap();
            faults.arm(fault, n);
            // Tiers::get checks each byte.
            a_life(&tiers, 20);
            faults.disarm();
            tiers.close();
            let tiers = Tiers::open(disk.path(), &options).unwrap();
            let there = (0..20).filter(|id| tiers.get(*id).bytes().is_some()).count();
            assert!(there >= 15, "{fault:?} at {n}: one fault costs one block or so, and {there} of 20 are left");
            tiers.close();
        }
    }
}

/// A failed sync is not tried again: nothing is acknowledged by it, what was written before is checked, and
/// the volume serves again.
#[test]
fn a_failed_sync_takes_the_volume_out_and_brings_it_back() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..10).for_each(|id| assert!(tiers.put(id, true)));
    faults.arm(Fault::SyncFails, 1);
    assert!(!tiers.put(10, true), "acknowledged by a sync that failed");
    faults.disarm();
    assert_eq!(tiers.nvme.status().volumes[0].sync_failures, 1);
    tiers.until_state("SERVING");
    (0..10).for_each(|id| assert!(tiers.get(id).bytes().is_some()));
    assert!(tiers.put(100, true));
    tiers.close();
}

/// Three failed syncs: the disk is not to be trusted with more. It is read, and says so.
#[test]
fn a_disk_that_keeps_failing_to_sync_becomes_read_only() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..10).for_each(|id| assert!(tiers.put(id, true)));
    let until = Instant::now() + Duration::from_secs(60);
    let mut id = 100;
    while tiers.nvme.status().volumes[0].state != "READ_ONLY" {
        assert!(Instant::now() < until, "{:?}", tiers.nvme.status());
        faults.arm(Fault::SyncFails, 1);
        tiers.put(id, true);
        faults.disarm();
        std::thread::sleep(Duration::from_millis(20));
        id += 1;
    }
    let volume = &tiers.nvme.status().volumes[0];
    assert!(volume.reason.as_ref().unwrap().contains("sync"), "{volume:?}");
    assert!(!tiers.put(1, true) || tiers.get(1).bytes().is_some());
    assert!(tiers.get(5).bytes().is_some());
    tiers.close();
}

/// The disk is pulled: its blocks are misses, memory goes on, and the state says what happened.
#[test]
fn a_pulled_disk_is_a_tier_that_left() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let options = TierOptions { host_bytes: 4 << 20, ..faulty(&faults) };
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    (0..100).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    faults.arm(Fault::Gone, 1);
    for id in 0..60 {
        let _ = tiers.get(id);
    }
    tiers.until_state("LEFT");
    assert!(!tiers.put(1000, true), "not LOCAL");
    assert!(matches!(tiers.get(1000), Got::Memory(_)), "but in memory");
    assert_eq!(tiers.get(0), Got::Miss);
    assert_eq!(tiers.nvme.presence(&tiers.layout, 0, &[kvstore_tests::tier::hash(50)]), [false]);
    tiers.close();
}

pub fn fill(disk: &Path, ids: std::ops::Range<u64>) {
    let tiers = Tiers::open(disk, &TierOptions::default()).unwrap();
    ids.for_each(|id| assert!(tiers.put(id, true)));
    tiers.close();
}

fn files_in(folder: &Path, part: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.file_name().unwrap().to_string_lossy().contains(part))
        .collect();
    paths.sort();
    paths
}

/// Rot in the data file: flipped bytes, zeroed pages, pages swapped with others, a cut-off end.
#[test]
fn damaged_data_files_cost_blocks_and_never_bytes() {
    type Damage = fn(&mut Vec<u8>);
    const START: usize = 64 << 10;
    let damages: [(&str, Damage); 4] = [
        ("flips", |bytes| (0..20).for_each(|i| bytes[START + 4096 + i * 50_021] ^= 4)),
        ("zeroed pages", |bytes| (0..20).for_each(|i| bytes[START + i * 102_400..][..4096].fill(0))),
        ("swapped pages", |bytes| {
            for i in 0..10 {
                let (a, b) = (START + 4096 + i * 208_896, START + 4096 + (i * 208_896 + 106_496));
                let page = bytes[a..a + 8192].to_vec();
                bytes.copy_within(b..b + 8192, a);
                bytes[b..b + 8192].copy_from_slice(&page);
            }
        }),
        ("a cut-off end", |bytes| bytes.truncate(START + 1_500_000)),
    ];
    for (name, damage) in damages {
        for lose_index in [false, true] {
            let disk = tempfile::tempdir().unwrap();
            fill(disk.path(), 0..30);
            let blocks = disk.path().join("blocks");
            let mut bytes = std::fs::read(&blocks).unwrap();
            damage(&mut bytes);
            std::fs::write(&blocks, bytes).unwrap();
            if lose_index {
                std::fs::remove_dir_all(disk.path().join("index")).unwrap();
            }
            let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
            tiers.until_state("SERVING");
            let there = (0..30).filter(|id| tiers.get(*id).bytes().is_some()).count();
            let volume = tiers.nvme.status().volumes.remove(0);
            assert!(there < 30, "{name}: the damage hit nothing");
            assert!(there > 0 || lose_index, "{name}: and not all");
            assert!(
                lose_index || volume.corrupt_blocks + volume.io_errors + volume.stale_blocks > 0,
                "{name}: counted"
            );
            // Put again what is missing: the tier goes on.
            (0..30).for_each(|id| assert!(tiers.put(id, true), "{name}"));
            tiers.close();
            let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
            assert!((0..30).all(|id| tiers.get(id).bytes().is_some()), "{name}");
            tiers.close();
        }
    }
}

/// A deleted SST, a garbled MANIFEST, a garbled CURRENT, an index that is a file of rubbish: found again from the
/// frames, in the background, and whole after that.
#[test]
fn a_damaged_index_is_rebuilt_from_the_frames() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 5] = [
        ("deleted SSTs", |index| files_in(index, ".sst").iter().for_each(|file| std::fs::remove_file(file).unwrap())),
        ("a garbled MANIFEST", |index| std::fs::write(&files_in(index, "MANIFEST")[0], b"rubbish").unwrap()),
        ("a garbled CURRENT", |index| std::fs::write(index.join("CURRENT"), b"rubbish").unwrap()),
        ("garbled SSTs", |index| {
            for file in files_in(index, ".sst") {
                let mut bytes = std::fs::read(&file).unwrap();
                let middle = bytes.len() / 2;
                bytes[..middle].fill(0xAB);
                std::fs::write(file, bytes).unwrap();
            }
        }),
        ("no index", |index| std::fs::remove_dir_all(index).unwrap()),
    ];
    for (name, damage) in damages {
        let disk = tempfile::tempdir().unwrap();
        fill(disk.path(), 0..30);
        // Opened again, what was in the log is in an SST.
        fill(disk.path(), 30..31);
        assert!(!files_in(&disk.path().join("index"), ".sst").is_empty());
        damage(&disk.path().join("index"));
        let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
        tiers.until_state("SERVING");
        for id in 0..31 {
            assert!(tiers.get(id).bytes().is_some(), "{name}: block {id}");
        }
        assert!(tiers.put(100, true));
        tiers.close();
        let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
        assert_eq!(tiers.nvme.status().volumes[0].state, "SERVING", "{name}: rebuilt for good");
        assert!((0..31).all(|id| tiers.get(id).bytes().is_some()), "{name}");
        tiers.close();
    }
}

/// Frames of an earlier life of a segment are still there when the index is lost: they must stay buried.
#[test]
fn earlier_lives_of_a_segment_do_not_come_back() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions { host_bytes: 8 << 20, ..TierOptions::default() }).unwrap();
    (0..1500).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    let on_disk = |tiers: &Tiers| -> BTreeSet<u64> {
        (0..1500)
            .filter(|id| tiers.nvme.presence(&tiers.layout, 0, &[kvstore_tests::tier::hash(*id)]) == [true])
            .collect()
    };
    let before = on_disk(&tiers);
    assert!(before.len() < 600, "most have left");
    tiers.close();
    std::fs::remove_dir_all(disk.path().join("index")).unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    tiers.until_state("SERVING");
    assert_eq!(on_disk(&tiers), before);
    tiers.close();
}

/// A block that moved when its segment was emptied leaves its old frame behind until the segment is opened again. Deleted
/// then, it came back from there when the index was lost.
#[test]
fn what_moved_and_was_deleted_does_not_come_back_from_its_old_place() {
    let disk = tempfile::tempdir().unwrap();
    let options = TierOptions { host_bytes: 8 << 20, ..TierOptions::default() };
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    let name = kvstore_tests::tier::hash;
    let mut moved = Vec::new();
    for id in 0..1500 {
        assert!(tiers.put(id, false));
        // Some blocks are read all the time: they move on from segment to segment.
        tiers.ask(&[name(1), name(2), name(3)], Ask::Read);
        if id % 50 == 49 {
            tiers.settle();
            moved.push(tiers.nvme.status().volumes[0].reinserted_blocks);
        }
    }
    tiers.settle();
    assert!(*moved.last().unwrap() > 3, "nothing ever moved: {moved:?}");
    let hot = [name(1), name(2), name(3)];
    assert_eq!(tiers.nvme.presence(&tiers.layout, 0, &hot), [true; 3]);
    tiers.nvme.delete(&tiers.layout, 0, &hot);
    tiers.host.delete(&tiers.layout, 0, &hot);
    tiers.close();
    std::fs::remove_dir_all(disk.path().join("index")).unwrap();
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    tiers.until_state("SERVING");
    assert_eq!(tiers.nvme.presence(&tiers.layout, 0, &hot), [false; 3]);
    tiers.close();
}

/// A block may hold bytes that look like a frame, of another namespace too. Deleted, its own header is zeroed, and a scan
/// looked at each page of it: with lives that counted up from 1, what it hid was found there and believed.
#[test]
fn a_frame_hidden_in_a_block_is_not_found_by_a_scan() {
    const BLOCK: u32 = 1 << 20;
    let disk = tempfile::tempdir().unwrap();
    let options = TierOptions { block_bytes: BLOCK, ..TierOptions::default() };
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    let victim = kvstore_tests::tier::hash(77);
    let mut name = [0; 32];
    name.iter_mut().zip(victim.to_vec()).for_each(|(to, from)| *to = from);
    let identity = FrameIdentity {
        namespace_digest: tiers.layout.namespace_digest,
        layout_digest: tiers.layout.digest,
        group: 0,
        kind: 1,
        hash: (name, victim.byte_len() as u8),
        parent: ([0; 32], 0),
    };
    let mut payload = vec![0u8; BLOCK as usize];
    for (life, page) in (1u64..).zip(payload.chunks_mut(4096)) {
        let mut frame = FrameHeader::plain(identity, life << 24, b"forged", 4096).unwrap().encode();
        frame.extend_from_slice(b"forged");
        page[..frame.len()].copy_from_slice(&frame);
    }
    assert!(tiers.put_bytes(1, &payload, true));
    tiers.nvme.delete(&tiers.layout, 0, &[kvstore_tests::tier::hash(1)]);
    tiers.close();
    for lose_header in [false, true] {
        let _ = std::fs::remove_dir_all(disk.path().join("index"));
        if lose_header {
            let file = std::fs::OpenOptions::new().write(true).open(disk.path().join("blocks")).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[0; 4096], 64 << 10).unwrap();
        }
        let tiers = Tiers::open(disk.path(), &options).unwrap();
        tiers.until_state("SERVING");
        assert_eq!(tiers.nvme.presence(&tiers.layout, 0, &[victim]), [false], "segment header lost: {lose_header}");
        tiers.close();
    }
}

/// A file system that runs full: blocks are refused, said so, read on; and taken again when there is room.
#[test]
fn a_full_file_system_refuses_writes_and_ends_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mount) = LoopMount::new(folder.path(), 60) else {
        eprintln!("skipped: a loop file system needs root, losetup and mkfs.ext4");
        return;
    };
    let disk = mount.path().join("disk");
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    (0..50).for_each(|id| assert!(tiers.put(id, true)));
    // Somebody else fills the file system.
    let ballast = mount.path().join("ballast");
    std::fs::write(&ballast, vec![1; 8 << 20]).unwrap();
    let mut more = std::fs::OpenOptions::new().append(true).open(&ballast).unwrap();
    while std::io::Write::write_all(&mut more, &[1; 65_536]).is_ok() {}
    let mut refused = 0;
    for id in 100..500 {
        refused += u64::from(!tiers.put(id, true));
    }
    assert!(refused > 0, "the file system is full: {:?}", tiers.nvme.status());
    (0..50).for_each(|id| assert!(tiers.get(id).bytes().is_some(), "block {id} can still be read"));
    drop(more);
    std::fs::remove_file(&ballast).unwrap();
    tiers.until_state("SERVING");
    let taken = (0..3000).any(|_| {
        tiers.put(1000, true) || {
            std::thread::sleep(Duration::from_millis(20));
            false
        }
    });
    assert!(taken, "{:?}", tiers.nvme.status());
    tiers.close();
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    tiers.until_state("SERVING");
    (0..50).for_each(|id| assert!(tiers.get(id).bytes().is_some()));
    tiers.close();
}
