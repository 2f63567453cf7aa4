//! The Nvme tier: blocks on this node's disks, written behind, found again after any kind of death.
//!
//! Owns the volumes, one a configured path, each with an index of its own: losing a disk loses its blocks
//! alone. Knows the Host tier, from which blocks come and into which they are read; never the wire.
//! What a caller gets here it gets at once, or through a channel: nothing in here waits for a disk on the
//! caller's thread. `docs/design/volume.md` draws what is on the disk.

mod batch;
mod below;
mod bound;
mod check;
mod commit;
mod deletions;
mod extents;
mod flush;
mod format;
mod hold;
mod index;
mod load;
mod mark;
mod namespaces;
mod owed;
mod pins;
mod publish;
mod read;
mod rebuild;
mod reclaim;
mod renew;
mod reserve;
mod ring;
mod segments;
mod state;
mod status;
mod store;
mod verify;
mod write;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread::JoinHandle;

use kvstore_plane::SequenceHash;
use kvstore_transfer::volume::{Faults, IoEngine};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, oneshot};

use crate::block::{BlockRef, Digest, Run};
use crate::changes::{ChangeLog, NamespaceTag};
use crate::clock::BootTime;
use crate::host::{HostTier, RegisteredLayout};
use crate::meter::ReadMeter;
use crate::slots::Delete;

use deletions::Deletions;
use extents::Extents;
use read::Check;
use store::Store;
use write::{Begun, Commit, Dirty, DirtyBytes, DirtyCount, answer};

pub use bound::BoundRefused;
pub use format::{Extent, FormatError, IndexValue, SegmentClass, SegmentHeader, VolumeHeader};
pub use hold::PinRefused;
pub use kvstore_transfer::volume::{Fault, IoEngine as NvmeEngine};
pub use namespaces::NvmeNamespace;
pub use state::Health;
pub use status::{NvmeStatus, VolumeStatus};
pub use store::{OpenError, engine_of, index_bytes_of, usable_bytes};
pub use verify::{VerifyOptions, VerifyReport, verify_folder};

/// What the tier is made with.
#[derive(Clone)]
pub struct NvmeOptions {
    /// One folder a disk.
    pub paths: Vec<PathBuf>,
    /// Bytes that each of them may take, the index included.
    pub bytes: u64,
    /// Bytes of that for the index; `None`: a part.
    pub index_bytes: Option<u64>,
    /// Bytes of blocks that wait to be written, of all volumes together, before puts have to wait.
    pub dirty_bytes: u64,
    /// How the disks are driven.
    pub engine: IoEngine,
    /// Names this boot of the machine: clocks of another one mean nothing.
    pub boot_id: [u8; 16],
    /// Now.
    pub now: BootTime,
    /// Faults, for tests.
    pub faults: Option<Arc<Faults>>,
}

/// What the volumes know of each other.
pub(crate) struct Peers {
    stores: RwLock<Vec<Weak<Store>>>,
    dirty: Arc<DirtyCount>,
    /// Dirty bytes became fewer.
    cleaned: Notify,
    /// What each namespace may have.
    namespaces: RwLock<Vec<NvmeNamespace>>,
    /// What comes and leaves.
    changes: Arc<ChangeLog>,
    /// How fast they are read.
    meter: Arc<ReadMeter>,
}

impl Peers {
    fn new(dirty: Arc<DirtyCount>, changes: Arc<ChangeLog>) -> Self {
        Self {
            stores: RwLock::new(Vec::new()),
            dirty,
            cleaned: Notify::new(),
            namespaces: RwLock::new(Vec::new()),
            changes,
            meter: Arc::default(),
        }
    }

    /// The first that `of` says of a volume; none of them is locked when it is asked.
    fn find<T>(&self, of: impl FnMut(Arc<Store>) -> Option<T>) -> Option<T> {
        self.stores.read().iter().filter_map(Weak::upgrade).find_map(of)
    }

    /// The sum of what `of` says of each volume.
    fn sum(&self, of: impl FnMut(Arc<Store>) -> u64) -> u64 {
        self.stores.read().iter().filter_map(Weak::upgrade).map(of).sum()
    }

    /// The seed of the volumes that are open: a new one takes it over, so that all know a block by one name.
    pub(crate) fn seed(&self) -> Option<u64> {
        self.find(|store| Some(store.header.seed))
    }

    /// True where some volume has a block with this tag, or one is on its way there; or may have it, under another seed.
    fn has_tag(&self, seed: u64, tag: u64) -> bool {
        let has = |store: Arc<Store>| {
            let state = store.state.lock();
            store.header.seed != seed || state.extents.has_tag(tag) || state.pending.has_tag(tag)
        };
        self.find(|store| has(store).then_some(())).is_some()
    }
}

/// See the head of this file.
pub struct NvmeTier {
    stores: Vec<Arc<Store>>,
    host: Arc<HostTier>,
    peers: Arc<Peers>,
    dirty_max: AtomicU64,
    index_bytes: Option<u64>,
    boot_id: [u8; 16],
    opened: BootTime,
    /// Unused blocks are being swept; and when that was done last.
    sweeping: AtomicBool,
    swept: AtomicU64,
    threads: Mutex<Vec<JoinHandle<()>>>,
    deletions: Arc<Deletions>,
}

/// What came of asking for a block to be written.
pub enum BegunWrite {
    /// It is on its way; where LOCAL was asked for, the channel tells true once it is there.
    Queued(Option<oneshot::Receiver<bool>>),
    /// It will not be written: no volume takes writes, or it is too large, or not in memory any more.
    Refused,
}

impl NvmeTier {
    /// Opens every volume. Ready when it returns: what has to be found again is found in the background.
    pub fn open(options: &NvmeOptions, host: &Arc<HostTier>) -> Result<Arc<Self>, OpenError> {
        let dirty = Arc::new(DirtyCount::default());
        host.set_has_below();
        let peers = Arc::new(Peers::new(dirty, Arc::clone(host.changes())));
        let mut stores = Vec::new();
        let mut commits = Vec::new();
        for path in &options.paths {
            let (store, commits_of) = Store::open(path, options, Arc::clone(&peers))?;
            peers.stores.write().push(Arc::downgrade(&store));
            stores.push(store);
            commits.push(commits_of);
        }
        let mut threads = Vec::new();
        for (store, commits) in stores.iter().zip(commits) {
            threads.extend(start(store, commits).map_err(|cause| OpenError::Io {
                step: "start threads for",
                path: store.path.clone(),
                cause,
            })?);
        }
        Ok(Arc::new(Self {
            stores,
            host: Arc::clone(host),
            peers,
            dirty_max: AtomicU64::new(options.dirty_bytes),
            index_bytes: options.index_bytes,
            boot_id: options.boot_id,
            opened: options.now,
            sweeping: AtomicBool::new(false),
            swept: AtomicU64::new(options.now.0),
            threads: Mutex::new(threads),
            deletions: Arc::default(),
        }))
    }

    fn digest(&self, store: &Store, block: &BlockRef<'_>) -> Digest {
        block.digest(store.header.seed)
    }

    /// Which blocks of a prefix are on disk.
    pub fn presence(&self, layout: &Arc<RegisteredLayout>, group: u16, hashes: &[SequenceHash]) -> Vec<bool> {
        self.present(&Run { layout, group, hashes }, |extents, digest| extents.get(digest).is_some())
    }

    fn present(&self, run: &Run<'_>, is_here: impl Fn(&mut Extents, Digest) -> bool) -> Vec<bool> {
        let mut found = vec![false; run.hashes.len()];
        for store in &self.stores {
            let digests = run.digests(store.header.seed);
            let mut state = store.state.lock();
            if !state.health.left {
                let here = digests.into_iter().map(|digest| is_here(&mut state.extents, digest));
                found.iter_mut().zip(here).for_each(|(found, here)| *found |= here);
            }
        }
        found
    }

    /// Names for events of the namespace's blocks, a few at a time: from where `cursor` says on; `None` after the last.
    pub fn names(&self, namespace: NamespaceTag, cursor: (usize, u32), out: &mut Vec<u64>) -> Option<(usize, u32)> {
        let (at, from) = cursor;
        let state = self.stores.get(at)?.state.lock();
        let next = match state.health.left {
            true => None,
            false => state.extents.names(namespace, from, crate::caps::NAMES_PER_LOCK, out),
        };
        Some(next.map_or((at + 1, 0), |next| (at, next)))
    }

    // ------------------------------------------------------------------------------- writing

    /// True where more blocks may be put: fewer bytes wait to be written than the limit.
    pub fn has_dirty_room(&self) -> bool {
        let few = self.peers.dirty.blocks.load(Ordering::Acquire) < crate::caps::NVME_DIRTY_BLOCKS_MAX;
        few && self.dirty_bytes() < self.dirty_max.load(Ordering::Acquire) || !self.takes_writes()
    }

    /// Bytes of blocks that wait to be written.
    pub fn dirty_bytes(&self) -> u64 {
        self.peers.dirty.bytes.load(Ordering::Acquire)
    }

    /// Resolves when dirty bytes became fewer.
    pub fn cleaned(&self) -> tokio::sync::futures::Notified<'_> {
        self.peers.cleaned.notified()
    }

    fn takes_writes(&self) -> bool {
        self.stores.iter().any(|store| store.state.lock().health.takes_writes())
    }

    /// Writes a block that is readable in memory, in the background. `sums`: the checksums of its sections,
    /// where they were taken. A block that is on disk already is not written again; with `local`, it is
    /// synced.
    pub fn begin_write(
        &self,
        block: &BlockRef<'_>,
        parent: Option<SequenceHash>,
        sums: Vec<u32>,
        local: bool,
    ) -> BegunWrite {
        let (waiter, waiting) = oneshot::channel();
        if self.stores.iter().any(|store| store.is_stopping()) {
            return BegunWrite::Refused;
        }
        if let Some(store) = self.holder(block) {
            let safe = {
                let state = store.state.lock();
                let entry = state.extents.get(self.digest(store, block));
                let here = entry.filter(|entry| !local || !state.suspects.contains(&entry.extent.segment));
                here.map(|_| state.failed_syncs)
            };
            // What a failed sync has left in doubt is written anew.
            if let Some(failures) = safe {
                if !local {
                    return BegunWrite::Queued(None);
                }
                return match store.commits.send(Commit::Sync(waiter, failures)) {
                    Ok(()) => BegunWrite::Queued(Some(waiting)),
                    Err(_) => BegunWrite::Refused,
                };
            }
        }
        let Some((store, digest)) = self.place_for(block) else { return BegunWrite::Refused };
        // Before anybody can wait for this write: where the block's bytes are not to be had, there will be none.
        let dirty = self.dirty(store, digest, block, parent, sums);
        match store.begin_pending(digest, local.then_some(waiter), dirty.is_some()) {
            Begun::Already => return BegunWrite::Queued(local.then_some(waiting)),
            Begun::Refused => return BegunWrite::Refused,
            Begun::Now => {}
        }
        let Some(dirty) = dirty else { return BegunWrite::Refused };
        // Deleted in memory before it was known to be on its way: whoever deleted it does not find it here.
        if !self.host.is_resident(block.layout.namespace, &block.key()) {
            answer(store.state.lock().pending.remove(digest), false);
            return BegunWrite::Refused;
        }
        let mut queue = store.queue.lock();
        if store.is_stopping() {
            // The flusher may have looked at the queue for the last time.
            drop(queue);
            answer(store.state.lock().pending.remove(digest), false);
            return BegunWrite::Refused;
        }
        queue.items.push_back(dirty);
        drop(queue);
        store.queue_changed.notify_one();
        BegunWrite::Queued(local.then_some(waiting))
    }

    fn dirty(
        &self,
        store: &Store,
        digest: Digest,
        block: &BlockRef<'_>,
        parent: Option<SequenceHash>,
        sums: Vec<u32>,
    ) -> Option<Dirty> {
        let identity = block.identity(parent)?;
        let demoting = self.host.begin_demote(block.layout, block.group, block.hash)?;
        let bytes = DirtyBytes::new(&self.peers.dirty, u64::from(demoting.length()));
        let section_bytes = block.section_bytes();
        let parent_tag = Digest::parent_tag(store.header.seed, &identity);
        Some(Dirty { digest, parent_tag, identity, section_bytes, sums, block: demoting, _bytes: bytes })
    }

    fn holder(&self, block: &BlockRef<'_>) -> Option<&Arc<Store>> {
        self.stores.iter().find(|store| {
            let digest = self.digest(store, block);
            let state = store.state.lock();
            !state.health.left && state.extents.get(digest).is_some()
        })
    }

    /// The volume on which a new block goes: by its name, among those that take writes, so that a prefix is read
    /// from all disks at once.
    fn place_for(&self, block: &BlockRef<'_>) -> Option<(&Arc<Store>, Digest)> {
        let weighed = self.stores.iter().map(|store| (store, self.digest(store, block)));
        weighed
            .filter(|(store, _)| store.state.lock().health.takes_writes())
            .max_by_key(|(store, digest)| digest.weight(&store.header.volume_id))
    }

    // ------------------------------------------------------------------------------- leaving

    /// Deletes blocks; what became of each. One that is nowhere counts as deleted while a volume's index may still have it: its
    /// deletion is safe from a crash after the next [`Self::sync`].
    pub fn delete(&self, layout: &Arc<RegisteredLayout>, group: u16, hashes: &[SequenceHash]) -> Vec<Delete> {
        // A pin on one volume keeps the block on all of them: it may have come to another one than the pin.
        let pinned = |hash: &SequenceHash| self.is_pinned(&BlockRef { layout, group, hash: *hash });
        let first = |hash| if pinned(hash) { Delete::Pinned } else { Delete::Absent };
        let mut outcome: Vec<Delete> = hashes.iter().map(first).collect();
        for store in &self.stores {
            let mut gone = Vec::new();
            let mut state = store.state.lock();
            for (hash, outcome) in hashes.iter().zip(&mut outcome).filter(|(_, outcome)| **outcome != Delete::Pinned) {
                let digest = self.digest(store, &BlockRef { layout, group, hash: *hash });
                if state.pins.holds(digest) {
                    *outcome = Delete::Pinned;
                    continue;
                }
                if let Some(pending) = state.pending.get_mut(digest) {
                    pending.cancelled = true;
                    *outcome = Delete::Deleted;
                }
                let deleted = state.delete_block(digest);
                if !deleted.known {
                    *outcome = Delete::Deleted;
                }
                gone.extend(deleted.frame);
            }
            drop(state);
            store.bury_later(gone);
            store.wake_committer();
        }
        outcome
    }

    /// Makes all that was done before (deletions, pins, writes) safe from a loss of power: the channels tell
    /// when, true where it is. False where a volume cannot promise it now: its index takes nothing, it takes no writes after a failed
    /// sync, or it has left. A channel that closes says the same.
    pub fn sync(&self) -> Vec<oneshot::Receiver<bool>> {
        let one = |store: &Arc<Store>| {
            let (send, receive) = oneshot::channel();
            let failures = store.state.lock().failed_syncs;
            let _ = store.commits.send(Commit::Sync(send, failures));
            receive
        };
        self.stores.iter().map(one).collect()
    }

    /// The same, of all volumes; true where all promise it.
    pub fn synced(&self) -> impl Future<Output = bool> + Send + 'static {
        let waiting = self.sync();
        async move {
            // Without a channel, and where one is dropped, the disks are closed.
            let mut safe = !waiting.is_empty();
            for synced in waiting {
                safe &= synced.await.unwrap_or(false);
            }
            safe
        }
    }

    /// Which blocks of a prefix are on disk, and were not left in doubt by a failed sync.
    pub fn is_safe(&self, layout: &Arc<RegisteredLayout>, group: u16, hashes: &[SequenceHash]) -> Vec<bool> {
        let mut safe = vec![false; hashes.len()];
        for store in &self.stores {
            let digests = Run { layout, group, hashes }.digests(store.header.seed);
            let state = store.state.lock();
            let is_safe = |digest| {
                let entry = state.extents.get(digest).filter(|_| !state.health.left);
                entry.is_some_and(|entry| !state.suspects.contains(&entry.extent.segment))
            };
            safe.iter_mut().zip(digests).for_each(|(safe, digest)| *safe |= is_safe(digest));
        }
        safe
    }

    // ------------------------------------------------------------------------------- the whole

    /// Refuses a bound that some volume cannot have: [`Self::set_limits`] would leave it unable to write.
    pub fn check_bytes(&self, bytes: u64) -> Result<(), BoundRefused> {
        for store in &self.stores {
            let segment_bytes = store.header.segment_bytes;
            let index_bytes = self.index_bytes.unwrap_or_else(|| store.index.bytes_max());
            bound::bound_of(&store.path, bytes, index_bytes, segment_bytes)?;
            let (pinned, usable) = {
                let state = store.state.lock();
                (state.extents.pages().1, u64::from(state.segments.usable_pages()))
            };
            // What is pinned keeps its place, and writing needs the rest.
            let least = pinned.div_ceil(usable) + crate::caps::NVME_SEGMENTS_MIN as u64 - 1;
            if Store::segments_allowed(bytes, index_bytes, segment_bytes) < least as usize {
                let bytes_min = bound::bytes_for(least, index_bytes, segment_bytes);
                let why = "while so much of it is pinned";
                return Err(BoundRefused { path: store.path.clone(), bytes, bytes_min, segment_bytes, why });
            }
        }
        Ok(())
    }

    /// Changes what may change while it runs. A smaller bound is reached in the background. A bound that [`Self::check_bytes`]
    /// refuses changes nothing.
    pub fn set_limits(&self, bytes: u64, dirty_bytes: u64) {
        self.dirty_max.store(dirty_bytes, Ordering::Release);
        if let Err(refused) = self.check_bytes(bytes) {
            tracing::error!(%refused, "nvme.bytes was not changed");
            return;
        }
        for store in &self.stores {
            store.bytes_max.store(bytes, Ordering::Release);
            let index_bytes = self.index_bytes.unwrap_or_else(|| store.index.bytes_max());
            let allowed = Store::segments_allowed(bytes, index_bytes, store.header.segment_bytes);
            {
                let mut state = store.state.lock();
                state.segments.set_allowed(allowed);
                // What the file system refused before, it is asked again.
                state.health.keeps_space = false;
            }
            store.wake_flusher();
        }
    }

    /// Writes what waits to be written, syncs, and lets go of the folders.
    pub fn close(&self) {
        for store in &self.stores {
            store.stopping.store(true, Ordering::Release);
            store.wake_flusher();
            // Its thread ends once it has done what it was given.
            store.checks.lock().take();
        }
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
        self.stores.iter().for_each(|store| store.let_go());
    }
}

/// Large blocks that were read and wait to be checked: each holds its slot, of which there are no more under way.
const CHECKS_MAX: usize = 32;

fn start(store: &Arc<Store>, commits: mpsc::Receiver<Commit>) -> std::io::Result<Vec<JoinHandle<()>>> {
    let named = |name: &str| std::thread::Builder::new().name(name.into());
    let mut threads = Vec::new();
    let own = Arc::clone(store);
    threads.push(named("kvstore-flush").spawn(move || own.flush_forever())?);
    let own = Arc::clone(store);
    threads.push(named("kvstore-commit").spawn(move || own.commit_forever(&commits))?);
    let (checks, to_check) = mpsc::sync_channel::<Check>(CHECKS_MAX);
    threads.push(named("kvstore-verify").spawn(move || to_check.into_iter().for_each(|check| check()))?);
    *store.checks.lock() = Some(checks);
    if store.state.lock().health.rebuilding > 0 {
        let own = Arc::clone(store);
        threads.push(named("kvstore-rebuild").spawn(move || own.rebuild(u32::MAX))?);
    }
    Ok(threads)
}
