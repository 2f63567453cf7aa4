//! A volume and its bound: a smaller one is reached under any load, writing goes on, and what cannot be is said.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use kvstore_client::v1::Level;
use kvstore_client::{Error, PutOptions};
use kvstore_tests::tier::{TierOptions, Tiers, as_killed, now};
use kvstore_tests::{TestDaemon, chain, disk_use};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

fn tiers(disk: &Path, mib: u64) -> Tiers {
    Tiers::open(disk, &TierOptions { nvme_bytes: mib << 20, ..TierOptions::default() }).unwrap()
}

fn reason(tiers: &Tiers) -> String {
    tiers.nvme.status().volumes[0].reason.clone().unwrap_or_default()
}

/// While a block comes now and then, the disk gets within the bound; and then it takes more blocks than fit, and stays within.
fn reaches_and_goes_on(tiers: &Tiers, disk: &Path, bytes: u64) {
    let until = Instant::now() + Duration::from_secs(60);
    let mut id = 10_000;
    while disk_use(disk) > bytes {
        assert!(Instant::now() < until, "{} bytes are still taken", disk_use(disk));
        assert!(tiers.put(id, true), "block {id}: {:?}", tiers.nvme.status());
        id += 1;
        std::thread::sleep(Duration::from_millis(25));
    }
    for id in 20_000..20_900 {
        assert!(tiers.put(id, true), "block {id}: {:?}", tiers.nvme.status());
    }
    assert!(disk_use(disk) <= bytes);
}

/// The bound was lowered while a client put a block now and then: disk space was given back only where nothing had come for half
/// a second, and then no block was taken any more, because the segments within the bound were full and none could be emptied.
#[test]
fn a_smaller_bound_is_reached_under_light_traffic_and_writing_goes_on() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = tiers(disk.path(), 160);
    (0..1300).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    assert!(disk_use(disk.path()) > 100 << 20);
    tiers.nvme.set_limits(72 << 20, 8 << 20);
    reaches_and_goes_on(&tiers, disk.path(), 72 << 20);
    let copy = as_killed(disk.path());
    let later = self::tiers(copy.path(), 72);
    later.until_state("SERVING");
    assert!(later.get(20_899).bytes().is_some());
    later.close();
    tiers.close();
}

/// The same with a restart in between: what is beyond the bound is found there. Pinned blocks stay.
#[test]
fn a_smaller_bound_holds_after_a_restart() {
    let disk = tempfile::tempdir().unwrap();
    let first = tiers(disk.path(), 160);
    (0..1300).for_each(|id| assert!(first.put(id, false)));
    first.settle();
    // The newest: they lie in the last segments of the file.
    first.nvme.pin(1, &[first.block(1299), first.block(1290)], now().plus_ms(600_000), true, now()).unwrap();
    first.until_synced();
    first.close();
    let tiers = tiers(disk.path(), 64);
    reaches_and_goes_on(&tiers, disk.path(), 64 << 20);
    for id in [1290, 1299, 20_899] {
        assert!(tiers.get(id).bytes().is_some(), "block {id}");
    }
    tiers.close();
}

/// A file whose disk space the file system does not take back, while this value lives.
struct Kept {
    file: File,
    before: IFlags,
}

impl Kept {
    /// `None` where the machine does not allow that.
    fn new(path: &Path) -> Option<Self> {
        let file = File::open(path).unwrap();
        let before = ioctl_getflags(&file).ok()?;
        // No hole is punched into a file that only grows; who has it open writes wherever it likes.
        ioctl_setflags(&file, before | IFlags::APPEND).ok()?;
        Some(Self { file, before })
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = ioctl_setflags(&self.file, self.before);
    }
}

/// A file system that does not take disk space back is not asked without end: that is said, and writing goes on. The next bound is
/// another try.
#[test]
fn disk_space_that_the_file_system_keeps_is_said_and_asked_for_again_with_the_next_bound() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = tiers(disk.path(), 160);
    (0..1300).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    let Some(kept) = Kept::new(&disk.path().join("blocks")) else {
        println!("skipped: a file that only grows needs root, and a file system that knows such files");
        return tiers.close();
    };
    let within = |tiers: &Tiers| disk_use(disk.path()) <= 72 << 20 && reason(tiers).is_empty();
    let until = |what: &str, is: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is() {
            assert!(Instant::now() < deadline, "{what}: {:?}", tiers.nvme.status());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    tiers.nvme.set_limits(72 << 20, 8 << 20);
    until("it is said", &|| reason(&tiers).contains("does not take back disk space beyond nvme.bytes"));
    assert_eq!(tiers.nvme.status().volumes[0].state, "SERVING");
    drop(kept);
    for id in 20_000..20_900 {
        assert!(tiers.put(id, true), "block {id}: {:?}", tiers.nvme.status());
    }
    // Other chores are tried again after half of that.
    std::thread::sleep(Duration::from_secs(1));
    assert!(disk_use(disk.path()) > 72 << 20, "it was asked again");
    tiers.nvme.set_limits(72 << 20, 8 << 20);
    until("it is given back", &|| within(&tiers));
    assert!(tiers.get(20_899).bytes().is_some());
    tiers.close();
}

/// A live bound below the few segments that writing needs left a tier that called itself SERVING and took nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_bound_that_cannot_be_is_refused_by_name() {
    let disk = tempfile::tempdir().unwrap();
    let paths = format!("nvme.paths={}", disk.path().display());
    let daemon = TestDaemon::start(&[&paths, "nvme.bytes=3GiB", "host.bytes=16MiB"]).await;
    let (client, group) = daemon.group(100_000).await;
    let local = || PutOptions { level: Level::Local, ..PutOptions::default() };
    client.put_with(&group, chain(0..3, 100_000), local()).await.unwrap();
    let set = |bytes: &str| client.set_config([("nvme.bytes".into(), bytes.into())].into());
    let Error::Invalid(message) = set("96MiB").await.unwrap_err() else { panic!("another error") };
    // Segments of 16 MiB, and the index's 48 MiB.
    for part in ["nvme.bytes", "96MiB", "16MiB", "113MiB"] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
    let results = client.put_with(&group, chain(10..40, 100_000), local()).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Local));
    set("113MiB").await.unwrap();
    for at in 1..12 {
        let results = client.put_with(&group, chain(at * 100..at * 100 + 90, 100_000), local()).await.unwrap();
        assert!(results.iter().all(|result| result.level() == Level::Local), "what was named as valid is");
    }
}

/// A volume that was made for gigabytes, started with a bound that its segments do not fit: it is made anew. With pinned blocks on
/// it, it is refused by name and left alone.
#[test]
fn a_volume_that_is_much_larger_than_its_bound_is_made_anew() {
    let disk = tempfile::tempdir().unwrap();
    let large = tiers(disk.path(), 5 << 10);
    (0..5).for_each(|id| assert!(large.put(id, true)));
    large.nvme.pin(9, &[large.block(1)], now().plus_ms(600_000), true, now()).unwrap();
    large.until_synced();
    large.close();
    let options = TierOptions { nvme_bytes: 80 << 20, ..TierOptions::default() };
    let refused = Tiers::open(disk.path(), &options).err().unwrap().to_string();
    for part in ["nvme.bytes", "80MiB", "32MiB", "145MiB", "pinned", "move the folder away"] {
        assert!(refused.contains(part), "{part} is not in: {refused}");
    }
    let large = tiers(disk.path(), 5 << 10);
    assert!(large.get(1).bytes().is_some(), "nothing was changed");
    assert!(large.nvme.unpin(9, true));
    large.until_synced();
    large.close();
    let small = tiers(disk.path(), 80);
    for id in 100..1000 {
        assert!(small.put(id, true), "block {id}: {:?}", small.nvme.status());
    }
    assert!(disk_use(disk.path()) <= 80 << 20);
    assert_eq!(small.nvme.status().volumes[0].segment_bytes, 4 << 20);
    small.close();
    let small = tiers(disk.path(), 80);
    assert!(small.get(999).bytes().is_some() && !small.is_on_disk(0));
    small.close();
}

/// The same with a pin whose time was over: nobody had ended it yet, and it kept the volume from starting.
#[test]
fn a_pin_whose_time_is_over_keeps_no_volume_from_starting() {
    let disk = tempfile::tempdir().unwrap();
    let large = tiers(disk.path(), 5 << 10);
    assert!(large.put(1, true));
    large.nvme.pin(9, &[large.block(1)], now(), true, now()).unwrap();
    large.until_synced();
    large.close();
    let small = tiers(disk.path(), 80);
    assert!(small.put(2, true) && !small.is_on_disk(1), "made anew");
    small.close();
}

/// Blocks no smaller than a segment never went to disk, and nobody heard of it.
#[test]
fn blocks_that_fit_no_segment_are_said() {
    let disk = tempfile::tempdir().unwrap();
    let options = TierOptions { block_bytes: 4 << 20, host_bytes: 64 << 20, ..TierOptions::default() };
    let large = Tiers::open(disk.path(), &options).unwrap();
    assert!(!large.put(1, true));
    assert!(reason(&large).contains("4194304 bytes"), "{}", reason(&large));
    large.close();
    let most = TierOptions { block_bytes: (4 << 20) - (8 << 10), ..options };
    let fits = Tiers::open(disk.path(), &most).unwrap();
    assert!(fits.put(2, true), "{}", reason(&fits));
    assert_eq!(reason(&fits), "");
    fits.close();
}

/// A tier in which what is pinned leaves no room says so, and takes blocks again once it is unpinned.
#[test]
fn a_volume_full_of_pinned_blocks_says_so() {
    let disk = tempfile::tempdir().unwrap();
    let first = tiers(disk.path(), 64);
    for id in 0..300 {
        assert!(first.put(id, true));
        first.nvme.pin(u128::from(id), &[first.block(id)], now().plus_ms(600_000), true, now()).unwrap();
    }
    first.until_synced();
    first.close();
    // Eight segments' worth is pinned, and five are allowed.
    let tiers = tiers(disk.path(), 37);
    assert!(!tiers.put(1000, true));
    assert!(reason(&tiers).contains("pinned"), "{:?}", tiers.nvme.status());
    assert!((0..300).all(|id| tiers.is_on_disk(id)));
    (0..250).for_each(|id| assert!(tiers.nvme.unpin(id, true)));
    tiers.put_until_local(1001);
    assert_eq!(reason(&tiers), "");
    assert!((250..300).all(|id| tiers.get(id).bytes().is_some()));
    tiers.close();
}
