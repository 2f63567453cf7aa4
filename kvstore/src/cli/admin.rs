//! `kvstore verify` and `kvstore drain`.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::Target;
use super::output::{bytes, print_json};

/// Check every block against its checksum.
#[derive(clap::Args, Debug)]
#[command(after_help = "Blocks whose bytes differ are dropped and counted. Exit status 1 when there was one.")]
pub struct Verify {
    #[command(flatten)]
    target: Target,
}

impl Verify {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
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

/// Refuse new work and finish what is in flight.
#[derive(clap::Args, Debug)]
#[command(after_help = "The daemon stays up, for status and metrics, until it is stopped.")]
pub struct Drain {
    #[command(flatten)]
    target: Target,
    /// Wait this long at most; otherwise as long as the daemon's configuration says.
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
            println!("drained: nothing is in flight, new calls are refused");
        } else {
            println!("{} calls are still in flight; new calls are refused", answer.in_flight);
        }
        Ok(if answer.drained { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
