//! The prefix index beside Dynamo's (dynamo-kv-router 1.6.1: its compressed concurrent radix tree, and its positional index): the
//! same events and the same queries of two traces, in one process, by turns.
//!
//! `kvstore-router-peers CONVERSATIONS AGENTS [ROUNDS [SETTING [PARTS]]]` prints figures, medians over the rounds; of one setting where it is
//! named, and of that, for a profile, only some parts: `opaque,events,ours`.
//! `make bench-router` hands them to `benches/figures.py`, which keeps them.

mod memory;
mod peers;
mod speed;
mod workload;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::Context;
use speed::Only;
use workload::Workload;

/// As kvstore-router has it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Instead of a trace: bytes alone, and those of one peer after the agents' trace.
const MEMORY: &str = "memory";
const MEMORY_OF: &str = "memory-of";

/// What is measured with one trace.
struct Setting {
    name: &'static str,
    of_agents: bool,
    workers: usize,
    /// Blocks that an engine has room for.
    capacity: usize,
    /// Each block of the trace is cut into so many.
    parts: u64,
    /// Tenants who make the trace's requests at once.
    copies: u64,
}

/// The conversation trace in its own blocks, of 512 tokens, and in blocks of 32; the agents' in its own, of 64, and in blocks of 16.
/// Engines have room for a million tokens of the agents' where there are 64, and for a quarter where there are a thousand.
const SETTINGS: [Setting; 8] = [
    Setting { name: "blocks_of_512", of_agents: false, workers: 64, capacity: 20_000, parts: 1, copies: 16 },
    Setting { name: "blocks_of_32", of_agents: false, workers: 64, capacity: 20_000, parts: 16, copies: 1 },
    Setting { name: "agents_64", of_agents: true, workers: 64, capacity: 16_384, parts: 1, copies: 1 },
    Setting { name: "agents_16", of_agents: true, workers: 64, capacity: 65_536, parts: 4, copies: 1 },
    Setting { name: "of_1000_blocks_of_512", of_agents: false, workers: 1000, capacity: 1280, parts: 1, copies: 16 },
    Setting { name: "of_1000_blocks_of_32", of_agents: false, workers: 1000, capacity: 1280, parts: 16, copies: 1 },
    Setting { name: "of_1000_agents_64", of_agents: true, workers: 1000, capacity: 4096, parts: 1, copies: 1 },
    Setting { name: "of_1000_agents_16", of_agents: true, workers: 1000, capacity: 16_384, parts: 4, copies: 1 },
];

/// Of which bytes a pair are counted.
const OF_MEMORY: &str = "agents_64";

impl Setting {
    fn workload(&self, conversations: &str, agents: &str) -> anyhow::Result<Workload> {
        let trace = Path::new(if self.of_agents { agents } else { conversations });
        let workload = Workload::read(trace, self.workers, self.capacity, self.parts, self.copies)?;
        eprintln!("{}: {workload}", self.name);
        Ok(workload)
    }
}

/// In a process of its own: what one gave back must not be counted as the next one's, nor slow it down.
fn alone(arguments: &[&str]) -> anyhow::Result<()> {
    let run = Command::new(std::env::current_exe()?).args(arguments).status()?;
    anyhow::ensure!(run.success(), "the measurement of memory ended with {run}");
    Ok(())
}

/// What one peer takes after the agents' trace, in a process of its own.
fn bytes_a_pair(kind: &str, peer: &str, agents: &str) -> anyhow::Result<f64> {
    let run = Command::new(std::env::current_exe()?).args([MEMORY_OF, kind, peer, agents]).output()?;
    let bytes: f64 = String::from_utf8_lossy(&run.stdout).trim().parse().context("no bytes were measured")?;
    println!("figure router.{OF_MEMORY}_{kind}_bytes_a_pair_{peer} {bytes:.1} target none");
    Ok(bytes)
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(1).build()?);
    if let [MEMORY] = arguments[..] {
        memory::run(&runtime);
        return Ok(());
    }
    if let [MEMORY_OF, kind, peer, agents] = arguments[..] {
        let setting = SETTINGS.iter().find(|setting| setting.name == OF_MEMORY).context("no such setting")?;
        println!("{}", memory::of_trace(&setting.workload(agents, agents)?, kind, peer, &runtime));
        return Ok(());
    }
    let [conversations, agents, ref rest @ ..] = arguments[..] else {
        anyhow::bail!("usage: kvstore-router-peers CONVERSATIONS AGENTS [ROUNDS [SETTING [PARTS]]]")
    };
    let rounds = rest.first().map_or(Ok(3), |rounds| rounds.parse())?;
    let only = rest.get(1).copied();
    let parts = Only::of(rest.get(2).copied().unwrap_or_default());
    println!("about router: {rounds} rounds");
    if only.is_none_or(|only| only == MEMORY) {
        alone(&[MEMORY])?;
        for (kind, _) in peers::KINDS {
            let of = |peer| bytes_a_pair(kind, peer, agents);
            println!(
                "figure router.{OF_MEMORY}_{kind}_bytes_a_pair_of_tree {:.2} target <= 0.5",
                of("ours")? / of("radix")?
            );
        }
    }
    for setting in SETTINGS.iter().filter(|setting| only.is_none_or(|only| only == setting.name)) {
        speed::run(setting.name, &setting.workload(conversations, agents)?, &runtime, rounds, &parts);
    }
    Ok(())
}
