//! Reading: a frame from the volume into a slot of memory, checked before anyone sees it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::TrySendError;

use kvstore_transfer::frame::FrameHeader;
use kvstore_transfer::volume::{Direction, IoMemories, IoMemory, Transfer};
use kvstore_transfer::{AlignedBytes, Lane, SlotFill};

use super::extents::Entry;
use super::format::{PAGE, life_of};
use super::state::add;
use super::store::Store;
use crate::below::{Arrived, NotRead, ReadDone, WhyNotRead};
use crate::block::{Digest, Wanted, unpadded};
use crate::host::TransferFill;

/// What is done with a block that was read.
pub(super) type Check = Box<dyn FnOnce() + Send>;

/// A checksum of so many bytes takes as long as a small block's read.
const CHECKED_APART_BYTES: u64 = 1 << 20;

/// A block on its way into a slot.
pub(super) struct Reading {
    pub entry: Entry,
    pub wanted: Wanted,
    pub ticket: TransferFill,
    pub done: ReadDone,
}

impl Store {
    /// Where a block lies, with its segment kept as it is until [`Self::end_read`].
    pub fn begin_read(&self, digest: Digest) -> Option<Entry> {
        let mut state = self.state.lock();
        if state.health.left {
            return None;
        }
        let entry = state.extents.get(digest)?;
        state.segments.begin_read(entry.extent.segment);
        Some(entry)
    }

    /// See [`Self::begin_read`].
    pub fn end_read(&self, entry: &Entry) {
        self.state.lock().segments.end_read(entry.extent.segment);
    }

    /// Reads a block into its slot and checks it. After [`Self::begin_read`], whose end it sees to. Whoever waits is told so at
    /// once where the lane is full.
    pub fn read(self: &Arc<Self>, reading: Reading, mut slot: SlotFill, lane: Lane) {
        let (entry, wanted) = (reading.entry, reading.wanted);
        let offset = self.offset_of(&entry.extent);
        // The payload's pages, and no more, go into the slot; a frame of another size is not this block's.
        let payload_bytes = (u64::from(entry.extent.pages) - 1) * PAGE;
        let fits = wanted.block_bytes.next_multiple_of(PAGE) == payload_bytes
            || wanted.varies && payload_bytes <= wanted.block_bytes.next_multiple_of(PAGE);
        let store = Arc::clone(self);
        let tag = entry.digest.tag();
        let transfer = if entry.extent.apart && fits {
            slot.shorten(payload_bytes as usize);
            let memories = IoMemories {
                head: IoMemory::Pages(AlignedBytes::zeroed(PAGE as usize)),
                body: Some(IoMemory::Fill(slot)),
            };
            let finish = move |result: io::Result<()>, memories: IoMemories| {
                let (IoMemory::Pages(head), Some(IoMemory::Fill(slot))) = (memories.head, memories.body) else {
                    return;
                };
                let own = Arc::clone(&store);
                let check = move || own.finish(reading, result, &Payload::Slot(head), slot);
                store.check_later(payload_bytes, lane, Box::new(check));
            };
            Transfer { direction: Direction::Read, offset, memories, tag, done: Box::new(finish) }
        } else {
            let pages = AlignedBytes::zeroed(entry.extent.bytes() as usize);
            let finish = move |result: io::Result<()>, memories: IoMemories| {
                let Some(pages) = memories.into_pages() else { return };
                store.finish(reading, result, &Payload::Pages(pages), slot);
            };
            Transfer {
                direction: Direction::Read,
                offset,
                memories: IoMemories::pages(pages),
                tag,
                done: Box::new(finish),
            }
        };
        if let Err(transfer) = self.volume.submit(lane, Box::new(transfer)) {
            // The completion cleans up like after a failed read, but the device is not to blame.
            let busy = io::Error::from(io::ErrorKind::WouldBlock);
            let Transfer { done, memories, .. } = *transfer;
            done(Err(busy), memories);
        }
    }

    /// Runs a check of what was read: on a thread of its own where it takes long and nobody waits for it, so that the disk's thread gives
    /// others their blocks meanwhile.
    fn check_later(&self, bytes: u64, lane: Lane, check: Check) {
        let checks = self.checks.lock().clone().filter(|_| lane != Lane::Demand && bytes >= CHECKED_APART_BYTES);
        let back = match checks {
            Some(checks) => match checks.try_send(check) {
                Ok(()) => return,
                Err(TrySendError::Full(check) | TrySendError::Disconnected(check)) => check,
            },
            None => check,
        };
        back();
    }

    fn finish(self: &Arc<Self>, reading: Reading, result: io::Result<()>, payload: &Payload, mut slot: SlotFill) {
        let Reading { entry, wanted, ticket, done } = reading;
        let life = self.state.lock().segments.life(entry.extent.segment);
        let checked = match result {
            Ok(()) => {
                self.device_errors.store(0, Ordering::Release);
                check(payload, &wanted, life, &mut slot).ok_or(ReadProblem::Damaged)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(ReadProblem::Busy),
            // A file that was cut off is damaged; the device under it works.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ReadProblem::Damaged),
            Err(error) => Err(ReadProblem::Device(error)),
        };
        self.end_read(&entry);
        let outcome = match checked {
            Ok((crc32, header)) => {
                add(&self.counters.read_blocks, 1);
                add(&self.counters.read_bytes, entry.extent.bytes());
                let parent = unpadded(&header.identity.parent);
                // Those of the frame are bound to its identity: they are not the payload's alone.
                Ok(Arrived { filled: ticket.filled(slot, crc32), sums: Vec::new(), parent })
            }
            Err(problem) => {
                let why = self.not_read(&entry, problem);
                Err(NotRead { fill: Some(ticket.not_filled(slot)), why })
            }
        };
        done(outcome);
    }

    fn not_read(&self, entry: &Entry, problem: ReadProblem) -> WhyNotRead {
        match problem {
            ReadProblem::Busy => WhyNotRead::Busy,
            ReadProblem::Damaged => {
                self.quarantine(entry);
                WhyNotRead::Damaged
            }
            ReadProblem::Device(error) => {
                add(&self.counters.io_errors, 1);
                tracing::warn!(%error, path = %self.path.display(), "a block cannot be read, so it is a miss");
                self.note_device_error(&error);
                self.forget(entry);
                WhyNotRead::Failed
            }
        }
    }

    /// [`read_frame`], where an error counts towards the volume's health. `None`: it was read, and does not verify; a block that
    /// was not read is no damaged one.
    pub fn read_whole(&self, entry: &Entry, lane: Lane) -> io::Result<Option<(FrameHeader, AlignedBytes)>> {
        match read_frame(self, entry, lane) {
            // A file that was cut off.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => {
                add(&self.counters.io_errors, 1);
                tracing::warn!(%error, path = %self.path.display(), "a block cannot be read for now");
                self.note_device_error(&error);
                Err(error)
            }
            Ok(frame) => {
                self.device_errors.store(0, Ordering::Release);
                Ok(frame)
            }
        }
    }

    /// A frame is not what its place should hold: it is not found any more.
    pub fn quarantine(&self, entry: &Entry) {
        add(&self.counters.corrupt_blocks, 1);
        tracing::error!(
            path = %self.path.display(), segment = entry.extent.segment, page = entry.extent.page,
            "a block on disk does not match its checksum, so it is dropped"
        );
        self.forget(entry);
    }

    /// Drops a block that is still where `entry` says.
    pub fn forget(&self, entry: &Entry) {
        let mut state = self.state.lock();
        let same = state.extents.get(entry.digest).is_some_and(|now| now.extent == entry.extent);
        if same {
            state.drop_block(entry.digest);
            drop(state);
            self.wake_committer();
        }
    }
}

enum ReadProblem {
    Busy,
    Damaged,
    Device(io::Error),
}

enum Payload {
    /// The header's page; the payload is in the slot.
    Slot(AlignedBytes),
    /// The whole frame.
    Pages(AlignedBytes),
}

/// The block's CRC-32 and its header, where header and payload are those of the wanted block in this life of its segment;
/// its bytes are in the slot then.
fn check(payload: &Payload, wanted: &Wanted, life: Option<u64>, slot: &mut SlotFill) -> Option<(u32, FrameHeader)> {
    let (Payload::Slot(head) | Payload::Pages(head)) = payload;
    let header = FrameHeader::decode(head).ok()?;
    let current = life == Some(life_of(header.generation));
    if !current || !wanted.is(&header.identity, header.block_bytes) {
        return None;
    }
    slot.shorten(header.block_bytes as usize);
    let crc32 = match payload {
        Payload::Slot(_) if header.payload_offset() as u64 == PAGE => header.check(slot.transferred()).ok()?,
        Payload::Slot(_) => return None,
        Payload::Pages(pages) => {
            let start = header.payload_offset();
            let bytes = pages.get(start..start + header.block_bytes as usize)?;
            let crc32 = header.check(bytes).ok()?;
            slot.append(bytes).ok()?;
            crc32
        }
    };
    Some((crc32, header))
}

/// Reads and checks one whole frame, without a slot: for reinsertion and verification. Blocks.
fn read_frame(store: &Store, entry: &Entry, lane: Lane) -> io::Result<Option<(FrameHeader, AlignedBytes)>> {
    let bytes = entry.extent.bytes() as usize;
    let pages = kvstore_transfer::volume::read_now(&*store.volume, lane, store.offset_of(&entry.extent), bytes)?;
    let life = store.state.lock().segments.life(entry.extent.segment);
    let Ok(header) = FrameHeader::decode(&pages) else { return Ok(None) };
    let ours = Digest::of_frame(store.header.seed, &header.identity) == entry.digest;
    let start = header.payload_offset();
    let payload = pages.get(start..start + header.payload_bytes() as usize);
    let sound = payload.is_some_and(|payload| header.check(payload).is_ok());
    let current = life == Some(life_of(header.generation));
    Ok((ours && sound && current).then_some((header, pages)))
}
