//! Reading: blocks out of packs into slots of memory, each checked before anyone sees it.
//!
//! Blocks that lie side by side in a pack come with one ranged request. Its body is copied once, into the slots, and
//! checksummed on the way. What of it is complete when it breaks off is kept; the request is made again for the rest.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::StreamExt;
use kvstore_transfer::frame::{FrameHeader, FrameIdentity};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ObjectTier;
use super::directory::{Pack, Packed, Place};
use crate::bucket::{Trouble, retried};
use crate::caps;
use crate::clock::BootTime;
use crate::host::{BeginFill, BlockFill, FillRequest, LeasedBlock, RegisteredLayout, section_bytes};
use crate::nvme::{BlockRef, Promote, padded};
use crate::residency::{FlightSource, Priority, Publish, Urgency};

/// Reads that a caller has started and not sent yet: those that lie side by side become one request.
#[derive(Default)]
pub struct ReadBatch(Vec<Read>);

impl ReadBatch {
    /// True where there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

struct Read {
    pack: Arc<Pack>,
    packed: Packed,
    layout: Arc<RegisteredLayout>,
    group: u16,
    hash: kvstore_plane::SequenceHash,
    fill: BlockFill,
    /// Where it is on its way to the disk, too, once it is here.
    keep: bool,
    done: oneshot::Sender<Option<LeasedBlock>>,
}

impl ObjectTier {
    /// Starts to bring a block into memory, as a part of `batch`. Never waits. Only blocks that are known to be in the bucket
    /// are found: see [`Self::search`]. `keeps` is asked once it is on its way: whether it is to go to the disk, too.
    #[expect(clippy::too_many_arguments, reason = "what a promotion is of, and what is to become of it")]
    pub fn promote(
        &self,
        batch: &mut ReadBatch,
        block: &BlockRef<'_>,
        layout: &Arc<RegisteredLayout>,
        priority: Priority,
        keeps: impl FnOnce() -> bool,
        deadline: BootTime,
        now: BootTime,
    ) -> Promote {
        let Some(group) = block.layout.group(u32::from(block.group)) else { return Promote::Absent };
        let digest = self.digest(block.layout, block.group, &block.hash);
        let place = self.state.lock().directory.get(digest).cloned();
        let Some((Place { pack, .. }, packed)) = place.and_then(|place| Some((place.clone(), place.packed()?))) else {
            return Promote::Absent;
        };
        if self.bucket.is_away() {
            return Promote::Absent;
        }
        let request = FillRequest {
            layout: block.layout,
            group: block.group,
            hash: block.hash,
            parent: None,
            length: group.block_bytes as u32,
            urgency: Urgency { source: FlightSource::Promotion, priority, deadline },
        };
        match self.host.begin_fill(&request, now) {
            BeginFill::Fill(fill, ahead) => {
                if let Some(plan) = ahead {
                    self.host.drop_plan(plan);
                }
                let (done, coming) = oneshot::channel();
                let (layout, group, hash) = (Arc::clone(layout), block.group, block.hash);
                let keep = keeps();
                batch.0.push(Read { pack, packed, layout, group, hash, fill, keep, done });
                Promote::Started(coming)
            }
            BeginFill::Resident => Promote::Resident,
            BeginFill::InFlight => Promote::InFlight,
            BeginFill::NeedsSlab(plan) => Promote::NeedsSlab(plan),
            BeginFill::Outranked => Promote::Outranked,
            BeginFill::Busy | BeginFill::Wait => Promote::Busy,
        }
    }

    /// Sends a batch: neighbours together, in requests of some MiB.
    pub fn send(self: &Arc<Self>, batch: &mut ReadBatch, priority: Priority, deadline: Instant) {
        let mut run: Vec<Read> = Vec::new();
        let mut runs = Vec::new();
        for read in batch.0.drain(..) {
            let follows = run.last().is_some_and(|last| {
                let (before, start) = (last.packed, run.first().map_or(0, |first| first.packed.offset));
                Arc::ptr_eq(&last.pack, &read.pack)
                    && before.offset + before.frame_bytes == read.packed.offset
                    && read.packed.offset + read.packed.frame_bytes - start <= caps::OBJECT_READ_BYTES_MAX
            });
            if !follows && !run.is_empty() {
                runs.push(std::mem::take(&mut run));
            }
            run.push(read);
        }
        if !run.is_empty() {
            runs.push(run);
        }
        for run in runs {
            let tier = Arc::clone(self);
            self.runtime.spawn(async move {
                let prefetches = (priority != Priority::Demand).then(|| Arc::clone(&tier.prefetch_reads));
                let permits = async {
                    let prefetch = match prefetches {
                        Some(prefetches) => prefetches.acquire_owned().await.ok(),
                        None => None,
                    };
                    (prefetch, Arc::clone(&tier.reads).acquire_owned().await.ok())
                };
                // Whoever waits gives up by then; the fills are given back.
                if let Ok(_permits) = tokio::time::timeout_at(deadline, permits).await {
                    tier.read_run(run, deadline).await;
                }
                tier.promoted.notify_waiters();
            });
        }
    }

    async fn read_run(self: &Arc<Self>, run: Vec<Read>, deadline: Instant) {
        let Some(pack) = run.first().map(|read| Arc::clone(&read.pack)) else { return };
        let mut left = VecDeque::from(run);
        while let (Some(first), Some(last)) = (left.front(), left.back()) {
            let bytes = last.packed.offset + last.packed.frame_bytes - first.packed.offset;
            let reading = self.meter.begin(bytes);
            let read = retried!(self.bucket, deadline, bytes, self.read_once(&pack, &mut left));
            match read {
                Ok(()) => {
                    reading.done();
                    return;
                }
                Err(Trouble::Damaged(why)) => {
                    // The block at the front is given up; those behind it are still worth a request.
                    let Some(read) = left.pop_front() else { return };
                    self.counts.corrupt_blocks.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(pack = %pack.location, block = %read.hash, why, "a block in the bucket is damaged");
                    self.state.lock().directory.note_damaged(&pack, read.packed.digest);
                }
                Err(Trouble::NotFound) => {
                    self.state.lock().directory.remove(&pack);
                    return;
                }
                Err(trouble) => {
                    tracing::debug!(pack = %pack.location, %trouble, "blocks cannot be read from the bucket");
                    return;
                }
            }
        }
    }

    /// One request for what is left of a run. What was read whole is taken off `left`.
    async fn read_once(self: &Arc<Self>, pack: &Arc<Pack>, left: &mut VecDeque<Read>) -> Result<(), Trouble> {
        let Some(first) = left.front_mut() else { return Ok(()) };
        first.fill.restart();
        let start = first.packed.offset;
        let end = left.back().map_or(start, |last| last.packed.offset + last.packed.frame_bytes);
        let got = self.bucket.get(&pack.location, start..end).await?;
        if got.range != (start..end) {
            return Err(Trouble::Damaged(format!(
                "the store sent bytes {:?}, but {:?} were asked for",
                got.range,
                start..end
            )));
        }
        let mut body = Body { at: start, ..Body::default() };
        let mut chunks = got.into_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| Trouble::Failed(error.to_string()))?;
            self.counts.read_bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            let mut chunk = &chunk[..];
            while !chunk.is_empty() {
                let Some(read) = left.front_mut() else {
                    return Err(Trouble::Damaged("the store sent more bytes than were asked for".into()));
                };
                chunk = body.take(read, chunk)?;
                if body.at == read.packed.offset + read.packed.frame_bytes
                    && let Some(read) = left.pop_front()
                {
                    self.finish(read, body.header.take());
                    body = Body { at: body.at, ..Body::default() };
                }
            }
        }
        if left.is_empty() {
            Ok(())
        } else {
            Err(Trouble::Damaged(format!("the body ended at byte {} of {end}", body.at)))
        }
    }

    /// A block is whole and checked.
    fn finish(&self, read: Read, header: Option<FrameHeader>) {
        let Read { layout, group, hash, fill, keep, done, .. } = read;
        let sums = fill.section_sums();
        let (published, leased) = fill.commit_leased(false);
        if published == Publish::Published {
            self.counts.read_blocks.fetch_add(1, Ordering::Relaxed);
            if let (true, Some(nvme), Some(header)) = (keep, &self.nvme, header) {
                let (bytes, length) = header.identity.parent;
                let parent =
                    bytes.get(..usize::from(length)).and_then(|bytes| kvstore_plane::SequenceHash::new(bytes).ok());
                let block = BlockRef { layout: &layout, group, hash };
                let _ = nvme.write_back(&block, parent, sums, false);
            }
        }
        // Whoever waited may have left.
        let _ = done.send(leased);
    }
}

/// Where a body is, within one frame.
#[derive(Default)]
struct Body {
    /// The next byte's place in the object.
    at: u64,
    /// The header's bytes, until they are complete.
    head: Vec<u8>,
    /// The header, once it is.
    header: Option<FrameHeader>,
    /// The payload was checked: what follows is padding.
    checked: bool,
}

impl Body {
    /// Takes what of `chunk` belongs to this frame; the rest.
    fn take<'a>(&mut self, read: &mut Read, chunk: &'a [u8]) -> Result<&'a [u8], Trouble> {
        let frame_end = read.packed.offset + read.packed.frame_bytes;
        if self.header.is_none() {
            return self.take_head(read, chunk);
        }
        if !self.checked {
            let (payload, rest) = chunk.split_at(chunk.len().min(read.fill.room()));
            read.fill.append_promoted(payload).map_err(|error| Trouble::Damaged(error.to_string()))?;
            self.at += payload.len() as u64;
            if read.fill.room() == 0 {
                self.check(read)?;
            }
            return Ok(rest);
        }
        let (padding, rest) = chunk.split_at(chunk.len().min(frame_end.saturating_sub(self.at) as usize));
        self.at += padding.len() as u64;
        Ok(rest)
    }

    fn take_head<'a>(&mut self, read: &mut Read, chunk: &'a [u8]) -> Result<&'a [u8], Trouble> {
        const FIRST: usize = 16;
        let damaged = |why: String| Trouble::Damaged(why);
        let wanted = match self.head.get(12..FIRST).and_then(|bytes| bytes.try_into().ok()) {
            None => FIRST,
            Some(offset) => u32::from_le_bytes(offset) as usize,
        };
        if wanted < self.head.len() || wanted as u64 > read.packed.frame_bytes || wanted > caps::OBJECT_HEAD_BYTES_MAX {
            return Err(damaged("the frame's header is damaged".into()));
        }
        let (head, rest) = chunk.split_at(chunk.len().min(wanted - self.head.len()));
        self.head.extend_from_slice(head);
        self.at += head.len() as u64;
        if self.head.len() == wanted && wanted > FIRST {
            let header = FrameHeader::decode(&self.head).map_err(|error| damaged(error.to_string()))?;
            if header.payload_offset() != self.head.len() || !is_wanted(&header, read) {
                return Err(damaged("the frame belongs to another block".into()));
            }
            read.fill.shorten(header.block_bytes as usize);
            self.header = Some(header);
        }
        Ok(rest)
    }

    /// The payload is complete: its checksums, taken while it was copied, are those of its frame.
    fn check(&mut self, read: &Read) -> Result<(), Trouble> {
        let Some(header) = &self.header else { return Err(Trouble::Damaged("the frame has no header".into())) };
        let section = section_bytes_of(&read.layout, read.group);
        let sums = read.fill.section_sums();
        let expected = FrameHeader::of_sums(header.identity, header.generation, header.block_bytes, section, &sums);
        if expected.is_none_or(|expected| expected.sections != header.sections) {
            return Err(Trouble::Damaged("the block does not match its checksums".into()));
        }
        self.checked = true;
        Ok(())
    }
}

fn is_wanted(header: &FrameHeader, read: &Read) -> bool {
    let Some(group) = read.layout.group(u32::from(read.group)) else { return false };
    let length = if group.group.kind.varies_in_length() {
        header.block_bytes <= group.block_bytes
    } else {
        header.block_bytes == group.block_bytes
    };
    let expected = identity(&read.layout, read.group, &read.hash, header.identity.parent);
    length && header.frame_bytes() == read.packed.frame_bytes && expected == Some(header.identity)
}

/// What a block's frame says of it.
pub(super) fn identity(
    layout: &RegisteredLayout,
    group: u16,
    hash: &kvstore_plane::SequenceHash,
    parent: ([u8; 32], u8),
) -> Option<FrameIdentity> {
    Some(FrameIdentity {
        namespace_digest: layout.namespace_digest,
        layout_digest: layout.digest,
        group,
        kind: layout.group(u32::from(group))?.group.kind.number(),
        hash: padded(hash),
        parent,
    })
}

/// Bytes of the sections of a group's frames.
pub(super) fn section_bytes_of(layout: &RegisteredLayout, group: u16) -> u32 {
    layout.group(u32::from(group)).map_or(1, |group| section_bytes(&group.group, group.block_bytes))
}
