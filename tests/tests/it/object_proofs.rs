//! What an acknowledgement of DURABLE, or of a deletion, rests on in the bucket: bytes that this daemon has seen, not names that it
//! was told.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt;
use kvstore::replay;
use kvstore_client::v1::{Level, LookupRequest};
use kvstore_client::{Client, GroupRef, PutOptions};
use kvstore_tests::object::{FakeStore, ObjectTierOptions, ObjectTiers, Request};
use kvstore_tests::{TestDaemon, chain, hashes, until};
use kvstore_tiers::caps::{OBJECT_LISTINGS_PER_SEARCH_MAX, OBJECT_REWRITTEN_BYTES_MAX, OBJECT_SEARCHES_EVERYWHERE_MAX};

const BLOCK: u32 = 50_000;

async fn daemon(folder: &Path) -> (TestDaemon, Client, GroupRef) {
    let daemon = TestDaemon::start(&[&format!("object.url=file://{}", folder.display())]).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, |status| status.object.as_ref().unwrap().state == "SERVING").await;
    (daemon, client, group)
}

async fn put_durable(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    let options = PutOptions { level: Level::Durable, ..PutOptions::default() };
    let results = client.put_with(group, chain(ids, BLOCK), options).await.unwrap();
    assert!(results.iter().all(|result| result.level() == Level::Durable), "{results:?}");
}

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
    packs
}

/// One daemon stores blocks; then something happens to its packs. Another finds them in a listing, is given the same blocks, sound,
/// and says DURABLE. Both are killed. Whoever comes next must have every block.
async fn survives(harm: impl Fn(&Path)) {
    let folder = tempfile::tempdir().unwrap();
    let (first, client, group) = daemon(folder.path()).await;
    put_durable(&client, &group, 0..5).await;
    let (second, client, group) = daemon(folder.path()).await;
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        groups: vec![group.group],
        sequence_hashes: hashes(0..5),
        search_wait_ms: 5000,
        ..LookupRequest::default()
    };
    assert_eq!(client.lookup(request).await.unwrap().readable_blocks, 5);
    packs_in(folder.path()).iter().for_each(|pack| harm(pack));
    put_durable(&client, &group, 0..5).await;
    let written = client.status().await.unwrap().object.unwrap().written_blocks;
    assert_eq!(written, 5, "nothing was written, and nothing proven");
    drop((first, second));
    let (_third, client, group) = daemon(folder.path()).await;
    // A damaged copy may be found first, which is a miss, and takes some tries; the sound one is found then.
    let begun = Instant::now();
    loop {
        let outcomes = client.get(&group, &hashes(0..5)).await.unwrap();
        for (id, outcome) in (0..5).zip(&outcomes) {
            let bytes = outcome.bytes();
            assert!(bytes.is_none_or(|bytes| replay::wrong_bytes(id, bytes) == 0), "WRONG BYTES in block {id}");
        }
        if outcomes.iter().all(|outcome| outcome.bytes().is_some()) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "DURABLE blocks are lost: {outcomes:?}");
    }
}

fn change(pack: &Path, how: impl Fn(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(pack).unwrap();
    how(&mut bytes);
    std::fs::write(pack, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn durable_does_not_rest_on_a_pack_with_a_flipped_byte() {
    survives(|pack| change(pack, |bytes| bytes[BLOCK as usize / 2] ^= 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn durable_does_not_rest_on_a_pack_that_was_cut() {
    survives(|pack| change(pack, |bytes| bytes.truncate(bytes.len() - 5000))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn durable_does_not_rest_on_a_pack_that_vanished() {
    survives(|pack| std::fs::remove_file(pack).unwrap()).await;
}

/// As long as it should be, sound in itself, and of other blocks.
#[tokio::test(flavor = "multi_thread")]
async fn durable_does_not_rest_on_another_pack_under_the_same_name() {
    let other = tempfile::tempdir().unwrap();
    let (_daemon, client, group) = daemon(other.path()).await;
    put_durable(&client, &group, 100..105).await;
    let others = packs_in(other.path());
    survives(|pack| {
        let bytes = std::fs::metadata(pack).unwrap().len();
        match others.iter().find(|other| std::fs::metadata(other).unwrap().len() == bytes) {
            Some(other) => _ = std::fs::copy(other, pack).unwrap(),
            // Cut otherwise: then its blocks are nobody's.
            None => change(pack, |bytes| bytes.fill(0)),
        }
    })
    .await;
}

async fn tiers(store: &FakeStore, seed: u64) -> ObjectTiers {
    ObjectTiers::open(store, &ObjectTierOptions { seed, ..ObjectTierOptions::default() }).await
}

/// Another's sound pack is read whole once, for all blocks together, and rested on from then on.
#[tokio::test(flavor = "multi_thread")]
async fn a_sound_pack_of_another_is_proven_once() {
    let store = FakeStore::default();
    let first = tiers(&store, 1).await;
    assert_eq!(first.put_durable(0..20).await, [true; 20]);
    let packs = store.packs().await.len();
    let second = tiers(&store, 2).await;
    assert_eq!(second.find(0..20).await, [true; 20]);
    let before = (store.requests(Request::Get), store.requests(Request::Head));
    assert_eq!(second.put_durable(0..20).await, [true; 20]);
    let proven = (store.requests(Request::Get), store.requests(Request::Head));
    assert!(proven.0 > before.0, "acknowledged unread");
    assert!(proven.0 - before.0 <= 2 * packs as u64, "a footer and a body for each pack");
    assert!(proven.1 - before.1 < 20, "together, and those that came meanwhile");
    assert_eq!(second.put_durable(0..20).await, [true; 20]);
    assert_eq!(store.requests(Request::Get), proven.0, "a proof is kept");
    assert_eq!(store.packs().await.len(), packs, "nothing is written twice");
}

/// A daemon has proof of what it wrote itself. The bytes change later; the same block is put again.
#[tokio::test(flavor = "multi_thread")]
async fn a_proof_ends_where_the_object_changes() {
    let store = FakeStore::default();
    let tier = tiers(&store, 1).await;
    assert_eq!(tier.put_durable(0..1).await, [true]);
    let pack = store.packs().await.remove(0);
    let mut bytes = store.read(&pack).await;
    bytes[4000] ^= 1;
    store.write(&pack, bytes).await;
    assert_eq!(tier.put_durable(0..1).await, [true]);
    assert_eq!(store.packs().await.len(), 2, "written again, under another name");
    assert_eq!(tier.put_durable(0..1).await, [true]);
    assert_eq!(store.packs().await.len(), 2, "that is proven");
}

/// Blocks that were written again because their pack had grown old are in two packs. The newer one went, and the older came back.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_is_deleted_from_older_copies_too() {
    let store = FakeStore::default();
    let tier = tiers(&store, 1).await;
    assert_eq!(tier.put_durable(0..6).await, [true; 6]);
    let old = store.packs().await;
    old.iter().for_each(|pack| store.make_older(pack, 2 * 3600 * 1000));
    assert_eq!(tier.put_durable(0..6).await, [true; 6]);
    assert!(store.packs().await.len() > old.len());
    tier.object.delete(&tier.layout, 0, &tier.hashes(4..6)).await.unwrap();
    let other = tiers(&store, 2).await;
    assert_eq!(other.find(0..6).await, [true, true, true, true, false, false]);
}

/// A block is deleted while its pack is on the way. The answer came at once, and whoever was killed then left the block behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_is_answered_once_nothing_can_bring_the_blocks_back() {
    let store = FakeStore::default();
    let tier = Arc::new(tiers(&store, 1).await);
    let (held, is_held) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let (holds, came) = (Arc::clone(&held), Arc::clone(&is_held));
    store.before_each(move |request, location| {
        let (holds, came) = (Arc::clone(&holds), Arc::clone(&came));
        let is_pack = request == Request::Put && location.as_ref().contains("/ns=");
        async move {
            while is_pack && holds.load(Ordering::Acquire) {
                came.store(true, Ordering::Release);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        .boxed()
    });
    let told = tier.offer(0, None, true).unwrap();
    tier.object.flush();
    while !is_held.load(Ordering::Acquire) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let deleting = tokio::spawn({
        let tier = Arc::clone(&tier);
        async move { tier.object.delete(&tier.layout, 0, &tier.hashes(0..1)).await.unwrap() }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!deleting.is_finished(), "its upload has not ended");
    held.store(false, Ordering::Release);
    deleting.await.unwrap();
    assert!(store.packs().await.is_empty(), "gone as soon as it is answered");
    assert!(told.await.is_ok());
}

/// A store that does not answer may have the blocks: nobody can say that they are deleted.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_cannot_be_looked_for_is_an_error() {
    let store = FakeStore::default();
    let first = tiers(&store, 1).await;
    assert_eq!(first.put_durable(0..1).await, [true]);
    let options = ObjectTierOptions { seed: 2, stall: Duration::from_millis(100), ..ObjectTierOptions::default() };
    let second = ObjectTiers::open(&store, &options).await;
    store.before_each(|_, _| futures::future::pending().boxed());
    assert!(second.object.delete(&second.layout, 0, &second.hashes(0..1)).await.is_err());
    store.before_none();
    assert_eq!(store.packs().await.len(), 1);
}

/// A search ends after so many listings. A deletion of a longer chain was answered with the rest of its blocks still there.
#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_any_length_is_deleted_to_its_end() {
    let blocks = OBJECT_LISTINGS_PER_SEARCH_MAX as u64 + 20;
    let store = FakeStore::default();
    let first = tiers(&store, 1).await;
    for id in 0..blocks {
        let told = first.offer(id, id.checked_sub(1), true).unwrap();
        first.object.flush();
        assert_eq!(told.await, Ok(true));
    }
    assert_eq!(store.packs().await.len() as u64, blocks, "each in a pack of its own");
    let second = tiers(&store, 2).await;
    second.object.delete(&second.layout, 0, &second.hashes(0..blocks)).await.unwrap();
    assert_eq!(store.packs().await.len(), 0, "answered, and still there");
}

/// Some blocks in the middle were deleted, so that the rest of their pack is in one that begins where no pack begins otherwise. Another
/// node deletes all, and found nothing behind the gap.
#[tokio::test(flavor = "multi_thread")]
async fn what_lies_behind_a_gap_is_deleted_too() {
    let store = FakeStore::default();
    let first = tiers(&store, 1).await;
    assert_eq!(first.put_durable(0..10).await, [true; 10]);
    first.object.delete(&first.layout, 0, &first.hashes(4..6)).await.unwrap();
    assert!(store.packs().await.len() >= 2);
    let second = tiers(&store, 2).await;
    second.object.delete(&second.layout, 0, &second.hashes(0..10)).await.unwrap();
    assert_eq!(store.packs().await.len(), 0, "answered, and still there");
}

/// Listings of deletions were bounded for each call, and not for all of them.
#[tokio::test(flavor = "multi_thread")]
async fn deletions_share_a_bound_on_their_listings() {
    let store = FakeStore::default();
    let tier = tiers(&store, 1).await;
    let (under_way, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (now, peak) = (Arc::clone(&under_way), Arc::clone(&most));
    store.before_each(move |request, _| {
        let (now, peak) = (Arc::clone(&now), Arc::clone(&peak));
        async move {
            if request == Request::List {
                peak.fetch_max(now.fetch_add(1, Ordering::AcqRel) + 1, Ordering::AcqRel);
                tokio::time::sleep(Duration::from_millis(20)).await;
                now.fetch_sub(1, Ordering::AcqRel);
            }
        }
        .boxed()
    });
    let chains: Vec<_> = (0..4).map(|at| tier.hashes(at * 1000..at * 1000 + 300)).collect();
    let deleted = chains.iter().map(|chain| tier.object.delete(&tier.layout, 0, chain));
    assert!(futures::future::join_all(deleted).await.iter().all(Result::is_ok));
    let most = most.load(Ordering::Acquire);
    assert!((OBJECT_SEARCHES_EVERYWHERE_MAX / 2..=OBJECT_SEARCHES_EVERYWHERE_MAX).contains(&most), "{most} at once");
}

/// Where a deletion found one pack, it listed all blocks again, though where nothing was, nothing is.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_lists_a_block_again_only_where_something_was() {
    let store = FakeStore::default();
    let first = tiers(&store, 1).await;
    assert_eq!(first.put_durable(0..6).await, [true; 6]);
    let second = tiers(&store, 2).await;
    let before = store.requests(Request::List);
    second.object.delete(&second.layout, 0, &second.hashes(0..400)).await.unwrap();
    assert_eq!(store.packs().await.len(), 0, "answered, and still there");
    let listings = store.requests(Request::List) - before;
    assert!((395..450).contains(&listings), "{listings} listings for 400 blocks");
}

/// A pack that comes damaged is read again, and what came before is in memory beside it until then. Only one of the two was counted.
#[tokio::test(flavor = "multi_thread")]
async fn packs_are_written_again_within_twice_their_bytes() {
    let store = FakeStore::default();
    let options = ObjectTierOptions { block_bytes: 3 << 20, ..ObjectTierOptions::default() };
    let tier = ObjectTiers::open(&store, &options).await;
    // Chains of two blocks that are in one pack.
    let mut firsts = Vec::new();
    let mut packs = Vec::new();
    for first in (0..).step_by(2) {
        let before = store.packs().await;
        assert_eq!(tier.put_durable(first..first + 2).await, [true; 2]);
        let mut new = store.packs().await;
        new.retain(|pack| !before.contains(pack));
        if let [pack] = &new[..] {
            firsts.push(first);
            packs.push(pack.clone());
        }
        if packs.len() == 8 {
            break;
        }
    }
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let peak = Arc::clone(&most);
    store.before_each(move |request, location| {
        let is_pack = request == Request::Get && packs.contains(location);
        let (now, peak) = (Arc::clone(&now), Arc::clone(&peak));
        async move {
            if is_pack {
                peak.fetch_max(now.fetch_add(1, Ordering::AcqRel) + 1, Ordering::AcqRel);
                tokio::time::sleep(Duration::from_millis(50)).await;
                now.fetch_sub(1, Ordering::AcqRel);
            }
        }
        .boxed()
    });
    let chains: Vec<_> = firsts.iter().map(|first| tier.hashes(*first..first + 1)).collect();
    let deleted = chains.iter().map(|chain| tier.object.delete(&tier.layout, 0, chain));
    assert!(futures::future::join_all(deleted).await.iter().all(Result::is_ok));
    let bytes = most.load(Ordering::Acquire) as u64 * 2 * 2 * u64::from(options.block_bytes);
    assert!((1..=OBJECT_REWRITTEN_BYTES_MAX).contains(&bytes), "{bytes} bytes at once");
}
