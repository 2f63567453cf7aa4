//! `kvstore serve`.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::serve::{StartOptions, start};

/// Run the daemon.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  kvstore serve
  kvstore serve --host-bytes 8GiB --listen unix:/run/kvstore/default.sock
  kvstore serve --config /etc/kvstore.toml --set log.level=debug

On SIGHUP, the daemon reads its configuration again. On SIGTERM, it finishes the calls in flight and stops.")]
pub struct Serve {
    /// The configuration file. `kvstore config show --sample` prints a commented one.
    #[arg(long, env = "KVSTORE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Memory for blocks. This is the same as --set host.bytes=SIZE.
    #[arg(long, value_name = "SIZE")]
    host_bytes: Option<String>,
    /// Listen on this address instead of those in the configuration: unix:/path or a loopback host:port. Can be repeated.
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<String>,
    /// Set any key of the configuration. Can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

impl Serve {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let mut settings = self.settings;
        settings.extend(self.host_bytes.map(|bytes| format!("host.bytes={bytes}")));
        let running = start(StartOptions { file: self.config, settings, listen: self.listen }).await?;
        let config = running.daemon.config();
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            host_bytes = %bytesize::ByteSize(config.host.bytes),
            ready_bytes = %bytesize::ByteSize(config.host_ready_bytes),
            eviction = config.eviction.name(),
            "the daemon is serving"
        );
        running.until_signalled().await?;
        Ok(ExitCode::SUCCESS)
    }
}
