//! A daemon with nothing to do does nothing.

use std::time::{Duration, Instant};

use kvstore_tests::tier::{TierOptions, Tiers};
use kvstore_tests::{TestDaemon, chain, until};

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
    // What was written is synced within a second or so, and later on a busy machine.
    let until_synced_since = |syncs: u64| {
        let until = Instant::now() + Duration::from_secs(60);
        while work().0 == syncs {
            assert!(Instant::now() < until, "never synced: {:?}", work());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let before = work();
    (1..20).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    assert!(tiers.delete(3) != kvstore_tiers::slots::Delete::Absent);
    until_synced_since(before.0);
    // It comes to rest: a volume that goes on for ever does something in each of these times.
    let rests = (0..10).any(|_| {
        let before = work();
        std::thread::sleep(Duration::from_millis(2500));
        work() == before
    });
    assert!(rests, "syncs, bytes to the device, bytes to the index: {:?}", work());
    // And it wakes up.
    let after = work();
    (20..30).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    until_synced_since(after.0);
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
    let work = || async {
        let volume = client.status().await.unwrap().nvme.unwrap().volumes.remove(0);
        (volume.syncs, volume.device_written_bytes, volume.index_written_bytes)
    };
    until(&client, |status| status.nvme.as_ref().unwrap().volumes[0].syncs > 0).await;
    for _ in 0..10 {
        let before = work().await;
        tokio::time::sleep(Duration::from_millis(2500)).await;
        if work().await == before {
            return;
        }
    }
    panic!("an idle daemon goes on: {:?}", work().await);
}
