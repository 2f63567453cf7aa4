//! Memory that is made ready ahead of need: the kernel has to clear each page before its first use, which takes longer than to
//! fill it with a block. A thread of its own does that, on cores that have nothing else to do; a pool that grows finds its slab made
//! but for the header.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use kvstore_transfer::{SlabError, SlabMemory};
use parking_lot::{Condvar, Mutex};

use super::HostTier;
use super::room::memory_bytes_of;

/// How long the thread waits before it tries again where the system had no memory.
const TRY_AGAIN: Duration = Duration::from_secs(10);
/// How urgent the thread is to the scheduler: not at all.
const NICE: i32 = 19;

/// See the head of this file.
pub(super) struct Ready {
    /// Each of the tier's usual size.
    memory: Mutex<Vec<SlabMemory>>,
    /// Bytes of it, and of what is being made.
    bytes: Arc<AtomicU64>,
    /// What it should be.
    goal: AtomicU64,
    /// There is too little, or the tier is no more.
    wake: Arc<Wake>,
}

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

    fn wait(&self) {
        let mut asked = self.asked.lock();
        self.changed.wait_while(&mut asked, |asked| !*asked);
        *asked = false;
    }

    /// Waits, whoever asks.
    fn wait_before_trying_again(&self) {
        let mut asked = self.asked.lock();
        self.changed.wait_while_for(&mut asked, |_| !self.is_over.load(Ordering::Acquire), TRY_AGAIN);
    }
}

impl Ready {
    pub(super) fn new(goal: u64) -> Self {
        let (memory, bytes) = (Mutex::default(), Arc::default());
        Self { memory, bytes, goal: AtomicU64::new(goal), wake: Arc::default() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    pub(super) fn set_goal(&self, goal: u64) {
        self.goal.store(goal, Ordering::Relaxed);
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

    /// Memory that is not needed after all.
    pub(super) fn put_back(&self, mut memory: SlabMemory) {
        memory.count_in(&self.bytes);
        self.memory.lock().push(memory);
    }

    /// What must go so that at most `room` bytes are ready. To unmap it takes milliseconds: not under a lock.
    pub(super) fn surplus(&self, room: u64) -> Vec<SlabMemory> {
        let mut memory = self.memory.lock();
        let (mut bytes, mut surplus) = (self.bytes(), Vec::new());
        while bytes > room
            && let Some(one) = memory.pop()
        {
            bytes = bytes.saturating_sub(one.bytes());
            surplus.push(one);
        }
        surplus
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        self.wake.is_over.store(true, Ordering::Release);
        self.wake.up();
    }
}

impl HostTier {
    /// Starts the thread that makes memory ready, while the machine has so many bytes to spare. It ends with the tier.
    pub fn keep_ready(self: &Arc<Self>, to_spare: impl Fn() -> u64 + Send + 'static) -> std::io::Result<()> {
        let (tier, wake) = (Arc::downgrade(self), Arc::clone(&self.ready.wake));
        std::thread::Builder::new().name("kvstore-memory".into()).spawn(move || {
            // Without the right to it, the thread is as urgent as others.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
            make_ready_forever(&tier, &wake, to_spare);
        })?;
        Ok(())
    }

    /// How much memory is to be ready. More than the tier may have is never made.
    pub fn set_ready_bytes(&self, bytes: u64) {
        self.ready.set_goal(bytes);
    }

    /// Gives back what is ready beyond the goal, or beyond the tier's bound.
    pub(super) fn trim_ready(&self) {
        self.drop_surplus();
        if self.wants_ready().is_some() {
            self.ready.wake.up();
        }
    }

    fn drop_surplus(&self) {
        let room = self.limits().bytes.saturating_sub(self.mapped.load(Ordering::Acquire));
        drop(self.ready.surplus(room.min(self.ready.goal.load(Ordering::Relaxed))));
    }

    /// Bytes that are to be made ready next. A place of the same size stays free beside them, so that a pool that grows meanwhile
    /// does not take the tier beyond its bound.
    fn wants_ready(&self) -> Option<u64> {
        let (limit, bytes) = {
            let state = self.state.lock();
            (state.limits.bytes, memory_bytes_of(state.slab_bytes))
        };
        let ready = self.ready.bytes() + bytes;
        let fits = self.mapped.load(Ordering::Acquire) + ready + bytes <= limit;
        (fits && ready <= self.ready.goal.load(Ordering::Relaxed)).then_some(bytes)
    }

    /// Makes one piece of memory ready.
    fn make_ready(&self, to_spare: &impl Fn() -> u64) -> Result<Made, SlabError> {
        let Some(bytes) = self.wants_ready() else { return Ok(Made::Enough) };
        if to_spare() < bytes {
            return Ok(Made::NoMemory);
        }
        self.ready.bytes.fetch_add(bytes, Ordering::AcqRel);
        let memory = SlabMemory::create(bytes, self.huge_pages, Arc::clone(&self.ready.bytes))?;
        self.ready.memory.lock().push(memory);
        // The goal and the bound may be smaller than they were when it was begun.
        self.drop_surplus();
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
    while !wake.is_over.load(Ordering::Acquire) {
        match tier.upgrade().map(|tier| tier.make_ready(&to_spare)) {
            Some(Ok(Made::One)) => {}
            Some(Ok(Made::Enough)) => wake.wait(),
            Some(Ok(Made::NoMemory)) => wake.wait_before_trying_again(),
            Some(Err(error)) => {
                tracing::warn!(%error, "memory cannot be made ready ahead of need");
                wake.wait_before_trying_again();
            }
            None => return,
        }
    }
}
