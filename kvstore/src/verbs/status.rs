//! Status: the daemon at this moment.

use kvstore_proto::v1;

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
        pins: pins as u64,
        tickets: tickets as u64,
        listeners: config
            .listeners
            .iter()
            .map(|listener| format!("{} ({})", listener.address, listener.namespace))
            .collect(),
    }
}
