//! Background work of the tiers, until the runtime ends: often while there are calls, and seldom while there are none.

use std::sync::Arc;

use crate::daemon::Daemon;
use crate::{caps, clock};

/// What moved since the start, by calls and by local clients that read without them.
#[derive(Clone, Copy, Default, PartialEq)]
struct Moved {
    calls: u64,
    local_reads: u64,
}

/// Ticks for ever.
pub async fn tick_forever(daemon: Arc<Daemon>) {
    let (mut before, mut quiet_ticks) = (Moved::default(), 0);
    loop {
        if quiet_ticks < caps::TICKS_UNTIL_QUIET {
            tokio::time::sleep(caps::TICK).await;
        } else if daemon.calls.next(before.calls, caps::TICK_QUIET).await {
            // What the call began is looked at a tick later, as always.
            quiet_ticks = 0;
            continue;
        }
        tick(&daemon).await;
        let now = Moved { calls: daemon.calls.came(), local_reads: daemon.host.local_reads() };
        quiet_ticks = if now == before && is_quiet(&daemon) { quiet_ticks + 1 } else { 0 };
        before = now;
    }
}

async fn tick(daemon: &Arc<Daemon>) {
    let ticking = Arc::clone(daemon);
    // Shrinking unmaps slabs, which takes milliseconds each.
    let tick = move || {
        ticking.host.tick(clock::now());
        ticking.nvme.iter().for_each(|nvme| nvme.tick(clock::now()));
        ticking.object.iter().for_each(|object| object.tick());
    };
    if let Err(error) = tokio::task::spawn_blocking(tick).await {
        tracing::error!(%error, "the background work of the tiers failed; trying again");
    }
    daemon.prefetches.forget_old(clock::now());
}

/// True where nothing goes on that a tick moves forward: no call, no slot that waits for a local reader, no slab that is to go,
/// nothing on its way to a lower tier.
fn is_quiet(daemon: &Daemon) -> bool {
    let fits = || {
        let host = daemon.host.status();
        host.bytes_mapped <= host.bytes_max
    };
    daemon.calls.in_flight() == 0
        && fits()
        && daemon.host.local_leases().1 == 0
        && daemon.nvme.as_ref().is_none_or(|nvme| nvme.dirty_bytes() == 0)
        && daemon.object.as_ref().is_none_or(|object| object.status().backlog_blocks == 0)
}
