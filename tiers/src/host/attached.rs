//! Attached clients: who reads the slabs without asking. Owns the list of their pages, the key table's memory, and the
//! count of staging memory; knows no socket and no process.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_plane::{AttachmentView, CLIENT_PAGE_BYTES, DAEMON_PAGE_BYTES, HeapTable, KeyTable, SlotRef, TableMemory};
use kvstore_transfer::{SharedMemory, Slab, Writers};
use parking_lot::{Mutex, MutexGuard, RwLock};

use super::HostTier;
use super::namespace::{Namespace, NamespaceId, RegisteredLayout};
use crate::caps;
use crate::clock::BootTime;
use crate::slots::Readers;

/// The least slot: how many keys a table has to hold.
const SLOT_BYTES_MIN: u64 = 4096;
/// Keys of a table on the heap, where shared memory is not to be had.
const HEAP_TABLE_KEYS: usize = 1 << 20;

/// A namespace's key table, in memory that clients can map.
#[derive(Clone)]
pub(super) struct SharedTable(Result<Arc<SharedMemory>, String>);

impl SharedTable {
    /// Memory for all the keys that `bytes_ceiling` bytes of blocks can have. It is taken as keys come.
    pub(super) fn create(bytes_ceiling: u64) -> Self {
        let bytes = KeyTable::bytes_for(bytes_ceiling / SLOT_BYTES_MIN);
        let made = SharedMemory::create(c"kvstore-table", bytes, Writers::Daemon);
        if let Err(error) = &made {
            tracing::warn!(%error, bytes, "there is no shared memory for a key table, so clients on this node use gRPC only");
        }
        Self(made.map(Arc::new).map_err(|error| error.to_string()))
    }

    pub(super) fn memory(&self) -> Box<dyn TableMemory + Send + Sync> {
        struct Shared(Arc<SharedMemory>);
        impl TableMemory for Shared {
            fn words(&self) -> &[AtomicU64] {
                self.0.words()
            }
        }
        match &self.0 {
            Ok(memory) => Box::new(Shared(Arc::clone(memory))),
            Err(_) => Box::new(HeapTable::new(HEAP_TABLE_KEYS)),
        }
    }
}

/// The pages of one attached client.
pub struct Attached {
    namespace: NamespaceId,
    /// Which the client may write, too.
    pub client_page: SharedMemory,
    /// Which it may read.
    pub daemon_page: SharedMemory,
    /// Touches that were taken.
    seen: Mutex<u64>,
}

impl Attached {
    /// Both pages.
    pub fn view(&self) -> AttachmentView<'_> {
        AttachmentView::new(self.client_page.words(), self.daemon_page.words())
            .unwrap_or_else(|| unreachable!("the pages were made with these sizes"))
    }

    /// Whose.
    pub fn namespace(&self) -> NamespaceId {
        self.namespace
    }
}

/// Why a client was not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Too many are.
    #[error("{} clients are already attached, which is the most there may be", caps::ATTACHMENTS_MAX)]
    TooMany,
    /// The system has no memory, or no descriptors.
    #[error("the client cannot get shared memory: {0}")]
    NoMemory(String),
}

/// The clients of one namespace.
#[derive(Default)]
pub(super) struct AttachedReaders(RwLock<Vec<Arc<Attached>>>);

impl Readers for AttachedReaders {
    fn is_empty(&self) -> bool {
        self.0.read().is_empty()
    }

    fn named(&self, each: &mut dyn FnMut(SlotRef)) {
        for client in self.0.read().iter() {
            client.view().leases().named().for_each(&mut *each);
        }
    }
}

/// Staging memory of one client: counted in the tier's bytes while it exists.
pub struct StagingMemory {
    /// Which the client may write.
    pub memory: SharedMemory,
    mapped: Arc<AtomicU64>,
    staging: Arc<AtomicU64>,
}

impl Drop for StagingMemory {
    fn drop(&mut self) {
        let bytes = self.memory.byte_len();
        self.mapped.fetch_sub(bytes, Ordering::AcqRel);
        self.staging.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// What a client must know to read a namespace's blocks.
pub struct ReadersView {
    /// By which the key table files its keys.
    pub table_seed: u64,
    /// BLAKE3 of the namespace's name.
    pub namespace_digest: [u8; 32],
    table: Arc<SharedMemory>,
}

impl ReadersView {
    /// Bytes of the key table.
    pub fn table_bytes(&self) -> u64 {
        self.table.byte_len()
    }

    /// Its descriptor.
    pub fn table_fd(&self) -> BorrowedFd<'_> {
        self.table.as_fd()
    }
}

impl Namespace {
    /// The client wrote the leaf first; slots that it made up touch nothing, or its own namespace's blocks. `parts`: see
    /// [`first_of_parts`].
    fn touch(&mut self, slots: &[SlotRef], parts: &[Option<SlotRef>], mut after: Option<SlotRef>, now: BootTime) {
        self.slots.set_now(now);
        for (slot, first) in slots.iter().zip(parts) {
            self.slots.touch_before(*slot, after.replace(*slot), *first);
        }
        for (pool, blocks) in self.slots.pools_of(slots) {
            self.note_demand(pool, blocks, now);
        }
    }
}

/// Of slots that a client read, those which end a part of a prefix: where it begins. `follows` says which of them, but the first, have
/// the block before that of the one in front of them.
fn first_of_parts(slots: &[SlotRef], follows: &[bool]) -> Vec<Option<SlotRef>> {
    let mut parts = vec![None; slots.len()];
    let (mut first, mut inside) = (None, false);
    for (at, slot) in slots.iter().enumerate().rev() {
        if !inside {
            first = Some(*slot);
        }
        inside = at.checked_sub(1).and_then(|before| follows.get(before)).copied().unwrap_or(false);
        if !inside && let Some(part) = parts.get_mut(at) {
            *part = first;
        }
    }
    parts
}

impl HostTier {
    /// Attaches a client: from now on what it names is not given away.
    pub fn attach(&self, namespace: NamespaceId) -> Result<(Arc<Attached>, ReadersView), AttachError> {
        let no_memory = |error: std::io::Error| AttachError::NoMemory(error.to_string());
        let client_page = SharedMemory::create(c"kvstore-client", CLIENT_PAGE_BYTES as u64, Writers::Anyone);
        let daemon_page = SharedMemory::create(c"kvstore-daemon", DAEMON_PAGE_BYTES as u64, Writers::Daemon);
        let (client_page, daemon_page) = (client_page.map_err(no_memory)?, daemon_page.map_err(no_memory)?);
        let attached = Arc::new(Attached { namespace, client_page, daemon_page, seen: Mutex::new(0) });
        let state = self.state.lock();
        let all: usize = state.namespaces.iter().map(|namespace| namespace.readers.0.read().len()).sum();
        if all >= caps::ATTACHMENTS_MAX {
            return Err(AttachError::TooMany);
        }
        let unknown = || AttachError::NoMemory("the namespace is unknown".into());
        let namespace = state.namespace(namespace).ok_or_else(unknown)?;
        let table = namespace.table.0.clone().map_err(AttachError::NoMemory)?;
        let view = ReadersView { table_seed: namespace.seed, namespace_digest: namespace.digest, table };
        namespace.readers.0.write().push(Arc::clone(&attached));
        Ok((attached, view))
    }

    /// The client is no more, or reads nothing any more: what it names is given away.
    pub fn detach(&self, client: &Arc<Attached>) {
        if let Some(namespace) = self.state.lock().namespace(client.namespace) {
            namespace.readers.0.write().retain(|other| !Arc::ptr_eq(other, client));
        }
        self.look_again(client.namespace);
    }

    /// Looks which of the slots that waited for readers are read no more. The lease pages may be many: they are looked at without the
    /// lock.
    pub(super) fn look_again(&self, namespace: NamespaceId) {
        let waiting = self.state.lock().namespace(namespace).map_or(0, |at| at.slots.waiting_for_readers());
        for _ in 0..waiting.div_ceil(caps::KEYS_PER_LOCK) {
            let mut state = self.state.lock();
            let Some(at) = state.namespace_mut(namespace) else { return };
            let (waits, readers) = (at.slots.next_waiting(), Arc::clone(&at.readers));
            drop(state);
            let named = waits.named(&*readers);
            if let Some(at) = self.state.lock().namespace_mut(namespace) {
                at.slots.end_waiting(&waits, &named);
            }
        }
    }

    /// Tells the eviction policies what clients read, a lock's worth at a time.
    pub(super) fn take_touches(&self, now: BootTime) {
        let readers: Vec<_> = self.state.lock().namespaces.iter().map(|at| Arc::clone(&at.readers)).collect();
        let clients: Vec<Arc<Attached>> = readers.iter().flat_map(|readers| readers.0.read().clone()).collect();
        let (mut slots, mut follows) = (Vec::new(), Vec::new());
        for client in clients {
            slots.clear();
            follows.clear();
            let touched = client.view().touches().take(&mut client.seen.lock(), |slot| slots.push(slot));
            self.local_reads.fetch_add(touched.taken + touched.lost, Ordering::Relaxed);
            let mut pairs = slots.iter().zip(slots.iter().skip(1)).peekable();
            while pairs.peek().is_some() {
                let state = self.state.lock();
                let Some(namespace) = state.namespace(client.namespace) else { break };
                let pairs = pairs.by_ref().take(caps::KEYS_PER_LOCK);
                follows.extend(pairs.map(|(after, before)| namespace.slots.is_before(*before, *after)));
                MutexGuard::unlock_fair(state);
            }
            let parts = first_of_parts(&slots, &follows);
            let mut after = None;
            for (slots, parts) in slots.chunks(caps::KEYS_PER_LOCK).zip(parts.chunks(caps::KEYS_PER_LOCK)) {
                let mut state = self.state.lock();
                if let Some(namespace) = state.namespace_mut(client.namespace) {
                    namespace.touch(slots, parts, after, now);
                }
                after = slots.last().copied();
                MutexGuard::unlock_fair(state);
            }
        }
    }

    /// Blocks that clients read without asking, as far as they said.
    pub fn local_reads(&self) -> u64 {
        self.local_reads.load(Ordering::Relaxed)
    }

    /// Attached clients.
    pub fn attached(&self) -> usize {
        let state = self.state.lock();
        state.namespaces.iter().map(|namespace| namespace.readers.0.read().len()).sum()
    }

    /// Slots that clients name now, and slots that wait for that to end.
    pub fn local_leases(&self) -> (usize, usize) {
        let state = self.state.lock();
        let waiting = state.namespaces.iter().map(|namespace| namespace.slots.waiting_for_readers()).sum();
        let readers: Vec<_> = state.namespaces.iter().map(|namespace| Arc::clone(&namespace.readers)).collect();
        drop(state);
        let mut leases = 0;
        readers.iter().for_each(|readers| readers.named(&mut |_| leases += 1));
        (leases, waiting)
    }

    /// The slabs of a namespace, by number.
    pub fn slabs_of(&self, namespace: NamespaceId) -> Vec<(u32, Arc<Slab>)> {
        let state = self.state.lock();
        let Some(namespace) = state.namespace(namespace) else { return Vec::new() };
        let slots = &namespace.slots;
        let numbers = slots.pools().flat_map(|pool| slots.slab_numbers(pool));
        numbers.filter_map(|number| Some((number, Arc::clone(slots.slab(number)?)))).collect()
    }

    /// Has `watcher` called when slabs came or left, on whatever thread made them so.
    pub fn watch_slabs(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.slab_watchers.lock().push(Box::new(watcher));
    }

    pub(super) fn slabs_changed(&self) {
        self.slab_watchers.lock().iter().for_each(|watcher| watcher());
    }

    /// Staging memory of at least `bytes`, within the tier's bound: slabs give way to it. `None` where there is no room.
    /// Takes a millisecond or so.
    pub fn staging(&self, bytes: u64) -> Option<StagingMemory> {
        let bytes = bytes.next_multiple_of(SLOT_BYTES_MIN);
        let ready = self.ready.pause();
        {
            let state = self.state.lock();
            let most = state.limits.bytes / 100 * caps::STAGING_PERCENT_MAX;
            if self.staging.load(Ordering::Acquire) + bytes > most {
                return None;
            }
            // Counted before the slabs are withdrawn: nobody else takes their room.
            self.mapped.fetch_add(bytes, Ordering::AcqRel);
            self.staging.fetch_add(bytes, Ordering::AcqRel);
        }
        self.drop_surplus();
        drop(ready);
        let retired = self.shrink();
        let gave = !retired.is_empty();
        drop(retired);
        if gave {
            self.slabs_changed();
        }
        let uncount = || {
            self.mapped.fetch_sub(bytes, Ordering::AcqRel);
            self.staging.fetch_sub(bytes, Ordering::AcqRel);
        };
        let limit = self.limits().bytes;
        let memory = SharedMemory::create(c"kvstore-staging", bytes, Writers::Anyone);
        match memory.and_then(|memory| memory.populate().map(|()| memory)) {
            Ok(memory) if self.mapped.load(Ordering::Acquire) <= limit => {
                let (mapped, staging) = (Arc::clone(&self.mapped), Arc::clone(&self.staging));
                Some(StagingMemory { memory, mapped, staging })
            }
            _ => {
                uncount();
                None
            }
        }
    }

    /// Bytes of staging memory.
    pub fn staging_bytes(&self) -> u64 {
        self.staging.load(Ordering::Acquire)
    }

    /// The layout with this number.
    pub fn layout_at(&self, namespace: NamespaceId, ordinal: u32) -> Option<Arc<RegisteredLayout>> {
        self.state.lock().namespace(namespace)?.layout_at(ordinal).cloned()
    }
}
