//! What blocks do, over ZeroMQ, as other routers read it: their events are understood by this project's router, and by another implementation of ZeroMQ.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore::{caps, replay};
use kvstore_client::v1::{BlockKind, Level};
use kvstore_client::{Client, GroupRef, PutBlock, PutOptions};
use kvstore_proto::zmtp::{Connection, Endpoint};
use kvstore_router::events::vllm::{Event, decode};
use kvstore_tests::TestDaemon;
use tokio::net::{TcpStream, UnixStream};
use zeromq::{Socket, SocketRecv, SocketSend, ZmqMessage};

const BLOCK: u32 = 4096;

struct Published {
    socket: zeromq::SubSocket,
    next: u64,
    /// By medium, the hashes.
    places: BTreeMap<String, BTreeSet<u64>>,
    tokens: BTreeMap<u64, (Option<u64>, Vec<u32>)>,
}

impl Published {
    async fn follow(endpoint: &str) -> Self {
        let mut socket = zeromq::SubSocket::new();
        socket.connect(endpoint).await.unwrap();
        socket.subscribe("kv@").await.unwrap();
        // A subscription is on its way for a while, and nobody says when it has come.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Self { socket, next: 0, places: BTreeMap::new(), tokens: BTreeMap::new() }
    }

    fn take(&mut self, frames: &[Bytes]) {
        assert_eq!((frames.len(), frames[0].as_ref()), (3, b"kv@store".as_slice()));
        let number = u64::from_be_bytes(frames[1].as_ref().try_into().unwrap());
        assert_eq!(number, self.next, "no gap");
        self.next += 1;
        let batch = decode(&frames[2]).unwrap();
        assert_eq!(batch.rank, Some(0));
        for event in batch.events {
            match event {
                Event::Stored(stored) => {
                    assert_eq!(
                        (stored.block_tokens, stored.group, stored.adapter.as_deref()),
                        (16, 0, Some("an adapter"))
                    );
                    self.places.entry(stored.medium.unwrap()).or_default().insert(stored.hashes[0]);
                    self.tokens.insert(stored.hashes[0], (stored.parent, stored.tokens));
                }
                Event::Removed { hashes, medium, group } => {
                    assert_eq!(group, Some(0));
                    assert!(self.places.get_mut(&medium.unwrap()).unwrap().remove(&hashes[0]), "it was there");
                }
                Event::Cleared => self.places.clear(),
                Event::Unknown(what) | Event::Unread(what) => panic!("{what}"),
            }
        }
    }

    async fn until(&mut self, what: &str, reached: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !reached(self) {
            let left = Duration::from_secs(60).saturating_sub(begun.elapsed());
            let message = tokio::time::timeout(left, self.socket.recv()).await;
            let message = message.unwrap_or_else(|_| panic!("{what}: {:?}", self.places)).unwrap();
            self.take(&message.into_vec());
        }
    }

    fn count(&self, medium: &str) -> usize {
        self.places.get(medium).map_or(0, BTreeSet::len)
    }
}

fn settings(disk: &std::path::Path, bucket: &std::path::Path) -> Vec<String> {
    vec![
        format!("nvme.paths={}", disk.display()),
        "nvme.bytes=64MiB".into(),
        format!("object.url=file://{}", bucket.display()),
        "host.bytes=8MiB".into(),
        "events.publish=tcp://127.0.0.1:0".into(),
        "events.replay=tcp://127.0.0.1:0".into(),
        "events.topic=kv@store".into(),
    ]
}

async fn start(settings: &[String]) -> (TestDaemon, Client, GroupRef, Vec<String>) {
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let daemon = TestDaemon::start(&settings).await;
    let client = daemon.client().await;
    let mut layout = replay::layout("test", BLOCK, BlockKind::Attention);
    layout.block_tokens = 16;
    layout.groups[0].head_bytes =
        BLOCK / 16 / layout.groups[0].planes / layout.groups[0].layers / layout.groups[0].heads;
    let registered = client.register_layout(layout).await.unwrap();
    assert!(registered.wants_tokens);
    let endpoints = daemon.running.publisher.as_ref().unwrap().endpoints.clone();
    (daemon, client, registered.group(0), endpoints)
}

fn hash(id: u64) -> Bytes {
    let mut hash = vec![7u8; 24];
    hash.extend_from_slice(&id.to_be_bytes());
    hash.into()
}

async fn put(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>, level: Level) {
    let block = |id| PutBlock { hash: hash(id), parent: None, bytes: vec![id as u8; BLOCK as usize].into() };
    let options = PutOptions { level, ..PutOptions::default() };
    client.put_with(group, ids.map(block).collect::<Vec<_>>(), options).await.unwrap();
}

async fn describe(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>) {
    let hashes: Vec<Bytes> = ids.clone().map(hash).collect();
    let tokens: Vec<u32> = ids.clone().flat_map(|id| vec![id as u32; 16]).collect();
    let parent = ids.start.checked_sub(1).map(hash);
    assert!(client.describe(group, &hashes, parent.as_ref(), &tokens, Some("an adapter")).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn tiers_are_published_in_vllms_words() {
    let (disk, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_daemon, client, group, endpoints) = start(&settings(disk.path(), bucket.path())).await;
    kvstore_tests::until(&client, |status| status.object.as_ref().is_some_and(|object| object.state == "SERVING"))
        .await;
    let mut published = Published::follow(&endpoints[0]).await;
    // Described before and after they are stored; what nobody describes is not told.
    describe(&client, &group, 0..10).await;
    put(&client, &group, 0..10, Level::Local).await;
    put(&client, &group, 10..20, Level::Durable).await;
    put(&client, &group, 500..510, Level::Local).await;
    describe(&client, &group, 10..20).await;
    let all =
        |published: &Published| (published.count("CPU_PINNED"), published.count("DISK"), published.count("EXTERNAL"));
    published.until("all three tiers", |published| all(published) == (20, 20, 10)).await;
    assert_eq!(published.tokens[&3], (Some(2), vec![3; 16]));
    assert_eq!(published.tokens[&0].0, None);
    client.delete(&group, &(0..5).map(hash).collect::<Vec<_>>()).await.unwrap();
    published.until("deletions", |published| all(published) == (15, 15, 10)).await;
    // What leaves memory to make room leaves with a word.
    for at in (1000..4000).step_by(500) {
        put(&client, &group, at..at + 500, Level::Local).await;
    }
    published.until("evictions", |published| published.count("CPU_PINNED") == 0).await;
    assert_eq!(published.count("DISK"), 15);
    // A replay tells the same from the start.
    let mut dealer = zeromq::DealerSocket::new();
    dealer.connect(&endpoints[1]).await.unwrap();
    let asked: Vec<Bytes> = vec![Bytes::new(), Bytes::copy_from_slice(&0u64.to_be_bytes())];
    dealer.send(ZmqMessage::try_from(asked).unwrap()).await.unwrap();
    let mut again = Published { places: BTreeMap::new(), tokens: BTreeMap::new(), next: 0, ..published };
    let before = std::mem::take(&mut again.places);
    assert!(before.is_empty());
    loop {
        let frames = dealer.recv().await.unwrap().into_vec();
        assert_eq!(frames[0].len(), 0);
        if frames[1].as_ref() == (-1i64).to_be_bytes() {
            assert!(frames[2].is_empty());
            break;
        }
        again.take(&["kv@store".into(), frames[1].clone(), frames[2].clone()]);
    }
    assert_eq!((again.count("CPU_PINNED"), again.count("DISK"), again.count("EXTERNAL")), (0, 15, 10));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_longer_described_is_told_to_have_left() {
    let (disk, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut settings = settings(disk.path(), bucket.path());
    settings.push("events.bytes=1MiB".into());
    settings.push("host.bytes=64MiB".into());
    let (_daemon, client, group, endpoints) = start(&settings).await;
    let mut published = Published::follow(&endpoints[0]).await;
    for at in (0..6000).step_by(1000) {
        describe(&client, &group, at..at + 1000).await;
        put(&client, &group, at..at + 1000, Level::Memory).await;
    }
    // A MiB describes some 3,900 blocks.
    published
        .until("the last are known", |published| {
            published.places.get("CPU_PINNED").is_some_and(|known| known.contains(&5999))
        })
        .await;
    assert!((3000..4500).contains(&published.count("CPU_PINNED")), "{}", published.count("CPU_PINNED"));
    assert!(!published.places["CPU_PINNED"].contains(&0));
}

/// Over a Unix socket that is this user's alone; a subscriber that reads nothing is cut off, others are not held up, and one that sends nonsense is hung up on.
#[tokio::test(flavor = "multi_thread")]
async fn slow_and_hostile_followers_are_cut_off() {
    let (disk, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut settings = settings(disk.path(), bucket.path());
    let path = disk.path().join("events.sock");
    settings.push(format!("events.publish=ipc://{}", path.display()));
    settings.push("host.bytes=128MiB".into());
    let (_daemon, client, group, endpoints) = start(&settings).await;
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let connect =
        async || Connection::handshake(UnixStream::connect(&path).await.unwrap(), "SUB", 1 << 20).await.unwrap();
    let mut slow = connect().await;
    slow.send(&[b"\x01kv@"]).await.unwrap();
    let mut other_topic = connect().await;
    other_topic.send(&[b"\x01other"]).await.unwrap();
    let mut quick = connect().await;
    quick.send(&[b"\x01"]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let all_is_put = Arc::new(AtomicBool::new(false));
    let is_last = Arc::clone(&all_is_put);
    let reading = tokio::spawn(async move {
        let mut numbers = Vec::new();
        loop {
            let next = quick.receive();
            tokio::pin!(next);
            // Two seconds without any are its end once all is put, and say nothing before.
            let frames = loop {
                match tokio::time::timeout(Duration::from_secs(2), &mut next).await {
                    Ok(frames) => break frames.ok().flatten(),
                    Err(_) if is_last.load(Ordering::Acquire) => break None,
                    Err(_) => {}
                }
            };
            let Some(frames) = frames else { return numbers };
            numbers.push(u64::from_be_bytes(frames[1].as_ref().try_into().unwrap()));
        }
    });
    for round in 0..6u64 {
        let ids = round * 4000..(round + 1) * 4000;
        describe(&client, &group, ids.clone()).await;
        put(&client, &group, ids.clone(), Level::Memory).await;
        client.delete(&group, &ids.map(hash).collect::<Vec<_>>()).await.unwrap();
    }
    all_is_put.store(true, Ordering::Release);
    let numbers = reading.await.unwrap();
    assert!(numbers.len() > 300 && numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{}", numbers.len());
    // What it did not read is kept for nobody: it gets what the socket held, and then the end, or all of it where that was enough.
    let mut got = 0;
    while let Ok(Ok(Some(_))) = tokio::time::timeout(Duration::from_secs(1), slow.receive()).await {
        got += 1;
    }
    assert!(got <= numbers.len());
    assert!(
        tokio::time::timeout(Duration::from_millis(50), other_topic.receive()).await.is_err(),
        "nothing of this topic"
    );
    let Endpoint::Tcp(host, port) = endpoints[1].parse().unwrap() else { panic!() };
    for nonsense in [vec![2u8, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF], vec![0, 3, 1, 2, 3]] {
        let stream = TcpStream::connect((host.as_str(), port)).await.unwrap();
        let mut peer = Connection::handshake(stream, "DEALER", 1 << 20).await.unwrap();
        peer.send_encoded(&nonsense).await.unwrap();
        assert!(!matches!(peer.receive().await, Ok(Some(_))), "hung up on");
    }
    assert!(client.status().await.is_ok());
}

/// When the system asks the peer of a connection between these ports whether it lives; `None` where it does not, or has something else
/// to do first.
fn asked_within(port: u16, peers_port: u16) -> Option<Duration> {
    let port_of = |address: &str| u16::from_str_radix(address.split_once(':')?.1, 16).ok();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| port_of(row[1]) == Some(port) && port_of(row[2]) == Some(peers_port))?;
    // A timer, and the ticks until it rings. Number 2 is the keepalive.
    let ticks = u64::from_str_radix(row[5].strip_prefix("02:")?, 16).unwrap();
    Some(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

/// Followers whose machines vanished without a word would hold all places of a socket, where nothing is published that finds them out.
/// The system asks each of them whether it lives, and not after two hours, as by default.
#[tokio::test(flavor = "multi_thread")]
async fn followers_are_asked_whether_they_live() {
    let (disk, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_daemon, _, _, endpoints) = start(&settings(disk.path(), bucket.path())).await;
    for (endpoint, kind) in endpoints.iter().zip(["SUB", "DEALER"]) {
        let Endpoint::Tcp(host, port) = endpoint.parse().unwrap() else { panic!() };
        let stream = TcpStream::connect((host.as_str(), port)).await.unwrap();
        let peers_port = stream.local_addr().unwrap().port();
        let _peer = Connection::handshake(stream, kind, 1 << 20).await.unwrap();
        let begun = Instant::now();
        let within = loop {
            match asked_within(port, peers_port) {
                Some(within) => break within,
                None => assert!(begun.elapsed() < Duration::from_secs(60), "{kind}: nobody asks"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert!(within <= caps::PUBLISHER_KEEPALIVE_IDLE, "{kind}: {within:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_descriptions_are_named() {
    let (disk, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_daemon, client, group, _) = start(&settings(disk.path(), bucket.path())).await;
    let error = client.describe(&group, &[hash(1)], None, &[1; 15], None).await.unwrap_err();
    assert!(error.to_string().contains("15 tokens for 1 blocks of 16"), "{error}");
    let error = client.describe(&group, &[], None, &[], None).await.unwrap_err();
    assert!(error.to_string().contains("sequence_hashes"), "{error}");
    // Where nothing is published, nothing is kept.
    let quiet = TestDaemon::start(&[]).await;
    let (client, _) = quiet.group(BLOCK).await;
    let registered = client.register_layout(replay::layout("test", BLOCK, BlockKind::Attention)).await.unwrap();
    assert!(!registered.wants_tokens);
    let tokens = vec![1; replay::layout("test", BLOCK, BlockKind::Attention).block_tokens as usize];
    assert!(!client.describe(&registered.group(0), &[hash(1)], None, &tokens, None).await.unwrap());
}
