//! Put over the local plane: stage some blocks ahead, leave their bytes in staging memory piece by piece, and let the daemon
//! fetch each piece while the next is left.

use std::sync::Arc;

use kvstore_plane::caps::BLOCKS_PER_STAGE_MAX;
use kvstore_plane::{Command, Completion, SequenceHash, StageBlock};
use kvstore_proto::v1;
use tokio::sync::SemaphorePermit;

use super::attachment::Attachment;
use super::calls::{Waiting, failure};
use super::staging::Place;
use crate::Error;

/// Blocks that one put has staged and not brought yet: enough that the daemon is never waited for.
const STAGED_AHEAD: usize = 8;

/// A block to put.
pub(crate) struct LocalPut<'a> {
    pub(crate) hash: SequenceHash,
    pub(crate) parent: Option<SequenceHash>,
    parts: &'a [&'a [u8]],
    bytes: usize,
}

impl<'a> LocalPut<'a> {
    pub(crate) fn new(hash: SequenceHash, parent: Option<SequenceHash>, parts: &'a [&'a [u8]]) -> Self {
        Self { hash, parent, parts, bytes: parts.iter().map(|part| part.len()).sum() }
    }
}

/// Where blocks go, and how.
#[derive(Clone, Copy)]
pub(crate) struct PutInto {
    pub(crate) layout: u32,
    pub(crate) group: u16,
    pub(crate) local: bool,
    pub(crate) upload: bool,
    pub(crate) more_follows: bool,
    pub(crate) deadline_ms: u32,
}

/// One put under way. Dropped, it gives up what it staged.
struct Putting<'a> {
    attachment: &'a Arc<Attachment>,
    waiting: Waiting,
    results: Vec<Option<Result<v1::PutResult, Error>>>,
    /// How many of them are there.
    decided: usize,
    /// Which blocks have a slot.
    has_slot: Vec<bool>,
    staged: usize,
    /// For each block of a LOCAL put that is staged and not decided.
    unsynced: Option<SemaphorePermit<'a>>,
}

impl Attachment {
    /// Stores blocks; the outcome of each, in order.
    pub(crate) async fn put(
        self: &Arc<Self>,
        into: PutInto,
        blocks: &[LocalPut<'_>],
    ) -> Result<Vec<v1::PutResult>, Error> {
        let waiting = self.wait_for(blocks.len() as u64);
        let results = blocks.iter().map(|_| None).collect();
        let has_slot = vec![false; blocks.len()];
        let mut putting =
            Putting { attachment: self, waiting, results, decided: 0, has_slot, staged: 0, unsynced: None };
        for (at, block) in blocks.iter().enumerate() {
            putting.stage_ahead(into, blocks, at).await?;
            putting.bring(at, block).await?;
        }
        putting.until_decided().await
    }
}

impl<'a> Putting<'a> {
    fn tag(&self, at: usize) -> u64 {
        self.waiting.first() + at as u64
    }

    async fn stage_ahead(&mut self, into: PutInto, blocks: &[LocalPut<'_>], at: usize) -> Result<(), Error> {
        // By halves: a command for each block would cost as much as half of a small one.
        let ahead = self.staged.saturating_sub(at);
        if self.staged >= blocks.len() || ahead > STAGED_AHEAD / 2 {
            return Ok(());
        }
        let mut end = (at + STAGED_AHEAD).min(blocks.len()).min(self.staged + BLOCKS_PER_STAGE_MAX);
        if into.local {
            match self.room_for(end - self.staged, ahead == 0).await? {
                0 => return Ok(()),
                room => end = self.staged + room,
            }
        }
        let last = blocks.len() - 1;
        let stage = |(at, block): (usize, &LocalPut<'_>)| StageBlock {
            hash: block.hash,
            parent: block.parent,
            length: block.bytes as u32,
            tail: at == last && !into.more_follows,
        };
        let staged = blocks.iter().enumerate().take(end).skip(self.staged).map(stage).collect();
        let PutInto { layout, group, local, upload, deadline_ms, .. } = into;
        let command = Command::Stage { layout, group, local, upload, deadline_ms, blocks: staged };
        let tag = self.tag(self.staged);
        self.staged = end;
        self.attachment.submit(tag, &command).await
    }

    /// How many more blocks may wait for the disk, at most so many. `waits`: at least one; all that is staged has been brought then,
    /// so that nobody waits for what this put holds.
    async fn room_for(&mut self, blocks: usize, waits: bool) -> Result<usize, Error> {
        let attachment = self.attachment;
        loop {
            let room = blocks.min(attachment.unsynced.available_permits());
            if room > 0
                && let Ok(permit) = attachment.unsynced.try_acquire_many(room as u32)
            {
                self.keep(permit);
                return Ok(room);
            }
            if !waits {
                return Ok(0);
            }
            tokio::select! {
                biased;
                letter = self.waiting.next() => {
                    let (tag, completion) = letter?;
                    self.file(tag, completion);
                }
                permit = attachment.unsynced.acquire() => {
                    self.keep(permit.map_err(|_| super::calls::lost())?);
                    return Ok(1);
                }
            }
        }
    }

    fn keep(&mut self, permit: SemaphorePermit<'a>) {
        match &mut self.unsynced {
            Some(kept) => kept.merge(permit),
            None => self.unsynced = Some(permit),
        }
    }

    fn file(&mut self, tag: u64, completion: Completion) {
        let at = (tag - self.waiting.first()) as usize;
        let decided = match completion {
            Completion::Staged => {
                if let Some(has_slot) = self.has_slot.get_mut(at) {
                    *has_slot = true;
                }
                return;
            }
            Completion::Stored { status, level } => Ok(v1::PutResult { status: status as i32, level: level as i32 }),
            Completion::Failed { code, message } => Err(failure(code, message)),
            _ => return,
        };
        if let Some(place @ None) = self.results.get_mut(at) {
            *place = Some(decided);
            self.decided += 1;
            drop(self.unsynced.as_mut().and_then(|kept| kept.split(1)));
        }
    }

    fn is_decided(&mut self, at: usize) -> bool {
        while let Some((tag, completion)) = self.waiting.now() {
            self.file(tag, completion);
        }
        self.results.get(at).is_some_and(Option::is_some)
    }

    /// Leaves a block's bytes for the daemon, unless it turns out not to want them.
    async fn bring(&mut self, at: usize, block: &LocalPut<'_>) -> Result<(), Error> {
        let tag = self.tag(at);
        // Staging memory is for blocks that have a slot: those that wait for another writer would keep its pieces out.
        while !self.is_decided(at) && !self.has_slot.get(at).copied().unwrap_or(false) {
            let (tag, completion) = self.waiting.next().await?;
            self.file(tag, completion);
        }
        let (mut left, mut parts, mut part) = (block.bytes, block.parts.iter(), [].as_slice());
        while left > 0 {
            if self.is_decided(at) {
                return Ok(());
            }
            let place = self.place().await?;
            let bytes = place.bytes.min(left);
            let mut filled = 0;
            while filled < bytes {
                if part.is_empty() {
                    part = parts.next().copied().unwrap_or_default();
                    continue;
                }
                let (now, later) = part.split_at(part.len().min(bytes - filled));
                place.fill(filled, now);
                filled += now.len();
                part = later;
            }
            left -= bytes;
            self.announce(tag, place, bytes as u32, left == 0).await?;
        }
        Ok(())
    }

    /// Tells the daemon of a piece. Cancelled before that, the piece's place is free again.
    async fn announce(&self, tag: u64, place: Place<'_>, bytes: u32, last: bool) -> Result<(), Error> {
        let (kind, payload) = Command::Copy { offset: place.offset, bytes, last, crc32: None }.encode();
        loop {
            self.attachment.staging.hand_over(tag, &place);
            match self.attachment.try_submit(tag, kind, &payload) {
                Ok(true) => {
                    std::mem::forget(place);
                    return Ok(());
                }
                Ok(false) => self.attachment.staging.take_back(tag),
                Err(error) => {
                    self.attachment.staging.take_back(tag);
                    return Err(error);
                }
            }
            self.attachment.until_room().await;
        }
    }

    /// A free place in staging memory. Looks for the daemon's completions meanwhile: they free places.
    async fn place(&mut self) -> Result<Place<'a>, Error> {
        let attachment = self.attachment;
        loop {
            if let Some(place) = attachment.staging.try_take() {
                return Ok(place);
            }
            if !attachment.is_live() {
                return Err(super::calls::lost());
            }
            tokio::select! {
                biased;
                () = attachment.staging.freed() => {}
                letter = self.waiting.next() => {
                    let (tag, completion) = letter?;
                    self.file(tag, completion);
                }
            }
        }
    }

    async fn until_decided(&mut self) -> Result<Vec<v1::PutResult>, Error> {
        while self.decided < self.results.len() {
            let (tag, completion) = self.waiting.next().await?;
            self.file(tag, completion);
        }
        std::mem::take(&mut self.results).into_iter().flatten().collect()
    }
}

impl Drop for Putting<'_> {
    fn drop(&mut self) {
        if !self.attachment.is_live() {
            return;
        }
        // Cancelled, or failed on the way: the daemon frees the slots at once instead of at the deadline.
        for (at, result) in self.results.iter().enumerate().take(self.staged) {
            if result.is_none() {
                self.attachment.submit_if_room(self.waiting.first() + at as u64, &Command::Abandon);
            }
        }
    }
}

/// Whether all of `blocks` could go over the local plane: none is empty.
pub(crate) fn can_put(blocks: &[LocalPut<'_>]) -> bool {
    blocks.iter().all(|block| block.bytes > 0 && block.bytes < u32::MAX as usize)
}
