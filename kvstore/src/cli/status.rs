//! `kvstore status`.

use std::process::ExitCode;
use std::time::Duration;

use kvstore_client::v1;

use super::Target;
use super::output::{pairs, print_json, table};
use crate::status::{Node, fill, to_json};

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
        let mut status = client.status().await?;
        // Every daemon sends them.
        let _ = (status.host.get_or_insert_default(), status.traffic.get_or_insert_default());
        if self.target.json {
            print_json(&to_json(&status))?;
        } else {
            print!("{}", for_people(&status));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Lines of a table: a name, and a template of [`fill`].
type Lines = [(&'static str, &'static str)];

const DAEMON: &Lines = &[
    ("kvstore", "{version} {state}, up {uptime_ms}"),
    ("listening", "{listeners}"),
    (
        "host",
        "{host.bytes_used} used of {host.bytes_mapped} mapped, {host.bytes_ready} more ready, at most {host.bytes_max}",
    ),
    ("blocks", "{host.blocks} ({host.flights} on their way), {host.pinned_bytes} pinned"),
    ("evicted", "{host.evicted} by {host.eviction_policy}"),
    ("quarantined", "{host.quarantined}"),
    ("put", "{traffic.put_blocks} blocks, {traffic.put_bytes}"),
    ("get (gRPC)", "{traffic.get_hits} hits, {traffic.get_misses} misses, {traffic.get_bytes}"),
    ("lookups", "{traffic.lookups}"),
    ("busy", "{traffic.busy}"),
    ("pins, tickets", "{pins}, {tickets}"),
];

const NVME: &Lines = &[("nvme", "{dirty_bytes} waiting to be written, at most {dirty_bytes_max}")];

const NAMESPACE: &Lines = &[("  {namespace}", "{bytes}[ of {bytes_max} at most]")];

const VOLUME: &Lines = &[
    ("volume", "{path} {state}[: {reason}]"),
    ("  disk", "{disk_bytes} of {bytes_max}; the index takes {index_bytes} of it"),
    ("  blocks", "{blocks}, {live_bytes} live, {pinned_bytes} pinned"),
    (
        "  queues",
        "{queued_demand} demand, {queued_prefetch} prefetch, {queued_writeback} write-back, {flying} at the device",
    ),
    (
        "  written",
        "{admitted_blocks} blocks, {admitted_bytes}; {write_amplification} bytes written to the device for each byte",
    ),
    ("  read", "{read_blocks} blocks, {read_bytes}"),
    ("  reclaimed", "{reclaimed_segments} segments: {dropped_blocks} blocks dropped, {reinserted_blocks} moved on"),
    (
        "  trouble",
        "{corrupt_blocks} corrupt, {stale_blocks} stale, {refused_blocks} not written, {sync_failures} sync failures, \
         {io_errors} I/O errors, {index_failures} index failures, {index_rebuilds} index rebuilds",
    ),
];

const OBJECT: &Lines = &[
    ("object", "{url} {state}[: {reason}]"),
    (
        "  to upload",
        "{backlog_blocks} blocks, {backlog_bytes} of {backlog_bytes_max}; the oldest has waited {backlog_age_ms}; \
         {leased_bytes} in memory",
    ),
    ("  written", "{written_blocks} blocks in {written_packs} packs, {written_bytes}"),
    ("  read", "{read_blocks} blocks, {read_bytes}"),
    ("  known", "{known_blocks} blocks"),
    ("  uploads", "{confirmed}"),
    ("  requests", "{requests}, {retries} of them repeated, {failures} failed; {writes} writing, {reads} reading now"),
    (
        "  trouble",
        "{corrupt_blocks} corrupt, {refused_blocks} not taken for upload, {lost_blocks} lost before their upload, \
         {log_failures} failures of the upload log",
    ),
];

const POOL: &Lines = &[
    ("namespace", "{namespace}"),
    ("slot", "{slot_bytes}"),
    ("slabs", "{slabs}"),
    ("slots used", "{slots_used} of {slots}"),
];

/// The tables for people.
fn for_people(status: &v1::StatusResponse) -> String {
    let root = Node::of(status);
    let mut out = of(DAEMON, &root);
    for nvme in root.nodes("nvme") {
        out.push('\n');
        out.push_str(&of(NVME, nvme));
        let namespaces = nvme.nodes("namespaces");
        if namespaces.len() > 1 || namespaces.iter().any(|namespace| namespace.number("bytes_max") > 0) {
            namespaces.iter().for_each(|namespace| out.push_str(&of(NAMESPACE, namespace)));
        }
        nvme.nodes("volumes").iter().for_each(|volume| out.push_str(&of(VOLUME, volume)));
    }
    for object in root.nodes("object") {
        out.push('\n');
        out.push_str(&of(OBJECT, object));
    }
    for lack in status.object.iter().flat_map(|object| &object.lacks) {
        out.push_str(&format!("  the store: {lack}\n"));
    }
    let pools = root.nodes("host").first().map_or(&[][..], |host| host.nodes("pools"));
    if !pools.is_empty() {
        let head: Vec<&str> = POOL.iter().map(|(name, _)| *name).collect();
        let row = |pool: &Node<'_>| POOL.iter().map(|(_, template)| fill(template, pool)).collect();
        out.push_str(&table(&head, pools.iter().map(row).collect()));
    }
    out
}

fn of(lines: &Lines, node: &Node<'_>) -> String {
    let filled: Vec<(String, String)> =
        lines.iter().map(|(name, template)| (fill(name, node), fill(template, node))).collect();
    pairs(filled.iter().map(|(name, value)| (name.as_str(), value.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A status in which each number is another one.
    fn distinct() -> v1::StatusResponse {
        let mut last = 1000u64;
        let mut n = || {
            last = last * 3 % 1_000_003_000_019;
            last
        };
        v1::StatusResponse {
            version: "9.9".into(),
            state: "SERVING".into(),
            uptime_ms: n(),
            epoch: n(),
            pins: n(),
            tickets: n(),
            listeners: vec!["a".into(), "b".into()],
            host: Some(v1::HostTierStatus {
                bytes_max: n(),
                bytes_mapped: n(),
                bytes_ready: 5 << 20,
                bytes_used: n(),
                pinned_bytes: n(),
                blocks: n(),
                flights: n(),
                published: n(),
                evicted: n(),
                deleted: n(),
                slabs_moved: n(),
                eviction_policy: "policy".into(),
                pools: (0..2)
                    .map(|_| v1::PoolStatus {
                        namespace: "alpha".into(),
                        slot_bytes: n(),
                        slots: n(),
                        slots_used: n(),
                        slabs: n(),
                    })
                    .collect(),
                quarantined: n(),
                ..Default::default()
            }),
            traffic: Some(v1::Traffic {
                put_blocks: n(),
                put_bytes: n(),
                get_hits: n(),
                get_misses: n(),
                get_bytes: n(),
                lookups: n(),
                busy: n(),
                ..Default::default()
            }),
            nvme: Some(v1::NvmeTierStatus {
                dirty_bytes: n(),
                dirty_bytes_max: n(),
                namespaces: vec![
                    v1::NamespaceBytes { namespace: "alpha".into(), bytes: n(), bytes_max: n() },
                    v1::NamespaceBytes { namespace: "b".into(), bytes: n(), bytes_max: 0 },
                ],
                volumes: ["", "the index was lost"].into_iter().map(|reason| volume(reason, &mut n)).collect(),
            }),
            object: Some(object(&mut n)),
            ..Default::default()
        }
    }

    fn volume(reason: &str, n: &mut dyn FnMut() -> u64) -> v1::VolumeStatus {
        v1::VolumeStatus {
            path: "/disk".into(),
            state: "REBUILDING".into(),
            reason: reason.into(),
            bytes_max: n(),
            disk_bytes: n(),
            index_bytes: n(),
            index_bytes_max: n(),
            blocks: n(),
            live_bytes: n(),
            pinned_bytes: n(),
            segment_bytes: n(),
            segments_free: n(),
            segments_unknown: n(),
            queued_demand: n(),
            queued_prefetch: n(),
            queued_writeback: n(),
            flying: n(),
            dirty_blocks: n(),
            admitted_blocks: n(),
            admitted_bytes: n(),
            device_written_bytes: n(),
            index_written_bytes: n(),
            write_amplification: 1.2345,
            read_blocks: n(),
            read_bytes: n(),
            reinserted_blocks: n(),
            reinserted_bytes: n(),
            dropped_blocks: n(),
            reclaimed_segments: n(),
            corrupt_blocks: n(),
            stale_blocks: n(),
            refused_blocks: n(),
            syncs: n(),
            sync_failures: n(),
            index_failures: 3,
            index_rebuilds: 4,
            io_errors: n(),
        }
    }

    fn object(n: &mut dyn FnMut() -> u64) -> v1::ObjectTierStatus {
        v1::ObjectTierStatus {
            url: "s3://bucket".into(),
            state: "AWAY".into(),
            reason: "it does not answer".into(),
            lacks: vec!["one thing".into(), "another".into()],
            confirmed: "every upload is read back".into(),
            known_blocks: n(),
            backlog_blocks: n(),
            backlog_bytes: n(),
            backlog_bytes_max: n(),
            backlog_age_ms: n(),
            leased_bytes: n(),
            writes: n(),
            reads: n(),
            written_packs: n(),
            written_blocks: n(),
            written_bytes: n(),
            read_blocks: n(),
            read_bytes: n(),
            corrupt_blocks: n(),
            refused_blocks: n(),
            lost_blocks: n(),
            requests: n(),
            retries: n(),
            failures: n(),
            log_failures: 7,
        }
    }

    fn sample(name: &str) -> String {
        let path = format!("{}/src/cli/samples/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    }

    /// The names in the JSON are an interface: programs read them. The samples were written when each field had its line in each
    /// of five renderers.
    #[test]
    fn the_output_is_what_it_always_was() {
        let status = distinct();
        let json: serde_json::Value = serde_json::from_str(&sample("status.json")).unwrap();
        assert_eq!(to_json(&status), json);
        assert_eq!(for_people(&status), sample("status.txt"));
    }

    #[test]
    fn a_daemon_without_lower_tiers_has_none_to_show() {
        let host = Some(v1::HostTierStatus::default());
        let status = v1::StatusResponse { host, traffic: Some(v1::Traffic::default()), ..Default::default() };
        let text = for_people(&status);
        assert!(!text.contains("nvme") && !text.contains("object") && !text.contains('?'), "{text}");
        let json = to_json(&status);
        assert!(json["nvme"].is_null() && json["object"].is_null(), "{json}");
    }
}
