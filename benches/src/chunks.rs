//! Chunks of snapshots on their way through a daemon, and beside its blocks: a prewarm from an S3 server beside plain ranged requests of
//! the same client, the latency of a block on disk while a prewarm runs at full speed, and the CPU time of a restore beside that of its
//! bytes' copy and digests.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kvstore::replay;
use kvstore_client::v1::{BlockKind, Level, PrewarmSnapshotRequest, PrewarmTier, PutStatus};
use kvstore_client::{Client, GroupRef, Plane, PutOptions, PutSlice};
use kvstore_tests::s3;
use object_store::{ObjectStore, ObjectStoreExt};

use crate::figure::{self, median};
use crate::local::hashes;
use crate::object::{self, AT_ONCE, REQUEST};
use crate::process::{Process, own_cpu_seconds};

/// Bytes of a folder that is saved.
const FOLDER: u64 = 2 << 30;
/// Files of it.
const FILES: u64 = 16;
/// Bytes of a block of KV.
const BLOCK: usize = 256 << 10;
/// Blocks that are read with nothing beside them; as many more are there to be read beside a prewarm.
const READS: usize = 2000;

/// Measures the group; `disk` is a folder on the disk that is measured.
pub fn measure(daemon: &Path, disk: &Path, rounds: usize) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let folder = tempfile::tempdir_in(disk)?;
    let disk = Disk { daemon, folder: std::path::absolute(folder.path())? };
    disk.make_source()?;
    runtime.block_on(from_s3(&disk, rounds))?;
    let url = format!("file://{}", disk.path("store")?.display());
    disk.save(&url, &[])?;
    runtime.block_on(beside_demand(&disk, &url, rounds))?;
    cpu_of_restores(&disk, &url, rounds)
}

struct Disk<'disk> {
    daemon: &'disk Path,
    folder: PathBuf,
}

impl Disk<'_> {
    /// A folder below, made where it is not there.
    fn path(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    fn make_source(&self) -> anyhow::Result<()> {
        let source = self.path("source")?;
        for at in 0..FILES {
            let mut file = std::fs::File::create(source.join(format!("part-{at:02}")))?;
            for piece in 0..FOLDER / FILES / (8 << 20) {
                file.write_all(&replay::content(at << 32 | piece, 8 << 20))?;
            }
        }
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.daemon);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn run(&self, mut command: Command) -> anyhow::Result<()> {
        let status = command.status().with_context(|| format!("cannot start {}", self.daemon.display()))?;
        anyhow::ensure!(status.success(), "{command:?} failed");
        Ok(())
    }

    fn save(&self, url: &str, options: &[String]) -> anyhow::Result<()> {
        let source = self.folder.join("source").display().to_string();
        let mut command = self.command(&[
            "snapshot",
            "save",
            &source,
            "--name",
            "m",
            "--store",
            url,
            "--compress",
            "nothing",
            "--json",
        ]);
        options.iter().for_each(|option| _ = command.args(["--option", option]));
        self.run(command)
    }

    /// A daemon whose memory is ready, and a client of it.
    async fn serve(&self, url: &str, options: &[String], settings: &[String]) -> anyhow::Result<(Process, Client)> {
        let socket = self.folder.join("chunks.sock");
        let address = format!("unix:{}", socket.display());
        let mut command = self.command(&["serve", "--listen", &address, "--set", "http.address=off"]);
        command.args(["--set", "log.level=error", "--set", &format!("snapshots.url={url}")]);
        if !options.is_empty() {
            command.args(["--set", &format!("snapshots.options={}", options.join(","))]);
        }
        settings.iter().for_each(|setting| _ = command.args(["--set", setting]));
        let _ = std::fs::remove_file(&socket);
        let process = Process::start(command, &socket)?;
        let client = Client::connect_over(&address, Plane::Local).await?;
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            let status = client.status().await?;
            let host = status.host.unwrap_or_default();
            if (host.bytes_ready + host.bytes_mapped) as f64 > 0.9 * host.bytes_max as f64 {
                return Ok((process, client));
            }
            anyhow::ensure!(Instant::now() < until, "the daemon's memory did not become ready");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn prewarm(client: &Client, tier: PrewarmTier) -> anyhow::Result<f64> {
    let request = PrewarmSnapshotRequest { snapshot: "m".into(), tier: tier.into(), ..Default::default() };
    let started = Instant::now();
    client.prewarm_snapshot(request, |_| ()).await?;
    Ok(started.elapsed().as_secs_f64())
}

/// A prewarm into memory, and plain ranged requests of the same objects, from a server in a process of its own.
async fn from_s3(disk: &Disk<'_>, rounds: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let (_server, address) = object::serve(folder.path())?;
    let at = object::url(address, "snapshots");
    let options: Vec<String> = at.options.iter().map(|(key, value)| format!("{key}={value}")).collect();
    disk.save(&at.url, &options)?;
    let mut ratios = Vec::new();
    let mut rates = Vec::new();
    for _ in 0..rounds {
        let memory = [format!("host.bytes={}B", FOLDER * 5 / 4), "nvme.paths=off".to_owned()];
        let (_daemon, client) = disk.serve(&at.url, &options, &memory).await?;
        let plain = plain_reads(&at).await?;
        let own = prewarm(&client, PrewarmTier::PrewarmMemory).await?;
        ratios.push(plain / own);
        rates.push(FOLDER as f64 / own / 1e9);
    }
    figure::print("chunks", "s3_prewarm_of_plain", median(ratios), ">= 0.9");
    figure::note("chunks", "s3_prewarm_gbps", median(rates));
    std::fs::remove_dir_all(folder.path().join(s3::BUCKET))?;
    Ok(())
}

/// Seconds of plain requests for all objects, as many at once as a prewarm makes. Only its own objects are in the bucket.
async fn plain_reads(at: &kvstore_tiers::object::ObjectUrl) -> anyhow::Result<f64> {
    let opened = at.open()?;
    let listed: Vec<_> = opened.store.list(Some(&opened.prefix.clone().join("snapshots"))).try_collect().await?;
    let chunks = listed.into_iter().filter(|one| one.location.as_ref().contains("/chunks/"));
    let started = Instant::now();
    let mut under_way = futures::stream::iter(chunks)
        .map(|one| {
            let store = Arc::clone(&opened.store);
            tokio::spawn(async move { store.get_range(&one.location, 0..one.size.min(REQUEST)).await })
        })
        .buffered(AT_ONCE);
    let mut bytes = 0;
    while let Some(got) = under_way.next().await {
        bytes += got??.len() as u64;
    }
    anyhow::ensure!(bytes == FOLDER, "{bytes} bytes of {FOLDER} were read");
    Ok(started.elapsed().as_secs_f64())
}

/// The latency of a block on disk, alone, and while a prewarm brings chunks from the same disk into memory.
async fn beside_demand(disk: &Disk<'_>, url: &str, rounds: usize) -> anyhow::Result<()> {
    let names = hashes(1, 4 * READS);
    let disk_folder = disk.path("nvme")?;
    let settings = [
        format!("host.bytes={}B", FOLDER * 7 / 4),
        format!("nvme.paths={}", disk_folder.display()),
        format!("nvme.bytes={}B", FOLDER * 3),
    ];
    {
        let (_daemon, client) = disk.serve(url, &[], &settings).await?;
        let group = register(&client).await?;
        let content = replay::content(1, BLOCK);
        for (at, hash) in names.iter().enumerate() {
            let before = at.checked_sub(1).and_then(|before| names.get(before));
            let parent = before.map(|name| name.as_ref());
            let block = [PutSlice { hash, parent, parts: &[&content] }];
            let options = PutOptions { level: Level::Local, ..PutOptions::default() };
            let put = client.put_from(&group, &block, options).await?;
            anyhow::ensure!(put.iter().all(|of| of.status() == PutStatus::Stored), "a block was not stored");
        }
        prewarm(&client, PrewarmTier::PrewarmDisk).await?;
    }
    let (mut ratios, mut rates, mut alone_ms) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (_daemon, client) = disk.serve(url, &[], &settings).await?;
        let group = register(&client).await?;
        let (first, rest) = names.split_at(READS);
        let alone = reads(&client, &group, first, || false).await?;
        let (done, is_done) =
            (Arc::new(std::sync::atomic::AtomicBool::new(false)), std::sync::atomic::Ordering::Relaxed);
        let running = tokio::spawn({
            let (done, client) = (
                Arc::clone(&done),
                Client::connect(&format!("unix:{}", disk.folder.join("chunks.sock").display())).await?,
            );
            async move {
                let seconds = prewarm(&client, PrewarmTier::PrewarmMemory).await;
                done.store(true, is_done);
                seconds
            }
        });
        let beside = reads(&client, &group, rest, || done.load(is_done)).await?;
        rates.push(FOLDER as f64 / running.await?? / 1e9);
        anyhow::ensure!(beside.len() >= 100, "only {} blocks were read beside a prewarm", beside.len());
        ratios.push(p99(&beside) / p99(&alone));
        alone_ms.push(p99(&alone) * 1e3);
    }
    figure::print("chunks", "demand_p99_beside_prewarm", median(ratios), "<= 1.5");
    figure::note("chunks", "demand_p99_alone_ms", median(alone_ms));
    figure::note("chunks", "prewarm_beside_demand_gbps", median(rates));
    std::fs::remove_dir_all(disk_folder)?;
    Ok(())
}

async fn register(client: &Client) -> anyhow::Result<GroupRef> {
    let layout = replay::layout("kvstore chunks", BLOCK as u32, BlockKind::Attention);
    Ok(client.register_layout(layout).await?.group(0))
}

/// Seconds of each read, until all were read or `ends`.
async fn reads(
    client: &Client,
    group: &GroupRef,
    names: &[Bytes],
    ends: impl Fn() -> bool,
) -> anyhow::Result<Vec<f64>> {
    let mut taken = Vec::with_capacity(names.len());
    for name in names {
        if ends() {
            break;
        }
        let started = Instant::now();
        let got = client.get(group, std::slice::from_ref(name)).await?;
        anyhow::ensure!(got.iter().all(|one| one.bytes().is_some()), "a block is not there");
        taken.push(started.elapsed().as_secs_f64());
    }
    Ok(taken)
}

fn p99(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() * 99 / 100).copied().unwrap_or(f64::NAN)
}

/// CPU seconds of processes that have ended and were waited for.
fn children_cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 16 and 17, counted behind the process's name, which ends with ')'.
    let ticks: u64 = stat
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split(' ').skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum())
        .unwrap_or(0);
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// The CPU time of a restore, less that of a copy of the same files, beside that of their digests.
fn cpu_of_restores(disk: &Disk<'_>, url: &str, rounds: usize) -> anyhow::Result<()> {
    let mut ratios = Vec::new();
    let piece = replay::content(3, 8 << 20);
    for _ in 0..rounds {
        let to = tempfile::tempdir_in("/dev/shm")?;
        let target = to.path().join("m").display().to_string();
        let before = children_cpu_seconds();
        disk.run(disk.command(&["snapshot", "restore", "m", &target, "--store", url, "--json"]))?;
        let restored = children_cpu_seconds();
        std::fs::remove_dir_all(&target)?;
        let mut copy = Command::new("cp");
        copy.arg("-r").arg(disk.folder.join("source")).arg(&target);
        disk.run(copy)?;
        let copied = children_cpu_seconds();
        let own = own_cpu_seconds();
        for _ in 0..FOLDER / (8 << 20) {
            std::hint::black_box(blake3::hash(&piece));
        }
        ratios.push(((restored - before) - (copied - restored)) / (own_cpu_seconds() - own));
    }
    figure::print("chunks", "restore_cpu_beyond_copy_of_blake3", median(ratios), "<= 1.1");
    Ok(())
}
