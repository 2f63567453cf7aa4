//! Watch: a snapshot, then changes, and a follower's picture that is the daemon's, whatever happens on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use kvstore::replay;
use kvstore_client::v1::{BlockKind, Level, LookupRequest, WatchLayout, WatchTier};
use kvstore_client::{Client, GroupRef, PutOptions, Watch, WatchEvent, event_name};
use kvstore_tests::{TestDaemon, chain, hashes, two_namespaces, until};
use tokio::time::Instant;

const BLOCK: u32 = 4 << 10;

/// What a follower knows.
#[derive(Default)]
struct Picture {
    layouts: Vec<WatchLayout>,
    tiers: BTreeMap<i32, BTreeSet<u64>>,
    resets: usize,
    lost: usize,
    resumed: usize,
    whole: Option<u64>,
    next: u64,
    draining: bool,
    rates: BTreeMap<i32, f64>,
}

impl Picture {
    fn apply(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Reset => {
                self.tiers.clear();
                self.layouts.clear();
                self.resets += 1;
                self.whole = None;
            }
            WatchEvent::Resumed => self.resumed += 1,
            WatchEvent::Layout(layout) => self.layouts.push(layout),
            WatchEvent::Snapshot(snapshot) => self.tiers.entry(snapshot.tier).or_default().extend(snapshot.names),
            WatchEvent::SnapshotEnd(next) => self.whole = Some(next),
            WatchEvent::Changes(changes) => {
                self.next = changes.next;
                for tier in changes.tiers {
                    let names = self.tiers.entry(tier.tier).or_default();
                    names.extend(&tier.stored);
                    tier.removed.iter().for_each(|name| _ = names.remove(name));
                }
            }
            WatchEvent::Rates(rates) => {
                self.draining = rates.draining;
                self.rates = rates.tiers.iter().map(|tier| (tier.tier, tier.bytes_per_second)).collect();
            }
            WatchEvent::Lost(_) => self.lost += 1,
        }
    }

    /// Which of these are known to be in a tier.
    fn has(&self, tier: WatchTier, group: &GroupRef, hashes: &[Bytes]) -> Vec<bool> {
        let layout = self.layouts.iter().find(|layout| layout.layout_digest == group.layout_digest);
        let seed = layout.map(|layout| layout.name_seeds[group.group as usize]);
        let names = self.tiers.get(&tier.into());
        let known = |hash: &Bytes| Some(names?.contains(&event_name(seed?, hash)));
        hashes.iter().map(|hash| known(hash).unwrap_or(false)).collect()
    }

    /// Follows until `reached`, for a minute at most.
    async fn follow(&mut self, watch: &mut Watch, reached: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !reached(self) {
            let event = tokio::time::timeout_at(deadline, watch.next()).await;
            self.apply(event.expect("the picture does not become the daemon's"));
        }
    }

    async fn follow_to(&mut self, watch: &mut Watch, client: &Client, group: &GroupRef, asked: &[Bytes]) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let request = LookupRequest {
                layout_digest: group.layout_digest.clone(),
                sequence_hashes: asked.to_vec(),
                ..LookupRequest::default()
            };
            let residency = client.lookup(request).await.unwrap().residency;
            let is = |bit: u32| -> Vec<bool> { residency.iter().map(|bits| bits & bit != 0).collect() };
            let same = [(WatchTier::Host, 2), (WatchTier::Nvme, 4), (WatchTier::Object, 8)]
                .into_iter()
                .all(|(tier, bit)| self.has(tier, group, asked) == is(bit));
            if same {
                return;
            }
            let event = tokio::time::timeout_at(deadline, watch.next()).await;
            self.apply(event.expect("the picture does not become the daemon's"));
        }
    }
}

async fn put(client: &Client, group: &GroupRef, ids: std::ops::Range<u64>, level: Level) {
    let options = PutOptions { level, ..PutOptions::default() };
    client.put_with(group, chain(ids, BLOCK), options).await.unwrap();
}

/// A snapshot of all tiers, then puts, deletions and evictions: the picture is what look-ups say.
#[tokio::test(flavor = "multi_thread")]
async fn the_picture_is_what_lookups_say() {
    let (disk, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let settings = [
        format!("nvme.paths={}", disk.path().display()).leak() as &str,
        "nvme.bytes=128MiB",
        "host.bytes=8MiB",
        format!("object.url=file://{}", bucket.path().display()).leak(),
    ];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    until(&client, |status| status.object.as_ref().is_some_and(|object| object.state == "SERVING")).await;
    put(&client, &group, 0..100, Level::Durable).await;
    put(&client, &group, 100..200, Level::Local).await;
    let (mut watch, mut picture) = (client.watch(), Picture::default());
    picture.follow(&mut watch, |picture| picture.whole.is_some()).await;
    let all = hashes(0..8000);
    picture.follow_to(&mut watch, &client, &group, &all).await;
    assert!(picture.has(WatchTier::Object, &group, &all).iter().filter(|known| **known).count() >= 100);
    assert!(picture.has(WatchTier::Nvme, &group, &all)[..200].iter().all(|known| *known));

    // More than memory holds: some leave it, all go to disk.
    for at in (1000..7000).step_by(500) {
        put(&client, &group, at..at + 500, Level::Local).await;
    }
    client.delete(&group, &hashes(1000..1200)).await.unwrap();
    picture.follow_to(&mut watch, &client, &group, &all).await;
    let in_memory = picture.has(WatchTier::Host, &group, &all).iter().filter(|known| **known).count();
    assert!((100..6000).contains(&in_memory), "{in_memory}");
    assert!(picture.has(WatchTier::Nvme, &group, &all)[1000..1200].iter().all(|known| !*known));
    assert_eq!((picture.resets, picture.lost), (1, 0));

    // A later layout is told before its blocks.
    let (_, other) = daemon.group(2 * BLOCK).await;
    client.put(&other, chain(0..5, 2 * BLOCK)).await.unwrap();
    picture.follow(&mut watch, |picture| picture.has(WatchTier::Host, &other, &hashes(0..5)) == [true; 5]).await;

    // How fast memory and disk are is told; the disk was read by nobody before.
    let on_disk: Vec<Bytes> = {
        let known = picture.has(WatchTier::Host, &group, &all);
        (1200..7000).filter(|id| !known[*id as usize]).take(64).flat_map(|id| hashes([id])).collect()
    };
    assert!(client.get(&group, &on_disk).await.unwrap().iter().all(|outcome| outcome.bytes().is_some()));
    let rate = |picture: &Picture, tier: WatchTier| picture.rates.get(&tier.into()).copied().unwrap_or(0.0);
    picture.follow(&mut watch, |picture| rate(picture, WatchTier::Nvme) > 1e5).await;
    // Of memory, whatever else the machine does.
    assert!(rate(&picture, WatchTier::Host) > 1e6);
    client.drain(1000).await.unwrap();
    picture.follow(&mut watch, |picture| picture.draining).await;
}

/// After a restart numbers mean nothing: the follower starts anew by itself, and learns what is on disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_a_new_snapshot() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().display());
    let settings = [path.as_str(), "nvme.bytes=64MiB", "calls.drain_deadline=50s"];
    let daemon = TestDaemon::start(&settings).await;
    let (client, group) = daemon.group(BLOCK).await;
    put(&client, &group, 0..50, Level::Local).await;
    let (mut watch, mut picture) = (client.watch(), Picture::default());
    picture.follow_to(&mut watch, &client, &group, &hashes(0..50)).await;
    let started = Instant::now();
    let restarted = daemon.restart(&settings).await;
    assert!(started.elapsed() < Duration::from_secs(30), "a watch keeps no daemon from stopping");
    client.register_layout(replay::layout("test", BLOCK, BlockKind::Attention)).await.unwrap();
    picture.follow(&mut watch, |picture| picture.resets == 2 && picture.whole.is_some()).await;
    picture.follow_to(&mut watch, &client, &group, &hashes(0..50)).await;
    assert!(picture.lost > 0);
    assert!(picture.has(WatchTier::Nvme, &group, &hashes(0..50)).iter().all(|known| *known));
    drop(restarted);
}

/// A watch goes on where it ended; who was away for longer than the log reaches, or asks for what never was, gets a snapshot.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_or_starts_anew() {
    let daemon = TestDaemon::start(&["nvme.paths=off", "host.bytes=64MiB"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    let (mut watch, mut picture) = (client.watch(), Picture::default());
    picture.follow(&mut watch, |picture| picture.whole.is_some()).await;
    let (log, next) = watch.position();
    drop(watch);
    client.put(&group, chain(0..10, BLOCK)).await.unwrap();
    let mut resumed = client.watch_from((log, next));
    picture.follow_to(&mut resumed, &client, &group, &hashes(0..10)).await;
    assert_eq!((picture.resets, picture.resumed), (1, 1));
    assert_eq!(picture.has(WatchTier::Host, &group, &hashes(0..10)), [true; 10]);
    // Another log, a number that is yet to come, and changes that are not kept any more.
    let all = hashes(0..4000);
    for _ in 0..18 {
        client.put(&group, chain(0..4000, BLOCK)).await.unwrap();
        client.delete(&group, &all).await.unwrap();
    }
    for position in [(log ^ 1, next), (log, u64::MAX), (log, next), (log, 0)] {
        assert_eq!(client.watch_from(position).next().await, WatchEvent::Reset, "{position:?}");
    }
}

/// A follower that falls behind is caught by a snapshot in the same stream, and ends with the right picture.
#[tokio::test(flavor = "multi_thread")]
async fn who_falls_behind_is_caught_by_a_snapshot() {
    let daemon = TestDaemon::start(&["nvme.paths=off", "host.bytes=64MiB"]).await;
    let (client, group) = daemon.group(BLOCK).await;
    let (mut watch, mut picture) = (client.watch(), Picture::default());
    picture.follow(&mut watch, |picture| picture.whole.is_some()).await;
    // While nobody reads: more than the log keeps, and more than the sockets and the windows of 8 MiB between do. 80 rounds were about
    // as much, and this failed on a busy machine.
    for round in 0..250u64 {
        let ids = round % 2 * 5000..round % 2 * 5000 + 4000;
        client.put(&group, chain(ids.clone(), BLOCK)).await.unwrap();
        client.delete(&group, &hashes(ids)).await.unwrap();
    }
    client.put(&group, chain(0..77, BLOCK)).await.unwrap();
    picture.follow_to(&mut watch, &client, &group, &hashes(0..10_000)).await;
    assert_eq!(picture.has(WatchTier::Host, &group, &hashes(0..10_000)).iter().filter(|known| **known).count(), 77);
    assert!(picture.resets > 1, "the log reached back all the way");
}

/// Followers of one namespace hear nothing of another's blocks; more followers than may are refused.
#[tokio::test(flavor = "multi_thread")]
async fn namespaces_and_bounds() {
    let disk = tempfile::tempdir().unwrap();
    let path = format!("nvme.paths={}", disk.path().join("volume").display());
    let settings = [path.as_str(), "nvme.bytes=64MiB"];
    let (_daemon, [ours, theirs], [our_group, their_group]) = two_namespaces(disk.path(), &settings, "", BLOCK).await;
    let (mut watch, mut picture) = (ours.watch(), Picture::default());
    picture.follow(&mut watch, |picture| picture.whole.is_some()).await;
    put(&theirs, &their_group, 0..20, Level::Local).await;
    put(&ours, &our_group, 0..10, Level::Local).await;
    picture.follow_to(&mut watch, &ours, &our_group, &hashes(0..20)).await;
    assert!(picture.tiers.values().all(|names| names.len() == 10), "{:?}", picture.tiers);
    let mut anew = Picture::default();
    let mut another = ours.watch();
    anew.follow(&mut another, |picture| picture.whole.is_some()).await;
    anew.follow_to(&mut another, &ours, &our_group, &hashes(0..20)).await;
    assert!(anew.tiers.values().all(|names| names.len() == 10), "{:?}", anew.tiers);

    let mut watches = Vec::new();
    let refused = loop {
        let mut watch = ours.watch();
        match watch.next().await {
            WatchEvent::Lost(error) => break error,
            _ => watches.push(watch),
        }
        assert!(watches.len() < 100);
    };
    assert!(refused.to_string().contains("64 routers watch"), "{refused}");
    drop(watches);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut again = ours.watch();
    while matches!(again.next().await, WatchEvent::Lost(_)) {
        assert!(Instant::now() < deadline, "a follower that left makes room");
    }
}
