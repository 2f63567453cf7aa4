//! Measures the project's figures: `make bench`, or `make bench FIGURES=grpc` for one group.
//!
//! Each figure is one line on standard output, `figure <group>.<name> <value> target <op> <value>`: the median of paired,
//! interleaved rounds. A process measures one group, so that no group finds memory that another group left behind.
//! `benches/figures.py record` starts the process and keeps its lines.

mod advise;
mod bare;
mod chunks;
mod eviction;
mod figure;
mod first_pass;
mod grpc;
mod idle;
mod index;
mod local;
mod locks;
mod long;
mod nvme;
mod object;
mod outside;
mod overcommit;
mod process;
mod prompts;
mod relay;
mod restart;
mod routing;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measure the figures of one group.
#[derive(Parser)]
struct Arguments {
    /// The group: grpc, index, eviction, nvme, restart, local, long, locks, object, advise, routing, relay, prompts, idle, first_pass, outside or chunks.
    #[arg(long)]
    group: String,
    /// Rounds of each paired measurement.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// The trace for the eviction figures: the whole conversation trace of the Mooncake project.
    #[arg(long, default_value = "benches/traces/conversation_trace.jsonl")]
    trace: std::path::PathBuf,
    /// The trace of coding agents.
    #[arg(long, default_value = "benches/traces/agents.csv")]
    agents: std::path::PathBuf,
    /// A Python that has transformers, to measure beside it.
    #[arg(long)]
    python: Option<std::path::PathBuf>,
    /// A folder on the disk that is measured.
    #[arg(long, default_value = ".")]
    disk: std::path::PathBuf,
    /// The daemon's binary.
    #[arg(long, default_value = "kvstore")]
    daemon: std::path::PathBuf,
}

fn main() -> anyhow::Result<()> {
    if local::is_helper()? || object::is_helper()? || bare::is_helper()? {
        return Ok(());
    }
    let arguments = Arguments::parse();
    match arguments.group.as_str() {
        "grpc" => grpc::measure(&arguments.daemon, arguments.rounds),
        "index" => index::measure(arguments.rounds),
        "eviction" => eviction::measure(&arguments.trace, &arguments.agents, arguments.rounds),
        "nvme" => nvme::measure(&arguments.disk, arguments.rounds),
        "restart" => restart::measure(&arguments.daemon, &arguments.disk, &arguments.trace),
        "local" => local::measure(&arguments.daemon, arguments.rounds),
        "long" => long::measure(&arguments.daemon, arguments.rounds),
        "locks" => locks::measure(arguments.rounds),
        "object" => {
            object::measure(arguments.rounds)?;
            overcommit::measure(&arguments.disk, &arguments.trace)
        }
        "advise" => advise::measure(&arguments.daemon, &arguments.trace, arguments.rounds),
        "relay" => relay::measure(&arguments.daemon),
        "routing" => routing::measure(&arguments.trace, arguments.rounds),
        "prompts" => prompts::measure(&arguments.agents, arguments.python.as_ref(), arguments.rounds),
        "idle" => idle::measure(&arguments.daemon, &arguments.disk),
        "first_pass" => first_pass::measure(&arguments.daemon, arguments.rounds),
        "chunks" => chunks::measure(&arguments.daemon, &arguments.disk, arguments.rounds),
        "outside" => outside::measure(&arguments.daemon, arguments.rounds),
        other => {
            let valid = "grpc, index, eviction, nvme, restart, local, long, locks, object, advise, routing, relay, prompts, idle, first_pass, outside, chunks";
            anyhow::bail!("unknown group {other:?}: valid are {valid}")
        }
    }
}
