//! The Nvme tier beside fio on the same file system, interleaved.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kvstore::replay;
use kvstore_tests::tier::{TierOptions, Tiers, hash};
use kvstore_tiers::nvme::BegunWrite;

use crate::figure::{self, median};
use crate::process::own_cpu_seconds;

/// Transfers at once.
const DEPTH: usize = 32;
/// Bytes of a round.
const ROUND_BYTES: u64 = 1 << 30;

/// One measured run.
#[derive(Clone, Copy)]
struct Run {
    gbps: f64,
    cpu_seconds_per_gb: f64,
}

/// Measures the group; `folder` is on the file system to be measured.
pub fn measure(folder: &Path, rounds: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(folder)?;
    for (name, block_bytes) in [("256KiB", 256u32 << 10), ("1MiB", 1 << 20), ("2MiB", 2 << 20)] {
        let (mut write, mut read, mut checked) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            let disk = folder.path().join(format!("tier-{name}-{round}"));
            // Who goes first takes turns.
            let (ours, fio_write) =
                alternate(round, || write_round(&disk, block_bytes), || fio(folder.path(), "write", block_bytes, &[]))?;
            write.push((ours, fio_write));
            let (ours, fio_read) =
                alternate(round, || read_round(&disk, block_bytes), || fio(folder.path(), "read", block_bytes, &[]))?;
            read.push((ours, fio_read));
            checked.push((ours, fio_checked(folder.path(), block_bytes)?));
            std::fs::remove_dir_all(&disk)?;
        }
        for (what, runs) in [("write", &write), ("read", &read)] {
            let of = |value: &dyn Fn(&(Run, Run)) -> f64| median(runs.iter().map(value).collect());
            let name = |suffix: &str| format!("{what}_{name}_{suffix}");
            figure::print("nvme", &name("of_fio"), of(&|(a, b)| a.gbps / b.gbps), ">= 0.90");
            let cpu = of(&|(a, b)| a.cpu_seconds_per_gb / b.cpu_seconds_per_gb);
            figure::print("nvme", &name("cpu_of_fio"), cpu, "<= 1.5");
            figure::note("nvme", &name("gbps"), of(&|(a, _)| a.gbps));
            figure::note("nvme", &name("cpu_seconds_per_gb"), of(&|(a, _)| a.cpu_seconds_per_gb));
        }
        let cpu = checked.iter().map(|(a, b): &(Run, Run)| a.cpu_seconds_per_gb / b.cpu_seconds_per_gb).collect();
        figure::note("nvme", &format!("read_{name}_cpu_of_fio_that_checks_crc32c"), median(cpu));
    }
    let mut local = Vec::new();
    for round in 0..rounds {
        let disk = folder.path().join(format!("local-{round}"));
        let synced = ["--fdatasync=32"];
        let (ours, peer) = alternate(round, || local_round(&disk), || fio(folder.path(), "write", 1 << 20, &synced))?;
        local.push((ours, peer));
        std::fs::remove_dir_all(&disk)?;
    }
    let ratio = median(local.iter().map(|(a, b)| a.gbps / b.gbps).collect());
    figure::print("nvme", "local_put_1MiB_of_fio_fdatasync", ratio, ">= 0.7");
    figure::note("nvme", "local_put_1MiB_gbps", median(local.iter().map(|(a, _)| a.gbps).collect()));
    Ok(())
}

fn alternate<A>(
    round: usize,
    mut ours: impl FnMut() -> anyhow::Result<A>,
    mut peer: impl FnMut() -> anyhow::Result<A>,
) -> anyhow::Result<(A, A)> {
    if round.is_multiple_of(2) {
        let ours = ours()?;
        return Ok((ours, peer()?));
    }
    let peer = peer()?;
    Ok((ours()?, peer))
}

fn options(block_bytes: u32) -> TierOptions {
    // All blocks of a round in memory, so that the disk is what is measured.
    let host_bytes = ROUND_BYTES + (512 << 20);
    TierOptions { block_bytes, host_bytes, nvme_bytes: 4 << 30, ..TierOptions::default() }
}

/// Blocks of a round in memory, then all of them written behind and synced: from the first to the sync's end.
fn write_round(disk: &Path, block_bytes: u32) -> anyhow::Result<Run> {
    let tiers = Tiers::open(disk, &options(block_bytes))?;
    let blocks = ROUND_BYTES / u64::from(block_bytes);
    for id in 0..blocks {
        anyhow::ensure!(tiers.put_in_memory(id), "no room in memory");
    }
    let (started, cpu) = (Instant::now(), own_cpu_seconds());
    for id in 0..blocks {
        let queued = tiers.nvme.begin_write(&tiers.block(id), None, Vec::new(), false);
        anyhow::ensure!(matches!(queued, BegunWrite::Queued(_)), "refused");
    }
    while tiers.nvme.dirty_bytes() > 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let run = run_of(started, cpu);
    tiers.close();
    Ok(run)
}

/// The same blocks from disk into an empty memory, checked: 32 at a time.
fn read_round(disk: &Path, block_bytes: u32) -> anyhow::Result<Run> {
    let host_bytes = ROUND_BYTES / 2;
    let tiers = Tiers::open(disk, &TierOptions { host_bytes, ..options(block_bytes) })?;
    let blocks = ROUND_BYTES / u64::from(block_bytes);
    // All memory is made and full beforehand, as in a daemon that has run for a while.
    for id in 0..blocks {
        anyhow::ensure!(tiers.put_in_memory(1_000_000 + id), "no room in memory");
    }
    // The kernel gets to know the slabs, as in such a daemon; these blocks have left again when their turn comes.
    read_blocks(&tiers, blocks / 2..blocks)?;
    let (started, cpu) = (Instant::now(), own_cpu_seconds());
    read_blocks(&tiers, 0..blocks)?;
    let run = run_of(started, cpu);
    tiers.close();
    Ok(run)
}

/// Reads blocks in order, up to 32 at a time, as a call of the daemon does.
fn read_blocks(tiers: &Tiers, blocks: std::ops::Range<u64>) -> anyhow::Result<()> {
    let missing = tiers.bring_all(blocks, DEPTH);
    anyhow::ensure!(missing == 0, "{missing} blocks were not read");
    Ok(())
}

/// LOCAL puts, 32 at once, from empty memory: copied, checksummed, written, synced, indexed.
fn local_round(disk: &Path) -> anyhow::Result<Run> {
    let tiers = Arc::new(Tiers::open(disk, &options(1 << 20))?);
    let blocks = ROUND_BYTES >> 20;
    // The bytes to be put, made beforehand.
    let content = replay::content(1, 1 << 20);
    for id in 0..blocks {
        anyhow::ensure!(tiers.put_in_memory(1_000_000 + id), "no room in memory");
    }
    for id in 0..blocks {
        tiers.host.delete(&tiers.layout, 0, &[hash(1_000_000 + id)]);
    }
    let (started, cpu) = (Instant::now(), own_cpu_seconds());
    let next = Arc::new(AtomicU64::new(0));
    let mut threads = Vec::new();
    for _ in 0..DEPTH {
        let (tiers, next, content) = (Arc::clone(&tiers), Arc::clone(&next), content.clone());
        threads.push(std::thread::spawn(move || {
            let mut failed = 0;
            loop {
                let id = next.fetch_add(1, Ordering::AcqRel);
                if id >= blocks {
                    return failed;
                }
                failed += u64::from(!tiers.put_bytes(id, &content, true));
            }
        }));
    }
    let failed: u64 = threads.into_iter().map(|thread| thread.join().unwrap_or(1)).sum();
    anyhow::ensure!(failed == 0, "{failed} puts did not become LOCAL");
    let run = run_of(started, cpu);
    tiers.nvme.close();
    Ok(run)
}

fn run_of(started: Instant, cpu: f64) -> Run {
    let gb = ROUND_BYTES as f64 / 1e9;
    Run { gbps: gb / started.elapsed().as_secs_f64(), cpu_seconds_per_gb: (own_cpu_seconds() - cpu) / gb }
}

/// Reads by a fio that checks a checksum too, of a file that it wrote with them.
fn fio_checked(folder: &Path, block_bytes: u32) -> anyhow::Result<Run> {
    let checked = folder.join("checked");
    std::fs::create_dir_all(&checked)?;
    if !checked.join(format!("fio-{block_bytes}")).exists() {
        fio(&checked, "write", block_bytes, &["--verify=crc32c", "--do_verify=0"])?;
    }
    fio(&checked, "read", block_bytes, &["--verify=crc32c"])
}

/// The same bytes by fio; without checksums, unless it is told.
fn fio(folder: &Path, direction: &str, block_bytes: u32, more: &[&str]) -> anyhow::Result<Run> {
    let file = folder.join(format!("fio-{block_bytes}"));
    if direction == "write" {
        // Like a fresh volume: no extent of the file is written yet.
        let _ = std::fs::remove_file(&file);
    }
    // Elsewhere: a run that verifies leaves a file where it was started.
    let file = std::path::absolute(file)?;
    let output = Command::new("fio")
        .current_dir(std::env::temp_dir())
        .args(["--name=peer", "--ioengine=io_uring", "--direct=1", "--iodepth=32", "--output-format=json"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={direction}"))
        .arg(format!("--bs={block_bytes}"))
        .arg(format!("--size={ROUND_BYTES}"))
        .args(more)
        .output()
        .context("fio does not start: install it (Debian and Ubuntu: fio)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let start = text.find('{').context("fio printed no JSON")?;
    let report: serde_json::Value = serde_json::from_str(text.get(start..).unwrap_or_default())?;
    let number = |path: &str| {
        let value = report.pointer(&format!("/jobs/0/{path}")).and_then(serde_json::Value::as_f64);
        value.with_context(|| format!("fio's report lacks {path}"))
    };
    let seconds = number(&format!("{direction}/runtime"))? / 1e3;
    let gb = number(&format!("{direction}/io_bytes"))? / 1e9;
    let cpu = (number("usr_cpu")? + number("sys_cpu")?) / 100.0 * number("job_runtime")? / 1e3;
    anyhow::ensure!(seconds > 0.0 && gb > 0.0, "fio moved nothing");
    Ok(Run { gbps: gb / seconds, cpu_seconds_per_gb: cpu / gb })
}
