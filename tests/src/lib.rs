//! What the cross-crate tests share: a daemon in this process, clients of it, and blocks to store.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "test support: a failure here is a failed test")]

pub mod azure;
pub mod engine;
pub mod fault_proxy;
pub mod faulty_tier;
pub mod front;
pub mod loop_mount;
pub mod memory;
pub mod object;
pub mod random;
pub mod raw_worker;
pub mod s3;
pub mod tier;

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvstore::replay;
use kvstore::serve::{Running, StartOptions, start};
use kvstore_client::v1::{BlockKind, DimensionOrder, LayerGroup, Layout, StatusResponse};
use kvstore_client::{Client, GroupRef, Plane, PutBlock};

/// Bytes of a block in most tests: small, and no multiple of anything.
pub const BLOCK_BYTES: u32 = 5000;

/// A daemon of this process, on a socket of its own.
pub struct TestDaemon {
    /// It.
    pub running: Running,
    /// Where it listens.
    pub address: String,
    /// The folder of its socket; goes with it.
    pub folder: tempfile::TempDir,
}

impl TestDaemon {
    /// Starts one with `settings` (`KEY=VALUE`) over the defaults and 64 MiB of memory.
    pub async fn start(settings: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), settings).await
    }

    /// Stops it in order, and starts another at its address.
    pub async fn restart(self, settings: &[&str]) -> Self {
        self.running.shut_down().await;
        Self::start_in(self.folder, settings).await
    }

    async fn start_in(folder: tempfile::TempDir, settings: &[&str]) -> Self {
        let address = format!("unix:{}", folder.path().join("test.sock").display());
        let mut all = vec![
            "host.bytes=64MiB".to_owned(),
            "http.address=off".into(),
            std::env::var("KVSTORE_TEST_LOG").map_or("log.level=error".into(), |level| format!("log.level={level}")),
            "nvme.paths=off".into(),
        ];
        all.extend(settings.iter().map(|setting| setting.to_string()));
        let options = StartOptions { file: None, settings: all, listen: vec![address.clone()] };
        Self { running: start(options).await.unwrap(), address, folder }
    }

    /// A client of it, over gRPC.
    pub async fn client(&self) -> Client {
        self.client_over(Plane::Grpc).await
    }

    /// A client of it.
    pub async fn client_over(&self, plane: Plane) -> Client {
        Client::connect_over(&self.address, plane).await.unwrap()
    }

    /// A client, and the group of a layout with blocks of `block_bytes`.
    pub async fn group(&self, block_bytes: u32) -> (Client, GroupRef) {
        self.group_over(Plane::Grpc, block_bytes).await
    }

    /// The same, over this plane.
    pub async fn group_over(&self, plane: Plane, block_bytes: u32) -> (Client, GroupRef) {
        let client = self.client_over(plane).await;
        let layout = replay::layout("test", block_bytes, BlockKind::Attention);
        let group = client.register_layout(layout).await.unwrap().group(0);
        (client, group)
    }

    /// Bytes of all slabs.
    pub fn mapped(&self) -> u64 {
        self.running.daemon.host.status().bytes_mapped
    }
}

/// Waits for the daemon to come to a state, a minute at most.
pub async fn until(client: &Client, reached: impl Fn(&StatusResponse) -> bool) -> StatusResponse {
    let begun = Instant::now();
    loop {
        let status = client.status().await.unwrap();
        if reached(&status) {
            return status;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A daemon with two namespaces, "a" and "b", from a file in `folder` with `more` in it: a client of each, and the group of a layout
/// with blocks of `block_bytes`.
pub async fn two_namespaces(
    folder: &Path,
    settings: &[&str],
    more: &str,
    block_bytes: u32,
) -> (Running, [Client; 2], [GroupRef; 2]) {
    let socket = |name: &str| format!("unix:{}", folder.join(format!("{name}.sock")).display());
    let listen = |name: &str| format!("[[listen]]\naddress = \"{}\"\nnamespace = \"{name}\"\n", socket(name));
    let file = folder.join("kvstore.toml");
    std::fs::write(&file, format!("{}{}{more}", listen("a"), listen("b"))).unwrap();
    let fixed = ["host.bytes=64MiB", "http.address=off", "log.level=error"];
    let settings = fixed.iter().chain(settings).map(|setting| setting.to_string()).collect();
    let running = start(StartOptions { file: Some(file), settings, listen: vec![] }).await.unwrap();
    let mut clients = Vec::new();
    let mut groups = Vec::new();
    for name in ["a", "b"] {
        let client = Client::connect_over(&socket(name), Plane::Grpc).await.unwrap();
        let layout = replay::layout("test", block_bytes, BlockKind::Attention);
        groups.push(client.register_layout(layout).await.unwrap().group(0));
        clients.push(client);
    }
    (running, clients.try_into().ok().unwrap(), groups.try_into().unwrap())
}

/// The names of blocks `ids`.
pub fn hashes(ids: impl IntoIterator<Item = u64>) -> Vec<Bytes> {
    ids.into_iter().map(replay::sequence_hash).collect()
}

/// Blocks `ids` as one chain.
pub fn chain(ids: impl IntoIterator<Item = u64>, block_bytes: u32) -> Vec<PutBlock> {
    let mut parent = None;
    ids.into_iter()
        .map(|id| {
            let hash = replay::sequence_hash(id);
            let bytes = replay::content(id, block_bytes as usize);
            PutBlock { hash: hash.clone(), parent: parent.replace(hash), bytes }
        })
        .collect()
}

/// A layout with dimensions: 4 layers of keys and values, 2 heads of 8 bytes, 16 tokens, on a shard.
pub fn sharded_layout(index: u32, count: u32) -> Layout {
    let group = LayerGroup {
        kind: BlockKind::Attention.into(),
        layers: 4,
        planes: 2,
        heads: 2,
        head_bytes: 8,
        order: DimensionOrder::LayerPlaneHeadToken.into(),
        ..LayerGroup::default()
    };
    Layout {
        model: Bytes::from_static(b"sharded"),
        dtype: "bfloat16".into(),
        block_tokens: 16,
        groups: vec![group],
        shard: Some(kvstore_client::v1::Shard { index, count }),
        ..Layout::default()
    }
}

/// The identity in the stored sample of a frame.
pub fn sample_identity() -> kvstore_transfer::frame::FrameIdentity {
    kvstore_transfer::frame::FrameIdentity {
        namespace_digest: [1; 32],
        layout_digest: [2; 32],
        group: 3,
        kind: 1,
        hash: ([4; 32], 32),
        parent: ([5; 32], 20),
    }
}

/// Bytes of disk that a folder takes. Files that go while it is looked at count nothing.
pub fn disk_use(folder: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => disk_use(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}
