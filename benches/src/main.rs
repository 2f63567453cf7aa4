//! The project's figures, measured: `make bench`, or `make bench FIGURES=grpc` for one group.
//!
//! Each figure is one line, `figure <group>.<name> <value> target <op> <value>`, the median of paired,
//! interleaved rounds. `--write` puts the lines, with command, machine and date, into `RESULTS.md`.

mod advise;
mod eviction;
mod figure;
mod grpc;
mod index;
mod local;
mod nvme;
mod object;
mod overcommit;
mod process;
mod restart;
mod routing;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Measure figures.
#[derive(Parser)]
struct Arguments {
    /// Groups, separated by commas: grpc, index, eviction, nvme, restart, local, object, advise, routing.
    #[arg(long, default_value = "grpc,index,eviction,nvme,restart,local,object,advise,routing", value_delimiter = ',')]
    figures: Vec<String>,
    /// Rounds of each paired measurement.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// The trace for the eviction figures: the whole conversation trace of the Mooncake project.
    #[arg(long, default_value = "benches/traces/conversation_trace.jsonl")]
    trace: std::path::PathBuf,
    /// A folder on the disk that is measured.
    #[arg(long, default_value = ".")]
    disk: std::path::PathBuf,
    /// The daemon's binary.
    #[arg(long, default_value = "kvstore")]
    daemon: std::path::PathBuf,
    /// Write the figures into this file, under the group's heading.
    #[arg(long)]
    write: Option<std::path::PathBuf>,
}

fn main() -> anyhow::Result<()> {
    if local::is_helper()? || object::is_helper()? {
        return Ok(());
    }
    let arguments = Arguments::parse();
    if arguments.figures.len() > 1 {
        return in_processes_of_their_own(&arguments.figures);
    }
    for group in &arguments.figures {
        let figures = match group.as_str() {
            "grpc" => grpc::measure(&arguments.daemon, arguments.rounds)?,
            "index" => index::measure(arguments.rounds)?,
            "eviction" => eviction::measure(&arguments.trace)?,
            "nvme" => nvme::measure(&arguments.disk, arguments.rounds)?,
            "restart" => restart::measure(&arguments.daemon, &arguments.disk, &arguments.trace)?,
            "local" => local::measure(&arguments.daemon, arguments.rounds)?,
            "object" => {
                let mut figures = object::measure(arguments.rounds)?;
                figures.extend(overcommit::measure(&arguments.disk, &arguments.trace)?);
                figures
            }
            "advise" => advise::measure(&arguments.daemon, &arguments.trace, arguments.rounds)?,
            "routing" => routing::measure(&arguments.trace, arguments.rounds)?,
            other => {
                let valid = "grpc, index, eviction, nvme, restart, local, object, advise, routing";
                anyhow::bail!("unknown group {other:?}: valid are {valid}")
            }
        };
        if let Some(path) = &arguments.write {
            figure::write(path, group, &figures)?;
        }
    }
    Ok(())
}

/// Runs each group in a process of its own, so that none finds what another left in memory.
fn in_processes_of_their_own(groups: &[String]) -> anyhow::Result<()> {
    for group in groups {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            if argument == "--figures" {
                arguments.next();
            } else if !argument.starts_with("--figures=") {
                command.arg(argument);
            }
        }
        let status = command.args(["--figures", group]).status()?;
        anyhow::ensure!(status.success(), "group {group} failed");
    }
    Ok(())
}
