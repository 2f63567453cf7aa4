//! File descriptors: slabs, volumes and indexes always have theirs, and connections share what is left.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::caps;
use crate::config::Config;

/// Connections that each way in may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Of each gRPC listener.
    pub connections: usize,
    /// Of the HTTP listener.
    pub http: usize,
    /// Of each of the publisher's sockets.
    pub publisher: usize,
    /// Clients of the local plane.
    pub local_peers: usize,
}

/// Raises this process's limit as far as it may, and divides it.
pub fn share(config: &Config) -> Shares {
    let limit = raise();
    let own = own(config);
    let shares = divide(limit.saturating_sub(own), config.listeners.len());
    if shares.connections < caps::CONNECTIONS_MAX {
        tracing::warn!(
            limit,
            own,
            connections = shares.connections,
            local_clients = shares.local_peers,
            "this process may have few file descriptors, so that fewer connections are taken; raise its limit (ulimit -n, LimitNOFILE=)"
        );
    }
    shares
}

/// The limit now.
fn raise() -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Where it is refused, the old one holds.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let limit = if raised.is_ok() { maximum } else { current };
    limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// True where so few are left that what can wait takes none.
pub fn are_scarce() -> bool {
    let limit =
        getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    // Where there is none to read the folder with, there are none left.
    let open = std::fs::read_dir("/proc/self/fd").map_or(usize::MAX, Iterator::count);
    limit.saturating_sub(open) < caps::OWN_DESCRIPTORS
}

/// What the daemon opens itself.
fn own(config: &Config) -> usize {
    let slab_bytes = (config.host.bytes / kvstore_tiers::caps::SLABS_PER_TIER)
        .clamp(kvstore_tiers::caps::SLAB_BYTES_MIN, kvstore_tiers::caps::SLAB_BYTES_MAX);
    let slabs = config.host.bytes.div_ceil(slab_bytes) as usize;
    let volumes = config.nvme.as_ref().map_or(0, |nvme| nvme.paths.len());
    caps::OWN_DESCRIPTORS + slabs + volumes * caps::DESCRIPTORS_PER_VOLUME
}

/// Each way in gets what it may have at most, or the same part of it.
fn divide(left: usize, listeners: usize) -> Shares {
    let wanted = listeners * caps::CONNECTIONS_MAX
        + caps::HTTP_CONNECTIONS_MAX
        + 2 * caps::PUBLISHER_PEERS_MAX
        + caps::LOCAL_PEERS_MAX * caps::DESCRIPTORS_PER_LOCAL_PEER;
    let part = |most: usize| match left < wanted {
        true => (most as u128 * left as u128 / wanted as u128) as usize,
        false => most,
    };
    let part = |most| part(most).max(caps::PLACES_MIN);
    Shares {
        connections: part(caps::CONNECTIONS_MAX),
        http: part(caps::HTTP_CONNECTIONS_MAX),
        publisher: part(caps::PUBLISHER_PEERS_MAX),
        local_peers: part(caps::LOCAL_PEERS_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_shared_in_proportion() {
        let all = divide(1 << 20, 1);
        assert_eq!((all.connections, all.local_peers), (caps::CONNECTIONS_MAX, caps::LOCAL_PEERS_MAX));
        for (left, listeners) in [(900, 1), (900, 4), (3000, 2), (5000, 1)] {
            let few = divide(left, listeners);
            let used = listeners * few.connections
                + few.http
                + 2 * few.publisher
                + few.local_peers * caps::DESCRIPTORS_PER_LOCAL_PEER;
            assert!(used <= left, "{few:?} of {left}");
            assert!(few.connections >= 20 && few.local_peers > few.connections, "{few:?}");
        }
        let none = divide(0, 1);
        assert_eq!((none.connections, none.http, none.local_peers), (4, 4, 4));
    }
}
