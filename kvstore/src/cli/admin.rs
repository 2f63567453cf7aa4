//! `kvstore verify` and `kvstore drain`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use kvstore_tiers::nvme::{NvmeEngine, VerifyOptions, verify_folder};
use serde_json::json;

use super::Target;
use super::output::{bytes, print_json};
use crate::config::NvmeConfig;
use crate::open::nvme_options;

/// Check every block, in memory and on disk, against its checksums.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "A running daemon drops the blocks that do not match. With --path, the command checks the folder of a volume
that no daemon uses, and drops its damaged blocks only with --quarantine. The exit status is 1 if any block was damaged.

Examples:
  kvstore verify
  kvstore verify --path /var/lib/kvstore --quarantine"
)]
pub struct Verify {
    #[command(flatten)]
    target: Target,
    /// Check the volume in this folder instead of a running daemon.
    #[arg(long, value_name = "FOLDER")]
    path: Option<PathBuf>,
    /// Drop the damaged blocks of the folder.
    #[arg(long, requires = "path")]
    quarantine: bool,
}

impl Verify {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        if let Some(path) = &self.path {
            return self.verify_folder(path);
        }
        let bar = indicatif::ProgressBar::new(0);
        let outcome = self
            .target
            .connect()
            .await?
            .verify(|step| {
                bar.set_length(step.blocks);
                bar.set_position(step.verified);
            })
            .await?;
        bar.finish_and_clear();
        if self.target.json {
            print_json(&json!({
                "blocks": outcome.verified, "bytes": outcome.verified_bytes, "corrupt": outcome.corrupt,
            }))?;
        } else {
            println!("{} blocks, {}: {} corrupt", outcome.verified, bytes(outcome.verified_bytes), outcome.corrupt);
        }
        Ok(if outcome.corrupt == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Verify {
    fn verify_folder(&self, path: &Path) -> anyhow::Result<ExitCode> {
        let bar = indicatif::ProgressBar::new(0);
        // The bound does not matter to a reader; the index keeps its size.
        let config = NvmeConfig {
            paths: vec![path.to_owned()],
            bytes: 0,
            index_bytes: Some(kvstore_tiers::caps::NVME_INDEX_BYTES_MIN),
            dirty_bytes: 0,
            engine: NvmeEngine::Auto,
            admission: Default::default(),
            reused_after: 2,
            promote_after: 1,
            write_budget: None,
        };
        let options = nvme_options(&config);
        let report = verify_folder(path, &options, VerifyOptions { quarantine: self.quarantine }, |report| {
            bar.set_length(report.blocks);
            bar.set_position(report.verified);
        })?;
        bar.finish_and_clear();
        if self.target.json {
            print_json(&json!({
                "blocks": report.verified, "bytes": report.verified_bytes, "corrupt": report.corrupt,
                "stale": report.stale, "segments_scanned": report.unknown_segments,
            }))?;
        } else {
            let (read, corrupt, stale) = (bytes(report.verified_bytes), report.corrupt, report.stale);
            println!("{} blocks, {read}: {corrupt} corrupt, {stale} stale", report.verified);
            if report.unknown_segments > 0 {
                println!("the index was lost, so {} segments were scanned for their blocks", report.unknown_segments);
            }
            if corrupt > 0 && !self.quarantine {
                println!("nothing was changed; use --quarantine to drop the corrupt blocks");
            }
        }
        Ok(if report.corrupt == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Refuse new calls and finish those in flight.
#[derive(clap::Args, Debug)]
#[command(after_help = "The daemon still answers status and metrics requests until it is stopped.")]
pub struct Drain {
    #[command(flatten)]
    target: Target,
    /// Wait at most this long. The default is calls.drain_deadline of the daemon's configuration.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "DURATION")]
    deadline: Option<Duration>,
}

impl Drain {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let deadline_ms = self.deadline.map_or(0, |deadline| deadline.as_millis().clamp(1, u32::MAX.into()) as u32);
        let answer = self.target.connect().await?.drain(deadline_ms).await?;
        if self.target.json {
            print_json(&json!({ "drained": answer.drained, "in_flight": answer.in_flight }))?;
        } else if answer.drained {
            println!("drained: no calls are in flight, and new calls are refused");
        } else {
            println!("{} calls are still in flight; new calls are refused", answer.in_flight);
        }
        Ok(if answer.drained { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
