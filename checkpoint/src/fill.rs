//! Fills files with the chunks that they are made of: several at a time, each verified before it is written.
//!
//! Knows open files, and not where they lie: a folder, or memory.

use std::fs::File as Opened;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;
use tokio::sync::Semaphore;

use crate::caps;
use crate::digest::Digest;
use crate::manifest::{Extent, File};
use crate::progress::Progress;
use crate::restore::{RestoreError, written};
use crate::store::Store;

/// Runs what waits for a disk where it keeps nobody from running.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other).flatten()
}

/// Whether a part of a file is that chunk.
pub(crate) async fn has(file: Arc<Opened>, start: u64, extent: Extent) -> io::Result<bool> {
    blocking(move || {
        let mut plain = vec![0; extent.bytes as usize];
        file.read_exact_at(&mut plain, start)?;
        Ok(Digest::of(&plain) == extent.chunk)
    })
    .await
}

/// The parts of a file: where each begins, and what it is.
pub(crate) fn parts(file: &File) -> impl Iterator<Item = (u64, Extent)> {
    file.extents.0.iter().scan(0, |start, extent| {
        let at = *start;
        *start += extent.bytes;
        Some((at, *extent))
    })
}

/// What fills files: it has [`caps::CHUNKS_AT_ONCE`] chunks under way, of whichever files.
pub(crate) struct Filler<'a> {
    store: &'a Store,
    /// The files may have right bytes already: they are looked at first.
    is_again: bool,
    progress: &'a Arc<Progress>,
    chunks: Semaphore,
}

impl<'a> Filler<'a> {
    pub(crate) fn new(store: &'a Store, is_again: bool, progress: &'a Arc<Progress>) -> Self {
        Self { store, is_again, progress, chunks: Semaphore::new(caps::CHUNKS_AT_ONCE) }
    }

    /// Fills a file. `path` is what errors call it.
    pub(crate) async fn fill(&self, opened: &Arc<Opened>, path: &Path, file: &File) -> Result<(), RestoreError> {
        let parts: Vec<(u64, Extent)> = parts(file).collect();
        let each = parts.into_iter().map(|(start, extent)| self.part(opened, path, start, extent));
        let all = futures::stream::iter(each);
        futures::StreamExt::buffer_unordered(all, caps::CHUNKS_AT_ONCE).try_collect::<()>().await
    }

    async fn part(&self, opened: &Arc<Opened>, path: &Path, start: u64, extent: Extent) -> Result<(), RestoreError> {
        let closed = |_| RestoreError::Write { path: path.to_owned(), cause: io::Error::other("the restore ended") };
        let _permit = self.chunks.acquire().await.map_err(closed)?;
        if self.is_again && has(Arc::clone(opened), start, extent).await.map_err(written(path))? {
            Progress::add(&self.progress.found, extent.bytes);
        } else {
            let (plain, moved) = self.store.read_extent(extent).await?;
            let opened = Arc::clone(opened);
            blocking(move || opened.write_all_at(&plain, start)).await.map_err(written(path))?;
            Progress::add(&self.progress.moved, moved);
        }
        Progress::add(&self.progress.done, extent.bytes);
        Ok(())
    }
}
