//! Volumes: one file each, read and written in whole pages, past the page cache where the system allows.
//!
//! A transfer owns the memory that it goes to or from, from the moment it is queued until the kernel is
//! done with it, and hands it to its `done` then: nobody can free or reuse a buffer that the kernel still
//! writes, whatever became of the caller. `done` runs on the volume's thread and must not block.

mod faulty;
mod file;
mod registered;
mod syscall;
mod uring;

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::aligned::AlignedBytes;
use crate::frame::FRAME_ALIGN;
use crate::lanes::{Lane, LaneCaps};
use crate::slab::Slab;
use crate::slot::{SlotBytes, SlotFill};

pub use faulty::{Fault, Faults, FaultyVolume, Operation};
pub use file::VolumeFile;
pub use syscall::SyscallVolume;
pub use uring::UringVolume;

/// Transfers that wait in each lane of a volume at most. Demand: what gets may lease at once, shared; a
/// transfer is some hundred bytes of queue, its block's memory is bounded by the Host tier.
pub const LANE_CAPS: LaneCaps = LaneCaps { demand: 4096, prefetch: 1024, background: 256 };
/// Transfers that the device has at once: enough to keep an NVMe device busy, few enough to stay in order
/// of urgency.
pub const DEPTH: usize = 64;
/// ... of which background writes and reads ahead of need may take this many: the rest is for whoever waits.
pub const BACKGROUND_DEPTH: usize = 32;
/// ... and so many bytes of them at once: as many as that many blocks of 256 KiB have. A chunk of a snapshot is 8 MiB; thirty of them in
/// front of a block that somebody waits for are a tenth of a second.
pub const BACKGROUND_BYTES: usize = 8 << 20;
/// The device gets them in steps of this many: what it has it does not give back.
pub const BACKGROUND_STEP: usize = 256 << 10;
/// While somebody has waited for a block within [`DEMAND_MS`], the background has so many bytes at once: two steps keep a device busy, and
/// are over in a fraction of a millisecond.
pub const BESIDE_DEMAND_BYTES: usize = 2 * BACKGROUND_STEP;
/// See [`BESIDE_DEMAND_BYTES`].
pub const DEMAND_MS: u64 = 20;

/// Memory of one piece of a transfer.
pub enum IoMemory {
    /// Pages of their own.
    Pages(AlignedBytes),
    /// A slot to be filled.
    Fill(SlotFill),
    /// A block to be written.
    Slot(SlotBytes),
}

impl IoMemory {
    /// Where it starts, and the bytes that a transfer may touch: whole pages.
    fn span(&mut self) -> (NonNull<u8>, usize) {
        match self {
            Self::Pages(pages) => (pages.start(), pages.len()),
            Self::Fill(fill) => fill.pages(),
            Self::Slot(bytes) => bytes.pages(),
        }
    }

    fn slab(&self) -> Option<&Arc<Slab>> {
        match self {
            Self::Pages(_) => None,
            Self::Fill(fill) => Some(fill.slab()),
            Self::Slot(bytes) => Some(bytes.slab()),
        }
    }
}

/// A header's pages, and where there is one the payload behind them: neighbours on the volume.
pub struct IoMemories {
    /// At the transfer's offset.
    pub head: IoMemory,
    /// Behind it.
    pub body: Option<IoMemory>,
}

impl IoMemories {
    /// One piece of pages.
    pub fn pages(pages: AlignedBytes) -> Self {
        Self { head: IoMemory::Pages(pages), body: None }
    }

    /// Takes the head's pages out.
    pub fn into_pages(self) -> Option<AlignedBytes> {
        match self.head {
            IoMemory::Pages(pages) => Some(pages),
            _ => None,
        }
    }
}

/// What the kernel does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the volume into memory.
    Read,
    /// From memory to the volume.
    Write,
}

/// Called once, with the outcome and the transfer's memory.
pub type Done = Box<dyn FnOnce(io::Result<()>, IoMemories) + Send>;
/// Called once, with the outcome of a sync.
pub type SyncDone = Box<dyn FnOnce(io::Result<()>) + Send>;

/// A read or a write.
pub struct Transfer {
    /// Which way.
    pub direction: Direction,
    /// Byte on the volume, a multiple of the page.
    pub offset: u64,
    /// To or from where.
    pub memories: IoMemories,
    /// Names the transfer, to raise it to a faster lane while it waits.
    pub tag: u64,
    /// Called with the outcome.
    pub done: Done,
}

impl Transfer {
    /// Bytes of both pieces.
    pub fn bytes(&mut self) -> u64 {
        let head = self.memories.head.span().1;
        (head + self.memories.body.as_mut().map_or(0, |body| body.span().1)) as u64
    }

    fn fail(self: Box<Self>, error: io::Error) {
        let Self { done, memories, .. } = *self;
        done(Err(error), memories);
    }
}

/// Somewhere to keep pages.
pub trait Volume: Send + Sync {
    /// Queues a transfer; hands it back where its lane is full. A read beyond what was ever written fails
    /// with `UnexpectedEof`.
    fn submit(&self, lane: Lane, transfer: Box<Transfer>) -> Result<(), Box<Transfer>>;
    /// Makes all that was written, and was reported as done before, safe from a loss of power.
    fn sync(&self, done: SyncDone);
    /// Moves a waiting transfer to a faster lane.
    fn raise(&self, tag: u64, to: Lane);
    /// Bytes of the file, and the bytes that may be used without asking for more.
    fn capacity(&self) -> u64;
    /// Transfers that wait, most urgent lane first, and those that the device has.
    fn queued(&self) -> ([usize; 3], usize);
    /// The file behind it, to make it longer or punch holes into it.
    fn file(&self) -> &VolumeFile;
}

/// How a volume is driven.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoEngine {
    /// io_uring where the kernel allows it, else system calls on threads.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// pread and pwrite on a few threads.
    Syscalls,
}

/// Starts the engine of `file`.
pub fn open(file: VolumeFile, engine: IoEngine) -> io::Result<Arc<dyn Volume>> {
    let file = Arc::new(file);
    match engine {
        IoEngine::Syscalls => Ok(Arc::new(SyscallVolume::start(file)?)),
        IoEngine::Uring => Ok(Arc::new(UringVolume::start(file)?)),
        IoEngine::Auto => match UringVolume::start(Arc::clone(&file)) {
            Ok(volume) => Ok(Arc::new(volume)),
            Err(error) => {
                tracing::warn!(%error, "io_uring is not available; threads do the disk I/O, which costs more CPU");
                Ok(Arc::new(SyscallVolume::start(file)?))
            }
        },
    }
}

/// Reads `bytes` from `offset` and waits. Not for a volume's own thread.
pub fn read_now(volume: &dyn Volume, lane: Lane, offset: u64, bytes: usize) -> io::Result<AlignedBytes> {
    let memories = IoMemories::pages(AlignedBytes::zeroed(bytes));
    let memories = transfer_now(volume, lane, Direction::Read, offset, memories)?;
    memories.into_pages().ok_or_else(|| io::Error::other("a read lost its memory"))
}

/// Writes `pages` at `offset` and waits. Not for a volume's own thread.
pub fn write_now(volume: &dyn Volume, offset: u64, pages: AlignedBytes) -> io::Result<()> {
    transfer_now(volume, Lane::Background, Direction::Write, offset, IoMemories::pages(pages)).map(drop)
}

/// Syncs and waits. Not for a volume's own thread.
pub fn sync_now(volume: &dyn Volume) -> io::Result<()> {
    let (send, receive) = std::sync::mpsc::sync_channel(1);
    volume.sync(Box::new(move |result| drop(send.send(result))));
    receive.recv().unwrap_or_else(|_| Err(stopped()))
}

fn transfer_now(
    volume: &dyn Volume,
    lane: Lane,
    direction: Direction,
    offset: u64,
    memories: IoMemories,
) -> io::Result<IoMemories> {
    let (send, receive) = std::sync::mpsc::sync_channel(1);
    let done: Done = Box::new(move |result, memories| drop(send.send((result, memories))));
    let mut transfer = Box::new(Transfer { direction, offset, memories, tag: 0, done });
    // A full lane empties at the speed of the device; this thread has nothing better to do.
    while let Err(back) = volume.submit(lane, transfer) {
        transfer = back;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let (result, memories) = receive.recv().map_err(|_| stopped())?;
    result.map(|()| memories)
}

fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the volume was closed")
}

/// Tells those who still waited when the volume was closed.
#[expect(clippy::vec_box, reason = "transfers stay boxed from the caller to the completion")]
fn closed(transfers: Vec<Box<Transfer>>, syncs: Vec<SyncDone>) {
    transfers.into_iter().for_each(|transfer| transfer.fail(stopped()));
    syncs.into_iter().for_each(|done| done(Err(stopped())));
}

/// True where an offset and both pieces are whole pages.
fn aligned(transfer: &mut Transfer) -> bool {
    let page = FRAME_ALIGN as u64;
    let whole = |memory: &mut IoMemory| memory.span().1.is_multiple_of(FRAME_ALIGN);
    transfer.offset.is_multiple_of(page)
        && whole(&mut transfer.memories.head)
        && transfer.memories.body.as_mut().is_none_or(whole)
}

fn misaligned() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "a transfer does not consist of whole pages")
}

#[cfg(test)]
mod tests;
