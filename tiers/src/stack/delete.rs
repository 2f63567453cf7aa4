//! Deletion, in every tier.

use std::sync::Arc;

use futures::future::join_all;
use kvstore_plane::SequenceHash;

use super::{Lower, Stack};
use crate::below::{Ask, NotDeleted};
use crate::block::{OwnedRun, Run};
use crate::caps;
use crate::slots::Delete;

/// What became of blocks that were to be deleted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Deleted {
    /// Blocks that were in some tier, and are in none any more.
    pub deleted: usize,
    /// Blocks that a hold keeps, in every tier.
    pub pinned: usize,
}

/// Blocks that are being deleted, and what is known of each.
struct Deleting<'a> {
    run: &'a Run<'a>,
    outcomes: Vec<Delete>,
}

impl Stack {
    /// Deletes blocks in every tier, but for those that a hold keeps in one of them. Where this ends well, no crash brings one back. A
    /// tier that cannot promise that fails the whole; the others have deleted what they had. Where the future is dropped, some may be
    /// deleted.
    pub async fn delete(&self, run: &Run<'_>) -> Result<Deleted, NotDeleted> {
        let mut deleting = Deleting { run, outcomes: vec![Delete::Absent; run.hashes.len()] };
        let held = self.host.held(run.layout, run.group, run.hashes);
        deleting.note(run.hashes, held.into_iter().map(|held| if held { Delete::Pinned } else { Delete::Absent }));
        for lower in &self.below {
            let held = lower.store.presence(run, Ask::Held).there;
            deleting.note(run.hashes, held.into_iter().map(|held| if held { Delete::Pinned } else { Delete::Absent }));
        }
        // The tiers below first: a promotion that began before is then superseded in memory.
        let below = self.delete_below(&mut deleting, |_, unheld| unheld).await;
        self.delete_above(&mut deleting);
        below?;
        // While memory still had a block, its copies may have gone below again. From now on only promotions of those bring it back.
        for _ in 0..caps::DELETE_ROUNDS_MAX {
            let coming = |lower: &Lower, unheld: OwnedRun| {
                let there = lower.store.presence(&unheld.as_ref(), Ask::Coming).there;
                let hashes =
                    unheld.hashes.iter().zip(there).filter(|(_, there)| *there).map(|(hash, _)| *hash).collect();
                OwnedRun { hashes, ..unheld }
            };
            if !self.delete_below(&mut deleting, coming).await? {
                return Ok(deleting.sum());
            }
            self.delete_above(&mut deleting);
        }
        let problem =
            "the blocks are stored again as fast as they are deleted: delete them again once nobody stores them";
        Err(NotDeleted(problem.into()))
    }

    fn delete_above(&self, deleting: &mut Deleting<'_>) {
        let unheld = deleting.unheld();
        let above = self.host.delete(&unheld.layout, unheld.group, &unheld.hashes);
        deleting.note(&unheld.hashes, above.into_iter());
    }

    /// Deletes in each tier what `chosen` says of the blocks that nothing holds. False where that is nothing in any tier.
    async fn delete_below(
        &self,
        deleting: &mut Deleting<'_>,
        chosen: impl Fn(&Lower, OwnedRun) -> OwnedRun,
    ) -> Result<bool, NotDeleted> {
        let runs: Vec<OwnedRun> = self.below.iter().map(|lower| chosen(lower, deleting.unheld())).collect();
        let pairs = self.below.iter().zip(&runs).filter(|(_, run)| !run.hashes.is_empty());
        let (runs, ends): (Vec<_>, Vec<_>) =
            pairs.map(|(lower, run)| (run, Arc::clone(&lower.store).delete(run.clone()))).unzip();
        let mut failed = Ok(());
        for (run, ended) in runs.iter().zip(join_all(ends).await) {
            match ended {
                Ok(outcomes) => deleting.note(&run.hashes, outcomes.into_iter()),
                Err(error) => failed = failed.and(Err(error)),
            }
        }
        failed.map(|()| !runs.is_empty())
    }
}

impl Deleting<'_> {
    /// What became of some of the blocks in one tier, in their order. A block that one tier keeps is kept; one that some tier had is
    /// deleted.
    fn note(&mut self, hashes: &[SequenceHash], outcomes: impl Iterator<Item = Delete>) {
        let mut others = hashes.iter().zip(outcomes).peekable();
        for (hash, outcome) in self.run.hashes.iter().zip(&mut self.outcomes) {
            let Some((_, other)) = others.next_if(|(other, _)| *other == hash) else { continue };
            *outcome = match (*outcome, other) {
                (Delete::Pinned, _) | (_, Delete::Pinned) => Delete::Pinned,
                (Delete::Deleted, _) | (_, Delete::Deleted) => Delete::Deleted,
                (Delete::Absent, Delete::Absent) => Delete::Absent,
            };
        }
    }

    /// Those that nothing holds, as far as is known by now.
    fn unheld(&self) -> OwnedRun {
        let unheld = self.run.hashes.iter().zip(&self.outcomes).filter(|(_, outcome)| **outcome != Delete::Pinned);
        let hashes = unheld.map(|(hash, _)| *hash).collect();
        OwnedRun { layout: Arc::clone(self.run.layout), group: self.run.group, hashes }
    }

    fn sum(&self) -> Deleted {
        let count = |what| self.outcomes.iter().filter(|outcome| **outcome == what).count();
        Deleted { deleted: count(Delete::Deleted), pinned: count(Delete::Pinned) }
    }
}
