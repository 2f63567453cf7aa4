//! What peers that do no more than they must cost others: connections that say nothing, and readers that read nothing;
//! and what a disk that is full costs a restart.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvstore::replay;
use kvstore_client::v1::{BlockKind, GetRequest, Level, PutStatus};
use kvstore_client::{Client, GroupRef, Plane, PutOptions};
use kvstore_proto::data_stream;
use kvstore_tests::chain;
use kvstore_tests::loop_mount::LoopMount;

use crate::figure::{self, median};
use crate::process::{Process, resident_bytes};

const SILENT: usize = 10_000;
const NEWCOMERS: usize = 1000;
const READERS: usize = 100;
const BLOCK: u32 = 64 << 10;
const BLOCKS: u64 = 512;
/// Gets of one round.
const GETS: usize = 20;
/// Restarts of each kind in a round.
const RESTARTS: usize = 3;

struct Daemon {
    process: Process,
    socket: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

impl Daemon {
    fn start(daemon: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("outside.sock");
        let mut command = Command::new(daemon);
        command.args(["serve", "--host-bytes", "256MiB", "--set", "http.address=off", "--set", "nvme.paths=off"]);
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        Ok(Self { process: Process::start(command, &socket)?, socket, _folder: folder })
    }

    async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect_over(&format!("unix:{}", self.socket.display()), Plane::Grpc).await?)
    }
}

/// Measures the group.
pub fn measure(daemon: &Path, rounds: usize) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(silent(daemon))?;
    runtime.block_on(unread(daemon, rounds))?;
    runtime.block_on(full_disk(daemon, rounds))
}

/// Newcomers beside connections that say nothing. Those that the daemon closes come back.
async fn silent(daemon: &Path) -> anyhow::Result<()> {
    let daemon = Daemon::start(daemon)?;
    let newcomer = async || {
        let begun = Instant::now();
        daemon.client().await?.status().await?;
        anyhow::Ok(begun.elapsed().as_secs_f64() * 1e3)
    };
    let mut alone = Vec::new();
    for _ in 0..NEWCOMERS {
        alone.push(newcomer().await?);
    }
    let before = resident_bytes(daemon.process.id());
    let socket = daemon.socket.clone();
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let crowd = tokio::task::spawn_blocking(move || {
        let mut silent: Vec<UnixStream> = (0..SILENT).filter_map(|_| UnixStream::connect(&socket).ok()).collect();
        let all = silent.len();
        let mut at = 0;
        while stopped.try_recv().is_err() {
            // A thousand a second: each that is replaced was closed long ago.
            if let (Some(one), Ok(next)) = (silent.get_mut(at), UnixStream::connect(&socket)) {
                *one = next;
            }
            at = (at + 1) % all.max(1);
            std::thread::sleep(Duration::from_millis(1));
        }
        all
    });
    // Until all of them have connected: the daemon takes them one after the other.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut beside = Vec::new();
    for _ in 0..NEWCOMERS {
        beside.push(newcomer().await?);
    }
    let grown = resident_bytes(daemon.process.id()) - before;
    let _ = stop.send(());
    let crowd = crowd.await?;
    anyhow::ensure!(crowd == SILENT, "only {crowd} connections were made: raise the limit on descriptors");
    figure::print("outside", "newcomer_p99_ms", percentile(&mut beside, 99), "<= 100");
    figure::note("outside", "newcomer_alone_p99_ms", percentile(&mut alone, 99));
    figure::print("outside", "silent_resident_mib", grown / f64::from(1 << 20), "<= 100");
    Ok(())
}

fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() * percent / 100).copied().unwrap_or(f64::NAN)
}

/// Gets beside readers that asked for all blocks and read nothing.
async fn unread(daemon: &Path, rounds: usize) -> anyhow::Result<()> {
    let daemon = Daemon::start(daemon)?;
    let client = daemon.client().await?;
    let group = client.register_layout(replay::layout("outside", BLOCK, BlockKind::Attention)).await?.group(0);
    client.put(&group, chain(0..BLOCKS, BLOCK)).await?;
    let mut ratios = Vec::new();
    let mut rates = Vec::new();
    for round in 0..=rounds {
        let alone = gets(&client, &group).await?;
        let mut readers = Vec::new();
        for _ in 0..READERS {
            readers.push(reader(&daemon.socket, &group).await?);
        }
        let beside = gets(&client, &group).await?;
        drop(readers);
        // Until the daemon has seen them go.
        tokio::time::sleep(Duration::from_millis(100)).await;
        // The first round warms up.
        if round > 0 {
            ratios.push(beside / alone);
            rates.push(beside);
        }
    }
    figure::print("outside", "gets_beside_unread", median(ratios), ">= 0.9");
    figure::note("outside", "gets_beside_unread_gbps", median(rates) / 1e9);
    Ok(())
}

/// Bytes a second.
async fn gets(client: &Client, group: &GroupRef) -> anyhow::Result<f64> {
    let names = kvstore_tests::hashes(0..BLOCKS);
    let mut into = vec![vec![0; BLOCK as usize]; BLOCKS as usize];
    let begun = Instant::now();
    for _ in 0..GETS {
        let mut buffers: Vec<&mut [u8]> = into.iter_mut().map(Vec::as_mut_slice).collect();
        let got = client.get_into(group, &names, &mut buffers).await?;
        anyhow::ensure!(got == names.len(), "a block was not there");
    }
    Ok((GETS as u64 * BLOCKS * u64::from(BLOCK)) as f64 / begun.elapsed().as_secs_f64())
}

/// Asks for all blocks over a connection of its own, whose bytes nobody reads.
async fn reader(socket: &Path, group: &GroupRef) -> anyhow::Result<tokio::net::UnixStream> {
    use tokio::io::AsyncWriteExt;
    let mut stream = tokio::net::UnixStream::connect(socket).await?;
    let request = GetRequest {
        layout_digest: group.layout_digest.clone(),
        group: group.group,
        sequence_hashes: kvstore_tests::hashes(0..BLOCKS),
        ..GetRequest::default()
    };
    let message = data_stream::message(&request);
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    push_frame(&mut bytes, 4, 0, 0, &[]);
    push_frame(&mut bytes, 1, 4, 1, &headers());
    // 16 KiB are what a frame may have before the daemon's settings are known.
    for part in message.chunks(16 << 10) {
        push_frame(&mut bytes, 0, 0, 1, part);
    }
    push_frame(&mut bytes, 0, 1, 1, &[]);
    stream.write_all(&bytes).await?;
    Ok(stream)
}

fn push_frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u8, payload: &[u8]) {
    out.extend(payload.len().to_be_bytes().iter().skip(5));
    out.extend([kind, flags, 0, 0, 0, stream]);
    out.extend(payload);
}

/// A call's headers: POST and http from HPACK's static table, the others as texts.
fn headers() -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    let path = "/kvstore.v1.BlockData/Get";
    let texts = [(":path", path), (":authority", "kvstore"), ("content-type", "application/grpc"), ("te", "trailers")];
    for (name, value) in texts.into_iter().chain([("grpc-timeout", "600S")]) {
        block.push(0);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend(text.as_bytes());
        }
    }
    block
}

/// Restarts after kill -9 on a disk that is full to the last byte, and on the same disk with room: until the volume serves.
async fn full_disk(daemon: &Path, rounds: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(mount) = LoopMount::new(folder.path(), 700) else {
        eprintln!("restarts on a full disk are not measured: a loop file system needs root, mount and mkfs.ext4");
        return Ok(());
    };
    let socket = folder.path().join("full.sock");
    let address = format!("unix:{}", socket.display());
    let start = || -> anyhow::Result<Process> {
        let mut command = Command::new(daemon);
        command.args(["serve", "--host-bytes", "64MiB", "--set", "http.address=off", "--set", "nvme.bytes=256MiB"]);
        command.arg("--set").arg(format!("nvme.paths={}", mount.path().join("kvstore").display()));
        command.arg("--listen").arg(&address);
        Process::start(command, &socket)
    };
    {
        let _process = start()?;
        let client = Client::connect_over(&address, Plane::Grpc).await?;
        let group = client.register_layout(replay::layout("outside", BLOCK, BlockKind::Attention)).await?.group(0);
        let local = PutOptions { level: Level::Local, ..PutOptions::default() };
        for at in 0..32 {
            let stored = client.put_with(&group, chain(at * 48..(at + 1) * 48, BLOCK), local).await?;
            anyhow::ensure!(stored.iter().all(|of| of.status() == PutStatus::Stored), "a block was not stored");
        }
    }
    // Milliseconds of a restart that finds the log of a daemon that was killed.
    let restart = async || {
        let begun = Instant::now();
        let process = start()?;
        let client = Client::connect_over(&address, Plane::Grpc).await?;
        loop {
            let status = client.status().await?;
            let volume = status.nvme.and_then(|nvme| nvme.volumes.into_iter().next()).context("no volume")?;
            anyhow::ensure!(volume.state != "REBUILDING", "the volume is scanned: {}", volume.reason);
            if volume.state == "SERVING" || volume.state == "NO_SPACE" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let taken = begun.elapsed().as_secs_f64() * 1e3;
        // Until what runs in the background after a start is done.
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(process);
        anyhow::Ok(taken)
    };
    let (mut ratios, mut full_ms) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (mut roomy, mut full) = (Vec::new(), Vec::new());
        for _ in 0..RESTARTS {
            roomy.push(restart().await?);
            let ballast = mount.fill();
            full.push(restart().await?);
            std::fs::remove_file(ballast)?;
        }
        let (roomy, full) = (median(roomy), median(full));
        // The first round warms up.
        if round > 0 {
            ratios.push(full / roomy);
            full_ms.push(full);
        }
    }
    figure::print("outside", "restart_on_full_disk", median(ratios), "<= 1.5");
    figure::note("outside", "restart_on_full_disk_ms", median(full_ms));
    Ok(())
}
