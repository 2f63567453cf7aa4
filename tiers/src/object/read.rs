//! Reading: blocks out of packs into slots of memory, each checked before anyone sees it.
//!
//! Blocks that lie side by side in a pack come with one ranged request. Its body is copied once, into the slots, and
//! checksummed on the way. What of it is complete when it breaks off is kept; the request is made again for the rest.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvstore_transfer::frame::FrameHeader;
use tokio::time::Instant;

use super::ObjectTier;
use super::directory::{Pack, Packed};
use crate::below::{Arrived, NotRead, Read, ReadDone, ReadUrgency, WhyNotRead};
use crate::block::{Block, Wanted, unpadded};
use crate::bucket::{Body, Trouble, retried};
use crate::caps;
use crate::host::BlockFill;
use crate::slots::Priority;

/// A block that is on its way out of its pack.
struct Reading {
    pack: Arc<Pack>,
    packed: Packed,
    block: Block,
    wanted: Wanted,
    fill: BlockFill,
    done: ReadDone,
}

impl Reading {
    fn fails(mut self, why: WhyNotRead) {
        // What came of it is not the block.
        self.fill.restart();
        (self.done)(Err(NotRead { fill: Some(self.fill), why }));
    }

    /// True where this block lies right behind the other in the same pack, and both fit one request that starts at `start`.
    fn follows(&self, last: &Self, start: u64) -> bool {
        Arc::ptr_eq(&last.pack, &self.pack)
            && last.packed.offset + last.packed.frame_bytes == self.packed.offset
            && self.packed.offset + self.packed.frame_bytes - start <= caps::OBJECT_READ_BYTES_MAX
    }
}

impl ObjectTier {
    /// See [`crate::below::Below::read`]: neighbours in a pack come together, in requests of some MiB. Only blocks that are known to
    /// be in the bucket are found: see [`Self::search`].
    pub(super) fn read_blocks(self: &Arc<Self>, reads: Vec<Read>, urgency: ReadUrgency) {
        let mut runs: Vec<Vec<Reading>> = Vec::new();
        for read in reads {
            let Some(reading) = self.find(read) else { continue };
            let follows = |run: &&mut Vec<Reading>| match (run.first(), run.last()) {
                (Some(first), Some(last)) => reading.follows(last, first.packed.offset),
                _ => false,
            };
            match runs.last_mut().filter(follows) {
                Some(run) => run.push(reading),
                None => runs.push(vec![reading]),
            }
        }
        for run in runs {
            let tier = Arc::clone(self);
            self.runtime.spawn(async move {
                let prefetches = (urgency.priority != Priority::Demand).then(|| Arc::clone(&tier.prefetch_reads));
                let permits = async {
                    let prefetch = match prefetches {
                        Some(prefetches) => prefetches.acquire_owned().await.ok(),
                        None => None,
                    };
                    (prefetch, Arc::clone(&tier.reads).acquire_owned().await.ok())
                };
                // Whoever waits gives up by then; the slots are given back.
                match tokio::time::timeout_at(urgency.deadline, permits).await {
                    Ok(_permits) => tier.read_run(run, urgency.deadline).await,
                    Err(_) => run.into_iter().for_each(|reading| reading.fails(WhyNotRead::Failed)),
                }
            });
        }
    }

    /// Where a block lies; whoever waits for one that is nowhere is told so.
    fn find(&self, read: Read) -> Option<Reading> {
        let Read { block, fill, done } = read;
        let place = match self.bucket.is_away() {
            true => None,
            false => self.state.lock().directory.get(block.as_ref().digest(self.seed)).cloned(),
        };
        let found = place.and_then(|place| Some((place.packed()?, place.pack, Wanted::of(&block.as_ref())?)));
        match found {
            Some((packed, pack, wanted)) => Some(Reading { pack, packed, block, wanted, fill, done }),
            None => {
                done(Err(NotRead { fill: Some(fill), why: WhyNotRead::Absent }));
                None
            }
        }
    }

    async fn read_run(self: &Arc<Self>, run: Vec<Reading>, deadline: Instant) {
        let Some(pack) = run.first().map(|reading| Arc::clone(&reading.pack)) else { return };
        let mut left = VecDeque::from(run);
        while let (Some(first), Some(last)) = (left.front(), left.back()) {
            let bytes = last.packed.offset + last.packed.frame_bytes - first.packed.offset;
            let metered = self.meter.begin(bytes);
            let read = retried!(self.bucket, deadline, bytes, self.read_once(&pack, &mut left));
            let why = match read {
                Ok(()) => {
                    metered.done();
                    return;
                }
                Err(Trouble::Damaged(why)) => {
                    // The block at the front is given up; those behind it are still worth a request.
                    let Some(reading) = left.pop_front() else { return };
                    tracing::warn!(pack = %pack.location, block = %reading.block.hash, why, "a block in the bucket is damaged");
                    self.is_damaged(&pack, reading);
                    continue;
                }
                Err(Trouble::Cut { bytes, .. }) => {
                    // What lies behind its end is nowhere in it, and is not asked for again.
                    let behind = |reading: &Reading| reading.packed.offset + reading.packed.frame_bytes > bytes;
                    let (lost, whole): (VecDeque<_>, _) = left.drain(..).partition(behind);
                    let blocks = lost.len();
                    tracing::warn!(pack = %pack.location, bytes, blocks, "a pack in the bucket was cut");
                    lost.into_iter().for_each(|reading| self.is_damaged(&pack, reading));
                    left = whole;
                    continue;
                }
                Err(Trouble::NotFound) => {
                    self.state.lock().directory.remove(&pack);
                    WhyNotRead::Absent
                }
                Err(trouble) => {
                    tracing::debug!(pack = %pack.location, %trouble, "blocks cannot be read from the bucket");
                    WhyNotRead::Failed
                }
            };
            left.drain(..).for_each(|reading| reading.fails(why));
        }
    }

    /// A block is not looked for any more where it was.
    fn is_damaged(&self, pack: &Arc<Pack>, reading: Reading) {
        self.counts.corrupt_blocks.fetch_add(1, Ordering::Relaxed);
        self.state.lock().directory.note_damaged(pack, reading.packed.digest);
        reading.fails(WhyNotRead::Damaged);
    }

    /// One request for what is left of a run. What was read whole is taken off `left`.
    async fn read_once(&self, pack: &Arc<Pack>, left: &mut VecDeque<Reading>) -> Result<(), Trouble> {
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
        let mut frame = InFrame { at: start, ..InFrame::default() };
        let mut body = Body::of(got);
        while let Some(mut chunk) = body.next().await? {
            self.counts.read_bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            while !chunk.is_empty() {
                let Some(read) = left.front_mut() else {
                    return Err(Trouble::Damaged("the store sent more bytes than were asked for".into()));
                };
                chunk = frame.take(read, chunk)?;
                if frame.at == read.packed.offset + read.packed.frame_bytes
                    && let Some(read) = left.pop_front()
                {
                    self.finish(read, frame.header.take());
                    frame = InFrame { at: frame.at, ..InFrame::default() };
                }
            }
        }
        if left.is_empty() {
            Ok(())
        } else {
            Err(Trouble::Damaged(format!("the body ended at byte {} of {end}", frame.at)))
        }
    }

    /// A block is whole and checked.
    fn finish(&self, reading: Reading, header: Option<FrameHeader>) {
        let sums = reading.fill.section_sums();
        let parent = header.and_then(|header| unpadded(&header.identity.parent));
        let outcome = match reading.fill.filled() {
            Some(filled) => Ok(Arrived { filled, sums, parent }),
            None => Err(NotRead { fill: None, why: WhyNotRead::Failed }),
        };
        self.counts.read_blocks.fetch_add(u64::from(outcome.is_ok()), Ordering::Relaxed);
        (reading.done)(outcome);
    }
}

/// Where a body is, within one frame.
#[derive(Default)]
struct InFrame {
    /// The next byte's place in the object.
    at: u64,
    /// The header's bytes, until they are complete.
    head: Vec<u8>,
    /// The header, once it is.
    header: Option<FrameHeader>,
    /// The payload was checked: what follows is padding.
    checked: bool,
}

impl InFrame {
    /// Takes what of `chunk` belongs to this frame; the rest.
    fn take<'a>(&mut self, read: &mut Reading, chunk: &'a [u8]) -> Result<&'a [u8], Trouble> {
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

    fn take_head<'a>(&mut self, read: &mut Reading, chunk: &'a [u8]) -> Result<&'a [u8], Trouble> {
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
            let wanted = read.wanted.is(&header.identity, header.block_bytes);
            if header.payload_offset() != self.head.len() || header.frame_bytes() != read.packed.frame_bytes || !wanted
            {
                return Err(damaged("the frame belongs to another block".into()));
            }
            read.fill.shorten(header.block_bytes as usize);
            self.header = Some(header);
        }
        Ok(rest)
    }

    /// The payload is complete: its checksums, taken while it was copied, are those of its frame.
    fn check(&mut self, read: &Reading) -> Result<(), Trouble> {
        let Some(header) = &self.header else { return Err(Trouble::Damaged("the frame has no header".into())) };
        let section = read.block.as_ref().section_bytes();
        let sums = read.fill.section_sums();
        let expected = FrameHeader::of_sums(header.identity, header.generation, header.block_bytes, section, &sums);
        if expected.is_none_or(|expected| expected.sections != header.sections) {
            return Err(Trouble::Damaged("the block does not match its checksums".into()));
        }
        self.checked = true;
        Ok(())
    }
}
