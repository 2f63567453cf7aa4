//! A daemon with nothing to do does nothing.

use std::time::Duration;

use kvstore_tests::tier::{TierOptions, Tiers};
use kvstore_tests::{TestDaemon, chain};

/// The open segment counted as unsynced for ever: an idle daemon synced its disk and its index's log once a second.
#[test]
fn an_idle_volume_neither_writes_nor_syncs() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    assert!(tiers.put(0, true));
    let work = || {
        let volume = tiers.nvme.status().volumes.remove(0);
        (volume.syncs, volume.device_written_bytes, volume.index_written_bytes)
    };
    let before = work();
    (1..20).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    assert!(tiers.delete(3) != kvstore_tiers::slots::Delete::Absent);
    std::thread::sleep(Duration::from_millis(1600));
    let after = work();
    assert!(after.0 > before.0, "what was written is synced within a second or so: {before:?} {after:?}");
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(work(), after, "syncs, bytes to the device, bytes to the index");
    // And it wakes up.
    (20..30).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    std::thread::sleep(Duration::from_millis(1600));
    assert!(work().0 > after.0);
    tiers.close();
}

/// The same with a whole daemon around it.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_daemon_neither_writes_nor_syncs() {
    let disk = tempfile::tempdir().unwrap();
    let paths = format!("nvme.paths={}", disk.path().display());
    let daemon = TestDaemon::start(&[&paths, "nvme.bytes=64MiB", "host.bytes=16MiB"]).await;
    let (client, group) = daemon.group(100_000).await;
    client.put(&group, chain(0..20, 100_000)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let work = || async {
        let volume = client.status().await.unwrap().nvme.unwrap().volumes.remove(0);
        (volume.syncs, volume.device_written_bytes, volume.index_written_bytes)
    };
    let before = work().await;
    assert!(before.0 > 0);
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(work().await, before);
}
