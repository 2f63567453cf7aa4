//! Prewarming: the chunks of a snapshot come into a daemon's memory or onto its disk, verified, and restores find them there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use kvstore_checkpoint::digest::Digest;
use kvstore_checkpoint::manifest::Extent;
use kvstore_checkpoint::near::Near;
use kvstore_checkpoint::progress::Progress;
use kvstore_checkpoint::restore;
use kvstore_checkpoint::save::{self, Compress, SaveOptions};
use kvstore_checkpoint::store::Store;
use kvstore_client::v1::{PrewarmProgress, PrewarmSnapshotRequest, PrewarmTier};
use kvstore_client::{Chunks, Client, Error, JoinedBlocks, LeasedBlock, Plane, PutBlock};
use kvstore_proto::chunks;
use kvstore_tests::random::Random;
use kvstore_tests::{TestDaemon, chain, until};
use kvstore_tiers::bucket::ObjectUrl;

const MIB: usize = 1 << 20;

/// A store of snapshots, and one snapshot in it: files of odd sizes, of which two are equal.
struct Place {
    folder: tempfile::TempDir,
    store: Store,
    id: String,
    chunk_bytes: u64,
}

impl Place {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("store")).unwrap();
        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        let mut random = Random(7);
        let mut write = |name: &str, bytes: usize| {
            let content: Vec<u8> =
                (0..bytes.div_ceil(8)).flat_map(|_| random.any().to_le_bytes()).take(bytes).collect();
            fs::write(model.join(name), content).unwrap();
        };
        for (name, bytes) in
            [("one-byte", 1), ("small", 5_000), ("middle", 300_001), ("large", 9 * MIB + 17), ("larger", 16 * MIB)]
        {
            write(name, bytes);
        }
        fs::copy(model.join("large"), model.join("large-again")).unwrap();
        let url = format!("file://{}", folder.path().join("store").display());
        let store = Store::open(&ObjectUrl { url, options: Vec::new() }).unwrap();
        let commit = save::save(&store, &model, options("m"), &Arc::default()).await.unwrap();
        Self { folder, store, id: commit.id, chunk_bytes: commit.totals.chunk_bytes }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn daemon(&self, settings: &[&str]) -> TestDaemon {
        let url = format!("snapshots.url=file://{}", self.at("store").display());
        let all: Vec<&str> = [url.as_str(), "host.bytes=128MiB"].into_iter().chain(settings.iter().copied()).collect();
        TestDaemon::start(&all).await
    }

    /// Nobody can read a chunk from the store any more.
    fn lose_chunks(&self) {
        fs::remove_dir_all(self.at("store/snapshots/v1/chunks")).unwrap();
    }

    /// Flips a bit of the largest chunk in the store.
    fn damage_a_chunk(&self) {
        let files = walk(&self.at("store/snapshots/v1/chunks"));
        let largest = files.into_iter().max_by_key(|file| fs::metadata(file).unwrap().len()).unwrap();
        let mut bytes = fs::read(&largest).unwrap();
        bytes[1000] ^= 4;
        fs::write(&largest, bytes).unwrap();
    }

    /// Restores with the help of a daemon; the bytes that came from the store. What is restored is compared with what was saved.
    async fn restore_by(&self, near: Arc<dyn Near>, name: &str) -> u64 {
        let store = self.store.clone().with_near(near);
        let commit = store.snapshot(&self.id).await.unwrap();
        let progress = Arc::new(Progress::default());
        restore::restore(&store, &commit, &self.at(name), &progress).await.unwrap();
        for file in walk(&self.at("model")) {
            let restored = self.at(name).join(file.file_name().unwrap());
            assert!(fs::read(&file).unwrap() == fs::read(&restored).unwrap(), "{} differs", restored.display());
        }
        Progress::read(&progress.moved)
    }
}

fn options(name: &str) -> SaveOptions {
    SaveOptions {
        name: Some(name.into()),
        facts: BTreeMap::new(),
        compress: Compress::Auto,
        writer: "test".into(),
        now_ms: 0,
    }
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

/// A daemon's chunks.
struct Daemons(Chunks);

impl Near for Daemons {
    fn chunk(&self, name: Digest, bytes: u64) -> BoxFuture<'_, Option<Bytes>> {
        self.0.get(name.0, bytes).boxed()
    }

    fn damaged(&self, name: Digest, bytes: u64) -> BoxFuture<'_, ()> {
        self.0.forget(name.0, bytes).map(|forgotten| forgotten.unwrap()).boxed()
    }
}

async fn near(daemon: &TestDaemon, plane: Plane) -> Arc<dyn Near> {
    Arc::new(Daemons(Chunks::new(daemon.client_over(plane).await)))
}

fn wanted(tier: PrewarmTier, keep_ms: u64) -> PrewarmSnapshotRequest {
    PrewarmSnapshotRequest { snapshot: "m".into(), tier: tier.into(), deadline_ms: 60_000, keep_ms }
}

async fn prewarm(client: &Client, tier: PrewarmTier, keep_ms: u64) -> PrewarmProgress {
    client.prewarm_snapshot(wanted(tier, keep_ms), |_| {}).await.unwrap()
}

async fn residency(client: &Client) -> (u64, u64) {
    let listed = client.list_snapshots(true).await.unwrap();
    let there = listed.snapshots[0].residency.unwrap();
    (there.memory_bytes, there.disk_bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_comes_into_memory_once_and_is_restored_from_there() {
    let place = Place::new().await;
    let daemon = place.daemon(&[]).await;
    let client = daemon.client().await;
    assert_eq!(residency(&client).await, (0, 0));
    let mut steps = Vec::new();
    let first = client.prewarm_snapshot(wanted(PrewarmTier::PrewarmMemory, 0), |step| steps.push(step.clone())).await;
    let first = first.unwrap();
    assert_eq!(
        (first.id.as_str(), first.total_bytes, first.done_bytes),
        (place.id.as_str(), place.chunk_bytes, place.chunk_bytes)
    );
    assert!(first.found_bytes == 0 && first.read_bytes > 0 && first.ready && first.pins.is_empty(), "{first:?}");
    assert!(steps.windows(2).all(|two| two[0].done_bytes <= two[1].done_bytes));
    let again = prewarm(&client, PrewarmTier::PrewarmMemory, 0).await;
    assert_eq!((again.found_bytes, again.read_bytes), (place.chunk_bytes, 0));
    assert_eq!(residency(&client).await, (place.chunk_bytes, 0));
    place.lose_chunks();
    assert_eq!(place.restore_by(near(&daemon, Plane::Local).await, "local").await, 0);
    assert_eq!(place.restore_by(near(&daemon, Plane::Grpc).await, "remote").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_disk_comes_from_there_after_a_restart() {
    let place = Place::new().await;
    let disk = format!("nvme.paths={}", place.at("disk").display());
    let settings = [disk.as_str(), "nvme.bytes=2200MiB"];
    let daemon = place.daemon(&settings).await;
    let client = daemon.client().await;
    let done = prewarm(&client, PrewarmTier::PrewarmDisk, 0).await;
    assert!(done.read_bytes > 0 && done.ready, "{done:?}");
    assert_eq!(residency(&client).await.1, place.chunk_bytes);
    daemon.running.shut_down().await;
    place.lose_chunks();
    let daemon = place.daemon(&settings).await;
    let client = daemon.client().await;
    assert_eq!(residency(&client).await, (0, place.chunk_bytes));
    let done = prewarm(&client, PrewarmTier::PrewarmMemory, 0).await;
    assert_eq!((done.read_bytes, done.done_bytes), (0, place.chunk_bytes));
    assert_eq!(residency(&client).await, (place.chunk_bytes, place.chunk_bytes));
    assert_eq!(place.restore_by(near(&daemon, Plane::Local).await, "restored").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_reads_chunks_from_disk_through_the_daemon() {
    let place = Place::new().await;
    let disk = format!("nvme.paths={}", place.at("disk").display());
    let daemon = place.daemon(&[&disk, "nvme.bytes=2200MiB"]).await;
    prewarm(&daemon.client().await, PrewarmTier::PrewarmDisk, 0).await;
    daemon.running.shut_down().await;
    let daemon = place.daemon(&[&disk, "nvme.bytes=2200MiB"]).await;
    place.lose_chunks();
    assert_eq!(place.restore_by(near(&daemon, Plane::Local).await, "restored").await, 0);
}

/// Callers that come together share one prewarm, and one that leaves stops nothing.
#[tokio::test(flavor = "multi_thread")]
async fn callers_share_a_prewarm() {
    let place = Place::new().await;
    let daemon = place.daemon(&[]).await;
    let client = daemon.client().await;
    let mut leaver = tokio::spawn({
        let client = client.clone();
        async move { client.prewarm_snapshot(wanted(PrewarmTier::PrewarmMemory, 0), |_| {}).await }
    });
    // The first, which leaves in the midst of it.
    let _ = tokio::time::timeout(Duration::from_millis(5), &mut leaver).await;
    leaver.abort();
    let callers = (0..8).map(|_| prewarm(&client, PrewarmTier::PrewarmMemory, 0));
    let all = futures::future::join_all(callers).await;
    assert!(all.iter().all(|done| done.ready && done.done_bytes == place.chunk_bytes), "{all:?}");
    // However they met: no chunk was stored twice.
    let chunks = client.inspect_snapshot("m", false).await.unwrap().snapshot.unwrap().chunks;
    assert_eq!(daemon.running.daemon.host.status().counts.published, chunks);
}

/// With a disk, too, where the same blocks are: it is memory that was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_stays_under_pressure_and_goes_after_it() {
    for has_disk in [false, true] {
        let place = Place::new().await;
        let disk = format!("nvme.paths={}", place.at("disk").display());
        let settings = if has_disk { vec![disk.as_str(), "nvme.bytes=2200MiB"] } else { Vec::new() };
        let daemon = place.daemon(&settings).await;
        let (client, group) = daemon.group(MIB as u32).await;
        let press = async |round: u64| {
            client.put(&group, chain(round * 40..round * 40 + 40, MIB as u32)).await.unwrap();
        };
        if has_disk {
            prewarm(&client, PrewarmTier::PrewarmDisk, 0).await;
        }
        let done = prewarm(&client, PrewarmTier::PrewarmMemory, 600_000).await;
        assert_eq!(done.pins.len(), 1);
        for round in 0..10 {
            press(round).await;
        }
        assert_eq!(residency(&client).await.0, place.chunk_bytes);
        // Whoever comes while it is kept shares what is there; and one that asks for no pin gets none.
        assert_eq!(prewarm(&client, PrewarmTier::PrewarmMemory, 0).await.pins.len(), 0);
        assert!(client.unpin(done.pins[0].clone()).await.unwrap());
        let mut round = 10;
        while residency(&client).await.0 == place.chunk_bytes {
            assert!(round < 200, "nothing leaves");
            press(round).await;
            round += 1;
        }
    }
}

/// What one prewarm holds while it waits for the rest, another cannot have: so the second does not begin.
#[tokio::test(flavor = "multi_thread")]
async fn prewarms_do_not_wait_for_what_others_hold() {
    let place = Place::new().await;
    // Two more snapshots, as large.
    for (name, seed) in [("second", 11), ("third", 12)] {
        let folder = place.at(name);
        fs::create_dir(&folder).unwrap();
        let mut random = Random(seed);
        let content: Vec<u8> = (0..3 * MIB).flat_map(|_| random.any().to_le_bytes()).collect();
        fs::write(folder.join("file"), content).unwrap();
        save::save(&place.store, &folder, options(name), &Arc::default()).await.unwrap();
    }
    let daemon = place.daemon(&[]).await;
    let client = daemon.client().await;
    let one = |name: &str| {
        let request = PrewarmSnapshotRequest { snapshot: name.into(), ..wanted(PrewarmTier::PrewarmMemory, 60_000) };
        let client = client.clone();
        async move { client.prewarm_snapshot(request, |_| {}).await }
    };
    let all = futures::future::join_all(["m", "second", "third"].map(one)).await;
    let came = all.iter().filter(|answer| answer.is_ok()).count();
    let refused = all.iter().filter(|answer| matches!(answer, Err(Error::Busy(_)))).count();
    assert!((1..=2).contains(&came) && came + refused == 3, "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_by_name() {
    let place = Place::new().await;
    let daemon = place.daemon(&[]).await;
    let client = daemon.client().await;
    let ask = async |request: PrewarmSnapshotRequest| client.prewarm_snapshot(request, |_| {}).await.unwrap_err();
    let error = ask(PrewarmSnapshotRequest { snapshot: "none".into(), ..wanted(PrewarmTier::PrewarmMemory, 0) }).await;
    assert!(matches!(&error, Error::NotFound(why) if why.contains("none")), "{error}");
    let error = ask(wanted(PrewarmTier::PrewarmDisk, 0)).await;
    assert!(matches!(&error, Error::Unsupported(why) if why.contains("nvme.paths")), "{error}");
    let error = ask(PrewarmSnapshotRequest { deadline_ms: u64::MAX, ..wanted(PrewarmTier::PrewarmMemory, 0) }).await;
    assert!(matches!(&error, Error::Invalid(why) if why.contains("deadline_ms")), "{error}");
    let error = ask(wanted(PrewarmTier::PrewarmMemory, u64::MAX)).await;
    assert!(matches!(&error, Error::Invalid(why) if why.contains("keep_ms")), "{error}");
    let small = place.daemon(&["host.bytes=16MiB"]).await;
    let error = small.client().await.prewarm_snapshot(wanted(PrewarmTier::PrewarmMemory, 0), |_| {}).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported(why) if why.contains("host.bytes")), "{error}");
    let small_disk = format!("nvme.paths={}", place.at("small-disk").display());
    let small = place.daemon(&[&small_disk, "nvme.bytes=256MiB"]).await;
    let error = small.client().await.prewarm_snapshot(wanted(PrewarmTier::PrewarmDisk, 0), |_| {}).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported(why) if why.contains("nvme.bytes at least 2.0 GiB")), "{error}");
    let half = place.daemon(&["host.bytes=40MiB"]).await;
    let error =
        half.client().await.prewarm_snapshot(wanted(PrewarmTier::PrewarmMemory, 1000), |_| {}).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported(why) if why.contains("pinned")), "{error}");
    let none = TestDaemon::start(&[]).await;
    let error = none.client().await.prewarm_snapshot(wanted(PrewarmTier::PrewarmMemory, 0), |_| {}).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported(why) if why.contains("snapshots.url")), "{error}");
    assert!(matches!(none.client().await.list_snapshots(false).await, Err(Error::Unsupported(_))));
}

/// Only what was verified is a chunk: a client cannot store one, over either plane.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_cannot_store_a_chunk() {
    let place = Place::new().await;
    let daemon = place.daemon(&[]).await;
    for plane in [Plane::Grpc, Plane::Local] {
        let client = daemon.client_over(plane).await;
        let group = client.register_layout(chunks::layout(65_536)).await.unwrap().group(0);
        let block = PutBlock::new(Digest::of(b"right").0.to_vec(), b"wrong".to_vec());
        let error = client.put(&group, vec![block]).await.unwrap_err();
        assert!(matches!(&error, Error::Invalid(why) if why.contains("PrewarmSnapshot")), "{error}");
    }
}

/// A chunk that is damaged in the store never becomes a block. What is sound has come all the same, and once the store is mended the
/// same call brings the rest.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_is_not_brought() {
    let place = Place::new().await;
    place.damage_a_chunk();
    let daemon = place.daemon(&[]).await;
    let client = daemon.client().await;
    let error = client.prewarm_snapshot(wanted(PrewarmTier::PrewarmMemory, 0), |_| {}).await.unwrap_err();
    assert!(matches!(&error, Error::DataLoss(why) if why.contains("chunk")), "{error}");
    assert!(residency(&client).await.0 < place.chunk_bytes);
    // A chunk whose end is right is taken for whole by a save: it has to go first.
    place.lose_chunks();
    save::save(&place.store, &place.at("model"), options("m"), &Arc::default()).await.unwrap();
    assert!(prewarm(&client, PrewarmTier::PrewarmMemory, 0).await.ready);
    place.lose_chunks();
    assert_eq!(place.restore_by(near(&daemon, Plane::Local).await, "restored").await, 0);
}

/// A near place that gives wrong bytes, or too few, costs a read from the store, and is told.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_a_daemon_are_found() {
    struct Wrong(parking_lot::Mutex<Vec<Digest>>);
    impl Near for Wrong {
        fn chunk(&self, name: Digest, bytes: u64) -> BoxFuture<'_, Option<Bytes>> {
            let length = if name.0[0] & 1 == 0 { bytes } else { bytes / 2 };
            async move { Some(Bytes::from(vec![7; length as usize])) }.boxed()
        }

        fn damaged(&self, name: Digest, _: u64) -> BoxFuture<'_, ()> {
            self.0.lock().push(name);
            async {}.boxed()
        }
    }
    let place = Place::new().await;
    let wrong = Arc::new(Wrong(Default::default()));
    assert!(place.restore_by(Arc::clone(&wrong) as Arc<dyn Near>, "restored").await > 0);
    assert!(wrong.0.lock().len() >= 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_configuration_names_is_prewarmed_at_the_start() {
    let place = Place::new().await;
    let disk = format!("nvme.paths={}", place.at("disk").display());
    let daemon = place.daemon(&[&disk, "nvme.bytes=2200MiB", "snapshots.prewarm=m:disk"]).await;
    let client = daemon.client().await;
    let begun = std::time::Instant::now();
    while residency(&client).await.1 < place.chunk_bytes {
        assert!(begun.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let wrong = kvstore::serve::start(kvstore::serve::StartOptions {
        settings: vec!["snapshots.prewarm=m".into(), "nvme.paths=off".into(), "http.address=off".into()],
        listen: vec![format!("unix:{}", place.at("none.sock").display())],
        file: None,
    });
    let Err(error) = wrong.await else { panic!("it started") };
    assert!(format!("{error:#}").contains("snapshots.url"), "{error:#}");
}

/// Chunks are in an object store already: nothing uploads them as blocks.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_not_uploaded_again() {
    let place = Place::new().await;
    let url = format!("object.url=file://{}", place.at("bucket").display());
    fs::create_dir(place.at("bucket")).unwrap();
    let daemon = place.daemon(&[&url, "object.upload=all"]).await;
    let (client, group) = daemon.group(MIB as u32).await;
    until(&client, |status| status.object.as_ref().is_some_and(|object| object.state == "SERVING")).await;
    prewarm(&client, PrewarmTier::PrewarmMemory, 0).await;
    client.put(&group, chain(0..2, MIB as u32)).await.unwrap();
    let status = until(&client, |status| status.object.as_ref().is_some_and(|object| object.written_blocks >= 2)).await;
    assert_eq!(status.object.unwrap().written_blocks, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb_is_there_over_grpc() {
    let place = Place::new().await;
    let daemon = place.daemon(&[]).await;
    let client = daemon.client().await;
    let inspected = client.inspect_snapshot(&place.id[..8], true).await.unwrap();
    assert_eq!(inspected.files.len(), 6);
    let info = inspected.snapshot.unwrap();
    assert_eq!((info.names.as_slice(), info.chunk_bytes), (["m".to_owned()].as_slice(), place.chunk_bytes));
    let verified = client.verify_snapshot("m", |_| {}).await.unwrap();
    assert_eq!((verified.sound_chunks, verified.damaged.len()), (info.chunks, 0));
    fs::write(place.at("model/small"), b"another").unwrap();
    save::save(&place.store, &place.at("model"), options("second"), &Arc::default()).await.unwrap();
    let diff = client.diff_snapshots("m", "second").await.unwrap();
    assert_eq!(diff.differences.len(), 1);
    assert_eq!((diff.differences[0].file.as_str(), diff.differences[0].change.as_str()), ("small", "changed"));
    assert_eq!(client.tag_snapshot("m", "old").await.unwrap(), place.id);
    client.remove_snapshot("m").await.unwrap();
    let error = client.remove_snapshot(&place.id).await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported(why) if why.contains("old")), "{error}");
    client.remove_snapshot("old").await.unwrap();
    client.remove_snapshot(&place.id).await.unwrap();
    assert_eq!(client.collect_snapshots(1, true).await.unwrap().deleted_chunks, 1);
    let collected = client.collect_snapshots(1, false).await.unwrap();
    assert_eq!((collected.kept_snapshots, collected.deleted_chunks, collected.failed), (1, 1, 0));
    place.damage_a_chunk();
    let verified = client.verify_snapshot("second", |_| {}).await.unwrap();
    assert_eq!(verified.damaged.len(), 1);
}

/// Chunks of a file, leased in the daemon's memory.
async fn leased(chunks: &Chunks, extents: &[Extent]) -> Vec<Arc<LeasedBlock>> {
    let mut all = Vec::new();
    for extent in extents {
        all.push(Arc::new(chunks.lease(extent.chunk.0, extent.bytes).await.unwrap().unwrap()));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn leased_chunks_are_mapped_one_behind_the_other() {
    let place = Place::new().await;
    let daemon = place.daemon(&[]).await;
    prewarm(&daemon.client().await, PrewarmTier::PrewarmMemory, 0).await;
    let files = place.store.files(&place.store.snapshot(&place.id).await.unwrap()).await.unwrap();
    let extents = |name: &str| files.iter().find(|file| file.path == name).unwrap().extents.0.clone();
    let chunks = Chunks::new(Client::connect_to_map(&daemon.address).await.unwrap());
    for name in ["larger", "large", "middle", "one-byte"] {
        let joined = JoinedBlocks::new(leased(&chunks, &extents(name)).await).ok().unwrap();
        let again = JoinedBlocks::new(leased(&chunks, &extents(name)).await).ok().unwrap();
        let wanted = fs::read(place.at("model").join(name)).unwrap();
        assert_eq!(joined.len(), wanted.len());
        // SAFETY: the value's own memory, of so many bytes, which nobody else knows.
        let bytes = unsafe { std::slice::from_raw_parts_mut(joined.start().as_ptr(), joined.len()) };
        assert!(bytes == wanted);
        bytes.fill(0);
        // SAFETY: as above.
        let others = unsafe { std::slice::from_raw_parts(again.start().as_ptr(), again.len()) };
        assert!(others == wanted, "a write is seen in another mapping");
    }
    // The second chunk of this one does not end with a page: nothing can follow it, and the leases come back.
    let mut odd = leased(&chunks, &extents("large")).await;
    odd.reverse();
    let back = JoinedBlocks::new(odd).err().unwrap();
    assert_eq!(back.len(), 2);
    assert!(JoinedBlocks::new(Vec::new()).is_err());
    // A client that keeps no descriptors maps nothing.
    let plain = Chunks::new(daemon.client_over(Plane::Auto).await);
    assert!(JoinedBlocks::new(leased(&plain, &extents("larger")).await).is_err());
}
