//! Deletion, in every tier.

use std::sync::Arc;

use futures::future::join_all;

use super::{Lower, Stack};
use crate::below::{Ask, NotDeleted};
use crate::block::{OwnedRun, Run};
use crate::slots::Delete;

/// What became of blocks that were to be deleted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Deleted {
    /// Blocks that were in some tier, and are in none any more.
    pub deleted: usize,
    /// Blocks that a hold keeps, in every tier.
    pub pinned: usize,
}

impl Stack {
    /// Deletes blocks in every tier, but for those that a hold keeps in one of them. Where this ends well, no crash brings one back. A
    /// tier that cannot promise that fails the whole; the others have deleted what they had. Where the future is dropped, some may be
    /// deleted.
    pub async fn delete(&self, run: &Run<'_>) -> Result<Deleted, NotDeleted> {
        let mut held = self.host.held(run.layout, run.group, run.hashes);
        for lower in &self.below {
            let below = lower.store.presence(run, Ask::Held).there;
            held.iter_mut().zip(below).for_each(|(held, below)| *held |= below);
        }
        let unheld = run.hashes.iter().zip(&held).filter(|(_, held)| !**held).map(|(hash, _)| *hash).collect();
        let unheld = OwnedRun { hashes: unheld, ..run.owned() };
        // The tiers below first: a promotion that began before is then superseded in memory, and none can begin after.
        let mut outcomes = vec![Delete::Absent; unheld.hashes.len()];
        let below = self.delete_below(&self.below, &unheld, &mut outcomes).await;
        let above = self.host.delete(&unheld.layout, unheld.group, &unheld.hashes);
        merge(&mut outcomes, above);
        // A copy of what was still in memory may have gone to a faster tier while a slow one was asked.
        let faster = self.below.split_last().map_or(&[][..], |(_, faster)| faster);
        let again = self.delete_below(faster, &unheld, &mut outcomes).await;
        below.and(again)?;
        let count = |what| outcomes.iter().filter(|outcome| **outcome == what).count();
        let pinned = held.iter().filter(|held| **held).count() + count(Delete::Pinned);
        Ok(Deleted { deleted: count(Delete::Deleted), pinned })
    }

    async fn delete_below(&self, tiers: &[Lower], run: &OwnedRun, outcomes: &mut [Delete]) -> Result<(), NotDeleted> {
        let deleting: Vec<_> = tiers.iter().map(|lower| Arc::clone(&lower.store).delete(run.clone())).collect();
        let mut first = Ok(());
        for deleted in join_all(deleting).await {
            match deleted {
                Ok(deleted) => merge(outcomes, deleted),
                Err(error) => first = first.and(Err(error)),
            }
        }
        first
    }
}

/// A block that one tier keeps is kept; one that some tier had is deleted.
fn merge(outcomes: &mut [Delete], others: Vec<Delete>) {
    for (outcome, other) in outcomes.iter_mut().zip(others) {
        *outcome = match (*outcome, other) {
            (Delete::Pinned, _) | (_, Delete::Pinned) => Delete::Pinned,
            (Delete::Deleted, _) | (_, Delete::Deleted) => Delete::Deleted,
            (Delete::Absent, Delete::Absent) => Delete::Absent,
        };
    }
}
