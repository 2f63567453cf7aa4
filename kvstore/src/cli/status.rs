//! `kvstore status`.

use std::process::ExitCode;
use std::time::Duration;

use kvstore_client::v1;
use serde_json::json;

use super::Target;
use super::output::{bytes, print_json, print_pairs, print_table};

/// Show what a daemon holds and does.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  kvstore status\n  kvstore status --json | jq .host.blocks")]
pub struct Status {
    #[command(flatten)]
    target: Target,
}

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let status = self.target.connect().await?.status().await?;
        if self.target.json {
            print_json(&to_json(&status))?;
        } else {
            print_human(&status);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn to_json(status: &v1::StatusResponse) -> serde_json::Value {
    let host = status.host.clone().unwrap_or_default();
    let traffic = status.traffic.unwrap_or_default();
    let pools: Vec<_> = host
        .pools
        .iter()
        .map(|pool| {
            json!({
                "namespace": pool.namespace, "slot_bytes": pool.slot_bytes, "slots": pool.slots,
                "slots_used": pool.slots_used, "slabs": pool.slabs,
            })
        })
        .collect();
    json!({
        "version": status.version, "state": status.state, "uptime_ms": status.uptime_ms, "epoch": status.epoch,
        "listeners": status.listeners, "pins": status.pins, "tickets": status.tickets,
        "host": {
            "bytes_max": host.bytes_max, "bytes_mapped": host.bytes_mapped, "bytes_used": host.bytes_used,
            "pinned_bytes": host.pinned_bytes, "blocks": host.blocks, "flights": host.flights,
            "published": host.published, "evicted": host.evicted, "deleted": host.deleted,
            "quarantined": host.quarantined, "slabs_moved": host.slabs_moved,
            "eviction_policy": host.eviction_policy, "pools": pools,
        },
        "traffic": {
            "put_blocks": traffic.put_blocks, "put_bytes": traffic.put_bytes, "get_hits": traffic.get_hits,
            "get_misses": traffic.get_misses, "get_bytes": traffic.get_bytes, "lookups": traffic.lookups,
            "busy": traffic.busy,
        },
    })
}

fn print_human(status: &v1::StatusResponse) {
    let host = status.host.clone().unwrap_or_default();
    let traffic = status.traffic.unwrap_or_default();
    let uptime = Duration::from_secs(status.uptime_ms / 1000);
    print_pairs(&[
        ("kvstore", format!("{} {}, up {}", status.version, status.state, humantime::format_duration(uptime))),
        ("listening", status.listeners.join(", ")),
        (
            "host",
            format!(
                "{} used of {} mapped, at most {}",
                bytes(host.bytes_used),
                bytes(host.bytes_mapped),
                bytes(host.bytes_max)
            ),
        ),
        ("blocks", format!("{} ({} on their way), {} pinned", host.blocks, host.flights, bytes(host.pinned_bytes))),
        ("evicted", format!("{} by {}", host.evicted, host.eviction_policy)),
        ("quarantined", host.quarantined.to_string()),
        ("put", format!("{} blocks, {}", traffic.put_blocks, bytes(traffic.put_bytes))),
        ("get", format!("{} hits, {} misses, {}", traffic.get_hits, traffic.get_misses, bytes(traffic.get_bytes))),
        ("lookups", traffic.lookups.to_string()),
        ("busy", traffic.busy.to_string()),
        ("pins, tickets", format!("{}, {}", status.pins, status.tickets)),
    ]);
    if !host.pools.is_empty() {
        let rows = host.pools.iter().map(|pool| {
            vec![
                pool.namespace.clone(),
                bytes(pool.slot_bytes),
                pool.slabs.to_string(),
                format!("{} of {}", pool.slots_used, pool.slots),
            ]
        });
        print_table(&["namespace", "slot", "slabs", "slots used"], rows.collect());
    }
}
