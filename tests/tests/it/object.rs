//! The Object tier from outside, on real stores: blocks outlive their node, promises are kept, bounds hold.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore::replay;
use kvstore_client::v1::{
    BlockKind, CollectProgress, CollectRequest, Level, LookupRequest, LookupResponse, ObjectTierStatus, PrefetchState,
    PutStatus,
};
use kvstore_client::{Client, Error, GetOptions, GetOutcome, GroupRef, PutBlock, PutOptions};
use kvstore_tests::azure::{self, Azurite};
use kvstore_tests::fault_proxy::{Fault, FaultProxy, Meant};
use kvstore_tests::s3::{self, S3Server};
use kvstore_tests::{TestDaemon, chain, hashes};

const BLOCK: u32 = 100_000;

/// A daemon with a bucket, and with a disk where there is a folder for one.
async fn daemon(bucket: &[String], disk: Option<&Path>, more: &[&str]) -> TestDaemon {
    let mut settings: Vec<String> = bucket.to_vec();
    if let Some(disk) = disk {
        settings.extend([format!("nvme.paths={}", disk.display()), "nvme.bytes=256MiB".into()]);
    }
    settings.extend(more.iter().map(|setting| setting.to_string()));
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    TestDaemon::start(&settings).await
}

fn local_path(folder: &Path) -> Vec<String> {
    vec![format!("object.url=file://{}", folder.display())]
}

async fn until_serving(client: &Client) {
    until(client, |object| object.state == "SERVING").await;
}

/// Waits for the tier to come to a state, a minute at most.
async fn until(client: &Client, reached: impl Fn(&ObjectTierStatus) -> bool) -> ObjectTierStatus {
    let begun = Instant::now();
    loop {
        let object = client.status().await.unwrap().object.unwrap();
        if reached(&object) {
            return object;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{object:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn put_durable(client: &Client, group: &GroupRef, blocks: Vec<PutBlock>) {
    let options = PutOptions { level: Level::Durable, ..PutOptions::default() };
    let results = client.put_with(group, blocks, options).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Durable), "{results:?}");
}

async fn lookup(client: &Client, group: &GroupRef, names: Vec<Bytes>) -> LookupResponse {
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        groups: vec![group.group],
        sequence_hashes: names,
        search_wait_ms: 5000,
        ..LookupRequest::default()
    };
    // A call waits for a search for a few seconds at most.
    let begun = Instant::now();
    loop {
        let answer = client.lookup(request.clone()).await.unwrap();
        if !answer.searching || begun.elapsed() > Duration::from_secs(60) {
            return answer;
        }
    }
}

async fn assert_bytes(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>, block_bytes: u32) {
    let outcomes = client.get(group, &hashes(ids.clone())).await.unwrap();
    for (id, outcome) in ids.zip(&outcomes) {
        let expected = replay::content(id, block_bytes as usize);
        assert_eq!(outcome.bytes(), Some(&expected), "block {id}");
    }
}

/// Blocks of one chain that are stored by one daemon and read by another, which never heard of the first.
async fn conforms(bucket: &[String]) {
    for block_bytes in [5000, BLOCK, 3 << 20] {
        let blocks = if block_bytes > 1 << 20 { 7 } else { 100 };
        let first = daemon(bucket, None, &[]).await;
        let (client, group) = first.group(block_bytes).await;
        until_serving(&client).await;
        put_durable(&client, &group, chain(0..blocks, block_bytes)).await;
        // They are there already: acknowledged again, and not written twice.
        let written = client.status().await.unwrap().object.unwrap().written_blocks;
        put_durable(&client, &group, chain(0..blocks, block_bytes)).await;
        assert_eq!(client.status().await.unwrap().object.unwrap().written_blocks, written);
        drop(first);

        let second = daemon(bucket, None, &[]).await;
        let (client, group) = second.group(block_bytes).await;
        until_serving(&client).await;
        let found = lookup(&client, &group, hashes(0..blocks + 1)).await;
        assert_eq!(found.readable_blocks as u64, blocks, "{block_bytes}: {found:?}");
        assert!(found.residency[..blocks as usize].iter().all(|tiers| *tiers == 8), "{found:?}");
        assert_bytes(&client, &group, 0..blocks, block_bytes).await;
        assert_eq!(lookup(&client, &group, hashes(0..1)).await.residency, [10], "in memory, too, now");
        // Without a look-up before, in a third one; and what is nowhere is a miss.
        let third = daemon(bucket, None, &[]).await;
        let (client, group) = third.group(block_bytes).await;
        until_serving(&client).await;
        assert_bytes(&client, &group, 0..blocks, block_bytes).await;
        assert_eq!(client.get(&group, &hashes([9999])).await.unwrap(), [GetOutcome::Miss]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_outlive_their_node_on_a_local_path() {
    let folder = tempfile::tempdir().unwrap();
    conforms(&local_path(folder.path())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_outlive_their_node_on_s3() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    conforms(&s3::settings(server.address, "some/prefix")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_outlive_their_node_on_azure() {
    let Some(program) = azure::program() else {
        eprintln!("skipped: Azurite is not installed; `make test` installs it, and names it in KVSTORE_AZURITE");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let azurite = Azurite::start(&program, folder.path()).await;
    conforms(&azurite.settings("some/prefix")).await;
    // What it is proven to do, and does not lack.
    let daemon = daemon(&azurite.settings("other"), None, &[]).await;
    let client = daemon.client().await;
    let object = until(&client, |object| object.state == "SERVING").await;
    assert!(object.lacks.is_empty(), "{object:?}");
}

/// Namespaces and layouts are other names: what one stored is a miss in the other.
#[tokio::test(flavor = "multi_thread")]
async fn other_layouts_find_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = daemon(&local_path(folder.path()), None, &[]).await;
    let (client, group) = daemon.group(BLOCK).await;
    until_serving(&client).await;
    put_durable(&client, &group, chain(0..10, BLOCK)).await;
    let other = client.register_layout(replay::layout("other", BLOCK, BlockKind::Attention)).await.unwrap().group(0);
    assert_eq!(lookup(&client, &other, hashes(0..10)).await.readable_blocks, 0);
    assert_eq!(client.get(&other, &hashes([0])).await.unwrap(), [GetOutcome::Miss]);
}

/// Two conversations that begin alike, stored by two nodes; each is found whole, the shared part from whoever stored it.
#[tokio::test(flavor = "multi_thread")]
async fn branches_are_found_along_the_asked_chain() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let first = daemon(&bucket, None, &[]).await;
    let (client, group) = first.group(BLOCK).await;
    until_serving(&client).await;
    put_durable(&client, &group, chain((0..30).chain(100..130), BLOCK)).await;
    let second = daemon(&bucket, None, &[]).await;
    let (client, group) = second.group(BLOCK).await;
    until_serving(&client).await;
    let other: Vec<u64> = (0..30).chain(200..220).collect();
    let found = lookup(&client, &group, hashes(other.iter().copied())).await;
    assert_eq!(found.readable_blocks, 30, "as far as the other conversation goes along");
    put_durable(&client, &group, chain(other.iter().copied(), BLOCK)).await;
    let third = daemon(&bucket, None, &[]).await;
    let (client, group) = third.group(BLOCK).await;
    until_serving(&client).await;
    assert_eq!(lookup(&client, &group, hashes(other.iter().copied())).await.readable_blocks, 50);
    assert_eq!(lookup(&client, &group, hashes((0..30).chain(100..130))).await.readable_blocks, 60);
    for ids in [200..220, 100..130] {
        assert_bytes(&client, &group, ids, BLOCK).await;
    }
}

/// `object.upload=all`: what is put at any level is uploaded in the background; a chain may grow block by block.
#[tokio::test(flavor = "multi_thread")]
async fn everything_is_uploaded_where_the_configuration_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let first = daemon(&bucket, None, &["object.upload=all"]).await;
    let (client, group) = first.group(BLOCK).await;
    let (blocks, begun) = (chain(0..60, BLOCK), Instant::now());
    for block in blocks {
        let results = client.put(&group, vec![block]).await.unwrap();
        assert_eq!(results[0].level(), Level::Memory);
    }
    // What comes within a second goes together.
    let most = 10 + 2 * begun.elapsed().as_secs();
    let object = until(&client, |object| object.backlog_blocks == 0 && object.written_blocks == 60).await;
    assert!(object.written_packs <= most, "blocks that came one by one travel together: {object:?}");
    let second = daemon(&bucket, None, &[]).await;
    let (client, group) = second.group(BLOCK).await;
    until_serving(&client).await;
    assert_eq!(lookup(&client, &group, hashes(0..60)).await.readable_blocks, 60);
    assert_bytes(&client, &group, 0..60, BLOCK).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_brings_a_prefix_from_the_bucket() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let first = daemon(&bucket, None, &[]).await;
    let (client, group) = first.group(BLOCK).await;
    until_serving(&client).await;
    put_durable(&client, &group, chain(0..80, BLOCK)).await;
    let second = daemon(&bucket, None, &[]).await;
    let (client, group) = second.group(BLOCK).await;
    until_serving(&client).await;
    let ticket = client.prefetch(&group, &hashes(0..90), 60_000).await.unwrap();
    let last = client.watch_prefetch(ticket, |_| {}).await.unwrap();
    assert_eq!((last.state(), last.blocks, last.ready, last.missing), (PrefetchState::Done, 90, 80, 10), "{last:?}");
    assert_eq!(lookup(&client, &group, hashes(0..1)).await.residency, [10]);
}

/// A look-up that found nothing and a search that ended right behind it were one answer, "it is nowhere": who asked again and again
/// while the bucket was being searched, as engines do, computed what was there.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_while_the_bucket_is_searched_is_told_of_all_that_is_found() {
    const CHAINS: u64 = 40;
    // Many, so that there is time between the look and the search.
    const BLOCKS: u64 = 1000;
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let first = daemon(&bucket, None, &[]).await;
    let (client, group) = first.group(512).await;
    until_serving(&client).await;
    let ids = |at: u64| at * BLOCKS..(at + 1) * BLOCKS;
    for at in 0..CHAINS {
        put_durable(&client, &group, chain(ids(at), 512)).await;
    }
    let second = daemon(&bucket, None, &[]).await;
    let (client, group) = second.group(512).await;
    until_serving(&client).await;
    for at in 0..CHAINS {
        let request = LookupRequest {
            layout_digest: group.layout_digest.clone(),
            groups: vec![group.group],
            sequence_hashes: hashes(ids(at)),
            ..LookupRequest::default()
        };
        let found = loop {
            let found = client.lookup(request.clone()).await.unwrap();
            if !found.searching {
                break found;
            }
        };
        assert_eq!(u64::from(found.readable_blocks), BLOCKS, "chain {at}");
    }
}

/// Files of packs below a folder.
fn packs_in(folder: &Path) -> Vec<std::path::PathBuf> {
    let (mut packs, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { packs.push(path) }
        }
    }
    // What is being written is beside its name for a moment, with a "#" behind it.
    packs.retain(|path| path.to_str().is_some_and(|path| path.contains("/ns=") && !path.contains('#')));
    packs
}

/// Has been written so long ago, as far as the store can tell.
fn make_older(file: &Path, hours: u64) {
    let then = std::time::SystemTime::now() - Duration::from_secs(hours * 3600);
    std::fs::File::options().write(true).open(file).unwrap().set_modified(then).unwrap();
}

/// Bits flip in the bucket: those blocks are misses, counted, and the others are as they were.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_pack_costs_what_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let first = daemon(&bucket, None, &[]).await;
    let (client, group) = first.group(BLOCK).await;
    until_serving(&client).await;
    put_durable(&client, &group, chain(0..5, BLOCK)).await;
    let packs = packs_in(folder.path());
    for pack in &packs {
        let mut bytes = std::fs::read(pack).unwrap();
        let at = BLOCK as usize / 2;
        bytes[at] ^= 1;
        std::fs::write(pack, bytes).unwrap();
    }
    let second = daemon(&bucket, None, &["object.stall=1s"]).await;
    let (client, group) = second.group(BLOCK).await;
    until_serving(&client).await;
    let outcomes = client.get(&group, &hashes(0..5)).await.unwrap();
    let missing = outcomes.iter().filter(|outcome| **outcome == GetOutcome::Miss).count();
    assert_eq!(missing, packs.len(), "the first block of each pack: {outcomes:?}");
    for (id, outcome) in outcomes.iter().enumerate().filter(|(_, outcome)| **outcome != GetOutcome::Miss) {
        assert_eq!(outcome.bytes(), Some(&replay::content(id as u64, BLOCK as usize)));
    }
    let object = client.status().await.unwrap().object.unwrap();
    assert_eq!(object.corrupt_blocks, packs.len() as u64);
    // Stored again, they are whole again, beside what is damaged: another node finds the sound copy at its second try.
    put_durable(&client, &group, chain(0..5, BLOCK)).await;
    let third = daemon(&bucket, None, &["object.stall=1s"]).await;
    let (client, group) = third.group(BLOCK).await;
    until_serving(&client).await;
    client.get(&group, &hashes(0..5)).await.unwrap();
    assert_eq!(lookup(&client, &group, hashes(0..5)).await.readable_blocks, 5);
    assert_bytes(&client, &group, 0..5, BLOCK).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_blocks_leave_the_bucket_and_their_neighbours_stay() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let first = daemon(&bucket, None, &[]).await;
    let (client, group) = first.group(BLOCK).await;
    until_serving(&client).await;
    put_durable(&client, &group, chain(0..10, BLOCK)).await;
    let second = daemon(&bucket, None, &[]).await;
    let (client, group) = second.group(BLOCK).await;
    until_serving(&client).await;
    // A node knows where a chain's blocks are once it looked them up from their beginning.
    assert_eq!(lookup(&client, &group, hashes(0..10)).await.readable_blocks, 10);
    assert_eq!(client.delete(&group, &hashes(8..12)).await.unwrap().deleted, 2);
    let third = daemon(&bucket, None, &[]).await;
    let (client, group) = third.group(BLOCK).await;
    until_serving(&client).await;
    assert_eq!(lookup(&client, &group, hashes(0..10)).await.readable_blocks, 8);
    assert_bytes(&client, &group, 0..8, BLOCK).await;
    assert_eq!(client.get(&group, &hashes([8, 9])).await.unwrap(), [GetOutcome::Miss, GetOutcome::Miss]);
}

/// Blocks are deleted while they are being written to the bucket: they must not be there afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_while_it_is_uploaded_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    let proxy = FaultProxy::start(server.address).await;
    let first = daemon(&s3::settings(proxy.address, "p"), None, &[]).await;
    let (client, group) = first.group(BLOCK).await;
    until_serving(&client).await;
    proxy.plan([(Meant::Writes, Fault::Delay(Duration::from_secs(1)))]);
    let options = PutOptions { level: Level::Durable, ..PutOptions::default() };
    let putting = client.put_with(&group, chain(0..3, BLOCK), options);
    let deleting = async {
        until(&client, |object| object.writes > 0).await;
        client.delete(&group, &hashes(0..3)).await.unwrap()
    };
    let (_, deleted) = tokio::join!(putting, deleting);
    assert_eq!(deleted.deleted, 3);
    let begun = Instant::now();
    while !packs_in(folder.path()).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the pack is still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let second = daemon(&s3::settings(server.address, "p"), None, &[]).await;
    let (client, group) = second.group(BLOCK).await;
    until_serving(&client).await;
    assert_eq!(lookup(&client, &group, hashes(0..3)).await.readable_blocks, 0);
}

/// The store is away: DURABLE says so in time, a lower level is given where that will do, reads go on, and what waited is
/// uploaded when it comes back, by the next daemon, too.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_said_survived_and_made_up_for() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    let proxy = FaultProxy::start(server.address).await;
    let bucket = s3::settings(proxy.address, "p");
    let first = daemon(&bucket, Some(disk.path()), &["object.stall=1s"]).await;
    let (client, group) = first.group(BLOCK).await;
    until_serving(&client).await;
    put_durable(&client, &group, chain(0..10, BLOCK)).await;
    proxy.always(Some((Meant::Any, Fault::Status(503))));
    let durable = PutOptions { level: Level::Durable, ..PutOptions::default() };
    let begun = Instant::now();
    let error = client.put_with(&group, chain(10..20, BLOCK), durable).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable(why) if why.contains("not DURABLE")), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    let lower = PutOptions { or_lower: true, ..durable };
    let results = client.put_with(&group, chain(20..30, BLOCK), lower).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Local), "{results:?}");
    assert_bytes(&client, &group, 0..30, BLOCK).await;
    let object = until(&client, |object| object.state == "AWAY").await;
    assert_eq!((object.backlog_blocks, object.backlog_bytes), (20, 20 * u64::from(BLOCK)), "{object:?}");
    assert!(object.backlog_bytes_max > 0 && object.reason.contains("503"), "{object:?}");
    first.running.shut_down().await;

    let second = daemon(&bucket, Some(disk.path()), &["object.stall=1s"]).await;
    let (client, group) = second.group(BLOCK).await;
    let object = client.status().await.unwrap().object.unwrap();
    assert_eq!(object.backlog_blocks, 20, "they are remembered: {object:?}");
    proxy.always(None);
    until(&client, |object| object.backlog_blocks == 0 && object.state == "SERVING").await;
    drop((second, group));

    let third = daemon(&s3::settings(server.address, "p"), None, &[]).await;
    let (client, group) = third.group(BLOCK).await;
    until_serving(&client).await;
    for ids in [0..10, 10..20, 20..30] {
        assert_bytes(&client, &group, ids, BLOCK).await;
    }
}

/// More than may wait: blocks stay on this node, which is counted; memory and disk stay within their bounds.
#[tokio::test(flavor = "multi_thread")]
async fn the_backlog_is_bounded() {
    let (folder, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    let proxy = FaultProxy::start(server.address).await;
    proxy.always(Some((Meant::Any, Fault::Status(500))));
    let settings = ["object.upload=all", "object.backlog_bytes=4MB", "object.upload_bytes=1MB", "object.stall=1s"];
    let daemon = daemon(&s3::settings(proxy.address, "p"), Some(disk.path()), &settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    for at in 0..20 {
        client.put(&group, chain(at * 10..at * 10 + 10, BLOCK)).await.unwrap();
    }
    let object = until(&client, |object| object.backlog_blocks == 40).await;
    assert_eq!(object.refused_blocks, 160, "{object:?}");
    assert!(object.leased_bytes <= 1_000_000, "{object:?}");
    proxy.always(None);
    until(&client, |object| object.backlog_blocks == 0).await;
    client.put(&group, chain(500..510, BLOCK)).await.unwrap();
    until(&client, |object| object.written_blocks == 50).await;
}

/// Every fault of the list, singly and mixed, by 60 seeds: no byte is wrong, what was acknowledged is there, calls end by
/// their deadline and some seconds, and nothing waits when it is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[expect(clippy::too_many_lines, reason = "one story, from its start to its end")]
async fn sixty_fault_schedules() {
    const FAULTS: [Fault; 10] = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Delay(Duration::from_secs(30)),
        Fault::Reset,
        Fault::Truncate,
        Fault::Flip,
        Fault::LostReply,
        Fault::Status(409),
        Fault::Slow,
        Fault::Status(429),
    ];
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    let schedule = async |seed: u64| {
        let proxy = FaultProxy::start(server.address).await;
        let disk = tempfile::tempdir().unwrap();
        let bucket = s3::settings(proxy.address, &format!("seed{seed}"));
        let first = daemon(&bucket, Some(disk.path()), &["object.stall=500ms", "host.bytes=16MiB"]).await;
        let (client, group) = first.group(BLOCK).await;
        until_serving(&client).await;
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let deadline = Duration::from_secs(8);
        let client = client.with_deadline(deadline);
        let mut durable = Vec::new();
        for round in 0..4u64 {
            // One kind alone for the first ten seeds, then mixtures.
            let count = 1 + next(5);
            let faults = (0..count).map(|_| {
                let kind = if seed < 10 { seed } else { next(FAULTS.len() as u64) };
                let meant = [Meant::Writes, Meant::Reads, Meant::Any][next(3) as usize];
                (meant, FAULTS[kind as usize])
            });
            proxy.plan(faults.collect::<Vec<_>>());
            let ids = round * 100..round * 100 + 3 + next(20);
            let begun = Instant::now();
            let options = PutOptions { level: Level::Durable, or_lower: next(2) == 0, ..PutOptions::default() };
            match client.put_with(&group, chain(ids.clone(), BLOCK), options).await {
                Ok(results) => {
                    let acknowledged = ids.zip(&results).filter(|(_, result)| result.level() == Level::Durable);
                    durable.extend(acknowledged.map(|(id, _)| id));
                }
                Err(Error::Unavailable(_) | Error::Deadline(_)) => {}
                Err(error) => panic!("seed {seed}: {error}"),
            }
            assert!(begun.elapsed() < deadline + Duration::from_secs(12), "seed {seed}: {:?}", begun.elapsed());
        }
        // Another node reads through the same faults.
        let second = daemon(&bucket, None, &["object.stall=500ms"]).await;
        let (reader, group_there) = second.group(BLOCK).await;
        until_serving(&reader).await;
        let reader = reader.with_deadline(deadline);
        for round in 0..4u64 {
            proxy.plan(
                (0..1 + next(4))
                    .map(|_| (Meant::Reads, FAULTS[next(FAULTS.len() as u64) as usize]))
                    .collect::<Vec<_>>(),
            );
            let ids: Vec<u64> = (round * 100..round * 100 + 23).collect();
            let begun = Instant::now();
            let options = GetOptions::default();
            let outcomes = reader.get_with(&group_there, &hashes(ids.iter().copied()), options).await;
            assert!(begun.elapsed() < deadline + Duration::from_secs(12), "seed {seed}: {:?}", begun.elapsed());
            for (id, outcome) in ids.iter().zip(outcomes.unwrap_or_default()) {
                if let Some(bytes) = outcome.bytes() {
                    assert_eq!(replay::wrong_bytes(*id, bytes), 0, "seed {seed}: block {id}");
                }
            }
        }
        proxy.forget();
        // The store is well again: nothing waits for long, and what was acknowledged is there, for a node that is new.
        until(&client, |object| object.backlog_blocks == 0).await;
        drop((first, second));
        let third = daemon(&s3::settings(server.address, &format!("seed{seed}")), None, &[]).await;
        let (reader, group) = third.group(BLOCK).await;
        until_serving(&reader).await;
        for id in durable {
            let from = id / 100 * 100;
            let outcomes = reader.get(&group, &hashes(from..id + 1)).await.unwrap();
            let last = outcomes.last().and_then(|outcome| outcome.bytes().cloned());
            assert_eq!(last, Some(replay::content(id, BLOCK as usize)), "seed {seed}: DURABLE block {id} is lost");
        }
        proxy.done()
    };
    let mut done = 0;
    for seeds in (0..60u64).collect::<Vec<_>>().chunks(12) {
        done += futures::future::join_all(seeds.iter().map(|seed| schedule(*seed))).await.into_iter().sum::<u64>();
    }
    assert!(done > 300, "only {done} faults were done");
}

/// What a store lacks is said in plain words. A local path has no conditional update, which nothing needs.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_lacks_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = daemon(&local_path(folder.path()), None, &[]).await;
    let client = daemon.client().await;
    let object = until(&client, |object| object.state == "SERVING").await;
    assert_eq!(object.lacks.len(), 1, "{object:?}");
    assert!(object.lacks[0].contains("no conditional update"), "{object:?}");
}

/// A store that is not there: the daemon serves without it, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_not_there_costs_no_more_than_itself() {
    let settings = s3::settings("127.0.0.1:1".parse().unwrap(), "p");
    let daemon = daemon(&settings, None, &["object.upload=all"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    let results = client.put(&group, chain(0..10, BLOCK)).await.unwrap();
    assert!(results.iter().all(|result| result.status() == PutStatus::Stored));
    assert_bytes(&client, &group, 0..10, BLOCK).await;
    let begun = Instant::now();
    assert_eq!(client.get(&group, &hashes([77])).await.unwrap(), [GetOutcome::Miss]);
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    let object = until(&client, |object| object.state == "AWAY").await;
    assert!(!object.reason.is_empty());
    let options = PutOptions { level: Level::Durable, ..PutOptions::default() };
    let error = client.put_with(&group, chain(20..21, BLOCK), options).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error}");
}

fn gone(progress: &CollectProgress) -> (u64, u64) {
    (progress.deleted.unwrap().packs, progress.referenced.unwrap().packs)
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_goes_by_age_and_by_bytes_but_not_what_is_pinned_or_young() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let daemon = daemon(&bucket, None, &[]).await;
    let (client, group) = daemon.group(BLOCK).await;
    until_serving(&client).await;
    // One pack each: chains of their own.
    for id in 0..10 {
        put_durable(&client, &group, chain(id * 100..id * 100 + 1, BLOCK)).await;
    }
    let mut packs = packs_in(folder.path());
    packs.sort();
    assert_eq!(packs.len(), 10);
    let everything = CollectRequest { keep_bytes: Some(0), ..CollectRequest::default() };
    let young = client.collect(everything.clone(), |_| {}).await.unwrap();
    assert_eq!(gone(&young), (0, 0), "within their grace: {young:?}");
    for (hours, pack) in packs.iter().enumerate() {
        make_older(pack, hours as u64 * 10);
    }
    let count = young.found["default"];
    let by_bytes =
        CollectRequest { keep_bytes: Some(count.bytes / 10 * 8), dry_run: true, ..CollectRequest::default() };
    assert_eq!(gone(&client.collect(by_bytes, |_| {}).await.unwrap()), (2, 0));
    assert_eq!(packs_in(folder.path()).len(), 10, "a dry run");
    // Of the two oldest, one is pinned, which the bucket is told: the daemon that collects need not be the one that pins.
    let old = CollectRequest { older_than_ms: Some(75 * 3600 * 1000), ..CollectRequest::default() };
    let mut pins = Vec::new();
    for id in 0..10 {
        pins.push(client.pin(&group, &hashes([id * 100]), 600_000).await.unwrap());
    }
    let other = TestDaemon::start(&bucket.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let collector = other.client().await;
    until_serving(&collector).await;
    assert_eq!(gone(&collector.collect(old.clone(), |_| {}).await.unwrap()), (0, 2));
    for pin in pins {
        client.unpin(pin.pin).await.unwrap();
    }
    let refs = folder.path().join("v1/refs");
    let begun = Instant::now();
    while std::fs::read_dir(&refs).unwrap().count() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "references end with their pins");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let other_namespace = CollectRequest { namespace: "other".into(), ..old.clone() };
    assert_eq!(gone(&collector.collect(other_namespace, |_| {}).await.unwrap()), (0, 0));
    assert_eq!(gone(&collector.collect(old, |_| {}).await.unwrap()), (2, 0));
    assert_eq!(packs_in(folder.path()).len(), 8);
    // What went is a miss, whoever thought it was there.
    let again = client.delete(&group, &hashes((0..10).map(|id| id * 100))).await.unwrap();
    assert_eq!(again.deleted, 10);
    assert!(client.collect(CollectRequest::default(), |_| {}).await.unwrap_err().to_string().contains("keep_bytes"));
}

/// A DURABLE put of blocks that are in the bucket already, in an object so old that a collector may take it the next moment: the
/// acknowledgement must not rest on it.
#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_does_not_rest_on_an_object_that_may_be_collected() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let daemon_of = async || daemon(&bucket, None, &[]).await;
    let first = daemon_of().await;
    let (client, group) = first.group(BLOCK).await;
    until_serving(&client).await;
    put_durable(&client, &group, chain(0..5, BLOCK)).await;
    packs_in(folder.path()).iter().for_each(|pack| make_older(pack, 2));
    let packs = packs_in(folder.path()).len();
    put_durable(&client, &group, chain(0..5, BLOCK)).await;
    assert!(packs_in(folder.path()).len() >= 2 * packs, "written again, beside the old ones");
    let old = CollectRequest { older_than_ms: Some(3600 * 1000), ..CollectRequest::default() };
    assert_eq!(gone(&client.collect(old, |_| {}).await.unwrap()), (packs as u64, 0));
    let second = daemon_of().await;
    let (client, group) = second.group(BLOCK).await;
    until_serving(&client).await;
    assert_bytes(&client, &group, 0..5, BLOCK).await;
}

/// Two collectors at once: one has the lease, the other is told until when.
#[tokio::test(flavor = "multi_thread")]
async fn one_collector_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let bucket = local_path(folder.path());
    let daemons = [daemon(&bucket, None, &[]).await, daemon(&bucket, None, &[]).await];
    let lease = folder.path().join("v1/collector/00000000000000000007");
    std::fs::create_dir_all(lease.parent().unwrap()).unwrap();
    let far = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() + 60_000;
    std::fs::write(&lease, format!("{{\"holder\":\"x\",\"expires_ms\":{far}}}")).unwrap();
    let request = CollectRequest { older_than_ms: Some(0), ..CollectRequest::default() };
    for daemon in &daemons {
        let client = daemon.client().await;
        until_serving(&client).await;
        let error = client.collect(request.clone(), |_| {}).await.unwrap_err();
        assert!(matches!(&error, Error::Busy(why) if why.contains("lease")), "{error}");
    }
    std::fs::write(&lease, "{\"holder\":\"x\",\"expires_ms\":5}").unwrap();
    let mut held = 0;
    for _ in 0..10 {
        let clients = [daemons[0].client().await, daemons[1].client().await];
        let both =
            futures::future::join_all(clients.iter().map(|client| client.collect(request.clone(), |_| {}))).await;
        assert!(both.iter().any(Result::is_ok), "{both:?}");
        held += both.iter().filter(|outcome| matches!(outcome, Err(Error::Busy(_)))).count();
    }
    let names: Vec<_> = std::fs::read_dir(lease.parent().unwrap()).unwrap().collect();
    assert_eq!(names.len(), 1, "leases that ended are cleaned up: {names:?}");
    assert!(held <= 10);
}
