//! Admission: decides which blocks go to disk and to the bucket. It follows the configuration, how often a block was asked for and
//! what it costs to compute again, within the write budget.

use std::sync::Arc;

use kvstore_tiers::admission::{Admission, Depths, Frequencies, Worth, WriteBudget, recompute_cost};
use kvstore_tiers::host::{NamespaceId, RegisteredLayout};
use kvstore_tiers::nvme::BlockRef;
use kvstore_tiers::object::{Offer, Offered};
use kvstore_tiers::{BootTime, SequenceHash, SlotKey};
use parking_lot::Mutex;

use crate::accesses::name;
use crate::config::{Config, Uploads};
use crate::daemon::Daemon;
use crate::{clock, telemetry};

/// See the head of this file.
pub struct Admitter(Mutex<State>);

/// What holds for a namespace.
#[derive(Clone, Copy)]
struct Rules {
    admission: Admission,
    promote_after: u8,
}

struct State {
    /// By namespace.
    rules: Vec<Rules>,
    reused_after: u8,
    /// Somebody wants to know how many requests asked for a block.
    counts: bool,
    /// Made when they are first needed: 2 MiB, and one.
    seen: Option<(Frequencies, Depths)>,
    budget: WriteBudget,
    worth: Worth,
}

/// On what occasion a block may be written to disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Occasion {
    /// It was stored just now.
    Stored,
    /// It was asked for, and is in memory.
    AskedFor,
    /// It was read from the bucket.
    Promoted,
    /// It is to leave memory.
    Leaving,
    /// Somebody waits for it there.
    Must,
}

impl Admitter {
    /// By these rules; `namespaces` in the order of their numbers.
    pub fn new(config: &Config, namespaces: &[String], now: BootTime) -> Self {
        let state = State {
            rules: Vec::new(),
            reused_after: 2,
            counts: false,
            seen: None,
            budget: WriteBudget::new(None, now),
            worth: Worth::default(),
        };
        let admitter = Self(Mutex::new(state));
        admitter.set(config, namespaces, now);
        admitter
    }

    /// By other rules from now on.
    pub fn set(&self, config: &Config, namespaces: &[String], now: BootTime) {
        let nvme = config.nvme.as_ref();
        let rules = |name: &String| Rules {
            admission: config.admission_of(name),
            promote_after: (config.policies.get(name).and_then(|policy| policy.promote_after))
                .or(nvme.map(|nvme| nvme.promote_after))
                .unwrap_or(1),
        };
        let mut state = self.0.lock();
        state.rules = namespaces.iter().map(rules).collect();
        state.reused_after = nvme.map_or(2, |nvme| nvme.reused_after);
        state.counts = config.counts_requests();
        state.budget.set(nvme.and_then(|nvme| nvme.write_budget), now);
    }

    /// A request asks for these blocks.
    pub fn count(&self, layout: &RegisteredLayout, hashes: &[SequenceHash]) {
        let mut state = self.0.lock();
        if state.counts {
            let (frequencies, depths) = state.seen.get_or_insert_default();
            for (depth, hash) in hashes.iter().enumerate() {
                let name = name(layout, hash);
                frequencies.count(name);
                depths.note(name, depth);
            }
        }
    }

    /// True where a block of this group goes to disk now; then its bytes count.
    pub fn admits(
        &self,
        layout: &RegisteredLayout,
        group: u16,
        hash: &SequenceHash,
        occasion: Occasion,
        now: BootTime,
    ) -> bool {
        let bytes = layout.group(u32::from(group)).map_or(0, |group| group.block_bytes);
        self.0.lock().admits(layout, hash, bytes, occasion, now)
    }

    /// True where enough requests asked for the block.
    pub fn is_reused(&self, layout: &RegisteredLayout, hash: &SequenceHash) -> bool {
        self.0.lock().is_reused(layout, hash)
    }

    /// Which blocks of this namespace go to disk.
    pub fn admission(&self, namespace: NamespaceId) -> Admission {
        self.0.lock().rules(namespace).admission
    }
}

impl State {
    fn rules(&self, namespace: NamespaceId) -> Rules {
        self.rules.get(namespace.0).copied().unwrap_or(Rules { admission: Admission::All, promote_after: 1 })
    }

    /// How many requests asked for the block, as far as that is counted.
    fn requests(&self, layout: &RegisteredLayout, hash: &SequenceHash) -> u8 {
        self.seen.as_ref().map_or(0, |(frequencies, _)| frequencies.of(name(layout, hash)))
    }

    fn is_reused(&self, layout: &RegisteredLayout, hash: &SequenceHash) -> bool {
        self.requests(layout, hash) >= self.reused_after
    }

    fn admits(
        &mut self,
        layout: &RegisteredLayout,
        hash: &SequenceHash,
        bytes: u64,
        occasion: Occasion,
        now: BootTime,
    ) -> bool {
        if occasion == Occasion::Must {
            // Beyond the budget, too; but it counts.
            self.budget.take(bytes, now);
            return true;
        }
        let Rules { admission, promote_after } = self.rules(layout.namespace);
        let wanted = match admission {
            Admission::All => occasion != Occasion::Leaving,
            Admission::Reused => occasion != Occasion::Leaving && self.is_reused(layout, hash),
            Admission::Evicted => occasion == Occasion::Leaving,
        };
        let promoted =
            occasion != Occasion::Promoted || promote_after <= 1 || self.requests(layout, hash) >= promote_after;
        wanted && promoted && {
            let left = self.budget.left(now);
            let value = self.value(layout, hash, bytes);
            self.worth.admits(value, left) && self.budget.take(bytes, now)
        }
    }

    /// What keeping a byte of the block saves, in tokens that attend to nothing.
    fn value(&self, layout: &RegisteredLayout, hash: &SequenceHash, bytes: u64) -> f64 {
        let depth = self.seen.as_ref().map_or(0, |(_, depths)| depths.of(name(layout, hash)));
        let requests = f64::from(self.requests(layout, hash).max(1));
        requests * recompute_cost(layout.layout.block_tokens, depth) / bytes.max(1) as f64
    }
}

/// A request asks for blocks that are in memory: those that are not in the bucket, and were asked for often enough, go there now.
pub fn upload_reused(daemon: &Daemon, layout: &Arc<RegisteredLayout>, group: u16, hashes: &[SequenceHash]) {
    let Some(object) = daemon.object.as_ref().filter(|_| daemon.uploads_of(layout.namespace) == Uploads::Reused) else {
        return;
    };
    let mut parent = None;
    for (hash, in_bucket) in hashes.iter().zip(object.presence(layout, group, hashes)) {
        if !in_bucket && daemon.admitter.is_reused(layout, hash) {
            let key = SlotKey { layout: layout.ordinal, group, hash: *hash };
            let Some(block) = daemon.host.lease_quietly(layout.namespace, &key) else { return };
            let (layout, sums) = (Arc::clone(layout), Vec::new());
            let offer = Offer { layout, group, hash: *hash, parent, block, sums, durable: false, has_waited: false };
            if matches!(object.offer(offer), Offered::Full) {
                return;
            }
        }
        parent = Some(*hash);
    }
}

/// A request asks for blocks that are in memory: those that are not on disk, and were asked for often enough, go there now.
pub fn admit_reused(daemon: &Daemon, layout: &RegisteredLayout, group: u16, hashes: &[SequenceHash], on_disk: &[bool]) {
    let selective = daemon.admitter.admission(layout.namespace) == Admission::Reused;
    let Some(nvme) = daemon.nvme.as_ref().filter(|_| selective) else { return };
    let mut parent = None;
    for (hash, on_disk) in hashes.iter().zip(on_disk) {
        if !on_disk {
            if !nvme.has_dirty_room() {
                return;
            }
            if daemon.admitter.admits(layout, group, hash, Occasion::AskedFor, clock::now()) {
                let _ = nvme.write_back(&BlockRef { layout, group, hash: *hash }, parent, Vec::new(), false);
            } else {
                telemetry::add(&daemon.traffic.not_admitted, 1);
            }
        }
        parent = Some(*hash);
    }
}
