//! The fields of the status, one a line: where the value comes from, and what it is. A new counter is a line here and a field in
//! `admin.proto`.

use kvstore_proto::v1;
use kvstore_tiers::host::{HostStatus, PoolStatus, namespace_digest};
use kvstore_tiers::nvme::{NvmeTier, VolumeStatus};
use kvstore_tiers::object::{ObjectStatus, ObjectTier};

use super::field::{Described, Field, Holds, Value, bytes, described, millis, nested, plain};
use crate::caps;
use crate::daemon::Daemon;
use crate::telemetry::get;

/// The daemon at this moment. Asks the file systems of its disks for their sizes.
pub fn status(daemon: &Daemon) -> v1::StatusResponse {
    // After a restart, only the disks know a pin.
    let mut pins = daemon.nvme.as_ref().map(|nvme| nvme.lasting_pins()).unwrap_or_default();
    pins.extend(daemon.host.pins().iter().map(|id| id.0));
    daemon_status(daemon, pins.len() as u64, daemon.host.ticket_count() as u64)
}

described! {
    fn daemon_status(daemon: &Daemon, pins: u64, tickets: u64) -> v1::StatusResponse {
        version: env!("CARGO_PKG_VERSION").into(), plain().json("version");
        state: if daemon.is_draining() { "DRAINING" } else { "SERVING" }.into(), plain().json("state")
            .gauge_while("DRAINING", "kvstore_draining", "1 while the daemon drains and refuses new calls");
        uptime_ms: daemon.started.elapsed().as_millis() as u64, millis().json("uptime_ms");
        epoch: daemon.epoch, plain().json("epoch");
        host: Some(host_status(daemon, &daemon.host.status())), nested::<v1::HostTierStatus>().json("host");
        traffic: Some(traffic(daemon)), nested::<v1::Traffic>().json("traffic");
        pins: pins, plain().json("pins").gauge("kvstore_pins", "Pins that are in force");
        tickets: tickets, plain().json("tickets").gauge("kvstore_tickets", "Look-up tickets that are in force");
        listeners: listeners(daemon), plain().json("listeners");
        nvme: daemon.nvme.as_ref().map(|nvme| nvme_status(daemon, nvme)), nested::<v1::NvmeTierStatus>().json("nvme");
        object: daemon.object.as_ref().map(|object| object_status(daemon, object)),
            nested::<v1::ObjectTierStatus>().json("object");
        local: Some(local_status(daemon)), nested::<v1::LocalPlaneStatus>();
        changes: daemon.host.changes().count(), plain()
            .counter("kvstore_changes_total", "Blocks that entered or left a tier, counted since events were first followed");
        watches: (caps::WATCHES_MAX - daemon.watches.available_permits()) as u64, plain()
            .gauge("kvstore_watches", "Routers that follow events over gRPC");
    }
}

fn listeners(daemon: &Daemon) -> Vec<String> {
    let config = daemon.config();
    config.listeners.iter().map(|listener| format!("{} ({})", listener.address, listener.namespace)).collect()
}

described! {
    fn host_status(daemon: &Daemon, host: &HostStatus) -> v1::HostTierStatus {
        bytes_max: host.bytes_max, bytes().json("bytes_max").ready()
            .gauge("kvstore_host_max_bytes", "Configured size of the Host tier, bytes");
        bytes_mapped: host.bytes_mapped, bytes().json("bytes_mapped").ready()
            .gauge("kvstore_host_mapped_bytes", "Slabs that are mapped or being made, bytes");
        bytes_ready: host.bytes_ready, bytes().json("bytes_ready")
            .gauge("kvstore_host_ready_bytes", "Memory that was made ready for slabs to come, bytes");
        bytes_used: host.pools.iter().map(|pool| pool.used * pool.slot_bytes).sum(), bytes().json("bytes_used");
        pinned_bytes: host.pinned_bytes, bytes().json("pinned_bytes")
            .gauge("kvstore_host_pinned_bytes", "Blocks pinned or held by tickets, bytes");
        blocks: host.blocks, plain().json("blocks")
            .gauge("kvstore_host_blocks", "Blocks that are readable in memory or on their way into it");
        flights: host.flights, plain().json("flights")
            .gauge("kvstore_host_flights", "Blocks on their way into memory");
        published: host.counts.published, plain().json("published")
            .counter("kvstore_host_published_blocks_total", "Blocks that became readable in memory");
        evicted: host.counts.evicted, plain().json("evicted")
            .counter("kvstore_host_evicted_blocks_total", "Blocks evicted from memory");
        deleted: host.counts.deleted, plain().json("deleted")
            .counter("kvstore_host_deleted_blocks_total", "Blocks deleted on request");
        slabs_moved: host.slabs_moved, plain().json("slabs_moved")
            .counter("kvstore_host_moved_slabs_total", "Slabs that moved between pools");
        eviction_policy: daemon.config().eviction.name().into(), plain().json("eviction_policy");
        pools: host.pools.iter().map(pool_status).collect(), nested::<v1::PoolStatus>().json("pools");
        quarantined: get(&daemon.traffic.quarantined), plain().json("quarantined").ready()
            .counter("kvstore_quarantined_blocks_total", "Blocks dropped because their bytes did not match their checksum");
        aborted_fills: host.counts.aborted, plain()
            .counter("kvstore_host_aborted_fills_total", "Fills that ended without a block");
        taken_over_fills: host.counts.taken_over, plain()
            .counter("kvstore_host_taken_over_fills_total", "Fills that another writer took over because the first writer stalled");
    }
}

described! {
    fn pool_status(pool: &PoolStatus) -> v1::PoolStatus {
        namespace: pool.namespace.clone(), plain().json("namespace").label("namespace");
        slot_bytes: pool.slot_bytes, bytes().json("slot_bytes").label("slot_bytes");
        slots: pool.slots, plain().json("slots")
            .gauge("kvstore_host_pool_slots", "Slots, by namespace and slot size in bytes");
        slots_used: pool.used, plain().json("slots_used")
            .gauge("kvstore_host_pool_used_slots", "Slots in use, by namespace and slot size in bytes");
        slabs: pool.slabs, plain().json("slabs");
    }
}

described! {
    fn traffic(daemon: &Daemon) -> v1::Traffic {
        put_blocks: get(&daemon.traffic.put_blocks), plain().json("put_blocks")
            .counter("kvstore_put_blocks_total", "Blocks stored by puts");
        put_bytes: get(&daemon.traffic.put_bytes), bytes().json("put_bytes")
            .counter("kvstore_put_bytes_total", "Bytes stored by puts");
        get_hits: get(&daemon.traffic.get_hits), plain().json("get_hits")
            .counter("kvstore_get_hits_total", "Blocks that gets over gRPC found");
        get_misses: get(&daemon.traffic.get_misses), plain().json("get_misses")
            .counter("kvstore_get_misses_total", "Blocks that gets over gRPC did not find");
        get_bytes: get(&daemon.traffic.get_bytes), bytes().json("get_bytes")
            .counter("kvstore_get_bytes_total", "Bytes that gets sent");
        lookups: get(&daemon.traffic.lookups), plain().json("lookups")
            .counter("kvstore_lookups_total", "Look-up calls");
        busy: get(&daemon.traffic.busy), plain().json("busy")
            .counter("kvstore_busy_total", "Blocks or calls refused as busy");
        not_admitted_blocks: daemon.stack.not_admitted(), plain()
            .counter("kvstore_nvme_not_admitted_blocks_total",
                "Blocks that were not written to disk because they were not worth it or exceeded the write budget");
    }
}

described! {
    fn local_status(daemon: &Daemon) -> v1::LocalPlaneStatus {
        commands: get(&daemon.traffic.local_commands), plain()
            .counter("kvstore_local_commands_total", "Commands that came over the local plane");
        read_blocks: daemon.host.local_reads(), plain()
            .counter("kvstore_local_read_blocks_total",
                "Blocks that local clients read without a call to the daemon, as far as the clients reported them");
        clients: daemon.host.attached() as u64, plain()
            .gauge("kvstore_local_clients", "Clients attached to the local plane");
        leases: daemon.host.local_leases().0 as u64, plain()
            .gauge("kvstore_local_leases", "Blocks that local clients are reading now");
        waiting_slots: daemon.host.local_leases().1 as u64, plain()
            .gauge("kvstore_local_waiting_slots",
                "Slots that cannot be freed, and blocks that cannot leave, because local clients are reading them");
        staging_bytes: daemon.host.staging_bytes(), bytes()
            .gauge("kvstore_local_staging_bytes", "Staging memory of all local clients, bytes");
    }
}

fn nvme_status(daemon: &Daemon, nvme: &NvmeTier) -> v1::NvmeTierStatus {
    let status = nvme.status();
    let volumes = status.volumes.iter().map(volume_status).collect();
    let namespaces = daemon.namespaces().iter().map(|name| namespace_bytes(daemon, nvme, name)).collect();
    nvme_tier(status.dirty_bytes, status.dirty_bytes_max, volumes, namespaces)
}

described! {
    fn nvme_tier(dirty: u64, dirty_max: u64, of_volumes: Vec<v1::VolumeStatus>, of_namespaces: Vec<v1::NamespaceBytes>)
        -> v1::NvmeTierStatus {
        dirty_bytes: dirty, bytes().json("dirty_bytes")
            .gauge("kvstore_nvme_dirty_bytes", "Blocks that wait to be written to disk, bytes");
        dirty_bytes_max: dirty_max, bytes().json("dirty_bytes_max")
            .gauge("kvstore_nvme_dirty_max_bytes", "Limit of the blocks that wait to be written, above which puts wait, bytes");
        volumes: of_volumes, nested::<v1::VolumeStatus>().json("volumes");
        namespaces: of_namespaces, nested::<v1::NamespaceBytes>().json("namespaces");
    }
}

described! {
    fn namespace_bytes(daemon: &Daemon, nvme: &NvmeTier, name: &str) -> v1::NamespaceBytes {
        namespace: name.into(), plain().json("namespace").label("namespace");
        bytes: nvme.namespace_bytes(&namespace_digest(name)), bytes().json("bytes")
            .gauge("kvstore_nvme_namespace_bytes", "Blocks of a namespace on all disks, bytes");
        bytes_max: daemon.config().policies.get(name).and_then(|policy| policy.nvme_bytes).unwrap_or_default(),
            bytes().json("bytes_max");
    }
}

described! {
    fn volume_status(volume: &VolumeStatus) -> v1::VolumeStatus {
        path: volume.path.display().to_string(), plain().json("path").label("volume").ready();
        state: volume.state.into(), plain().json("state").ready()
            .gauge_while("SERVING", "kvstore_nvme_serving", "1 while a volume serves without restrictions");
        reason: volume.reason.clone().unwrap_or_default(), plain().json("reason").ready_or_null();
        bytes_max: volume.bytes_max, bytes().json("bytes_max")
            .gauge("kvstore_nvme_max_bytes", "Configured size of a volume including its index, bytes");
        disk_bytes: volume.disk_bytes, bytes().json("disk_bytes")
            .gauge("kvstore_nvme_disk_bytes", "Disk space that a volume takes including its index, bytes");
        index_bytes: volume.index_bytes, bytes().json("index_bytes")
            .gauge("kvstore_nvme_index_bytes", "Disk space that a volume's index takes, bytes");
        index_bytes_max: volume.index_bytes_max, bytes().json("index_bytes_max");
        blocks: volume.blocks, plain().json("blocks").gauge("kvstore_nvme_blocks", "Blocks on a volume");
        live_bytes: volume.live_bytes, bytes().json("live_bytes")
            .gauge("kvstore_nvme_live_bytes", "Frames of the blocks on a volume, bytes");
        pinned_bytes: volume.pinned_bytes, bytes().json("pinned_bytes")
            .gauge("kvstore_nvme_pinned_bytes", "Frames of the pinned blocks on a volume, bytes");
        segment_bytes: volume.segment_bytes, bytes().json("segments.bytes");
        segments_free: volume.segments_free, plain().json("segments.free")
            .gauge("kvstore_nvme_free_segments", "Segments of a volume that are free to be written");
        segments_unknown: volume.segments_unknown, plain().json("segments.unknown")
            .gauge("kvstore_nvme_unknown_segments",
                "Segments of a volume whose blocks the daemon has not found again yet");
        queued_demand: volume.queued[0] as u64, plain().json("queues.demand")
            .gauge("kvstore_nvme_queued_transfers", QUEUED).of("lane", "demand");
        queued_prefetch: volume.queued[1] as u64, plain().json("queues.prefetch")
            .gauge("kvstore_nvme_queued_transfers", QUEUED).of("lane", "prefetch");
        queued_writeback: volume.queued[2] as u64, plain().json("queues.writeback")
            .gauge("kvstore_nvme_queued_transfers", QUEUED).of("lane", "writeback");
        flying: volume.flying as u64, plain().json("queues.flying")
            .gauge("kvstore_nvme_flying_transfers", "Transfers that the device is working on");
        dirty_blocks: volume.dirty_blocks, plain().json("queues.dirty_blocks")
            .gauge("kvstore_nvme_dirty_blocks", "Blocks that wait to be written to a volume");
        admitted_blocks: volume.admitted_blocks, plain().json("written.admitted_blocks")
            .counter("kvstore_nvme_admitted_blocks_total", "Blocks written to a volume for the first time");
        admitted_bytes: volume.admitted_bytes, bytes().json("written.admitted_bytes")
            .counter("kvstore_nvme_admitted_bytes_total", "Bytes of blocks written to a volume for the first time");
        device_written_bytes: volume.device_written_bytes, bytes().json("written.device_bytes")
            .counter("kvstore_nvme_device_written_bytes_total", "Bytes written to a volume for frames and segments");
        index_written_bytes: volume.index_written_bytes, bytes().json("written.index_bytes")
            .counter("kvstore_nvme_index_written_bytes_total", "Bytes handed to a volume's index");
        write_amplification: volume.write_amplification(), plain().json("written.amplification");
        read_blocks: volume.read_blocks, plain().json("read.blocks")
            .counter("kvstore_nvme_read_blocks_total", "Blocks read from a volume into memory");
        read_bytes: volume.read_bytes, bytes().json("read.bytes")
            .counter("kvstore_nvme_read_bytes_total", "Bytes of frames read from a volume into memory");
        reinserted_blocks: volume.reinserted_blocks, plain().json("written.reinserted_blocks")
            .counter("kvstore_nvme_reinserted_blocks_total",
                "Blocks that moved to another segment when theirs was emptied");
        reinserted_bytes: volume.reinserted_bytes, bytes().json("written.reinserted_bytes")
            .counter("kvstore_nvme_reinserted_bytes_total", "Bytes of frames that moved to another segment");
        dropped_blocks: volume.dropped_blocks, plain().json("dropped_blocks")
            .counter("kvstore_nvme_dropped_blocks_total", "Blocks dropped from a volume for lack of room");
        reclaimed_segments: volume.reclaimed_segments, plain().json("segments.reclaimed")
            .counter("kvstore_nvme_reclaimed_segments_total",
                "Segments that were emptied so that they can be written again");
        corrupt_blocks: volume.corrupt_blocks, plain().json("corrupt_blocks")
            .counter("kvstore_nvme_corrupt_blocks_total", "Blocks on a volume that did not match their checksums");
        stale_blocks: volume.stale_blocks, plain().json("stale_blocks")
            .counter("kvstore_nvme_stale_blocks_total",
                "Index entries dropped at the start because they no longer matched their segment");
        refused_blocks: volume.refused_blocks, plain().json("written.refused_blocks")
            .counter("kvstore_nvme_refused_blocks_total",
                "Blocks that were not written because there was no room or the volume takes no writes");
        syncs: volume.syncs, plain().json("written.syncs").counter("kvstore_nvme_syncs_total", "Syncs of a volume");
        sync_failures: volume.sync_failures, plain().json("sync_failures")
            .counter("kvstore_nvme_sync_failures_total", "Syncs of a volume's data that failed");
        index_failures: volume.index_failures, plain().json("index_failures")
            .counter("kvstore_nvme_index_failures_total", "Batches that a volume's index did not take or did not sync");
        index_rebuilds: volume.index_rebuilds, plain().json("index_rebuilds")
            .counter("kvstore_nvme_index_rebuilds_total",
                "Indexes that were found damaged at the start and were built again from the blocks");
        io_errors: volume.io_errors, plain().json("io_errors")
            .counter("kvstore_nvme_io_errors_total", "Reads and writes of a volume that failed");
    }
}

const QUEUED: &str = "Transfers that wait for the device, by volume and lane";

fn object_status(daemon: &Daemon, object: &ObjectTier) -> v1::ObjectTierStatus {
    let url = daemon.config().object.as_ref().map(|object| object.url.url.clone()).unwrap_or_default();
    object_tier(url, object.status())
}

fn lacks(status: &ObjectStatus) -> Vec<String> {
    let lacks = status.abilities.as_ref().map(|abilities| abilities.lacks()).unwrap_or_default();
    lacks.into_iter().map(str::to_owned).collect()
}

described! {
    fn object_tier(of_url: String, object: ObjectStatus) -> v1::ObjectTierStatus {
        url: of_url, plain().json("url");
        state: object.state.into(), plain().json("state").ready()
            .gauge_while("SERVING", "kvstore_object_serving", "1 while the object store answers");
        lacks: lacks(&object), plain().json("lacks");
        reason: object.reason, plain().json("reason").ready();
        confirmed: object.confirmed.into(), plain().json("confirmed");
        known_blocks: object.known_blocks, plain().json("known_blocks")
            .gauge("kvstore_object_known_blocks", "Blocks whose place in the bucket the daemon knows");
        backlog_blocks: object.backlog_blocks, plain().json("backlog.blocks")
            .gauge("kvstore_object_backlog_blocks", "Blocks that wait to be uploaded");
        backlog_bytes: object.backlog_bytes, bytes().json("backlog.bytes").ready()
            .gauge("kvstore_object_backlog_bytes", "Blocks that wait to be uploaded, bytes");
        backlog_bytes_max: object.backlog_bytes_max, bytes().json("backlog.bytes_max").ready()
            .gauge("kvstore_object_backlog_max_bytes",
                "Limit of the backlog, beyond which blocks are not uploaded, bytes");
        backlog_age_ms: object.backlog_age_ms, millis().json("backlog.age_ms")
            .gauge("kvstore_object_backlog_age_seconds",
                "How long the oldest block has waited to be uploaded, seconds");
        leased_bytes: object.leased_bytes, bytes().json("backlog.leased_bytes")
            .gauge("kvstore_object_leased_bytes", "Blocks that stay in memory until they are uploaded, bytes");
        writes: object.writes, plain().json("under_way.writes")
            .gauge("kvstore_object_writes", "Packs being written to the bucket");
        reads: object.reads, plain().json("under_way.reads")
            .gauge("kvstore_object_reads", "Reads from the bucket in progress");
        written_packs: object.written_packs, plain().json("written.packs")
            .counter("kvstore_object_written_packs_total", "Packs written to the bucket");
        written_blocks: object.written_blocks, plain().json("written.blocks")
            .counter("kvstore_object_written_blocks_total", "Blocks written to the bucket");
        written_bytes: object.written_bytes, bytes().json("written.bytes")
            .counter("kvstore_object_written_bytes_total", "Bytes written to the bucket");
        read_blocks: object.read_blocks, plain().json("read.blocks")
            .counter("kvstore_object_read_blocks_total", "Blocks read from the bucket into memory");
        read_bytes: object.read_bytes, bytes().json("read.bytes")
            .counter("kvstore_object_read_bytes_total", "Bytes that came from the bucket");
        corrupt_blocks: object.corrupt_blocks, plain().json("corrupt_blocks")
            .counter("kvstore_object_corrupt_blocks_total",
                "Blocks in the bucket that did not match their checksums, each counted once");
        refused_blocks: object.refused_blocks, plain().json("refused_blocks")
            .counter("kvstore_object_refused_blocks_total",
                "Blocks that were not taken for upload because too many were waiting");
        lost_blocks: object.lost_blocks, plain().json("lost_blocks")
            .counter("kvstore_object_lost_blocks_total", "Blocks that were gone before they could be uploaded");
        requests: object.requests, plain().json("requests.all")
            .counter("kvstore_object_requests_total", "Requests to the object store, including repeated ones");
        retries: object.retries, plain().json("requests.retries")
            .counter("kvstore_object_retries_total", "Requests to the object store that were repeated");
        failures: object.failures, plain().json("requests.failures")
            .counter("kvstore_object_failures_total",
                "Requests to the object store that failed or were not answered in time");
        log_failures: object.log_failures, plain().json("log_failures")
            .counter("kvstore_object_log_failures_total",
                "Times that the log of waiting uploads could not be written or synced");
    }
}
