//! The index of one volume: RocksDB, small and bounded. Read whole at the start, only written after.
//!
//! Keys start with what they name: `b` and a digest (a block's place), `s` and a segment's number (its
//! life), `p` and an id (a pin), `n` and a number (a namespace's digest), `t` and a segment's number (a failed sync was to cover
//! it), `d` and a digest (deleted while a scan goes on). Nothing here is trusted beyond its name: each frame is checked when read.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvstore_rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, Direction, IteratorMode, LogLevel, Options, ReadOptions,
    WriteBatch, WriteOptions,
};
use kvstore_transfer::volume::{Faults, Operation};
use parking_lot::{Mutex, RwLock};

use super::format::{IndexValue, SegmentClass, VOLUME_VERSION};
use crate::block::Digest;
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
    /// A failed write closed it, and it is not open again yet.
    #[error("the index is closed after an error, and is being opened again")]
    Closed,
    /// A test's fault.
    #[error("an injected fault")]
    Injected,
}

/// Changes that are made together.
#[derive(Default)]
pub struct IndexBatch {
    batch: WriteBatch,
}

impl IndexBatch {
    /// A block is there.
    pub fn put_block(&mut self, digest: Digest, value: &IndexValue) {
        self.batch.put(block_key(digest), value.encode());
    }

    /// A block is there no longer.
    pub fn delete_block(&mut self, digest: Digest) {
        self.batch.delete(block_key(digest));
    }

    /// A segment begins a life.
    pub fn put_segment(&mut self, segment: u32, life: u64, class: SegmentClass) {
        let mut value = life.to_le_bytes().to_vec();
        value.push(u8::from(class == SegmentClass::Pinned));
        self.batch.put(segment_key(segment), value);
    }

    /// A segment has no disk space any more.
    pub fn delete_segment(&mut self, segment: u32) {
        self.batch.delete(segment_key(segment));
    }

    /// What a segment holds is not to be trusted after a loss of power.
    pub fn put_suspect(&mut self, segment: u32) {
        self.batch.put(suspect_key(segment), b"");
    }

    /// The segment begins a life: nothing of that is left in it.
    pub fn delete_suspect(&mut self, segment: u32) {
        self.batch.delete(suspect_key(segment));
    }

    /// A block was deleted while some segments were still to be scanned.
    pub fn put_buried(&mut self, digest: Digest) {
        self.batch.put(buried_key(digest), b"");
    }

    /// All segments were scanned.
    pub fn delete_buried(&mut self, digest: Digest) {
        self.batch.delete(buried_key(digest));
    }

    /// Says again what the index is: a change that changes nothing, to see whether it takes one.
    pub fn put_version(&mut self) {
        self.batch.put(b"m", VOLUME_VERSION.to_le_bytes());
    }

    /// A namespace has a number.
    pub fn put_namespace(&mut self, number: u8, digest: &[u8; 32]) {
        self.batch.put([b'n', number], digest);
    }

    /// A pin begins.
    pub fn put_pin(&mut self, id: u128, record: &[u8]) {
        self.batch.put(pin_key(id), record);
    }

    /// A pin ended.
    pub fn delete_pin(&mut self, id: u128) {
        self.batch.delete(pin_key(id));
    }

    /// Nothing in it.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Bytes of it.
    pub fn bytes(&self) -> u64 {
        self.batch.size_in_bytes() as u64
    }

    /// Changes in it.
    #[cfg(test)]
    pub fn changes(&self) -> usize {
        self.batch.len()
    }
}

fn block_key(digest: Digest) -> [u8; 17] {
    let mut key = [b'b'; 17];
    key.iter_mut().skip(1).zip(digest.0.to_be_bytes()).for_each(|(to, from)| *to = from);
    key
}

fn segment_key(segment: u32) -> [u8; 5] {
    let [a, b, c, d] = segment.to_be_bytes();
    [b's', a, b, c, d]
}

fn suspect_key(segment: u32) -> [u8; 5] {
    let [a, b, c, d] = segment.to_be_bytes();
    [b't', a, b, c, d]
}

fn pin_key(id: u128) -> [u8; 17] {
    named(b'p', id)
}

fn buried_key(digest: Digest) -> [u8; 17] {
    named(b'd', digest.0)
}

fn named(kind: u8, name: u128) -> [u8; 17] {
    let mut key = block_key(Digest(name));
    if let Some(first) = key.first_mut() {
        *first = kind;
    }
    key
}

/// One thing that the index holds.
pub enum IndexItem<'a> {
    /// A block's place.
    Block(Digest, IndexValue),
    /// A segment's life.
    Segment(u32, u64, SegmentClass),
    /// A pin.
    Pin(u128, &'a [u8]),
    /// A namespace's number, and its digest.
    Namespace(u8, [u8; 32]),
    /// A segment whose blocks a failed sync was to make safe.
    Suspect(u32),
    /// A block that was deleted while segments were still to be scanned.
    Buried(Digest),
}

/// See the head of this file.
pub struct Index {
    path: PathBuf,
    bytes: u64,
    cache: Cache,
    db: RwLock<Option<DB>>,
    /// One writer at a time, so that a reopening meets none.
    writing: Mutex<()>,
    /// What is there is damaged, and is thrown away when it is opened next.
    damaged: AtomicBool,
    faults: Option<Arc<Faults>>,
}

impl Index {
    /// Opens the index in `path`, or makes an empty one, to take `bytes` of disk at most.
    pub fn open(path: &Path, bytes: u64, faults: Option<Arc<Faults>>) -> Result<Self, IndexError> {
        let cache = Cache::new_lru_cache(caps::NVME_INDEX_CACHE_BYTES);
        let index = Self {
            path: path.to_owned(),
            bytes,
            cache,
            db: RwLock::new(None),
            writing: Mutex::new(()),
            faults,
            damaged: AtomicBool::new(false),
        };
        index.reopen()?;
        Ok(index)
    }

    fn options(&self) -> Options {
        // Shares of the reservation: two write buffers and their log, and levels with room to merge.
        let buffer = (self.bytes / 16).clamp(64 << 10, 8 << 20) as usize;
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
        options.set_skip_stats_update_on_db_open(true);
        options.set_stats_dump_period_sec(0);
        options
    }

    /// Closes the database, if it is open, and opens it again: what an error in the background asks for.
    pub fn reopen(&self) -> Result<(), IndexError> {
        let _writing = self.writing.lock();
        *self.db.write() = None;
        if self.damaged.load(Ordering::Acquire) {
            if let Err(error) = Self::destroy(&self.path) {
                tracing::error!(%error, path = %self.path.display(), "the damaged index cannot be removed");
                return Err(IndexError::Closed);
            }
            self.damaged.store(false, Ordering::Release);
        }
        let db = DB::open(&self.options(), &self.path).map_err(|error| self.error(error))?;
        let version = db.get(b"m").map_err(|error| self.error(error))?;
        match version.as_deref().map(<[u8; 2]>::try_from) {
            None => db.put(b"m", VOLUME_VERSION.to_le_bytes()).map_err(|error| self.error(error))?,
            Some(Ok(bytes)) if u16::from_le_bytes(bytes) == VOLUME_VERSION => {}
            Some(other) => {
                let version = other.map(u16::from_le_bytes).unwrap_or(u16::MAX);
                return Err(IndexError::Version { path: self.path.clone(), version });
            }
        }
        *self.db.write() = Some(db);
        Ok(())
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
        let db = db.as_ref().ok_or(IndexError::Closed)?;
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_readahead_size(2 << 20);
        options.set_iterate_upper_bound([kind + 1]);
        for item in db.iterator_opt(IteratorMode::From(&[kind], Direction::Forward), options) {
            let (key, value) = item.map_err(|error| self.error(error))?;
            match (key.split_first(), &*value) {
                (Some((b'b', digest)), value) => {
                    if let (Ok(digest), Ok(value)) = (<[u8; 16]>::try_from(digest), IndexValue::decode(value)) {
                        each(IndexItem::Block(Digest(u128::from_be_bytes(digest)), value));
                    }
                }
                (Some((b's', segment)), [life @ .., class]) => {
                    if let (Ok(segment), Ok(life)) = (<[u8; 4]>::try_from(segment), <[u8; 8]>::try_from(life)) {
                        let class = if *class == 1 { SegmentClass::Pinned } else { SegmentClass::Ordinary };
                        each(IndexItem::Segment(u32::from_be_bytes(segment), u64::from_le_bytes(life), class));
                    }
                }
                (Some((b'n', [number])), digest) => {
                    if let Ok(digest) = <[u8; 32]>::try_from(digest) {
                        each(IndexItem::Namespace(*number, digest));
                    }
                }
                (Some((b't', segment)), _) => {
                    if let Ok(segment) = <[u8; 4]>::try_from(segment) {
                        each(IndexItem::Suspect(u32::from_be_bytes(segment)));
                    }
                }
                (Some((b'd', digest)), _) => {
                    if let Ok(digest) = <[u8; 16]>::try_from(digest) {
                        each(IndexItem::Buried(Digest(u128::from_be_bytes(digest))));
                    }
                }
                (Some((b'p', id)), record) => {
                    if let Ok(id) = <[u8; 16]>::try_from(id) {
                        each(IndexItem::Pin(u128::from_be_bytes(id), record));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes changes; with `sync`, they and all before them are safe from a loss of power.
    pub fn write(&self, batch: IndexBatch, sync: bool) -> Result<(), IndexError> {
        let _writing = self.writing.lock();
        if self.faults.as_ref().is_some_and(|faults| faults.next(Operation::Index).is_some()) {
            return Err(IndexError::Injected);
        }
        let db = self.db.read();
        let db = db.as_ref().ok_or(IndexError::Closed)?;
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        db.write_opt(batch.batch, &options).map_err(|error| self.error(error))
    }

    /// Bytes of disk that it takes.
    pub fn disk_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
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
