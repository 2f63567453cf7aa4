//! Uploading: blocks are put together to packs, along their chains, and written to the bucket by a few workers.
//!
//! A block that is offered stays in memory by a lease until it is uploaded, or, where the store does not keep up and the block is
//! on disk, by a hold of the Nvme tier. What is offered is logged first, where there is a disk, so that a restart goes on with it.
//! An upload is acknowledged after a create-only PUT and a read of what is there then; whoever waits for it is told no as soon as
//! one try of the whole has failed, and it goes on in the background.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use kvstore_plane::SequenceHash;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ObjectTier;
use super::log::Owed;
use super::pack::begins_pack;
use crate::block::{BlockRef, Digest};
use crate::caps;
use crate::host::{LeasedBlock, RegisteredLayout};

/// A block that is to be in the bucket.
pub struct Offer {
    /// Its layout.
    pub layout: Arc<RegisteredLayout>,
    /// Its layer group.
    pub group: u16,
    /// Its name.
    pub hash: SequenceHash,
    /// The block before it.
    pub parent: Option<SequenceHash>,
    /// Its bytes, where they are.
    pub block: LeasedBlock,
    /// The checksums of its sections, where they were taken; else they are taken when it is written.
    pub sums: Vec<u32>,
    /// Somebody waits for it.
    pub durable: bool,
    /// Whoever offers it has waited for room: see [`ObjectTier::has_upload_room`].
    pub has_waited: bool,
}

/// What came of an offer.
pub enum Offered {
    /// It will be uploaded, or is there already; where somebody waits, the channel tells true once it is DURABLE, false where
    /// it is not for now.
    Accepted(Option<oneshot::Receiver<bool>>),
    /// Too much waits to be uploaded.
    Full,
}

/// A block of a pack.
pub(super) struct Member {
    pub hash: SequenceHash,
    pub parent: Option<SequenceHash>,
    pub length: u32,
    pub sums: Vec<u32>,
    /// Its bytes, leased; without, they are the Nvme tier's.
    pub block: Option<Bytes>,
}

/// Blocks that go into one pack: some of one chain, without a hole.
pub(super) struct Batch {
    /// Names its hold in the Nvme tier.
    pub id: u128,
    pub layout: Arc<RegisteredLayout>,
    pub group: u16,
    pub members: Vec<Member>,
    pub bytes: u64,
    /// Somebody waits.
    pub durable: bool,
    opened: Instant,
    tries: u32,
    not_before: Instant,
    /// The Nvme tier holds its blocks.
    pub held_on_disk: bool,
}

/// The end of a chain that is being put together.
type ChainEnd = (usize, u32, u16, SequenceHash);

/// What waits to be uploaded.
#[derive(Default)]
pub(super) struct Uploads {
    open: HashMap<ChainEnd, Batch>,
    queue: VecDeque<Batch>,
    waiters: HashMap<Digest, Vec<oneshot::Sender<bool>>>,
    /// Blocks that were deleted while they were being written.
    deleted: HashSet<Digest>,
    /// Bytes that are offered and not uploaded.
    pub bytes: u64,
    pub under_way: usize,
}

impl Uploads {
    /// Blocks that are offered and not uploaded.
    pub fn blocks(&self) -> usize {
        self.waiters.len()
    }

    /// True where this one is among them.
    pub fn has(&self, digest: Digest) -> bool {
        self.waiters.contains_key(&digest)
    }

    /// Since when the oldest waits.
    pub fn oldest(&self) -> Option<Instant> {
        self.open.values().chain(&self.queue).map(|batch| batch.opened).min()
    }

    fn close(&mut self, which: impl Fn(&Batch) -> bool) -> bool {
        let ends: Vec<ChainEnd> = self.open.iter().filter(|(_, batch)| which(batch)).map(|(end, _)| *end).collect();
        for end in &ends {
            if let Some(batch) = self.open.remove(end) {
                self.enqueue(batch);
            }
        }
        !ends.is_empty()
    }

    fn enqueue(&mut self, batch: Batch) {
        if batch.durable { self.queue.push_front(batch) } else { self.queue.push_back(batch) }
    }

    /// Takes these blocks out of what waits. One that is being written just now is not among them.
    pub fn cancel(
        &mut self,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        unwanted: &HashSet<SequenceHash>,
    ) -> Vec<Batch> {
        let concerns = |batch: &Batch| {
            batch.layout.namespace == layout.namespace
                && batch.layout.ordinal == layout.ordinal
                && batch.group == group
                && batch.members.iter().any(|member| unwanted.contains(&member.hash))
        };
        self.close(concerns);
        let mut cancelled = Vec::new();
        for batch in self.queue.iter_mut().filter(|batch| concerns(batch)) {
            let members = std::mem::take(&mut batch.members);
            let (gone, kept) = members.into_iter().partition(|member| unwanted.contains(&member.hash));
            batch.members = kept;
            cancelled.push(Batch { layout: Arc::clone(&batch.layout), members: gone, held_on_disk: false, ..*batch });
        }
        cancelled
    }

    /// The next that is due; while the store is `away` those alone for which somebody waits, to be told so.
    fn next(&mut self, now: Instant, away: bool) -> Option<Batch> {
        let at = self.next_due(now, away)?;
        self.under_way += 1;
        self.queue.remove(at)
    }

    fn next_due(&self, now: Instant, away: bool) -> Option<usize> {
        self.queue.iter().position(|batch| batch.not_before <= now && (batch.durable || !away))
    }

    /// Those of these blocks that are still waited for, which are being written just now, are not tried again. What is told once
    /// each has ended, however.
    pub fn unwanted(&mut self, digests: impl Iterator<Item = Digest>) -> Vec<oneshot::Receiver<bool>> {
        let mut under_way = Vec::new();
        for digest in digests {
            if let Some(waiters) = self.waiters.get_mut(&digest) {
                let (told, waiting) = oneshot::channel();
                waiters.push(told);
                self.deleted.insert(digest);
                under_way.push(waiting);
            }
        }
        under_way
    }
}

impl ObjectTier {
    /// True where a block that somebody waits for may be offered: less waits, and less of it in memory, than the bounds say.
    pub fn has_upload_room(&self) -> bool {
        let limits = *self.limits.lock();
        self.leased_bytes.load(Ordering::Acquire) < limits.upload_bytes
            && self.uploads.lock().bytes < limits.backlog_bytes
    }

    /// A block is to be in the bucket.
    pub fn offer(self: &Arc<Self>, offer: Offer) -> Offered {
        let digest = self.digest(&offer.layout, offer.group, &offer.hash);
        let limits = *self.limits.lock();
        let place = self.state.lock().directory.get(digest).cloned();
        if let Some(place) = place {
            if !offer.durable {
                return Offered::Accepted(None);
            }
            if self.is_young(place.pack.written_ms) {
                return Offered::Accepted(Some(self.rest_on(place.pack, offer)));
            }
        }
        self.take(offer, digest, &limits)
    }

    pub(super) fn take(self: &Arc<Self>, offer: Offer, digest: Digest, limits: &super::ObjectLimits) -> Offered {
        let Offer { layout, group, hash, parent, block, sums, durable, has_waited } = offer;
        let (told, waiting) = oneshot::channel();
        let told = durable.then_some(told);
        let length = block.len() as u32;
        let per_pack = self.blocks_per_pack(&layout, group);
        let mut uploads = self.uploads.lock();
        if let Some(waiters) = uploads.waiters.get_mut(&digest) {
            // Without an answer from the store it is told no at once: what waits already is not tried for its sake.
            waiters.extend(told.filter(|_| !self.bucket.is_away()));
            if durable {
                let concerns = |batch: &Batch| batch.members.iter().any(|member| member.hash == hash);
                uploads.open.values_mut().filter(|batch| concerns(batch)).for_each(|batch| batch.durable = true);
            }
            return Offered::Accepted(durable.then_some(waiting));
        }
        // Where room was waited for, what was on its way when it ended goes beyond the bounds: a block of each call.
        let backlog_bytes = if has_waited { 2 * limits.backlog_bytes } else { limits.backlog_bytes };
        let full = uploads.waiters.len() >= caps::OBJECT_BACKLOG_BLOCKS_MAX
            || uploads.bytes + u64::from(length) > backlog_bytes;
        let leased = has_waited || self.leased_bytes.load(Ordering::Acquire) + u64::from(length) <= limits.upload_bytes;
        let named = BlockRef { layout: &layout, group, hash };
        let on_disk = || self.above.will_have(&named);
        // Under the lock: whoever deleted it from memory before does not find it among the uploads, and it is not to come back.
        let is_deleted = || !self.host.is_resident(layout.namespace, &named.key()) && !on_disk();
        if full || !(leased || on_disk()) || is_deleted() {
            self.counts.refused_blocks.fetch_add(1, Ordering::Relaxed);
            return Offered::Full;
        }
        uploads.waiters.insert(digest, told.into_iter().collect());
        uploads.bytes += u64::from(length);
        drop(uploads);
        // Logged before it can be done: the other way round it would stay in the log.
        self.log_added(&layout, Owed { layout: 0, group, hash, parent, length });
        let block = leased.then(|| self.held(block));
        let member = Member { hash, parent, length, sums, block };
        self.append(&mut self.uploads.lock(), &layout, group, member, durable, per_pack);
        Offered::Accepted(durable.then_some(waiting))
    }

    /// Adds a block to the pack that its parent ends, or begins one.
    fn append(
        &self,
        uploads: &mut Uploads,
        layout: &Arc<RegisteredLayout>,
        group: u16,
        member: Member,
        durable: bool,
        per_pack: u64,
    ) {
        let end = |hash| (layout.namespace.0, layout.ordinal, group, hash);
        let (hash, length) = (member.hash, u64::from(member.length));
        let begun = match member.parent {
            Some(parent) if !begins_pack(&hash, per_pack) => uploads.open.remove(&end(parent)),
            _ => None,
        };
        let now = Instant::now();
        let mut batch = begun.unwrap_or_else(|| Batch {
            id: self.next_id(),
            layout: Arc::clone(layout),
            group,
            members: Vec::new(),
            bytes: 0,
            durable: false,
            opened: now,
            tries: 0,
            not_before: now,
            held_on_disk: false,
        });
        batch.members.push(member);
        batch.bytes += length;
        batch.durable |= durable;
        // Cut by names on average at the size that is aimed at; a run without such a name ends at twice that.
        let full = batch.bytes >= 2 * caps::OBJECT_PACK_BYTES
            || batch.members.len() >= caps::OBJECT_PACK_BLOCKS_MAX
            || per_pack == 1;
        if full {
            uploads.enqueue(batch);
            self.work.notify_one();
            return;
        }
        if let Some(other) = uploads.open.insert(end(hash), batch) {
            uploads.enqueue(other);
        }
        if uploads.open.len() > caps::OBJECT_OPEN_PACKS_MAX && uploads.close(|_| true) {
            self.work.notify_one();
        }
    }

    /// Whatever is being put together is written now: memory is short.
    pub fn make_room(&self) {
        self.close_open();
    }

    /// No more comes for those who wait: what they wait for is written now.
    pub fn flush(&self) {
        if self.uploads.lock().close(|batch| batch.durable) {
            self.work.notify_waiters();
            self.work.notify_one();
        }
    }

    /// All that is being put together is written now.
    pub(super) fn close_open(&self) {
        if self.uploads.lock().close(|_| true) {
            self.work.notify_waiters();
            self.work.notify_one();
        }
    }

    /// What was owed when an earlier daemon ended goes on. `register` gives a layout of a namespace, where it is still
    /// configured.
    pub fn resume(&self, mut register: impl FnMut(&str, &crate::Layout) -> Option<Arc<RegisteredLayout>>) {
        let Some(log) = &self.log else { return };
        let log = log.lock();
        let mut uploads = self.uploads.lock();
        for owed in log.owed() {
            let Some((namespace, layout)) = log.layout(owed.layout) else { continue };
            let Some(layout) = register(namespace, layout) else { continue };
            let digest = self.digest(&layout, owed.group, &owed.hash);
            if uploads.waiters.insert(digest, Vec::new()).is_some() {
                continue;
            }
            uploads.bytes += u64::from(owed.length);
            let per_pack = self.blocks_per_pack(&layout, owed.group);
            let Owed { hash, parent, length, .. } = owed;
            let member = Member { hash, parent, length, sums: Vec::new(), block: None };
            self.append(&mut uploads, &layout, owed.group, member, false, per_pack);
        }
        uploads.close(|_| true);
        let batches = uploads.queue.len();
        uploads.queue.iter_mut().for_each(|batch| self.hold_on_disk(batch));
        if batches > 0 {
            tracing::info!(
                blocks = uploads.blocks(),
                bytes = uploads.bytes,
                "the uploads that were left at the last stop continue"
            );
        }
    }

    /// Closes what has waited long enough. Called a few times a second.
    pub fn tick(&self) {
        let linger = Duration::from_millis(caps::OBJECT_LINGER_MS);
        let now = Instant::now();
        let mut uploads = self.uploads.lock();
        uploads.close(|batch| now.duration_since(batch.opened) >= linger);
        // Where memory is short, blocks are the disk's; it has had them for a second at most, and must not drop them.
        let lacking =
            |batch: &&mut Batch| !batch.held_on_disk && batch.members.iter().any(|member| member.block.is_none());
        uploads.queue.iter_mut().filter(lacking).for_each(|batch| self.hold_on_disk(batch));
        // Batches that failed may be due again. Nobody is woken for nothing: most of the time a daemon has nothing to upload.
        let is_due = uploads.next_due(now, self.bucket.is_away()).is_some();
        drop(uploads);
        if is_due {
            self.work.notify_waiters();
        }
        self.sync_log_or_say();
    }

    /// A worker's life.
    pub(super) async fn work_forever(self: Arc<Self>) {
        while !self.stopping.load(Ordering::Acquire) {
            let woken = self.work.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            let away = self.bucket.is_away();
            let batch = self.uploads.lock().next(Instant::now(), away);
            match batch {
                Some(batch) => self.upload(batch).await,
                None => woken.await,
            }
        }
    }

    async fn upload(self: &Arc<Self>, mut batch: Batch) {
        let durable = batch.durable;
        self.bring(&mut batch).await;
        let (mut left, mut failed) = (Vec::new(), None);
        for run in runs(std::mem::take(&mut batch.members)) {
            if failed.is_some() || run.iter().any(|member| member.block.is_none()) {
                left.extend(run);
                continue;
            }
            match self.write_pack(&batch.layout, batch.group, &run).await {
                Ok(()) => self.done(&batch, run, true),
                Err(trouble) => {
                    failed = Some(trouble);
                    left.extend(run);
                }
            }
        }
        self.uploads.lock().under_way -= 1;
        if left.is_empty() {
            return self.let_go(&batch);
        }
        // What was deleted or evicted meanwhile is nowhere any more; what failed is tried again.
        let deleted = self.uploads.lock().deleted.clone();
        let on_disk = |member: &Member| {
            self.above.will_have(&BlockRef { layout: &batch.layout, group: batch.group, hash: member.hash })
        };
        let (again, lost): (Vec<_>, Vec<_>) = left.into_iter().partition(|member| {
            let is_deleted = deleted.contains(&self.digest(&batch.layout, batch.group, &member.hash));
            !is_deleted && (member.block.is_some() || on_disk(member))
        });
        if !lost.is_empty() {
            self.counts.lost_blocks.fetch_add(lost.len() as u64, Ordering::Relaxed);
            self.done(&batch, lost, false);
        }
        batch.members = again;
        if let Some(trouble) = &failed {
            tracing::debug!(%trouble, blocks = batch.members.len(), "an upload failed");
        }
        if batch.members.is_empty() {
            return self.let_go(&batch);
        }
        self.tell_no(&batch);
        let keeps = self.log.is_some() && self.nvme.is_some();
        if durable && !keeps {
            // Nothing but memory holds it, and nobody waits any more.
            let members = std::mem::take(&mut batch.members);
            self.done(&batch, members, false);
            return;
        }
        self.hold_on_disk(&mut batch);
        batch.durable = false;
        batch.tries += 1;
        batch.not_before = Instant::now() + self.bucket.backoff(batch.tries);
        self.uploads.lock().enqueue(batch);
    }

    /// Blocks need no upload any more: they are DURABLE, or gone.
    fn done(&self, batch: &Batch, members: Vec<Member>, durable: bool) {
        let mut waiting = Vec::new();
        {
            let mut uploads = self.uploads.lock();
            for member in &members {
                let digest = self.digest(&batch.layout, batch.group, &member.hash);
                waiting.extend(uploads.waiters.remove(&digest).unwrap_or_default());
                uploads.deleted.remove(&digest);
                uploads.bytes = uploads.bytes.saturating_sub(u64::from(member.length));
            }
        }
        self.log_done(&batch.layout, batch.group, members.iter().map(|member| member.hash));
        drop(members);
        self.uploaded.notify_waiters();
        for waiter in waiting {
            let _ = waiter.send(durable);
        }
    }

    /// Blocks are not to be uploaded any more.
    pub(super) fn drop_batch(&self, mut batch: Batch) {
        let members = std::mem::take(&mut batch.members);
        self.done(&batch, members, false);
    }

    /// Whoever waits for these is told that they are not DURABLE for now.
    fn tell_no(&self, batch: &Batch) {
        let mut uploads = self.uploads.lock();
        for member in &batch.members {
            let digest = self.digest(&batch.layout, batch.group, &member.hash);
            let waiters = uploads.waiters.get_mut(&digest).map(std::mem::take).unwrap_or_default();
            waiters.into_iter().for_each(|waiter| _ = waiter.send(false));
        }
    }
}

/// Members without a hole between them; those that have no bytes stand alone.
fn runs(members: Vec<Member>) -> Vec<Vec<Member>> {
    let mut runs: Vec<Vec<Member>> = Vec::new();
    for member in members {
        let follows = runs.last().and_then(|run| run.last()).is_some_and(|last: &Member| {
            member.parent == Some(last.hash) && last.block.is_some() && member.block.is_some()
        });
        match runs.last_mut().filter(|_| follows) {
            Some(run) => run.push(member),
            None => runs.push(vec![member]),
        }
    }
    runs
}
