//! What a pin and a delete promise across kill -9, which comes right after their answers.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvstore::replay;
use kvstore_client::v1::{BlockKind, Level};
use kvstore_client::{Client, GetOutcome, GroupRef, PutBlock, PutOptions};

/// Large enough that a write takes longer than an answer.
const BLOCK: usize = 300_000;

struct Daemon {
    child: Child,
    address: String,
}

impl Daemon {
    fn start(folder: &Path) -> Self {
        let address = format!("unix:{}", folder.join("pins.sock").display());
        let disk = format!("nvme.paths={}", folder.join("disk").display());
        let settings = [disk.as_str(), "nvme.bytes=256MiB", "nvme.admit=evicted", "host.bytes=64MiB"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvstore"));
        command.args(["serve", "--listen", &address]).stdin(Stdio::null()).stdout(Stdio::null());
        for setting in settings.iter().chain(&["http.address=off", "log.level=error"]) {
            command.args(["--set", setting]);
        }
        Self { child: command.spawn().unwrap(), address }
    }

    async fn group(&self) -> (Client, GroupRef) {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Ok(client) = Client::connect(&self.address).await
                && client.status().await.is_ok()
            {
                let layout = replay::layout("pins", BLOCK as u32, BlockKind::Attention);
                let group = client.register_layout(layout).await.unwrap().group(0);
                return (client, group);
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

fn blocks(ids: std::ops::Range<u64>) -> Vec<PutBlock> {
    ids.map(|id| PutBlock::new(replay::sequence_hash(id), replay::content(id, BLOCK))).collect()
}

fn names(ids: std::ops::Range<u64>) -> Vec<bytes::Bytes> {
    ids.map(replay::sequence_hash).collect()
}

/// Blocks that only memory has are pinned, others that the disk has are deleted, and the daemon is killed as soon as it answered.
/// The next one has the pinned blocks, pinned, and none of the deleted ones. The pinned ones were still on their way to disk when
/// the answer came, so that the kill lost them.
#[tokio::test(flavor = "multi_thread")]
async fn pinned_blocks_are_there_after_kill_9_and_deleted_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..4u64 {
        let from = round * 1000;
        let daemon = Daemon::start(folder.path());
        let (client, group) = daemon.group().await;
        client.put(&group, blocks(from..from + 30)).await.unwrap();
        let local = PutOptions { level: Level::Local, ..PutOptions::default() };
        client.put_with(&group, blocks(from + 100..from + 110), local).await.unwrap();
        let pinned = client.pin(&group, &names(from..from + 30), 600_000).await.unwrap();
        assert_eq!(pinned.pinned_blocks, 30);
        let deleted = client.delete(&group, &names(from + 100..from + 110)).await.unwrap();
        assert_eq!(deleted.deleted, 10);
        // SIGKILL.
        drop(daemon);

        let daemon = Daemon::start(folder.path());
        let (client, group) = daemon.group().await;
        let outcomes = client.get(&group, &names(from..from + 30)).await.unwrap();
        for (id, outcome) in (from..).zip(&outcomes) {
            match outcome {
                GetOutcome::Hit(bytes) => assert_eq!(replay::wrong_bytes(id, bytes), 0, "WRONG BYTES in {id}"),
                other => panic!("pinned block {id} is lost: {other:?}"),
            }
        }
        assert_eq!(client.delete(&group, &names(from..from + 30)).await.unwrap().pinned, 30);
        let gone = client.get(&group, &names(from + 100..from + 110)).await.unwrap();
        assert!(gone.iter().all(|outcome| *outcome == GetOutcome::Miss), "{gone:?}");
        assert!(client.unpin(pinned.pin).await.unwrap());
        assert_eq!(client.delete(&group, &names(from..from + 30)).await.unwrap().deleted, 30);
    }
}
