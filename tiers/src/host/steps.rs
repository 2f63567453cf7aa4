//! The lock, let go after each few steps: long work under it keeps nobody else from it for long.

use parking_lot::MutexGuard;

use super::lock::StateLock;
use super::{HostTier, State};
use crate::caps;

/// See the head of this file. Between two steps others may have changed anything.
pub(super) struct Steps<'a> {
    lock: &'a StateLock,
    state: MutexGuard<'a, State>,
    /// Until the lock is let go, whoever waits.
    left: u32,
    /// Until it is looked whether somebody waits.
    unseen: u32,
}

impl<'a> Steps<'a> {
    pub(super) fn begin(tier: &'a HostTier) -> Self {
        let (left, unseen) = (caps::CHANGES_PER_LOCK, caps::CHANGES_PER_LOOK);
        Self { lock: &tier.state, state: tier.state.lock_for_long(), left, unseen }
    }

    /// Takes the next step: a block is looked up, or changed.
    pub(super) fn next(&mut self) -> &mut State {
        self.take(1)
    }

    /// Takes a step as long as so many.
    pub(super) fn take(&mut self, steps: u32) -> &mut State {
        if self.left == 0 {
            // Other long work that waits goes first: without that, this thread would mostly be the next, too.
            MutexGuard::bump(&mut self.state);
            self.left = caps::CHANGES_PER_LOCK;
        }
        if self.unseen == 0 {
            if self.lock.is_wanted() {
                self.lock.give_way(&mut self.state);
            }
            self.unseen = caps::CHANGES_PER_LOOK;
        }
        self.left = self.left.saturating_sub(steps);
        self.unseen = self.unseen.saturating_sub(steps);
        &mut self.state
    }
}
