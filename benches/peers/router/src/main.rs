//! The prefix index beside Dynamo's (dynamo-kv-router 1.6.1: its compressed concurrent radix tree, and its positional index): the
//! same events and the same queries of one trace, in one process, by turns.
//!
//! `kvstore-router-peers TRACE [ROUNDS]` prints figures, medians over the rounds. `make bench-router` hands them to
//! `benches/figures.py`, which keeps them.

mod memory;
mod peers;
mod speed;
mod workload;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;

/// As kvstore-router has it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Instead of a trace: bytes alone.
const MEMORY: &str = "memory";

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let trace = arguments.next().context("usage: kvstore-router-peers TRACE [ROUNDS]")?;
    let rounds = arguments.next().map_or(Ok(3), |rounds| rounds.parse())?;
    let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(1).build()?);
    if trace == MEMORY {
        memory::run(&runtime);
        return Ok(());
    }
    println!("about router: {rounds} rounds");
    let trace = PathBuf::from(trace);
    // In a process of its own: what one gave back must not be counted as the next one's, nor slow it down.
    let run = std::process::Command::new(std::env::current_exe()?).arg(MEMORY).status()?;
    anyhow::ensure!(run.success(), "the measurement of memory ended with {run}");
    // The trace's own blocks, of 512 tokens; and blocks of 32, as engines have them.
    for (kind, parts, copies) in [("blocks_of_512", 1, 16), ("blocks_of_32", 16, 1)] {
        let workload = workload::Workload::read(&trace, 64, 1250 * parts * copies, parts as u64, copies as u64)?;
        eprintln!("{kind}: {workload}");
        speed::run(kind, &workload, &runtime, rounds);
    }
    Ok(())
}
