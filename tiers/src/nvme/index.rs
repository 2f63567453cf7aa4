//! The index of one volume: RocksDB, small and bounded. Read whole at the start, only written after.
//!
//! Keys start with what they name: `b` and a digest (a block's place), `s` and a segment's number (its
//! life), `p` and an id (a pin), `n` and a number (a namespace's digest), `t` and a segment's number (a failed sync was to cover
//! it), `d` and a digest (deleted while a scan goes on), `g` and a place in a ring (the number of a batch: see `mark.rs`). Nothing
//! here is trusted beyond its name: each frame is checked when read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

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
use super::ring::{Due, Ring, place_of};
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
    /// The machine is at fault, and it cannot even be read.
    Unread(IndexError),
}

/// What a check of an opened index found.
enum Checked {
    /// All is there.
    Whole {
        /// The number of its newest batch.
        newest: u64,
        is_marked: bool,
        has_version: bool,
    },
    /// Something is missing.
    Damaged(IndexError),
}

/// See the head of this file.
pub struct Index {
    pub(super) path: PathBuf,
    bytes: u64,
    cache: Cache,
    db: RwLock<Option<DB>>,
    /// One writer at a time, so that a reopening meets none.
    writing: Mutex<Writing>,
    reserve: Reserve,
    faults: Option<Arc<Faults>>,
}

/// What a writer knows of the batches before.
#[derive(Default)]
pub(super) struct Writing {
    /// Their numbers.
    pub ring: Ring,
    /// Where the number is noted of the last batch that was synced.
    pub mark: Option<Mark>,
    /// What is there is damaged: at the next opening a new index takes its place, which begins with this.
    pub anew: Option<IndexBatch>,
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
            reserve: Reserve::new(folder.join("reserve"), buffer_bytes(bytes) * caps::NVME_INDEX_RESERVE_BUFFERS),
            faults,
        };
        let is_file = std::fs::metadata(&index.path).is_ok_and(|there| !there.is_dir());
        let found = match index.open_again(is_old) {
            _ if is_file => {
                IndexFound::Damaged(IndexError::Damaged { path: index.path.clone(), what: "it is no folder".into() })
            }
            Ok(None) => IndexFound::Whole,
            Ok(Some(damage)) => IndexFound::Damaged(damage),
            Err(error) if error.is_environment() => match index.open_to_read(is_old) {
                Ok(None) => IndexFound::Closed(error),
                Ok(Some(damage)) => IndexFound::Damaged(damage),
                Err(other) if other.is_environment() => IndexFound::Unread(other),
                Err(version @ IndexError::Version { .. }) => return Err(version),
                Err(damage) => IndexFound::Damaged(damage),
            },
            Err(version @ IndexError::Version { .. }) => return Err(version),
            Err(damage) => IndexFound::Damaged(damage),
        };
        Ok((index, found))
    }

    fn options(&self) -> Options {
        // Shares of the reservation: two write buffers and their log, the reserve, and levels with room to merge.
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
        let found = match self.open_to_write(&mut writing, is_old) {
            // What the reserve is for.
            Err(error) if error.is_no_space() && self.reserve.give_up() => {
                tracing::warn!(path = %self.path.display(), "the file system is full: the index has been given its reserve");
                self.open_to_write(&mut writing, is_old)?
            }
            opened => opened?,
        };
        // While it lives on its reserve, that is taken only where blocks would have room, too: see `Store::retry_space`.
        if found.is_none() && !self.reserve.is_given_up() {
            self.take_reserve();
        }
        Ok(found)
    }

    fn open_to_write(&self, writing: &mut Writing, is_old: bool) -> Result<Option<IndexError>, IndexError> {
        self.renew(writing)?;
        let db = self.open_db(&self.path)?;
        let found = match self.check(&db, writing.ring.newest(), is_old)? {
            Checked::Damaged(damage) => Some(damage),
            Checked::Whole { newest, is_marked, has_version } => {
                let path = self.mark_path();
                let in_file = |cause| IndexError::File { path: path.clone(), cause };
                let mark = Mark::create(&path).map_err(in_file)?;
                if !is_marked {
                    // Before the first batch with a number.
                    mark.set_synced(newest).map_err(in_file)?;
                }
                if !has_version {
                    db.put(b"m", VOLUME_VERSION.to_le_bytes()).map_err(|error| self.error(error))?;
                }
                // What its log had is in a table now.
                (writing.ring, writing.mark) = (Ring::opened(newest), Some(mark));
                None
            }
        };
        *self.db.write() = Some(db);
        Ok(found)
    }

    /// Opens the database in `path`, or makes it. The folder is made here: the binding's own error for that does not tell a full file
    /// system from damage.
    pub(super) fn open_db(&self, path: &Path) -> Result<DB, IndexError> {
        std::fs::create_dir_all(path).map_err(|cause| IndexError::File { path: path.to_owned(), cause })?;
        DB::open(&self.options(), path).map_err(|error| self.error(error))
    }

    /// Opens it without a change to any file: none is made, and nothing is written.
    fn open_to_read(&self, is_old: bool) -> Result<Option<IndexError>, IndexError> {
        self.check_not_renewing()?;
        let mut writing = self.writing.lock();
        let db = DB::open_for_read_only(&self.options(), &self.path, false).map_err(|error| self.error(error))?;
        let found = match self.check(&db, writing.ring.newest(), is_old)? {
            Checked::Damaged(damage) => Some(damage),
            Checked::Whole { newest, .. } => {
                writing.ring = Ring::opened(newest);
                None
            }
        };
        *self.db.write() = Some(db);
        Ok(found)
    }

    pub(super) fn mark_path(&self) -> PathBuf {
        self.path.with_file_name("mark")
    }

    /// Whether all is there that was there before, up to the batch `newest_known`: see `mark.rs`. Changes nothing.
    fn check(&self, db: &DB, newest_known: u64, is_old: bool) -> Result<Checked, IndexError> {
        let damaged = |what: String| Ok(Checked::Damaged(IndexError::Damaged { path: self.path.clone(), what }));
        let version = db.get(b"m").map_err(|error| self.error(error))?;
        if let Some(bytes) = &version {
            let version = <[u8; 2]>::try_from(bytes.as_slice()).map_or(u16::MAX, u16::from_le_bytes);
            if version != VOLUME_VERSION {
                return Err(IndexError::Version { path: self.path.clone(), version });
            }
        }
        let mut ring = Vec::new();
        self.load_of(db, b'g', &mut |item| {
            if let IndexItem::Link(place, number) = item {
                ring.push((place, number));
            }
        })?;
        let mark_path = self.mark_path();
        let marked = Mark::read(&mark_path).map_err(|cause| IndexError::File { path: mark_path, cause })?;
        match mark::newest(&ring, marked) {
            Ok(newest) if newest < newest_known => {
                damaged(format!("it had taken {newest_known} changes, and has {newest}"))
            }
            Ok(_) if version.is_none() && is_old => damaged("it is empty".into()),
            Ok(newest) => {
                let (is_marked, has_version) = (marked != Marked::Nothing, version.is_some());
                Ok(Checked::Whole { newest, is_marked, has_version })
            }
            Err(what) => damaged(what),
        }
    }

    /// Closes the database for good.
    pub fn close(&self) {
        let _writing = self.writing.lock();
        *self.db.write() = None;
    }

    /// Has an empty index with these records take the place of what is there; where that fails, the next opening does it.
    pub fn recreate(&self, kept: IndexBatch) -> Result<(), IndexError> {
        self.writing.lock().anew = Some(kept);
        self.reopen()
    }

    pub(super) fn error(&self, cause: kvstore_rocksdb::Error) -> IndexError {
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
        self.keep_ring(db, &mut writing.ring)?;
        let number = writing.ring.newest() + 1;
        batch.put_link(place_of(number), number);
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        db.write_opt(batch.into_inner(), &options).map_err(|error| self.error(error))?;
        writing.ring.taken();
        if sync && let Some(Err(error)) = writing.mark.as_ref().map(|mark| mark.set(number)) {
            // The log has it all the same; only a loss of its end would go unnoticed.
            tracing::warn!(%error, path = %self.path.display(), "the mark of the index cannot be written");
        }
        Ok(())
    }

    /// Has the write buffer go to a table in time, before the next batch: that batch is what an error is about.
    fn keep_ring(&self, db: &DB, ring: &mut Ring) -> Result<(), IndexError> {
        // A second buffer on its way would hold up whoever sends it.
        let is_sending = || !matches!(db.property_int_value("rocksdb.num-immutable-mem-table"), Ok(Some(0)));
        let mut options = FlushOptions::default();
        match ring.due(is_sending) {
            Due::Nothing => {}
            Due::Send => {
                options.set_wait(false);
                match db.flush_opt(&options) {
                    Ok(()) => ring.sent(),
                    Err(error) => {
                        tracing::debug!(%error, path = %self.path.display(), "the index's write buffer is sent to a table later");
                    }
                }
            }
            Due::Wait => {
                options.set_wait(true);
                db.flush_opt(&options).map_err(|error| self.error(error))?;
                ring.stored();
            }
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

    /// Takes the disk space of the reserve, where it has it not; false where there is no room for it.
    pub fn take_reserve(&self) -> bool {
        let taken = self.reserve.take();
        if let Err(error) = &taken {
            tracing::debug!(%error, path = %self.path.display(), "the index has no reserve for a full file system");
        }
        taken.is_ok()
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

/// Bytes of a write buffer, in an index of `bytes`: two of them and their log have a quarter of it, the reserve has three sixteenths,
/// and levels with room to merge have the rest.
fn buffer_bytes(bytes: u64) -> u64 {
    (bytes / 16).clamp(64 << 10, 8 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ring comes round several times, without a sync: after a kill, no gap is seen where there is none.
    #[test]
    fn a_ring_that_came_round_is_whole() {
        let folder = std::env::temp_dir().join(format!("kvstore-ring-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
        let count = caps::NVME_INDEX_RING * 3 + 10;
        let (index, found) = Index::open(&folder, 1 << 20, false, None).unwrap();
        assert!(matches!(found, IndexFound::Whole), "{found:?}");
        (0..count).for_each(|_| index.write(IndexBatch::default(), false).unwrap());
        index.close();
        let (index, found) = Index::open(&folder, 1 << 20, true, None).unwrap();
        assert!(matches!(found, IndexFound::Whole), "{found:?}");
        let mut newest = 0;
        let link = |item: IndexItem<'_>| {
            if let IndexItem::Link(_, number) = item {
                newest = number.max(newest)
            }
        };
        index.load(b'g', link).unwrap();
        assert_eq!(newest, count);
        // RocksDB makes and removes files in the background while it is open: a folder is only removed once it is closed.
        index.close();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
