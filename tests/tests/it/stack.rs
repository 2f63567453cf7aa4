//! The stack of tiers: what it does when a tier below memory fails, is full, or is asked for much at once.

use std::sync::Arc;
use std::time::Duration;

use kvstore_client::v1::Level;
use kvstore_client::{Client, GroupRef, PutOptions};
use kvstore_tests::faulty_tier::{FaultyTier, ReadFault};
use kvstore_tests::memory::Memory;
use kvstore_tests::tier::{hash, now};
use kvstore_tests::{TestDaemon, chain, hashes, until};
use kvstore_tiers::below::{Below, WhyNotRead};
use kvstore_tiers::host::{LeasedBlock, Leasing};
use kvstore_tiers::slots::Priority;
use kvstore_tiers::stack::{
    Admission, AdmissionRules, Asked, Copy, Level as StackLevel, NamespaceRules, Policy, Promotion, Stack, Window, Wish,
};
use kvstore_tiers::{Run, SequenceHash, Tier};
use tokio::time::Instant;

const BLOCK: u32 = 50_000;

/// Memory over two tiers that fail as they are told.
struct Two {
    memory: Memory,
    disk: Arc<FaultyTier>,
    bucket: Arc<FaultyTier>,
    stack: Arc<Stack>,
}

impl Two {
    fn new() -> Self {
        let memory = Memory::new(16 << 20, BLOCK, 1);
        let (disk, bucket) = (FaultyTier::new(&memory.host), FaultyTier::new(&memory.host));
        let below: [(Tier, Arc<dyn Below>); 2] =
            [(Tier::Nvme, Arc::clone(&disk) as _), (Tier::Object, Arc::clone(&bucket) as _)];
        let stack = Stack::new(&memory.host, below, now);
        Self { memory, disk, bucket, stack }
    }

    /// Blocks that both tiers have, and memory has not.
    fn below(&self, ids: std::ops::Range<u64>) {
        for id in ids.clone() {
            let (leased, sums) = self.memory.put(id, None).unwrap();
            let copy = Copy { block: self.memory.block(id), parent: None, sums, leased: Some(leased) };
            self.stack.stored(copy, &self.wish(StackLevel::Durable));
        }
        self.memory.forget(ids);
    }

    /// Blocks from `first` on, in memory and below, until memory takes no more: all of it is leased.
    fn fill(&self, first: u64) -> Vec<LeasedBlock> {
        let put = |id| {
            let (leased, sums) = self.memory.put(id, None)?;
            let copy = Copy { block: self.memory.block(id), parent: None, sums, leased: None };
            self.stack.stored(copy, &self.wish(StackLevel::Durable));
            Some(leased)
        };
        (first..).map_while(put).collect()
    }

    fn wish(&self, level: StackLevel) -> Wish {
        Wish { namespace: self.memory.layout.namespace, level, upload: false }
    }

    fn promotion(&self, within: Duration) -> Promotion {
        let (stack, layout) = (Arc::clone(&self.stack), Arc::clone(&self.memory.layout));
        Promotion { stack, layout, group: 0, priority: Priority::Demand, deadline: Instant::now() + within }
    }

    async fn bring(&self, id: u64) -> bool {
        match self.promotion(Duration::from_secs(60)).bring(hash(id)).await {
            Leasing::Leased(block) => {
                self.memory.check(id, &block);
                true
            }
            Leasing::Miss => false,
            Leasing::InFlight => panic!("block {id} neither came nor missed"),
        }
    }

    fn is_at_rest(&self) {
        assert_eq!(self.memory.host.status().flights, 0, "a slot is lost");
    }
}

/// A frame that was damaged on disk had the copy in the bucket started and not awaited: the call was told IN_FLIGHT, or nothing by
/// its deadline, though a good copy was there.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_tier_is_tried_and_awaited() {
    let two = Two::new();
    two.below(0..40);
    for (id, why) in (0..).zip([WhyNotRead::Damaged, WhyNotRead::Failed, WhyNotRead::Absent, WhyNotRead::Busy]) {
        two.disk.fail([ReadFault::Told(why)]);
        assert!(two.bring(id).await, "{why:?} on disk; the bucket has it");
    }
    // The slot is lost with what failed: another is found.
    two.disk.fail([ReadFault::Lost(WhyNotRead::Failed)]);
    assert!(two.bring(10).await);
    two.disk.fail([ReadFault::Silent]);
    assert!(two.bring(11).await, "a tier that forgets to answer is asked again");
    two.disk.fail([ReadFault::Told(WhyNotRead::Damaged)]);
    two.bucket.fail([ReadFault::Told(WhyNotRead::Damaged)]);
    assert!(!two.bring(12).await, "damaged in both: a miss, and no wrong byte");
    two.is_at_rest();
}

/// A caller that leaves cancels nothing, and leaves no slot behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_costs_no_slot() {
    let two = Two::new();
    two.below(0..20);
    two.disk.stall();
    for id in 0..20 {
        if id % 2 == 0 {
            two.disk.fail([ReadFault::Told(WhyNotRead::Damaged)]);
        }
        let promotion = two.promotion(Duration::from_secs(60));
        let bringing = promotion.bring(hash(id));
        let left = tokio::time::timeout(Duration::from_millis(1), bringing).await;
        assert!(left.is_err(), "block {id} came though the disk holds it");
    }
    assert_eq!(two.memory.host.status().flights, 20, "nobody waits, and all of them are on their way");
    two.disk.let_go();
    two.is_at_rest();
    for id in 0..20 {
        assert!(two.bring(id).await, "block {id} is in memory, or in the bucket");
    }
    two.is_at_rest();
}

/// While a deletion waits for a tier, memory still has the block, and others may have it copied below again: a request that reads
/// it, or its leaving memory. The answer was OK, and the block came back. Each tier is looked at again once memory has it no more.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_copied_below_during_a_deletion_does_not_come_back() {
    for again in [Tier::Nvme, Tier::Object] {
        let two = Two::new();
        let (leased, sums) = two.memory.put(1, None).unwrap();
        let copy = || Copy { block: two.memory.block(1), parent: None, sums: sums.clone(), leased: None };
        two.stack.stored(copy(), &two.wish(StackLevel::Durable));
        drop(leased);
        let waits = if again == Tier::Nvme { &two.bucket } else { &two.disk };
        let (stack, wish, meanwhile) = (Arc::clone(&two.stack), two.wish(StackLevel::Durable), copy());
        waits.at_delete(move || _ = stack.stored(meanwhile, &wish));
        let run = Run { layout: &two.memory.layout, group: 0, hashes: &[hash(1)] };
        let deleted = two.stack.delete(&run).await.unwrap();
        assert_eq!((deleted.deleted, deleted.pinned), (1, 0));
        assert!(two.disk.is_empty() && two.bucket.is_empty(), "it is there again");
        assert!(!two.bring(1).await);
        two.is_at_rest();
    }
}

/// A put that is to be on disk waits while the disk is full, and goes on once there is room. What was stored meanwhile stays in
/// memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_tier_is_waited_for_and_costs_no_block() {
    let two = Two::new();
    two.disk.set_full(true);
    let store = |id: u64| {
        let (leased, sums) = two.memory.put(id, None).unwrap();
        let copy = Copy { block: two.memory.block(id), parent: None, sums, leased: Some(leased) };
        two.stack.stored(copy, &two.wish(StackLevel::Local))
    };
    assert!(store(1).local.is_none(), "the disk takes nothing");
    assert!(two.disk.is_empty() && !two.stack.has_room(&two.wish(StackLevel::Local)));
    assert!(two.bring(1).await, "it is in memory");
    let (stack, wish) = (Arc::clone(&two.stack), two.wish(StackLevel::Local));
    let mut waits = tokio::spawn(async move { stack.until_room(&wish).await });
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut waits).await.is_err(), "it does not wait for room");
    two.disk.set_full(false);
    assert!(waits.await.unwrap());
    assert_eq!(store(2).local.unwrap().await, Ok(true));
    assert_eq!(two.disk.len(), 1);
    two.is_at_rest();
}

/// Hints asked the bucket for block by block, each after the one before had come.
#[tokio::test(flavor = "multi_thread")]
async fn a_window_asks_for_many_blocks_at_once_and_yields_them_in_order() {
    let two = Two::new();
    two.below(0..100);
    let promotion = two.promotion(Duration::from_secs(60));
    let asked = (0..100).map(|id| Asked { index: id as usize, hash: hash(id), known: None });
    let policy = Policy { ahead: 32, ends_outranked: true, ends_full: false };
    let mut window = Window::new(&promotion, policy, asked);
    let mut order: Vec<SequenceHash> = Vec::new();
    while let Some((index, name, leasing)) = window.next().await {
        assert_eq!((index, order.len()), (order.len(), index));
        let Leasing::Leased(block) = leasing else { panic!("block {index} did not come") };
        two.memory.check(index as u64, &block);
        order.push(name);
    }
    assert_eq!(order, (0..100).map(hash).collect::<Vec<_>>());
    let batches = two.disk.batches();
    assert!(batches.len() <= 8 && batches[0] == 32, "{batches:?}");
}

/// A call that has leases on all of the memory, and whose next block is on disk alone, would wait for itself until its deadline. The
/// leases are of blocks in the window, or of those that come after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_window_gives_back_the_leases_that_leave_no_room_for_the_block_that_is_next() {
    for ahead in [1, 1000] {
        let two = Two::new();
        two.below(0..1);
        let leased = two.fill(1).into_iter().map(|leased| Some(Leasing::Leased(leased)));
        let asked = (0..).zip(std::iter::once(None).chain(leased));
        let asked = asked.map(|(id, known)| Asked { index: id as usize, hash: hash(id), known });
        let promotion = two.promotion(Duration::from_secs(60));
        let policy = Policy { ahead, ends_outranked: false, ends_full: false };
        let mut window = Window::new(&promotion, policy, asked);
        let mut came = 0;
        while let Some((index, _, leasing)) = window.next().await {
            let Leasing::Leased(block) = leasing else { panic!("block {index} of a window of {ahead} did not come") };
            assert_eq!(index, came, "in their order");
            two.memory.check(index as u64, &block);
            came += 1;
        }
        assert!(came > 200, "the memory was full of them: {came}");
        two.is_at_rest();
    }
}

/// The same with leases that came and that nobody has looked at yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_window_gives_back_what_has_landed_behind_the_block_that_is_next() {
    let two = Two::new();
    two.below(1..20);
    // Block 1 is to be asked for again; those behind it are there.
    two.disk.fail([ReadFault::Told(WhyNotRead::Busy)]);
    let known = std::iter::once(Some(Leasing::Miss)).chain(std::iter::repeat_with(|| None));
    let asked = (0..20).zip(known).map(|(id, known)| Asked { index: id as usize, hash: hash(id), known });
    let promotion = two.promotion(Duration::from_secs(60));
    let policy = Policy { ahead: 32, ends_outranked: false, ends_full: false };
    let mut window = Window::new(&promotion, policy, asked);
    assert!(matches!(window.next().await, Some((0, _, Leasing::Miss))));
    assert_eq!(two.disk.batches(), [19], "all are under way");
    let others = two.fill(100);
    assert!(!others.is_empty() && two.memory.put(99, None).is_none(), "no room is left");
    for id in 1..20 {
        let Some((_, _, Leasing::Leased(block))) = window.next().await else { panic!("block {id} did not come") };
        two.memory.check(id, &block);
    }
    drop(others);
    two.is_at_rest();
}

/// Forty puts of one block that is on disk already spent the day's budget, and kept a new block out. What counted was the
/// layout's largest block, whatever came.
#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_is_there_costs_nothing_of_the_budget() {
    let two = Two::new();
    // An hour's worth is saved: ten blocks.
    let write_budget = Some(u64::from(BLOCK) * 10 * 24);
    let rules = NamespaceRules { nvme: Admission::All, object: Admission::Asked, promote_after: 1 };
    two.stack.set_rules(AdmissionRules { namespaces: vec![rules], reused_after: 2, counts: false, write_budget });
    let store = |id: u64| {
        let put = two.memory.put(id, None);
        let (leased, sums) = put.map_or((None, Vec::new()), |(leased, sums)| (Some(leased), sums));
        let copy = Copy { block: two.memory.block(id), parent: None, sums, leased };
        two.stack.stored(copy, &two.wish(StackLevel::Memory));
    };
    (0..40).for_each(|_| store(1));
    store(2);
    assert_eq!((two.disk.len(), two.stack.not_admitted()), (2, 0), "the new block is on disk, too");
    (3..60).for_each(store);
    assert!((8..=12).contains(&two.disk.len()), "the budget holds: {}", two.disk.len());
    assert!(two.stack.not_admitted() > 40);
    assert!(two.bucket.is_empty());
}

async fn put(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>, level: Level) {
    let options = PutOptions { level, ..PutOptions::default() };
    let results = client.put_with(group, chain(ids, BLOCK), options).await.unwrap();
    assert!(results.iter().all(|result| result.level() == level), "{results:?}");
}

/// The same through a daemon: every frame on its disk is flipped, and the bucket has good copies.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_damaged_on_disk_come_from_the_bucket_in_the_same_call() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let paths = format!("nvme.paths={}", disk.display());
    let url = format!("object.url=file://{}", folder.path().join("bucket").display());
    let settings = [paths.as_str(), "nvme.bytes=64MiB", "host.bytes=16MiB", url.as_str()];
    let serves = |status: &kvstore_client::v1::StatusResponse| {
        status.object.as_ref().is_some_and(|object| object.state == "SERVING")
    };
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, serves).await;
    put(&client, &group, 0..20, Level::Durable).await;
    put(&client, &group, 0..20, Level::Local).await;
    daemon.running.shut_down().await;

    let path = disk.join("blocks");
    let mut bytes = std::fs::read(&path).unwrap();
    // Behind the headers of the volume and of its first segment; the lengths of frames are whole pages.
    bytes[(64 << 10) + 4096..].iter_mut().skip(2000).step_by(4096).for_each(|byte| *byte ^= 1);
    std::fs::write(&path, bytes).unwrap();

    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, serves).await;
    let outcomes = client.get(&group, &hashes(0..20)).await.unwrap();
    for (id, outcome) in (0..).zip(&outcomes) {
        let wrong = outcome.bytes().map(|bytes| kvstore::replay::wrong_bytes(id, bytes));
        assert_eq!(wrong, Some(0), "block {id}: {outcome:?}");
    }
    let corrupt: u64 = client.status().await.unwrap().nvme.unwrap().volumes.iter().map(|v| v.corrupt_blocks).sum();
    assert!(corrupt > 0, "the frames on disk were damaged");
}
