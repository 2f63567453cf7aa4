//! The command line: one verb, one file.

mod admin;
mod advise;
mod bench;
mod blocks;
mod config;
mod gc;
mod near;
mod output;
mod replay;
mod serve;
mod snapshot;
mod status;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::config::default_socket;

/// Store KV-cache blocks that outlive the engine: one daemon per node, and the commands to use it.
#[derive(Parser, Debug)]
#[command(name = "kvstore", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "Examples:
  kvstore serve                                   run a daemon with defaults for this machine
  kvstore status                                  show what it holds and does
  echo hello | kvstore put --key greeting -       store a block
  kvstore get --key greeting                      read it back
  kvstore replay examples/conversation_slice.jsonl --block-bytes 64KiB --verify";

/// Every command.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the daemon.
    Serve(serve::Serve),
    /// Show what a daemon holds and does.
    Status(status::Status),
    /// Store a file as a block.
    Put(blocks::Put),
    /// Read a block.
    Get(blocks::Get),
    /// Show how many blocks of a prefix can be read, and where they are.
    Lookup(blocks::Lookup),
    /// Bring a prefix into memory before it is needed.
    Prefetch(blocks::Prefetch),
    /// Keep a prefix from being evicted for a while.
    Pin(blocks::Pin),
    /// End a pin.
    Unpin(blocks::Unpin),
    /// Delete blocks.
    Delete(blocks::Delete),
    /// Drive a daemon with a trace of LLM requests, or simulate its eviction policy.
    Replay(replay::Replay),
    /// Measure puts and gets, and compare them with memcpy.
    Bench(bench::Bench),
    /// Check, show or change the configuration.
    Config(config::Config),
    /// Check every block, in memory and on disk, against its checksums.
    Verify(admin::Verify),
    /// Show what smaller or larger tiers would bring.
    Advise(advise::Advise),
    /// Delete old packs from the object store.
    Gc(gc::Gc),
    /// Save folders into an object store, and restore them.
    Snapshot(snapshot::Snapshot),
    /// Refuse new calls and finish those in flight.
    Drain(admin::Drain),
    /// Print a shell's completion script.
    #[command(visible_alias = "completions")]
    Completion(Completion),
}

/// `completion`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  kvstore completion bash > ~/.local/share/bash-completion/completions/kvstore")]
pub struct Completion {
    /// The shell to print the script for.
    shell: clap_complete::Shell,
}

/// Which daemon, and how to answer.
#[derive(clap::Args, Debug, Clone)]
pub struct Target {
    /// The daemon's address: unix:/path/to/socket or http://host:port.
    #[arg(long, env = "KVSTORE_ADDRESS", default_value_t = default_address(), value_name = "ADDRESS")]
    address: String,
    /// Give up after this long.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration, value_name = "DURATION")]
    timeout: std::time::Duration,
    /// How blocks are transferred.
    #[arg(long, default_value = "auto", value_name = "PLANE")]
    plane: PlaneArg,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A plane, on the command line.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum PlaneArg {
    /// Use shared memory where the daemon offers it, and gRPC otherwise.
    Auto,
    /// Use shared memory, or fail if the daemon does not offer it.
    Local,
    /// Use gRPC only.
    Grpc,
}

impl From<PlaneArg> for kvstore_client::Plane {
    fn from(plane: PlaneArg) -> Self {
        match plane {
            PlaneArg::Auto => Self::Auto,
            PlaneArg::Local => Self::Local,
            PlaneArg::Grpc => Self::Grpc,
        }
    }
}

impl Target {
    async fn connect(&self) -> Result<kvstore_client::Client, kvstore_client::Error> {
        let client = kvstore_client::Client::connect_over(&self.address, self.plane.into()).await?;
        Ok(client.with_deadline(self.timeout))
    }
}

/// The address of the daemon that `kvstore serve` runs for this user.
pub fn default_address() -> String {
    format!("unix:{}", default_socket().display())
}

/// Runs a command. 0: done; 1: it failed; 2: wrong usage (clap's).
pub fn main(cli: Cli) -> ExitCode {
    end_quietly_without_a_reader();
    let threads =
        if matches!(cli.command, Command::Serve(_) | Command::Replay(_) | Command::Bench(_) | Command::Snapshot(_)) {
            None
        } else {
            Some(1)
        };
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = threads {
        builder.worker_threads(threads);
    }
    let outcome = builder
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(cli.command)));
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kvstore: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `kvstore status | head`: whoever read the output has enough. Ends as other programs do, by the exit status of SIGPIPE,
/// instead of panicking.
fn end_quietly_without_a_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if message.starts_with("failed printing to stdout") && message.contains("Broken pipe") {
            std::process::exit(128 + libc::SIGPIPE);
        }
        usual(panic);
    }));
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(serve) => serve.run().await,
        Command::Status(status) => status.run().await,
        Command::Put(put) => put.run().await,
        Command::Get(get) => get.run().await,
        Command::Lookup(lookup) => lookup.run().await,
        Command::Prefetch(prefetch) => prefetch.run().await,
        Command::Pin(pin) => pin.run().await,
        Command::Unpin(unpin) => unpin.run().await,
        Command::Delete(delete) => delete.run().await,
        Command::Replay(replay) => replay.run().await,
        Command::Bench(bench) => bench.run().await,
        Command::Config(config) => config.run().await,
        Command::Verify(verify) => verify.run().await,
        Command::Advise(advise) => advise.run().await,
        Command::Gc(gc) => gc.run().await,
        Command::Snapshot(snapshot) => snapshot.run().await,
        Command::Drain(drain) => drain.run().await,
        Command::Completion(completion) => {
            let mut script = Vec::new();
            clap_complete::generate(completion.shell, &mut Cli::command(), "kvstore", &mut script);
            print!("{}", String::from_utf8_lossy(&script));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// A size such as "64KiB", in bytes.
fn parse_block_bytes(text: &str) -> Result<u32, String> {
    let size: bytesize::ByteSize = text.parse().map_err(|_| format!("{text:?} is not a size such as \"64KiB\""))?;
    let max = kvstore_tiers::caps::BLOCK_BYTES_MAX;
    match u32::try_from(size.as_u64()) {
        Ok(bytes) if bytes > 0 && u64::from(bytes) <= max => Ok(bytes),
        _ => Err(format!("{size} is out of range: a block has 1 byte to {}", bytesize::ByteSize(max))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
