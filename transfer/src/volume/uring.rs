//! The io_uring engine: one thread, one ring, the file and the slabs registered.
//!
//! The thread owns every transfer from the queue to its completion; the kernel's view of a buffer ends
//! before its owner sees it again. When the thread ends it waits for all that the kernel still has. A slab
//! is registered the first time a transfer touches it, and unregistered once nobody else keeps it: the
//! kernel then no longer walks its pages for each transfer. Where the limit on locked memory forbids that,
//! transfers go unregistered.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;
use rustix::event::EventfdFlags;

use super::registered::{Buffers, PURGE_EVERY};
use super::{
    BACKGROUND_BYTES, BACKGROUND_DEPTH, BACKGROUND_STEP, BESIDE_DEMAND_BYTES, DEMAND_MS, DEPTH, Direction, LANE_CAPS,
    SyncDone, Transfer, Volume, VolumeFile, aligned, closed, misaligned, stopped,
};
use crate::frame::FRAME_ALIGN;
use crate::lanes::{LANES, Lane, Lanes};

/// The user data of the read on the wake-up descriptor.
const WAKE: u64 = u64::MAX;
/// The user data of an entry that does nothing.
const NOP: u64 = u64::MAX - 1;
/// Times that the kernel may ask to try one piece again.
const RETRIES_MAX: u32 = 64;

/// See the head of this file.
pub struct UringVolume {
    shared: Arc<Shared>,
    file: Arc<VolumeFile>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: OwnedFd,
    /// True while the thread sleeps, or is about to: whoever queues something then wakes it.
    asleep: AtomicBool,
    flying: AtomicUsize,
}

struct Queue {
    lanes: Lanes<Box<Transfer>>,
    syncs: Vec<SyncDone>,
    stop: bool,
}

impl UringVolume {
    /// Starts the thread; an error where the kernel forbids io_uring.
    pub fn start(file: Arc<VolumeFile>) -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let queue = Mutex::new(Queue { lanes: Lanes::new(LANE_CAPS), syncs: Vec::new(), stop: false });
        let shared = Arc::new(Shared { queue, wake, asleep: AtomicBool::new(false), flying: AtomicUsize::new(0) });
        let (started, starting) = mpsc::sync_channel(1);
        let (theirs, its_file) = (Arc::clone(&shared), Arc::clone(&file));
        let thread = std::thread::Builder::new().name("kvstore-uring".into()).spawn(move || {
            // The ring belongs to the thread that submits to it.
            match Ring::new(its_file, theirs) {
                Ok(mut ring) => {
                    let _ = started.send(Ok(()));
                    ring.run();
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        starting.recv().unwrap_or_else(|_| Err(stopped()))?;
        Ok(Self { shared, file, thread: Some(thread) })
    }
}

impl Shared {
    fn wake(&self) {
        if self.asleep.swap(false, Ordering::AcqRel) {
            // Cannot fail but by a full counter, and then the thread has a wake-up already.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Volume for UringVolume {
    fn submit(&self, lane: Lane, transfer: Box<Transfer>) -> Result<(), Box<Transfer>> {
        self.shared.queue.lock().lanes.push(lane, transfer)?;
        self.shared.wake();
        Ok(())
    }

    fn sync(&self, done: SyncDone) {
        self.shared.queue.lock().syncs.push(done);
        self.shared.wake();
    }

    fn raise(&self, tag: u64, to: Lane) {
        self.shared.queue.lock().lanes.raise(to, |transfer| transfer.tag == tag);
    }

    fn capacity(&self) -> u64 {
        self.file.bytes().unwrap_or(0)
    }

    fn queued(&self) -> ([usize; 3], usize) {
        let queue = self.shared.queue.lock();
        (LANES.map(|lane| queue.lanes.len(lane)), self.shared.flying.load(Ordering::Relaxed))
    }

    fn file(&self) -> &VolumeFile {
        &self.file
    }
}

impl Drop for UringVolume {
    fn drop(&mut self) {
        self.shared.queue.lock().stop = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// One piece of a transfer that the kernel has, or that waits to be given to it.
#[derive(Clone, Copy)]
struct Piece {
    address: *mut u8,
    left: usize,
    offset: u64,
    buffer: Option<u16>,
    retries: u32,
    /// Bytes that the kernel is asked for at most.
    step: usize,
    /// Background bytes that the kernel has of it.
    counted: usize,
}

enum Flight {
    Transfer { lane: Lane, transfer: Box<Transfer>, pieces: [Option<Piece>; 2], flying: u8, error: Option<io::Error> },
    Sync(Vec<SyncDone>),
}

struct Ring {
    ring: IoUring,
    shared: Arc<Shared>,
    file: Arc<VolumeFile>,
    fixed_file: bool,
    buffers: Buffers,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    background: usize,
    /// Bytes of background transfers that the kernel has.
    background_bytes: usize,
    /// When somebody last waited for a block.
    demanded: Option<Instant>,
    syncing: bool,
    /// The kernel reads the wake-up counter into it while a read is armed.
    counter: Box<[u8; 8]>,
    armed: bool,
    /// Pieces that found the submission queue full, or are to be tried again.
    again: Vec<(usize, usize)>,
    /// Pieces of background transfers, in order, that wait until the kernel has fewer bytes of others.
    held: VecDeque<(usize, usize)>,
}

impl Ring {
    fn new(file: Arc<VolumeFile>, shared: Arc<Shared>) -> io::Result<Self> {
        // Two pieces a transfer, a sync and the wake-up.
        let entries = (2 * DEPTH + 4).next_power_of_two() as u32;
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun();
        // Kernels before 6.1 know neither flag.
        let ring = builder.build(entries).or_else(|_| IoUring::new(entries))?;
        let fixed_file = ring.submitter().register_files(&[file.as_fd().as_raw_fd()]).is_ok();
        let buffers = Buffers::new(&ring);
        let flights = (0..=DEPTH).map(|_| None).collect();
        Ok(Self {
            ring,
            shared,
            file,
            fixed_file,
            buffers,
            flights,
            free: (0..=DEPTH).rev().collect(),
            background: 0,
            background_bytes: 0,
            demanded: None,
            syncing: false,
            counter: Box::new([0; 8]),
            armed: false,
            again: Vec::new(),
            held: VecDeque::new(),
        })
    }

    fn run(&mut self) {
        loop {
            self.buffers.purge(&self.ring);
            let stop = self.take_work();
            let flying = self.flights.len() - self.free.len();
            self.shared.flying.store(flying, Ordering::Relaxed);
            if stop && flying == 0 {
                break;
            }
            self.retry_pieces();
            self.arm();
            // Sleep only if nothing came in since the lanes were looked at: asleep first, then look.
            self.shared.asleep.store(true, Ordering::Release);
            let waiting = self.can_take() && self.has_work();
            if waiting || !self.again.is_empty() {
                self.shared.asleep.store(false, Ordering::Release);
            }
            let want = usize::from(!waiting && self.again.is_empty());
            match self.submit_and_wait(want) {
                Ok(_) => {}
                // EBUSY, EAGAIN: completions must be reaped first, or memory is short; EINTR: a signal; ETIME:
                // nothing came. The entries stay queued in each case.
                Err(error) if matches!(error.raw_os_error(), Some(4 | 11 | 16 | 62)) => {}
                Err(error) => {
                    tracing::error!(%error, "io_uring failed; the volume tries again");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            self.shared.asleep.store(false, Ordering::Release);
            self.reap();
        }
        // Whoever still waits in a lane is told.
        let mut queue = self.shared.queue.lock();
        let left: Vec<Box<Transfer>> = queue.lanes.drain().collect();
        let syncs = std::mem::take(&mut queue.syncs);
        drop(queue);
        closed(left, syncs);
    }

    fn submit_and_wait(&self, want: usize) -> io::Result<usize> {
        let flying = self.free.len() < self.flights.len();
        if want == 0 || self.buffers.is_empty() || flying {
            return self.ring.submit_and_wait(want);
        }
        // Slabs that are gone must not stay pinned because nothing is read. (What flies wakes us anyway, and a
        // timer for each wait costs as much as a small transfer.)
        let timeout = types::Timespec::from(PURGE_EVERY);
        self.ring.submitter().submit_with_args(want, &types::SubmitArgs::new().timespec(&timeout))
    }

    fn can_take(&self) -> bool {
        // One place is kept for a sync.
        self.free.len() > 1
    }

    fn has_work(&self) -> bool {
        let queue = self.shared.queue.lock();
        let background = queue.lanes.len(Lane::Prefetch) + queue.lanes.len(Lane::Background) > 0;
        queue.stop && self.free.len() == self.flights.len()
            || queue.lanes.len(Lane::Demand) > 0
            || (background && self.background < BACKGROUND_DEPTH)
            || (!queue.syncs.is_empty() && !self.syncing)
    }

    /// Moves waiting transfers into the submission queue, as far as the depth allows. True when asked to stop.
    fn take_work(&mut self) -> bool {
        loop {
            let mut queue = self.shared.queue.lock();
            if !self.syncing && !queue.syncs.is_empty() {
                let syncs = std::mem::take(&mut queue.syncs);
                drop(queue);
                self.start_sync(syncs);
                continue;
            }
            let stop = queue.stop;
            if !self.can_take() {
                return stop;
            }
            let background = self.background;
            let next = queue.lanes.pop(|lane| lane == Lane::Demand || background < BACKGROUND_DEPTH);
            drop(queue);
            let Some((lane, transfer)) = next else { return stop };
            self.start(lane, transfer);
        }
    }

    fn start_sync(&mut self, syncs: Vec<SyncDone>) {
        let Some(at) = self.free.pop() else { return };
        self.syncing = true;
        self.place(at, Flight::Sync(syncs));
        self.again.push((at, 0));
    }

    fn start(&mut self, lane: Lane, mut transfer: Box<Transfer>) {
        if !aligned(&mut transfer) {
            return transfer.fail(misaligned());
        }
        let Some(at) = self.free.pop() else { return transfer.fail(stopped()) };
        let mut pieces = [None, None];
        let mut offset = transfer.offset;
        let memories = [Some(&mut transfer.memories.head), transfer.memories.body.as_mut()];
        for (piece, memory) in pieces.iter_mut().zip(memories) {
            let Some(memory) = memory else { continue };
            let (address, left) = memory.span();
            let buffer = self.buffers.index_of(&self.ring, memory);
            let step = if lane == Lane::Demand { left } else { BACKGROUND_STEP };
            *piece = Some(Piece { address: address.as_ptr(), left, offset, buffer, retries: 0, step, counted: 0 });
            offset += left as u64;
        }
        let flying = pieces.iter().flatten().count() as u8;
        self.background += usize::from(lane != Lane::Demand);
        if lane == Lane::Demand {
            self.demanded = Some(Instant::now());
        }
        self.place(at, Flight::Transfer { lane, transfer, pieces, flying, error: None });
        for piece in 0..flying {
            self.go_on(lane, (at, usize::from(piece)));
        }
    }

    /// A piece is to be given to the kernel: at once, or when its turn comes.
    fn go_on(&mut self, lane: Lane, piece: (usize, usize)) {
        match lane {
            Lane::Demand => self.again.push(piece),
            _ => self.held.push_back(piece),
        }
    }

    /// Lets pieces go that wait for others: at least one at a time, so that it goes on.
    fn release_held(&mut self) {
        let is_recent = |at: Instant| at.elapsed() < Duration::from_millis(DEMAND_MS);
        let most = if self.demanded.is_some_and(is_recent) { BESIDE_DEMAND_BYTES } else { BACKGROUND_BYTES };
        while let Some((at, piece)) = self.held.front().copied() {
            let state = self.flights.get_mut(at).and_then(Option::as_mut);
            if let Some(Flight::Transfer { pieces, .. }) = state
                && let Some(Some(piece)) = pieces.get_mut(piece)
            {
                let bytes = piece.left.min(piece.step);
                if self.background_bytes > 0 && self.background_bytes + bytes > most {
                    return;
                }
                piece.counted = bytes;
                self.background_bytes += bytes;
            }
            self.held.pop_front();
            self.again.push((at, piece));
        }
    }

    fn place(&mut self, at: usize, flight: Flight) {
        if let Some(place) = self.flights.get_mut(at) {
            *place = Some(flight);
        }
    }

    /// Puts pieces into the submission queue; those that find it full wait for the next round.
    fn retry_pieces(&mut self) {
        self.release_held();
        let pieces = std::mem::take(&mut self.again);
        // The block layer joins neighbours (a header and its payload) only among more than two entries.
        if pieces.len() == 2 {
            let nop = opcode::Nop::new().build().user_data(NOP);
            // SAFETY: an entry without memory. A full queue needs no company.
            let _ = unsafe { self.ring.submission().push(&nop) };
        }
        for (at, piece) in pieces {
            let Some(entry) = self.entry(at, piece) else { continue };
            // SAFETY: the memory that the entry names belongs to the flight at `at`, which stays in
            // `flights` until the completion of all its pieces was reaped (complete()).
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_err() {
                self.again.push((at, piece));
            }
        }
    }

    fn entry(&self, at: usize, piece: usize) -> Option<squeue::Entry> {
        let user_data = (at * 2 + piece) as u64;
        let raw: RawFd = self.file.as_fd().as_raw_fd();
        let entry = match self.flights.get(at)?.as_ref()? {
            Flight::Sync(_) => {
                let flags = types::FsyncFlags::DATASYNC;
                if self.fixed_file {
                    opcode::Fsync::new(types::Fixed(0)).flags(flags).build()
                } else {
                    opcode::Fsync::new(types::Fd(raw)).flags(flags).build()
                }
            }
            Flight::Transfer { transfer, pieces, .. } => {
                let piece = (*pieces.get(piece)?)?;
                if self.fixed_file {
                    read_or_write!(types::Fixed(0), transfer.direction, &piece)
                } else {
                    read_or_write!(types::Fd(raw), transfer.direction, &piece)
                }
            }
        };
        Some(entry.user_data(user_data))
    }

    fn arm(&mut self) {
        if self.armed {
            return;
        }
        let address = self.counter.as_mut_ptr();
        let entry = opcode::Read::new(types::Fd(self.shared.wake.as_raw_fd()), address, 8).build().user_data(WAKE);
        // SAFETY: the counter's eight bytes are on the heap, belong to this ring, and are not touched while
        // the read is armed; the ring is dropped before them (field order), which cancels it.
        self.armed = unsafe { self.ring.submission().push(&entry) }.is_ok();
    }

    fn reap(&mut self) {
        let completions: Vec<(u64, i32)> =
            self.ring.completion().map(|completion| (completion.user_data(), completion.result())).collect();
        for (user_data, result) in completions {
            if user_data == WAKE {
                self.armed = false;
            } else if user_data != NOP {
                self.completed((user_data / 2) as usize, (user_data % 2) as usize, result);
            }
        }
    }

    fn completed(&mut self, at: usize, piece: usize, result: i32) {
        let Some(flight) = self.flights.get_mut(at).and_then(Option::as_mut) else { return };
        match flight {
            Flight::Sync(_) => {
                if let Some(Flight::Sync(syncs)) = self.flights.get_mut(at).and_then(Option::take) {
                    self.free.push(at);
                    self.syncing = false;
                    let error = (result < 0).then_some(-result);
                    for done in syncs {
                        let result = error.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
                        guarded(|| done(result));
                    }
                }
            }
            Flight::Transfer { lane, pieces, flying, error, .. } => {
                let Some(Some(state)) = pieces.get_mut(piece) else { return };
                self.background_bytes -= std::mem::take(&mut state.counted);
                match advance(state, result) {
                    Ok(true) => {}
                    Ok(false) => {
                        let lane = *lane;
                        return self.go_on(lane, (at, piece));
                    }
                    Err(failed) => *error = Some(failed),
                }
                *flying -= 1;
                if *flying == 0 {
                    self.complete(at);
                }
            }
        }
    }

    /// The kernel is done with every piece: hands the memory back.
    fn complete(&mut self, at: usize) {
        if let Some(Flight::Transfer { lane, transfer, error, .. }) = self.flights.get_mut(at).and_then(Option::take) {
            self.free.push(at);
            self.background -= usize::from(lane != Lane::Demand);
            let transfer = *transfer;
            guarded(|| (transfer.done)(error.map_or(Ok(()), Err), transfer.memories));
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Only after a panic: memory that the kernel may still write is leaked rather than freed.
        if self.flights.iter().any(Option::is_some) {
            std::mem::forget(std::mem::take(&mut self.flights));
            std::mem::forget(std::mem::replace(&mut self.counter, Box::new([0; 8])));
        }
    }
}

/// A callback that panics must not take the ring down with what the kernel has.
pub(super) fn guarded(callback: impl FnOnce()) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(callback)).is_err() {
        tracing::error!("a transfer's completion panicked; the volume continues");
    }
}

/// The entry for a piece; a macro, because the crate's trait of both kinds of file is private.
macro_rules! read_or_write {
    ($file:expr, $direction:expr, $piece:expr) => {{
        let (file, piece) = ($file, $piece);
        // A piece is at most a block, whose length has 32 bits; what the kernel does not take at once is the
        // rest of a short transfer like any other.
        let len = piece.left.min(piece.step).min(1 << 30) as u32;
        match ($direction, piece.buffer) {
            (Direction::Read, None) => opcode::Read::new(file, piece.address, len).offset(piece.offset).build(),
            (Direction::Write, None) => opcode::Write::new(file, piece.address, len).offset(piece.offset).build(),
            (Direction::Read, Some(buffer)) => {
                opcode::ReadFixed::new(file, piece.address, len, buffer).offset(piece.offset).build()
            }
            (Direction::Write, Some(buffer)) => {
                opcode::WriteFixed::new(file, piece.address, len, buffer).offset(piece.offset).build()
            }
        }
    }};
}
use read_or_write;

/// What a completion makes of a piece: true when it is done, false when the rest is to be tried again.
fn advance(piece: &mut Piece, result: i32) -> io::Result<bool> {
    if result < 0 {
        // EINTR and EAGAIN: nothing moved, and nothing is wrong.
        if matches!(-result, 4 | 11) && piece.retries < RETRIES_MAX {
            piece.retries += 1;
            return Ok(false);
        }
        return Err(io::Error::from_raw_os_error(-result));
    }
    let moved = result as usize;
    if moved >= piece.left {
        return Ok(true);
    }
    // Short transfers are normal. Direct I/O goes on at a page; bytes of a torn page are moved again.
    let whole = moved - moved % FRAME_ALIGN;
    if whole == 0 {
        piece.retries += 1;
        if moved == 0 || piece.retries > RETRIES_MAX {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the volume ends here"));
        }
    }
    piece.address = piece.address.wrapping_add(whole);
    piece.left -= whole;
    piece.offset += whole as u64;
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(left: usize) -> Piece {
        Piece { address: std::ptr::null_mut(), left, offset: 40_960, buffer: None, retries: 0, step: left, counted: 0 }
    }

    /// The kernel may move less than it was asked to, or nothing for now; the rest is asked for again, from a page.
    #[test]
    fn short_transfers_go_on_and_interrupted_ones_are_tried_again() {
        let mut short = piece(4 * 4096);
        assert!(!advance(&mut short, 4096 + 100).unwrap(), "a torn page is moved again");
        assert_eq!((short.left, short.offset, short.address as usize), (3 * 4096, 45_056, 4096));
        assert!(!advance(&mut short, -11).unwrap(), "EAGAIN");
        assert!(!advance(&mut short, -4).unwrap(), "EINTR");
        assert!(advance(&mut short, 3 * 4096).unwrap());
        let ended = advance(&mut piece(8192), 0).unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(advance(&mut piece(8192), -5).unwrap_err().raw_os_error(), Some(5));
        let mut stubborn = piece(8192);
        let tries = (0..1000).take_while(|_| advance(&mut stubborn, -11).is_ok()).count();
        assert_eq!(tries, RETRIES_MAX as usize, "and not for ever");
    }
}
