//! Memory that is made ready ahead of need: the kernel has to clear each page before its first use, which takes longer than to
//! fill it with a block. A thread of its own does that, on cores that have nothing else to do; a pool that grows finds its slab made
//! but for the header.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvstore_transfer::{SlabError, SlabMemory};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::HostTier;

/// How long the thread waits before it tries again where the system had no memory.
const TRY_AGAIN: Duration = Duration::from_secs(10);
/// How urgent the thread is to the scheduler: a third as much as others. Less would keep a pool that grows waiting for what the thread
/// has begun. It holds a lock that others need for some instructions only, once a piece.
const NICE: i32 = 5;
/// A pool that grows waits this long at most for the piece that is being made, where that is the last room there is; then it evicts.
const AWAITED: Duration = Duration::from_millis(500);

/// See the head of this file.
pub(super) struct Ready {
    /// Each of `piece_bytes`.
    memory: Mutex<Vec<SlabMemory>>,
    piece_bytes: u64,
    /// Bytes of it.
    bytes: Arc<AtomicU64>,
    /// Bytes of a piece that is being made.
    making: Arc<AtomicU64>,
    /// Held while a piece is made.
    at_work: Mutex<()>,
    /// When that began.
    begun: Mutex<Option<Instant>>,
    /// How much should be ready.
    goal: AtomicU64,
    /// The tier's bound.
    limit: AtomicU64,
    wake: Arc<Wake>,
}

/// Something changed, or the tier is no more.
#[derive(Default)]
struct Wake {
    is_over: AtomicBool,
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Wake {
    fn up(&self) {
        *self.asked.lock() = true;
        self.changed.notify_one();
    }

    /// Waits until somebody asks, or until then.
    fn wait(&self, until: Option<Instant>) {
        let mut asked = self.asked.lock();
        match until {
            Some(until) => drop(self.changed.wait_while_until(&mut asked, |asked| !*asked, until)),
            None => self.changed.wait_while(&mut asked, |asked| !*asked),
        }
        *asked = false;
    }
}

impl Ready {
    pub(super) fn new(limit: u64, piece_bytes: u64) -> Self {
        Self {
            memory: Mutex::default(),
            piece_bytes,
            bytes: Arc::default(),
            making: Arc::default(),
            at_work: Mutex::default(),
            begun: Mutex::default(),
            goal: AtomicU64::new(0),
            limit: AtomicU64::new(limit),
            wake: Arc::default(),
        }
    }

    /// Bytes that are ready, and of what is being made.
    pub(super) fn bytes(&self) -> u64 {
        // What was being made becomes ready under this lock.
        let _memory = self.memory.lock();
        self.bytes.load(Ordering::SeqCst) + self.making()
    }

    /// Bytes of what is being made. It is in nobody's way but within the bound: what cannot be taken cannot be given back.
    pub(super) fn making(&self) -> u64 {
        self.making.load(Ordering::SeqCst)
    }

    /// True while a piece is being made that soon is there.
    pub(super) fn comes_soon(&self) -> bool {
        self.making() > 0 && self.begun.lock().is_some_and(|begun| begun.elapsed() < AWAITED)
    }

    /// The thread makes nothing, as long as this is kept.
    pub(super) fn pause(&self) -> MutexGuard<'_, ()> {
        self.at_work.lock()
    }

    pub(super) fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::SeqCst);
        self.wake.up();
    }

    /// Memory of at least so many bytes, which counts in `mapped` from now on.
    pub(super) fn take(&self, bytes: u64, mapped: &Arc<AtomicU64>) -> Option<SlabMemory> {
        let taken = self.memory.lock().pop_if(|memory| memory.bytes() >= bytes);
        taken.map(|mut memory| {
            memory.count_in(mapped);
            self.wake.up();
            memory
        })
    }

    /// What must go so that at most `room` bytes are ready. It counts nowhere any more: whoever takes its place counts already, and
    /// gives it back first. To unmap it takes milliseconds: not under a lock.
    pub(super) fn surplus(&self, room: u64) -> Vec<SlabMemory> {
        let mut memory = self.memory.lock();
        let mut surplus = Vec::new();
        while self.bytes.load(Ordering::SeqCst) > room
            && let Some(mut one) = memory.pop()
        {
            one.count_in(&Arc::default());
            surplus.push(one);
        }
        surplus
    }

    /// Memory that is not needed after all.
    pub(super) fn put_back(&self, memory: impl IntoIterator<Item = SlabMemory>) {
        for mut one in memory {
            one.count_in(&self.bytes);
            self.memory.lock().push(one);
        }
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        self.wake.is_over.store(true, Ordering::SeqCst);
        self.wake.up();
    }
}

impl HostTier {
    /// Starts the thread that makes memory ready, while the machine has so many bytes to spare. It ends with the tier.
    pub fn keep_ready(
        self: &Arc<Self>,
        to_spare: impl Fn() -> u64 + Send + 'static,
    ) -> std::io::Result<JoinHandle<()>> {
        let (tier, wake) = (Arc::downgrade(self), Arc::clone(&self.ready.wake));
        std::thread::Builder::new().name("kvstore-memory".into()).spawn(move || {
            // Without the right to it, the thread is as urgent as others.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
            make_ready_forever(&tier, &wake, to_spare);
        })
    }

    /// How much memory is to be ready. More than the tier may have is never made.
    pub fn set_ready_bytes(&self, bytes: u64) {
        self.ready.goal.store(bytes, Ordering::SeqCst);
        self.ready.wake.up();
    }

    /// The thread looks again what is to be made or given back. Cheap.
    pub(super) fn look_at_ready(&self) {
        let ready = self.ready.bytes.load(Ordering::SeqCst);
        if ready > self.room_for_ready() || self.fits_beside(ready + self.ready.piece_bytes) {
            self.ready.wake.up();
        }
    }

    /// True where so many bytes may be ready. A place of the same size stays free beside the last piece: a pool that grows while that
    /// is made finds room, and evicts nothing.
    fn fits_beside(&self, ready: u64) -> bool {
        let mapped = self.mapped.load(Ordering::SeqCst);
        let fits = mapped + ready + self.ready.piece_bytes <= self.ready.limit.load(Ordering::SeqCst);
        fits && ready <= self.ready.goal.load(Ordering::SeqCst)
    }

    /// Bytes that may be ready.
    fn room_for_ready(&self) -> u64 {
        let room = self.ready.limit.load(Ordering::SeqCst).saturating_sub(self.mapped.load(Ordering::SeqCst));
        room.min(self.ready.goal.load(Ordering::SeqCst))
    }

    /// Gives back what is ready beyond the goal, or beyond the tier's bound. Takes milliseconds.
    pub(super) fn drop_surplus(&self) {
        drop(self.ready.surplus(self.room_for_ready()));
    }

    /// Makes one piece of memory ready.
    fn make_ready(&self, to_spare: &impl Fn() -> u64) -> Result<Made, SlabError> {
        let (ready, bytes) = (&self.ready, self.ready.piece_bytes);
        let _at_work = ready.at_work.lock();
        if !self.fits_beside(ready.bytes() + bytes) {
            return Ok(Made::Enough);
        }
        if to_spare() < bytes {
            return Ok(Made::NoMemory);
        }
        {
            // Slabs are planned, and memory becomes theirs or is given back, under this lock.
            let _state = self.state.lock();
            if !self.fits_beside(ready.bytes() + bytes) {
                return Ok(Made::Enough);
            }
            *ready.begun.lock() = Some(Instant::now());
            ready.making.fetch_add(bytes, Ordering::SeqCst);
        }
        let mut memory = SlabMemory::create(bytes, self.huge_pages, Arc::clone(&ready.making))?;
        let mut all = ready.memory.lock();
        memory.count_in(&ready.bytes);
        all.push(memory);
        Ok(Made::One)
    }
}

enum Made {
    One,
    /// No more is wanted.
    Enough,
    /// The machine has none to spare.
    NoMemory,
}

fn make_ready_forever(tier: &Weak<HostTier>, wake: &Wake, to_spare: impl Fn() -> u64) {
    let (mut not_before, mut warned) = (None, false);
    while !wake.is_over.load(Ordering::SeqCst) {
        let Some(tier) = tier.upgrade() else { return };
        tier.drop_surplus();
        if not_before.is_none_or(|instant| instant <= Instant::now()) {
            not_before = match tier.make_ready(&to_spare) {
                Ok(Made::One) => continue,
                Ok(Made::Enough) => None,
                Ok(Made::NoMemory) => Some(Instant::now() + TRY_AGAIN),
                Err(error) => {
                    if !std::mem::replace(&mut warned, true) {
                        tracing::warn!(%error, "memory cannot be made ready ahead of need, so puts wait for it; it is tried again");
                    }
                    Some(Instant::now() + TRY_AGAIN)
                }
            };
        }
        drop(tier);
        wake.wait(not_before);
    }
}
