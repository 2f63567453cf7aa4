//! Holds over all tiers: pins and tickets.
//!
//! A pin keeps its blocks where they last. What memory alone has is written to disk first, and stays in memory, too. With no disk,
//! memory keeps the promise. In the bucket a pin is a reference, which keeps the blocks from collectors; that alone holds blocks that are
//! only there. A ticket keeps blocks where a look-up found them, for as long as its reader takes to come.

use std::sync::Arc;

use kvstore_plane::SequenceHash;
use tokio::sync::oneshot;

use super::demote::Copy;
use super::room::{Level, Wish};
use super::{Lower, Stack};
use crate::below::{Ask, Hold, Holding, NotHeld};
use crate::block::{BlockRef, OwnedRun, Run};
use crate::caps;
use crate::clock::BootTime;
use crate::host::{HoldError, HoldId, HoldKind, HostTier, NamespaceId};
use crate::slots::Presence;
use crate::tier::{Tier, TierSet};

/// Why a hold was not made.
#[derive(Debug, thiserror::Error)]
pub enum HoldRefused {
    /// Too much of memory would be held.
    #[error(transparent)]
    Memory(#[from] HoldError),
    /// Too much of a tier below would be.
    #[error("{0}: unpin other blocks, or wait until a pin expires")]
    TooMuch(String),
    /// These blocks alone are too much: to wait does not help.
    #[error("{0}")]
    TooLarge(String),
    /// Blocks left while they were being held, time and again.
    #[error("blocks left memory while they were being pinned: try again")]
    Left,
    /// The disk did not take what is only in memory.
    #[error(
        "the blocks were not pinned, because the disk did not take those that are only in memory: pin them again once it takes writes"
    )]
    NotWritten,
    /// The disk cannot record it.
    #[error("the blocks were not pinned, because {0}: pin them again once it takes writes")]
    NotRecorded(String),
    /// Blocks are only in the bucket, and it does not answer.
    #[error("some blocks are only in the object store, and the daemon could not record the pin there: {0}")]
    NotReferred(String),
}

/// What a hold has taken while nobody was told of it. A call may end before its answer: it fails, its deadline passes, or its client
/// goes. Nobody then knows the hold's name, so that nobody could end it. Dropped before [`Self::keep`], it gives back what it took in
/// every tier.
pub struct Taken {
    stack: Arc<Stack>,
    namespace: NamespaceId,
    id: HoldId,
    kind: HoldKind,
    /// Where it may have taken something.
    tiers: TierSet,
    is_kept: bool,
}

impl Taken {
    /// Its caller is about to hear of it: it stays until its time, or until the caller ends it.
    pub fn keep(mut self) -> HoldId {
        self.is_kept = true;
        self.id
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        self.stack.host.release_hold(self.namespace, self.id, self.kind);
        for lower in self.stack.below.iter().filter(|lower| self.tiers.has(lower.tier)) {
            Arc::clone(&lower.store).release(self.id, self.kind);
        }
    }
}

/// How long a hold lasts.
#[derive(Clone, Copy, Debug)]
pub struct Term {
    /// Now.
    pub now: BootTime,
    /// Its end.
    pub expires: BootTime,
}

/// Blocks that were looked up, and in which tiers each was found.
pub struct Found<'a> {
    /// The blocks.
    pub run: Run<'a>,
    /// Where each is.
    pub tiers: Vec<TierSet>,
}

impl Found<'_> {
    /// Those that `is_wanted`.
    fn chosen(&self, is_wanted: impl Fn(TierSet) -> bool) -> OwnedRun {
        let hashes = self.run.hashes.iter().zip(&self.tiers).filter(|(_, tiers)| is_wanted(**tiers));
        OwnedRun {
            layout: Arc::clone(self.run.layout),
            group: self.run.group,
            hashes: hashes.map(|(hash, _)| *hash).collect(),
        }
    }
}

impl Stack {
    /// In which tiers each block of a run is, memory included.
    pub fn residency(&self, run: &Run<'_>, ask: Ask) -> Vec<TierSet> {
        let mut found = self.below(run, ask);
        for (found, presence) in found.iter_mut().zip(self.host.presence(run.layout, run.group, run.hashes)) {
            if presence == Presence::Resident {
                *found = found.with(Tier::Host);
            }
        }
        found
    }

    /// True while a tier below memory holds the block: where it is nowhere, that is a loss.
    pub fn is_held_below(&self, block: &BlockRef<'_>) -> bool {
        self.below.iter().any(|lower| lower.has(block, Ask::Held))
    }

    /// Holds blocks where a look-up found them; `None` where one of them left since.
    pub fn hold_found(
        self: &Arc<Self>,
        namespace: NamespaceId,
        id: HoldId,
        found: &[Found<'_>],
        term: Term,
    ) -> Result<Option<Taken>, HoldRefused> {
        let mut taken = self.nothing_taken(namespace, id, HoldKind::Ticket);
        let resident: Vec<OwnedRun> = found.iter().map(|found| found.chosen(|tiers| tiers.has(Tier::Host))).collect();
        if !taken.in_memory(&resident, term)? {
            return Ok(None);
        }
        for lower in &self.below {
            let fastest = |tiers: TierSet| tiers.fastest() == Some(lower.tier);
            let runs: Vec<OwnedRun> = found.iter().map(|found| found.chosen(fastest)).collect();
            if runs.iter().all(|run| run.hashes.is_empty()) {
                continue;
            }
            // What a restart ends has nothing to wait for.
            let _ = lower.hold(&mut taken, runs.clone(), term).map_err(refused)?;
            if !runs.iter().all(|run| lower.has_all(&run.as_ref())) {
                return Ok(None);
            }
        }
        Ok(Some(taken))
    }

    /// Pins the leading readable run of a prefix, and says how many blocks that is. With a disk, they are LOCAL and the pin is on record
    /// there before this ends. Dropped before that, or where it fails, nothing is pinned. `None` where there is nothing to pin.
    pub async fn pin(
        self: &Arc<Self>,
        prefix: &Run<'_>,
        id: HoldId,
        term: Term,
    ) -> Result<Option<(Taken, usize)>, HoldRefused> {
        for _ in 0..caps::HOLD_ATTEMPTS {
            let mut tiers = self.residency(prefix, Ask::Look);
            let readable = tiers.iter().take_while(|tiers| !tiers.is_empty()).count();
            if readable == 0 {
                return Ok(None);
            }
            tiers.truncate(readable);
            let run = Run { hashes: prefix.hashes.get(..readable).unwrap_or_default(), ..*prefix };
            if let Some(taken) = self.pin_found(&Found { run, tiers }, id, term).await? {
                return Ok(Some((taken, readable)));
            }
        }
        Err(HoldRefused::Left)
    }

    /// `None` where a block left since it was found.
    async fn pin_found(
        self: &Arc<Self>,
        found: &Found<'_>,
        id: HoldId,
        term: Term,
    ) -> Result<Option<Taken>, HoldRefused> {
        let Found { run, tiers } = found;
        let mut taken = self.nothing_taken(run.layout.namespace, id, HoldKind::Pin);
        let is_above = |tiers: TierSet| tiers.has(Tier::Host) && !tiers.has(Tier::Nvme);
        if !taken.in_memory(&[found.chosen(is_above)], term)? {
            return Ok(None);
        }
        if let Some(disk) = self.lower(Tier::Nvme) {
            let above: Vec<usize> = (0..).zip(tiers).filter(|(_, tiers)| is_above(**tiers)).map(|(at, _)| at).collect();
            self.write_for_pin(run, &above).await?;
            // They are there by now, so that the bound on what is pinned sees all of them.
            let holding = disk.hold(&mut taken, vec![run.owned()], term).map_err(refused)?;
            let here = found.chosen(|tiers| tiers.has(Tier::Host) || tiers.has(Tier::Nvme));
            if !disk.has_all(&here.as_ref()) {
                return Ok(None);
            }
            if let Some(recorded) = holding {
                recorded.await.map_err(|not_held| HoldRefused::NotRecorded(not_held.to_string()))?;
            }
        }
        if let Some(bucket) = self.lower(Tier::Object) {
            let referred = match bucket.hold(&mut taken, vec![run.owned()], term) {
                Ok(Some(referred)) => referred.await,
                Ok(None) => Ok(()),
                Err(not_held) => Err(not_held),
            };
            if let Err(not_held) = referred {
                if tiers.iter().any(|tiers| tiers.fastest() == Some(Tier::Object)) {
                    return Err(HoldRefused::NotReferred(not_held.to_string()));
                }
                tracing::warn!(%not_held, "a pin could not be recorded in the bucket: a collector may delete its blocks there, but this node keeps them");
            }
        }
        Ok(Some(taken))
    }

    /// Writes blocks that are only in memory to disk: a pin that is to last needs their bytes there, synced.
    async fn write_for_pin(&self, run: &Run<'_>, above: &[usize]) -> Result<(), HoldRefused> {
        let wish = Wish { namespace: run.layout.namespace, level: Level::Local, upload: false };
        for part in above.chunks(caps::PIN_WRITES_MAX) {
            let mut waiting = Vec::with_capacity(part.len());
            for at in part {
                if !self.until_room(&wish).await {
                    return Err(HoldRefused::NotWritten);
                }
                let parent = at.checked_sub(1).and_then(|before| run.hashes.get(before)).copied();
                let Some(hash) = run.hashes.get(*at) else { continue };
                let block = BlockRef { layout: run.layout, group: run.group, hash: *hash };
                waiting.push(self.offer_for_pin(&block, parent, &wish).await.ok_or(HoldRefused::NotWritten)?);
            }
            for local in waiting {
                local.await.ok().filter(|local| *local).ok_or(HoldRefused::NotWritten)?;
            }
        }
        Ok(())
    }

    /// `None` where the disk does not take the block. A write of it that begins or ends just now is in the way of another, and is found a
    /// moment later.
    async fn offer_for_pin(
        &self,
        block: &BlockRef<'_>,
        parent: Option<SequenceHash>,
        wish: &Wish,
    ) -> Option<oneshot::Receiver<bool>> {
        for attempt in 0..caps::PIN_WRITE_ATTEMPTS {
            let copy = Copy { block: block.owned(), parent, sums: Vec::new(), leased: None };
            if let Some(local) = self.stored(copy, wish).local {
                return Some(local);
            }
            tokio::time::sleep(caps::PIN_WRITE_POLL * (1 << attempt)).await;
        }
        None
    }

    /// Ends a hold in every tier before its time; false where there is none (any more), as far as is known on this node.
    pub fn release(&self, namespace: NamespaceId, id: HoldId, kind: HoldKind) -> bool {
        let mut ended = self.host.release_hold(namespace, id, kind);
        for lower in &self.below {
            ended |= Arc::clone(&lower.store).release(id, kind);
        }
        ended
    }

    fn nothing_taken(self: &Arc<Self>, namespace: NamespaceId, id: HoldId, kind: HoldKind) -> Taken {
        Taken { stack: Arc::clone(self), namespace, id, kind, tiers: TierSet::NONE, is_kept: false }
    }
}

impl Taken {
    /// Takes blocks in memory; false where one of them left.
    fn in_memory(&self, runs: &[OwnedRun], term: Term) -> Result<bool, HoldError> {
        let host: &HostTier = &self.stack.host;
        let named: Vec<_> = runs.iter().map(|run| (&*run.layout, run.group, run.hashes.as_slice())).collect();
        let held = host.hold(self.namespace, self.id, self.kind, &named, term.expires)?;
        Ok(held.blocks == runs.iter().map(|run| run.hashes.len()).sum::<usize>())
    }
}

impl Lower {
    fn hold(&self, taken: &mut Taken, runs: Vec<OwnedRun>, term: Term) -> Result<Holding, NotHeld> {
        taken.tiers = taken.tiers.with(self.tier);
        let hold = Hold { id: taken.id, kind: taken.kind, runs, expires: term.expires, now: term.now };
        Arc::clone(&self.store).hold(hold)
    }

    fn has_all(&self, run: &Run<'_>) -> bool {
        self.store.presence(run, Ask::Look).there.iter().all(|there| *there)
    }
}

fn refused(not_held: NotHeld) -> HoldRefused {
    match not_held {
        NotHeld::TooMuch(why) => HoldRefused::TooMuch(why),
        NotHeld::TooLarge(why) => HoldRefused::TooLarge(why),
        NotHeld::Failed(why) => HoldRefused::NotRecorded(why),
    }
}
