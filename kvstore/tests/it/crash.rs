//! kill -9 under load, many times over, against the client's own log: no block that was acknowledged as LOCAL is
//! lost, no byte is wrong, and the daemon is ready again within two seconds.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore_client::v1::{BlockKind, Level, PutStatus};
use kvstore_client::{Client, GetOutcome, GroupRef, PutBlock, PutOptions};

/// Kills. Each is at another moment of the load.
const KILLS: u64 = 40;
/// Bytes of a block: some have their header apart, some are packed.
const SIZES: [u32; 3] = [3000, 70_000, 300_000];
/// LOCAL blocks that are checked after each kill, at most: the newest.
const CHECKED: usize = 60;
/// ... as far as no more than this was put after them, at any level. The disk has three times as much, and drops what is older for what
/// is new.
const KEPT_BYTES: u64 = 64 << 20;

struct Daemon {
    child: Child,
    address: String,
}

impl Daemon {
    fn start(folder: &Path) -> Self {
        Self::start_with(folder, &[])
    }

    fn start_with(folder: &Path, more: &[&str]) -> Self {
        let address = format!("unix:{}", folder.join("crash.sock").display());
        let disk = format!("nvme.paths={}", folder.join("disk").display());
        let settings = [disk.as_str(), "nvme.bytes=192MiB", "host.bytes=32MiB", "http.address=off", "log.level=error"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvstore"));
        command.args(["serve", "--listen", &address]).stdin(Stdio::null()).stdout(Stdio::null());
        settings.iter().chain(more).for_each(|setting| _ = command.args(["--set", setting]));
        Self { child: command.spawn().unwrap(), address }
    }

    async fn client(&self) -> Client {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Ok(client) = Client::connect(&self.address).await
                && client.status().await.is_ok()
            {
                return client;
            }
            assert!(Instant::now() < until, "the daemon never answers");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn groups(client: &Client) -> Vec<GroupRef> {
    let mut groups = Vec::new();
    for bytes in SIZES {
        let layout = replay::layout(&format!("crash {bytes}"), bytes, BlockKind::Attention);
        groups.push(client.register_layout(layout).await.unwrap().group(0));
    }
    groups
}

fn block(id: u64) -> PutBlock {
    let bytes = SIZES[(id % 3) as usize];
    PutBlock::new(replay::sequence_hash(id), replay::content(id, bytes as usize))
}

/// Puts blocks until the daemon is gone, and counts their bytes; those that it said are LOCAL, each with the count before it.
async fn load(client: Client, groups: Vec<GroupRef>, put: Arc<AtomicU64>, worker: u64, first: u64) -> Vec<(u64, u64)> {
    let mut local = Vec::new();
    for at in 0.. {
        let id = first + at * 4 + worker;
        let level = if id % 4 == 1 { Level::Memory } else { Level::Local };
        let options = PutOptions { level, ..PutOptions::default() };
        let before = put.fetch_add(u64::from(SIZES[(id % 3) as usize]), Ordering::Relaxed);
        match client.put_with(&groups[(id % 3) as usize], vec![block(id)], options).await {
            Ok(results) if results[0].level() == Level::Local => local.push((before, id)),
            Ok(results) => assert_ne!(results[0].status(), PutStatus::Unspecified),
            Err(_) => return local,
        }
    }
    unreachable!("the loop has no end")
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_under_load_loses_nothing_that_was_local() {
    let folder = tempfile::tempdir().unwrap();
    let put = Arc::new(AtomicU64::new(0));
    // The client's own log: every LOCAL block, by the bytes that were put before it; and the kill that came next.
    let mut log: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    let (mut first, mut checked) = (0, 0);
    let mut ready = Vec::new();
    for kill in 0..KILLS {
        let started = Instant::now();
        let daemon = Daemon::start(folder.path());
        let client = daemon.client().await;
        ready.push(started.elapsed());
        let groups = groups(&client).await;
        let kept = put.load(Ordering::Relaxed).saturating_sub(KEPT_BYTES);
        for ((_, id), since) in log.range((kept, 0)..).rev().take(CHECKED) {
            checked += 1;
            let outcome = client.get(&groups[(id % 3) as usize], &[replay::sequence_hash(*id)]).await.unwrap();
            match &outcome[0] {
                GetOutcome::Hit(bytes) => assert_eq!(replay::wrong_bytes(*id, bytes), 0, "WRONG BYTES in {id}"),
                other => panic!("LOCAL block {id} of round {since} is lost after kill {kill}: {other:?}"),
            }
        }
        let mut workers = tokio::task::JoinSet::new();
        for worker in 0..4 {
            workers.spawn(load(daemon.client().await, groups.clone(), Arc::clone(&put), worker, first));
        }
        // Another moment each time: within the first milliseconds, in the midst, after a sync or two.
        tokio::time::sleep(Duration::from_millis(20 + kill * 37 % 400)).await;
        drop(daemon);
        while let Some(local) = workers.join_next().await {
            log.extend(local.unwrap().into_iter().map(|acknowledged| (acknowledged, kill)));
        }
        first += 1_000_000;
    }
    assert!(checked > 500, "the load was no load: {} LOCAL blocks, {checked} checks", log.len());
    // Of a quarter of them: on a machine that is busy with other tests, the rest say how busy it was.
    ready.sort();
    assert!(ready[ready.len() / 4] < Duration::from_secs(2), "ready after {ready:?}");
}

/// The object store is away, blocks of a durable namespace are acknowledged as LOCAL, and the daemon is killed, several times:
/// the next one uploads all of them once the store is there, and a daemon without any of this one's disks reads them.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_owed_to_the_bucket_survives_kill_9() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bucket = folder.path().join("bucket");
    // Where a folder should be is a file: nothing can be written below it.
    std::fs::write(&bucket, "").unwrap();
    let url = format!("object.url=file://{}", bucket.display());
    let settings = [url.as_str(), "object.upload=all", "object.stall=1s"];
    let mut local = Vec::new();
    for kill in 0..5u64 {
        let daemon = Daemon::start_with(folder.path(), &settings);
        let client = daemon.client().await;
        let owed = client.status().await.unwrap().object.unwrap().backlog_blocks;
        assert!(owed >= local.len() as u64, "{owed} of {} are remembered after kill {kill}", local.len());
        let groups = groups(&client).await;
        for id in kill * 100..kill * 100 + 12 {
            let options = PutOptions { level: Level::Local, ..PutOptions::default() };
            let results = client.put_with(&groups[(id % 3) as usize], vec![block(id)], options).await.unwrap();
            assert_eq!(results[0].level(), Level::Local);
            local.push(id);
        }
        tokio::time::sleep(Duration::from_millis(kill * 97)).await;
        // SIGKILL.
        drop(daemon);
    }
    std::fs::remove_file(&bucket).unwrap();
    let daemon = Daemon::start_with(folder.path(), &settings);
    let client = daemon.client().await;
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let object = client.status().await.unwrap().object.unwrap();
        if object.backlog_blocks == 0 {
            break;
        }
        assert!(Instant::now() < until, "{object:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(daemon);
    let daemon = Daemon::start_with(other.path(), &[&url]);
    let client = daemon.client().await;
    let until = Instant::now() + Duration::from_secs(60);
    while client.status().await.unwrap().object.unwrap().state != "SERVING" {
        assert!(Instant::now() < until, "the store is never served");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let groups = groups(&client).await;
    for id in local {
        let outcome = client.get(&groups[(id % 3) as usize], &[replay::sequence_hash(id)]).await.unwrap();
        let bytes = outcome[0].bytes().unwrap_or_else(|| panic!("block {id} is not in the bucket: {outcome:?}"));
        assert_eq!(replay::wrong_bytes(id, bytes), 0, "WRONG BYTES in {id}");
    }
}
