//! Namespaces side by side: what each may have of the disks, who gives way when there is not enough, and what leaves unused.

use std::time::{Duration, Instant};

use kvstore_client::v1::{Level, StatusResponse};
use kvstore_client::{Client, GroupRef, PutOptions};
use kvstore_tests::tier::{Got, TierOptions, Tiers, hash, now};
use kvstore_tests::{chain, hashes, two_namespaces, until};
use kvstore_tiers::below::Ask;
use kvstore_tiers::host::{NamespaceLimits, namespace_digest};
use kvstore_tiers::nvme::{NvmeNamespace, NvmeTier};
use kvstore_tiers::slots::Presence;

const BLOCK: u32 = 64 << 10;
const MIB: u64 = 1 << 20;

async fn put(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>, level: Level) {
    for at in ids.step_by(20) {
        let options = PutOptions { level, ..PutOptions::default() };
        let results = client.put_with(group, chain(at..at + 20, BLOCK), options).await.unwrap();
        if level == Level::Local {
            assert!(results.iter().all(|result| result.level() == Level::Local), "{results:?}");
        }
    }
}

fn on_disk(status: &StatusResponse, namespace: &str) -> u64 {
    let namespaces = status.nvme.iter().flat_map(|nvme| &nvme.namespaces);
    namespaces.filter(|of| of.namespace == namespace).map(|of| of.bytes).sum()
}

/// A namespace with a bound drops its own oldest blocks, and no other's; what was put last is there, LOCAL. The bound outlives a
/// restart, since the disk knows whose a block is, and is lowered while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_has_no_more_of_the_disk_than_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let policy = "[[namespace]]\nname = \"a\"\nnvme_bytes = \"8MiB\"\n";
    let disk = format!("nvme.paths={}", folder.path().join("disk").display());
    let settings = [disk.as_str(), "host.bytes=16MiB", "nvme.bytes=256MiB"];
    let (running, [a, b], [group_a, group_b]) = two_namespaces(folder.path(), &settings, policy, BLOCK).await;
    put(&b, &group_b, 0..200, Level::Local).await;
    put(&a, &group_a, 0..600, Level::Local).await;
    let status = until(&a, |status| on_disk(status, "a") <= 8 * MIB).await;
    assert!(on_disk(&status, "a") > 6 * MIB, "{status:?}");
    assert!(on_disk(&status, "b") >= 200 * u64::from(BLOCK), "{status:?}");
    running.shut_down().await;

    let (running, [a, b], [group_a, group_b]) = two_namespaces(folder.path(), &settings, policy, BLOCK).await;
    let status = a.status().await.unwrap();
    assert!((6 * MIB..=8 * MIB).contains(&on_disk(&status, "a")), "{status:?}");
    assert_eq!(a.contains(&group_a, &hashes(520..600)).await.unwrap(), [true; 80], "the newest are there");
    assert_eq!(a.contains(&group_a, &hashes(0..400)).await.unwrap(), [false; 400], "the oldest went");
    assert_eq!(b.contains(&group_b, &hashes(0..200)).await.unwrap(), [true; 200]);
    let file = folder.path().join("kvstore.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("8MiB", "2MiB")).unwrap();
    let changes = a.reload_config().await.unwrap();
    assert!(changes.len() == 1 && changes[0].contains("nvme_bytes 2.0 MiB"), "{changes:?}");
    until(&a, |status| on_disk(status, "a") <= 2 * MIB).await;
    put(&a, &group_a, 1000..1100, Level::Local).await;
    until(&a, |status| on_disk(status, "a") <= 2 * MIB).await;
    assert_eq!(b.contains(&group_b, &hashes(0..200)).await.unwrap(), [true; 200]);
    running.shut_down().await;
}

/// A pin is a promise, which a bound does not break.
#[tokio::test(flavor = "multi_thread")]
async fn pinned_blocks_are_kept_though_their_namespace_is_at_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let policy = "[[namespace]]\nname = \"a\"\nnvme_bytes = \"8MiB\"\n";
    let disk = format!("nvme.paths={}", folder.path().join("disk").display());
    let settings = [disk.as_str(), "host.bytes=16MiB", "nvme.bytes=256MiB"];
    let (running, [a, _], [group, _]) = two_namespaces(folder.path(), &settings, policy, BLOCK).await;
    put(&a, &group, 0..40, Level::Local).await;
    let pinned = a.pin(&group, &hashes(0..40), 60_000).await.unwrap();
    assert_eq!(pinned.pinned_blocks, 40);
    put(&a, &group, 1000..1600, Level::Local).await;
    until(&a, |status| on_disk(status, "a") <= 8 * MIB).await;
    assert_eq!(a.contains(&group, &hashes(0..40)).await.unwrap(), [true; 40]);
    running.shut_down().await;
}

/// Without bounds a full disk is shared: one that floods it takes the room of nobody who has less than half.
#[tokio::test(flavor = "multi_thread")]
async fn who_floods_a_disk_gives_way_first() {
    let folder = tempfile::tempdir().unwrap();
    let disk = format!("nvme.paths={}", folder.path().join("disk").display());
    let settings = [disk.as_str(), "host.bytes=16MiB", "nvme.bytes=96MiB"];
    let (running, [a, b], [group_a, group_b]) = two_namespaces(folder.path(), &settings, "", BLOCK).await;
    put(&b, &group_b, 0..200, Level::Local).await;
    for round in 1..=10 {
        put(&a, &group_a, round * 10_000..round * 10_000 + 1000, Level::Memory).await;
    }
    let status = until(&a, |status| status.nvme.as_ref().is_some_and(|nvme| nvme.dirty_bytes == 0)).await;
    let (of_a, of_b) = (on_disk(&status, "a"), on_disk(&status, "b"));
    assert!(of_b >= 180 * u64::from(BLOCK), "{of_b} of b, {of_a} of a");
    assert!(of_a > 40 * MIB, "{of_a}");
    running.shut_down().await;
}

/// The same in memory, while somebody asks for what is there.
#[tokio::test(flavor = "multi_thread")]
async fn who_floods_the_memory_gives_way_first() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["host.bytes=64MiB", "nvme.paths=off"];
    let (running, [a, b], [group_a, group_b]) = two_namespaces(folder.path(), &settings, "", BLOCK).await;
    put(&b, &group_b, 0..300, Level::Memory).await;
    for round in 1..=4 {
        put(&a, &group_a, round * 10_000..round * 10_000 + 1000, Level::Memory).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    assert_eq!(b.readable_blocks(&group_b, &hashes(0..300)).await.unwrap(), 300);
    // One that has more than its share gives it up to one that has less.
    for at in (1000..1180).step_by(20) {
        put(&b, &group_b, at..at + 20, Level::Memory).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    let there = [0..300, 1000..1180].map(hashes);
    let mut held = 0;
    for names in there {
        held += b.contains(&group_b, &names).await.unwrap().iter().filter(|there| **there).count();
    }
    assert!(held >= 420, "{held} blocks of 480, which are less than half of the memory");
    running.shut_down().await;
}

fn with_ttl(seconds: u64) -> (NamespaceLimits, NvmeNamespace) {
    let ttl_ms = Some(seconds * 1000);
    let host = NamespaceLimits { ttl_ms, ..NamespaceLimits::default() };
    (host, NvmeNamespace { digest: namespace_digest("default"), bytes: None, ttl_ms })
}

fn in_memory(tiers: &Tiers, ids: std::ops::Range<u64>) -> usize {
    let names: Vec<_> = ids.map(hash).collect();
    tiers.host.presence(&tiers.layout, 0, &names).iter().filter(|presence| **presence == Presence::Resident).count()
}

fn on_the_disk(tiers: &Tiers, ids: std::ops::Range<u64>) -> usize {
    let names: Vec<_> = ids.map(hash).collect();
    tiers.nvme.presence(&tiers.layout, 0, &names).iter().filter(|there| **there).count()
}

fn swept(nvme: &std::sync::Arc<NvmeTier>, at: kvstore_tiers::BootTime, gone: impl Fn() -> bool) {
    let begun = Instant::now();
    while !gone() {
        // An earlier sweep may be under way still.
        nvme.tick(at);
        assert!(begun.elapsed() < Duration::from_secs(60), "unused blocks are not swept");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What nobody asks for within the ttl leaves memory and disk; what somebody asks for stays, and so does its whole prefix, though
/// only its end is read.
#[test]
fn unused_blocks_leave_and_used_ones_keep_their_prefix() {
    let folder = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(folder.path(), &TierOptions::default()).unwrap();
    let (host, nvme) = with_ttl(60);
    tiers.host.set_namespace_limits(std::iter::once(host));
    tiers.nvme.set_namespaces(vec![nvme]);
    let begun = now();
    tiers.host.tick(begun);
    tiers.nvme.tick(begun);
    assert!(tiers.put_chain(0..10) && tiers.put_chain(100..110));
    let at = |seconds: u64| begun.plus_ms(seconds * 1000);
    tiers.host.tick(at(50));
    tiers.nvme.tick(at(50));
    assert!(matches!(tiers.get(9), Got::Memory(_)), "the last block of the first chain is read");
    tiers.ask(&[hash(9)], Ask::Want(at(50)));
    tiers.host.tick(at(90));
    assert_eq!((in_memory(&tiers, 0..10), in_memory(&tiers, 100..110)), (10, 0));
    swept(&tiers.nvme, at(90), || on_the_disk(&tiers, 100..110) == 0);
    assert_eq!(on_the_disk(&tiers, 0..10), 10);
    // And then nobody reads it any more.
    tiers.host.tick(at(200));
    assert_eq!(in_memory(&tiers, 0..10), 0);
    swept(&tiers.nvme, at(200), || on_the_disk(&tiers, 0..10) == 0);
    tiers.close();
    // It does not come back, with the index or without.
    let tiers = Tiers::open(folder.path(), &TierOptions::default()).unwrap();
    assert_eq!(on_the_disk(&tiers, 0..110), 0);
    tiers.close();
}

/// Without a ttl, or with one set later, nothing leaves that was used since then.
#[test]
fn a_ttl_counts_from_when_it_is_set() {
    let folder = tempfile::tempdir().unwrap();
    let tiers = Tiers::open(folder.path(), &TierOptions::default()).unwrap();
    let begun = now();
    assert!(tiers.put_chain(0..10));
    tiers.host.tick(begun.plus_ms(1_000_000));
    assert_eq!(in_memory(&tiers, 0..10), 10);
    tiers.host.set_namespace_limits(std::iter::once(with_ttl(60).0));
    tiers.host.tick(begun.plus_ms(1_010_000));
    assert_eq!(in_memory(&tiers, 0..10), 10, "used as far as is known when it was set");
    tiers.host.tick(begun.plus_ms(1_200_000));
    assert_eq!(in_memory(&tiers, 0..10), 0);
    tiers.close();
}
