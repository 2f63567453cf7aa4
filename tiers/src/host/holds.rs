//! Holds: sets of blocks that may not be evicted until a time. A pin is asked for by name and lasts for
//! hours; a ticket comes with a look-up's answer and lasts until its reader had time to come.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use kvstore_plane::{SequenceHash, SlotKey};
use kvstore_transfer::Slab;

use super::HostTier;
use super::namespace::{NamespaceId, RegisteredLayout};
use crate::caps;
use crate::clock::BootTime;
use crate::residency::Residency;

/// Names a hold. Random enough not to be guessed by another client of the namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct HoldId(pub u128);

/// Why blocks are held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HoldKind {
    /// Asked for by name.
    Pin,
    /// For whoever redeems a look-up's ticket.
    Ticket,
}

/// Why blocks were not held.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HoldError {
    /// Too much of the tier is held already.
    #[error(
        "{held_bytes} bytes are pinned, and at most {bytes_max} ({percent}% of the Host tier) may be; unpin blocks, or wait until a pin ends"
    )]
    TooManyBytes {
        /// Bytes pinned now.
        held_bytes: u64,
        /// The most.
        bytes_max: u64,
        /// The same, of the tier.
        percent: u64,
    },
    /// Too many holds.
    #[error(
        "the namespace would have more than {} pins and tickets, or they would name more than {} blocks; unpin blocks, or wait until a pin ends",
        caps::HOLDS_MAX,
        caps::HELD_KEYS_MAX
    )]
    TooMany,
}

/// What was held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// The hold.
    pub id: HoldId,
    /// Blocks of it: the leading run that was readable.
    pub blocks: usize,
}

struct Hold {
    keys: Vec<SlotKey>,
    expires: BootTime,
    kind: HoldKind,
}

/// The holds of one namespace.
#[derive(Default)]
pub(super) struct Holds {
    by_id: HashMap<HoldId, Hold>,
    by_expiry: BTreeSet<(BootTime, HoldId)>,
    /// Keys of all holds together.
    keys: usize,
}

type HostResidency = Residency<Arc<Slab>>;

impl Holds {
    pub(super) fn expire(&mut self, residency: &mut HostResidency, now: BootTime) {
        while let Some((expires, id)) = self.by_expiry.first().copied()
            && expires <= now
        {
            self.release(residency, id);
        }
    }

    fn release(&mut self, residency: &mut HostResidency, id: HoldId) -> Option<HoldKind> {
        let hold = self.by_id.remove(&id)?;
        self.by_expiry.remove(&(hold.expires, id));
        self.keys -= hold.keys.len();
        hold.keys.iter().for_each(|key| residency.unpin(key));
        Some(hold.kind)
    }

    fn insert(&mut self, id: HoldId, hold: Hold) {
        self.by_expiry.insert((hold.expires, id));
        self.keys += hold.keys.len();
        self.by_id.insert(id, hold);
    }
}

impl HostTier {
    /// Holds the leading readable run of each list of `keys` until `expires`. Holds all of it or, for
    /// lack of quota, nothing.
    pub fn hold(
        &self,
        namespace: NamespaceId,
        id: HoldId,
        kind: HoldKind,
        runs: &[(&RegisteredLayout, u16, &[SequenceHash])],
        expires: BootTime,
    ) -> Result<Held, HoldError> {
        let mut state = self.state.lock();
        let tier_bytes = state.limits.bytes;
        let Some(namespace) = state.namespace_mut(namespace) else { return Err(HoldError::TooMany) };
        let percent = namespace.limits.held_percent.min(caps::HELD_PERCENT_MAX);
        let bytes_max = tier_bytes / 100 * percent;
        let more: usize = runs.iter().map(|(_, _, hashes)| hashes.len()).sum();
        if namespace.holds.by_id.len() >= caps::HOLDS_MAX || namespace.holds.keys + more > caps::HELD_KEYS_MAX {
            return Err(HoldError::TooMany);
        }
        let mut keys = Vec::new();
        for (layout, group, hashes) in runs {
            let run = hashes.iter().map(|hash| Self::key(layout, *group, *hash));
            keys.extend(run.take_while(|key| namespace.residency.pin(key).is_some()));
        }
        let held_bytes = namespace.residency.pinned_bytes();
        if held_bytes > bytes_max {
            keys.iter().for_each(|key| namespace.residency.unpin(key));
            let held_bytes = namespace.residency.pinned_bytes();
            return Err(HoldError::TooManyBytes { held_bytes, bytes_max, percent });
        }
        let blocks = keys.len();
        namespace.holds.insert(id, Hold { keys, expires, kind });
        Ok(Held { id, blocks })
    }

    /// Ends a hold of this kind; false when there is none (any more).
    pub fn release_hold(&self, namespace: NamespaceId, id: HoldId, kind: HoldKind) -> bool {
        let mut state = self.state.lock();
        let Some(namespace) = state.namespace_mut(namespace) else { return false };
        if namespace.holds.by_id.get(&id).is_none_or(|hold| hold.kind != kind) {
            return false;
        }
        namespace.holds.release(&mut namespace.residency, id).is_some()
    }

    /// True while there is such a hold, of either kind.
    pub fn has_hold(&self, namespace: NamespaceId, id: HoldId) -> bool {
        let state = self.state.lock();
        state.namespace(namespace).is_some_and(|namespace| namespace.holds.by_id.contains_key(&id))
    }

    /// True while the ticket holds its blocks.
    pub fn has_ticket(&self, namespace: NamespaceId, id: HoldId, now: BootTime) -> bool {
        let state = self.state.lock();
        let hold = state.namespace(namespace).and_then(|namespace| namespace.holds.by_id.get(&id));
        hold.is_some_and(|hold| hold.kind == HoldKind::Ticket && hold.expires > now)
    }

    /// Pins and tickets at this moment.
    pub fn hold_counts(&self) -> (usize, usize) {
        let state = self.state.lock();
        let holds = state.namespaces.iter().flat_map(|namespace| namespace.holds.by_id.values());
        holds.fold((0, 0), |(pins, tickets), hold| match hold.kind {
            HoldKind::Pin => (pins + 1, tickets),
            HoldKind::Ticket => (pins, tickets + 1),
        })
    }
}
