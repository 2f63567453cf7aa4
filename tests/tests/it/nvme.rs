//! The Nvme tier from outside: blocks outlive the daemon, promises are kept, bounds hold.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore_client::v1::{Level, LookupRequest, PrefetchState, PutStatus};
use kvstore_client::{Client, Error, GetOptions, GetOutcome, GroupRef, PutOptions, RegisteredLayout};
use kvstore_tests::tier::{self, Got, TierOptions, Tiers};
use kvstore_tests::{TestDaemon, chain, disk_use, hashes, sharded_layout, until};
use kvstore_tiers::host::Leasing;
use kvstore_tiers::nvme::{NvmeEngine, OpenError, VolumeHeader};

const BLOCK: u32 = 100_000;

async fn daemon(disk: &Path, more: &[&str]) -> TestDaemon {
    let paths = format!("nvme.paths={}", disk.display());
    let mut settings = vec![paths.as_str(), "nvme.bytes=96MiB", "host.bytes=16MiB"];
    settings.extend(more);
    TestDaemon::start(&settings).await
}

async fn put_local(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    let options = PutOptions { level: Level::Local, ..PutOptions::default() };
    let results = client.put_with(group, chain(ids, BLOCK), options).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Local), "{results:?}");
}

async fn lookup(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) -> (u32, Vec<u32>) {
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: hashes(ids),
        ..LookupRequest::default()
    };
    let answer = client.lookup(request).await.unwrap();
    (answer.readable_blocks, answer.residency)
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_outlive_the_daemon() {
    let disk = tempfile::tempdir().unwrap();
    let first = daemon(disk.path(), &[]).await;
    let (client, group) = first.group(BLOCK).await;
    put_local(&client, &group, 0..50).await;
    assert_eq!(lookup(&client, &group, 0..51).await, (50, [&[6; 50][..], &[0]].concat()), "in memory and on disk");
    first.running.shut_down().await;

    let second = daemon(disk.path(), &[]).await;
    let (client, group) = second.group(BLOCK).await;
    assert_eq!(lookup(&client, &group, 0..51).await, (50, [&[4; 50][..], &[0]].concat()), "on disk alone");
    let outcomes = client.get(&group, &hashes(0..51)).await.unwrap();
    for (id, outcome) in outcomes.iter().take(50).enumerate() {
        assert_eq!(outcome.bytes().unwrap(), &replay::content(id as u64, BLOCK as usize));
    }
    assert_eq!(outcomes[50], GetOutcome::Miss);
    assert_eq!(lookup(&client, &group, 0..1).await.1, [6], "and in memory again");
    let again = client.put(&group, chain(0..50, BLOCK)).await.unwrap();
    assert!(again.iter().all(|result| result.status() == PutStatus::Present || result.status() == PutStatus::Stored));
    let status = client.status().await.unwrap().nvme.unwrap();
    assert_eq!((status.volumes[0].blocks, status.volumes[0].admitted_blocks), (50, 0), "nothing is written twice");
    second.running.shut_down().await;
}

/// After a restart the scheduler asked before every rank had come back to register its shard: a shard that the daemon had not
/// heard of counted as empty, and a group found nothing of what lay on disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_tensor_parallel_group_outlives_the_daemon_though_one_rank_asks() {
    let disk = tempfile::tempdir().unwrap();
    let options = || PutOptions { level: Level::Local, ..PutOptions::default() };
    let request = |layout: &RegisteredLayout| LookupRequest {
        layout_digest: layout.digest.clone(),
        sequence_hashes: hashes(0..8),
        all_shards: true,
        ..LookupRequest::default()
    };
    let first = daemon(disk.path(), &[]).await;
    let client = first.client().await;
    for (shard, blocks) in [(0, 8), (1, 5)] {
        let layout = client.register_layout(sharded_layout(shard, 2)).await.unwrap();
        let bytes = layout.block_bytes[0] as u32;
        client.put_with(&layout.group(0), chain(0..blocks, bytes), options()).await.unwrap();
        assert_eq!(client.lookup(request(&layout)).await.unwrap().readable_blocks, if shard == 0 { 0 } else { 5 });
    }
    first.running.shut_down().await;

    let second = daemon(disk.path(), &[]).await;
    let client = second.client().await;
    let layout = client.register_layout(sharded_layout(1, 2)).await.unwrap();
    assert_eq!(client.lookup(request(&layout)).await.unwrap().readable_blocks, 5);
    second.running.shut_down().await;
}

/// A request far larger than the memory: what is sent makes room for what comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_get_larger_than_the_memory_comes_whole() {
    let disk = tempfile::tempdir().unwrap();
    let daemon = daemon(disk.path(), &["host.bytes=8MiB"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    for at in 0..10 {
        put_local(&client, &group, at * 30..at * 30 + 30).await;
    }
    let outcomes = client.get(&group, &hashes(0..300)).await.unwrap();
    for (id, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.bytes().map(|bytes| replay::wrong_bytes(id as u64, bytes)), Some(0), "block {id}");
    }
    let layers = GetOptions { leading_run: true, ..GetOptions::default() };
    assert_eq!(client.get_with(&group, &hashes(290..310), layers).await.unwrap().len(), 11);
}

/// One caller's promotion serves all that ask for the block meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_one_block_read_the_disk_once() {
    let disk = tempfile::tempdir().unwrap();
    let first = daemon(disk.path(), &[]).await;
    let (client, group) = first.group(BLOCK).await;
    put_local(&client, &group, 0..20).await;
    first.running.shut_down().await;
    let daemon = daemon(disk.path(), &[]).await;
    let (_, group) = daemon.group(BLOCK).await;
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (client, group) = (daemon.client().await, group.clone());
        readers.spawn(async move { client.get(&group, &hashes(0..20)).await.unwrap() });
    }
    while let Some(outcomes) = readers.join_next().await {
        for (id, outcome) in outcomes.unwrap().iter().enumerate() {
            assert_eq!(outcome.bytes().map(|bytes| replay::wrong_bytes(id as u64, bytes)), Some(0));
        }
    }
    let status = daemon.client().await.status().await.unwrap().nvme.unwrap();
    assert_eq!(status.volumes[0].read_blocks, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_brings_a_prefix_into_memory() {
    let disk = tempfile::tempdir().unwrap();
    let first = daemon(disk.path(), &[]).await;
    let (client, group) = first.group(BLOCK).await;
    put_local(&client, &group, 0..40).await;
    first.running.shut_down().await;
    let daemon = daemon(disk.path(), &[]).await;
    let (client, group) = daemon.group(BLOCK).await;
    let ticket = client.prefetch(&group, &hashes(0..45), 10_000).await.unwrap();
    let end = client.watch_prefetch(ticket, |_| {}).await.unwrap();
    assert_eq!((end.state(), end.blocks, end.ready, end.missing), (PrefetchState::Done, 45, 40, 5));
    assert_eq!(lookup(&client, &group, 0..40).await.1, [6; 40]);
}

/// A pin survives a restart, and what was pinned cannot be pushed out; when it is lost after all, a read says
/// so instead of a mere miss.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_survives_and_a_loss_is_told() {
    let disk = tempfile::tempdir().unwrap();
    let first = daemon(disk.path(), &[]).await;
    let (client, group) = first.group(BLOCK).await;
    put_local(&client, &group, 0..20).await;
    let pin = client.pin(&group, &hashes(0..20), 600_000).await.unwrap();
    assert_eq!(pin.pinned_blocks, 20);
    first.running.shut_down().await;

    let second = daemon(disk.path(), &[]).await;
    let (client, group) = second.group(BLOCK).await;
    for at in 0..60 {
        put_local(&client, &group, 1000 + at * 30..1030 + at * 30).await;
    }
    let status = client.status().await.unwrap().nvme.unwrap();
    assert!(status.volumes[0].reclaimed_segments > 10, "the volume turned over: {status:?}");
    assert_eq!(lookup(&client, &group, 0..20).await.0, 20);
    assert_eq!(client.delete(&group, &hashes(0..20)).await.unwrap().pinned, 20);
    second.running.shut_down().await;

    // The pinned bytes rot.
    let blocks = disk.path().join("blocks");
    let mut bytes = std::fs::read(&blocks).unwrap();
    for id in 0..20 {
        let content = replay::content(id, BLOCK as usize);
        let places: Vec<usize> =
            (0..bytes.len() - 64).step_by(4096).filter(|at| bytes[*at..*at + 64] == content[..64]).collect();
        assert!(!places.is_empty());
        places.into_iter().for_each(|at| bytes[at + 5] ^= 1);
    }
    std::fs::write(&blocks, bytes).unwrap();
    let third = daemon(disk.path(), &[]).await;
    let (client, group) = third.group(BLOCK).await;
    let outcomes = client.get(&group, &hashes(0..21)).await.unwrap();
    assert!(outcomes[..20].iter().all(|outcome| *outcome == GetOutcome::DataLoss), "{outcomes:?}");
    assert_eq!(outcomes[20], GetOutcome::Miss, "never pinned: a miss");
    assert!(client.unpin(pin.pin).await.unwrap());
    assert_eq!(client.get(&group, &hashes([0])).await.unwrap(), [GetOutcome::Miss]);
}

/// Deleted is deleted: not found again after a restart, nor after the index was lost.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_blocks_do_not_come_back() {
    let disk = tempfile::tempdir().unwrap();
    let first = daemon(disk.path(), &[]).await;
    let (client, group) = first.group(BLOCK).await;
    put_local(&client, &group, 0..30).await;
    assert_eq!(client.delete(&group, &hashes(10..20)).await.unwrap().deleted, 10);
    assert_eq!(lookup(&client, &group, 10..20).await.0, 0);
    first.running.shut_down().await;
    for lose_index in [false, true] {
        if lose_index {
            std::fs::remove_dir_all(disk.path().join("index")).unwrap();
        }
        let next = daemon(disk.path(), &[]).await;
        let (client, group) = next.group(BLOCK).await;
        until(&client, |status| status.nvme.as_ref().unwrap().volumes[0].state == "SERVING").await;
        assert_eq!(lookup(&client, &group, 0..10).await.0, 10);
        assert_eq!(lookup(&client, &group, 10..20).await.0, 0, "index lost: {lose_index}");
        assert_eq!(lookup(&client, &group, 20..30).await.0, 10);
        next.running.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_holds_blocks_on_disk() {
    let disk = tempfile::tempdir().unwrap();
    let first = daemon(disk.path(), &[]).await;
    let (client, group) = first.group(BLOCK).await;
    put_local(&client, &group, 0..20).await;
    first.running.shut_down().await;
    let daemon = daemon(disk.path(), &[]).await;
    let (client, group) = daemon.group(BLOCK).await;
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: hashes(0..20),
        ticket_ttl_ms: 30_000,
        ..LookupRequest::default()
    };
    let answer = client.lookup(request).await.unwrap();
    assert_eq!((answer.readable_blocks, answer.ticket.len()), (20, 16));
    for at in 0..60 {
        put_local(&client, &group, 1000 + at * 30..1030 + at * 30).await;
    }
    let options = GetOptions { ticket: answer.ticket.clone(), ..GetOptions::default() };
    let outcomes = client.get_with(&group, &hashes(0..20), options).await.unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.bytes().is_some()));
    assert!(client.release_ticket(answer.ticket).await.unwrap());
}

/// Whatever is put, the folder never takes more than its bound; also after the bound was lowered.
#[tokio::test(flavor = "multi_thread")]
async fn the_bound_holds_at_every_moment() {
    let disk = tempfile::tempdir().unwrap();
    let daemon = daemon(disk.path(), &[]).await;
    let (client, group) = daemon.group(BLOCK).await;
    let folder = disk.path().to_owned();
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let watcher = tokio::task::spawn_blocking(move || {
        let mut most = 0;
        while matches!(stopped.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Empty)) {
            most = most.max(disk_use(&folder));
            std::thread::sleep(Duration::from_millis(2));
        }
        most
    });
    for at in 0..60 {
        put_local(&client, &group, at * 40..at * 40 + 40).await;
    }
    stop.send(()).unwrap();
    let most = watcher.await.unwrap();
    assert!(most <= 96 << 20, "{most} bytes of disk were taken");
    assert!(most > 60 << 20, "and the bound is used: {most}");
    client.set_config([("nvme.bytes".into(), "64MiB".into())].into()).await.unwrap();
    let begun = Instant::now();
    loop {
        let now = disk_use(disk.path());
        if now <= 64 << 20 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{now} bytes are still taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    put_local(&client, &group, 9000..9010).await;
    assert_eq!(lookup(&client, &group, 9000..9010).await.0, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_a_folder_is_refused_by_name() {
    let disk = tempfile::tempdir().unwrap();
    let _first = daemon(disk.path(), &[]).await;
    let refused = Tiers::open(disk.path(), &TierOptions::default()).err().unwrap();
    let text = refused.to_string();
    assert!(matches!(refused, OpenError::Locked { .. }), "{text}");
    assert!(text.contains(&std::process::id().to_string()) && text.contains("nvme.paths"), "{text}");
}

#[test]
fn volumes_of_unknown_versions_are_refused_by_name_and_left_alone() {
    let disk = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    assert!(tiers.put(1, true));
    tiers.close();
    let blocks = disk.path().join("blocks");
    let mut bytes = std::fs::read(&blocks).unwrap();
    bytes[8] = 9;
    bytes[4096 + 8] = 9;
    std::fs::write(&blocks, &bytes).unwrap();
    let text = Tiers::open(disk.path(), &TierOptions::default()).err().unwrap().to_string();
    assert!(text.contains("version 9") && text.contains("version 1"), "{text}");
    assert_eq!(std::fs::read(&blocks).unwrap(), bytes);
    // One damaged copy of the header costs nothing.
    bytes[4096 + 8] = 1;
    std::fs::write(&blocks, &bytes).unwrap();
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    assert!(matches!(tiers.get(1), Got::Disk(_)));
}

/// Both engines, blocks with their header apart and small ones packed together, one section and many.
#[test]
fn blocks_of_many_sizes_come_back_from_disk() {
    for engine in [NvmeEngine::Auto, NvmeEngine::Syscalls] {
        for (block_bytes, layers) in [(1, 1), (300, 3), (4096, 1), (65_535, 1), (65_536, 1), (70_001, 1), (1 << 20, 16)]
        {
            let disk = tempfile::tempdir().unwrap();
            let options = TierOptions { engine, block_bytes, layers, ..TierOptions::default() };
            let tiers = Tiers::open(disk.path(), &options).unwrap();
            (0..20).for_each(|id| assert!(tiers.put(id, id % 2 == 0)));
            tiers.settle();
            tiers.close();
            let tiers = Tiers::open(disk.path(), &options).unwrap();
            for id in 0..20 {
                assert!(matches!(tiers.get(id), Got::Disk(_)), "{engine:?} {block_bytes}: block {id}");
            }
            assert_eq!(tiers.get(20), Got::Miss);
            tiers.close();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_verification_reads_the_disk_and_drops_what_rots() {
    let disk = tempfile::tempdir().unwrap();
    let daemon = daemon(disk.path(), &[]).await;
    let (client, group) = daemon.group(BLOCK).await;
    put_local(&client, &group, 0..20).await;
    let sound = client.verify(|_| {}).await.unwrap();
    assert_eq!((sound.verified, sound.corrupt), (40, 0), "20 in memory, 20 on disk");
    let file = std::fs::OpenOptions::new().write(true).open(disk.path().join("blocks")).unwrap();
    // Somewhere in the first frame's payload: segment header, frame header, payload.
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot", (64 << 10) + 4096 + 4096 + 5000).unwrap();
    file.sync_all().unwrap();
    let rotten = client.verify(|_| {}).await.unwrap();
    assert_eq!((rotten.verified, rotten.corrupt), (40, 1));
    assert_eq!(client.verify(|_| {}).await.unwrap().verified, 39);
}

#[tokio::test]
async fn local_without_a_disk_is_refused() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group(BLOCK).await;
    let options = PutOptions { level: Level::Local, ..PutOptions::default() };
    let refused = client.put_with(&group, chain(0..1, BLOCK), options).await.unwrap_err();
    assert!(matches!(refused, Error::Unsupported(message) if message.contains("Nvme")));
}

/// A few blocks on a large volume must not keep a segment's worth of disk once the daemon has stopped.
#[test]
fn a_stopped_daemon_gives_back_what_its_segments_did_not_use() {
    use std::os::unix::fs::MetadataExt;
    let disk = tempfile::tempdir().unwrap();
    for life in 0..3 {
        let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
        (0..3).for_each(|id| assert!(tiers.put(life * 10 + id, true)));
        tiers.close();
    }
    let taken = std::fs::metadata(disk.path().join("blocks")).unwrap().blocks() * 512;
    assert!(taken < 2 << 20, "{taken} bytes for nine blocks of 100 kB");
    let tiers = Tiers::open(disk.path(), &TierOptions::default()).unwrap();
    for life in 0..3 {
        (0..3).for_each(|id| assert!(matches!(tiers.get(life * 10 + id), Got::Disk(_))));
    }
    // And what was given back can be written again.
    (100..400).for_each(|id| assert!(tiers.put(id, false)));
    tiers.settle();
    assert!(tiers.get(399).bytes().is_some());
    tiers.close();
}

/// A block that is deleted while it is on its way to disk must not arrive there: it would come back after a restart.
#[test]
fn blocks_deleted_on_their_way_do_not_arrive() {
    let disk = tempfile::tempdir().unwrap();
    let options = TierOptions { host_bytes: 64 << 20, ..TierOptions::default() };
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    let all: Vec<_> = (0..120).map(tier::hash).collect();
    let mut caught = 0;
    for round in 0..50 {
        if round >= 5 && caught > 0 {
            break;
        }
        (0..120).for_each(|id| assert!(tiers.put(id, false)));
        caught += usize::from(tiers.nvme.dirty_bytes() > 0);
        tiers.nvme.delete(&tiers.layout, 0, &all);
        tiers.host.delete(&tiers.layout, 0, &all);
        tiers.settle();
        let there = tiers.nvme.presence(&tiers.layout, 0, &all).iter().filter(|there| **there).count();
        assert_eq!(there, 0, "round {round}");
    }
    assert!(caught > 0, "nothing was ever on its way");
    tiers.close();
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    assert!(!tiers.nvme.presence(&tiers.layout, 0, &all).contains(&true), "after a restart");
    tiers.close();
    std::fs::remove_dir_all(disk.path().join("index")).unwrap();
    let tiers = Tiers::open(disk.path(), &options).unwrap();
    tiers.until_state("SERVING");
    let back = tiers.nvme.presence(&tiers.layout, 0, &all).iter().filter(|there| **there).count();
    assert_eq!(back, 0, "nor after the index was lost");
    tiers.close();
}

/// Callers that leave in the middle of a get cost nobody anything: what was under way ends, and nothing stays
/// reserved or leased.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_leave_leave_nothing_behind() {
    let disk = tempfile::tempdir().unwrap();
    let first = daemon(disk.path(), &[]).await;
    let (client, group) = first.group(BLOCK).await;
    for at in 0..10 {
        put_local(&client, &group, at * 30..at * 30 + 30).await;
    }
    first.running.shut_down().await;
    let daemon = daemon(disk.path(), &["host.bytes=8MiB"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    for wait_ms in [0, 1, 2, 5, 10, 20] {
        let leaving: Vec<_> = (0..4)
            .map(|_| {
                let (client, group) = (client.clone(), group.clone());
                tokio::spawn(async move { client.get(&group, &hashes(0..300)).await.map(drop) })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        leaving.iter().for_each(tokio::task::JoinHandle::abort);
    }
    until(&client, |status| status.host.as_ref().unwrap().flights == 0).await;
    // All of the memory can still be turned over, and all blocks read.
    let outcomes = client.get(&group, &hashes(0..300)).await.unwrap();
    assert!(
        outcomes
            .iter()
            .enumerate()
            .all(|(id, outcome)| { outcome.bytes().is_some_and(|bytes| replay::wrong_bytes(id as u64, bytes) == 0) })
    );
}

/// A stop writes what waits to be written. What the disk was writing just then was left out of the index: some of the last blocks
/// were gone after an orderly restart.
#[test]
fn a_stop_leaves_no_write_behind() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..20u64 {
        let ids = round * 100..round * 100 + 30;
        let tiers = Tiers::open(folder.path(), &TierOptions::default()).unwrap();
        assert!(ids.clone().all(|id| tiers.put(id, false)));
        tiers.close();
        let tiers = Tiers::open(folder.path(), &TierOptions::default()).unwrap();
        let there = ids.filter(|id| matches!(tiers.get(*id), Got::Disk(_))).count();
        assert_eq!(there, 30, "round {round}: {:?}", tiers.nvme.status());
        tiers.close();
    }
}

/// Two disks share the blocks, and each comes back alone: losing one loses its own blocks only.
#[tokio::test(flavor = "multi_thread")]
async fn two_disks_share_the_blocks_and_one_can_be_lost() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let paths = format!("nvme.paths={},{}", a.path().display(), b.path().display());
    let settings = [paths.as_str(), "nvme.bytes=96MiB", "host.bytes=16MiB"];
    let first = TestDaemon::start(&settings).await;
    let (client, group) = first.group(BLOCK).await;
    put_local(&client, &group, 0..60).await;
    let pin = client.pin(&group, &hashes(0..60), 600_000).await.unwrap();
    assert_eq!(pin.pinned_blocks, 60);
    let volumes = client.status().await.unwrap().nvme.unwrap().volumes;
    let blocks: Vec<u64> = volumes.iter().map(|volume| volume.blocks).collect();
    assert_eq!(blocks.iter().sum::<u64>(), 60);
    assert!(blocks.iter().all(|blocks| *blocks >= 10), "{blocks:?}");
    first.running.shut_down().await;

    let second = TestDaemon::start(&settings).await;
    let (client, group) = second.group(BLOCK).await;
    assert_eq!(lookup(&client, &group, 0..60).await, (60, vec![4; 60]));
    let outcomes = client.get(&group, &hashes(0..60)).await.unwrap();
    assert!(
        outcomes
            .iter()
            .enumerate()
            .all(|(id, outcome)| { outcome.bytes().is_some_and(|bytes| replay::wrong_bytes(id as u64, bytes) == 0) })
    );
    assert_eq!(client.delete(&group, &hashes(0..60)).await.unwrap().pinned, 60, "the pin came back on both");
    assert!(client.unpin(pin.pin).await.unwrap());
    second.running.shut_down().await;

    drop(a);
    let third = TestDaemon::start(&[&format!("nvme.paths={}", b.path().display()), "nvme.bytes=96MiB"]).await;
    let (client, group) = third.group(BLOCK).await;
    let there = lookup(&client, &group, 0..60).await.1.iter().filter(|tiers| **tiers == 4).count() as u64;
    assert_eq!(there, blocks[1]);
}

/// A chain lies on both disks: each block's parent as often on the other one as not. Hot blocks of it were taken for orphans, which
/// lead nowhere, and were dropped as their segments were emptied, because each disk named blocks in its own way: by a seed.
#[tokio::test(flavor = "multi_thread")]
async fn disks_of_one_tier_name_blocks_alike() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let paths = |count: usize| {
        let paths: Vec<_> = folders.iter().take(count).map(|folder| folder.path().display().to_string()).collect();
        format!("nvme.paths={}", paths.join(","))
    };
    // The third joins later.
    for count in [2, 3] {
        let daemon = TestDaemon::start(&[&paths(count), "nvme.bytes=64MiB", "host.bytes=8MiB"]).await;
        let (client, group) = daemon.group(BLOCK).await;
        put_local(&client, &group, 0..60).await;
        daemon.running.shut_down().await;
    }
    let seeds = folders.each_ref().map(|folder| {
        let mut page = vec![0; 4096];
        File::open(folder.path().join("blocks")).unwrap().read_exact(&mut page).unwrap();
        VolumeHeader::decode(&page).unwrap().seed
    });
    assert_eq!(seeds, [seeds[0]; 3]);
}

/// Memory above its high watermark, of which every block is being read, and with a slot to spare: the daemon looked for something
/// to evict for ever, with everybody else waiting for its lock, since it took the free slot for one that it had made.
#[test]
fn memory_that_is_read_everywhere_does_not_stop_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(folder.path(), &TierOptions::default()).unwrap();
    let blocks =
        (0..).take_while(|id| tiers.host.status().counts.evicted == 0 && tiers.put_in_memory(*id)).count() as u64;
    let names: Vec<_> = (0..blocks).map(tier::hash).collect();
    tiers.host.delete(&tiers.layout, 0, &names[names.len() - 1..]);
    let leased = tiers.host.lease_run(&tiers.layout, 0, &names, tier::now());
    assert!(leased.iter().filter(|leasing| matches!(leasing, Leasing::Leased(_))).count() as u64 + 2 >= blocks);
    let (done, ended) = std::sync::mpsc::channel();
    let host = Arc::clone(&tiers.host);
    std::thread::spawn(move || {
        for _ in 0..3 {
            host.tick(tier::now());
        }
        let _ = done.send(());
    });
    ended.recv_timeout(Duration::from_secs(60)).expect("tick() goes on for ever");
    drop(leased);
    tiers.host.tick(tier::now());
    let status = tiers.host.status();
    let slots: u64 = status.pools.iter().map(|pool| pool.slots).sum();
    assert!(
        status.blocks <= (slots * 98).div_ceil(100),
        "{} blocks in {slots} slots: evicted once nobody reads them",
        status.blocks
    );
}
