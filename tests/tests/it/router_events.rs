//! What the router knows of engines and nodes: events over ZeroMQ with gaps, replays and restarts, and a real daemon's tiers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore_client::v1::{BlockKind, DimensionOrder, LayerGroup, Layout, Level, Shard};
use kvstore_client::{Client, PutBlock, PutOptions};
use kvstore_proto::hashes::Sha256Cbor;
use kvstore_proto::zmtp::Connection;
use kvstore_router::events::{EngineView, Naming, subscriber};
use kvstore_router::fleet::{Fleet, FleetOptions, WorkerSpec};
use kvstore_router::hashing::{Chain, Hashing};
use kvstore_router::index::PrefixIndex;
use kvstore_tests::TestDaemon;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use zeromq::{Socket, SocketRecv, SocketSend};

async fn until(what: &str, reached: impl Fn() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An engine's publisher, as vLLM has it: a PUB socket, and a ROUTER socket that replays the last messages.
struct Publisher {
    events: std::net::SocketAddr,
    replay: std::net::SocketAddr,
    life: Arc<Life>,
    tasks: Vec<JoinHandle<()>>,
}

struct Life {
    log: Mutex<Vec<(u64, Vec<u8>)>>,
    kept: usize,
    sender: broadcast::Sender<(u64, Vec<u8>)>,
    /// Messages go into the log alone.
    drops: AtomicBool,
    subscribers: std::sync::atomic::AtomicUsize,
}

async fn serve_events(listener: TcpListener, life: Arc<Life>) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let life = Arc::clone(&life);
        connections.spawn(async move {
            let Ok(mut socket) = Connection::handshake(stream, "PUB", 1 << 20).await else { return };
            assert_eq!(socket.peer(), "SUB");
            let Ok(Some(subscription)) = socket.receive().await else { return };
            assert_eq!(subscription[0][0], 1);
            let mut messages = life.sender.subscribe();
            life.subscribers.fetch_add(1, Ordering::SeqCst);
            while let Ok((number, payload)) = messages.recv().await {
                if socket.send(&[b"kv@topic", &number.to_be_bytes(), &payload]).await.is_err() {
                    break;
                }
            }
        });
    }
}

async fn serve_replays(listener: TcpListener, life: Arc<Life>) {
    while let Ok((stream, _)) = listener.accept().await {
        let life = Arc::clone(&life);
        tokio::spawn(async move {
            let Ok(mut socket) = Connection::handshake(stream, "ROUTER", 1 << 20).await else { return };
            while let Ok(Some(asked)) = socket.receive().await {
                let from = u64::from_be_bytes(asked[1].as_ref().try_into().unwrap());
                let log = life.log.lock().clone();
                for (number, payload) in log.iter().filter(|(number, _)| *number >= from) {
                    socket.send(&[b"", &number.to_be_bytes(), payload]).await.unwrap();
                }
                socket.send(&[b"", &u64::MAX.to_be_bytes(), b""]).await.unwrap();
            }
        });
    }
}

impl Publisher {
    async fn start(kept: usize) -> Self {
        let any = || TcpListener::bind("127.0.0.1:0");
        Self::start_on(any().await.unwrap(), any().await.unwrap(), kept)
    }

    fn start_on(events: TcpListener, replay: TcpListener, kept: usize) -> Self {
        let life = Arc::new(Life {
            log: Mutex::default(),
            kept,
            sender: broadcast::channel(1024).0,
            drops: AtomicBool::new(false),
            subscribers: Default::default(),
        });
        let (at, replay_at) = (events.local_addr().unwrap(), replay.local_addr().unwrap());
        let tasks = vec![
            tokio::spawn(serve_events(events, Arc::clone(&life))),
            tokio::spawn(serve_replays(replay, Arc::clone(&life))),
        ];
        Self { events: at, replay: replay_at, life, tasks }
    }

    /// It dies, and another life begins at the same addresses.
    async fn restart(self) -> Self {
        for task in self.tasks {
            task.abort();
            let _ = task.await;
        }
        let bind = async |address| {
            for _ in 0..6000 {
                if let Ok(listener) = TcpListener::bind(address).await {
                    return listener;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("{address} stays taken")
        };
        Self::start_on(bind(self.events).await, bind(self.replay).await, self.life.kept)
    }

    fn publish(&self, events: Value) {
        let mut log = self.life.log.lock();
        let number = log.last().map_or(0, |(number, _)| number + 1);
        let payload = rmp_serde::to_vec(&json!([1.0, events, 0])).unwrap();
        log.push((number, payload.clone()));
        let from = log.len().saturating_sub(self.life.kept);
        log.drain(..from);
        if !self.life.drops.load(Ordering::SeqCst) {
            let _ = self.life.sender.send((number, payload));
        }
    }

    fn stored(&self, hashes: &[u64], parent: Option<u64>) {
        let tokens = vec![1u32; hashes.len() * 4];
        self.publish(json!([{"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens, "block_size": 4, "lora_id": null, "medium": "GPU"}]));
    }

    fn source(&self, replays: bool) -> subscriber::Source {
        subscriber::Source {
            events: format!("tcp://{}", self.events).parse().unwrap(),
            replay: replays.then(|| format!("tcp://{}", self.replay).parse().unwrap()),
            topic: "kv@".into(),
            rank: 0,
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Follower {
    index: Arc<PrefixIndex>,
    view: Arc<EngineView>,
    task: JoinHandle<()>,
}

impl Follower {
    fn start(source: subscriber::Source) -> Self {
        let index = Arc::new(PrefixIndex::new(1 << 20));
        let view = Arc::new(EngineView::new(Arc::clone(&index), Naming::Computed));
        let task = tokio::spawn(subscriber::Subscriber::new(source, Arc::clone(&view)).follow());
        Self { index, view, task }
    }

    /// Blocks of a chain that the engine is known to have.
    fn run(&self, names: &[u64]) -> usize {
        let mut matches = Vec::new();
        self.index.find(names, &mut matches);
        matches.first().map_or(0, |found| found.blocks as usize)
    }

    async fn until_run(&self, names: &[u64], blocks: usize) {
        until("the engine's blocks are known", || self.run(names) == blocks).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_before_and_after_the_router_came_are_known() {
    let engine = Publisher::start(100).await;
    engine.stored(&[1, 2, 3], None);
    let follower = Follower::start(engine.source(true));
    follower.until_run(&[1, 2, 3, 4, 5], 3).await;
    // What it knows may be a replay's.
    until("it listens", || engine.life.subscribers.load(Ordering::SeqCst) > 0).await;
    engine.stored(&[4, 5], Some(3));
    follower.until_run(&[1, 2, 3, 4, 5], 5).await;
    engine.publish(json!([["BlockRemoved", [2], "GPU"]]));
    follower.until_run(&[1, 2, 3, 4, 5], 1).await;
    engine.publish(json!([{"type": "AllBlocksCleared"}, ["BlockStored", [9], null, [1, 1, 1, 1], 4, null, "DISK"]]));
    follower.until_run(&[1], 0).await;
    assert_eq!(follower.run(&[9]), 0, "not in the engine's own memory");
    engine.publish(json!([["BlockStored", [9], null, [1, 1, 1, 1], 4, null, "CPU_PINNED"]]));
    until("the host's memory is told of", || follower.view.groups().len() == 2).await;
    assert_eq!(follower.run(&[9]), 1);
    assert_eq!((follower.view.counts().fences, follower.view.block_tokens()), (0, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_replayed_and_one_that_cannot_be_forgets_everything() {
    let engine = Publisher::start(10).await;
    let follower = Follower::start(engine.source(true));
    until("it listens", || engine.life.subscribers.load(Ordering::SeqCst) > 0).await;
    engine.stored(&[1, 2], None);
    follower.until_run(&[1, 2], 2).await;
    // Lost on the way, but remembered.
    engine.life.drops.store(true, Ordering::SeqCst);
    engine.stored(&[3], Some(2));
    engine.publish(json!([["BlockRemoved", [2], "GPU"]]));
    engine.stored(&[2], Some(1));
    engine.life.drops.store(false, Ordering::SeqCst);
    engine.stored(&[4], Some(3));
    follower.until_run(&[1, 2, 3, 4], 4).await;
    assert_eq!(follower.view.counts().fences, 0);
    // More than it remembers.
    engine.life.drops.store(true, Ordering::SeqCst);
    engine.publish(json!([["BlockRemoved", [1, 2, 3, 4], "GPU"]]));
    for name in 100..120 {
        engine.stored(&[name], None);
    }
    engine.life.drops.store(false, Ordering::SeqCst);
    engine.stored(&[200], None);
    follower.until_run(&[200], 1).await;
    assert_eq!((follower.run(&[1]), follower.run(&[100]), follower.run(&[119])), (0, 0, 1));
    assert_eq!(follower.view.counts().fences, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_restarts_is_fenced() {
    let engine = Publisher::start(100).await;
    let follower = Follower::start(engine.source(true));
    for name in 1..=5 {
        engine.stored(&[name], None);
    }
    follower.until_run(&[5], 1).await;
    // The connection breaks and the engine lives: nothing is forgotten.
    let engine = {
        let life = engine.life.log.lock().clone();
        let engine = engine.restart().await;
        *engine.life.log.lock() = life;
        engine
    };
    engine.stored(&[6], None);
    follower.until_run(&[6], 1).await;
    assert_eq!((follower.run(&[1]), follower.view.counts().fences), (1, 0));
    // Another life, with fewer messages than the last.
    let engine = engine.restart().await;
    engine.stored(&[40], None);
    follower.until_run(&[40], 1).await;
    assert_eq!((follower.run(&[1]), follower.run(&[6]), follower.view.counts().fences), (0, 0, 1));
    // And one with more.
    let engine = engine.restart().await;
    for name in 50..60 {
        engine.stored(&[name], None);
    }
    follower.until_run(&[59], 1).await;
    assert_eq!((follower.run(&[40]), follower.view.counts().fences), (0, 2), "what the last life had");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_replay_socket_a_broken_connection_forgets_everything() {
    let engine = Publisher::start(100).await;
    let follower = Follower::start(engine.source(false));
    until("it listens", || engine.life.subscribers.load(Ordering::SeqCst) == 1).await;
    engine.stored(&[1, 2], None);
    follower.until_run(&[1, 2], 2).await;
    engine.life.drops.store(true, Ordering::SeqCst);
    engine.stored(&[3], Some(2));
    engine.life.drops.store(false, Ordering::SeqCst);
    engine.stored(&[7], None);
    follower.until_run(&[7], 1).await;
    assert_eq!((follower.run(&[1]), follower.view.counts().fences), (0, 1));
    let engine = engine.restart().await;
    until("it listens again", || engine.life.subscribers.load(Ordering::SeqCst) == 1).await;
    engine.stored(&[8], None);
    follower.until_run(&[8], 1).await;
    assert_eq!(follower.run(&[7]), 0);
}

/// Another implementation of ZeroMQ publishes and replays.
#[tokio::test(flavor = "multi_thread")]
async fn other_implementations_are_understood() {
    let mut publisher = zeromq::PubSocket::new();
    let events = publisher.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let mut router = zeromq::RouterSocket::new();
    let replay = router.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let message = |name: u64| rmp_serde::to_vec(&json!([1.0, [["BlockStored", [name], null, [1], 1]], 0])).unwrap();
    let replayed = message(1);
    let answering = tokio::spawn(async move {
        loop {
            let asked = router.recv().await.unwrap();
            let peer = asked.get(0).unwrap().clone();
            for (number, payload) in [(0u64, replayed.clone()), (u64::MAX, Vec::new())] {
                let frames: Vec<Bytes> =
                    vec![peer.clone(), Bytes::new(), number.to_be_bytes().to_vec().into(), payload.into()];
                router.send(zeromq::ZmqMessage::try_from(frames).unwrap()).await.unwrap();
            }
        }
    });
    let source = subscriber::Source {
        events: events.parse().unwrap(),
        replay: Some(replay.parse().unwrap()),
        topic: "kv".into(),
        rank: 0,
    };
    let follower = Follower::start(source);
    follower.until_run(&[1], 1).await;
    for number in 1u64..30_000 {
        let frames: Vec<Bytes> = vec!["kv@x".into(), number.to_be_bytes().to_vec().into(), message(number + 1).into()];
        publisher.send(zeromq::ZmqMessage::try_from(frames).unwrap()).await.unwrap();
        if follower.run(&[number + 1]) == 1 && number > 20 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(follower.view.counts().batches > 10 && follower.run(&[1]) == 1);
    answering.abort();
}

/// A peer that claims frames without end, or is no ZeroMQ at all, costs nothing and is tried again.
#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_publisher_does_no_harm() {
    use tokio::io::AsyncWriteExt;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let source = subscriber::Source {
        events: format!("tcp://{address}").parse().unwrap(),
        replay: None,
        topic: String::new(),
        rank: 0,
    };
    let follower = Follower::start(source);
    for attempt in 0..3 {
        let (mut stream, _) = listener.accept().await.unwrap();
        match attempt {
            0 => stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap(),
            1 => {
                let mut socket: Connection<TcpStream> = Connection::handshake(stream, "PUB", 1024).await.unwrap();
                socket.send_encoded(&[2, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]).await.unwrap();
            }
            _ => {
                let mut socket: Connection<TcpStream> = Connection::handshake(stream, "PUB", 1024).await.unwrap();
                // A message that cannot be read costs itself: what stood before it is still known.
                let good =
                    |block: u64| rmp_serde::to_vec(&json!([1.0, [["BlockStored", [block], null, [1], 1]], 0])).unwrap();
                let odd = [&good(5)[..], b"\xc1 not msgpack", &good(6), b"", &[0x93; 40], &good(9), &good(7)];
                // The last number of all says that a replay has ended: of a message it means nothing.
                for (number, payload) in [0, 1, 2, 3, 4, u64::MAX, 5].into_iter().zip(odd) {
                    socket.send(&[b"", &number.to_be_bytes(), payload]).await.unwrap();
                }
                follower.until_run(&[5, 6, 7], 3).await;
            }
        }
    }
    let counts = follower.view.counts();
    assert_eq!((counts.unread, counts.fences), (4, 0));
}

// ------------------------------------------------------------------------------------------------ nodes

fn layout(model: &str, kinds: &[(BlockKind, u32)], shard: Shard) -> Layout {
    let group = |(kind, window_tokens): &(BlockKind, u32)| LayerGroup {
        kind: (*kind).into(),
        window_tokens: *window_tokens,
        layers: 1,
        planes: if *kind == BlockKind::RecurrentState { 1 } else { 2 },
        heads: 1,
        head_bytes: 64,
        order: DimensionOrder::Opaque.into(),
    };
    Layout {
        model: Bytes::copy_from_slice(model.as_bytes()),
        dtype: "bfloat16".into(),
        block_tokens: 16,
        groups: kinds.iter().map(group).collect(),
        shard: Some(shard),
        ..Layout::default()
    }
}

async fn put(client: &Client, layout: &Layout, group: u32, hashes: &[[u8; 32]], level: Level) {
    let registered = client.register_layout(layout.clone()).await.unwrap();
    let bytes = vec![3u8; registered.block_bytes[group as usize] as usize];
    let block =
        |hash: &[u8; 32]| PutBlock { hash: Bytes::copy_from_slice(hash), parent: None, bytes: bytes.clone().into() };
    let options = PutOptions { level, ..PutOptions::default() };
    let results =
        client.put_with(&registered.group(group), hashes.iter().map(block).collect::<Vec<_>>(), options).await.unwrap();
    assert!(results.iter().all(|result| result.level() != Level::Unspecified));
}

fn worker(id: &str, node: &TestDaemon) -> WorkerSpec {
    WorkerSpec { node: Some(node.address.clone()), ..WorkerSpec::new(id, "http://127.0.0.1:1", "org/tiny") }
}

fn fleet_of(workers: &[WorkerSpec]) -> Arc<Fleet> {
    let fleet = Fleet::new(Hashing::Sha256Cbor(Sha256Cbor::default()), FleetOptions::default());
    fleet.set_workers(workers);
    fleet
}

fn chain() -> Chain {
    let tokens: Vec<u32> = (0..640).collect();
    Hashing::Sha256Cbor(Sha256Cbor::default()).chain(&tokens, 16, None, None).unwrap()
}

const ONE: Shard = Shard { index: 0, count: 1 };

async fn until_located(fleet: &Fleet, expected: &[(u64, [u64; 3])]) {
    let begun = Instant::now();
    loop {
        let located = fleet.locate(&chain(), &fleet.workers());
        let found: Vec<(u64, [u64; 3])> =
            located.iter().map(|cached| (cached.fetched_tokens, cached.tier_tokens)).collect();
        if found == expected {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{found:?} instead of {expected:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Blocks in memory, on disk and in the bucket of real daemons: each worker's node is told apart, the bucket is everybody's, and a node that is gone has nothing.
#[tokio::test(flavor = "multi_thread")]
async fn tiers_of_nodes_are_known() {
    let (disk, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let object = format!("object.url=file://{}", bucket.path().display());
    let nvme = format!("nvme.paths={}", disk.path().display());
    let a = TestDaemon::start(&[&object, &nvme, "nvme.bytes=64MiB"]).await;
    let b = TestDaemon::start(&[&object]).await;
    let (client_a, client_b) = (a.client().await, b.client().await);
    for client in [&client_a, &client_b] {
        kvstore_tests::until(client, |status| status.object.as_ref().is_some_and(|object| object.state == "SERVING"))
            .await;
    }
    let layout = layout("tiny", &[(BlockKind::Attention, 0)], ONE);
    let hashes = chain().hashes;
    put(&client_a, &layout, 0, &hashes[..10], Level::Memory).await;
    put(&client_b, &layout, 0, &hashes[..4], Level::Memory).await;
    let fleet = fleet_of(&[worker("a", &a), worker("b", &b)]);
    until_located(&fleet, &[(160, [160, 0, 0]), (64, [64, 0, 0])]).await;
    assert_eq!(fleet.block_tokens("org/tiny"), Some(16));
    // Two more in the bucket, by way of a.
    put(&client_a, &layout, 0, &hashes[10..12], Level::Durable).await;
    until_located(&fleet, &[(192, [192, 0, 0]), (64, [64, 0, 0])]).await;
    put(&client_b, &layout, 0, &hashes[4..10], Level::Memory).await;
    until_located(&fleet, &[(192, [192, 0, 0]), (192, [160, 0, 32])]).await;
    // A hole: what is behind it is of no use.
    put(&client_a, &layout, 0, &hashes[20..30], Level::Memory).await;
    let group = client_a.register_layout(layout.clone()).await.unwrap().group(0);
    client_b.delete(&group, &[Bytes::copy_from_slice(&hashes[2])]).await.unwrap();
    until_located(&fleet, &[(192, [192, 0, 0]), (32, [32, 0, 0])]).await;
    // From disk alone, after a restart; the engine registers its layout again.
    put(&client_a, &layout, 0, &hashes[12..14], Level::Local).await;
    let a = a.restart(&[&object, &nvme, "nvme.bytes=64MiB"]).await;
    let client_a = a.client().await;
    client_a.register_layout(layout.clone()).await.unwrap();
    until_located(&fleet, &[(224, [0, 224, 0]), (32, [32, 0, 0])]).await;
    // What is on the way there is fetched into memory by a hint.
    let node = fleet.worker("a").unwrap().node.clone().unwrap();
    node.prefetch("org/tiny", &chain()).await;
    until_located(&fleet, &[(224, [224, 0, 0]), (32, [32, 0, 0])]).await;
    a.running.shut_down().await;
    until_located(&fleet, &[(0, [0; 3]), (32, [32, 0, 0])]).await;
    let nodes: BTreeSet<String> = fleet.nodes().iter().map(|node| node.address.clone()).collect();
    assert_eq!(nodes.len(), 2);
    fleet.set_workers(&[]);
    assert!(fleet.nodes().is_empty() && fleet.workers().is_empty());
}

/// Layer groups of all kinds, and the shards of a tensor-parallel group: a prefix is as long as all of them allow.
#[tokio::test(flavor = "multi_thread")]
async fn hybrid_groups_and_shards_meet() {
    let daemon = TestDaemon::start(&[]).await;
    let client = daemon.client().await;
    let kinds = [(BlockKind::Attention, 0), (BlockKind::SlidingWindow, 33), (BlockKind::RecurrentState, 0)];
    let shards: Vec<Layout> = (0..2).map(|index| layout("tiny", &kinds, Shard { index, count: 2 })).collect();
    let hashes = chain().hashes;
    let fleet = fleet_of(&[worker("w", &daemon)]);
    for shard in &shards {
        put(&client, shard, 0, &hashes[..20], Level::Memory).await;
        // The window is two blocks: those before 12 and before 18.
        put(&client, shard, 1, &hashes[10..12], Level::Memory).await;
        put(&client, shard, 1, &hashes[16..18], Level::Memory).await;
        put(&client, shard, 2, &hashes[11..12], Level::Memory).await;
    }
    until_located(&fleet, &[(12 * 16, [12 * 16, 0, 0])]).await;
    // A state after 18, on one shard, then on both.
    put(&client, &shards[0], 2, &hashes[17..18], Level::Memory).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    until_located(&fleet, &[(12 * 16, [12 * 16, 0, 0])]).await;
    put(&client, &shards[1], 2, &hashes[17..18], Level::Memory).await;
    until_located(&fleet, &[(18 * 16, [18 * 16, 0, 0])]).await;
    // A window's bytes are those of its two blocks; a state's, of one.
    let cached = fleet.locate(&chain(), &fleet.workers())[0];
    let block = |group: usize| if group == 2 { 64 } else { 2 * 16 * 64u64 };
    assert_eq!(cached.fetched_bytes, [2 * (18 * block(0) + 2 * block(1) + block(2)), 0, 0]);
    // Another model's blocks of the same tokens are not this one's.
    put(&client, &layout("other", &[(BlockKind::Attention, 0)], ONE), 0, &hashes[..40], Level::Memory).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    until_located(&fleet, &[(18 * 16, [18 * 16, 0, 0])]).await;
}
