//! Collectors against everything that must not be collected: pins that come while one works, pins without number, clocks that are
//! wrong, and a collector that slept.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use kvstore_tests::object::{FakeStore, ObjectTierOptions, ObjectTiers, Request};
use kvstore_tests::tier::hash;
use kvstore_tiers::BootTime;
use kvstore_tiers::caps::{HOLDS_MAX, OBJECT_COLLECT_BATCH, OBJECT_REFERENCES_MAX};
use kvstore_tiers::object::names::BlockName;
use kvstore_tiers::object::{CollectRules, Collected};
use object_store::path::Path;

const HOUR_MS: i64 = 3600 * 1000;

fn everything() -> CollectRules {
    CollectRules { older_than_ms: Some(0), ..CollectRules::default() }
}

async fn tiers(store: &FakeStore, seed: u64) -> ObjectTiers {
    ObjectTiers::open(store, &ObjectTierOptions { seed, ..ObjectTierOptions::default() }).await
}

async fn collect(tiers: &ObjectTiers) -> Result<Collected, String> {
    tiers.object.collect(&everything(), &mut |_| {}).await.map_err(|error| error.to_string())
}

/// Blocks in packs of their own, two hours old; the packs as the collector lists them, with the block of each.
async fn old_packs(store: &FakeStore, tiers: &ObjectTiers, count: u64) -> Vec<(Path, u64)> {
    let told: Vec<_> = (0..count).map(|id| tiers.offer(id, None, true).unwrap()).collect();
    tiers.object.flush();
    for told in told {
        assert_eq!(told.await, Ok(true));
    }
    let id_of = |pack: &Path| {
        let is_of = |id: &u64| pack.filename() == Some(BlockName::of(&hash(*id)).to_string().as_str());
        (0..count).find(is_of).unwrap()
    };
    let mut packs = store.packs().await;
    packs.sort();
    packs.iter().for_each(|pack| store.make_older(pack, 2 * HOUR_MS));
    packs.into_iter().map(|pack| (pack.clone(), id_of(&pack))).collect()
}

/// Does `once` before the first DELETE of a pack, and holds it up for a moment.
fn at_first_delete(store: &FakeStore, once: impl Fn() + Send + Sync + 'static) {
    let deletes = AtomicU64::new(0);
    store.before_each(move |request, location| {
        let is_pack = request == Request::Delete && location.as_ref().contains("/ns=");
        let is_first = is_pack && deletes.fetch_add(1, Ordering::AcqRel) == 0;
        if is_first {
            once();
        }
        async move {
            if is_first {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        .boxed()
    });
}

/// A collector had read the references when it began; deletions took minutes, and a pin that came meanwhile was acknowledged and
/// lost its blocks. Now a pin of what is about to go is refused, and one of what is not holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_that_is_acknowledged_during_a_collection_keeps_its_blocks() {
    let store = FakeStore::default();
    let collector = tiers(&store, 1).await;
    let packs = old_packs(&store, &collector, OBJECT_COLLECT_BATCH as u64 + 40).await;
    let pinner = Arc::new(tiers(&store, 2).await);
    // The first two are about to go together with the rest of the first batch; the last two are of the second.
    let pinned = [packs[0].clone(), packs[1].clone(), packs[packs.len() - 2].clone(), packs[packs.len() - 1].clone()];
    for (_, id) in &pinned {
        assert_eq!(pinner.find(*id..id + 1).await, [true]);
    }
    let (answers, mut answered) = tokio::sync::mpsc::unbounded_channel();
    let ids = pinned.clone().map(|(_, id)| id);
    at_first_delete(&store, move || {
        for id in ids {
            let (pinner, answers) = (Arc::clone(&pinner), answers.clone());
            tokio::spawn(async move {
                let named = pinner.hashes(id..id + 1);
                let answer = pinner.object.refer(u128::from(id), &pinner.layout, 0, &named, 60_000).await;
                answers.send((id, answer.is_ok())).unwrap();
            });
        }
    });
    let collected = collect(&collector).await.unwrap();
    let mut acknowledged = Vec::new();
    for _ in 0..pinned.len() {
        let (id, is_ok) = answered.recv().await.unwrap();
        acknowledged.extend(is_ok.then_some(id));
    }
    let left = store.packs().await;
    for (pack, id) in &pinned {
        assert!(!acknowledged.contains(id) || left.contains(pack), "the pin of block {id} was acknowledged");
    }
    assert_eq!(acknowledged.len(), 2, "those that were not about to go");
    assert_eq!(collected.referenced.packs, 2);
    assert!(store.names("/doomed/").await.is_empty(), "marks go with their batch");
}

/// Written again under its own name, and acknowledged, after the collector had listed the old object of that name.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_again_since_it_was_listed_stays() {
    let store = FakeStore::default();
    let tier = tiers(&store, 1).await;
    let packs = old_packs(&store, &tier, 40).await;
    let last = packs.last().unwrap().0.clone();
    let again = store.clone();
    let written = last.clone();
    at_first_delete(&store, move || {
        let (again, written) = (again.clone(), written.clone());
        tokio::spawn(async move {
            let bytes = again.read(&written).await;
            again.write(&written, bytes).await;
        });
    });
    collect(&tier).await.unwrap();
    assert_eq!(store.packs().await, [last]);
}

/// References beyond 65,536 were not read, and what they protect was deleted.
#[tokio::test(flavor = "multi_thread")]
async fn pins_without_number_are_heeded_or_nothing_is_deleted() {
    let store = FakeStore::default();
    let tier = tiers(&store, 1).await;
    let packs = old_packs(&store, &tier, 2).await;
    let reference = |at: usize| Path::from(format!("p/v1/refs/{at:032x}"));
    let other = br#"{"version":1,"expires_ms":9000000000000,"folder":"ns=other/00/0","blocks":[]}"#;
    for at in 0..HOLDS_MAX + 10 {
        store.write(&reference(at), other.to_vec()).await;
    }
    // The last in a listing.
    tier.object.refer(u128::MAX, &tier.layout, 0, &tier.hashes(packs[0].1..packs[0].1 + 1), 60_000).await.unwrap();
    let collected = collect(&tier).await.unwrap();
    assert_eq!((collected.deleted.packs, collected.referenced.packs), (1, 1));
    assert_eq!(store.packs().await, [packs[0].0.clone()]);
    for at in HOLDS_MAX + 10..OBJECT_REFERENCES_MAX + 1 {
        store.write(&reference(at), other.to_vec()).await;
    }
    let error = collect(&tier).await.unwrap_err();
    assert!(error.contains("262144 pins"), "{error}");
    assert_eq!(store.packs().await.len(), 1);
}

/// The wall clock of a node was an hour ahead of the store's, since a moment ago: what was acknowledged a second before looked old
/// enough to go. What the node's own clock says has no part in it any more.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_just_acknowledged_stays_whatever_the_clocks_say() {
    let store = FakeStore::default();
    let tier = tiers(&store, 1).await;
    store.set_clock_ahead(-HOUR_MS);
    assert_eq!(tier.put_durable(0..3).await, [true; 3]);
    assert_eq!(collect(&tier).await.unwrap().deleted.packs, 0);
    assert_eq!(tier.put_durable(0..3).await, [true; 3]);
    assert!(!store.packs().await.is_empty());
}

/// And the other way: the node's clock behind the store's. An object of fifty minutes looked as if it were yet to be written, and a
/// DURABLE put rested on it for the ten minutes until a collector took it. A store whose clock was set ahead makes all look old:
/// that is seen, and nothing is collected for an hour.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_object_that_looks_young_is_not_rested_on() {
    let store = FakeStore::default();
    let tier = tiers(&store, 1).await;
    assert_eq!(tier.put_durable(0..1).await, [true]);
    let pack = store.packs().await.remove(0);
    store.make_older(&pack, 50 * 60 * 1000);
    store.set_clock_ahead(HOUR_MS);
    assert_eq!(tier.put_durable(0..1).await, [true]);
    assert_eq!(store.packs().await.len(), 2, "written again");
    let error = collect(&tier).await.unwrap_err();
    assert!(error.contains("set ahead"), "{error}");
}

/// A collector slept through its lease in the middle of a batch (a paused machine: its monotonic clock stood still). By then another
/// may have collected, and what it finds under these names is another's.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_slept_through_its_lease_deletes_nothing_more() {
    static SLEPT_MS: AtomicU64 = AtomicU64::new(0);
    let clock = || BootTime(kvstore_tests::tier::now().0 + SLEPT_MS.load(Ordering::Acquire));
    let store = FakeStore::default();
    let tier = ObjectTiers::open(&store, &ObjectTierOptions { clock, ..ObjectTierOptions::default() }).await;
    let packs = old_packs(&store, &tier, 100).await;
    at_first_delete(&store, || SLEPT_MS.store(HOUR_MS as u64, Ordering::Release));
    let error = collect(&tier).await.unwrap_err();
    assert!(error.contains("lease ended"), "{error}");
    assert!(store.packs().await.len() >= packs.len() - 1, "{} of 100 are left", store.packs().await.len());
}

/// A pack cannot be asked for just now, so it is not deleted. That was taken for a deletion that may still come: the lease was left to
/// its end, and its mark with it, so that pins of the whole batch were refused for minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_cannot_be_asked_for_leaves_nothing_in_doubt() {
    let store = FakeStore::default();
    let options = ObjectTierOptions { stall: Duration::from_millis(50), ..ObjectTierOptions::default() };
    let tier = ObjectTiers::open(&store, &options).await;
    let packs = old_packs(&store, &tier, 3).await;
    let dead = packs[1].0.clone();
    let hang = dead.clone();
    store.before_each(move |request, location| match request == Request::Head && *location == hang {
        true => futures::future::pending().boxed(),
        false => futures::future::ready(()).boxed(),
    });
    let collected = collect(&tier).await.unwrap();
    assert_eq!((collected.deleted.packs, collected.failed.packs), (2, 1), "{collected:?}");
    assert_eq!(store.names("/doomed/").await, [], "the mark");
    store.before_none();
    assert_eq!(collect(&tier).await.unwrap().deleted.packs, 1, "the lease");
    assert_eq!(store.packs().await, []);
}

/// There are many pins, and to read them takes longer than a lease lasts: it is renewed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn the_lease_is_kept_while_pins_are_read() {
    static PASSED_MS: AtomicU64 = AtomicU64::new(0);
    let clock = || BootTime(kvstore_tests::tier::now().0 + PASSED_MS.load(Ordering::Acquire));
    let store = FakeStore::default();
    let tier = ObjectTiers::open(&store, &ObjectTierOptions { clock, ..ObjectTierOptions::default() }).await;
    old_packs(&store, &tier, 1).await;
    // 16 are read at once, which take less than the lease lasts; all together take longer.
    for id in 1..=40u64 {
        let body = format!("{{\"version\":1,\"expires_ms\":{},\"folder\":\"x/y/0\",\"blocks\":[]}}", i64::MAX);
        store.write(&Path::from(format!("p/v1/refs/{id:032x}")), body.into_bytes()).await;
    }
    store.before_each(|request, location| {
        if request == Request::Get && location.as_ref().contains("/refs/") {
            PASSED_MS.fetch_add(10_000, Ordering::AcqRel);
        }
        futures::future::ready(()).boxed()
    });
    assert_eq!(collect(&tier).await.unwrap().deleted.packs, 1);
    assert!(PASSED_MS.load(Ordering::Acquire) >= 400_000, "all were read");
}
