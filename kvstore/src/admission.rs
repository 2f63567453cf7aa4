//! What goes to disk: by the configuration, by how often it was asked for, and within the budget.

use kvstore_tiers::admission::{Admission, Frequencies, WriteBudget};
use kvstore_tiers::host::RegisteredLayout;
use kvstore_tiers::nvme::BlockRef;
use kvstore_tiers::{BootTime, SequenceHash};
use parking_lot::Mutex;

use crate::accesses::name;
use crate::daemon::Daemon;
use crate::{clock, telemetry};

/// See the head of this file.
pub struct Admitter(Mutex<State>);

struct State {
    admission: Admission,
    /// Made when it is first needed: 2 MiB.
    frequencies: Option<Frequencies>,
    budget: WriteBudget,
}

impl Admitter {
    /// By these rules.
    pub fn new(admission: Admission, bytes_per_day: Option<u64>, now: BootTime) -> Self {
        Self(Mutex::new(State { admission, frequencies: None, budget: WriteBudget::new(bytes_per_day, now) }))
    }

    /// By other rules from now on.
    pub fn set(&self, admission: Admission, bytes_per_day: Option<u64>, now: BootTime) {
        let mut state = self.0.lock();
        state.admission = admission;
        state.budget.set(bytes_per_day, now);
    }

    /// A request asks for these blocks.
    pub fn count(&self, layout: &RegisteredLayout, hashes: &[SequenceHash]) {
        let mut state = self.0.lock();
        if state.admission == Admission::Reused {
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
            Admission::Reused => {
                state.frequencies.as_ref().is_some_and(|frequencies| frequencies.of(name(layout, hash)) >= 2)
            }
        };
        // What must be written counts, too.
        let within = (must || reused) && state.budget.take(bytes, now);
        must || within
    }

    /// True where blocks that are read again go to disk then.
    pub fn is_selective(&self) -> bool {
        self.0.lock().admission == Admission::Reused
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
