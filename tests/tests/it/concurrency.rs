//! Many at once: the same keys, a tier far too small, sizes that change under load, writers that stall.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvstore::replay::{self, Drive};
use kvstore::trace::TraceRequest;
use kvstore_client::GetOutcome;
use kvstore_client::v1::{BlockKind, PutStatus};
use kvstore_plane::SequenceHash;
use kvstore_tests::{BLOCK_BYTES, TestDaemon, chain, hashes};
use kvstore_tiers::BootTime;
use kvstore_tiers::host::{BeginFill, BlockFill, FillRequest, NamespaceId};
use kvstore_tiers::slots::{FlightSource, Priority, Urgency};

/// Conversations that come back, as a trace.
fn conversations(sessions: u64, turns: u64) -> Vec<TraceRequest> {
    let mut requests = Vec::new();
    for turn in 1..=turns {
        for session in 0..sessions {
            let own = (0..turn * 4).map(|block| (session + 1) << 32 | block);
            requests.push(TraceRequest { timestamp_ms: 0, blocks: [0, 1].into_iter().chain(own).collect() });
        }
    }
    requests
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_far_too_small_gives_no_wrong_byte() {
    let daemon = TestDaemon::start(&["host.bytes=4MiB"]).await;
    let client = daemon.client().await;
    let options = Drive { block_bytes: 20_000, speed: None, verify: true };
    let report = replay::drive(&client, &conversations(40, 6), options, |_| {}).await.unwrap();
    assert_eq!(report.wrong_bytes, 0);
    assert!(report.verified && report.evicted_blocks > 1000, "{report:?}");
    assert!(report.hits.host > 200, "the prefix that all share was kept: {report:?}");
    assert!(daemon.mapped() <= 4 << 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn puts_and_gets_of_the_same_keys_agree() {
    let daemon = TestDaemon::start(&["host.bytes=8MiB"]).await;
    let stored = Arc::new(AtomicU64::new(0));
    let hits = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for task in 0..8u64 {
        let (client, group) = daemon.group(30_000).await;
        let (stored, hits) = (Arc::clone(&stored), Arc::clone(&hits));
        tasks.push(tokio::spawn(async move {
            for round in 0..60u64 {
                let from = (round * 7 + task * 3) % 400;
                let results = client.put(&group, chain(from..from + 12, 30_000)).await.unwrap();
                stored.fetch_add(
                    results.iter().filter(|r| r.status() == PutStatus::Stored).count() as u64,
                    Ordering::Relaxed,
                );
                if round % 9 == task {
                    client.delete(&group, &hashes(from..from + 3)).await.unwrap();
                }
                let outcomes = client.get(&group, &hashes(from..from + 12)).await.unwrap();
                for (id, outcome) in (from..).zip(&outcomes) {
                    if let GetOutcome::Hit(bytes) = outcome {
                        assert_eq!(replay::wrong_bytes(id, bytes), 0, "block {id}");
                        hits.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert!(stored.load(Ordering::Relaxed) > 400 && hits.load(Ordering::Relaxed) > 400);
    let status = daemon.running.daemon.host.status();
    assert_eq!(status.flights, 0);
    assert!(status.bytes_mapped <= 8 << 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sizes_change_under_load() {
    let daemon = TestDaemon::start(&["host.bytes=32MiB"]).await;
    let client = daemon.client().await;
    let (driver, trace) = (client.clone(), conversations(60, 5));
    let changes = Arc::new(AtomicU64::new(0));
    let changed = Arc::clone(&changes);
    let load = tokio::spawn(async move {
        let mut wrong_bytes = 0;
        // Again, where it was over before the sizes changed.
        while wrong_bytes == 0 && changed.load(Ordering::Acquire) <= 5 {
            let options = Drive { block_bytes: 30_000, speed: None, verify: true };
            wrong_bytes += replay::drive(&driver, &trace, options, |_| {}).await.unwrap().wrong_bytes;
        }
        wrong_bytes
    });
    let sizes = ["8MiB", "48MiB", "4MiB", "32MiB", "12MiB"];
    let mut at = 0;
    while !load.is_finished() {
        let settings = [
            ("host.bytes", sizes[at % sizes.len()]),
            ("host.high_watermark_percent", ["99", "90"][at % 2]),
            ("host.low_watermark_percent", ["98", "60"][at % 2]),
        ];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        client.set_config(settings).await.unwrap();
        at += 1;
        changes.store(at as u64, Ordering::Release);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert_eq!(load.await.unwrap(), 0);
    client.set_config([("host.bytes".to_owned(), "4MiB".to_owned())].into()).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while daemon.mapped() > 4 << 20 {
        assert!(Instant::now() < deadline, "{} bytes are still mapped", daemon.mapped());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Traffic moves from one model to another: so does the memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slabs_follow_demand_between_layouts() {
    let daemon = TestDaemon::start(&["host.bytes=32MiB"]).await;
    let (client, small) = daemon.group(16 << 10).await;
    let (_, large) = daemon.group(200 << 10).await;
    for at in 0..60 {
        client.put(&small, chain(at * 40..at * 40 + 40, 16 << 10)).await.unwrap();
    }
    let slabs = |slot: u64| {
        let status = daemon.running.daemon.host.status();
        assert!(status.bytes_mapped <= 32 << 20, "{status:?}");
        status.pools.iter().find(|pool| pool.slot_bytes == slot).map_or(0, |pool| pool.slabs)
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    // Slabs are made in the background: the last may be a moment late.
    let come = async |slot: u64, count: u64| {
        while slabs(slot) < count {
            assert!(Instant::now() < deadline, "slots of {slot} bytes have {} slabs, not {count}", slabs(slot));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    come(16 << 10, 8).await;
    assert_eq!((slabs(16 << 10), slabs(200 << 10)), (8, 0), "the first layout has all memory");
    let mut from = 100_000;
    let moved = || daemon.running.daemon.host.status().slabs_moved;
    while moved() < 4 {
        assert!(Instant::now() < deadline, "the layout in use got {} slabs", slabs(200 << 10));
        let results = client.put(&large, chain(from..from + 10, 200 << 10)).await.unwrap();
        assert!(results.iter().all(|r| r.status() == PutStatus::Stored));
        assert_eq!(client.readable_blocks(&large, &hashes(from..from + 10)).await.unwrap(), 10);
        from += 10;
    }
    come(200 << 10, 4).await;
    // One may be on its way from the one to the other still.
    while slabs(16 << 10) + moved() != 8 {
        assert!(Instant::now() < deadline, "a slab went that nobody asked for");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(slabs(16 << 10) > 0, "a layout keeps something while others are not in need of it");
}

/// While a slab was being made its bytes counted twice for a moment. Background work that looked just then
/// took the tier for too large, and withdrew a slab in use with all its blocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn background_work_evicts_nothing_while_a_slab_is_made() {
    for round in 0..10 {
        let daemon = TestDaemon::start(&["host.bytes=32MiB", "host.ready_bytes=off"]).await;
        let host = Arc::clone(&daemon.running.daemon.host);
        let filled_up = Arc::new(AtomicU64::new(0));
        let stop = Arc::clone(&filled_up);
        let ticks = std::thread::spawn(move || {
            while stop.load(Ordering::Acquire) == 0 {
                host.tick(BootTime(0));
            }
        });
        let content = replay::content(1, BLOCK_BYTES as usize);
        // Slots have 8 KiB: 3,600 blocks need seven of the eight slabs and a part of the last.
        for id in 0..3600 {
            let mut fill = filled(begin(&daemon, id, 0));
            fill.append(&content, BootTime(0)).unwrap();
            fill.commit(false);
        }
        filled_up.store(1, Ordering::Release);
        ticks.join().unwrap();
        let status = daemon.running.daemon.host.status();
        assert_eq!((status.counts.evicted, status.blocks), (0, 3600), "round {round}: {status:?}");
    }
}

fn begin(daemon: &TestDaemon, id: u64, now: u64) -> BeginFill {
    let host = &daemon.running.daemon.host;
    let layout = kvstore_tests::memory::layout("stall", BLOCK_BYTES, 1);
    let layout = host.register_layout(NamespaceId(0), layout).unwrap();
    let hash = SequenceHash::new(&replay::sequence_hash(id)).unwrap();
    let request = FillRequest {
        layout: &layout,
        group: 0,
        hash,
        parent: None,
        length: BLOCK_BYTES,
        urgency: Urgency { source: FlightSource::Writer, priority: Priority::Demand, deadline: BootTime(u64::MAX) },
    };
    loop {
        match host.begin_fill(&request, BootTime(now)) {
            BeginFill::NeedsSlab(plan) => host.make_slab(plan).unwrap(),
            // Memory is being made ready.
            BeginFill::Wait => std::thread::yield_now(),
            BeginFill::Fill(fill, Some(plan)) => {
                host.drop_plan(plan);
                return BeginFill::Fill(fill, None);
            }
            other => return other,
        }
    }
}

fn filled(fill: BeginFill) -> BlockFill {
    let BeginFill::Fill(fill, _) = fill else { panic!("no slot") };
    fill
}

/// A writer that stalls is replaced after a second. Should it wake up, its bytes go nowhere: neither over
/// the block that replaced its own, nor into a slot that somebody else has.
#[tokio::test]
async fn a_stalled_writer_is_taken_over_and_its_late_bytes_go_nowhere() {
    let daemon = TestDaemon::start(&[]).await;
    let content = replay::content(1, BLOCK_BYTES as usize);
    let mut stalled = filled(begin(&daemon, 1, 10_000));
    stalled.append(&content[..100], BootTime(10_000)).unwrap();
    assert!(matches!(begin(&daemon, 1, 10_900), BeginFill::InFlight));
    let mut second = filled(begin(&daemon, 1, 11_001));
    second.append(&content, BootTime(11_001)).unwrap();
    stalled.append(&[0xEE; 200], BootTime(11_002)).unwrap();
    assert_eq!(second.commit(false), kvstore_tiers::slots::Publish::Published);
    stalled.append(&vec![0xEE; BLOCK_BYTES as usize - 300], BootTime(11_003)).unwrap();
    assert_eq!(stalled.commit(false), kvstore_tiers::slots::Publish::Superseded);
    let client = daemon.client().await;
    let layout = replay::layout("stall", BLOCK_BYTES, BlockKind::Attention);
    let group = client.register_layout(layout).await.unwrap().group(0);
    let outcomes = client.get(&group, &hashes([1])).await.unwrap();
    assert_eq!(outcomes[0].bytes().unwrap(), &content);
    assert_eq!(daemon.running.daemon.host.status().counts.taken_over, 1);
}

/// A slow writer that brings a little now and then has not stalled.
#[tokio::test]
async fn a_slow_writer_is_not_taken_over() {
    let daemon = TestDaemon::start(&[]).await;
    let mut slow = filled(begin(&daemon, 1, 10_000));
    for at in 1..=20u64 {
        slow.append(&[1; 10], BootTime(10_000 + at * 600)).unwrap();
        assert!(matches!(begin(&daemon, 1, 10_000 + at * 600 + 590), BeginFill::InFlight), "taken over at {at}");
    }
    drop(slow);
    assert!(matches!(begin(&daemon, 1, 30_000), BeginFill::Fill(..)), "a writer that left keeps nobody out");
}

/// A second writer of a block waits for the first and answers that it joined.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_writer_joins_the_first() {
    let daemon = TestDaemon::start(&[]).await;
    let client = daemon.client().await;
    let layout = replay::layout("stall", BLOCK_BYTES, BlockKind::Attention);
    let group = client.register_layout(layout).await.unwrap().group(0);
    // On a busy machine the second may come when the first has ended, or when it counts as having stalled: another block, then.
    for id in 1..=20 {
        let mut first = filled(begin(&daemon, id, kvstore_now()));
        let second = {
            let (client, group) = (client.clone(), group.clone());
            tokio::spawn(async move { client.put(&group, chain(id..id + 1, BLOCK_BYTES)).await.unwrap() })
        };
        tokio::time::sleep(Duration::from_millis(100)).await;
        let meanwhile = client.get(&group, &hashes([id])).await.unwrap();
        first.append(&replay::content(id, BLOCK_BYTES as usize), BootTime(kvstore_now())).unwrap();
        first.commit(true);
        let status = second.await.unwrap()[0].status();
        assert!(client.get(&group, &hashes([id])).await.unwrap()[0].bytes().is_some());
        if status == PutStatus::Joined {
            assert_eq!(meanwhile, [GetOutcome::InFlight]);
            return;
        }
        assert!(matches!(status, PutStatus::Present | PutStatus::Stored), "{status:?}");
    }
    panic!("no second writer ever joined the first");
}

fn kvstore_now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}
