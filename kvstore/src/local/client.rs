//! One attached client: its pages, its staging memory, the blocks that it stages, and the way to answer it. The polling thread
//! and the tasks that work for the client share it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kvstore_plane::{Completion, FromDaemon, Push, RecordHead, RingWriter, must_kick, wake_up};
use kvstore_tiers::caps::{STAGING_BYTES_MIN, STAGING_PERCENT_MAX};
use kvstore_tiers::host::{Attached, LeasedBlock, NamespaceId, StagingMemory};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tonic::Status;

use super::socket::{self, Now};
use super::stage::Stage;
use crate::caps;
use crate::daemon::Daemon;

/// See the head of this file.
pub struct LocalClient {
    /// Its pages.
    pub attached: Arc<Attached>,
    /// Its connection.
    pub socket: OwnedFd,
    /// Blocks that it stages, by tag.
    pub stages: Mutex<HashMap<u64, Stage>>,
    /// Blocks that were promoted for it and that it has yet to lease, by tag.
    pub promoted: Mutex<HashMap<u64, Promoted>>,
    staging: Mutex<Option<Arc<StagingMemory>>>,
    /// It has yet to be told what became of its staging memory.
    staging_unsent: AtomicBool,
    outbox: Mutex<Outbox>,
    in_flight: AtomicUsize,
    gone: AtomicBool,
}

/// Blocks that stay in memory for a client. They count among the leases that all calls may have, for as long as they stay:
/// a client that promotes and never releases is answered Busy, as everybody is then.
pub struct Promoted {
    /// Dropped then, released or not.
    pub until: Instant,
    /// The blocks, and a permit for each.
    pub _kept: (Vec<LeasedBlock>, OwnedSemaphorePermit),
}

#[derive(Default)]
struct Outbox {
    writer: RingWriter,
    /// Completions for which the ring has no room, in order.
    waiting: VecDeque<(RecordHead, Vec<u8>)>,
}

impl LocalClient {
    pub(super) fn new(attached: Arc<Attached>, socket: OwnedFd) -> Self {
        Self {
            attached,
            socket,
            stages: Mutex::default(),
            promoted: Mutex::default(),
            staging: Mutex::default(),
            staging_unsent: AtomicBool::new(false),
            outbox: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            gone: AtomicBool::new(false),
        }
    }

    /// Whose.
    pub fn namespace(&self) -> NamespaceId {
        self.attached.namespace()
    }

    /// Its staging memory, where it has some.
    pub fn staging(&self) -> Option<Arc<StagingMemory>> {
        self.staging.lock().clone()
    }

    /// Gives it staging memory, on a thread that may wait, and says so: none where there is no room.
    pub(super) fn give_staging(self: &Arc<Self>, daemon: &Arc<Daemon>, runtime: &Handle) {
        let Some(task) = self.begin_task() else { return };
        let (client, daemon) = (Arc::clone(self), Arc::clone(daemon));
        runtime.spawn_blocking(move || {
            let _task = task;
            if client.staging().is_none() {
                // A small tier has less to spare: two clients can put at least.
                let most = daemon.host.limits().bytes / 100 * STAGING_PERCENT_MAX / 2 / 4096 * 4096;
                let bytes = daemon.config().local_staging_bytes.min(most.max(STAGING_BYTES_MIN));
                *client.staging.lock() = daemon.host.staging(bytes).map(Arc::new);
            }
            if client.is_gone() {
                return client.leave();
            }
            client.send_staging();
        });
    }

    fn send_staging(&self) {
        let staging = self.staging();
        let bytes = staging.as_ref().map_or(0, |staging| staging.memory.byte_len());
        let descriptors: Vec<BorrowedFd<'_>> = staging.iter().map(|staging| staging.memory.as_fd()).collect();
        let sent = socket::send(&self.socket, &FromDaemon::Staging { bytes }.encode(), &descriptors);
        self.staging_unsent.store(matches!(sent, Now::Later), Ordering::Release);
    }

    /// Says again what its full socket had no room for. False where there is still no room.
    pub(super) fn send_staging_again(&self) -> bool {
        if self.staging_unsent.load(Ordering::Acquire) {
            self.send_staging();
        }
        !self.staging_unsent.load(Ordering::Acquire)
    }

    /// Counts a command that a task works for; `None` where too many are.
    pub fn begin_task(self: &Arc<Self>) -> Option<Task> {
        let before = self.in_flight.fetch_add(1, Ordering::AcqRel);
        let task = Task(Arc::clone(self));
        (before < caps::LOCAL_TASKS_PER_CLIENT_MAX).then_some(task)
    }

    /// True once nobody is there to be answered.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Nobody is there any more: drops what was kept for it.
    pub(super) fn leave(&self) {
        self.gone.store(true, Ordering::Release);
        drop(std::mem::take(&mut *self.stages.lock()));
        drop(std::mem::take(&mut *self.promoted.lock()));
        *self.staging.lock() = None;
    }

    /// Answers a command.
    pub fn complete(&self, tag: u64, completion: &Completion) {
        let (kind, payload) = completion.encode();
        let mut outbox = self.outbox.lock();
        self.flush_into_ring(&mut outbox);
        let head = RecordHead { kind, tag };
        let ring = self.attached.view().completions();
        let pushed = if outbox.waiting.is_empty() { outbox.writer.push(&ring, head, &payload) } else { Ok(Push::Full) };
        match pushed {
            Ok(Push::Written) => {}
            Ok(Push::Full) => outbox.waiting.push_back((head, payload)),
            // An answer that fits no record: the client asks over gRPC.
            Ok(Push::TooLarge) => {
                let (kind, payload) = too_large().encode();
                outbox.waiting.push_back((RecordHead { kind, tag }, payload));
                self.flush_into_ring(&mut outbox);
            }
            // It wrote nonsense into its own page: it hears no more.
            Err(_) => return self.gone.store(true, Ordering::Release),
        }
        drop(outbox);
        self.wake();
    }

    /// Answers a command with an error.
    pub fn fail(&self, tag: u64, status: &Status) {
        let message: String = status.message().chars().take(1024).collect();
        self.complete(tag, &Completion::Failed { code: status.code() as u32, message });
    }

    /// Moves what waits into the ring, as far as there is room; true where something still waits.
    pub fn flush(&self) -> bool {
        let mut outbox = self.outbox.lock();
        let before = outbox.waiting.len();
        self.flush_into_ring(&mut outbox);
        let after = outbox.waiting.len();
        drop(outbox);
        if after < before {
            self.wake();
        }
        after > 0
    }

    fn flush_into_ring(&self, outbox: &mut Outbox) {
        let ring = self.attached.view().completions();
        while let Some((head, payload)) = outbox.waiting.front() {
            match outbox.writer.push(&ring, *head, payload) {
                Ok(Push::Written) => drop(outbox.waiting.pop_front()),
                Ok(Push::Full) => return,
                Ok(Push::TooLarge) => drop(outbox.waiting.pop_front()),
                Err(_) => {
                    outbox.waiting.clear();
                    return self.gone.store(true, Ordering::Release);
                }
            }
        }
    }

    fn wake(&self) {
        let sleeps = self.attached.view().client_sleeps();
        if must_kick(sleeps) {
            // One wake-up a sleep.
            wake_up(sleeps);
            // A full socket has something to read in it already.
            let _ = socket::send(&self.socket, &FromDaemon::Wake.encode(), &[]);
        }
    }
}

fn too_large() -> Completion {
    let status = Status::out_of_range("the answer is too large for a record of the ring: make this call over gRPC");
    Completion::Failed { code: status.code() as u32, message: status.message().to_owned() }
}

/// A command that a task works for.
pub struct Task(Arc<LocalClient>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}
