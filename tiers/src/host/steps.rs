//! The lock, let go after each few steps: long work under it keeps nobody else from it for long.

use parking_lot::MutexGuard;

use super::{HostTier, State};
use crate::caps;

/// See the head of this file. Between two steps others may have changed anything.
pub(super) struct Steps<'a> {
    state: MutexGuard<'a, State>,
    left: u32,
}

impl<'a> Steps<'a> {
    pub(super) fn begin(tier: &'a HostTier) -> Self {
        Self { state: tier.state.lock(), left: caps::CHANGES_PER_LOCK }
    }

    /// Takes the next step: a block is looked up, or changed.
    pub(super) fn next(&mut self) -> &mut State {
        self.take(1)
    }

    /// Takes a step as long as so many.
    pub(super) fn take(&mut self, steps: u32) -> &mut State {
        if self.left == 0 {
            // Whoever waits goes first: without that, this thread would mostly be the next, too.
            MutexGuard::bump(&mut self.state);
            self.left = caps::CHANGES_PER_LOCK;
        }
        self.left = self.left.saturating_sub(steps);
        &mut self.state
    }
}
