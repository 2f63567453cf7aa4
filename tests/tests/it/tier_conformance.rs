//! What every tier below memory keeps to, whichever it is: a map, disks, a bucket on a local path, over S3, in Azure.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvstore_tests::azure::{self, Azurite};
use kvstore_tests::faulty_tier::FaultyTier;
use kvstore_tests::memory::Memory;
use kvstore_tests::s3::{self, S3Server};
use kvstore_tests::tier::{hash, now};
use kvstore_tiers::below::{Ask, Below, Hold, NotHeld, NotRead, Read, ReadUrgency, WhyNotRead, Write, Written};
use kvstore_tiers::host::{HoldId, HoldKind, Leasing};
use kvstore_tiers::nvme::{NvmeEngine, NvmeOptions, NvmeTier};
use kvstore_tiers::object::{ObjectLimits, ObjectOptions, ObjectTier, ObjectUrl, Verify};
use kvstore_tiers::slots::{Delete, FlightSource, Priority};
use kvstore_tiers::stack::{Promotion, Stack};
use kvstore_tiers::{OwnedRun, Run, SequenceHash, Tier};
use tokio::time::Instant;

const BLOCK: u32 = 100_000;
const WITHIN: Duration = Duration::from_secs(60);

/// One tier over an empty memory.
struct Setup {
    memory: Memory,
    which: Tier,
    tier: Arc<dyn Below>,
}

impl Setup {
    fn promotion(&self) -> Promotion {
        let below = [(self.which, Arc::clone(&self.tier))];
        let stack = Stack::new(&self.memory.host, below, now);
        let layout = Arc::clone(&self.memory.layout);
        Promotion { stack, layout, group: 0, priority: Priority::Demand, deadline: Instant::now() + WITHIN }
    }

    fn there(&self, ids: std::ops::Range<u64>, ask: Ask) -> Vec<bool> {
        let hashes: Vec<SequenceHash> = ids.map(hash).collect();
        self.tier.presence(&Run { layout: &self.memory.layout, group: 0, hashes: &hashes }, ask).there
    }

    /// Puts blocks into memory, each the parent of the next, and has the tier copy them; returns once they are safe there.
    async fn write(&self, ids: std::ops::Range<u64>) {
        let mut waiting = Vec::new();
        for id in ids.clone() {
            let parent = (id > ids.start).then(|| id - 1);
            let (leased, sums) = self.memory.put(id, parent).unwrap();
            let write = Write {
                block: self.memory.block(id),
                parent: parent.map(hash),
                sums,
                leased: Some(leased),
                awaited: true,
                has_waited: true,
            };
            let Written::Coming(Some(safe)) = Arc::clone(&self.tier).write(write) else {
                panic!("block {id} is not taken, or nobody is told when it is safe");
            };
            waiting.push((id, safe));
            assert_eq!(self.there(id..id + 1, Ask::Coming), [true], "block {id} is on its way");
        }
        for (id, safe) in waiting {
            assert_eq!(tokio::time::timeout(WITHIN, safe).await.unwrap(), Ok(true), "block {id}");
        }
        assert_eq!(self.there(ids.clone(), Ask::Look), vec![true; ids.count()]);
    }

    /// Reads blocks with one call; how each ended.
    async fn read(&self, ids: std::ops::Range<u64>) -> Vec<Result<Option<SequenceHash>, WhyNotRead>> {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let mut reads = Vec::new();
        for id in ids.clone() {
            let fill = self.memory.reserve(id, None, FlightSource::Promotion).unwrap();
            let tell = tell.clone();
            let done = move |outcome: Result<kvstore_tiers::below::Arrived, NotRead>| {
                let ended = match outcome {
                    Ok(arrived) => {
                        let parent = arrived.parent;
                        arrived.filled.publish(false);
                        Ok(parent)
                    }
                    Err(not_read) => Err(not_read.why),
                };
                tell.send((id, ended)).unwrap();
            };
            reads.push(Read { block: self.memory.block(id), fill, done: Box::new(done) });
        }
        drop(tell);
        let urgency = ReadUrgency { priority: Priority::Demand, deadline: Instant::now() + WITHIN };
        Arc::clone(&self.tier).read(reads, urgency);
        let mut ended: Vec<Option<_>> = ids.clone().map(|_| None).collect();
        while let Some((id, end)) = tokio::time::timeout(WITHIN, told.recv()).await.unwrap() {
            let before = ended[(id - ids.start) as usize].replace(end);
            assert!(before.is_none(), "block {id} ended twice");
        }
        ended.into_iter().map(|end| end.expect("a read that was told nothing")).collect()
    }
}

/// The suite.
async fn conforms(setup: &Setup) {
    what_is_not_there_is_told_and_its_slot_comes_back(setup).await;
    what_is_written_comes_back_byte_for_byte(setup).await;
    neighbours_read_together_end_once_each(setup).await;
    a_block_that_is_there_is_not_written_again(setup).await;
    another_layouts_block_of_the_same_name_is_not_given(setup).await;
    what_is_deleted_is_gone(setup).await;
    what_is_held_is_not_deleted_until_it_is_released(setup).await;
    assert!(setup.tier.room(false).is_there);
    assert_eq!(setup.memory.host.status().flights, 0, "no slot is lost");
}

async fn what_is_not_there_is_told_and_its_slot_comes_back(setup: &Setup) {
    assert_eq!(setup.there(900..903, Ask::Look), [false; 3]);
    assert_eq!(setup.there(900..903, Ask::Coming), [false; 3]);
    assert_eq!(setup.read(900..903).await, [Err(WhyNotRead::Absent); 3]);
    assert!(setup.memory.put(901, None).is_some(), "its slot and its name are free again");
    assert!(matches!(setup.promotion().bring(hash(902)).await, Leasing::Miss));
}

async fn what_is_written_comes_back_byte_for_byte(setup: &Setup) {
    setup.write(0..3).await;
    setup.memory.forget(0..3);
    for id in 0..3 {
        assert!(!setup.memory.get(id));
        match setup.promotion().bring(hash(id)).await {
            Leasing::Leased(block) => setup.memory.check(id, &block),
            _ => panic!("block {id} does not come back"),
        }
        assert!(setup.memory.get(id), "whoever comes next finds it in memory");
    }
}

async fn neighbours_read_together_end_once_each(setup: &Setup) {
    setup.write(100..130).await;
    setup.memory.forget(100..130);
    let ended = setup.read(98..132).await;
    for (id, ended) in (98..132).zip(ended) {
        let expected = match id {
            100..130 => Ok((id > 100).then(|| hash(id - 1))),
            _ => Err(WhyNotRead::Absent),
        };
        assert_eq!(ended, expected, "block {id}");
        assert_eq!(setup.memory.get(id), expected.is_ok(), "block {id}");
    }
}

async fn a_block_that_is_there_is_not_written_again(setup: &Setup) {
    setup.write(200..201).await;
    setup.write_again(200).await;
    setup.memory.forget([200]);
    assert!(matches!(setup.promotion().bring(hash(200)).await, Leasing::Leased(_)));
}

impl Setup {
    async fn write_again(&self, id: u64) {
        let block = self.memory.block(id);
        let write = Write { block, parent: None, sums: Vec::new(), leased: None, awaited: true, has_waited: true };
        let Written::Coming(Some(safe)) = Arc::clone(&self.tier).write(write) else { panic!("it is safe: it is said") };
        assert_eq!(tokio::time::timeout(WITHIN, safe).await.unwrap(), Ok(true));
    }
}

async fn another_layouts_block_of_the_same_name_is_not_given(setup: &Setup) {
    let other = Memory::register(&setup.memory.host, "another", BLOCK, 1);
    let run = Run { layout: &other, group: 0, hashes: &[hash(0), hash(1)] };
    assert_eq!(setup.tier.presence(&run, Ask::Look).there, [false; 2]);
    let promotion = Promotion { layout: other, ..setup.promotion() };
    assert!(matches!(promotion.bring(hash(0)).await, Leasing::Miss));
}

impl Setup {
    fn run(&self, ids: std::ops::Range<u64>) -> OwnedRun {
        OwnedRun { layout: Arc::clone(&self.memory.layout), group: 0, hashes: ids.map(hash).collect() }
    }

    async fn delete(&self, ids: std::ops::Range<u64>) -> Vec<Delete> {
        let deleted = Arc::clone(&self.tier).delete(self.run(ids));
        tokio::time::timeout(WITHIN, deleted).await.unwrap().unwrap()
    }
}

/// In the midst of blocks that travelled together, on their way there, and nowhere.
async fn what_is_deleted_is_gone(setup: &Setup) {
    setup.write(300..310).await;
    assert_eq!(setup.delete(304..306).await, [Delete::Deleted; 2]);
    setup.memory.forget(300..310);
    let left: Vec<bool> = (300..310).map(|id| !(304..306).contains(&id)).collect();
    assert_eq!(setup.there(300..310, Ask::Look), left);
    for (ended, left) in setup.read(300..310).await.into_iter().zip(left) {
        assert_eq!(ended.is_ok(), left, "{ended:?}");
    }
    assert_eq!(setup.delete(304..306).await, [Delete::Absent; 2], "there is nothing to delete");
    let (leased, sums) = setup.memory.put(320, None).unwrap();
    let block = setup.memory.block(320);
    let write = Write { block, parent: None, sums, leased: Some(leased), awaited: false, has_waited: true };
    assert!(matches!(Arc::clone(&setup.tier).write(write), Written::Coming(None)));
    setup.delete(320..321).await;
    setup.memory.forget([320]);
    assert_eq!(setup.there(320..321, Ask::Coming), [false], "nor does it come later");
    setup.write(304..305).await;
}

impl Setup {
    async fn hold(&self, id: HoldId, kind: HoldKind, ids: std::ops::Range<u64>) -> Result<(), NotHeld> {
        let hold = Hold { id, kind, runs: vec![self.run(ids)], expires: now().plus_ms(600_000), now: now() };
        match Arc::clone(&self.tier).hold(hold)? {
            Some(safe) => tokio::time::timeout(WITHIN, safe).await.unwrap(),
            None => Ok(()),
        }
    }
}

async fn what_is_held_is_not_deleted_until_it_is_released(setup: &Setup) {
    setup.write(400..402).await;
    for (kind, other) in [(HoldKind::Pin, HoldKind::Ticket), (HoldKind::Ticket, HoldKind::Pin)] {
        let id = HoldId(kind as u128 + 7);
        let release = |kind| Arc::clone(&setup.tier).release(id, kind);
        if setup.which == Tier::Object {
            // A pin there is a reference, which binds collectors alone. It is refused for blocks that are nowhere.
            setup.hold(id, kind, 400..402).await.unwrap();
            let refused = setup.hold(HoldId(id.0 + 10), kind, 401..403).await;
            assert_eq!(refused.is_err(), kind == HoldKind::Pin, "{refused:?}");
            assert_eq!(setup.there(400..403, Ask::Held), [false; 3]);
            release(kind);
            continue;
        }
        setup.hold(id, kind, 401..403).await.unwrap();
        assert_eq!(setup.there(400..403, Ask::Held), [false, true, true], "what is yet to come is held, too");
        assert_eq!(setup.delete(401..403).await, [Delete::Pinned; 2]);
        assert_eq!(setup.there(400..403, Ask::Look), [true, true, false]);
        assert!(!release(other), "it is none of that kind");
        assert_eq!(setup.there(401..402, Ask::Held), [true]);
        assert!(release(kind));
        assert!(!release(kind), "it has ended");
        assert_eq!(setup.there(400..403, Ask::Held), [false; 3]);
    }
    assert_eq!(setup.delete(400..402).await, [Delete::Deleted; 2]);
}

fn memory() -> Memory {
    Memory::new(32 << 20, BLOCK, 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_conforms() {
    let memory = memory();
    let tier = FaultyTier::new(&memory.host) as Arc<dyn Below>;
    conforms(&Setup { memory, which: Tier::Nvme, tier }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_conform() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for count in [1, 2] {
        for engine in [NvmeEngine::Auto, NvmeEngine::Syscalls] {
            let paths = folders[..count].iter().map(|folder| folder.path().join(format!("{count}{engine:?}")));
            let memory = memory();
            let options = NvmeOptions {
                paths: paths.collect(),
                bytes: 64 << 20,
                index_bytes: None,
                dirty_bytes: 8 << 20,
                engine,
                boot_id: [7; 16],
                now: now(),
                faults: None,
            };
            let nvme = NvmeTier::open(&options, &memory.host).unwrap();
            conforms(&Setup { memory, which: Tier::Nvme, tier: Arc::clone(&nvme) as _ }).await;
            tokio::task::spawn_blocking(move || nvme.close()).await.unwrap();
        }
    }
}

async fn bucket(settings: &[String]) -> (Setup, Arc<ObjectTier>) {
    static SEED: AtomicU64 = AtomicU64::new(1);
    let value = |key: &str| {
        let found = settings.iter().find_map(|setting| setting.strip_prefix(key));
        found.unwrap_or_default().to_owned()
    };
    let options = value("object.options=");
    let options = options.split(',').filter_map(|option| option.split_once('='));
    let options = options.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let opened = ObjectUrl { url: value("object.url="), options }.open().unwrap();
    let memory = memory();
    let options = ObjectOptions {
        opened,
        namespaces: vec!["default".into()],
        limits: ObjectLimits { upload_bytes: 16 << 20, backlog_bytes: 64 << 20 },
        verify: Verify::Probe,
        stall: Duration::from_secs(5),
        log_folder: None,
        seed: SEED.fetch_add(1, Ordering::Relaxed),
        clock: now,
    };
    let object = ObjectTier::open(options, &memory.host, None).unwrap();
    let until = Instant::now() + WITHIN;
    while object.status().state != "SERVING" {
        assert!(Instant::now() < until, "{:?}", object.status());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // What is gathered is written after a second, when somebody ticks.
    let ticked = Arc::downgrade(&object);
    tokio::spawn(async move {
        while let Some(object) = ticked.upgrade() {
            object.tick();
            drop(object);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    (Setup { memory, which: Tier::Object, tier: Arc::clone(&object) as _ }, object)
}

fn local_path(folder: &Path) -> Vec<String> {
    vec![format!("object.url=file://{}", folder.display())]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_on_a_local_path_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let (setup, object) = bucket(&local_path(folder.path())).await;
    conforms(&setup).await;
    object.close(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_over_s3_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path(), "127.0.0.1:0").await;
    let (setup, object) = bucket(&s3::settings(server.address, "conformance")).await;
    conforms(&setup).await;
    object.close(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_in_azure_conforms() {
    let Some(program) = azure::program() else {
        println!("skipped: set KVSTORE_AZURITE to a program that speaks Azure's protocol");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let azurite = Azurite::start(&program, folder.path()).await;
    let (setup, object) = bucket(&azurite.settings("conformance")).await;
    conforms(&setup).await;
    object.close(Duration::ZERO).await;
}
