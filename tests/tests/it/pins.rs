//! Pins and tickets whose calls do not end well, and the bounds on what is held.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvstore_client::v1::{Level, LookupRequest};
use kvstore_client::{Client, Error, GroupRef, Plane, PutOptions};
use kvstore_tests::fault_proxy::{Fault, FaultProxy, Meant};
use kvstore_tests::s3::{self, BUCKET, S3Server};
use kvstore_tests::tier::{TierOptions, Tiers, hash};
use kvstore_tests::{TestDaemon, chain, hashes, two_namespaces, until};
use kvstore_tiers::caps::OBJECT_REFERRING_MAX;
use kvstore_tiers::host::{HoldId, HoldKind, NamespaceId};
use kvstore_tiers::nvme::NvmeTier;
use kvstore_tiers::slots::{Delete, Presence};
use kvstore_tiers::{BootTime, SlotKey};

const BLOCK: u32 = 100_000;
const MIB: u64 = 1 << 20;

async fn put(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>, level: Level) {
    let options = PutOptions { level, ..PutOptions::default() };
    let results = client.put_with(group, chain(ids, BLOCK), options).await.unwrap();
    assert!(results.iter().all(|result| result.level() == level), "{results:?}");
}

/// The readable blocks, and whether a ticket holds them.
async fn ticket(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) -> (usize, bool) {
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        groups: vec![group.group],
        sequence_hashes: hashes(ids),
        ticket_ttl_ms: 30_000,
        ..LookupRequest::default()
    };
    let answer = client.lookup(request).await.unwrap();
    (answer.readable_blocks as usize, !answer.ticket.is_empty())
}

/// A bucket behind a proxy, and a daemon with a disk that uses it.
struct Stalling {
    _server: S3Server,
    proxy: FaultProxy,
    daemon: TestDaemon,
}

impl Stalling {
    async fn start(bucket: &Path, disk: &Path) -> Self {
        let server = S3Server::start(bucket, "127.0.0.1:0").await;
        let proxy = FaultProxy::start(server.address).await;
        let mut settings = s3::settings(proxy.address, "p");
        settings.extend(["object.stall=1s".into(), format!("nvme.paths={}", disk.display())]);
        settings.push("nvme.bytes=128MiB".into());
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let daemon = TestDaemon::start(&settings).await;
        until(&daemon.client().await, |status| status.object.as_ref().is_some_and(|o| o.state == "SERVING")).await;
        Self { _server: server, proxy, daemon }
    }

    /// Nothing is pinned in any tier, and once the store answers again it is told so.
    async fn assert_nothing_is_held(&self, bucket: &Path) {
        let client = self.daemon.client().await;
        until(&client, |status| {
            let on_disk: u64 = status.nvme.iter().flat_map(|nvme| &nvme.volumes).map(|v| v.pinned_bytes).sum();
            status.pins == 0 && status.host.as_ref().unwrap().pinned_bytes == 0 && on_disk == 0
        })
        .await;
        self.proxy.always(None);
        let refs = bucket.join(BUCKET).join("p/v1/refs");
        let left = || std::fs::read_dir(&refs).map_or(0, |entries| entries.count());
        let begun = Instant::now();
        while left() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "{} references are left in the bucket", left());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Pins with a deadline of a second, while the object store takes every request and answers none: each ended in time, but what it
/// had pinned in memory and on disk stayed for the whole day, and nobody knew the pins' names. Now they end with their calls.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_whose_deadline_passes_holds_nothing() {
    let (bucket, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stalling = Stalling::start(bucket.path(), disk.path()).await;
    for plane in [Plane::Grpc, Plane::Local] {
        stalling.proxy.always(None);
        let (client, group) = stalling.daemon.group_over(plane, BLOCK).await;
        put(&client, &group, 0..20, Level::Local).await;
        put(&client, &group, 100..120, Level::Memory).await;
        stalling.proxy.always(Some((Meant::Any, Fault::Delay(Duration::from_secs(20)))));
        let client = client.with_deadline(Duration::from_secs(1));
        let pins = (0..7).map(|at| {
            let (client, group) = (client.clone(), group.clone());
            tokio::spawn(async move {
                let begun = Instant::now();
                let from = if at % 2 == 0 { 0 } else { 100 };
                let answer = client.pin(&group, &hashes(from..from + 20), 24 * 3600 * 1000).await;
                assert!(matches!(answer, Err(Error::Deadline(_))), "{answer:?}");
                assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
            })
        });
        for pin in pins.collect::<Vec<_>>() {
            pin.await.unwrap();
        }
        stalling.assert_nothing_is_held(bucket.path()).await;
        assert_eq!(client.delete(&group, &hashes(0..20)).await.unwrap().pinned, 0);
    }
}

/// The client goes while its pin waits for the store: the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_whose_client_goes_holds_nothing() {
    let (bucket, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stalling = Stalling::start(bucket.path(), disk.path()).await;
    let (client, group) = stalling.daemon.group(BLOCK).await;
    put(&client, &group, 0..20, Level::Local).await;
    stalling.proxy.always(Some((Meant::Any, Fault::Delay(Duration::from_secs(5)))));
    let pin = tokio::spawn({
        let (client, group) = (client.clone(), group.clone());
        async move { client.pin(&group, &hashes(0..20), 600_000).await }
    });
    until(&client, |status| status.nvme.as_ref().unwrap().volumes[0].pinned_bytes > 0).await;
    pin.abort();
    assert!(pin.await.unwrap_err().is_cancelled());
    stalling.assert_nothing_is_held(bucket.path()).await;
}

/// A look-up's ticket that the disk refuses, because too much of it is pinned, held the blocks in memory all the same, and the
/// look-up failed. It says what is readable, without a ticket. A pin of as much is refused for good: to wait does not help.
#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_that_is_refused_holds_nothing() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let daemon = TestDaemon::start(&[path.as_str(), "nvme.bytes=128MiB", "host.bytes=4MiB"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    for at in (0..720).step_by(20) {
        put(&client, &group, at..at + 20, Level::Local).await;
    }
    assert_eq!(client.readable_blocks(&group, &hashes(0..720)).await.unwrap(), 720);
    assert_eq!(ticket(&client, &group, 0..720).await, (720, false));
    let refused = client.pin(&group, &hashes(0..720), 60_000).await;
    assert!(
        matches!(&refused, Err(Error::Unsupported(problem)) if problem.contains("half of a volume")),
        "{refused:?}"
    );
    let status = client.status().await.unwrap();
    let on_disk = status.nvme.unwrap().volumes[0].pinned_bytes;
    assert_eq!((status.tickets, status.host.unwrap().pinned_bytes, on_disk), (0, 0, 0));
}

/// Blocks behind a pinned prefix come and go. Where one went between the look and the hold, the look-up said that nothing was
/// readable, the pinned prefix included. It looks again, and says what is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_is_made_although_blocks_leave_meanwhile() {
    let daemon = TestDaemon::start(&["host.bytes=128MiB"]).await;
    let (client, group) = daemon.group(4096).await;
    let options = PutOptions { level: Level::Memory, ..PutOptions::default() };
    client.put_with(&group, chain(0..4000, 4096), options).await.unwrap();
    assert_eq!(client.pin(&group, &hashes(0..3900), 600_000).await.unwrap().pinned_blocks, 3900);
    let churn = tokio::spawn({
        let (host, layout) = (Arc::clone(&daemon.running.daemon.host), layout(&daemon, &group));
        let (client, group) = (client.clone(), group.clone());
        async move {
            let last: Vec<_> = (3900..4000).map(hash).collect();
            loop {
                host.delete(&layout, 0, &last);
                client.put_with(&group, chain(3900..4000, 4096), options).await.unwrap();
            }
        }
    });
    for _ in 0..300 {
        let (readable, _) = ticket(&client, &group, 0..4000).await;
        assert!(readable >= 3900, "{readable} blocks are readable");
    }
    churn.abort();
}

/// At most half of the memory may be pinned. Each namespace was held to that alone: two pinned 56 of 64 MiB together.
#[tokio::test(flavor = "multi_thread")]
async fn half_of_the_memory_is_the_most_that_all_namespaces_pin() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["host.bytes=64MiB", "nvme.paths=off"];
    let (running, [a, b], [group_a, group_b]) = two_namespaces(folder.path(), &settings, "", BLOCK).await;
    put(&a, &group_a, 0..270, Level::Memory).await;
    put(&b, &group_b, 0..270, Level::Memory).await;
    let pinned = a.pin(&group_a, &hashes(0..270), 60_000).await.unwrap();
    assert_eq!(pinned.pinned_blocks, 270);
    let refused = b.pin(&group_b, &hashes(0..270), 60_000).await;
    assert!(matches!(&refused, Err(Error::Busy(problem)) if problem.contains("all namespaces")), "{refused:?}");
    assert_eq!(ticket(&b, &group_b, 0..270).await, (270, false));
    let status = b.status().await.unwrap();
    assert!(status.host.as_ref().unwrap().pinned_bytes <= 32 * MIB, "{status:?}");
    assert_eq!((status.pins, status.tickets), (1, 0));
    // What is left may be had, and all of it once the other ends.
    assert_eq!(b.pin(&group_b, &hashes(0..40), 60_000).await.unwrap().pinned_blocks, 40);
    assert!(a.unpin(pinned.pin).await.unwrap());
    assert_eq!(ticket(&b, &group_b, 0..270).await, (270, true));
    running.shut_down().await;
}

fn key(tiers: &Tiers, id: u64) -> SlotKey {
    SlotKey { layout: tiers.layout.ordinal, group: 0, hash: hash(id) }
}

fn hold(tiers: &Tiers, id: u128, ids: &[u64]) -> usize {
    let names: Vec<_> = ids.iter().map(|id| hash(*id)).collect();
    let runs = [(&*tiers.layout, 0, names.as_slice())];
    tiers.host.hold(NamespaceId(0), HoldId(id), HoldKind::Pin, &runs, BootTime(u64::MAX)).unwrap().blocks
}

/// A pinned block turned out damaged, was dropped, and put again by somebody who pinned it, too. As the first pin ended it unpinned
/// the second's block, which it had never pinned.
#[test]
fn a_pin_of_a_block_that_was_damaged_unpins_nobody_elses() {
    let folder = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(folder.path(), &TierOptions::default()).unwrap();
    let release = |id| assert!(tiers.host.release_hold(NamespaceId(0), HoldId(id), HoldKind::Pin));
    for ends_first in [1, 2] {
        assert!(tiers.put_in_memory(7) && tiers.put_in_memory(8));
        assert_eq!(hold(&tiers, 1, &[7, 8]), 2);
        tiers.host.drop_key(NamespaceId(0), &key(&tiers, 7));
        assert!(tiers.put_in_memory(7));
        assert_eq!(hold(&tiers, 2, &[7]), 1);
        release(ends_first);
        let deletes = tiers.host.delete(&tiers.layout, 0, &[hash(7), hash(8)]);
        let expected =
            if ends_first == 1 { [Delete::Pinned, Delete::Deleted] } else { [Delete::Deleted, Delete::Pinned] };
        assert_eq!(deletes, expected);
        assert_eq!(tiers.host.status().pinned_bytes, 100_000);
        release(3 - ends_first);
        assert_eq!(tiers.host.status().pinned_bytes, 0);
        tiers.host.delete(&tiers.layout, 0, &[hash(7), hash(8)]);
    }
    tiers.close();
}

/// The disk's threads end, as they do when a disk is gone for good.
fn close(daemon: &TestDaemon) -> Arc<NvmeTier> {
    let nvme = Arc::clone(daemon.running.daemon.nvme.as_ref().unwrap());
    nvme.close();
    nvme
}

/// OK to a delete or a pin is a promise across a crash. A disk whose index takes nothing any more cannot keep it: the calls say so.
/// They said OK, and the blocks came back after a crash. Asked again, the delete finds nothing to delete, and owes the same.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_disk_cannot_promise_is_not_promised() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let daemon = TestDaemon::start(&[path.as_str(), "nvme.bytes=128MiB"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    put(&client, &group, 0..20, Level::Local).await;
    let none = client.delete(&group, &hashes(500..510)).await.unwrap();
    assert_eq!((none.deleted, none.pinned), (0, 0));
    close(&daemon);
    // Nothing is there, and nothing is owed.
    assert_eq!(client.delete(&group, &hashes(500..510)).await.unwrap().deleted, 0);
    let refused = client.pin(&group, &hashes(0..20), 60_000).await;
    assert!(matches!(&refused, Err(Error::Unavailable(problem)) if problem.contains("not pinned")), "{refused:?}");
    let status = client.status().await.unwrap();
    assert_eq!((status.pins, status.nvme.unwrap().volumes[0].pinned_bytes), (0, 0));
    for _ in 0..2 {
        let refused = client.delete(&group, &hashes(0..20)).await;
        let says = |problem: &str| problem.contains("may come back") && problem.contains("delete them again");
        assert!(matches!(&refused, Err(Error::Unavailable(problem)) if says(problem)), "{refused:?}");
        let there = daemon.running.daemon.host.presence(&layout(&daemon, &group), 0, &[hash(3)]);
        assert_eq!(there, [Presence::Absent]);
    }
}

fn layout(daemon: &TestDaemon, group: &GroupRef) -> Arc<kvstore_tiers::host::RegisteredLayout> {
    let digest = group.layout_digest.as_ref().try_into().unwrap();
    daemon.running.daemon.host.layout(NamespaceId(0), &digest).unwrap()
}

/// Blocks that are only in memory are written to disk before their pin is answered, and where the disk does not take them the
/// answer is no OK: it was, and a crash lost pinned bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_what_only_memory_has_is_answered_once_the_disk_has_it() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let daemon = TestDaemon::start(&[path.as_str(), "nvme.bytes=128MiB", "nvme.admit=evicted"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    put(&client, &group, 0..100, Level::Memory).await;
    let nvme = Arc::clone(daemon.running.daemon.nvme.as_ref().unwrap());
    let layout = layout(&daemon, &group);
    let names: Vec<_> = (0..100).map(hash).collect();
    let on_disk = || nvme.presence(&layout, 0, &names).into_iter().filter(|there| *there).count();
    assert_eq!(on_disk(), 0);
    let pin = client.pin(&group, &hashes(0..40), 60_000).await.unwrap();
    assert_eq!((pin.pinned_blocks, on_disk()), (40, 40));
    assert!(client.unpin(pin.pin).await.unwrap());
    close(&daemon);
    let client = client.with_deadline(Duration::from_secs(3));
    let refused = client.pin(&group, &hashes(50..90), 60_000).await;
    assert!(matches!(&refused, Err(Error::Unavailable(_) | Error::Deadline(_))), "{refused:?}");
    until(&client, |status| status.pins == 0 && status.host.as_ref().unwrap().pinned_bytes == 0).await;
}

/// A ticket holds blocks in memory, which are on disk and in the bucket as well. Their deletion took the copies from there first, and
/// then found them held: what was answered as pinned was lost with the memory. Now every copy stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_leaves_every_copy_of_what_a_ticket_holds() {
    let folder = tempfile::tempdir().unwrap();
    let disk = format!("nvme.paths={}", folder.path().join("disk").display());
    let bucket = format!("object.url=file://{}", folder.path().join("bucket").display());
    let daemon = TestDaemon::start(&[disk.as_str(), "nvme.bytes=128MiB", bucket.as_str()]).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, |status| status.object.as_ref().is_some_and(|object| object.state == "SERVING")).await;
    put(&client, &group, 0..10, Level::Durable).await;
    put(&client, &group, 0..10, Level::Local).await;
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: hashes(0..10),
        ..LookupRequest::default()
    };
    let everywhere = client.lookup(request.clone()).await.unwrap().residency;
    assert_eq!(everywhere, [2 | 4 | 8; 10]);
    let held = LookupRequest { sequence_hashes: hashes(0..4), ticket_ttl_ms: 30_000, ..request.clone() };
    let ticket = client.lookup(held).await.unwrap().ticket;
    let answer = client.delete(&group, &hashes(0..6)).await.unwrap();
    assert_eq!((answer.deleted, answer.pinned), (2, 4));
    let left = client.lookup(request.clone()).await.unwrap().residency;
    assert_eq!(left, [&[2 | 4 | 8; 4][..], &[0; 2], &[2 | 4 | 8; 4]].concat());
    assert!(client.release_ticket(ticket).await.unwrap());
    let answer = client.delete(&group, &hashes(0..10)).await.unwrap();
    assert_eq!((answer.deleted, answer.pinned), (8, 0));
    assert_eq!(client.lookup(request).await.unwrap().residency, [0; 10]);
}

/// Each unpin of any name was a request to the bucket, without end. A bounded number is under way at once.
#[tokio::test(flavor = "multi_thread")]
async fn unpins_of_any_name_are_a_bounded_number_of_requests() {
    let (bucket, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stalling = Stalling::start(bucket.path(), disk.path()).await;
    let client = stalling.daemon.client().await;
    stalling.proxy.always(Some((Meant::Any, Fault::Delay(Duration::from_secs(2)))));
    let before = stalling.proxy.done();
    for at in 0..200u128 {
        assert!(!client.unpin(at.to_le_bytes().to_vec().into()).await.unwrap());
    }
    let begun = Instant::now();
    let requests = || stalling.proxy.done() - before;
    while requests() < OBJECT_REFERRING_MAX as u64 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{} requests", requests());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // All of them have ended by then, and others would have followed.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(requests() < 2 * OBJECT_REFERRING_MAX as u64, "{} requests of 200 unpins", requests());
}

/// After a restart only the disk knows a pin: the status said that there is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_is_counted_after_a_restart() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let settings = [path.as_str(), "nvme.bytes=128MiB"];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    put(&client, &group, 0..20, Level::Local).await;
    let pin = client.pin(&group, &hashes(0..20), 600_000).await.unwrap().pin;
    assert_eq!(client.status().await.unwrap().pins, 1);
    let daemon = daemon.restart(&settings).await;
    let client = daemon.client().await;
    assert_eq!(client.status().await.unwrap().pins, 1);
    assert!(client.unpin(pin).await.unwrap());
    assert_eq!(client.status().await.unwrap().pins, 0);
}
