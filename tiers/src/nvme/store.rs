//! One volume of the tier: its folder, what is known of it in memory, and how it is opened.
//!
//! A folder holds `lock`, `blocks` (the volume's file) and `index` (RocksDB). Whoever holds the lock file's
//! lock owns all three. What the index says is read once, at the start; from then on memory is asked, and
//! the index is only written.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use kvstore_transfer::volume::{self, Faults, FaultyVolume, IoEngine, Volume, VolumeFile};
use kvstore_transfer::{AlignedBytes, Lane};
use parking_lot::{Condvar, Mutex};

use super::bound::{BoundRefused, bound_of, make_anew};
use super::extents::Entry;
use super::format::{FormatError, IndexValue, PAGE, SEGMENTS_AT, SegmentClass, SegmentHeader, VolumeHeader, life_of};
use super::index::{Index, IndexBatch, IndexError, IndexItem};
use super::segments::Segments;
use super::state::{Counters, State, add};
use super::write::{Commit, WriteQueue};
use super::{NvmeOptions, Peers};
use crate::caps;
use crate::claim::{self, Claim, ClaimError};

/// A volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system says no.
    #[error("cannot {step} {path}: {cause}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// Another process owns it.
    #[error("{path} is in use by another kvstore (process {pid}); stop it, or choose another folder in nvme.paths")]
    Locked {
        /// The folder.
        path: PathBuf,
        /// The owner.
        pid: String,
    },
    /// Not a volume, or one of another version.
    #[error("{path}: {cause}; nothing was changed. Move the folder away to start with an empty one")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: FormatError,
    },
    /// The bound is too small for the segments of a volume that was made for a larger one, and some of its blocks are pinned.
    #[error(transparent)]
    Bound(#[from] BoundRefused),
    /// The index is of another version.
    #[error("{0}; nothing was changed. Move the folder away to start with an empty one")]
    Index(IndexError),
}

/// See the head of this file.
pub(super) struct Store {
    pub path: PathBuf,
    pub header: VolumeHeader,
    pub volume: Arc<dyn Volume>,
    pub index: Index,
    pub state: Mutex<State>,
    pub queue: Mutex<WriteQueue>,
    pub queue_changed: Condvar,
    pub commits: mpsc::Sender<Commit>,
    pub counters: Counters,
    pub stopping: AtomicBool,
    /// Reads and writes that failed in a row.
    pub device_errors: AtomicU32,
    pub peers: Arc<Peers>,
    pub bytes_max: AtomicU64,
    lock: Claim,
}

/// Bytes of a segment, on a volume of `bytes`: a power of two, 128 to 256 to a volume, within bounds.
pub(super) fn segment_bytes_of(bytes: u64) -> u64 {
    let part = bytes / caps::NVME_SEGMENTS_PER_VOLUME;
    (1 << part.max(1).ilog2()).clamp(caps::NVME_SEGMENT_BYTES_MIN, caps::NVME_SEGMENT_BYTES_MAX)
}

/// Bytes that the index may take, on a volume of `bytes`.
pub fn index_bytes_of(bytes: u64) -> u64 {
    (bytes / caps::NVME_INDEX_PARTS).max(caps::NVME_INDEX_BYTES_MIN)
}

impl Store {
    /// Takes the folder, reads the index, and is ready; what has to be found again is found later.
    pub fn open(
        path: &Path,
        options: &NvmeOptions,
        peers: Arc<Peers>,
    ) -> Result<(Arc<Self>, mpsc::Receiver<Commit>), OpenError> {
        let lock = take_lock(path)?;
        let file_path = path.join("blocks");
        let io = |step: &'static str, path: &Path| {
            let path = path.to_owned();
            move |cause| OpenError::Io { step, path, cause }
        };
        let file = VolumeFile::open(&file_path).map_err(io("open", &file_path))?;
        let length = file.bytes().map_err(io("read the length of", &file_path))?;
        let volume = volume::open(file, options.engine).map_err(io("drive", &file_path))?;
        let mut header = match length {
            0 => make_header(&*volume, options.bytes, peers.seed()).map_err(io("write", &file_path))?,
            _ => read_header(&*volume).map_err(|cause| OpenError::Format { path: file_path.clone(), cause })?,
        };
        let volume = match &options.faults {
            Some(faults) => Arc::new(FaultyVolume::new(volume, Arc::clone(faults))) as Arc<dyn Volume>,
            None => volume,
        };
        let index_path = path.join("index");
        let index_bytes = options.index_bytes.unwrap_or_else(|| index_bytes_of(options.bytes));
        let mut present = (length.saturating_sub(SEGMENTS_AT) / header.segment_bytes) as usize;
        let (index, lost) = open_index(&index_path, index_bytes, options.faults.clone(), present > 0)?;
        let refused = bound_of(path, options.bytes, index_bytes, header.segment_bytes);
        if let Err(refused) = refused {
            header = make_anew(&*volume, &index, &header, options.bytes, refused)?;
            present = 0;
        }
        let allowed = Self::segments_allowed(options.bytes, index_bytes, header.segment_bytes);
        let state = State::new(Segments::new(header.segment_bytes, 0, allowed.max(present)));
        // Not bounded by itself, but by what is put into it: writes at the device, blocks that were deleted, pins.
        let (commits, commits_to) = mpsc::channel();
        let store = Arc::new(Self {
            path: path.to_owned(),
            header,
            volume,
            index,
            state: Mutex::new(state),
            queue: Mutex::new(WriteQueue::default()),
            queue_changed: Condvar::new(),
            commits,
            counters: Counters::default(),
            stopping: AtomicBool::new(false),
            device_errors: AtomicU32::new(0),
            peers,
            bytes_max: AtomicU64::new(options.bytes),
            lock,
        });
        {
            let mut state = store.state.lock();
            state.segments.set_allowed(allowed);
            state.segments.start_lives_after(first_life(&header));
        }
        let lost = lost || !store.load(options);
        store.state.lock().extents.follow(Arc::clone(&store.peers.changes));
        if lost && present > 0 {
            store.prepare_rebuild(present, options);
        }
        store.find_unknown(present);
        Ok((store, commits_to))
    }

    /// Segments that fit a bound beside the index.
    pub fn segments_allowed(bytes: u64, index_bytes: u64, segment_bytes: u64) -> usize {
        (bytes.saturating_sub(index_bytes + SEGMENTS_AT) / segment_bytes) as usize
    }

    /// Where a segment starts in the file.
    pub fn segment_at(&self, segment: u32) -> u64 {
        SEGMENTS_AT + u64::from(segment) * self.header.segment_bytes
    }

    /// Where an extent starts in the file.
    pub fn offset_of(&self, extent: &super::format::Extent) -> u64 {
        self.segment_at(extent.segment) + u64::from(extent.page) * PAGE
    }

    /// Reads the index; false where it turned out damaged. What could be read before is kept.
    fn load(&self, options: &NvmeOptions) -> bool {
        let mut state = self.state.lock();
        let mut stale = IndexBatch::default();
        let mut stale_blocks = 0;
        let State { extents, segments, pins, numbers, suspects, buried, unsynced, .. } = &mut *state;
        let mut result = self.index.load(b's', |item| {
            if let IndexItem::Segment(segment, life, class) = item {
                segments.restore(segment, life, class, true);
                // The life before this one may have ended between its writes and their sync, and the index's log has them.
                unsynced.insert(segment);
            }
        });
        result = result.and(self.index.load(b'p', |item| {
            if let IndexItem::Pin(id, record) = item {
                pins.restore(id, record, &options.boot_id, options.now);
            }
        }));
        result = result.and(self.index.load(b'n', |item| {
            if let IndexItem::Namespace(number, digest) = item {
                numbers.restore(number, digest);
                extents.name_namespace(number, &digest);
            }
        }));
        result = result.and(self.index.load(b't', |item| {
            if let IndexItem::Suspect(segment) = item {
                suspects.insert(segment);
            }
        }));
        result = result.and(self.index.load(b'd', |item| {
            if let IndexItem::Buried(digest) = item {
                buried.insert(digest);
            }
        }));
        result = result.and(self.index.load(b'b', |item| {
            let IndexItem::Block(digest, value) = item else { return };
            // Fenced off: the segment has begun another life since.
            let current = segments.life(value.extent.segment) == Some(life_of(value.generation));
            if !current || !segments.holds(&value.extent) {
                stale.delete_block(digest);
                stale_blocks += 1;
                return;
            }
            let pinned = pins.holds(digest);
            let IndexValue { extent, parent_tag, namespace, name, .. } = value;
            extents.insert(Entry { digest, parent_tag, extent, hits: 0, pinned, namespace, used: 0, name });
        }));
        drop(state);
        add(&self.counters.stale_blocks, stale_blocks);
        if let Err(error) = result {
            tracing::error!(%error, "the index is damaged; the blocks that it still names are served, and a scan finds the others");
            return false;
        }
        if !stale.is_empty()
            && let Err(error) = self.index.write(stale, false)
        {
            tracing::warn!(%error, "stale entries cannot be removed from the index");
        }
        true
    }

    /// The index is lost: starts it anew and marks what has to be scanned. What could be read of it is written again.
    fn prepare_rebuild(&self, present: usize, options: &NvmeOptions) {
        {
            let mut state = self.state.lock();
            state.numbers.save_again();
            for (id, record) in state.pins.records(&options.boot_id, options.now) {
                state.owed.pin(id, record);
            }
            let State { owed, suspects, buried, .. } = &mut *state;
            suspects.iter().for_each(|segment| owed.suspect(*segment));
            buried.iter().for_each(|digest| owed.bury(*digest));
        }
        if let Err(error) = self.index.recreate() {
            self.close_index(&error);
        }
        for segment in 0..present as u32 {
            self.mark_unknown(segment);
        }
    }

    /// Segments of which the index knows nothing, and which hold something all the same: it was being built again when an earlier
    /// daemon ended. They are to be scanned.
    fn find_unknown(&self, present: usize) {
        for segment in 0..present as u32 {
            let absent = self.state.lock().segments.is_absent(segment);
            if absent && self.first_page(segment).is_none_or(|page| page.iter().any(|byte| *byte != 0)) {
                self.mark_unknown(segment);
            }
        }
        let mut state = self.state.lock();
        state.health.rebuilding = state.segments.unknown().len();
        if state.health.rebuilding == 0 {
            let State { owed, buried, .. } = &mut *state;
            owed.unbury(buried.drain());
        }
    }

    fn first_page(&self, segment: u32) -> Option<AlignedBytes> {
        volume::read_now(&*self.volume, Lane::Prefetch, self.segment_at(segment), PAGE as usize).ok()
    }

    fn mark_unknown(&self, segment: u32) {
        let header = self.first_page(segment).and_then(|page| SegmentHeader::decode(&page).ok());
        let ours = header.filter(|header| header.volume_id == self.header.volume_id && header.number == segment);
        // Where its life is unknown, the frames in it say: see rebuild::scan.
        let (life, class) = ours.map_or((0, SegmentClass::Ordinary), |header| (header.life, header.class));
        self.state.lock().segments.restore(segment, life, class, false);
    }

    /// The device failed for good, as far as this process can tell.
    pub fn leave(&self, reason: String) {
        let mut state = self.state.lock();
        if !state.health.left {
            tracing::error!(path = %self.path.display(), reason, "the volume is out of use; its blocks are misses until a restart");
            state.health.left = true;
            state.health.reason = Some(reason);
            self.peers.changes.reset();
        }
    }

    /// Lets go of the folder: somebody else may open it now, whoever still holds this value.
    pub fn let_go(&self) {
        self.give_back_tails();
        {
            let mut state = self.state.lock();
            state.health.left = true;
            state.health.reason = Some("closed".into());
        }
        self.index.close();
        if let Err(error) = self.lock.let_go() {
            tracing::warn!(%error, path = %self.path.display(), "the folder cannot be unlocked");
        }
    }

    /// What is left of the open segments is not written any more in this life: its disk space is given back.
    fn give_back_tails(&self) {
        let mut state = self.state.lock();
        if !state.health.takes_writes() {
            return;
        }
        let tails = state.segments.tails();
        state.segments.seal_all();
        drop(state);
        for (segment, page) in tails {
            let used = u64::from(page) * PAGE;
            let punched = self.volume.file().punch(self.segment_at(segment) + used, self.header.segment_bytes - used);
            if let Err(error) = punched {
                tracing::debug!(%error, "the unused end of a segment could not be given back to the file system");
            }
        }
    }

    /// True while the daemon goes down.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Bytes of disk that the folder takes.
    pub fn disk_bytes(&self) -> u64 {
        self.volume.file().allocated().unwrap_or(0) + self.index.disk_bytes()
    }
}

/// Lives of a volume begin at a secret place: 38 bits of its seed, which leaves as many lives again.
fn first_life(header: &VolumeHeader) -> u64 {
    header.seed >> 26
}

fn take_lock(path: &Path) -> Result<Claim, OpenError> {
    let refused = |error| match error {
        ClaimError::Taken { path, pid } => OpenError::Locked { path, pid: pid.unwrap_or_default() },
        ClaimError::Io { step, path, cause } => OpenError::Io { step, path, cause },
        other => OpenError::Io { step: "take", path: path.to_owned(), cause: std::io::Error::other(other) },
    };
    claim::own_folder(path).map_err(refused)?;
    Claim::take(&path.join("lock"), path).map_err(refused)
}

pub(super) fn make_header(volume: &dyn Volume, bytes: u64, seed: Option<u64>) -> std::io::Result<VolumeHeader> {
    let mut random = [0u8; 24];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let [volume_id @ .., a, b, c, d, e, f, g, h] = random;
    let header = VolumeHeader {
        volume_id,
        segment_bytes: segment_bytes_of(bytes),
        seed: seed.unwrap_or(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
    };
    volume.file().allocate(0, SEGMENTS_AT)?;
    let page = header.encode();
    volume::write_now(volume, 0, AlignedBytes::of(&[&page, &page]))?;
    volume::sync_now(volume)?;
    Ok(header)
}

fn read_header(volume: &dyn Volume) -> Result<VolumeHeader, FormatError> {
    // Two copies: one torn or flipped page must not cost a volume.
    let copy = |at: u64| {
        let page = volume::read_now(volume, Lane::Demand, at, PAGE as usize);
        page.map_err(|_| FormatError::Checksum("the volume header")).and_then(|page| VolumeHeader::decode(&page))
    };
    copy(0).or_else(|error| copy(PAGE).map_err(|_| error))
}

/// Opens the index; a damaged one is removed. True: what it knew is lost.
fn open_index(
    path: &Path,
    bytes: u64,
    faults: Option<Arc<Faults>>,
    expected: bool,
) -> Result<(Index, bool), OpenError> {
    let missing = expected && !path.exists();
    match Index::open(path, bytes, faults.clone()) {
        Ok(index) => Ok((index, missing)),
        Err(error @ IndexError::Version { .. }) => Err(OpenError::Index(error)),
        Err(error) => {
            tracing::error!(%error, "the index cannot be opened; it is built again from the frames");
            Index::destroy(path).map_err(|cause| OpenError::Io { step: "remove", path: path.to_owned(), cause })?;
            Ok((Index::open(path, bytes, faults).map_err(OpenError::Index)?, true))
        }
    }
}

/// What the segments of a volume may take, for a test or a message: see [`Store::segments_allowed`].
pub fn usable_bytes(bytes: u64, index_bytes: Option<u64>) -> u64 {
    let index_bytes = index_bytes.unwrap_or_else(|| index_bytes_of(bytes));
    let segment_bytes = segment_bytes_of(bytes);
    Store::segments_allowed(bytes, index_bytes, segment_bytes) as u64 * segment_bytes
}

/// The engine of a volume, by its name in the configuration.
pub fn engine_of(name: &str) -> Option<IoEngine> {
    match name {
        "auto" => Some(IoEngine::Auto),
        "io_uring" => Some(IoEngine::Uring),
        "pread" => Some(IoEngine::Syscalls),
        _ => None,
    }
}
