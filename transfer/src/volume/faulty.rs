//! A volume that fails on purpose: for tests of everything above it.

use std::io;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Direction, IoMemory, SyncDone, Transfer, Volume, VolumeFile};
use crate::lanes::Lane;

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Fault {
    /// The device answers EIO.
    Eio = 1,
    /// The file system is full.
    NoSpace = 2,
    /// A write is reported as done and its payload was not written; only writes are counted for it.
    Torn = 3,
    /// A write is reported as done and nothing was written; only writes are counted for it.
    Lost = 4,
    /// A read comes back with one bit flipped; only reads are counted for it.
    Flipped = 5,
    /// From here on everything fails: the disk was pulled.
    Gone = 6,
    /// A sync answers EIO; only syncs are counted for it.
    SyncFails = 7,
    /// From here on every write to an index fails; only those are counted for it.
    IndexFails = 8,
    /// From here on every write fails; only writes are counted for it.
    WritesFail = 9,
    /// From here on reads wait until nothing fails any more; only reads are counted for it.
    ReadsWait = 10,
    /// From here on every sync and every write to an index fails; only those are counted for it.
    SyncAndIndexFail = 11,
    /// From here on every read answers EIO; only reads are counted for it.
    ReadsFail = 12,
    /// A write is reported as done and nothing was written, and the next sync fails; only writes are counted for it.
    LostAndUnsynced = 13,
}

/// What is about to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// A read of a volume.
    Read,
    /// A write to one.
    Write,
    /// A sync of one.
    Sync,
    /// A write to an index.
    Index,
}

/// When it goes wrong. Counts every read, write and sync, of all who share it, and every write to an index.
#[derive(Default)]
pub struct Faults {
    /// Operations until the fault; negative: none is armed.
    left: AtomicI64,
    fault: AtomicU8,
    operations: AtomicU64,
    hit: AtomicU64,
    /// Reads that wait.
    waiting: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faults").field("left", &self.left).field("fault", &self.fault).finish_non_exhaustive()
    }
}

impl Faults {
    /// No fault yet.
    pub fn none() -> Arc<Self> {
        Arc::new(Self { left: AtomicI64::new(-1), ..Self::default() })
    }

    /// The `nth` operation from now (1: the next) suffers `fault`.
    pub fn arm(&self, fault: Fault, nth: u64) {
        self.fault.store(fault as u8, Ordering::Release);
        self.left.store(nth as i64, Ordering::Release);
    }

    /// Nothing fails any more.
    pub fn disarm(&self) {
        self.left.store(-1, Ordering::Release);
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        waiting.into_iter().for_each(|go_on| go_on());
    }

    fn wait(&self, go_on: impl FnOnce() + Send + 'static) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(go_on));
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Acquire)
    }

    /// Faults that happened.
    pub fn hit(&self) -> u64 {
        self.hit.load(Ordering::Acquire)
    }

    /// Counts an operation; the fault that it suffers.
    pub fn next(&self, operation: Operation) -> Option<Fault> {
        self.operations.fetch_add(1, Ordering::AcqRel);
        let fault = match self.fault.load(Ordering::Acquire) {
            1 => Fault::Eio,
            2 => Fault::NoSpace,
            3 if operation == Operation::Write => Fault::Torn,
            4 if operation == Operation::Write => Fault::Lost,
            5 if operation == Operation::Read => Fault::Flipped,
            6 => Fault::Gone,
            7 if operation == Operation::Sync => Fault::SyncFails,
            8 if operation == Operation::Index => Fault::IndexFails,
            9 if operation == Operation::Write => Fault::WritesFail,
            10 if operation == Operation::Read => Fault::ReadsWait,
            11 if matches!(operation, Operation::Sync | Operation::Index) => Fault::SyncAndIndexFail,
            12 if operation == Operation::Read => Fault::ReadsFail,
            13 if operation == Operation::Write => Fault::LostAndUnsynced,
            _ => return None,
        };
        let before = self.left.load(Ordering::Acquire);
        let stays = matches!(
            fault,
            Fault::Gone
                | Fault::IndexFails
                | Fault::WritesFail
                | Fault::ReadsWait
                | Fault::SyncAndIndexFail
                | Fault::ReadsFail
        );
        let due = if stays && before == 0 { true } else { before > 0 && self.left.fetch_sub(1, Ordering::AcqRel) == 1 };
        self.hit.fetch_add(u64::from(due), Ordering::AcqRel);
        due.then_some(fault)
    }
}

fn error_of(fault: Fault) -> io::Error {
    io::Error::from_raw_os_error(if fault == Fault::NoSpace { 28 } else { 5 })
}

/// A volume with faults in front of it.
pub struct FaultyVolume {
    inner: Arc<dyn Volume>,
    faults: Arc<Faults>,
}

impl FaultyVolume {
    /// `inner`, with `faults` in front.
    pub fn new(inner: Arc<dyn Volume>, faults: Arc<Faults>) -> Self {
        Self { inner, faults }
    }
}

impl Volume for FaultyVolume {
    fn submit(&self, lane: Lane, mut transfer: Box<Transfer>) -> Result<(), Box<Transfer>> {
        let operation = match transfer.direction {
            Direction::Read => Operation::Read,
            Direction::Write => Operation::Write,
        };
        match (self.faults.next(operation), transfer.direction) {
            (None, _) => self.inner.submit(lane, transfer),
            (Some(fault @ (Fault::Lost | Fault::LostAndUnsynced)), Direction::Write) => {
                if fault == Fault::LostAndUnsynced {
                    self.faults.arm(Fault::SyncFails, 1);
                }
                let Transfer { done, memories, .. } = *transfer;
                done(Ok(()), memories);
                Ok(())
            }
            (Some(Fault::Torn), Direction::Write) if transfer.memories.body.is_some() => {
                // The header arrives, the payload does not.
                let body = transfer.memories.body.take();
                let done = std::mem::replace(&mut transfer.done, Box::new(|_, _| ()));
                transfer.done = Box::new(move |result, mut memories| {
                    memories.body = body;
                    done(result, memories);
                });
                self.inner.submit(lane, transfer)
            }
            (Some(Fault::Flipped), Direction::Read) => {
                let done = std::mem::replace(&mut transfer.done, Box::new(|_, _| ()));
                transfer.done = Box::new(move |result, mut memories| {
                    flip(memories.body.as_mut().unwrap_or(&mut memories.head));
                    done(result, memories);
                });
                self.inner.submit(lane, transfer)
            }
            (Some(Fault::ReadsWait), Direction::Read) => {
                let inner = Arc::clone(&self.inner);
                self.faults.wait(move || {
                    if let Err(refused) = inner.submit(lane, transfer) {
                        refused.fail(error_of(Fault::Eio));
                    }
                });
                Ok(())
            }
            // The other faults, and these where the transfer has no payload of its own or goes the other way.
            (Some(fault), _) => {
                transfer.fail(error_of(fault));
                Ok(())
            }
        }
    }

    fn sync(&self, done: SyncDone) {
        match self.faults.next(Operation::Sync) {
            None => self.inner.sync(done),
            Some(fault) => done(Err(error_of(fault))),
        }
    }

    fn raise(&self, tag: u64, to: Lane) {
        self.inner.raise(tag, to);
    }

    fn capacity(&self) -> u64 {
        self.inner.capacity()
    }

    fn queued(&self) -> ([usize; 3], usize) {
        self.inner.queued()
    }

    fn file(&self) -> &VolumeFile {
        self.inner.file()
    }
}

fn flip(memory: &mut IoMemory) {
    let (start, _) = memory.span();
    // SAFETY: the transfer is done and its memory in our hands: nobody else reads or writes it.
    let first = unsafe { &mut *start.as_ptr() };
    *first ^= 0x10;
}
