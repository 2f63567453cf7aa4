//! Saving folders, and what is in memory. Nothing of a snapshot can be seen before its commit is there, and what is there already is not written again.
//!
//! The order: an intent; all chunks; the rank's manifest; the commit; the name. A save that was killed leaves chunks and an intent behind,
//! which a collection takes away. One that is dropped or fails leaves chunks alone.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::buffers::{Buffer, Buffers};
use crate::caps;
use crate::codec::{Tried, compress, footer_of};
use crate::cut::{Piece, pieces};
use crate::digest::Digest;
use crate::fill::blocking;
use crate::manifest::{Bounded, Commit, Extent, FORMAT, File, Rank};
use crate::progress::Progress;
use crate::source::{Found, Reader, Sources};
use crate::store::{Store, StoreError, There, check_name, new_id};

/// What is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compress {
    /// What becomes smaller: the store is slower than the compressor.
    #[default]
    Auto,
    /// Nothing.
    Nothing,
}

/// How to save.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// What the snapshot is called from then on.
    pub name: Option<String>,
    /// Facts that whoever restores it may ask for.
    pub facts: BTreeMap<String, String>,
    /// What is compressed.
    pub compress: Compress,
    /// The program that saves.
    pub writer: String,
    /// When, in milliseconds since 1970.
    pub now_ms: i64,
}

/// Why nothing was saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A file or a folder.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A file that a snapshot cannot hold.
    #[error("{} cannot be saved: {why}", path.display())]
    Odd {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// It was written meanwhile.
    #[error("{} changed while it was being saved; save again once nothing writes to it", .0.display())]
    Changed(PathBuf),
    /// It took too long for a collection to wait for it.
    #[error("the save took more than {} hours, so that a collection may have taken what it wrote; save again, what was written is found", caps::SAVE_MS_MAX / 3_600_000)]
    TooLong,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A saver: what it has written so far.
pub(crate) struct Saver {
    store: Store,
    compress: Compress,
    progress: Arc<Progress>,
    /// Chunks of this save, so that one that is there twice is looked for once.
    done: Mutex<HashSet<Digest>>,
    pub(crate) buffers: Arc<Buffers>,
    /// One for each chunk that may be under way.
    pub(crate) places: Semaphore,
}

impl Saver {
    pub(crate) fn new(store: &Store, compress: Compress, progress: &Arc<Progress>) -> Self {
        let (store, progress) = (store.clone(), Arc::clone(progress));
        let at_once = match compress {
            Compress::Nothing => caps::PLAIN_CHUNKS_AT_ONCE,
            Compress::Auto => caps::CHUNKS_AT_ONCE,
        };
        let (buffers, places) = (Arc::default(), Semaphore::new(at_once));
        Self { store, compress, progress, done: Mutex::default(), buffers, places }
    }

    /// What there is of a chunk. One that need not be written counts as found.
    pub(crate) async fn look(&self, chunk: Digest, bytes: u64) -> Result<There, StoreError> {
        let is_new = self.done.lock().insert(chunk);
        let there = if is_new { self.store.look_at_chunk(chunk, bytes).await? } else { There::Chunk };
        if there == There::Chunk {
            Progress::add(&self.progress.found, bytes);
            Progress::add(&self.progress.done, bytes);
        }
        Ok(there)
    }

    /// Writes a chunk where `there` says that it is not. `element_bytes`: of the tensor that it is a part of.
    pub(crate) async fn write(
        &self,
        (chunk, plain): (Digest, Buffer),
        element_bytes: Option<u8>,
        there: There,
    ) -> Result<(), StoreError> {
        let bytes = plain.as_ref().len() as u64;
        let tried = match (self.compress, element_bytes) {
            (Compress::Nothing, _) => Tried::Nothing,
            (Compress::Auto, Some(element)) => Tried::Planes(element),
            (Compress::Auto, None) => Tried::Lz4,
        };
        let encoded = match tried {
            Tried::Nothing => Ok(stored(plain, tried)),
            tried => blocking(move || Ok(stored(plain, tried))).await,
        };
        let stored = encoded.map_err(|cause| StoreError::Stopped(cause.to_string()))?;
        let moved = stored.len() as u64;
        let written = match there {
            There::Damaged => self.store.mend_chunk(chunk, stored).await.map(|()| true),
            _ => self.store.write_chunk(chunk, stored).await,
        };
        match written? {
            true => Progress::add(&self.progress.moved, moved),
            // Somebody else was faster.
            false => Progress::add(&self.progress.found, bytes),
        }
        Progress::add(&self.progress.done, bytes);
        Ok(())
    }

    /// Saves a piece of a file: the chunk that it is.
    async fn piece(&self, file: Reader, path: &Path, piece: Piece) -> Result<Extent, SaveError> {
        let _place = self.places.acquire().await;
        let mut plain = self.buffers.take(piece.bytes);
        let read = blocking(move || {
            file.read_exact_at(plain.as_mut(), piece.start)?;
            Ok((Digest::of(plain.as_ref()), plain))
        });
        let failed = |cause: io::Error| match cause.kind() {
            io::ErrorKind::UnexpectedEof => SaveError::Changed(path.to_owned()),
            _ => SaveError::Read { path: path.to_owned(), cause },
        };
        let (chunk, plain) = read.await.map_err(failed)?;
        let bytes = plain.as_ref().len() as u64;
        match self.look(chunk, bytes).await? {
            There::Chunk => {}
            there => self.write((chunk, plain), piece.element_bytes, there).await?,
        }
        Ok(Extent { bytes, chunk })
    }

    async fn file(&self, found: Arc<Found>) -> Result<File, SaveError> {
        let (path, bytes) = (found.path.clone(), found.bytes);
        let opened = blocking({
            let found = Arc::clone(&found);
            move || {
                let file = found.open()?;
                let is_unchanged = file.is_unchanged()?;
                let tensors = if is_unchanged { file.tensors(bytes)? } else { None };
                Ok((file, is_unchanged, tensors))
            }
        });
        let failed = |cause: io::Error| SaveError::Read { path: path.clone(), cause };
        let (file, is_unchanged, header) = opened.await.map_err(failed)?;
        if !is_unchanged {
            return Err(SaveError::Changed(path));
        }
        let (start, tensors) = header.unwrap_or((0, Vec::new()));
        // The header is no part of a chunk that has anything else.
        let mut cut = pieces(start, &[]);
        let mut rest = pieces(bytes, &tensors);
        rest.retain(|piece| piece.start + piece.bytes as u64 > start);
        if let Some(first) = rest.first_mut().filter(|first| first.start < start) {
            first.bytes -= (start - first.start) as usize;
            first.start = start;
        }
        cut.extend(rest);
        if cut.len() > caps::CHUNKS_MAX {
            return Err(SaveError::Odd { path, why: format!("it has more than {} chunks", caps::CHUNKS_MAX) });
        }
        let each = cut.into_iter().map(|piece| self.piece(file.clone(), &path, piece));
        let extents: Vec<Extent> =
            futures::stream::iter(each).buffered(caps::PLAIN_CHUNKS_AT_ONCE).try_collect().await?;
        if !file.is_unchanged().map_err(failed)? {
            return Err(SaveError::Changed(path.clone()));
        }
        let (path, executable) = (found.name.clone(), found.executable);
        Ok(File { path, bytes, executable, extents: Bounded(extents), tensors: Bounded(tensors) })
    }
}

/// A chunk as it is stored. Not compressed, it stays where it is, and the footer is written behind it.
fn stored(plain: Buffer, tried: Tried) -> Bytes {
    let bytes = plain.as_ref().len();
    match compress(plain.as_ref(), tried) {
        None => Bytes::from_owner(plain.with_footer(&footer_of((0, 0), bytes, bytes))),
        Some((codec, element, mut packed)) => {
            packed.extend_from_slice(&footer_of((codec, element), bytes, packed.len()));
            Bytes::from(packed)
        }
    }
}

/// Saves a folder. Dropped, or where it fails, it leaves nothing that could be taken for a snapshot.
pub async fn save(
    store: &Store,
    folder: &Path,
    options: SaveOptions,
    progress: &Arc<Progress>,
) -> Result<Commit, SaveError> {
    let sources = Sources { folder: Some(folder.to_owned()), ..Sources::default() };
    save_all(store, sources, options, progress).await
}

/// The same, of a folder and of what is in memory.
pub async fn save_all(
    store: &Store,
    sources: Sources,
    options: SaveOptions,
    progress: &Arc<Progress>,
) -> Result<Commit, SaveError> {
    if let Some(name) = &options.name {
        check_name(name)?;
    }
    let (id, named) = (new_id()?, sources.named());
    let found = tokio::task::spawn_blocking(move || sources.find()).await;
    let failed = |cause: io::Error| SaveError::Read { path: named.clone().into(), cause };
    let found = found.map_err(io::Error::other).map_err(failed)??;
    progress.total.store(found.iter().map(|file| file.bytes).sum(), std::sync::atomic::Ordering::Relaxed);
    store.prove(&id).await?;
    let began = store.bucket.now();
    let mut intent = Intent::new(store, &id);
    store.begin_save(&id).await?;
    let saved = write(store, named, (&id, found), options, progress, (began, &mut intent)).await;
    intent.end(&saved).await;
    saved
}

/// An intent holds collections up for so long, and no longer.
pub(crate) fn is_in_time(store: &Store, began: kvstore_bucket::BootTime) -> Result<(), SaveError> {
    match store.bucket.now().ms_since(began) > caps::SAVE_MS_MAX - caps::SAVE_MARGIN_MS {
        true => Err(SaveError::TooLong),
        false => Ok(()),
    }
}

/// An intent, which goes with this: a save that is given up keeps no collection waiting.
pub(crate) struct Intent {
    store: Store,
    id: String,
    runtime: Option<tokio::runtime::Handle>,
    /// It has gone already; or it is needed, as a commit is on its way that nobody can call back.
    pub(crate) stays: bool,
}

impl Intent {
    pub(crate) fn new(store: &Store, id: &str) -> Self {
        let runtime = tokio::runtime::Handle::try_current().ok();
        Self { store: store.clone(), id: id.to_owned(), runtime, stays: false }
    }

    /// Takes it away, unless the snapshot may yet appear: a collection then waits for a day.
    pub(crate) async fn end<T>(mut self, saved: &Result<T, SaveError>) {
        if !matches!(saved, Err(SaveError::Store(StoreError::MayAppear { .. }))) {
            self.store.end_save(&self.id).await;
        }
        self.stays = true;
    }
}

impl Drop for Intent {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take().filter(|_| !self.stays) {
            let (store, id) = (self.store.clone(), std::mem::take(&mut self.id));
            runtime.spawn(async move { store.end_save(&id).await });
        }
    }
}

async fn write(
    store: &Store,
    named: String,
    (id, found): (&str, Vec<Found>),
    options: SaveOptions,
    progress: &Arc<Progress>,
    (began, intent): (kvstore_bucket::BootTime, &mut Intent),
) -> Result<Commit, SaveError> {
    let saver = Saver::new(store, options.compress, progress);
    // Two at once, so that nothing waits at the end of each; their chunks together keep to the bound.
    let each = found.into_iter().map(Arc::new).map(|file| saver.file(file));
    let files = futures::stream::iter(each).buffered(2).try_collect().await?;
    let rank = Rank { format: FORMAT, critical: Bounded::default(), rank: 0, files: Bounded(files) };
    let odd = |cause: crate::manifest::Refused| SaveError::Odd { path: named.clone().into(), why: cause.to_string() };
    rank.check().map_err(odd)?;
    let totals = rank.totals();
    let name = store.write_rank(id, &rank).await?;
    let commit = Commit {
        format: FORMAT,
        critical: Bounded::default(),
        id: id.to_owned(),
        created_ms: options.now_ms,
        writer: options.writer,
        source: named,
        facts: options.facts,
        ranks: Bounded(vec![name]),
        totals,
    };
    is_in_time(store, began)?;
    intent.stays = true;
    store.commit(&commit).await?;
    intent.stays = false;
    if let Some(name) = &options.name {
        store.let_mean(name, Some(id)).await?;
    }
    Ok(commit)
}
