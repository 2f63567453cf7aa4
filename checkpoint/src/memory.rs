//! Restoring a snapshot into memory: each file becomes a memfd that nobody can write to any more.
//!
//! Whoever maps it privately may write to the mapping, and gets pages of its own. The memory goes when the last mapping and the last
//! descriptor have gone.

use std::fs::File as Opened;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::{StreamExt, TryStreamExt};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::caps;
use crate::fill::{Filler, blocking};
use crate::manifest::{Commit, File};
use crate::progress::Progress;
use crate::restore::{RestoreError, written};
use crate::store::Store;

/// A file of a snapshot in memory, whole and verified.
#[derive(Debug)]
pub struct Held {
    /// What it is.
    pub file: File,
    /// Its bytes.
    pub memory: OwnedFd,
}

fn make(path: &str, bytes: u64) -> io::Result<Opened> {
    // For people who look at a process's descriptors; names are cut at 249 bytes.
    let name: String = format!("kvstore:{path}").chars().filter(|letter| letter.is_ascii()).take(200).collect();
    let memory = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = Opened::from(memory);
    file.set_len(bytes)?;
    Ok(file)
}

async fn restore_file(filler: &Filler<'_>, file: File) -> Result<Held, RestoreError> {
    let path = Path::new("memory").join(&file.path);
    let opened = Arc::new(make(&file.path, file.bytes).map_err(written(&path))?);
    filler.fill(&opened, &path, &file).await?;
    let sealed = blocking(move || {
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&*opened, seals)?;
        // All parts are written: nobody else has it.
        Arc::try_unwrap(opened).map(OwnedFd::from).map_err(|_| io::Error::other("it is still written to"))
    });
    let memory = sealed.await.map_err(written(&path))?;
    Ok(Held { file, memory })
}

/// Restores the files of a snapshot whose paths are wanted. Dropped, or where it fails, nothing of it stays.
pub async fn restore(
    store: &Store,
    commit: &Commit,
    wanted: impl Fn(&str) -> bool,
    progress: &Arc<Progress>,
) -> Result<Vec<Held>, RestoreError> {
    let mut files = store.files(commit).await?;
    files.retain(|file| wanted(&file.path));
    if files.len() > caps::MEMORY_FILES_MAX {
        return Err(RestoreError::TooManyFiles(files.len()));
    }
    progress.total.store(files.iter().map(|file| file.bytes).sum(), Ordering::Relaxed);
    let filler = Filler::new(store, false, progress);
    let each = files.into_iter().map(|file| restore_file(&filler, file));
    futures::stream::iter(each).buffered(caps::FILES_AT_ONCE).try_collect().await
}
