//! Chunks of snapshots that this node's daemon has: copied from its memory, or leased there and mapped.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};
use kvstore_checkpoint::caps::CHUNKS_AT_ONCE;
use kvstore_checkpoint::digest::Digest;
use kvstore_checkpoint::manifest::{Extent, File};
use kvstore_checkpoint::near::Near;
use kvstore_checkpoint::progress::Progress;
use kvstore_client::{Chunks, Error, JoinedBlocks, LeasedBlock};

use crate::exported::Exports;

/// Smaller parts of files are copied: a mapping takes whole pages, and a system call.
const MAPPED_FROM: u64 = 64 << 10;

/// A daemon's chunks, as a restore asks for them.
pub struct DaemonChunks(pub Arc<Chunks>);

impl Near for DaemonChunks {
    fn chunk(&self, name: Digest, bytes: u64) -> BoxFuture<'_, Option<Bytes>> {
        self.0.get(name.0, bytes).boxed()
    }

    fn damaged(&self, name: Digest, bytes: u64) -> BoxFuture<'_, ()> {
        // Where it cannot be told, it is found damaged again.
        self.0.forget(name.0, bytes).map(|_| ()).boxed()
    }
}

/// Files whose chunks are all in the daemon's memory, leased.
pub struct Leased {
    files: HashMap<String, File>,
    leases: HashMap<Digest, Arc<LeasedBlock>>,
}

/// A part of a file that is no part of it, or that left.
fn odd(path: &str) -> Error {
    Error::Invalid(format!("{path}: it has no such part"))
}

impl Leased {
    /// Leases all chunks of these files. `None` where the daemon lacks one, is not on this node, or has no lease left for one. `check`:
    /// each is compared with its name again.
    pub async fn new(chunks: Arc<Chunks>, files: &[File], check: bool, progress: &Arc<Progress>) -> Option<Self> {
        progress.total.store(files.iter().map(|file| file.bytes).sum(), Ordering::Relaxed);
        let mut seen = HashSet::new();
        let extents = files.iter().flat_map(|file| file.extents.0.iter().copied());
        let distinct: Vec<Extent> = extents.filter(|extent| seen.insert(extent.chunk)).collect();
        let each = distinct.into_iter().map(|extent| {
            let chunks = &*chunks;
            async move {
                let leased = chunks.lease(extent.chunk.0, extent.bytes).await.ok().flatten().ok_or(())?;
                let leased = if check { checked(chunks, extent, leased).await.ok_or(())? } else { leased };
                progress.done.fetch_add(extent.bytes, Ordering::Relaxed);
                progress.found.fetch_add(extent.bytes, Ordering::Relaxed);
                Ok::<_, ()>((extent.chunk, Arc::new(leased)))
            }
        });
        let leases = futures::stream::iter(each).buffer_unordered(CHUNKS_AT_ONCE).try_collect().await;
        let Ok(leases) = leases else {
            // The restore that follows counts anew.
            [&progress.done, &progress.found].iter().for_each(|count| count.store(0, Ordering::Relaxed));
            return None;
        };
        // What two files have, or one has twice, was counted once.
        progress.done.store(progress.total.load(Ordering::Relaxed), Ordering::Relaxed);
        let files = files.iter().map(|file| (file.path.clone(), file.clone())).collect();
        Some(Self { files, leases })
    }

    /// Paths and bytes.
    pub fn files(&self) -> Vec<(String, u64)> {
        self.files.values().map(|file| (file.path.clone(), file.bytes)).collect()
    }

    /// The extents from `start` to `end`, each with the part of it that is inside.
    fn parts(&self, path: &str, start: u64, end: u64) -> Result<Vec<(Extent, std::ops::Range<usize>)>, Error> {
        let file = self.files.get(path).filter(|file| start <= end && end <= file.bytes).ok_or_else(|| odd(path))?;
        let mut at = 0;
        let mut parts = Vec::new();
        for extent in &file.extents.0 {
            let inside = start.max(at)..end.min(at + extent.bytes);
            if inside.start < inside.end {
                parts.push((*extent, (inside.start - at) as usize..(inside.end - at) as usize));
            }
            at += extent.bytes;
        }
        Ok(parts)
    }

    /// A copy of a part of a file.
    pub fn read(&self, path: &str, start: u64, end: u64) -> Result<Vec<u8>, Error> {
        let mut all = Vec::with_capacity((end.saturating_sub(start)) as usize);
        for (extent, inside) in self.parts(path, start, end)? {
            let bytes =
                self.leases.get(&extent.chunk).and_then(|leased| leased.get(inside)).ok_or_else(|| odd(path))?;
            all.extend_from_slice(bytes);
        }
        Ok(all)
    }

    /// A part of a file as memory of this process's own: mapped where it is made of whole chunks, else copied.
    pub fn region(&self, path: &str, start: u64, end: u64) -> Result<Box<dyn Exports>, Error> {
        let parts = self.parts(path, start, end)?;
        let is_whole = parts.iter().all(|(extent, inside)| inside.len() as u64 == extent.bytes);
        if is_whole && end - start >= MAPPED_FROM {
            let blocks: Option<Vec<_>> =
                parts.iter().map(|(extent, _)| self.leases.get(&extent.chunk).map(Arc::clone)).collect();
            if let Some(Ok(joined)) = blocks.map(JoinedBlocks::new) {
                return Ok(Box::new(joined));
            }
        }
        Ok(Box::new(Own::new(&self.read(path, start, end)?)))
    }
}

/// A chunk that is what its name says; else the daemon is told.
async fn checked(chunks: &Chunks, extent: Extent, leased: LeasedBlock) -> Option<LeasedBlock> {
    let right = tokio::task::spawn_blocking(move || (Digest::of(&leased) == extent.chunk).then_some(leased)).await;
    match right {
        Ok(Some(leased)) => Some(leased),
        _ => {
            let _ = chunks.forget(extent.chunk.0, extent.bytes).await;
            None
        }
    }
}

impl Exports for JoinedBlocks {
    fn bytes(&self) -> (*mut u8, usize) {
        (self.start().as_ptr(), self.len())
    }

    fn is_writable(&self) -> bool {
        true
    }
}

/// A copy, which lies where numbers of any width may.
struct Own {
    words: std::sync::Mutex<Box<[u64]>>,
    bytes: usize,
}

impl Own {
    fn new(bytes: &[u8]) -> Self {
        let word = |part: &[u8]| {
            let mut word = [0; 8];
            word.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
            u64::from_ne_bytes(word)
        };
        Self { words: std::sync::Mutex::new(bytes.chunks(8).map(word).collect()), bytes: bytes.len() }
    }
}

impl Exports for Own {
    fn bytes(&self) -> (*mut u8, usize) {
        // The box stays where it is; who writes to it is Python's affair, as with every buffer.
        let words = self.words.lock().map_or(std::ptr::null_mut(), |mut words| words.as_mut_ptr());
        (words.cast(), if words.is_null() { 0 } else { self.bytes })
    }

    fn is_writable(&self) -> bool {
        true
    }
}
