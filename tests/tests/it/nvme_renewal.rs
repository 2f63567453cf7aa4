//! The index of a volume where it comes from an earlier build, where it is built again, and where it cannot be read: what an upgrade,
//! a kill in between and one bad sector cost.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::nvme_faults::{faulty, fill};
use crate::nvme_index::{assert_kept, assert_whole, killed_and_full};
use kvstore_rocksdb::{DB, IteratorMode, Options};
use kvstore_tests::loop_mount::LoopMount;
use kvstore_tests::tier::{Got, TierOptions, Tiers, as_killed, now};
use kvstore_tiers::slots::Delete;
use kvstore_transfer::volume::{Fault, Faults};

/// Makes the folder as an earlier build left it: batches without numbers, no mark and no reserve.
fn of_an_earlier_build(disk: &Path) {
    {
        let index = DB::open(&Options::default(), disk.join("index")).unwrap();
        let keys = index.iterator(IteratorMode::Start).map(|item| item.unwrap().0);
        let links: Vec<_> = keys.filter(|key| key.first() == Some(&b'g')).collect();
        assert!(!links.is_empty(), "numbers are kept elsewhere now");
        links.iter().for_each(|key| index.delete(key).unwrap());
    }
    ["mark", "reserve"].iter().for_each(|file| std::fs::remove_file(disk.join(file)).unwrap());
}

fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").args(["-r", "--no-target-directory"]).args([from, to]).status();
    assert!(copied.unwrap().success(), "{} cannot be copied", from.display());
}

/// An upgrade on a full disk: the mark was made and could not be written. The daemon did not start; at the next start the empty mark
/// was taken for damage, and a whole index was thrown away, all pins with it.
#[test]
fn an_upgrade_on_a_full_disk_costs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mount) = LoopMount::new(folder.path(), 60) else {
        println!("skipped: a loop file system needs root, losetup and mkfs.ext4");
        return;
    };
    let (disk, ballast) = killed_and_full(&mount, of_an_earlier_build);
    for start in ["the first start", "the second one"] {
        let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap_or_else(|error| panic!("{start}: {error}"));
        assert_whole(&tiers, start);
        assert_eq!(tiers.nvme.status().volumes[0].state, "NO_SPACE", "{start}");
        assert!(!disk.join("mark").exists(), "{start}: opened to be read, and it made a file");
        tiers.close();
    }
    std::fs::remove_file(ballast).unwrap();
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    tiers.until_state("SERVING");
    assert_whole(&tiers, "with room again");
    tiers.put_until_local(1000);
    tiers.close();
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    assert_whole(&tiers, "afterwards");
    tiers.close();
}

/// The same where a kill came between the two.
#[test]
fn an_upgrade_that_was_killed_costs_nothing() {
    let disk = tempfile::tempdir().unwrap();
    fill(disk.path(), 0..20);
    of_an_earlier_build(disk.path());
    std::fs::write(disk.path().join("mark"), b"").unwrap();
    for start in ["the first start", "the second one"] {
        let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
        let volume = tiers.nvme.status().volumes.remove(0);
        assert_eq!((volume.state, volume.index_rebuilds, volume.blocks), ("SERVING", 0, 20), "{start}: {volume:?}");
        assert!(tiers.sync(), "{start}");
        tiers.close();
    }
    std::fs::write(disk.path().join("mark"), b"").unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    assert_eq!(tiers.nvme.status().volumes[0].index_rebuilds, 1, "beside numbers, an empty mark is damage");
    tiers.close();
}

/// One sector of one disk's index could not be read, and no start of the daemon got beyond it: memory, the bucket and the other disks
/// were out of use as well.
#[test]
fn an_index_that_cannot_be_read_takes_out_its_volume_alone() {
    let (disk, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let options = TierOptions { more_folders: vec![other.path().to_owned()], ..TierOptions::default() };
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    (0..40).for_each(|id| assert!(tiers.put(id, true)));
    tiers.close();
    // Opened once more, so that what the log has is in a table.
    Tiers::open(disk.path(), &options).unwrap().close();
    let entries = std::fs::read_dir(disk.path().join("index")).unwrap().map(|entry| entry.unwrap().path());
    let tables: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "sst")).collect();
    let aside = tempfile::tempdir().unwrap();
    for (number, table) in tables.iter().enumerate() {
        copy(table, &aside.path().join(number.to_string()));
        std::fs::remove_file(table).unwrap();
        // An error of the system, for ever: not a file that is missing.
        symlink(table, table).unwrap();
    }
    let tiers = Tiers::open(disk.path(), &options).unwrap_or_else(|error| panic!("the daemon does not start: {error}"));
    let volumes = tiers.nvme.status().volumes;
    assert_eq!((volumes[0].state, volumes[1].state), ("LEFT", "SERVING"), "{volumes:?}");
    assert!(volumes[0].reason.as_ref().unwrap().contains("symbolic links"), "{:?}", volumes[0].reason);
    let there: Vec<u64> = (0..40).filter(|id| tiers.get(*id).bytes().is_some()).collect();
    assert!((5..35).contains(&there.len()), "{} of 40 on the other disk", there.len());
    assert!(tiers.put(1000, true), "the other disk takes writes");
    let lost = (0..40).find(|id| !there.contains(id)).unwrap();
    assert_eq!(tiers.delete(lost), Delete::Deleted, "it may come back with the disk");
    assert!(!tiers.sync(), "promised by an index that cannot be read");
    tiers.close();
    for (number, table) in tables.iter().enumerate() {
        std::fs::remove_file(table).unwrap();
        copy(&aside.path().join(number.to_string()), table);
    }
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    let volumes = tiers.nvme.status().volumes;
    assert!(volumes.iter().all(|volume| (volume.state, volume.index_rebuilds) == ("SERVING", 0)), "{volumes:?}");
    assert!((0..40).all(|id| tiers.get(id).bytes().is_some()), "something was changed");
    tiers.close();
}

/// A folder whose index is damaged, and can be read: blocks 0 to 19 are LOCAL, but 3, which was deleted; 7 is pinned.
fn damaged() -> tempfile::TempDir {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    (0..20).for_each(|id| assert!(tiers.put(id, true)));
    tiers.nvme.pin(1, &[tiers.block(7)], now().plus_ms(600_000), true, now()).unwrap();
    assert_eq!(tiers.delete(3), Delete::Deleted);
    assert!(tiers.sync());
    tiers.close();
    std::fs::write(disk.path().join("mark"), b"no mark at all").unwrap();
    disk
}

/// Opens the folder: all that [`damaged`] had is there, also at the start after. Whether the index was found damaged.
fn assert_found(disk: &Path, story: &str) -> bool {
    let mut rebuilds = Vec::new();
    for start in ["the first start", "the second one"] {
        let tiers = Tiers::open(disk, &TierOptions::default()).unwrap_or_else(|error| panic!("{story}: {error}"));
        tiers.until_state("SERVING");
        let lost: Vec<u64> = (0..20).filter(|id| *id != 3 && tiers.get(*id).bytes().is_none()).collect();
        assert!(lost.is_empty(), "{story}, {start}: {lost:?} are lost");
        assert_eq!(tiers.get(3), Got::Miss, "{story}, {start}: a deleted block came back");
        assert_eq!(tiers.delete(7), Delete::Pinned, "{story}, {start}: the pin is lost");
        rebuilds.push(tiers.nvme.status().volumes[0].index_rebuilds);
        tiers.close();
    }
    assert_eq!(rebuilds[1], 0, "{story}: built again for good");
    assert!(
        ["index.part", "index.new"].iter().all(|name| !disk.join(name).exists()),
        "{story}: something is left over"
    );
    rebuilds[0] == 1
}

/// The folder of [`damaged`], killed after a new index took the place of the damaged one, and before that took a batch.
fn renewed(damaged: &Path) -> tempfile::TempDir {
    let copy = as_killed(damaged);
    let faults = Faults::none();
    faults.arm(Fault::IndexFails, 1);
    let tiers = Tiers::open(copy.path(), &faulty(&faults)).unwrap();
    assert_eq!(tiers.nvme.status().volumes[0].index_rebuilds, 1);
    let killed = as_killed(copy.path());
    tiers.close();
    killed
}

/// The pins of a damaged index could be read. The index was removed and begun anew, and until its first batch they were in memory
/// alone: a kill in between lost them.
#[test]
fn a_kill_while_the_index_is_built_again_costs_no_pin() {
    let damaged = damaged();
    let renewed = renewed(damaged.path());
    assert!(!assert_found(renewed.path(), "killed before the first batch"));
    assert!(assert_found(damaged.path(), "never killed"));
}

/// A kill between any two steps: the old index stays as it was, or its successor takes its place.
#[test]
fn a_new_index_that_was_not_finished_is_finished_or_begun_again() {
    let damaged = damaged();
    let renewed = renewed(damaged.path());
    let new = renewed.path().join("index");
    let killed = as_killed(damaged.path());
    copy(&new, &killed.path().join("index.part"));
    std::fs::remove_file(killed.path().join("index.part/CURRENT")).unwrap();
    assert!(assert_found(killed.path(), "half of a new one"));

    let killed = as_killed(damaged.path());
    copy(&new, &killed.path().join("index.new"));
    assert!(!assert_found(killed.path(), "a new one, and all of the old one"));

    let killed = as_killed(damaged.path());
    copy(&new, &killed.path().join("index.new"));
    std::fs::remove_file(killed.path().join("index/CURRENT")).unwrap();
    assert!(!assert_found(killed.path(), "a new one, and half of the old one"));

    let killed = as_killed(damaged.path());
    std::fs::remove_dir_all(killed.path().join("index")).unwrap();
    copy(&new, &killed.path().join("index.new"));
    assert!(!assert_found(killed.path(), "a new one alone"));

    let killed = as_killed(damaged.path());
    std::fs::remove_dir_all(killed.path().join("index")).unwrap();
    copy(&new, &killed.path().join("index"));
    assert!(assert_found(killed.path(), "the new one in its place, and the old mark"));
}

/// A damaged index on a full disk: a new one has no room, and the old one, which has the pins, stays until it has.
#[test]
fn a_damaged_index_on_a_full_disk_keeps_its_pins() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mount) = LoopMount::new(folder.path(), 60) else {
        println!("skipped: a loop file system needs root, losetup and mkfs.ext4");
        return;
    };
    let (disk, ballast) = killed_and_full(&mount, |disk| {
        std::fs::File::options().write(true).open(disk.join("reserve")).unwrap().set_len(0).unwrap();
        std::fs::remove_file(disk.join("mark")).unwrap();
    });
    for start in ["the first start", "the second one"] {
        let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap_or_else(|error| panic!("{start}: {error}"));
        assert_kept(&tiers, start);
        let volume = tiers.nvme.status().volumes.remove(0);
        assert_eq!((volume.state, volume.index_rebuilds), ("NO_SPACE", 1), "{start}: {volume:?}");
        tiers.close();
    }
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    std::fs::remove_file(ballast).unwrap();
    tiers.until_state("SERVING");
    tiers.until_synced();
    tiers.close();
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    assert_whole(&tiers, "with room again");
    tiers.close();
}

/// An index that failed, and was damaged when it was opened again: nobody heard of it, and the status said for ever that it was being
/// opened again.
#[test]
fn an_index_that_turns_out_damaged_says_that_a_restart_is_needed() {
    let disk = tempfile::tempdir().unwrap();
    let faults = Faults::none();
    let tiers = Tiers::open(disk.path(), &faulty(&faults)).unwrap();
    (0..20).for_each(|id| assert!(tiers.put(id, true)));
    faults.arm(Fault::IndexFails, 1);
    std::fs::write(disk.path().join("mark"), b"no mark at all").unwrap();
    assert!(!tiers.put(20, true));
    faults.disarm();
    let (mut reason, until) = (String::new(), Instant::now() + Duration::from_secs(60));
    while !reason.contains("restart the daemon") {
        assert!(Instant::now() < until, "it never says so: {reason}");
        let volume = tiers.nvme.status().volumes.remove(0);
        assert_eq!(volume.state, "INDEX_CLOSED");
        reason = volume.reason.unwrap();
        assert!(!tiers.sync(), "{reason}");
    }
    assert!(reason.contains("`mark`"), "{reason}");
    assert!((0..20).all(|id| tiers.is_on_disk(id) && tiers.get(id).bytes().is_some()));
    assert_eq!(tiers.delete(3), Delete::Deleted);
    assert!(!tiers.sync(), "promised by an index that is closed");
    tiers.close();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    tiers.until_state("SERVING");
    assert_eq!(tiers.nvme.status().volumes[0].index_rebuilds, 1);
    let lost: Vec<u64> = (0..20).filter(|id| *id != 3 && tiers.get(*id).bytes().is_none()).collect();
    assert!(lost.is_empty(), "{lost:?} are lost");
    tiers.close();
}

/// Where the index's folder should be is a file. The volume left, with all that was LOCAL on it; the blocks are sound.
#[test]
fn an_index_that_is_a_file_is_put_aside_and_built_again() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    (0..20).for_each(|id| assert!(tiers.put(id, true)));
    tiers.close();
    let index = disk.path().join("index");
    std::fs::remove_dir_all(&index).unwrap();
    std::fs::write(&index, "somebody's").unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    tiers.until_state("SERVING");
    assert!((0..20).all(|id| tiers.get(id).bytes().is_some()));
    assert_eq!(tiers.nvme.status().volumes[0].index_rebuilds, 1);
    assert_eq!(std::fs::read_to_string(disk.path().join("index.aside")).unwrap(), "somebody's");
    tiers.close();
}
