//! What goes to disk and to the bucket: by the configuration, by how often it was asked for, and within the budget.

use std::sync::Arc;

use kvstore_tiers::admission::{Admission, Frequencies, WriteBudget};
use kvstore_tiers::host::RegisteredLayout;
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

struct State {
    admission: Admission,
    /// Somebody wants to know what two requests asked for.
    counts: bool,
    /// Made when it is first needed: 2 MiB.
    frequencies: Option<Frequencies>,
    budget: WriteBudget,
}

impl Admitter {
    /// By these rules.
    pub fn new(config: &Config, now: BootTime) -> Self {
        let state =
            State { admission: Admission::All, counts: false, frequencies: None, budget: WriteBudget::new(None, now) };
        let admitter = Self(Mutex::new(state));
        admitter.set(config, now);
        admitter
    }

    /// By other rules from now on.
    pub fn set(&self, config: &Config, now: BootTime) {
        let (admission, bytes_per_day) =
            config.nvme.as_ref().map_or((Admission::All, None), |nvme| (nvme.admission, nvme.write_budget));
        let mut state = self.0.lock();
        state.admission = admission;
        state.counts = config.counts_requests();
        state.budget.set(bytes_per_day, now);
    }

    /// A request asks for these blocks.
    pub fn count(&self, layout: &RegisteredLayout, hashes: &[SequenceHash]) {
        let mut state = self.0.lock();
        if state.counts {
            let frequencies = state.frequencies.get_or_insert_default();
            hashes.iter().for_each(|hash| frequencies.count(name(layout, hash)));
        }
    }

    /// True where a block that was stored just now goes to disk; then its bytes count. `must`: somebody waits for it there.
    pub fn admits(
        &self,
        layout: &RegisteredLayout,
        hash: &SequenceHash,
        bytes: u64,
        must: bool,
        now: BootTime,
    ) -> bool {
        let mut state = self.0.lock();
        let reused = match state.admission {
            Admission::All => true,
            // Asked for by the request that stores it now, and by one before.
            Admission::Reused => state.is_reused(layout, hash),
        };
        // What must be written counts, too.
        let within = (must || reused) && state.budget.take(bytes, now);
        must || within
    }

    /// True where two requests asked for the block.
    pub fn is_reused(&self, layout: &RegisteredLayout, hash: &SequenceHash) -> bool {
        self.0.lock().is_reused(layout, hash)
    }

    /// True where blocks that are read again go to disk then.
    pub fn is_selective(&self) -> bool {
        self.0.lock().admission == Admission::Reused
    }
}

impl State {
    fn is_reused(&self, layout: &RegisteredLayout, hash: &SequenceHash) -> bool {
        self.frequencies.as_ref().is_some_and(|frequencies| frequencies.of(name(layout, hash)) >= 2)
    }
}

/// A request asks for blocks that are in memory: those that are not in the bucket, and are asked for a second time, go there now.
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

/// A request asks for blocks that are in memory: those that are not on disk, and are asked for a second time, go there now.
pub fn admit_reused(daemon: &Daemon, layout: &RegisteredLayout, group: u16, hashes: &[SequenceHash], on_disk: &[bool]) {
    let Some(nvme) = daemon.nvme.as_ref().filter(|_| daemon.admitter.is_selective()) else { return };
    let bytes = layout.group(u32::from(group)).map_or(0, |group| group.block_bytes);
    let mut parent = None;
    for (hash, on_disk) in hashes.iter().zip(on_disk) {
        if !on_disk {
            if !nvme.has_dirty_room() {
                return;
            }
            if daemon.admitter.admits(layout, hash, bytes, false, clock::now()) {
                let _ = nvme.write_back(&BlockRef { layout, group, hash: *hash }, parent, Vec::new(), false);
            } else {
                telemetry::add(&daemon.traffic.not_admitted, 1);
            }
        }
        parent = Some(*hash);
    }
}
