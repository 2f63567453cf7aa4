//! Logs and metrics. Counters are plain atomics that the data path adds to. At each scrape, the Prometheus registry
//! reads them and the state of the tiers. `docs/metrics.md` lists every metric.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_tiers::host::namespace_digest;
use kvstore_tiers::nvme::NvmeStatus;
use kvstore_tiers::object::ObjectStatus;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::LogFormat;
use crate::daemon::Daemon;

/// Seconds, from 10 us to 10 s.
const LATENCY_BUCKETS: [f64; 13] = [1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 5e-2, 0.25, 1.0, 10.0];

/// What happened since the start.
#[derive(Default)]
pub struct Traffic {
    /// Blocks stored.
    pub put_blocks: AtomicU64,
    /// Bytes stored.
    pub put_bytes: AtomicU64,
    /// Blocks that a get found.
    pub get_hits: AtomicU64,
    /// Blocks that a get did not find.
    pub get_misses: AtomicU64,
    /// Bytes that gets sent.
    pub get_bytes: AtomicU64,
    /// Look-ups.
    pub lookups: AtomicU64,
    /// Puts and gets that were answered Busy.
    pub busy: AtomicU64,
    /// Commands that came over the local plane.
    pub local_commands: AtomicU64,
    /// Blocks whose bytes did not match their checksum.
    pub quarantined: AtomicU64,
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// Reads one.
pub fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Changes the log filter while it runs.
#[derive(Clone, Default)]
pub struct LogControl(Option<reload::Handle<EnvFilter, Registry>>);

impl LogControl {
    /// Sets the filter; its text was checked with the configuration.
    pub fn set_level(&self, level: &str) {
        if let (Some(handle), Ok(filter)) = (&self.0, level.parse::<EnvFilter>()) {
            let _ = handle.reload(filter);
        }
    }
}

/// Starts logging to standard error. Does nothing the second time in a process.
pub fn start_logging(level: &str, format: LogFormat) -> LogControl {
    let filter = level.parse::<EnvFilter>().unwrap_or_default();
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        LogFormat::Human => {
            let colours = std::io::stderr().is_terminal();
            registry.with(fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(colours)).try_init()
        }
        LogFormat::Json => registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init(),
    };
    LogControl(started.is_ok().then_some(handle))
}

/// The process's metrics registry.
fn registry() -> Option<&'static PrometheusHandle> {
    static REGISTRY: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    let install = || {
        let buckets = Matcher::Suffix("_seconds".into());
        let builder = PrometheusBuilder::new().set_buckets_for_metric(buckets, &LATENCY_BUCKETS).ok()?;
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).ok()?;
        describe();
        Some(handle)
    };
    REGISTRY.get_or_init(install).as_ref()
}

/// Makes the registry, so that latencies are recorded from the first call on.
pub fn start_metrics() {
    registry();
}

/// Metrics in Prometheus' text format.
pub fn render(daemon: &Daemon) -> String {
    let Some(registry) = registry() else { return String::new() };
    let status = daemon.host.status();
    let traffic = &daemon.traffic;
    let counters = [
        ("kvstore_put_blocks_total", get(&traffic.put_blocks)),
        ("kvstore_put_bytes_total", get(&traffic.put_bytes)),
        ("kvstore_get_hits_total", get(&traffic.get_hits)),
        ("kvstore_get_misses_total", get(&traffic.get_misses)),
        ("kvstore_get_bytes_total", get(&traffic.get_bytes)),
        ("kvstore_lookups_total", get(&traffic.lookups)),
        ("kvstore_busy_total", get(&traffic.busy)),
        ("kvstore_quarantined_blocks_total", get(&traffic.quarantined)),
        ("kvstore_nvme_not_admitted_blocks_total", daemon.stack.not_admitted()),
        ("kvstore_changes_total", daemon.host.changes().count()),
        ("kvstore_local_commands_total", get(&traffic.local_commands)),
        ("kvstore_local_read_blocks_total", daemon.host.local_reads()),
        ("kvstore_host_published_blocks_total", status.counts.published),
        ("kvstore_host_evicted_blocks_total", status.counts.evicted),
        ("kvstore_host_deleted_blocks_total", status.counts.deleted),
        ("kvstore_host_aborted_fills_total", status.counts.aborted),
        ("kvstore_host_taken_over_fills_total", status.counts.taken_over),
        ("kvstore_host_moved_slabs_total", status.slabs_moved),
    ];
    for (name, value) in counters {
        metrics::counter!(name).absolute(value);
    }
    let (pins, tickets) = daemon.host.hold_counts();
    let (leases, waiting) = daemon.host.local_leases();
    let gauges = [
        ("kvstore_watches", (crate::caps::WATCHES_MAX - daemon.watches.available_permits()) as u64),
        ("kvstore_host_max_bytes", status.bytes_max),
        ("kvstore_host_mapped_bytes", status.bytes_mapped),
        ("kvstore_host_pinned_bytes", status.pinned_bytes),
        ("kvstore_host_blocks", status.blocks),
        ("kvstore_host_flights", status.flights),
        ("kvstore_local_clients", daemon.host.attached() as u64),
        ("kvstore_local_leases", leases as u64),
        ("kvstore_local_waiting_slots", waiting as u64),
        ("kvstore_local_staging_bytes", daemon.host.staging_bytes()),
        ("kvstore_pins", pins as u64),
        ("kvstore_tickets", tickets as u64),
        ("kvstore_draining", u64::from(daemon.is_draining())),
    ];
    for (name, value) in gauges {
        metrics::gauge!(name).set(value as f64);
    }
    for pool in &status.pools {
        let labels = [("namespace", pool.namespace.clone()), ("slot_bytes", pool.slot_bytes.to_string())];
        metrics::gauge!("kvstore_host_pool_slots", &labels).set(pool.slots as f64);
        metrics::gauge!("kvstore_host_pool_used_slots", &labels).set(pool.used as f64);
    }
    if let Some(nvme) = &daemon.nvme {
        render_nvme(&nvme.status());
        for name in daemon.namespaces() {
            let bytes = nvme.namespace_bytes(&namespace_digest(name));
            metrics::gauge!("kvstore_nvme_namespace_bytes", "namespace" => name.clone()).set(bytes as f64);
        }
    }
    if let Some(object) = &daemon.object {
        render_object(&object.status());
    }
    registry.render()
}

fn render_nvme(status: &NvmeStatus) {
    metrics::gauge!("kvstore_nvme_dirty_bytes").set(status.dirty_bytes as f64);
    metrics::gauge!("kvstore_nvme_dirty_max_bytes").set(status.dirty_bytes_max as f64);
    for volume in &status.volumes {
        let path = volume.path.display().to_string();
        let label = [("volume", path.clone())];
        let gauges = [
            ("kvstore_nvme_max_bytes", volume.bytes_max),
            ("kvstore_nvme_disk_bytes", volume.disk_bytes),
            ("kvstore_nvme_index_bytes", volume.index_bytes),
            ("kvstore_nvme_blocks", volume.blocks),
            ("kvstore_nvme_live_bytes", volume.live_bytes),
            ("kvstore_nvme_pinned_bytes", volume.pinned_bytes),
            ("kvstore_nvme_free_segments", volume.segments_free),
            ("kvstore_nvme_unknown_segments", volume.segments_unknown),
            ("kvstore_nvme_flying_transfers", volume.flying as u64),
            ("kvstore_nvme_dirty_blocks", volume.dirty_blocks),
        ];
        for (name, value) in gauges {
            metrics::gauge!(name, &label).set(value as f64);
        }
        let counters = [
            ("kvstore_nvme_admitted_blocks_total", volume.admitted_blocks),
            ("kvstore_nvme_admitted_bytes_total", volume.admitted_bytes),
            ("kvstore_nvme_device_written_bytes_total", volume.device_written_bytes),
            ("kvstore_nvme_index_written_bytes_total", volume.index_written_bytes),
            ("kvstore_nvme_read_blocks_total", volume.read_blocks),
            ("kvstore_nvme_read_bytes_total", volume.read_bytes),
            ("kvstore_nvme_reinserted_blocks_total", volume.reinserted_blocks),
            ("kvstore_nvme_reinserted_bytes_total", volume.reinserted_bytes),
            ("kvstore_nvme_dropped_blocks_total", volume.dropped_blocks),
            ("kvstore_nvme_reclaimed_segments_total", volume.reclaimed_segments),
            ("kvstore_nvme_corrupt_blocks_total", volume.corrupt_blocks),
            ("kvstore_nvme_stale_blocks_total", volume.stale_blocks),
            ("kvstore_nvme_refused_blocks_total", volume.refused_blocks),
            ("kvstore_nvme_syncs_total", volume.syncs),
            ("kvstore_nvme_sync_failures_total", volume.sync_failures),
            ("kvstore_nvme_io_errors_total", volume.io_errors),
        ];
        for (name, value) in counters {
            metrics::counter!(name, &label).absolute(value);
        }
        metrics::gauge!("kvstore_nvme_serving", &label).set(if volume.state == "SERVING" { 1.0 } else { 0.0 });
        for (lane, queued) in ["demand", "prefetch", "writeback"].iter().zip(volume.queued) {
            let labels = [("volume", path.clone()), ("lane", lane.to_string())];
            metrics::gauge!("kvstore_nvme_queued_transfers", &labels).set(queued as f64);
        }
    }
}

fn render_object(status: &ObjectStatus) {
    let gauges = [
        ("kvstore_object_known_blocks", status.known_blocks),
        ("kvstore_object_backlog_blocks", status.backlog_blocks),
        ("kvstore_object_backlog_bytes", status.backlog_bytes),
        ("kvstore_object_backlog_max_bytes", status.backlog_bytes_max),
        ("kvstore_object_leased_bytes", status.leased_bytes),
        ("kvstore_object_writes", status.writes),
        ("kvstore_object_reads", status.reads),
        ("kvstore_object_serving", u64::from(status.state == "SERVING")),
    ];
    for (name, value) in gauges {
        metrics::gauge!(name).set(value as f64);
    }
    metrics::gauge!("kvstore_object_backlog_age_seconds").set(status.backlog_age_ms as f64 / 1000.0);
    let counters = [
        ("kvstore_object_written_packs_total", status.written_packs),
        ("kvstore_object_written_blocks_total", status.written_blocks),
        ("kvstore_object_written_bytes_total", status.written_bytes),
        ("kvstore_object_read_blocks_total", status.read_blocks),
        ("kvstore_object_read_bytes_total", status.read_bytes),
        ("kvstore_object_corrupt_blocks_total", status.corrupt_blocks),
        ("kvstore_object_refused_blocks_total", status.refused_blocks),
        ("kvstore_object_lost_blocks_total", status.lost_blocks),
        ("kvstore_object_requests_total", status.requests),
        ("kvstore_object_retries_total", status.retries),
        ("kvstore_object_failures_total", status.failures),
    ];
    for (name, value) in counters {
        metrics::counter!(name).absolute(value);
    }
}

/// Every metric, with its help text: `docs/metrics.md` is checked against this list.
pub const METRICS: [(&str, &str, &str); 90] = [
    ("kvstore_put_blocks_total", "counter", "Blocks stored by puts"),
    ("kvstore_put_bytes_total", "counter", "Bytes stored by puts"),
    ("kvstore_get_hits_total", "counter", "Blocks that gets over gRPC found"),
    ("kvstore_get_misses_total", "counter", "Blocks that gets over gRPC did not find"),
    ("kvstore_get_bytes_total", "counter", "Bytes that gets sent"),
    ("kvstore_lookups_total", "counter", "Look-up calls"),
    ("kvstore_busy_total", "counter", "Blocks or calls refused as busy"),
    ("kvstore_quarantined_blocks_total", "counter", "Blocks dropped because their bytes did not match their checksum"),
    (
        "kvstore_changes_total",
        "counter",
        "Blocks that entered or left a tier, counted since events were first followed",
    ),
    ("kvstore_watches", "gauge", "Routers that follow events over gRPC"),
    ("kvstore_described_blocks", "gauge", "Blocks whose tokens the publisher of events knows"),
    ("kvstore_published_events_total", "counter", "Events published over ZeroMQ"),
    ("kvstore_local_commands_total", "counter", "Commands that came over the local plane"),
    (
        "kvstore_local_read_blocks_total",
        "counter",
        "Blocks that local clients read without a call to the daemon, as far as the clients reported them",
    ),
    ("kvstore_local_clients", "gauge", "Clients attached to the local plane"),
    ("kvstore_local_leases", "gauge", "Blocks that local clients are reading now"),
    (
        "kvstore_local_waiting_slots",
        "gauge",
        "Slots that cannot be freed, and blocks that cannot leave, because local clients are reading them",
    ),
    ("kvstore_local_staging_bytes", "gauge", "Staging memory of all local clients, bytes"),
    ("kvstore_host_published_blocks_total", "counter", "Blocks that became readable in memory"),
    ("kvstore_host_evicted_blocks_total", "counter", "Blocks evicted from memory"),
    ("kvstore_host_deleted_blocks_total", "counter", "Blocks deleted on request"),
    ("kvstore_host_aborted_fills_total", "counter", "Fills that ended without a block"),
    (
        "kvstore_host_taken_over_fills_total",
        "counter",
        "Fills that another writer took over because the first writer stalled",
    ),
    ("kvstore_host_moved_slabs_total", "counter", "Slabs that moved between pools"),
    ("kvstore_host_max_bytes", "gauge", "Configured size of the Host tier, bytes"),
    ("kvstore_host_mapped_bytes", "gauge", "Slabs that are mapped or being made, bytes"),
    ("kvstore_host_pinned_bytes", "gauge", "Blocks pinned or held by tickets, bytes"),
    ("kvstore_host_blocks", "gauge", "Blocks that are readable in memory or on their way into it"),
    ("kvstore_host_flights", "gauge", "Blocks on their way into memory"),
    ("kvstore_host_pool_slots", "gauge", "Slots, by namespace and slot size in bytes"),
    ("kvstore_host_pool_used_slots", "gauge", "Slots in use, by namespace and slot size in bytes"),
    ("kvstore_pins", "gauge", "Pins that are in force"),
    ("kvstore_tickets", "gauge", "Look-up tickets that are in force"),
    ("kvstore_draining", "gauge", "1 while the daemon drains and refuses new calls"),
    ("kvstore_put_seconds", "histogram", "Duration of put calls, seconds"),
    (
        "kvstore_get_seconds",
        "histogram",
        "Duration of get calls until the last byte was handed to the connection, seconds",
    ),
    ("kvstore_lookup_seconds", "histogram", "Duration of look-ups, seconds"),
    ("kvstore_connections", "gauge", "Open gRPC connections"),
    ("kvstore_nvme_max_bytes", "gauge", "Configured size of a volume including its index, bytes"),
    ("kvstore_nvme_disk_bytes", "gauge", "Disk space that a volume takes including its index, bytes"),
    ("kvstore_nvme_index_bytes", "gauge", "Disk space that a volume's index takes, bytes"),
    ("kvstore_nvme_blocks", "gauge", "Blocks on a volume"),
    ("kvstore_nvme_live_bytes", "gauge", "Frames of the blocks on a volume, bytes"),
    ("kvstore_nvme_pinned_bytes", "gauge", "Frames of the pinned blocks on a volume, bytes"),
    ("kvstore_nvme_free_segments", "gauge", "Segments of a volume that are free to be written"),
    ("kvstore_nvme_unknown_segments", "gauge", "Segments of a volume whose blocks the daemon has not found again yet"),
    ("kvstore_nvme_flying_transfers", "gauge", "Transfers that the device is working on"),
    ("kvstore_nvme_dirty_blocks", "gauge", "Blocks that wait to be written to a volume"),
    ("kvstore_nvme_admitted_blocks_total", "counter", "Blocks written to a volume for the first time"),
    ("kvstore_nvme_admitted_bytes_total", "counter", "Bytes of blocks written to a volume for the first time"),
    ("kvstore_nvme_device_written_bytes_total", "counter", "Bytes written to a volume for frames and segments"),
    ("kvstore_nvme_index_written_bytes_total", "counter", "Bytes handed to a volume's index"),
    ("kvstore_nvme_read_blocks_total", "counter", "Blocks read from a volume into memory"),
    ("kvstore_nvme_read_bytes_total", "counter", "Bytes of frames read from a volume into memory"),
    ("kvstore_nvme_reinserted_blocks_total", "counter", "Blocks that moved to another segment when theirs was emptied"),
    ("kvstore_nvme_reinserted_bytes_total", "counter", "Bytes of frames that moved to another segment"),
    ("kvstore_nvme_dropped_blocks_total", "counter", "Blocks dropped from a volume for lack of room"),
    (
        "kvstore_nvme_reclaimed_segments_total",
        "counter",
        "Segments that were emptied so that they can be written again",
    ),
    ("kvstore_nvme_corrupt_blocks_total", "counter", "Blocks on a volume that did not match their checksums"),
    (
        "kvstore_nvme_stale_blocks_total",
        "counter",
        "Index entries dropped at the start because they no longer matched their segment",
    ),
    (
        "kvstore_nvme_refused_blocks_total",
        "counter",
        "Blocks that were not written because there was no room or the volume takes no writes",
    ),
    ("kvstore_nvme_syncs_total", "counter", "Syncs of a volume"),
    ("kvstore_nvme_sync_failures_total", "counter", "Syncs of a volume that failed"),
    ("kvstore_nvme_io_errors_total", "counter", "Reads and writes of a volume that failed"),
    (
        "kvstore_nvme_not_admitted_blocks_total",
        "counter",
        "Blocks that were not written to disk because they were not worth it or exceeded the write budget",
    ),
    ("kvstore_nvme_namespace_bytes", "gauge", "Blocks of a namespace on all disks, bytes"),
    ("kvstore_nvme_dirty_bytes", "gauge", "Blocks that wait to be written to disk, bytes"),
    (
        "kvstore_nvme_dirty_max_bytes",
        "gauge",
        "Limit of the blocks that wait to be written, above which puts wait, bytes",
    ),
    ("kvstore_nvme_serving", "gauge", "1 while a volume serves without restrictions"),
    ("kvstore_nvme_queued_transfers", "gauge", "Transfers that wait for the device, by volume and lane"),
    ("kvstore_object_known_blocks", "gauge", "Blocks whose place in the bucket the daemon knows"),
    ("kvstore_object_backlog_blocks", "gauge", "Blocks that wait to be uploaded"),
    ("kvstore_object_backlog_bytes", "gauge", "Blocks that wait to be uploaded, bytes"),
    ("kvstore_object_backlog_max_bytes", "gauge", "Limit of the backlog, beyond which blocks are not uploaded, bytes"),
    ("kvstore_object_backlog_age_seconds", "gauge", "How long the oldest block has waited to be uploaded, seconds"),
    ("kvstore_object_leased_bytes", "gauge", "Blocks that stay in memory until they are uploaded, bytes"),
    ("kvstore_object_writes", "gauge", "Packs being written to the bucket"),
    ("kvstore_object_reads", "gauge", "Reads from the bucket in progress"),
    ("kvstore_object_serving", "gauge", "1 while the object store answers"),
    ("kvstore_object_written_packs_total", "counter", "Packs written to the bucket"),
    ("kvstore_object_written_blocks_total", "counter", "Blocks written to the bucket"),
    ("kvstore_object_written_bytes_total", "counter", "Bytes written to the bucket"),
    ("kvstore_object_read_blocks_total", "counter", "Blocks read from the bucket into memory"),
    ("kvstore_object_read_bytes_total", "counter", "Bytes that came from the bucket"),
    (
        "kvstore_object_corrupt_blocks_total",
        "counter",
        "Blocks in the bucket that did not match their checksums, each counted once",
    ),
    (
        "kvstore_object_refused_blocks_total",
        "counter",
        "Blocks that were not taken for upload because too many were waiting",
    ),
    ("kvstore_object_lost_blocks_total", "counter", "Blocks that were gone before they could be uploaded"),
    ("kvstore_object_requests_total", "counter", "Requests to the object store, including repeated ones"),
    ("kvstore_object_retries_total", "counter", "Requests to the object store that were repeated"),
    (
        "kvstore_object_failures_total",
        "counter",
        "Requests to the object store that failed or were not answered in time",
    ),
];

fn describe() {
    for (name, kind, help) in METRICS {
        match kind {
            "counter" => metrics::describe_counter!(name, help),
            "gauge" => metrics::describe_gauge!(name, help),
            _ => metrics::describe_histogram!(name, help),
        }
    }
}
