//! Packs that became shorter in the bucket: a misfortune of theirs, and no failure of the store.

use std::path::{Path, PathBuf};

use kvstore::replay;
use kvstore_client::v1::{Level, LookupRequest};
use kvstore_client::{Client, GetOutcome, GroupRef, PutOptions};
use kvstore_tests::s3::{self, S3Server};
use kvstore_tests::{TestDaemon, chain, hashes, until};

const BLOCK: u32 = 20_000;

async fn daemon(settings: &[String]) -> (TestDaemon, Client, GroupRef) {
    let daemon = TestDaemon::start(&settings.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, |status| status.object.as_ref().unwrap().state == "SERVING").await;
    (daemon, client, group)
}

async fn put_durable(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    let options = PutOptions { level: Level::Durable, ..PutOptions::default() };
    let results = client.put_with(group, chain(ids, BLOCK), options).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Durable), "{results:?}");
}

async fn find(client: &Client, group: &GroupRef, blocks: u64) {
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        groups: vec![group.group],
        sequence_hashes: hashes(0..blocks),
        search_wait_ms: 20_000,
        ..LookupRequest::default()
    };
    assert_eq!(u64::from(client.lookup(request).await.unwrap().readable_blocks), blocks);
}

/// Packs below a folder, by their names.
fn packs_in(folder: &Path) -> Vec<PathBuf> {
    let (mut packs, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { packs.push(path) }
        }
    }
    // What is being written is beside its name for a moment, with a "#" behind it.
    packs.retain(|path| path.to_str().is_some_and(|path| path.contains("/ns=") && !path.contains('#')));
    packs.sort();
    packs
}

fn cut(pack: &Path, bytes: u64) {
    std::fs::File::options().write(true).open(pack).unwrap().set_len(bytes).unwrap();
}

/// Which blocks are missing; the others are right. Nothing of it counts against the store.
async fn missing(client: &Client, group: &GroupRef, blocks: u64) -> Vec<u64> {
    let outcomes = client.get(group, &hashes(0..blocks)).await.unwrap();
    let mut missing = Vec::new();
    for (id, outcome) in (0..).zip(&outcomes) {
        match outcome.bytes() {
            Some(bytes) => assert_eq!(replay::wrong_bytes(id, bytes), 0, "block {id}"),
            None => missing.push(id),
        }
    }
    let object = client.status().await.unwrap().object.unwrap();
    assert_eq!((object.state.as_str(), object.failures), ("SERVING", 0), "{object:?}");
    missing
}

/// Three packs of forty were cut to nothing. Each request for them failed, was made again, and counted, until the whole store counted
/// as away, and sound blocks became misses.
async fn packs_cut_to_nothing(bucket: &[String], folder: &Path) {
    const BLOCKS: u64 = 40;
    let (_first, client, group) = daemon(bucket).await;
    for id in 0..BLOCKS {
        put_durable(&client, &group, id..id + 1).await;
    }
    let packs = packs_in(folder);
    assert_eq!(packs.len() as u64, BLOCKS);
    let (_second, client, group) = daemon(bucket).await;
    find(&client, &group, BLOCKS).await;
    packs.iter().step_by(15).for_each(|pack| cut(pack, 0));
    let lost = missing(&client, &group, BLOCKS).await;
    assert_eq!(lost.len(), 3, "{lost:?}");
    let object = client.status().await.unwrap().object.unwrap();
    assert_eq!(object.corrupt_blocks, 3);
    // They are not asked for again where they were; they are found cut by a listing, and stay misses.
    assert_eq!(missing(&client, &group, BLOCKS).await, lost);
    // Put again, they are whole, beside what was cut; and what was cut can be deleted.
    for id in &lost {
        put_durable(&client, &group, *id..*id + 1).await;
    }
    assert_eq!(missing(&client, &group, BLOCKS).await, [0u64; 0]);
    assert_eq!(client.delete(&group, &hashes(0..BLOCKS)).await.unwrap().deleted, BLOCKS);
    assert_eq!(client.get(&group, &hashes([0])).await.unwrap(), [GetOutcome::Miss]);
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_that_are_cut_to_nothing_on_s3_cost_their_blocks_alone() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    packs_cut_to_nothing(&s3::settings(server.address, "p"), folder.path()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_that_are_cut_to_nothing_on_a_local_path_cost_their_blocks_alone() {
    let folder = tempfile::tempdir().unwrap();
    packs_cut_to_nothing(&[format!("object.url=file://{}", folder.path().display())], folder.path()).await;
}

/// Half of a pack is gone: the blocks of the other half are read, with two requests more and none that fails.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_a_pack_that_was_cut_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    let bucket = s3::settings(server.address, "p");
    let (_first, client, group) = daemon(&bucket).await;
    put_durable(&client, &group, 0..10).await;
    let packs = packs_in(folder.path());
    let (_second, client, group) = daemon(&bucket).await;
    find(&client, &group, 10).await;
    let largest = packs.iter().max_by_key(|pack| std::fs::metadata(pack).unwrap().len()).unwrap();
    let bytes = std::fs::metadata(largest).unwrap().len();
    assert!(bytes > 3 * u64::from(BLOCK), "a pack of a few blocks");
    cut(largest, bytes / 2);
    let lost = missing(&client, &group, 10).await.len() as u64;
    let of_pack = bytes / u64::from(BLOCK);
    assert!((of_pack / 2..=of_pack / 2 + 1).contains(&lost), "{lost} of {of_pack} blocks are lost");
    // What is left of it outlives the deletion of its neighbours.
    assert!(client.delete(&group, &hashes([0])).await.is_ok());
}
