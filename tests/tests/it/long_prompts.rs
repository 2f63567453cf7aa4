//! A prompt of a million tokens is 65,536 blocks of 16 tokens. Every call takes it, over both planes and through all tiers, and
//! what it takes of the lease page, of the rings and of memory is bounded. Blocks are small here: it is their number that counts.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore::replay;
use kvstore::trace;
use kvstore_client::v1::{BlockKind, Level, LookupRequest, LookupResponse, PrefetchState, PutStatus};
use kvstore_client::{Client, Error, GetOptions, GetOutcome, GroupRef, Plane, PutOptions, PutSlice};
use kvstore_tests::{TestDaemon, chain, hashes, until};

/// Blocks of the prompt.
const BLOCKS: u64 = 65_536;
/// Bytes of each; its slot has 4096.
const BYTES: u32 = 1000;
/// Memory that has them all, and of which they are less than half: so that they can be pinned.
const ROOMY: &str = "host.bytes=640MiB";
const HOST: u32 = 2;
const NVME: u32 = 4;

fn commands(daemon: &TestDaemon) -> u64 {
    daemon.running.daemon.traffic.local_commands.load(Ordering::Relaxed)
}

async fn lookup(client: &Client, group: &GroupRef, names: &[Bytes]) -> LookupResponse {
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        groups: vec![group.group],
        sequence_hashes: names.to_vec(),
        search_wait_ms: 5000,
        ..LookupRequest::default()
    };
    client.lookup(request).await.unwrap()
}

/// Reads a prefix into buffers; every byte is checked, and how many blocks came is returned.
async fn read(client: &Client, group: &GroupRef, names: &[Bytes]) -> usize {
    let mut whole = vec![0u8; names.len() * BYTES as usize];
    let mut buffers: Vec<&mut [u8]> = whole.chunks_exact_mut(BYTES as usize).collect();
    let read = client.get_into(group, names, &mut buffers).await.unwrap();
    let wrong: u64 = (0..).zip(&buffers).take(read).map(|(id, buffer)| replay::wrong_bytes(id, buffer)).sum();
    assert_eq!(wrong, 0, "WRONG BYTES in {read} blocks");
    read
}

fn check(outcomes: &[GetOutcome]) {
    for (id, outcome) in (0..).zip(outcomes) {
        let bytes = outcome.bytes().unwrap_or_else(|| panic!("block {id}: {outcome:?}"));
        assert_eq!((bytes.len(), replay::wrong_bytes(id, bytes)), (BYTES as usize, 0), "block {id}");
    }
}

/// Pins the prompt, which keeps it from being deleted.
async fn pin(client: &Client, group: &GroupRef, names: &[Bytes]) {
    let pin = client.pin(group, names, 60_000).await.unwrap();
    assert_eq!(u64::from(pin.pinned_blocks), BLOCKS);
    assert_eq!(client.delete(group, names).await.unwrap().pinned, BLOCKS);
    assert!(client.unpin(pin.pin).await.unwrap());
}

async fn prefetch_and_delete(client: &Client, group: &GroupRef, names: &[Bytes]) {
    let ticket = client.prefetch(group, names, 60_000).await.unwrap();
    let last = client.watch_prefetch(ticket, |_| {}).await.unwrap();
    assert_eq!((last.state(), u64::from(last.blocks), last.missing), (PrefetchState::Done, BLOCKS, 0), "{last:?}");
    assert_eq!(client.delete(group, names).await.unwrap().deleted, BLOCKS);
    assert_eq!(lookup(client, group, names).await.readable_blocks, 0);
}

/// A get took a lease for every hit, and was answered Busy at block 8,192, however long its caller waited; a `leases` came back
/// as if the prompt ended there.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_in_memory_over_the_local_plane() {
    let daemon = TestDaemon::start(&[ROOMY]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    let client = client.with_deadline(Duration::from_secs(60));
    let names = hashes(0..BLOCKS);
    let stored = client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
    assert!(stored.len() as u64 == BLOCKS && stored.iter().all(|result| result.status() == PutStatus::Stored));
    let found = lookup(&client, &group, &names).await;
    assert_eq!(u64::from(found.readable_blocks), BLOCKS);
    assert!(found.residency.len() as u64 == BLOCKS && found.residency.iter().all(|tiers| *tiers == HOST));
    assert_eq!(client.readable_blocks(&group, &names).await.unwrap() as u64, BLOCKS);
    assert!(client.contains(&group, &names).await.unwrap().iter().all(|there| *there));
    assert_eq!(read(&client, &group, &names).await as u64, BLOCKS);
    let outcomes = client.get(&group, &names).await.unwrap();
    check(&outcomes);
    let held = daemon.running.daemon.host.local_leases().0;
    assert!((1..=kvstore_plane::caps::LEASES_PER_CLIENT / 2).contains(&held), "a kept result has {held} leases");
    assert_eq!(read(&client, &group, &names).await as u64, BLOCKS, "others of the process can read meanwhile");
    drop(outcomes);
    pin(&client, &group, &names).await;
    prefetch_and_delete(&client, &group, &names).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_in_memory_over_grpc() {
    let daemon = TestDaemon::start(&[ROOMY]).await;
    let (client, group) = daemon.group(BYTES).await;
    let client = client.with_deadline(Duration::from_secs(60));
    let names = hashes(0..BLOCKS);
    let stored = client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
    assert!(stored.len() as u64 == BLOCKS && stored.iter().all(|result| result.status() == PutStatus::Stored));
    assert_eq!(u64::from(lookup(&client, &group, &names).await.readable_blocks), BLOCKS);
    pin(&client, &group, &names).await;
    prefetch_and_delete(&client, &group, &names).await;
}

/// A get over gRPC refused more than 4,096 blocks with RESOURCE_EXHAUSTED, which says "try again". It takes a whole prompt, and
/// leases it in windows: the memory of the daemon and what other gets may lease stay bounded.
#[tokio::test(flavor = "multi_thread")]
async fn a_get_over_grpc_takes_a_long_prompt() {
    let daemon = TestDaemon::start(&[ROOMY]).await;
    let (client, group) = daemon.group(BYTES).await;
    let client = client.with_deadline(Duration::from_secs(60));
    let names = hashes(0..BLOCKS);
    client.put(&group, chain(0..BLOCKS, BYTES)).await.unwrap();
    assert_eq!(read(&client, &group, &names).await as u64, BLOCKS);
    let outcomes = client.get(&group, &names).await.unwrap();
    assert_eq!(outcomes.len() as u64, BLOCKS);
    check(&outcomes);
}

fn disk(folder: &Path) -> String {
    format!("nvme.paths={}", folder.display())
}

/// A long put at level LOCAL was answered Busy, or told that blocks are in MEMORY: more than 256 of them waited for the disk, and
/// the daemon has no more tasks for one client. Read back, the blocks came 64 at a time, each batch after the one before it was
/// used.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_on_disk_over_the_local_plane() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = TestDaemon::start(&["host.bytes=64MiB", &disk(folder.path()), "nvme.bytes=2GiB"]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    let client = client.with_deadline(Duration::from_secs(60));
    let names = hashes(0..BLOCKS);
    let options = PutOptions { level: Level::Local, ..PutOptions::default() };
    let stored = client.put_with(&group, chain(0..BLOCKS, BYTES), options).await.unwrap();
    let short = stored.iter().filter(|result| result.level() != Level::Local).count();
    assert_eq!((stored.len() as u64, short), (BLOCKS, 0), "blocks that are not on disk");
    let found = lookup(&client, &group, &names).await;
    assert_eq!(u64::from(found.readable_blocks), BLOCKS);
    let on_disk_alone = found.residency.iter().filter(|tiers| **tiers == NVME).count() as u64;
    assert!(on_disk_alone > BLOCKS / 2, "only {on_disk_alone} blocks are on disk alone");
    assert_eq!(read(&client, &group, &names).await as u64, BLOCKS);
    check(&client.get(&group, &names).await.unwrap());
    pin(&client, &group, &names).await;
    prefetch_and_delete(&client, &group, &names).await;
}

/// By one daemon into the bucket, and by another one, which has no copy, out of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_in_a_bucket_over_the_local_plane() {
    let bucket = tempfile::tempdir().unwrap();
    let url = format!("object.url=file://{}", bucket.path().display());
    let serves = |status: &kvstore_client::v1::StatusResponse| {
        status.object.as_ref().is_some_and(|object| object.state == "SERVING")
    };
    let names = hashes(0..BLOCKS);
    let first = TestDaemon::start(&["host.bytes=384MiB", &url]).await;
    let (client, group) = first.group(BYTES).await;
    let client = client.with_deadline(Duration::from_secs(60));
    until(&client, serves).await;
    let options = PutOptions { level: Level::Durable, ..PutOptions::default() };
    let stored = client.put_with(&group, chain(0..BLOCKS, BYTES), options).await.unwrap();
    let short = stored.iter().filter(|result| result.level() != Level::Durable).count();
    assert_eq!((stored.len() as u64, short), (BLOCKS, 0), "blocks that are not in the bucket");
    first.running.shut_down().await;

    let second = TestDaemon::start(&["host.bytes=64MiB", &url]).await;
    let (client, group) = second.group_over(Plane::Local, BYTES).await;
    let client = client.with_deadline(Duration::from_secs(60));
    until(&client, serves).await;
    assert_eq!(u64::from(lookup(&client, &group, &names).await.readable_blocks), BLOCKS);
    assert_eq!(read(&client, &group, &names).await as u64, BLOCKS);
    let pin = client.pin(&group, &names, 60_000).await.unwrap();
    assert_eq!(u64::from(pin.pinned_blocks), BLOCKS);
    assert!(client.unpin(pin.pin).await.unwrap());
    prefetch_and_delete(&client, &group, &names).await;
}

/// More leases than a page has words for can never be had: the error says so, and names what reads a longer prefix. Where others
/// of the process have the words, waiting helps; and reads that copy go another way.
#[tokio::test(flavor = "multi_thread")]
async fn leases_of_a_long_prompt_are_taken_in_windows() {
    let daemon = TestDaemon::start(&[ROOMY]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    let client = client.with_deadline(Duration::from_secs(60));
    let names = hashes(0..20_000);
    client.put(&group, chain(0..20_000, BYTES)).await.unwrap();
    let most = kvstore_plane::caps::LEASES_PER_CLIENT;
    let now = client.leases_now(&group, &names[..most + 1]).unwrap().err().unwrap();
    for error in [now, client.leases(&group, &names[..most + 1]).await.err().unwrap()] {
        assert!(
            matches!(&error, Error::Invalid(why) if why.contains("8192") && why.contains("lease_windows")),
            "{error}"
        );
    }
    let error = client.lease_windows(&group, &names, most).await.err().unwrap();
    assert!(matches!(&error, Error::Invalid(why) if why.contains("4096")), "{error}");

    let mut windows = client.lease_windows(&group, &names, 1000).await.unwrap();
    let mut read = 0;
    while let Some(leases) = windows.next().await.unwrap() {
        assert!(daemon.running.daemon.host.local_leases().0 <= 1000);
        for block in leases.iter() {
            assert_eq!((block.len(), replay::wrong_bytes(read, block)), (BYTES as usize, 0), "block {read}");
            read += 1;
        }
    }
    assert_eq!((read, windows.done()), (20_000, 20_000));
    let mut ends = client.lease_windows(&group, &hashes([0, 1, 99_999, 2]), 4).await.unwrap();
    assert_eq!(ends.next().await.unwrap().unwrap().len(), 2);
    assert!(ends.next().await.unwrap().is_none() && !ends.ended_at_unmapped());

    let all = client.leases(&group, &names[..most]).await.unwrap();
    assert_eq!(all.len(), most);
    let error = client.leases(&group, &names[most..most + 1]).await.err().unwrap();
    assert!(matches!(&error, Error::Busy(why) if why.contains("8192")), "{error}");
    assert_eq!(self::read(&client, &group, &names[..4000]).await, 4000, "a read that copies needs no words");
    check(&client.get(&group, &names[..4000]).await.unwrap());
    drop(all);
    assert_eq!(client.leases(&group, &names[most..most + 1]).await.unwrap().len(), 1);
}

/// While a window is used, the disk works for the next one: it is in memory before anybody asks for it.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_next_window_lacks_is_brought_while_one_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = TestDaemon::start(&["host.bytes=16MiB", &disk(folder.path()), "nvme.bytes=256MiB"]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    let client = client.with_deadline(Duration::from_secs(60));
    let options = PutOptions { level: Level::Local, ..PutOptions::default() };
    client.put_with(&group, chain(0..1000, BYTES), options).await.unwrap();
    // Others push them out of memory.
    client.put_with(&group, chain(10_000..20_000, BYTES), options).await.unwrap();
    let names = hashes(0..1000);
    let in_memory = async |at: usize| lookup(&client, &group, &names).await.residency[at] & HOST != 0;
    assert!(!in_memory(0).await && !in_memory(300).await);
    let mut windows = client.lease_windows(&group, &names, 200).await.unwrap();
    let first = windows.next().await.unwrap().unwrap();
    let mut read = first.len();
    assert!((1..=200).contains(&read) && daemon.running.daemon.host.local_leases().0 <= 200);
    drop(first);
    let begun = Instant::now();
    while !in_memory(read + 150).await {
        assert!(begun.elapsed() < Duration::from_secs(60), "the next window never came, as nobody asked for it");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    while let Some(leases) = windows.next().await.unwrap() {
        assert!(leases.iter().zip(read as u64..).all(|(block, id)| replay::wrong_bytes(id, block) == 0));
        read += leases.len();
    }
    assert_eq!(read, 1000);
}

/// Each block of a prompt that was nowhere cost a command over the rings, one after the other: a second for 65,536 of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_that_is_nowhere_costs_a_few_commands() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    client.put(&group, chain(0..10, BYTES)).await.unwrap();
    let mut names = hashes(0..10);
    names.extend(hashes(100_000..110_000));
    names.extend(hashes(0..10));
    let before = commands(&daemon);
    let outcomes = client.get(&group, &names).await.unwrap();
    assert_eq!(outcomes.len(), names.len());
    check(&outcomes[..10]);
    check(&outcomes[names.len() - 10..]);
    assert!(outcomes[10..names.len() - 10].iter().all(|outcome| *outcome == GetOutcome::Miss));
    let commands = commands(&daemon) - before;
    assert!(commands < 50, "{commands} commands");
    let options = GetOptions { leading_run: true, ..GetOptions::default() };
    assert_eq!(client.get_with(&group, &names, options).await.unwrap().len(), 11);
}

/// A hint never waits, and it filled the ring: what came behind it waited instead.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_hint_leaves_room_in_the_ring() {
    let daemon = TestDaemon::start(&[]).await;
    let (client, group) = daemon.group_over(Plane::Local, BYTES).await;
    client.put(&group, chain(0..10, BYTES)).await.unwrap();
    let before = commands(&daemon);
    client.hint(&group, &hashes(0..BLOCKS)).unwrap();
    assert_eq!(client.put(&group, chain(20..21, BYTES)).await.unwrap()[0].status(), PutStatus::Stored);
    let hints = commands(&daemon) - before;
    // The put is two of them.
    assert!((4..=10).contains(&hints), "{hints} commands");
}

/// From borrowed memory, a put over gRPC copied the whole prompt before it sent the first block. It goes in calls of 64 MiB, and
/// only the last of them ends the prompt.
#[tokio::test(flavor = "multi_thread")]
async fn a_put_from_borrowed_memory_goes_in_windows() {
    let daemon = TestDaemon::start(&["host.bytes=256MiB"]).await;
    let bytes = 1 << 20;
    let (client, group) = daemon.group(bytes).await;
    let blocks = chain(0..150, bytes);
    let parts: Vec<&[u8]> = blocks.iter().map(|block| &*block.bytes).collect();
    let slice = |(block, bytes)| {
        let kvstore_client::PutBlock { hash, parent, .. }: &kvstore_client::PutBlock = block;
        PutSlice { hash, parent: parent.as_deref(), parts: std::slice::from_ref(bytes) }
    };
    let slices: Vec<PutSlice<'_>> = blocks.iter().zip(&parts).map(slice).collect();
    let stored = client.put_from(&group, &slices, PutOptions::default()).await.unwrap();
    assert!(stored.len() == 150 && stored.iter().all(|result| result.status() == PutStatus::Stored));
    let outcomes = client.get(&group, &hashes(0..150)).await.unwrap();
    for (id, outcome) in (0..).zip(&outcomes) {
        assert_eq!(outcome.bytes().map(|bytes| replay::wrong_bytes(id, bytes)), Some(0), "block {id}");
    }
    let empty = client.put_from(&group, &[], PutOptions::default()).await.err().unwrap();
    assert!(matches!(&empty, Error::Invalid(why) if why.contains("block")), "{empty}");
}

/// The tokens of a long prompt are more than one message may have: its description was refused, and none of its blocks published.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_is_described_in_windows() {
    let daemon = TestDaemon::start(&["events.publish=tcp://127.0.0.1:0"]).await;
    for plane in [Plane::Local, Plane::Grpc] {
        let client = daemon.client_over(plane).await;
        let mut layout = replay::layout("described", BYTES, BlockKind::Attention);
        layout.block_tokens = 16;
        let group = client.register_layout(layout).await.unwrap().group(0);
        let names = hashes(0..BLOCKS);
        // Of five bytes each.
        let tokens: Vec<u32> = (0..BLOCKS as u32 * 16).map(|at| u32::MAX - at).collect();
        let parent = Bytes::from_static(b"before");
        assert!(client.describe(&group, &names, Some(&parent), &tokens, Some("an adapter")).await.unwrap());
        let short = client.describe(&group, &names, None, &tokens[1..], None).await.err().unwrap();
        assert!(matches!(&short, Error::Invalid(_) | Error::Other(_)), "{short}");
    }
}

/// A line of a trace with more than 4,096 blocks was refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_is_replayed_over_both_planes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.jsonl");
    let ids: Vec<String> = (0..BLOCKS).map(|id| id.to_string()).collect();
    let line = |at: u32| format!("{{\"timestamp\": {at}, \"hash_ids\": [{}]}}\n", ids.join(","));
    std::fs::write(&path, line(0) + &line(1)).unwrap();
    let requests = trace::read(&path).unwrap();
    for plane in [Plane::Local, Plane::Grpc] {
        let daemon = TestDaemon::start(&[ROOMY]).await;
        let client = daemon.client_over(plane).await;
        let options = replay::Drive { block_bytes: BYTES, speed: None, verify: true };
        let report = replay::drive(&client, &requests, options, |_| {}).await.unwrap();
        assert_eq!((report.requests, report.blocks, report.hits.host), (2, 2 * BLOCKS, BLOCKS), "{report:?}");
        assert_eq!((report.wrong_bytes, report.busy_blocks), (0, 0), "{report:?}");
    }
    std::fs::write(&path, format!("{{\"timestamp\": 0, \"hash_ids\": [{},7]}}\n", ids.join(","))).unwrap();
    let error = trace::read(&path).unwrap_err().to_string();
    assert!(error.contains("65537") && error.contains("65536"), "{error}");
}
