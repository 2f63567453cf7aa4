//! Status: the daemon at this moment.

use kvstore_proto::v1;
use kvstore_tiers::host::namespace_digest;
use kvstore_tiers::nvme::{NvmeStatus, VolumeStatus};
use kvstore_tiers::object::ObjectStatus;

use crate::daemon::Daemon;
use crate::telemetry::get;

/// The state as `Status` and `/readyz` name it.
pub fn state(daemon: &Daemon) -> &'static str {
    if daemon.is_draining() { "DRAINING" } else { "SERVING" }
}

/// Answers a status call.
pub fn status(daemon: &Daemon) -> v1::StatusResponse {
    let config = daemon.config();
    let host = daemon.host.status();
    let traffic = &daemon.traffic;
    let (pins, tickets) = daemon.host.hold_counts();
    v1::StatusResponse {
        version: env!("CARGO_PKG_VERSION").into(),
        state: state(daemon).into(),
        uptime_ms: daemon.started.elapsed().as_millis() as u64,
        epoch: daemon.epoch,
        host: Some(v1::HostTierStatus {
            bytes_max: host.bytes_max,
            bytes_mapped: host.bytes_mapped,
            bytes_used: host.pools.iter().map(|pool| pool.used * pool.slot_bytes).sum(),
            pinned_bytes: host.pinned_bytes,
            blocks: host.blocks,
            flights: host.flights,
            published: host.counts.published,
            evicted: host.counts.evicted,
            deleted: host.counts.deleted,
            slabs_moved: host.slabs_moved,
            eviction_policy: config.eviction.name().into(),
            pools: host
                .pools
                .into_iter()
                .map(|pool| v1::PoolStatus {
                    namespace: pool.namespace,
                    slot_bytes: pool.slot_bytes,
                    slots: pool.slots,
                    slots_used: pool.used,
                    slabs: pool.slabs,
                })
                .collect(),
            quarantined: get(&traffic.quarantined),
        }),
        traffic: Some(v1::Traffic {
            put_blocks: get(&traffic.put_blocks),
            put_bytes: get(&traffic.put_bytes),
            get_hits: get(&traffic.get_hits),
            get_misses: get(&traffic.get_misses),
            get_bytes: get(&traffic.get_bytes),
            lookups: get(&traffic.lookups),
            busy: get(&traffic.busy),
        }),
        nvme: daemon.nvme.as_ref().map(|nvme| {
            let namespaces = daemon.namespaces().iter().map(|name| v1::NamespaceBytes {
                namespace: name.clone(),
                bytes: nvme.namespace_bytes(&namespace_digest(name)),
                bytes_max: config.policies.get(name).and_then(|policy| policy.nvme_bytes).unwrap_or_default(),
            });
            v1::NvmeTierStatus { namespaces: namespaces.collect(), ..nvme_status(nvme.status()) }
        }),
        object: daemon.object.as_ref().map(|object| {
            let url = config.object.as_ref().map(|object| object.url.url.clone()).unwrap_or_default();
            object_status(url, object.status())
        }),
        pins: pins as u64,
        tickets: tickets as u64,
        listeners: config
            .listeners
            .iter()
            .map(|listener| format!("{} ({})", listener.address, listener.namespace))
            .collect(),
    }
}

fn nvme_status(status: NvmeStatus) -> v1::NvmeTierStatus {
    v1::NvmeTierStatus {
        dirty_bytes: status.dirty_bytes,
        dirty_bytes_max: status.dirty_bytes_max,
        volumes: status.volumes.into_iter().map(volume_status).collect(),
        namespaces: Vec::new(),
    }
}

fn volume_status(volume: VolumeStatus) -> v1::VolumeStatus {
    let write_amplification = volume.write_amplification();
    let [queued_demand, queued_prefetch, queued_writeback] = volume.queued.map(|queued| queued as u64);
    v1::VolumeStatus {
        path: volume.path.display().to_string(),
        state: volume.state.into(),
        reason: volume.reason.unwrap_or_default(),
        bytes_max: volume.bytes_max,
        disk_bytes: volume.disk_bytes,
        index_bytes: volume.index_bytes,
        index_bytes_max: volume.index_bytes_max,
        blocks: volume.blocks,
        live_bytes: volume.live_bytes,
        pinned_bytes: volume.pinned_bytes,
        segment_bytes: volume.segment_bytes,
        segments_free: volume.segments_free,
        segments_unknown: volume.segments_unknown,
        queued_demand,
        queued_prefetch,
        queued_writeback,
        flying: volume.flying as u64,
        dirty_blocks: volume.dirty_blocks,
        admitted_blocks: volume.admitted_blocks,
        admitted_bytes: volume.admitted_bytes,
        device_written_bytes: volume.device_written_bytes,
        index_written_bytes: volume.index_written_bytes,
        write_amplification,
        read_blocks: volume.read_blocks,
        read_bytes: volume.read_bytes,
        reinserted_blocks: volume.reinserted_blocks,
        reinserted_bytes: volume.reinserted_bytes,
        dropped_blocks: volume.dropped_blocks,
        reclaimed_segments: volume.reclaimed_segments,
        corrupt_blocks: volume.corrupt_blocks,
        stale_blocks: volume.stale_blocks,
        refused_blocks: volume.refused_blocks,
        syncs: volume.syncs,
        sync_failures: volume.sync_failures,
        io_errors: volume.io_errors,
    }
}

fn object_status(url: String, status: ObjectStatus) -> v1::ObjectTierStatus {
    let lacks = status.abilities.map(|abilities| abilities.lacks()).unwrap_or_default();
    v1::ObjectTierStatus {
        url,
        state: status.state.into(),
        reason: status.reason,
        lacks: lacks.into_iter().map(str::to_owned).collect(),
        known_blocks: status.known_blocks,
        backlog_blocks: status.backlog_blocks,
        backlog_bytes: status.backlog_bytes,
        backlog_bytes_max: status.backlog_bytes_max,
        backlog_age_ms: status.backlog_age_ms,
        leased_bytes: status.leased_bytes,
        writes: status.writes,
        reads: status.reads,
        written_packs: status.written_packs,
        written_blocks: status.written_blocks,
        written_bytes: status.written_bytes,
        read_blocks: status.read_blocks,
        read_bytes: status.read_bytes,
        corrupt_blocks: status.corrupt_blocks,
        refused_blocks: status.refused_blocks,
        lost_blocks: status.lost_blocks,
        requests: status.requests,
        retries: status.retries,
        failures: status.failures,
    }
}
