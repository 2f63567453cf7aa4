//! Copying a snapshot from one store into another: one that was saved to a node's disk becomes durable. It keeps its id, and its manifests
//! byte by byte. What the other store has already is not read.

use std::collections::HashMap;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};

use crate::caps;
use crate::cut::pieces;
use crate::manifest::{Commit, Extent, File, Rank};
use crate::progress::Progress;
use crate::save::{Compress, Intent, SaveError, Saver, is_in_time};
use crate::store::{Store, StoreError, There, check_name, new_id};

/// Where from, and where to.
#[derive(Clone, Copy)]
pub struct Between<'stores> {
    /// The store that has it.
    pub from: &'stores Store,
    /// The store that is to have it.
    pub to: &'stores Store,
}

/// Copies the snapshot `id`, with every chunk verified. `name`: what it is called there from then on. A snapshot that is there already is
/// given the name, and nothing else is done. Dropped, or where it fails, it leaves nothing that could be taken for a snapshot; the same
/// call goes on.
pub async fn copy(
    between: Between<'_>,
    id: &str,
    name: Option<&str>,
    compress: Compress,
    progress: &Arc<Progress>,
) -> Result<Commit, SaveError> {
    if let Some(name) = name {
        check_name(name)?;
    }
    let Between { from, to } = between;
    let (commit, body) = from.snapshot_with_body(id).await?;
    progress.total.store(commit.totals.bytes, std::sync::atomic::Ordering::Relaxed);
    // Another copy of it may be under way: each has an intent of its own. It is there before anything is looked at, so that no collection
    // takes what is found.
    let save = new_id()?;
    to.prove(&save).await?;
    let began = to.bucket.now();
    let mut intent = Intent::new(to, &save);
    to.begin_save(&save).await?;
    let copied = async {
        match to.snapshot_with_body(id).await {
            Ok((_, there)) if there == body => {
                Progress::add(&progress.found, commit.totals.bytes);
                Progress::add(&progress.done, commit.totals.bytes);
            }
            Ok(_) => return Err(StoreError::Digest(format!("the snapshot {id} in the other store")).into()),
            Err(StoreError::NoSuch(_)) => {
                chunks(between, &commit, compress, progress).await?;
                is_in_time(to, began)?;
                intent.stays = true;
                to.commit_body(id, body).await?;
                intent.stays = false;
            }
            Err(error) => return Err(error.into()),
        }
        match name {
            Some(name) => Ok(to.let_mean(name, Some(id)).await?),
            None => Ok(()),
        }
    };
    let copied: Result<(), SaveError> = copied.await;
    intent.end(&copied).await;
    copied.map(|()| commit)
}

/// Copies what the other store lacks of all ranks: their chunks, then their manifests.
async fn chunks(
    between: Between<'_>,
    commit: &Commit,
    compress: Compress,
    progress: &Arc<Progress>,
) -> Result<(), SaveError> {
    let saver = Saver::new(between.to, compress, progress);
    for name in &commit.ranks.0 {
        let (rank, body) = between.from.rank_with_body(&commit.id, *name).await?;
        let each = extents(&rank).map(|(extent, element)| chunk(between.from, &saver, extent, element));
        futures::stream::iter(each).buffer_unordered(caps::CHUNKS_AT_ONCE).try_collect::<()>().await?;
        between.to.write_rank_body(&commit.id, name.rank, body).await?;
        // A copy of the same snapshot may have been there; what is named must be what is there.
        between.to.rank(&commit.id, *name).await?;
    }
    Ok(())
}

/// The parts of a rank's files, and the width of an element where they are parts of a tensor.
fn extents(rank: &Rank) -> impl Iterator<Item = (Extent, Option<u8>)> {
    rank.files.0.iter().flat_map(|file: &File| {
        let elements: HashMap<u64, Option<u8>> =
            pieces(file.bytes, &file.tensors.0).into_iter().map(|piece| (piece.start, piece.element_bytes)).collect();
        let mut start = 0;
        file.extents.0.iter().map(move |extent| {
            let element = elements.get(&start).copied().flatten();
            start += extent.bytes;
            (*extent, element)
        })
    })
}

async fn chunk(from: &Store, saver: &Saver, extent: Extent, element: Option<u8>) -> Result<(), SaveError> {
    match saver.look(extent.chunk, extent.bytes).await? {
        There::Chunk => {}
        there => {
            let (read, _) = from.read_extent(extent).await?;
            // Both begin at a page of their own: a copy, and no wait for the disk's cache.
            let mut plain = saver.buffers.take(read.len());
            plain.as_mut().copy_from_slice(&read);
            drop(read);
            saver.write((extent.chunk, plain), element, there).await?;
        }
    }
    Ok(())
}
