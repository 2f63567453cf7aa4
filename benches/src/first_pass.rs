//! The first pass through a daemon's memory, beside puts that push out what was there: the system clears each page before its first
//! use.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kvstore::replay;
use kvstore_client::v1::{BlockKind, PutStatus};
use kvstore_client::{Client, Plane, PutOptions, PutSlice};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::figure::{self, median};
use crate::local::{hashes, seconds};
use crate::process::Process;

const BLOCK_BYTES: usize = 1 << 20;
/// A pass: what the daemon's memory has room for, and a little less.
const BLOCKS: usize = 4000;
/// How long the daemon has nothing to do before some of the passes.
const IDLE: Duration = Duration::from_secs(10);

/// GB/s of the first pass, and of the one after it, over the local plane, with one call at a time.
fn passes(daemon: &Path, idle: Option<Duration>) -> anyhow::Result<[f64; 2]> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("first.sock");
    let mut command = Command::new(daemon);
    command.args(["serve", "--host-bytes", "4GiB", "--set", "nvme.paths=off", "--set", "http.address=off"]);
    command.arg("--listen").arg(format!("unix:{}", socket.display()));
    let _server = Process::start(command, &socket)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = runtime.block_on(Client::connect_over(&format!("unix:{}", socket.display()), Plane::Local))?;
    let layout = replay::layout("kvstore first pass", BLOCK_BYTES as u32, BlockKind::Attention);
    let group = runtime.block_on(client.register_layout(layout))?.group(0);
    let content = replay::content(1, BLOCK_BYTES);
    let pass = |chain: u64| {
        let names = hashes(chain, BLOCKS);
        let taken = seconds(|| {
            for hash in &names {
                let block = [PutSlice { hash, parent: None, parts: &[&content] }];
                let stored = runtime.block_on(client.put_from(&group, &block, PutOptions::default()))?;
                anyhow::ensure!(stored.iter().all(|of| of.status() == PutStatus::Stored), "a block was not stored");
            }
            Ok(())
        })?;
        anyhow::Ok((BLOCKS * BLOCK_BYTES) as f64 / taken / 1e9)
    };
    if let Some(idle) = idle {
        std::thread::sleep(idle);
    }
    Ok([pass(1)?, pass(2)?])
}

/// GB/s at which a process gets as much memory, in huge pages where the system has them: the second of two turns.
fn touch() -> anyhow::Result<f64> {
    let bytes = BLOCKS * BLOCK_BYTES;
    let turn = || {
        seconds(|| {
            // SAFETY: a fresh mapping; it aliases nothing of ours.
            let memory = unsafe {
                rustix::mm::mmap_anonymous(
                    std::ptr::null_mut(),
                    bytes,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE,
                )
            }?;
            for advice in [Advice::LinuxHugepage, Advice::LinuxPopulateWrite] {
                // SAFETY: advice on our own mapping, that nothing uses.
                unsafe { rustix::mm::madvise(memory, bytes, advice) }?;
            }
            // SAFETY: the mapping from above, unmapped once.
            Ok(unsafe { rustix::mm::munmap(memory, bytes) }?)
        })
    };
    turn()?;
    Ok(bytes as f64 / turn()? / 1e9)
}

/// Measures the group.
pub fn measure(daemon: &Path, rounds: usize) -> anyhow::Result<()> {
    let (mut after_idle, mut at_once, mut firsts, mut steadies, mut touches) =
        <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    for _ in 0..rounds {
        // Where the machine is virtual, memory that was free for seconds is its host's again, which takes longer to give it back than
        // the system takes to clear it. That is the same for whoever asks for it, and is kept out of both passes.
        touch()?;
        let [first, steady] = passes(daemon, Some(IDLE))?;
        after_idle.push(first / steady);
        firsts.push(first);
        steadies.push(steady);
        touches.push(touch()?);
        let [first, steady] = passes(daemon, None)?;
        at_once.push(first / steady);
        firsts.push(first);
        steadies.push(steady);
    }
    figure::print("first_pass", "after_idle_of_steady", median(after_idle), ">= 0.85");
    figure::print("first_pass", "at_once_of_steady", median(at_once), ">= 0.6");
    figure::note("first_pass", "gbps", median(firsts));
    figure::note("first_pass", "touch_gbps", median(touches));
    figure::note("first_pass", "steady_gbps", median(steadies));
    Ok(())
}
