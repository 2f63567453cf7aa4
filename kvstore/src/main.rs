//! The `kvstore` binary.

use clap::Parser;
use kvstore::cli::Cli;

/// Blocks of megabytes come and go through the connection's buffers: an allocator that keeps such pieces
/// instead of giving them back to the kernel each time.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    kvstore::cli::main(Cli::parse())
}
