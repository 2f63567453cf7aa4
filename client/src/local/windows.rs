//! Reading a prefix in windows: while the caller uses one, the daemon brings what the next one lacks. So a prompt of any length
//! takes a bounded number of leases, and its reader never waits for a disk that could have been at work.

use std::time::Duration;

use bytes::Bytes;
use kvstore_plane::{SequenceHash, capabilities};

use super::{Kept, LocalGroup, Promoted, Promoting, page_full, sequence_hashes};
use crate::caps::{BLOCKS_PER_PROMOTE_MIN, LEASES_PER_WINDOW_MAX, PROMOTE_BYTES};
use crate::{Client, Error, GroupRef, Leases};

/// What the next step of a reading came to.
pub(crate) enum Step {
    /// The blocks that follow.
    Blocks(Leases),
    /// The next block is in memory no more, and in no tier below; or on its way.
    Missing(Promoted),
    /// The next block is in memory, but cannot be mapped here.
    Elsewhere,
    /// Others of this process have named so many blocks that no word is free.
    PageFull,
    /// All was read.
    Whole,
}

/// A promotion that was asked for ahead of need.
struct Ahead {
    first: usize,
    count: usize,
    promoting: Promoting,
}

/// A prefix that is read in windows.
pub(crate) struct Reading {
    local: LocalGroup,
    hashes: Vec<SequenceHash>,
    window: usize,
    deadline_ms: u32,
    done: usize,
    ahead: Option<Ahead>,
}

impl Reading {
    pub(crate) fn new(local: LocalGroup, hashes: Vec<SequenceHash>, window: usize, deadline_ms: u32) -> Self {
        Self { local, hashes, window, deadline_ms, done: 0, ahead: None }
    }

    /// Blocks that were read.
    pub(crate) fn done(&self) -> usize {
        self.done
    }

    /// Goes on behind a block that is missing. True where more follow.
    pub(crate) fn skip(&mut self) -> bool {
        self.done += 1;
        self.done < self.hashes.len()
    }

    fn part(&self, first: usize, count: usize) -> &[SequenceHash] {
        let rest = self.hashes.get(first..).unwrap_or_default();
        rest.get(..count.min(rest.len())).unwrap_or_default()
    }

    /// The next window, or a part of it. The leases of the one before should be gone by then: where memory is short, the
    /// daemon needs their room for this one.
    pub(crate) async fn step(&mut self) -> Result<Step, Error> {
        if self.done >= self.hashes.len() {
            return Ok(Step::Whole);
        }
        let until_ahead = self.ahead.as_ref().map_or(self.window, |ahead| ahead.first.saturating_sub(self.done));
        let now = self.part(self.done, self.window.min(until_ahead));
        if !now.is_empty() {
            let Ok(leases) = self.local.lease_run(now) else { return Ok(Step::PageFull) };
            if !leases.is_empty() {
                return self.leased(leases).await;
            }
            // What was here a moment ago has left; and what follows it is of no use yet.
            self.ahead = None;
        }
        let (promoted, _kept) = self.promoted().await?;
        if promoted.ready == 0 {
            return Ok(Step::Missing(promoted));
        }
        // More may have come than a window has: the rest is leased from memory, in its turn.
        let now = self.part(self.done, promoted.ready.min(self.window));
        let Ok(leases) = self.local.lease_promoted(now).await else { return Ok(Step::PageFull) };
        match leases.is_empty() {
            true => Ok(Step::Elsewhere),
            false => self.leased(leases).await,
        }
    }

    async fn leased(&mut self, leases: Leases) -> Result<Step, Error> {
        self.done += leases.len();
        self.look_ahead().await?;
        Ok(Step::Blocks(leases))
    }

    /// The outcome of the promotion that is under way for the next block, or of one that begins now.
    async fn promoted(&mut self) -> Result<(Promoted, Kept), Error> {
        if let Some(ahead) = self.ahead.take()
            && ahead.first == self.done
        {
            match ahead.promoting.ended(ahead.count).await {
                // Too many leases in all calls: what is needed now has more patience than what was asked for ahead.
                Err(Error::Busy(_)) => {}
                ended => return ended,
            }
        }
        let hashes = self.part(self.done, self.blocks_per_promote());
        self.local.promote_patiently(hashes, 0, self.deadline_ms).await
    }

    fn blocks_per_promote(&self) -> usize {
        let by_bytes = (PROMOTE_BYTES / self.local.block_bytes.max(1)) as usize;
        by_bytes.clamp(BLOCKS_PER_PROMOTE_MIN, kvstore_plane::caps::HASHES_PER_PROMOTE_MAX)
    }

    /// Asks for what the next window lacks. A prefix that is in memory costs one look at its last block.
    async fn look_ahead(&mut self) -> Result<(), Error> {
        let next = self.part(self.done, self.window);
        let Some(last) = next.last() else { return Ok(()) };
        if self.ahead.is_some()
            || !self.local.attachment.can(capabilities::PROMOTE)
            || self.local.resident_run(&[*last]) > 0
        {
            return Ok(());
        }
        let resident = self.local.resident_run(next);
        let hashes = self.part(self.done + resident, self.blocks_per_promote());
        let count = hashes.len();
        if count > 0 {
            let promoting = self.local.promote(hashes, 0, self.deadline_ms).await?;
            self.ahead = Some(Ahead { first: self.done + resident, count, promoting });
        }
        Ok(())
    }
}

/// The leading blocks of a prefix of any length, window by window: see [`Client::lease_windows`].
pub struct LeaseWindows {
    client: Client,
    reading: Reading,
    unmapped: bool,
}

impl LeaseWindows {
    /// Leases the blocks that follow, at most a window; `None` behind the last block that can be read. What the window after it
    /// lacks is brought into memory meanwhile, so drop a window's leases before you ask for the next one.
    pub async fn next(&mut self) -> Result<Option<Leases>, Error> {
        let step = self.client.within(self.reading.step()).await?;
        match step {
            Step::Blocks(leases) => Ok(Some(leases)),
            Step::Missing(promoted) => promoted.check(self.reading.done()).map(|()| None),
            Step::PageFull => Err(page_full()),
            Step::Elsewhere => {
                self.unmapped = true;
                Ok(None)
            }
            Step::Whole => Ok(None),
        }
    }

    /// Each window from now on has this much time: a reader of many windows gives what is left of its own.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.client = self.client.with_deadline(deadline);
        self.reading.deadline_ms = self.client.deadline_ms();
    }

    /// Blocks that were leased so far, over all windows.
    pub fn done(&self) -> usize {
        self.reading.done()
    }

    /// True where the windows ended at a block that is in the daemon's memory, but cannot be mapped into this process:
    /// [`Client::get_into`] reads it.
    pub fn ended_at_unmapped(&self) -> bool {
        self.unmapped
    }
}

impl Client {
    /// Reads a prefix of any length in place: [`LeaseWindows::next`] leases up to `window` blocks at a time, and brings into
    /// memory what the window after them lacks. Needs the local plane.
    pub async fn lease_windows(
        &self,
        group: &GroupRef,
        hashes: &[Bytes],
        window: usize,
    ) -> Result<LeaseWindows, Error> {
        if !(1..=LEASES_PER_WINDOW_MAX).contains(&window) {
            return Err(Error::Invalid(format!(
                "window: {window} blocks are out of range; a window has 1 to {LEASES_PER_WINDOW_MAX} blocks"
            )));
        }
        let local = self.local_group_for_leases(group).await?;
        let reading = Reading::new(local, sequence_hashes(hashes)?, window, self.deadline_ms());
        Ok(LeaseWindows { client: self.clone(), reading, unmapped: false })
    }
}

const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<LeaseWindows>();
};
