//! Holds: sets of blocks that may not be evicted until a time. A pin is asked for by name and lasts for
//! hours; a ticket comes with a look-up's answer and lasts until its reader had time to come.
//!
//! A hold may name 65,536 blocks, so that it is made and ended in steps, with the lock let go in between. Until it is whole nobody
//! finds it by its name, and it does not expire. What it has pinned so far counts, and cannot be deleted, even where the hold is
//! refused in the end and takes all of it back.

use std::collections::{BTreeMap, BTreeSet};

use kvstore_plane::SequenceHash;

use super::namespace::{NamespaceId, RegisteredLayout};
use super::steps::Steps;
use super::{HostTier, State};
use crate::caps;
use crate::clock::BootTime;
use crate::slots::Pinned;

/// Names a hold. Random enough not to be guessed by another client of the namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct HoldId(pub u128);

/// Why blocks are held.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
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
    /// Too much of the tier is held by all namespaces together. How much is theirs to know.
    #[error(
        "all namespaces together may pin at most {bytes_max} bytes ({}% of the Host tier); unpin blocks, or wait until a pin ends",
        caps::HELD_PERCENT_MAX
    )]
    TierFull {
        /// The most.
        bytes_max: u64,
    },
    /// More than may be held, though nothing else is held: to wait does not help.
    #[error(
        "these blocks alone are more than the {bytes_max} bytes ({percent}% of the Host tier) that may be pinned; name fewer blocks, or raise pin_percent or host.bytes"
    )]
    TooLarge {
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
    pins: Vec<Pinned>,
    expires: BootTime,
    kind: HoldKind,
}

/// The holds of one namespace.
#[derive(Default)]
pub(super) struct Holds {
    // Trees: they grow a little at a time, and the lock is held meanwhile.
    by_id: BTreeMap<HoldId, Hold>,
    by_expiry: BTreeSet<(BootTime, HoldId)>,
    /// Blocks of all holds together, and those that holds which are being made may get.
    blocks: usize,
    /// Holds that are being made.
    making: usize,
    tickets: usize,
}

impl Holds {
    /// Makes room for a hold of so many blocks, or none.
    fn begin(&mut self, blocks: usize) -> Result<(), HoldError> {
        if self.by_id.len() + self.making >= caps::HOLDS_MAX || self.blocks + blocks > caps::HELD_KEYS_MAX {
            return Err(HoldError::TooMany);
        }
        self.making += 1;
        self.blocks += blocks;
        Ok(())
    }

    /// A hold that began with room for so many `blocks` is whole, or was refused.
    fn end_making(&mut self, blocks: usize, made: Option<(HoldId, Hold)>) {
        self.making -= 1;
        self.blocks -= blocks;
        if let Some((id, hold)) = made {
            self.blocks += hold.pins.len();
            self.tickets += usize::from(hold.kind == HoldKind::Ticket);
            self.by_expiry.insert((hold.expires, id));
            self.by_id.insert(id, hold);
        }
    }

    /// The hold is none any more; its blocks are yet to be unpinned.
    fn remove(&mut self, id: HoldId) -> Option<Hold> {
        let hold = self.by_id.remove(&id)?;
        self.by_expiry.remove(&(hold.expires, id));
        self.blocks -= hold.pins.len();
        self.tickets -= usize::from(hold.kind == HoldKind::Ticket);
        Some(hold)
    }

    fn remove_expired(&mut self, now: BootTime) -> Option<Hold> {
        let (_, id) = self.by_expiry.first().filter(|(expires, _)| *expires <= now)?;
        self.remove(*id)
    }
}

impl State {
    /// Of all namespaces.
    fn pinned_bytes(&self) -> u64 {
        self.namespaces.iter().map(|namespace| namespace.slots.pinned_bytes()).sum()
    }

    /// Whether what is pinned is within the bounds of its namespace and of the tier.
    fn check_held(&self, namespace: NamespaceId) -> Result<(), HoldError> {
        let Some(at) = self.namespace(namespace) else { return Err(HoldError::TooMany) };
        let percent = at.limits.held_percent.min(caps::HELD_PERCENT_MAX);
        let (held_bytes, bytes_max) = (at.slots.pinned_bytes(), self.limits.bytes / 100 * percent);
        if held_bytes > bytes_max {
            return Err(HoldError::TooManyBytes { held_bytes, bytes_max, percent });
        }
        let bytes_max = self.limits.bytes / 100 * caps::HELD_PERCENT_MAX;
        if self.pinned_bytes() > bytes_max { Err(HoldError::TierFull { bytes_max }) } else { Ok(()) }
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
        let room: usize = runs.iter().map(|(_, _, hashes)| hashes.len()).sum();
        if let Some(namespace) = self.state.lock().namespace_mut(namespace) {
            namespace.holds.begin(room)?;
        }
        // Its memory is taken before the lock.
        let mut pins = Vec::with_capacity(room);
        let pinned = self.pin_runs(namespace, runs, &mut pins);
        let blocks = pins.len();
        let (made, refused) = match pinned {
            Ok(()) => (Some((id, Hold { pins, expires, kind })), None),
            Err(refused) => {
                self.unpin(namespace, &pins);
                (None, Some(refused))
            }
        };
        let mut state = self.state.lock();
        let Some(at) = state.namespace_mut(namespace) else { return Err(HoldError::TooMany) };
        at.holds.end_making(room, made);
        let held_bytes = at.slots.pinned_bytes();
        let held_by_all = state.pinned_bytes();
        match refused {
            None => Ok(Held { id, blocks }),
            Some(HoldError::TooManyBytes { bytes_max, percent, .. }) if held_bytes == 0 => {
                Err(HoldError::TooLarge { bytes_max, percent })
            }
            Some(HoldError::TooManyBytes { bytes_max, percent, .. }) => {
                Err(HoldError::TooManyBytes { held_bytes, bytes_max, percent })
            }
            Some(HoldError::TierFull { bytes_max }) if held_by_all == 0 => {
                Err(HoldError::TooLarge { bytes_max, percent: caps::HELD_PERCENT_MAX })
            }
            Some(refused) => Err(refused),
        }
    }

    fn pin_runs(
        &self,
        namespace: NamespaceId,
        runs: &[(&RegisteredLayout, u16, &[SequenceHash])],
        pins: &mut Vec<Pinned>,
    ) -> Result<(), HoldError> {
        let mut steps = Steps::begin(self);
        for (layout, group, hashes) in runs {
            for hash in *hashes {
                // Looked at now and then: a hold that is too large stops early.
                if pins.len().is_multiple_of(caps::CHANGES_PER_LOCK as usize) {
                    steps.next().check_held(namespace)?;
                }
                let at = steps.next().namespace_mut(namespace);
                let Some(pinned) = at.and_then(|at| at.slots.pin(&Self::key(layout, *group, *hash))) else { break };
                pins.push(pinned);
            }
        }
        steps.next().check_held(namespace)
    }

    fn unpin(&self, namespace: NamespaceId, pins: &[Pinned]) {
        let mut steps = Steps::begin(self);
        for pinned in pins {
            if let Some(at) = steps.next().namespace_mut(namespace) {
                at.slots.unpin(pinned);
            }
        }
    }

    /// Ends the holds whose time is over.
    pub(super) fn expire_holds(&self, now: BootTime) {
        let count = self.state.lock().namespaces.len();
        for namespace in (0..count).map(NamespaceId) {
            let mut steps = Steps::begin(self);
            while let Some(hold) = steps.next().namespace_mut(namespace).and_then(|at| at.holds.remove_expired(now)) {
                for pinned in &hold.pins {
                    if let Some(at) = steps.next().namespace_mut(namespace) {
                        at.slots.unpin(pinned);
                    }
                }
            }
        }
    }

    /// Ends a hold of this kind; false when there is none (any more).
    pub fn release_hold(&self, namespace: NamespaceId, id: HoldId, kind: HoldKind) -> bool {
        let removed = self.state.lock().namespace_mut(namespace).and_then(|at| {
            at.holds.by_id.get(&id).filter(|hold| hold.kind == kind)?;
            at.holds.remove(id)
        });
        let Some(hold) = removed else { return false };
        self.unpin(namespace, &hold.pins);
        true
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

    /// Pins at this moment.
    pub fn pins(&self) -> Vec<HoldId> {
        let state = self.state.lock();
        let holds = state.namespaces.iter().flat_map(|namespace| &namespace.holds.by_id);
        holds.filter(|(_, hold)| hold.kind == HoldKind::Pin).map(|(id, _)| *id).collect()
    }

    /// Tickets at this moment.
    pub fn ticket_count(&self) -> usize {
        self.state.lock().namespaces.iter().map(|namespace| namespace.holds.tickets).sum()
    }
}
