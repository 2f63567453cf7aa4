//! Coming back from kill -9, the memory that a full disk costs, and what a trace writes to the device.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvstore::replay::{self, Drive, drive};
use kvstore::trace;
use kvstore_client::v1::{BlockKind, LookupRequest};
use kvstore_client::{Client, GroupRef};
use kvstore_tests::tier::{TierOptions, Tiers};
use kvstore_tests::{chain, disk_use, hashes};

use crate::figure::{self, median};

/// Bytes of a small block: with its frame's header one page.
const SMALL_BLOCK: u32 = 3000;
/// Bytes of a block of the trace.
const TRACE_BLOCK: u32 = 64 << 10;
const STARTS: usize = 5;

/// Measures the group; `folder` is on the file system to be measured.
pub fn measure(daemon: &Path, folder: &Path, trace: &Path) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(folder)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    for (blocks, name, seconds) in [(200_000u64, "200k", "< 2"), (1_000_000, "1m", "none"), (2_000_000, "2m", "< 5")] {
        let disk = folder.path().join(name);
        fill(&disk, blocks)?;
        let (ready, hit, rss) = runtime.block_on(restarts(daemon, folder.path(), &disk, blocks))?;
        figure::print("restart", &format!("ready_seconds_{name}"), ready, seconds);
        figure::print("restart", &format!("first_hit_seconds_{name}"), hit, seconds);
        let target = if blocks == 1_000_000 { "< 150" } else { "none" };
        figure::print("restart", &format!("rss_mib_{name}"), rss as f64 / f64::from(1 << 20), target);
        std::fs::remove_dir_all(&disk)?;
    }
    for (name, pinned, target) in [("", false, "<= 1.3"), ("_tenth_pinned", true, "<= 1.5")] {
        let disk = folder.path().join(format!("trace{name}"));
        let run = runtime.block_on(overcommitted(daemon, folder.path(), &disk, trace, pinned))?;
        figure::print("restart", &format!("device_bytes_per_admitted{name}"), run.amplification, target);
        figure::print("restart", &format!("disk_use_of_bound{name}"), run.disk_of_bound, "<= 1");
        figure::note("restart", &format!("hit_ratio{name}"), run.hit_ratio);
        figure::print("restart", &format!("wrong_bytes{name}"), run.wrong_bytes as f64, "<= 0");
        std::fs::remove_dir_all(&disk)?;
    }
    Ok(())
}

fn disk_bytes(blocks: u64) -> (u64, u64) {
    // A page a block, the index's reservation for each, and a segment or two.
    let index = (blocks * kvstore_tiers::caps::NVME_INDEX_BYTES_PER_BLOCK * 11 / 10).max(32 << 20);
    (blocks * 4096 * 11 / 10 + index + (1 << 30), index)
}

fn fill(disk: &Path, blocks: u64) -> anyhow::Result<()> {
    let (nvme_bytes, index_bytes) = disk_bytes(blocks);
    let options = TierOptions {
        block_bytes: SMALL_BLOCK,
        host_bytes: 256 << 20,
        nvme_bytes,
        index_bytes: Some(index_bytes),
        ..TierOptions::default()
    };
    let tiers = Tiers::open(disk, &options)?;
    let content = replay::content(0, SMALL_BLOCK as usize);
    for id in 0..blocks {
        // The first block is the one that is asked for: its bytes are its own.
        let put = if id == 0 { tiers.put(id, false) } else { tiers.put_bytes(id, &content, false) };
        anyhow::ensure!(put, "block {id} was refused");
        while id % 64 == 0 && !tiers.nvme.has_dirty_room() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    tiers.settle();
    tiers.close();
    Ok(())
}

/// A daemon in a process of its own.
struct Served {
    child: Child,
    address: String,
}

impl Served {
    fn spawn(daemon: &Path, folder: &Path, settings: &[String]) -> anyhow::Result<Self> {
        let address = format!("unix:{}", folder.join("restart.sock").display());
        let mut command = Command::new(daemon);
        command.args(["serve", "--listen", &address, "--set", "http.address=off", "--set", "log.level=error"]);
        settings.iter().for_each(|setting| _ = command.args(["--set", setting]));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("cannot start the daemon")?;
        Ok(Self { child, address })
    }

    /// Waits until it answers.
    async fn client(&self) -> anyhow::Result<Client> {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Ok(client) = Client::connect(&self.address).await
                && client.status().await.is_ok()
            {
                return Ok(client);
            }
            anyhow::ensure!(Instant::now() < until, "the daemon does not answer");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap_or_default()
    }

    /// A number of a file in /proc, behind its name.
    fn number(&self, file: &str, name: &str) -> u64 {
        let text = self.proc(file);
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts, kills with -9, starts again: seconds until it answers, until a block was read, and its memory then.
async fn restarts(daemon: &Path, folder: &Path, disk: &Path, blocks: u64) -> anyhow::Result<(f64, f64, u64)> {
    let (nvme_bytes, index_bytes) = disk_bytes(blocks);
    let settings = [
        format!("nvme.paths={}", std::path::absolute(disk)?.display()),
        format!("nvme.bytes={nvme_bytes}"),
        format!("nvme.index_bytes={index_bytes}"),
        "host.bytes=64MiB".into(),
    ];
    let (mut ready, mut hit, mut rss) = (Vec::new(), Vec::new(), 0);
    for start in 0..=STARTS {
        let started = Instant::now();
        let served = Served::spawn(daemon, folder, &settings)?;
        let client = served.client().await?;
        let ready_after = started.elapsed().as_secs_f64();
        let layout = replay::layout("tiers", SMALL_BLOCK, BlockKind::Attention);
        let group = client.register_layout(layout).await?.group(0);
        let found = lookup(&client, &group, blocks - 1).await?;
        anyhow::ensure!(found == 1, "the last block is not found");
        let got = client.get(&group, &hashes([0])).await?;
        let bytes = got.first().and_then(|outcome| outcome.bytes().cloned()).context("the first block is a miss")?;
        anyhow::ensure!(replay::wrong_bytes(0, &bytes) == 0, "wrong bytes");
        // The first start follows an orderly end, the others kill -9.
        if start > 0 {
            ready.push(ready_after);
            hit.push(started.elapsed().as_secs_f64());
        }
        rss = served.number("status", "VmRSS:") * 1024;
    }
    Ok((median(ready), median(hit), rss))
}

async fn lookup(client: &Client, group: &GroupRef, id: u64) -> anyhow::Result<u32> {
    let request = LookupRequest {
        layout_digest: group.layout_digest.clone(),
        sequence_hashes: hashes([id]),
        ..LookupRequest::default()
    };
    Ok(client.lookup(request).await?.readable_blocks)
}

struct Overcommitted {
    amplification: f64,
    disk_of_bound: f64,
    hit_ratio: f64,
    wrong_bytes: u64,
}

/// The whole trace through a disk of a quarter of its distinct blocks, every byte checked.
async fn overcommitted(
    daemon: &Path,
    folder: &Path,
    disk: &Path,
    trace: &Path,
    pinned: bool,
) -> anyhow::Result<Overcommitted> {
    let trace = trace::read(trace)?;
    let distinct: std::collections::HashSet<u64> = trace.iter().flat_map(|request| request.blocks.clone()).collect();
    let nvme_bytes = distinct.len() as u64 * u64::from(TRACE_BLOCK) / 4;
    let settings = [
        format!("nvme.paths={}", std::path::absolute(disk)?.display()),
        format!("nvme.bytes={nvme_bytes}"),
        "host.bytes=512MiB".into(),
    ];
    let served = Served::spawn(daemon, folder, &settings)?;
    let client = served.client().await?;
    if pinned {
        pin_a_tenth(&client, nvme_bytes).await?;
    }
    let (stop, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let watcher = {
        let (stop, most, disk) = (Arc::clone(&stop), Arc::clone(&most), disk.to_owned());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                most.fetch_max(disk_use(&disk), Ordering::AcqRel);
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    };
    let options = Drive { block_bytes: TRACE_BLOCK, speed: None, verify: true };
    let report = drive(&client, &trace, options, |_| {}).await?;
    // What is still dirty, and the index's last merge, count too.
    tokio::time::sleep(Duration::from_secs(3)).await;
    stop.store(true, Ordering::Release);
    let _ = watcher.join();
    let status = client.status().await?.nvme.context("no Nvme tier")?;
    let admitted: u64 = status.volumes.iter().map(|volume| volume.admitted_bytes).sum();
    let written = served.number("io", "write_bytes:");
    Ok(Overcommitted {
        amplification: written as f64 / admitted as f64,
        disk_of_bound: most.load(Ordering::Acquire) as f64 / nvme_bytes as f64,
        hit_ratio: report.hit_ratio,
        wrong_bytes: report.wrong_bytes,
    })
}

async fn pin_a_tenth(client: &Client, nvme_bytes: u64) -> anyhow::Result<()> {
    let group = client.register_layout(replay::layout("pinned", TRACE_BLOCK, BlockKind::Attention)).await?.group(0);
    let blocks = nvme_bytes / 10 / u64::from(TRACE_BLOCK);
    for first in (0..blocks).step_by(256) {
        let ids = first..(first + 256).min(blocks);
        client.put(&group, chain(ids.clone(), TRACE_BLOCK)).await?;
        let count = ids.end - ids.start;
        let mut pin = client.pin(&group, &hashes(ids.clone()), 3_600_000).await;
        // In memory only half may be pinned; on disk they are soon.
        while pin.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            pin = client.pin(&group, &hashes(ids.clone()), 3_600_000).await;
        }
        anyhow::ensure!(u64::from(pin?.pinned_blocks) == count, "not all were pinned");
    }
    Ok(())
}
