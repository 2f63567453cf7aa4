//! `kvstore status`.

use std::process::ExitCode;
use std::time::Duration;

use kvstore_client::v1;
use serde_json::json;

use super::Target;
use super::output::{bytes, print_json, print_pairs, print_table};

/// Show what a daemon holds and does.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  kvstore status
  kvstore status --watch                live, every second; press q to quit
  kvstore status --json | jq .host.blocks")]
pub struct Status {
    #[command(flatten)]
    target: Target,
    /// Show a live view: the occupancy, flows, hits and queues of each tier.
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    /// How often --watch refreshes the view.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration, requires = "watch", value_name = "DURATION")]
    every: Duration,
}

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let client = self.target.connect().await?;
        if self.watch {
            super::watch::watch(&client, self.every.max(Duration::from_millis(100))).await?;
            return Ok(ExitCode::SUCCESS);
        }
        let status = client.status().await?;
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
        "nvme": status.nvme.as_ref().map(nvme_to_json),
        "object": status.object.as_ref().map(object_to_json),
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
        (
            "get (gRPC)",
            format!("{} hits, {} misses, {}", traffic.get_hits, traffic.get_misses, bytes(traffic.get_bytes)),
        ),
        ("lookups", traffic.lookups.to_string()),
        ("busy", traffic.busy.to_string()),
        ("pins, tickets", format!("{}, {}", status.pins, status.tickets)),
    ]);
    status.nvme.iter().for_each(print_nvme);
    status.object.iter().for_each(print_object);
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

fn nvme_to_json(nvme: &v1::NvmeTierStatus) -> serde_json::Value {
    let volumes: Vec<_> = nvme.volumes.iter().map(volume_to_json).collect();
    let namespace =
        |of: &v1::NamespaceBytes| json!({ "namespace": of.namespace, "bytes": of.bytes, "bytes_max": of.bytes_max });
    json!({
        "dirty_bytes": nvme.dirty_bytes,
        "dirty_bytes_max": nvme.dirty_bytes_max,
        "volumes": volumes,
        "namespaces": nvme.namespaces.iter().map(namespace).collect::<Vec<_>>(),
    })
}

fn volume_to_json(volume: &v1::VolumeStatus) -> serde_json::Value {
    json!({
        "path": volume.path, "state": volume.state, "reason": volume.reason,
        "bytes_max": volume.bytes_max, "disk_bytes": volume.disk_bytes,
        "index_bytes": volume.index_bytes, "index_bytes_max": volume.index_bytes_max,
        "blocks": volume.blocks, "live_bytes": volume.live_bytes, "pinned_bytes": volume.pinned_bytes,
        "segments": {
            "bytes": volume.segment_bytes, "free": volume.segments_free, "unknown": volume.segments_unknown,
            "reclaimed": volume.reclaimed_segments,
        },
        "queues": {
            "demand": volume.queued_demand, "prefetch": volume.queued_prefetch,
            "writeback": volume.queued_writeback, "flying": volume.flying, "dirty_blocks": volume.dirty_blocks,
        },
        "written": {
            "admitted_blocks": volume.admitted_blocks, "admitted_bytes": volume.admitted_bytes,
            "device_bytes": volume.device_written_bytes, "index_bytes": volume.index_written_bytes,
            "amplification": volume.write_amplification, "reinserted_blocks": volume.reinserted_blocks,
            "reinserted_bytes": volume.reinserted_bytes, "refused_blocks": volume.refused_blocks,
            "syncs": volume.syncs,
        },
        "read": { "blocks": volume.read_blocks, "bytes": volume.read_bytes },
        "dropped_blocks": volume.dropped_blocks, "corrupt_blocks": volume.corrupt_blocks,
        "stale_blocks": volume.stale_blocks, "sync_failures": volume.sync_failures, "io_errors": volume.io_errors,
    })
}

fn print_nvme(nvme: &v1::NvmeTierStatus) {
    println!();
    print_pairs(&[(
        "nvme",
        format!("{} waiting to be written, at most {}", bytes(nvme.dirty_bytes), bytes(nvme.dirty_bytes_max)),
    )]);
    if nvme.namespaces.len() > 1 || nvme.namespaces.iter().any(|of| of.bytes_max > 0) {
        for of in &nvme.namespaces {
            let most = if of.bytes_max > 0 { format!(" of {} at most", bytes(of.bytes_max)) } else { String::new() };
            print_pairs(&[(format!("  {}", of.namespace).as_str(), format!("{}{most}", bytes(of.bytes)))]);
        }
    }
    for volume in &nvme.volumes {
        let state = match volume.reason.as_str() {
            "" => volume.state.clone(),
            reason => format!("{}: {reason}", volume.state),
        };
        print_pairs(&[
            ("volume", format!("{} {state}", volume.path)),
            (
                "  disk",
                format!(
                    "{} of {}; the index takes {} of it",
                    bytes(volume.disk_bytes),
                    bytes(volume.bytes_max),
                    bytes(volume.index_bytes)
                ),
            ),
            (
                "  blocks",
                format!("{}, {} live, {} pinned", volume.blocks, bytes(volume.live_bytes), bytes(volume.pinned_bytes)),
            ),
            (
                "  queues",
                format!(
                    "{} demand, {} prefetch, {} write-back, {} at the device",
                    volume.queued_demand, volume.queued_prefetch, volume.queued_writeback, volume.flying
                ),
            ),
            (
                "  written",
                format!(
                    "{} blocks, {}; {:.2} bytes written to the device for each byte",
                    volume.admitted_blocks,
                    bytes(volume.admitted_bytes),
                    volume.write_amplification
                ),
            ),
            ("  read", format!("{} blocks, {}", volume.read_blocks, bytes(volume.read_bytes))),
            (
                "  reclaimed",
                format!(
                    "{} segments: {} blocks dropped, {} moved on",
                    volume.reclaimed_segments, volume.dropped_blocks, volume.reinserted_blocks
                ),
            ),
            (
                "  trouble",
                format!(
                    "{} corrupt, {} stale, {} not written, {} sync failures, {} I/O errors",
                    volume.corrupt_blocks,
                    volume.stale_blocks,
                    volume.refused_blocks,
                    volume.sync_failures,
                    volume.io_errors
                ),
            ),
        ]);
    }
}

fn object_to_json(object: &v1::ObjectTierStatus) -> serde_json::Value {
    json!({
        "url": object.url, "state": object.state, "reason": object.reason, "lacks": object.lacks,
        "known_blocks": object.known_blocks,
        "backlog": {
            "blocks": object.backlog_blocks, "bytes": object.backlog_bytes, "bytes_max": object.backlog_bytes_max,
            "age_ms": object.backlog_age_ms, "leased_bytes": object.leased_bytes,
        },
        "under_way": { "writes": object.writes, "reads": object.reads },
        "written": {
            "packs": object.written_packs, "blocks": object.written_blocks, "bytes": object.written_bytes,
        },
        "read": { "blocks": object.read_blocks, "bytes": object.read_bytes },
        "corrupt_blocks": object.corrupt_blocks, "refused_blocks": object.refused_blocks,
        "lost_blocks": object.lost_blocks,
        "requests": { "all": object.requests, "retries": object.retries, "failures": object.failures },
    })
}

fn print_object(object: &v1::ObjectTierStatus) {
    println!();
    let state = match object.reason.as_str() {
        "" => object.state.clone(),
        reason => format!("{}: {reason}", object.state),
    };
    let age = humantime::format_duration(Duration::from_secs(object.backlog_age_ms / 1000));
    print_pairs(&[
        ("object", format!("{} {state}", object.url)),
        (
            "  to upload",
            format!(
                "{} blocks, {} of {}; the oldest has waited {age}; {} in memory",
                object.backlog_blocks,
                bytes(object.backlog_bytes),
                bytes(object.backlog_bytes_max),
                bytes(object.leased_bytes)
            ),
        ),
        (
            "  written",
            format!(
                "{} blocks in {} packs, {}",
                object.written_blocks,
                object.written_packs,
                bytes(object.written_bytes)
            ),
        ),
        ("  read", format!("{} blocks, {}", object.read_blocks, bytes(object.read_bytes))),
        ("  known", format!("{} blocks", object.known_blocks)),
        (
            "  requests",
            format!(
                "{}, {} of them repeated, {} failed; {} writing, {} reading now",
                object.requests, object.retries, object.failures, object.writes, object.reads
            ),
        ),
        (
            "  trouble",
            format!(
                "{} corrupt, {} not taken for upload, {} lost before their upload",
                object.corrupt_blocks, object.refused_blocks, object.lost_blocks
            ),
        ),
    ]);
    object.lacks.iter().for_each(|lack| println!("  the store: {lack}"));
}
