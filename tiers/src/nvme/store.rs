//! One volume of the tier: its folder, what is known of it in memory, and how it is opened.
//!
//! A folder holds `lock`, `blocks` (the volume's file), `index` (RocksDB; for a while also its successor, see `renew.rs`), and its
//! `mark` and `reserve`. Whoever holds the lock file's lock owns them all. What the index says is read once, at the start (`load.rs`); from then on memory is
//! asked, and the index is only written.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use kvstore_transfer::volume::{self, FaultyVolume, IoEngine, Volume, VolumeFile};
use kvstore_transfer::{AlignedBytes, Lane};
use parking_lot::{Condvar, Mutex};

use super::bound::{BoundRefused, bound_of, make_anew};
use super::format::{FormatError, PAGE, SEGMENTS_AT, VolumeHeader};
use super::index::{Index, IndexError, IndexFound};
use super::read::Check;
use super::segments::Segments;
use super::state::{Counters, State};
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
    /// The index cannot be read, for a reason that lies outside it. The volume is out of use, and the others are not.
    #[error(
        "{0}; nothing was changed. A restart tries again. If this stays, remove the folder `index` there: it is built again from the blocks, and pins are lost"
    )]
    IndexUnread(IndexError),
}

impl OpenError {
    pub(super) fn index(error: IndexError) -> Self {
        if error.is_environment() { Self::IndexUnread(error) } else { Self::Index(error) }
    }
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
    /// To the thread that checks large blocks, while there is one.
    pub checks: Mutex<Option<mpsc::SyncSender<Check>>>,
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
        let index_bytes = options.index_bytes.unwrap_or_else(|| index_bytes_of(options.bytes));
        let mut present = (length.saturating_sub(SEGMENTS_AT) / header.segment_bytes) as usize;
        let (index, mut found) =
            Index::open(path, index_bytes, present > 0, options.faults.clone()).map_err(OpenError::index)?;
        if let Err(refused) = bound_of(path, options.bytes, index_bytes, header.segment_bytes) {
            found = match make_anew(&*volume, &index, found, &header, options, refused) {
                Ok(made) => {
                    (header, present) = (made, 0);
                    IndexFound::Whole
                }
                Err(OpenError::IndexUnread(error)) => IndexFound::Unread(error),
                Err(other) => return Err(other),
            };
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
            checks: Mutex::new(None),
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
        store.take_index(found, present, options);
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
