//! The engine for where io_uring is forbidden: pread and pwrite on a few threads.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::uring::guarded;
use super::{Direction, LANE_CAPS, SyncDone, Transfer, Volume, VolumeFile, aligned, closed, misaligned};
use crate::frame::FRAME_ALIGN;
use crate::lanes::{LANES, Lane, Lanes};

/// Threads: as many transfers at once. Half of them for background work at most.
const THREADS: usize = 8;

/// See the head of this file.
pub struct SyscallVolume {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    file: Arc<VolumeFile>,
    queue: Mutex<Queue>,
    more: Condvar,
    flying: AtomicUsize,
}

struct Queue {
    lanes: Lanes<Box<Transfer>>,
    syncs: Vec<SyncDone>,
    background: usize,
    stop: bool,
}

enum Work {
    Transfer(Lane, Box<Transfer>),
    Sync(Vec<SyncDone>),
}

impl SyscallVolume {
    /// Starts the threads.
    pub fn start(file: Arc<VolumeFile>) -> io::Result<Self> {
        let queue = Queue { lanes: Lanes::new(LANE_CAPS), syncs: Vec::new(), background: 0, stop: false };
        let shared =
            Arc::new(Shared { file, queue: Mutex::new(queue), more: Condvar::new(), flying: AtomicUsize::new(0) });
        let mut volume = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        for at in 0..THREADS {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("kvstore-io-{at}"));
            volume.threads.push(thread.spawn(move || shared.serve())?);
        }
        Ok(volume)
    }
}

impl Volume for SyscallVolume {
    fn submit(&self, lane: Lane, transfer: Box<Transfer>) -> Result<(), Box<Transfer>> {
        self.shared.queue.lock().lanes.push(lane, transfer)?;
        self.shared.more.notify_one();
        Ok(())
    }

    fn sync(&self, done: SyncDone) {
        self.shared.queue.lock().syncs.push(done);
        self.shared.more.notify_one();
    }

    fn raise(&self, tag: u64, to: Lane) {
        self.shared.queue.lock().lanes.raise(to, |transfer| transfer.tag == tag);
    }

    fn capacity(&self) -> u64 {
        self.shared.file.bytes().unwrap_or(0)
    }

    fn queued(&self) -> ([usize; 3], usize) {
        let queue = self.shared.queue.lock();
        (LANES.map(|lane| queue.lanes.len(lane)), self.shared.flying.load(Ordering::Relaxed))
    }

    fn file(&self) -> &VolumeFile {
        &self.shared.file
    }
}

impl Drop for SyscallVolume {
    fn drop(&mut self) {
        self.shared.queue.lock().stop = true;
        self.shared.more.notify_all();
        let own = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != own) {
            let _ = thread.join();
        }
        let mut queue = self.shared.queue.lock();
        let left: Vec<Box<Transfer>> = queue.lanes.drain().collect();
        let syncs = std::mem::take(&mut queue.syncs);
        drop(queue);
        closed(left, syncs);
    }
}

impl Shared {
    fn serve(&self) {
        while let Some(work) = self.next() {
            self.flying.fetch_add(1, Ordering::Relaxed);
            match work {
                Work::Sync(syncs) => {
                    let error = self.file.sync().err().map(|error| error.raw_os_error().unwrap_or(5));
                    for done in syncs {
                        let result = error.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
                        guarded(|| done(result));
                    }
                }
                Work::Transfer(lane, transfer) => {
                    guarded(|| self.transfer(transfer));
                    if lane != Lane::Demand {
                        self.queue.lock().background -= 1;
                        self.more.notify_one();
                    }
                }
            }
            self.flying.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn next(&self) -> Option<Work> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stop {
                return None;
            }
            if !queue.syncs.is_empty() {
                return Some(Work::Sync(std::mem::take(&mut queue.syncs)));
            }
            let background = queue.background;
            if let Some((lane, transfer)) = queue.lanes.pop(|lane| lane == Lane::Demand || background < THREADS / 2) {
                queue.background += usize::from(lane != Lane::Demand);
                return Some(Work::Transfer(lane, transfer));
            }
            self.more.wait(&mut queue);
        }
    }

    fn transfer(&self, mut transfer: Box<Transfer>) {
        if !aligned(&mut transfer) {
            return transfer.fail(misaligned());
        }
        let mut offset = transfer.offset;
        let mut result = Ok(());
        let memories = [Some(&mut transfer.memories.head), transfer.memories.body.as_mut()];
        for memory in memories.into_iter().flatten() {
            let (start, bytes) = memory.span();
            result = result.and_then(|()| move_all(self.file.as_fd(), transfer.direction, start, bytes, offset));
            offset += bytes as u64;
        }
        let Transfer { done, memories, .. } = *transfer;
        done(result, memories);
    }
}

fn move_all(
    file: BorrowedFd<'_>,
    direction: Direction,
    start: NonNull<u8>,
    bytes: usize,
    offset: u64,
) -> io::Result<()> {
    let mut at = 0;
    while at < bytes {
        // SAFETY: at < bytes, which the memory spans (IoMemory::span).
        let from = unsafe { start.add(at) };
        let moved = match direction {
            Direction::Read => {
                // SAFETY: the transfer owns these bytes, which nobody else reads or writes until it is done.
                let into = unsafe { std::slice::from_raw_parts_mut(from.as_ptr(), bytes - at) };
                rustix::io::pread(file, into, offset + at as u64)
            }
            Direction::Write => {
                // SAFETY: the transfer owns these bytes, or holds a lease on them: nobody writes them.
                let from = unsafe { std::slice::from_raw_parts(from.as_ptr(), bytes - at) };
                rustix::io::pwrite(file, from, offset + at as u64)
            }
        };
        match moved {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the volume ends here")),
            Ok(moved) if moved == bytes - at => return Ok(()),
            // Direct I/O goes on at a page.
            Ok(moved) if moved >= FRAME_ALIGN => at += moved - moved % FRAME_ALIGN,
            Ok(_) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the volume ends within a page")),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
