//! The index of one volume: RocksDB, small and bounded. Read whole at the start, only written after.
//!
//! Keys start with what they name: `b` and a digest (a block's place), `s` and a segment's number (its
//! life), `p` and an id (a pin), `n` and a number (a namespace's digest), `t` and a segment's number (a failed sync was to cover
//! it), `d` and a digest (deleted while a scan goes on), `g` and a place in a ring (the number of a batch: see `mark.rs`). Nothing
//! here is trusted beyond its name: each frame is checked when read.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvstore_rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, Direction, ErrorKind, FlushOptions, IteratorMode, LogLevel,
    Options, ReadOptions, WriteOptions,
};
use kvstore_transfer::volume::{Faults, Operation};
use parking_lot::{Mutex, RwLock};

use super::batch::{IndexBatch, IndexItem};
use super::format::VOLUME_VERSION;
use super::mark::{self, Mark, Marked};
use super::reserve::Reserve;
use crate::caps;

/// The index could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// What RocksDB said.
    #[error("the index {path} failed: {cause}")]
    Db {
        /// Its folder.
        path: PathBuf,
        /// Why.
        cause: kvstore_rocksdb::Error,
    },
    /// Made by another version.
    #[error("the index {path} has version {version}, which is unknown: this build reads version {VOLUME_VERSION}")]
    Version {
        /// Its folder.
        path: PathBuf,
        /// Which.
        version: u16,
    },
    /// It can be read, and something of it is missing.
    #[error("the index {path} is damaged: {what}")]
    Damaged {
        /// Its folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A file beside it could not be opened or written.
    #[error("{path}: {cause}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A failed write closed it, and it is not open again yet.
    #[error("the index is closed after an error, and is being opened again")]
    Closed,
    /// A test's fault.
    #[error("an injected fault")]
    Injected,
}

impl IndexError {
    /// True where the machine is at fault, and the index may be whole: a full file system, a device or a system that says no.
    /// Nothing is given up for such an error.
    pub fn is_environment(&self) -> bool {
        match self {
            Self::Db { cause, .. } => match cause.kind() {
                // A file that is not there is damage; RocksDB has no kind of its own for it.
                ErrorKind::IOError => !cause.as_ref().contains("No such file"),
                ErrorKind::Busy
                | ErrorKind::TimedOut
                | ErrorKind::TryAgain
                | ErrorKind::Aborted
                | ErrorKind::Incomplete
                | ErrorKind::ShutdownInProgress => true,
                _ => false,
            },
            Self::File { .. } | Self::Closed | Self::Injected => true,
            Self::Damaged { .. } | Self::Version { .. } => false,
        }
    }

    /// True where the file system is full.
    pub fn is_no_space(&self) -> bool {
        match self {
            // RocksDB has no other word for the system's error.
            Self::Db { cause, .. } => ["No space left", "Disk quota"].iter().any(|says| cause.as_ref().contains(says)),
            Self::File { cause, .. } => super::write::is_no_space(cause),
            _ => false,
        }
    }
}

/// How an index was found.
#[derive(Debug)]
pub enum IndexFound {
    /// Whole.
    Whole,
    /// Something of it is missing: it is read as far as that goes, and built again.
    Damaged(IndexError),
    /// It can be read, and takes no writes yet.
    Closed(IndexError),
}

/// See the head of this file.
pub struct Index {
    path: PathBuf,
    bytes: u64,
    cache: Cache,
    db: RwLock<Option<DB>>,
    /// One writer at a time, so that a reopening meets none.
    writing: Mutex<Writing>,
    /// What is there is damaged, and is thrown away when it is opened next.
    damaged: AtomicBool,
    reserve: Reserve,
    faults: Option<Arc<Faults>>,
}

/// What a writer knows of the batches before.
#[derive(Default)]
struct Writing {
    /// The number of the newest batch that was taken.
    newest: u64,
    /// Where the number is noted of the last batch that was synced.
    mark: Option<Mark>,
}

impl Index {
    /// Opens the index in the volume's folder, or makes an empty one, to take `bytes` of disk at most. How it was found; with
    /// `is_old`, an empty one is damaged. Where it cannot be written just now, it is opened to be read.
    pub fn open(
        folder: &Path,
        bytes: u64,
        is_old: bool,
        faults: Option<Arc<Faults>>,
    ) -> Result<(Self, IndexFound), IndexError> {
        let index = Self {
            path: folder.join("index"),
            bytes,
            cache: Cache::new_lru_cache(caps::NVME_INDEX_CACHE_BYTES),
            db: RwLock::new(None),
            writing: Mutex::new(Writing::default()),
            damaged: AtomicBool::new(false),
            reserve: Reserve::new(folder.join("reserve"), buffer_bytes(bytes) * caps::NVME_INDEX_RESERVE_BUFFERS),
            faults,
        };
        let found = match index.open_again(is_old) {
            Ok(None) => IndexFound::Whole,
            Ok(Some(damage)) => IndexFound::Damaged(damage),
            Err(error) if error.is_environment() => match index.open_to_read(is_old) {
                Ok(None) => IndexFound::Closed(error),
                Ok(Some(damage)) => IndexFound::Damaged(damage),
                Err(other) if other.is_environment() => return Err(error),
                Err(damage) => IndexFound::Damaged(damage),
            },
            Err(version @ IndexError::Version { .. }) => return Err(version),
            Err(damage) => IndexFound::Damaged(damage),
        };
        Ok((index, found))
    }

    fn options(&self) -> Options {
        // Shares of the reservation: two write buffers and their log, and levels with room to merge.
        let buffer = buffer_bytes(self.bytes) as usize;
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&self.cache);
        table.set_cache_index_and_filter_blocks(true);
        table.set_block_size(16 << 10);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_block_based_table_factory(&table);
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(buffer);
        options.set_max_write_buffer_number(2);
        options.set_max_total_wal_size(buffer as u64 * 2);
        options.set_target_file_size_base((self.bytes / 32).clamp(256 << 10, 64 << 20));
        options.set_max_bytes_for_level_base((self.bytes / 8).max(1 << 20));
        options.set_level_compaction_dynamic_level_bytes(true);
        options.set_max_background_jobs(2);
        options.set_max_open_files(caps::NVME_INDEX_FILES_MAX);
        options.set_keep_log_file_num(1);
        options.set_max_log_file_size(256 << 10);
        options.set_log_level(LogLevel::Error);
        options.set_max_manifest_file_size(1 << 20);
        // By default 4 MiB ahead, which would take all that the reserve gives, and fail.
        options.set_manifest_preallocation_size(64 << 10);
        options.set_skip_stats_update_on_db_open(true);
        options.set_stats_dump_period_sec(0);
        options
    }

    /// Closes the database, if it is open, and opens it again: what an error in the background asks for.
    pub fn reopen(&self) -> Result<(), IndexError> {
        match self.open_again(false)? {
            None => Ok(()),
            Some(damage) => {
                *self.db.write() = None;
                Err(damage)
            }
        }
    }

    /// The same. It is open also where damage is returned: what is left can be read.
    fn open_again(&self, is_old: bool) -> Result<Option<IndexError>, IndexError> {
        let mut writing = self.writing.lock();
        *self.db.write() = None;
        if self.damaged.load(Ordering::Acquire) {
            self.throw_away(&mut writing)?;
        }
        let db = match DB::open(&self.options(), &self.path).map_err(|error| self.error(error)) {
            // What the reserve is for.
            Err(error) if error.is_no_space() && self.reserve.give_up() => {
                tracing::warn!(path = %self.path.display(), "the file system is full: the index has been given its reserve");
                DB::open(&self.options(), &self.path).map_err(|error| self.error(error))?
            }
            opened => opened?,
        };
        let found = self.check(&db, &mut writing, is_old)?;
        if found.is_none() && db.get(b"m").map_err(|error| self.error(error))?.is_none() {
            db.put(b"m", VOLUME_VERSION.to_le_bytes()).map_err(|error| self.error(error))?;
        }
        *self.db.write() = Some(db);
        if found.is_none() {
            self.take_reserve();
        }
        Ok(found)
    }

    /// Opens it without a change to any file.
    fn open_to_read(&self, is_old: bool) -> Result<Option<IndexError>, IndexError> {
        let mut writing = self.writing.lock();
        let db = DB::open_for_read_only(&self.options(), &self.path, false).map_err(|error| self.error(error))?;
        let found = self.check(&db, &mut writing, is_old)?;
        *self.db.write() = Some(db);
        Ok(found)
    }

    /// Removes what is damaged, and then what its mark says. A start in between finds an index that is too short, or none.
    fn throw_away(&self, writing: &mut Writing) -> Result<(), IndexError> {
        if let Err(error) = Self::destroy(&self.path) {
            tracing::error!(%error, path = %self.path.display(), "the damaged index cannot be removed");
            return Err(IndexError::Closed);
        }
        let mark = self.mark_path();
        let (file, _) = Mark::open(&mark).map_err(|cause| IndexError::File { path: mark.clone(), cause })?;
        file.set_synced(0).map_err(|cause| IndexError::File { path: mark, cause })?;
        *writing = Writing { newest: 0, mark: Some(file) };
        self.damaged.store(false, Ordering::Release);
        Ok(())
    }

    fn mark_path(&self) -> PathBuf {
        self.path.with_file_name("mark")
    }

    /// Whether all is there that was there before: see `mark.rs`. What is missing.
    fn check(&self, db: &DB, writing: &mut Writing, is_old: bool) -> Result<Option<IndexError>, IndexError> {
        let damaged = |what: String| IndexError::Damaged { path: self.path.clone(), what };
        let version = db.get(b"m").map_err(|error| self.error(error))?;
        if let Some(bytes) = &version {
            let version = <[u8; 2]>::try_from(bytes.as_slice()).map_or(u16::MAX, u16::from_le_bytes);
            if version != VOLUME_VERSION {
                return Err(IndexError::Version { path: self.path.clone(), version });
            }
        }
        let mark_path = self.mark_path();
        let in_file = |cause| IndexError::File { path: mark_path.clone(), cause };
        let mut ring = Vec::new();
        self.load_of(db, b'g', &mut |item| {
            if let IndexItem::Link(place, number) = item {
                ring.push((place, number));
            }
        })?;
        let (mark, marked) = Mark::open(&mark_path).map_err(in_file)?;
        let newest = match mark::newest(&ring, marked) {
            Ok(newest) if newest < writing.newest => {
                return Ok(Some(damaged(format!("it had taken {} changes, and has {newest}", writing.newest))));
            }
            Ok(newest) => newest,
            Err(what) => return Ok(Some(damaged(what))),
        };
        if version.is_none() && is_old {
            return Ok(Some(damaged("it is empty".into())));
        }
        if marked == Marked::Nothing {
            // Before the first batch with a number.
            mark.set_synced(newest).map_err(in_file)?;
        }
        *writing = Writing { newest, mark: Some(mark) };
        Ok(None)
    }

    /// Closes the database for good.
    pub fn close(&self) {
        let _writing = self.writing.lock();
        *self.db.write() = None;
    }

    /// Removes the index of `path` altogether.
    pub fn destroy(path: &Path) -> std::io::Result<()> {
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Throws everything away and starts empty; where that fails, the next opening does.
    pub fn recreate(&self) -> Result<(), IndexError> {
        self.damaged.store(true, Ordering::Release);
        self.reopen()
    }

    fn error(&self, cause: kvstore_rocksdb::Error) -> IndexError {
        IndexError::Db { path: self.path.clone(), cause }
    }

    /// Tells `each` of all whose key starts with `kind`. An error comes after all that could be read.
    pub fn load(&self, kind: u8, mut each: impl FnMut(IndexItem<'_>)) -> Result<(), IndexError> {
        let db = self.db.read();
        self.load_of(db.as_ref().ok_or(IndexError::Closed)?, kind, &mut each)
    }

    fn load_of(&self, db: &DB, kind: u8, each: &mut dyn FnMut(IndexItem<'_>)) -> Result<(), IndexError> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(2 << 20);
        options.set_iterate_upper_bound([kind + 1]);
        for item in db.iterator_opt(IteratorMode::From(&[kind], Direction::Forward), options) {
            let (key, value) = item.map_err(|error| self.error(error))?;
            if let Some(item) = IndexItem::decode(&key, &value) {
                each(item);
            }
        }
        Ok(())
    }

    /// Makes changes; with `sync`, they and all before them are safe from a loss of power.
    pub fn write(&self, mut batch: IndexBatch, sync: bool) -> Result<(), IndexError> {
        let mut writing = self.writing.lock();
        if self.faults.as_ref().is_some_and(|faults| faults.next(Operation::Index).is_some()) {
            return Err(IndexError::Injected);
        }
        let db = self.db.read();
        let db = db.as_ref().ok_or(IndexError::Closed)?;
        let number = writing.newest + 1;
        batch.put_link(mark::place_of(number), number);
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        db.write_opt(batch.into_inner(), &options).map_err(|error| self.error(error))?;
        writing.newest = number;
        if sync && let Some(Err(error)) = writing.mark.as_ref().map(|mark| mark.set(number)) {
            // The log has it all the same; only a loss of its end would go unnoticed.
            tracing::warn!(%error, path = %self.path.display(), "the mark of the index cannot be written");
        }
        if number.is_multiple_of(caps::NVME_INDEX_RING / 4) {
            let mut flush = FlushOptions::default();
            flush.set_wait(false);
            db.flush_opt(&flush).map_err(|error| self.error(error))?;
        }
        Ok(())
    }

    /// True where the file system was found full, and the index lives on its reserve.
    pub fn is_on_reserve(&self) -> bool {
        self.reserve.is_given_up()
    }

    /// Bytes that its reserve has not taken again.
    pub fn reserve_lacks(&self) -> u64 {
        if self.reserve.is_given_up() { self.reserve.bytes() } else { 0 }
    }

    /// Takes the disk space of the reserve, where it was given up and there is room again.
    pub fn take_reserve(&self) {
        if let Err(error) = self.reserve.take() {
            tracing::debug!(%error, path = %self.path.display(), "the index has no reserve for a full file system");
        }
    }

    /// Bytes of disk that it takes.
    pub fn disk_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        let files: u64 =
            entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum();
        files + self.reserve.disk_bytes()
    }

    /// The bound on that.
    pub fn bytes_max(&self) -> u64 {
        self.bytes
    }

    /// Merges everything: takes seconds.
    pub fn compact(&self) {
        if let Some(db) = self.db.read().as_ref() {
            db.compact_range(None::<&[u8]>, None::<&[u8]>);
        }
    }
}

/// Bytes of a write buffer, in an index of `bytes`: two of them and their log have a quarter of it, levels with room to merge the
/// rest.
fn buffer_bytes(bytes: u64) -> u64 {
    (bytes / 16).clamp(64 << 10, 8 << 20)
}
