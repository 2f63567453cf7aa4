//! Watch: sends a snapshot of the blocks that are readable in each tier, then every change.
//!
//! A follower has only a number in the tiers' change log and one message on its way. So a slow follower costs no memory: it falls
//! off the end of the log, and gets a new snapshot.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kvstore_proto::v1::watch_response::Part;
use kvstore_proto::v1::{
    WatchChanges, WatchLayout, WatchRates, WatchRequest, WatchResponse, WatchSnapshot, WatchSnapshotEnd, WatchStart,
    WatchTier, WatchTierChanges, WatchTierRate,
};
use kvstore_tiers::Tier;
use kvstore_tiers::changes::{Change, ChangeLog, NamespaceTag};
use kvstore_tiers::host::{NamespaceId, namespace_digest};
use kvstore_tiers::meter::ReadRate;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

use crate::caps;
use crate::daemon::Daemon;
use crate::wire;

type Sender = mpsc::Sender<Result<WatchResponse, Status>>;

/// Why a watch ends.
enum End {
    /// Nobody listens any more.
    Gone,
    /// It is told.
    Told(Status),
}

/// One follower.
pub struct Follower {
    daemon: Arc<Daemon>,
    log: Arc<ChangeLog>,
    namespace: NamespaceId,
    tag: NamespaceTag,
    sender: Sender,
    /// Layouts that it was told of.
    layouts: u32,
    rates_due: Instant,
}

impl Follower {
    /// Of one namespace; what it is told goes into `sender`.
    pub fn new(daemon: Arc<Daemon>, namespace: NamespaceId, sender: Sender) -> Self {
        let log = Arc::clone(daemon.host.changes());
        let name = daemon.namespaces().get(namespace.0).map_or("", String::as_str);
        let tag = NamespaceTag::of(&namespace_digest(name));
        Self { daemon, log, namespace, tag, sender, layouts: 0, rates_due: Instant::now() }
    }

    /// Follows until the daemon stops, the follower is too slow, or nobody listens.
    pub async fn follow(mut self, request: WatchRequest) {
        let daemon = Arc::clone(&self.daemon);
        // Measured once, on a thread that may take its time.
        let _ = tokio::task::spawn_blocking(move || daemon.copy_rate()).await;
        let mut stopping = self.daemon.stopping();
        let stopped = async move {
            let _ = stopping.wait_for(|stopping| *stopping).await;
        };
        let sender = self.sender.clone();
        let ended = tokio::select! {
            () = stopped => {
                let problem = "the daemon is stopping: watch another daemon, or this one again later";
                End::Told(Status::unavailable(problem))
            }
            () = sender.closed() => End::Gone,
            end = self.follow_changes(request) => end,
        };
        if let End::Told(status) = ended {
            let _ = tokio::time::timeout(Duration::from_secs(1), sender.send(Err(status))).await;
        }
    }

    async fn follow_changes(&mut self, request: WatchRequest) -> End {
        let resumes = request.log == self.log.id() && self.log.read(request.next, 0, &mut Vec::new()).is_ok();
        let mut next = match resumes {
            true => {
                let start = WatchStart { log: self.log.id(), next: request.next, snapshot: false };
                self.send(Part::Start(start)).await.map(|()| request.next)
            }
            false => self.snapshot().await,
        };
        loop {
            next = match next {
                Ok(from) => match self.changes(from).await {
                    Ok(Some(next)) => Ok(next),
                    Ok(None) => self.snapshot().await,
                    Err(end) => Err(end),
                },
                Err(end) => return end,
            };
        }
    }

    async fn send(&self, part: Part) -> Result<(), End> {
        let sent = self.sender.send_timeout(Ok(WatchResponse { part: Some(part) }), caps::WATCH_STALL).await;
        sent.map_err(|error| match error {
            mpsc::error::SendTimeoutError::Closed(_) => End::Gone,
            mpsc::error::SendTimeoutError::Timeout(_) => End::Told(Status::resource_exhausted(format!(
                "the watcher took no message for {} s: watch again",
                caps::WATCH_STALL.as_secs()
            ))),
        })
    }

    async fn new_layouts(&mut self) -> Result<(), End> {
        for layout in self.daemon.host.layouts(self.namespace, self.layouts) {
            let told = WatchLayout {
                layout_digest: layout.digest.to_vec().into(),
                layout: Some(wire::layout_message(&layout.layout)),
                name_seeds: layout.groups.iter().map(|group| group.name_seed).collect(),
                block_bytes: layout.groups.iter().map(|group| group.block_bytes).collect(),
            };
            self.layouts = layout.ordinal + 1;
            self.send(Part::Layout(told)).await?;
        }
        Ok(())
    }

    /// All that is readable; the number of the first change after the look began.
    async fn snapshot(&mut self) -> Result<u64, End> {
        let from = self.log.follow();
        self.layouts = 0;
        self.send(Part::Start(WatchStart { log: self.log.id(), next: from, snapshot: true })).await?;
        self.new_layouts().await?;
        let mut names = Vec::new();
        for (namespace, slab) in self.daemon.host.slabs() {
            if namespace == self.namespace {
                self.daemon.host.names_of_slab(namespace, slab, &mut names);
                self.send_names(WatchTier::Host, &mut names, caps::WATCH_NAMES_PER_MESSAGE).await?;
            }
        }
        self.send_names(WatchTier::Host, &mut names, 1).await?;
        let mut cursor = (0, 0);
        while let Some(next) = self.daemon.nvme.as_ref().and_then(|nvme| nvme.names(self.tag, cursor, &mut names)) {
            cursor = next;
            self.send_names(WatchTier::Nvme, &mut names, caps::WATCH_NAMES_PER_MESSAGE).await?;
        }
        self.send_names(WatchTier::Nvme, &mut names, 1).await?;
        if let Some(object) = self.daemon.object.clone() {
            for pack in object.packs_of(self.tag) {
                object.names_in(&pack, &mut names);
                self.send_names(WatchTier::Object, &mut names, caps::WATCH_NAMES_PER_MESSAGE).await?;
            }
            self.send_names(WatchTier::Object, &mut names, 1).await?;
        }
        let next = self.log.follow();
        self.send(Part::SnapshotEnd(WatchSnapshotEnd { next })).await?;
        Ok(from)
    }

    /// Sends `names`, and empties it, where there are `least` or more.
    async fn send_names(&self, tier: WatchTier, names: &mut Vec<u64>, least: usize) -> Result<(), End> {
        if names.len() < least {
            return Ok(());
        }
        for part in names.chunks(caps::WATCH_NAMES_PER_MESSAGE) {
            self.send(Part::Snapshot(WatchSnapshot { tier: tier.into(), names: part.to_vec() })).await?;
        }
        names.clear();
        Ok(())
    }

    /// Waits for changes from number `from` on, and sends them: the number after them. `None` where they are not kept any more.
    async fn changes(&mut self, from: u64) -> Result<Option<u64>, End> {
        tokio::select! {
            () = self.log.wait(from) => tokio::time::sleep(caps::WATCH_GATHER).await,
            () = tokio::time::sleep_until(self.rates_due) => {}
        }
        if Instant::now() >= self.rates_due {
            self.rates_due = Instant::now() + caps::WATCH_RATES_EVERY;
            let rates = self.rates();
            self.send(Part::Rates(rates)).await?;
        }
        let mut changes = Vec::new();
        let Ok(next) = self.log.read(from, caps::WATCH_CHANGES_PER_MESSAGE, &mut changes) else { return Ok(None) };
        if next == from {
            return Ok(Some(next));
        }
        self.new_layouts().await?;
        let tiers = self.by_tier(&changes);
        self.send(Part::Changes(WatchChanges { first: from, next, tiers })).await?;
        Ok(Some(next))
    }

    /// What the changes come to: the last of each block in each tier.
    fn by_tier(&self, changes: &[Change]) -> Vec<WatchTierChanges> {
        let ours = changes.iter().filter(|change| change.namespace == self.tag || change.namespace.0 == 0);
        let last: HashMap<(Tier, u64), bool> = ours.map(|change| ((change.tier, change.name), change.stored)).collect();
        let mut tiers: Vec<WatchTierChanges> = Vec::new();
        for ((tier, name), stored) in last {
            let tier = wire_tier(tier);
            let at = tiers.iter().position(|told| told.tier == i32::from(tier)).unwrap_or_else(|| {
                tiers.push(WatchTierChanges { tier: tier.into(), ..WatchTierChanges::default() });
                tiers.len() - 1
            });
            if let Some(told) = tiers.get_mut(at) {
                if stored { &mut told.stored } else { &mut told.removed }.push(name);
            }
        }
        tiers
    }

    fn rates(&self) -> WatchRates {
        let of = |tier: WatchTier, rate: ReadRate| WatchTierRate {
            tier: tier.into(),
            bytes_per_second: rate.bytes_per_second,
            latency_seconds: rate.latency_seconds,
            queued_bytes: rate.queued_bytes,
        };
        let nvme = self.daemon.nvme.as_ref().map(|nvme| of(WatchTier::Nvme, nvme.read_rate()));
        let object = self.daemon.object.as_ref().map(|object| of(WatchTier::Object, object.read_rate()));
        let host = of(WatchTier::Host, ReadRate { bytes_per_second: self.daemon.copy_rate(), ..ReadRate::default() });
        let tiers = [Some(host), nvme, object].into_iter().flatten().collect();
        WatchRates { tiers, draining: self.daemon.is_draining() }
    }
}

fn wire_tier(tier: Tier) -> WatchTier {
    match tier {
        Tier::Host => WatchTier::Host,
        Tier::Nvme => WatchTier::Nvme,
        Tier::Object => WatchTier::Object,
    }
}
