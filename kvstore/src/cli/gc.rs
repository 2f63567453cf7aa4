//! `kvstore gc`.

use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use kvstore_client::v1::{CollectRequest, PackCount};
use serde_json::json;

use super::Target;
use super::output::{bytes, print_json, print_table};

/// Collect garbage in the object store: old packs go, or the oldest until so many bytes are left.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Never what a pin refers to, nor what was written within the last hour. One collector at a time, of all daemons that
share the bucket. Without a rule, or with --dry-run, nothing goes: what there is, and what would go, is counted.

Examples:
  kvstore gc                                       what is in the bucket
  kvstore gc --older-than 30days --dry-run
  kvstore gc --keep 10TiB --namespace team-a
For what is to happen by itself, see object.keep_age and object.keep_bytes in `kvstore config show --sample`."
)]
pub struct Gc {
    #[command(flatten)]
    target: Target,
    /// Packs that are older than this go.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "DURATION")]
    older_than: Option<Duration>,
    /// The oldest packs go until no more than this is left.
    #[arg(long, value_parser = ByteSize::from_str, value_name = "SIZE")]
    keep: Option<ByteSize>,
    /// In this namespace alone.
    #[arg(long)]
    namespace: Option<String>,
    /// Only count what would go.
    #[arg(long)]
    dry_run: bool,
}

impl Gc {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let dry_run = self.dry_run || (self.older_than.is_none() && self.keep.is_none());
        let request = CollectRequest {
            older_than_ms: self.older_than.map(|age| age.as_millis() as u64),
            keep_bytes: self.keep.map(|size| size.as_u64()),
            namespace: self.namespace.clone().unwrap_or_default(),
            dry_run,
        };
        let bar = indicatif::ProgressBar::new_spinner();
        let outcome = self
            .target
            .connect()
            .await?
            .collect(request, |step| {
                let found: u64 = step.found.values().map(|found| found.packs).sum();
                let deleted = step.deleted.unwrap_or_default().packs;
                bar.set_message(if step.deleting {
                    format!("{deleted} of {found} packs gone")
                } else {
                    format!("{found} packs found")
                });
                bar.tick();
            })
            .await?;
        bar.finish_and_clear();
        let count = |count: Option<PackCount>| count.unwrap_or_default();
        let (deleted, referenced, failed) = (count(outcome.deleted), count(outcome.referenced), count(outcome.failed));
        if self.target.json {
            let of = |count: &PackCount| json!({ "packs": count.packs, "bytes": count.bytes });
            let found: serde_json::Map<_, _> =
                outcome.found.iter().map(|(namespace, found)| (namespace.clone(), of(found))).collect();
            print_json(&json!({
                "dry_run": dry_run, "found": found, "deleted": of(&deleted), "referenced": of(&referenced),
                "failed": of(&failed),
            }))?;
        } else {
            let mut found: Vec<_> = outcome.found.iter().collect();
            found.sort_by_key(|(namespace, _)| (*namespace).clone());
            let rows = found
                .iter()
                .map(|(namespace, found)| vec![(*namespace).clone(), found.packs.to_string(), bytes(found.bytes)]);
            print_table(&["namespace", "packs", "bytes"], rows.collect());
            let went = if dry_run { "would go" } else { "gone" };
            println!("{went}: {} packs, {}", deleted.packs, bytes(deleted.bytes));
            if referenced.packs > 0 {
                println!("kept, for pins refer to them: {} packs, {}", referenced.packs, bytes(referenced.bytes));
            }
            if failed.packs > 0 {
                println!(
                    "not deleted, the store failed: {} packs, {}; run it again",
                    failed.packs,
                    bytes(failed.bytes)
                );
            }
        }
        Ok(if failed.packs == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
