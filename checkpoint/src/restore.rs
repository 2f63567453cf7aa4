//! Restoring a snapshot into a folder, and checking one where it lies.
//!
//! Files are written into a folder beside the one that is asked for, which gets its name once every byte has been verified and is on the
//! disk: it is there whole, or not at all. A restore that broke off is gone on with: what its files have already is verified, not read again.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File as Opened, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::{StreamExt, TryStreamExt};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::caps;
use crate::digest::Digest;
use crate::fill::{Filler, blocking};
use crate::manifest::{Commit, File};
use crate::progress::Progress;
use crate::store::{Store, StoreError};

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is something where it is to go.
    #[error("{} exists; name a folder that does not", .0.display())]
    Exists(PathBuf),
    /// A fact is another.
    #[error("the snapshot's {name} is {}, and {asked:?} is asked for; --allow {name} restores it nevertheless", found.as_deref().map_or("not known".to_owned(), |found| format!("{found:?}")))]
    Fact {
        /// Which.
        name: String,
        /// The snapshot's.
        found: Option<String>,
        /// What is asked for.
        asked: String,
    },
    /// A file of what is restored.
    #[error("cannot write {}: {cause}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It has more files than a process holds open.
    #[error("the snapshot has {0} files, and at most {most} are held in memory; restore it into a folder or a cache", most = caps::MEMORY_FILES_MAX)]
    TooManyFiles(usize),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Refuses a snapshot whose facts are not those that are asked for, unless they are allowed to differ.
pub fn check_facts(commit: &Commit, asked: &BTreeMap<String, String>, allowed: &[String]) -> Result<(), RestoreError> {
    for (name, asked) in asked {
        let found = commit.facts.get(name);
        if found != Some(asked) && !allowed.contains(name) {
            return Err(RestoreError::Fact { name: name.clone(), found: found.cloned(), asked: asked.clone() });
        }
    }
    Ok(())
}

/// The folder in which a restore to `to` writes until it is whole.
pub(crate) fn partial(to: &Path, id: &str) -> PathBuf {
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{id}.partial"));
    to.with_file_name(name)
}

pub(crate) fn written(path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |cause| RestoreError::Write { path, cause }
}

/// Makes a file of this length, or takes the one that is there.
fn make(path: &Path, bytes: u64, executable: bool) -> io::Result<Opened> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    // Nothing is followed out of the folder.
    let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(path)?;
    file.set_len(bytes)?;
    file.set_permissions(Permissions::from_mode(if executable { 0o755 } else { 0o644 }))?;
    Ok(file)
}

/// Restores one file below a folder.
async fn restore_file(filler: &Filler<'_>, folder: &Path, file: File) -> Result<(), RestoreError> {
    let path = folder.join(&file.path);
    let (at, bytes, executable) = (path.clone(), file.bytes, file.executable);
    let opened = blocking(move || make(&at, bytes, executable)).await.map_err(written(&path))?;
    let opened = Arc::new(opened);
    filler.fill(&opened, &path, &file).await?;
    blocking(move || opened.sync_all()).await.map_err(written(&path))
}

/// Restores a snapshot into a folder that does not exist. Dropped, or where it fails, the folder does not exist; the same call goes on.
pub async fn restore(store: &Store, commit: &Commit, to: &Path, progress: &Arc<Progress>) -> Result<(), RestoreError> {
    if fs::symlink_metadata(to).is_ok() {
        return Err(RestoreError::Exists(to.to_owned()));
    }
    let files = store.files(commit).await?;
    restore_files(store, commit, files, to, progress).await
}

/// The same, of its files.
pub(crate) async fn restore_files(
    store: &Store,
    commit: &Commit,
    files: Vec<File>,
    to: &Path,
    progress: &Arc<Progress>,
) -> Result<(), RestoreError> {
    progress.total.store(commit.totals.bytes, Ordering::Relaxed);
    let partial = partial(to, &commit.id);
    let is_again = fs::symlink_metadata(&partial).is_ok_and(|meta| meta.is_dir());
    fs::create_dir_all(&partial).map_err(written(&partial))?;
    let names: HashSet<String> = files.iter().map(|file| file.path.clone()).collect();
    let filler = Filler::new(store, is_again, progress);
    let each = files.into_iter().map(|file| restore_file(&filler, &partial, file));
    futures::stream::iter(each).buffer_unordered(caps::FILES_AT_ONCE).try_collect::<()>().await?;
    let (from, at) = (partial.clone(), to.to_owned());
    blocking(move || finish(&from, &names, &at)).await.map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists => RestoreError::Exists(to.to_owned()),
        _ => RestoreError::Write { path: to.to_owned(), cause },
    })
}

/// Gives the folder its name: all that is in it is on the disk first, and nothing else is in it.
fn finish(partial: &Path, names: &HashSet<String>, to: &Path) -> io::Result<()> {
    let mut folders = vec![(partial.to_owned(), String::new())];
    while let Some((at, below)) = folders.pop() {
        for entry in fs::read_dir(&at)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let name = if below.is_empty() { name } else { format!("{below}/{name}") };
            if entry.file_type()?.is_dir() {
                folders.push((entry.path(), name));
            } else if !names.contains(&name) {
                fs::remove_file(entry.path())?;
            }
        }
        Opened::open(&at)?.sync_all()?;
    }
    renameat_with(CWD, partial, CWD, to, RenameFlags::NOREPLACE)?;
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Opened::open(parent)?.sync_all()
}

/// What a check of a snapshot found.
#[derive(Debug, Default)]
pub struct Checked {
    /// Chunks that are right.
    pub sound: u64,
    /// Those that are not, each with what is wrong.
    pub wrong: Vec<(Digest, StoreError)>,
}

/// Reads every chunk of a snapshot once, and verifies it.
pub async fn verify(store: &Store, commit: &Commit, progress: &Arc<Progress>) -> Result<Checked, StoreError> {
    progress.total.store(commit.totals.chunk_bytes, Ordering::Relaxed);
    let (mut seen, mut checked) = (HashSet::new(), Checked::default());
    for name in &commit.ranks.0 {
        let rank = store.rank(&commit.id, *name).await?;
        let extents = rank.files.0.iter().flat_map(|file| &file.extents.0);
        let distinct: Vec<_> = extents.filter(|extent| seen.insert(extent.chunk)).copied().collect();
        let each = distinct.into_iter().map(|extent| async move { (extent, store.read_chunk(extent.chunk).await) });
        let mut answers = futures::stream::iter(each).buffer_unordered(caps::CHUNKS_AT_ONCE);
        while let Some((extent, answer)) = answers.next().await {
            Progress::add(&progress.done, extent.bytes);
            match answer {
                Ok((plain, moved)) if plain.len() as u64 == extent.bytes => {
                    Progress::add(&progress.moved, moved);
                    checked.sound += 1;
                }
                Ok(_) => {
                    let cause = crate::codec::Damage::Bytes;
                    checked.wrong.push((extent.chunk, StoreError::Chunk { name: extent.chunk, cause }));
                }
                Err(error) => checked.wrong.push((extent.chunk, error)),
            }
        }
    }
    Ok(checked)
}
