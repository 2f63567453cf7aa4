//! Write-back, promotion by use, prefetches that know their place, and sessions that are to outlive the node.

use std::time::Duration;

use kvstore::replay;
use kvstore_client::v1::{Level, StatusResponse};
use kvstore_client::{Client, GroupRef, Plane, PutOptions};
use kvstore_tests::{TestDaemon, chain, hashes, until};

const BLOCK: u32 = 64 << 10;

fn admitted(status: &StatusResponse) -> u64 {
    status.nvme.iter().flat_map(|nvme| &nvme.volumes).map(|volume| volume.admitted_blocks).sum()
}

fn uploaded(status: &StatusResponse) -> u64 {
    status.object.as_ref().map_or(0, |object| object.written_blocks)
}

fn serves(status: &StatusResponse) -> bool {
    status.object.as_ref().is_some_and(|object| object.state == "SERVING")
}

async fn put(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    for at in ids.step_by(20) {
        let mut blocks = chain(at..at + 20, BLOCK);
        // A put that finds no room is one that an engine drops; here it is made again.
        for _ in 0..100 {
            let results = client.put(group, blocks.clone()).await.unwrap();
            let stored: Vec<bool> = results.iter().map(|result| result.level() != Level::Unspecified).collect();
            let mut stored = stored.into_iter();
            blocks.retain(|_| !stored.next().unwrap());
            if blocks.is_empty() {
                break;
            }
        }
        assert!(blocks.is_empty(), "no room for {at}..{} in a hundred tries", at + 20);
    }
}

async fn all_come_back(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    for at in ids.step_by(20) {
        let outcomes = client.get(group, &hashes(at..at + 20)).await.unwrap();
        for (id, outcome) in (at..).zip(&outcomes) {
            assert_eq!(outcome.bytes().map(|bytes| replay::wrong_bytes(id, bytes)), Some(0), "{id}: {outcome:?}");
        }
    }
}

/// Blocks go to disk as they leave memory, none before, and none is lost on the way; an orderly stop writes the rest.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_go_to_disk_as_they_leave_memory() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let settings = [path.as_str(), "nvme.bytes=256MiB", "nvme.admit=evicted", "host.bytes=16MiB"];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    put(&client, &group, 0..160).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(admitted(&client.status().await.unwrap()), 0, "there is room in memory");
    put(&client, &group, 160..1000).await;
    let status = client.status().await.unwrap();
    let written = admitted(&status);
    assert!((700..1000).contains(&written), "{written}: what is in memory is not written yet");
    all_come_back(&client, &group, 0..1000).await;
    let local = PutOptions { level: Level::Local, ..PutOptions::default() };
    let results = client.put_with(&group, chain(5000..5010, BLOCK), local).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Local), "what is waited for is written at once");
    daemon.running.shut_down().await;

    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    all_come_back(&client, &group, 0..1000).await;
}

/// The same over the local plane, whose readers keep what they read: a block that is read while it is to leave stays whole.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_go_to_disk_as_they_leave_memory_under_local_readers() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let settings = [path.as_str(), "nvme.bytes=256MiB", "nvme.admit=evicted", "host.bytes=16MiB"];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group_over(Plane::Local, BLOCK).await;
    put(&client, &group, 0..600).await;
    all_come_back(&client, &group, 0..600).await;
}

/// A disk that takes nothing more (its budget is spent) does not stop the memory: blocks are then lost to it, as a cache may.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_disk_does_not_take_leaves_all_the_same() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let budget = "nvme.write_budget=0B";
    let settings = [path.as_str(), "nvme.bytes=256MiB", "nvme.admit=evicted", "host.bytes=16MiB", budget];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    put(&client, &group, 0..1000).await;
    assert_eq!(admitted(&client.status().await.unwrap()), 0);
    all_come_back(&client, &group, 980..1000).await;
}

/// Straight to the bucket, without a disk; another daemon then finds them all.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_go_to_the_bucket_as_they_leave_memory() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("object.url=file://{}", folder.path().display());
    let settings = [url.as_str(), "object.upload=evicted", "host.bytes=16MiB"];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, serves).await;
    put(&client, &group, 0..600).await;
    assert!(uploaded(&client.status().await.unwrap()) >= 300);
    all_come_back(&client, &group, 0..600).await;
    daemon.running.shut_down().await;
    let other = TestDaemon::start(&[&url, "host.bytes=32MiB"]).await;
    let (client, group) = other.group(BLOCK).await;
    until(&client, serves).await;
    all_come_back(&client, &group, 0..600).await;
}

/// What is read from the bucket goes to disk once enough requests asked for it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_from_the_bucket_goes_to_disk_by_its_use() {
    let (bucket, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = format!("object.url=file://{}", bucket.path().display());
    {
        let daemon = TestDaemon::start(&[&url]).await;
        let (client, group) = daemon.group(BLOCK).await;
        until(&client, serves).await;
        let durable = PutOptions { level: Level::Durable, ..PutOptions::default() };
        client.put_with(&group, chain(0..40, BLOCK), durable).await.unwrap();
        daemon.running.shut_down().await;
    }
    let path = format!("nvme.paths={}", disk.path().display());
    let settings = [url.as_str(), &path, "nvme.bytes=256MiB", "nvme.promote_after=2", "host.bytes=4MiB"];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, serves).await;
    for ids in [0..20u64, 20..40] {
        client.readable_blocks(&group, &hashes(ids.clone())).await.unwrap();
        all_come_back(&client, &group, ids).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(admitted(&client.status().await.unwrap()), 0, "each was asked for once");
    // Others push the first ones out of memory; the request for a longer prompt asks for them again.
    put(&client, &group, 1000..1100).await;
    let before = admitted(&client.status().await.unwrap());
    client.readable_blocks(&group, &hashes(0..21)).await.unwrap();
    all_come_back(&client, &group, 0..20).await;
    until(&client, |status| admitted(status) >= before + 15).await;
}

/// A session that is to outlive the node: its blocks go to the bucket in the background, others' do not, over either plane.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_durable_when_it_says_so() {
    for plane in [Plane::Grpc, Plane::Local] {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("object.url=file://{}", folder.path().display());
        let daemon = TestDaemon::start(&[&url]).await;
        let (client, group) = daemon.group_over(plane, BLOCK).await;
        until(&client, serves).await;
        let session = PutOptions { upload: true, ..PutOptions::default() };
        client.put(&group, chain(0..40, BLOCK)).await.unwrap();
        let results = client.put_with(&group, chain(100..120, BLOCK), session).await.unwrap();
        assert!(results.iter().all(|result| result.level() == Level::Memory), "nobody waits: {results:?}");
        // The next turn names what is there already.
        client.put_with(&group, chain(100..130, BLOCK), session).await.unwrap();
        until(&client, |status| uploaded(status) == 30).await;
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert_eq!(uploaded(&client.status().await.unwrap()), 30, "{plane:?}");
        daemon.running.shut_down().await;
    }
    let daemon = TestDaemon::start(&[]).await;
    for plane in [Plane::Grpc, Plane::Local] {
        let (client, group) = daemon.group_over(plane, BLOCK).await;
        let session = PutOptions { upload: true, ..PutOptions::default() };
        let error = client.put_with(&group, chain(0..2, BLOCK), session).await.unwrap_err().to_string();
        assert!(error.contains("object.url"), "{error}");
    }
}

/// A prefetch of what was never read again does not push out what is read all the time; one finds room where what is there is
/// worth less. And none pushes out its own beginning.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_pushes_out_nothing_hotter() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let daemon = TestDaemon::start(&[&path, "nvme.bytes=512MiB", "host.bytes=32MiB"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    // Many cold blocks, once; and some that every round reads again.
    for round in 0..12u64 {
        put(&client, &group, 10_000 + round * 1000..10_000 + round * 1000 + 200).await;
        for at in (0..300).step_by(20) {
            let names = hashes(at..at + 20);
            let missing = client.get(&group, &names).await.unwrap().iter().any(|outcome| outcome.bytes().is_none());
            if missing {
                client.put(&group, chain(at..at + 20, BLOCK)).await.unwrap();
            }
        }
    }
    let hot_before = in_memory(&client, &group, 0..300).await;
    assert!(hot_before >= 280, "{hot_before}");
    let mut brought = 0;
    for round in 0..12u64 {
        let names = hashes(10_000 + round * 1000..10_000 + round * 1000 + 200);
        let ticket = client.prefetch(&group, &names, 5_000).await.unwrap();
        brought += client.watch_prefetch(ticket, |_| {}).await.unwrap().ready;
    }
    let hot = in_memory(&client, &group, 0..300).await;
    // What a policy knows of a block it has learnt, and may err.
    assert!(hot * 10 >= hot_before * 9, "{hot} of {hot_before} hot blocks are in memory after the prefetches");
    assert!(brought > 0, "there were colder blocks to push out");
}

async fn in_memory(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) -> usize {
    let request = kvstore_client::v1::LookupRequest {
        layout_digest: group.layout_digest.clone(),
        groups: vec![group.group],
        sequence_hashes: hashes(ids),
        ..Default::default()
    };
    client.lookup(request).await.unwrap().residency.iter().filter(|tiers| *tiers & 2 == 2).count()
}
