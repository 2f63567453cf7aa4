//! The index of a volume, damaged in every way at several moments of its life: every LOCAL block is there afterwards, served from
//! the frames where the index lost it, and the damage is said. And an index that the machine is at fault for is given up by nobody.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvstore_tests::loop_mount::LoopMount;
use kvstore_tests::tier::{Got, TierOptions, Tiers, as_killed, now};
use kvstore_tiers::slots::Delete;

fn options() -> TierOptions {
    TierOptions { block_bytes: 6000, host_bytes: 8 << 20, index_bytes: Some(1 << 20), ..TierOptions::default() }
}

/// A pseudo-random number below `below`.
fn random(seed: &mut u64, below: u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) % below
}

/// A folder at one moment of its life: as a kill -9 leaves it, or an orderly stop.
struct Moment {
    story: &'static str,
    folder: tempfile::TempDir,
    /// What is LOCAL, and was not deleted.
    local: Vec<u64>,
    pinned: bool,
    /// The index as it was some time before.
    earlier: tempfile::TempDir,
}

/// A life of a volume, and what was there at each of its moments.
fn moments() -> Vec<Moment> {
    let mut moments = Vec::new();
    let disk = tempfile::tempdir().unwrap();
    let mut earlier = as_killed(disk.path());
    let mut take = |story: &'static str, local: Vec<u64>, pinned: bool| {
        let folder = as_killed(disk.path());
        let earlier = std::mem::replace(&mut earlier, as_killed(disk.path()));
        moments.push(Moment { story, folder, local, pinned, earlier });
    };
    let tiers = Tiers::open(disk.path(), &options()).unwrap();
    (0..10).for_each(|id| assert!(tiers.put(id, true)));
    take("young: all is in the log", (0..10).collect(), false);
    (10..60).for_each(|id| assert!(tiers.put(id, true)));
    tiers.nvme.pin(1, &[tiers.block(20)], now().plus_ms(600_000), true, now()).unwrap();
    assert_eq!(tiers.delete(5), Delete::Deleted);
    assert!(tiers.sync());
    let mut local: Vec<u64> = (0..60).filter(|id| *id != 5).collect();
    take("killed, with a pin and a deletion", local.clone(), true);
    tiers.close();
    take("stopped", local.clone(), true);
    let tiers = Tiers::open(disk.path(), &options()).unwrap();
    take("opened again: all is in a table", local.clone(), true);
    (100..150).for_each(|id| assert!(tiers.put(id, true)));
    local.extend(100..150);
    take("a table and a log", local.clone(), true);
    tiers.close();
    let tiers = Tiers::open(disk.path(), &options()).unwrap();
    (200..210).for_each(|id| assert!(tiers.put(id, true)));
    local.extend(200..210);
    take("two tables and a log", local.clone(), true);
    // Enough for several write buffers: tables are written and merged meanwhile.
    (1000..1900).for_each(|id| assert!(tiers.put(id, true)));
    local.extend(1000..1900);
    take("many tables", local, true);
    tiers.close();
    moments
}

/// Does something bad to the file; what. `None`: there is nothing to do it to.
fn damage(file: &Path, earlier: &Path, how: u64, seed: &mut u64) -> Option<String> {
    let mut bytes = std::fs::read(file).unwrap();
    let length = bytes.len() as u64;
    let name = file.file_name().unwrap().to_string_lossy().into_owned();
    if how == 4 {
        std::fs::remove_file(file).unwrap();
        return Some(format!("{name} missing"));
    }
    if length == 0 {
        return None;
    }
    // What is in a log is in front of the space that was taken ahead.
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |at| at as u64 + 1);
    let at = random(seed, used) as usize;
    let what = match how {
        0 => {
            bytes[at] ^= 1 << random(seed, 8);
            format!("{name}: a bit flipped at {at} of {used}")
        }
        1 => {
            bytes.truncate(at);
            format!("{name}: cut at {at} of {used}")
        }
        2 => {
            let end = (at + 4096).min(bytes.len());
            if bytes[at..end].iter().all(|byte| *byte == 0) {
                return None;
            }
            bytes[at..end].fill(0);
            format!("{name}: zeroed from {at} to {end} of {used}")
        }
        _ => {
            let older = std::fs::read(earlier.join(&name)).ok().filter(|older| *older != bytes)?;
            bytes = older;
            format!("{name}: an older copy")
        }
    };
    std::fs::write(file, bytes).unwrap();
    Some(what)
}

/// The files that make up the index: what RocksDB logs for people, and its locks, are none of it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder.join("index")).unwrap().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.retain(|file| !file.ends_with("LOG") && !file.ends_with("LOCK"));
    files.push(folder.join("mark"));
    files.sort();
    files
}

/// One case: what went wrong, if anything; and whether the damage was noticed.
fn case(moment: &Moment, number: u64) -> Option<(String, bool)> {
    let mut seed = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let copy = as_killed(moment.folder.path());
    let files = files(copy.path());
    let file = &files[random(&mut seed, files.len() as u64) as usize];
    let from =
        if file.ends_with("mark") { moment.earlier.path().to_owned() } else { moment.earlier.path().join("index") };
    let what = damage(file, &from, number % 5, &mut seed)?;
    let story = format!("case {number}, {}: {what}", moment.story);
    let tiers = Tiers::open(copy.path(), &options()).unwrap_or_else(|error| panic!("{story}: {error}"));
    tiers.until_state("SERVING");
    let noticed = tiers.nvme.status().volumes[0].index_rebuilds > 0;
    let lost = moment.local.iter().filter(|id| tiers.get(**id).bytes().is_none()).count();
    assert_eq!(lost, 0, "{story}: {lost} of {} LOCAL blocks are misses; noticed: {noticed}", moment.local.len());
    if moment.pinned && !noticed {
        assert_eq!(tiers.delete(20), Delete::Pinned, "{story}: the pin is lost in silence");
    }
    if !moment.pinned || !noticed {
        assert!(moment.local.contains(&5) || tiers.get(5) == Got::Miss, "{story}: a deleted block came back");
    }
    tiers.close();
    let tiers = Tiers::open(copy.path(), &options()).unwrap();
    let volume = tiers.nvme.status().volumes.remove(0);
    assert_eq!((volume.state, volume.index_rebuilds), ("SERVING", 0), "{story}: built again for good");
    assert!(tiers.get(moment.local[3]).bytes().is_some(), "{story}");
    tiers.close();
    Some((story, noticed))
}

/// One flipped bit in the middle of the index's log, and half of what was LOCAL were misses, in silence, while removing the whole
/// index brought all back.
#[test]
fn whatever_is_damaged_in_the_index_every_local_block_is_there() {
    let moments = moments();
    let (next, noticed, done) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while *done.lock().unwrap() < 300 {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if let Some((_, rebuilt)) = case(&moments[number % moments.len()], number as u64) {
                        *done.lock().unwrap() += 1;
                        noticed.fetch_add(usize::from(rebuilt), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let noticed = noticed.into_inner();
    assert!(noticed > 100, "only {noticed} of 300 were noticed: the damage hit nothing");
}

/// An undamaged folder, as each kill and each stop left it, is taken for whole.
#[test]
fn an_index_that_was_killed_is_not_taken_for_damaged() {
    for moment in moments() {
        let tiers = Tiers::open(moment.folder.path(), &options()).unwrap();
        let volume = tiers.nvme.status().volumes.remove(0);
        assert_eq!((volume.state, volume.index_rebuilds), ("SERVING", 0), "{}", moment.story);
        assert!(moment.local.iter().all(|id| tiers.get(*id).bytes().is_some()), "{}", moment.story);
        assert!(!moment.pinned || tiers.delete(20) == Delete::Pinned, "{}", moment.story);
        tiers.close();
    }
}

/// A folder on a small file system, as a kill -9 leaves it: blocks 0 to 49 are LOCAL, but 3, which was deleted; 7 is pinned. The
/// index's log is to be replayed, and the file system is full. `change` is what happened to the folder before that.
pub fn killed_and_full(mount: &LoopMount, change: impl FnOnce(&Path)) -> (PathBuf, PathBuf) {
    let disk = mount.path().join("disk");
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    (0..50).for_each(|id| assert!(tiers.put(id, true)));
    tiers.nvme.pin(1, &[tiers.block(7)], now().plus_ms(600_000), true, now()).unwrap();
    assert_eq!(tiers.delete(3), Delete::Deleted);
    assert!(tiers.sync());
    let killed = as_killed(&disk);
    tiers.close();
    std::fs::remove_dir_all(disk.join("index")).unwrap();
    for file in ["index", "mark"] {
        let copied = std::process::Command::new("cp").arg("-r").args([killed.path().join(file), disk.clone()]).status();
        assert!(copied.unwrap().success());
    }
    change(&disk);
    let ballast = mount.fill();
    (disk, ballast)
}

pub fn assert_whole(tiers: &Tiers, story: &str) {
    let volume = tiers.nvme.status().volumes.remove(0);
    assert_eq!(volume.index_rebuilds, 0, "{story}: {volume:?}");
    assert_kept(tiers, story);
}

/// What [`killed_and_full`] had is there.
pub fn assert_kept(tiers: &Tiers, story: &str) {
    let lost: Vec<u64> = (0..50).filter(|id| ![3, 9].contains(id) && tiers.get(*id).bytes().is_none()).collect();
    assert!(lost.is_empty(), "{story}: {lost:?} are lost");
    assert_eq!(tiers.get(3), Got::Miss, "{story}: a deleted block came back");
    assert_eq!(tiers.delete(7), Delete::Pinned, "{story}: the pin is lost");
}

/// RocksDB writes a table before it opens its log. On a full disk it could not, and that was taken for damage: the index was thrown
/// away, all pins with it, and each restart scanned the disk.
#[test]
fn a_kill_on_a_full_disk_costs_nothing_and_deletes_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mount) = LoopMount::new(folder.path(), 60) else {
        println!("skipped: a loop file system needs root, losetup and mkfs.ext4");
        return;
    };
    let (disk, ballast) = killed_and_full(&mount, |_| {});
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    assert_whole(&tiers, "with the reserve");
    assert_eq!(tiers.delete(9), Delete::Deleted);
    tiers.until_synced();
    let killed = as_killed(&disk);
    let later = Tiers::open(killed.path(), &TierOptions::default()).unwrap();
    assert!(!later.is_on_disk(9), "a deletion that was promised on a full disk came back");
    later.close();
    std::fs::remove_file(ballast).unwrap();
    tiers.put_until_local(1000);
    tiers.close();
    assert!(
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(disk.join("reserve")).unwrap()) > 0,
        "taken again"
    );
}

/// The same without a reserve: the index is opened to be read. What it cannot promise it does not; once there is room, it does.
#[test]
fn an_index_that_has_no_room_to_open_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mount) = LoopMount::new(folder.path(), 60) else {
        println!("skipped: a loop file system needs root, losetup and mkfs.ext4");
        return;
    };
    let (disk, ballast) = killed_and_full(&mount, |_| {});
    std::fs::File::options().write(true).open(disk.join("reserve")).unwrap().set_len(0).unwrap();
    let more = mount.fill_with("more");
    for start in ["the first start", "the second one"] {
        let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
        assert_whole(&tiers, start);
        let volume = tiers.nvme.status().volumes.remove(0);
        assert_eq!(volume.state, "NO_SPACE", "{start}: {volume:?}");
        assert!(!tiers.sync(), "{start}: promised by an index that takes nothing");
        tiers.close();
    }
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    [ballast, more].into_iter().for_each(|file| std::fs::remove_file(file).unwrap());
    tiers.until_state("SERVING");
    assert_whole(&tiers, "with room again");
    assert_eq!(tiers.delete(9), Delete::Deleted);
    tiers.until_synced();
    tiers.close();
    let tiers = Tiers::open(&disk, &TierOptions::default()).unwrap();
    assert_whole(&tiers, "afterwards");
    assert!(!tiers.is_on_disk(9));
    tiers.close();
}
