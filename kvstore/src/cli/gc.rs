//! `kvstore gc`.

use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use kvstore_client::v1::{CollectRequest, PackCount};
use serde_json::json;

use super::Target;
use super::output::{bytes, print_json, print_table};

/// Delete old packs from the object store, by age or until a given size is left.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "The command never deletes packs that a pin refers to, or that were written within the last hour. Only one of the daemons
that share a bucket can collect at a time. Without a rule, or with --dry-run, nothing is deleted: the command counts the
packs that are in the bucket, and those that would be deleted.

Examples:
  kvstore gc                                       show what is in the bucket
  kvstore gc --older-than 30days --dry-run
  kvstore gc --keep 10TiB --namespace team-a

To delete old packs automatically, set object.keep_age or object.keep_bytes: see `kvstore config show --sample`."
)]
pub struct Gc {
    #[command(flatten)]
    target: Target,
    /// Delete packs that are older than this.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "DURATION")]
    older_than: Option<Duration>,
    /// Delete the oldest packs until at most this much is left.
    #[arg(long, value_parser = ByteSize::from_str, value_name = "SIZE")]
    keep: Option<ByteSize>,
    /// Delete packs of this namespace alone.
    #[arg(long)]
    namespace: Option<String>,
    /// Only count the packs that would be deleted.
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
                    format!("{deleted} of {found} packs deleted")
                } else {
                    format!("found {found} packs")
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
            let went = if dry_run { "would be deleted" } else { "deleted" };
            println!("{went}: {} packs, {}", deleted.packs, bytes(deleted.bytes));
            if referenced.packs > 0 {
                println!("kept, because pins refer to them: {} packs, {}", referenced.packs, bytes(referenced.bytes));
            }
            if failed.packs > 0 {
                println!(
                    "not deleted, because the store failed: {} packs, {}; run the command again",
                    failed.packs,
                    bytes(failed.bytes)
                );
            }
        }
        Ok(if failed.packs == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
