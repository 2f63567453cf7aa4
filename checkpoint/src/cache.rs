//! A node's cache of snapshots: a folder, on a disk or in memory (`/dev/shm`), of which all processes of one user have a share. What one
//! of them restored, the others map.
//!
//! | below the folder | what |
//! |---|---|
//! | `<id>/` | a snapshot, whole and verified, its files read-only |
//! | `<id>.<id>.partial/` | one that is being restored, or whose restore broke off |
//! | `<id>.lock` | who restores or removes it holds this exclusively, who uses it shares it; its content is the snapshot's bytes |
//! | `lock` | held exclusively while room is made |
//!
//! All of this is held by `flock`: what a process that was killed held is free. The bytes in lock files never add up to more than the bound;
//! a snapshot that is in use never goes to make room, so that what is mapped is counted.

use std::fs::{self, File as Opened, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::caps;
use crate::fill::{blocking, has, parts};
use crate::manifest::{Commit, File, is_id};
use crate::progress::Progress;
use crate::restore::{RestoreError, partial, restore_files, written};
use crate::store::Store;

/// Why a cache does not hold a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Its folder.
    #[error("the cache {} cannot be used: {why}", folder.display())]
    Folder {
        /// Which.
        folder: PathBuf,
        /// Why.
        why: String,
    },
    /// The snapshot is larger than the cache.
    #[error("the snapshot has {needed} bytes, and the cache {} may hold {bound}; raise its bound", folder.display())]
    TooLarge {
        /// The cache.
        folder: PathBuf,
        /// Bytes of the snapshot.
        needed: u64,
        /// Of the cache.
        bound: u64,
    },
    /// What is in use leaves no room.
    #[error("the snapshot has {needed} bytes; of the {bound} that the cache {} may hold, processes use {used}; end one of them, or raise the bound", folder.display())]
    Full {
        /// The cache.
        folder: PathBuf,
        /// Bytes of the snapshot.
        needed: u64,
        /// Of the cache.
        bound: u64,
        /// Of what is in use.
        used: u64,
    },
    /// A file of it is damaged, and another process uses it.
    #[error("{} is damaged, and another process uses it; end that process, or remove the snapshot from the cache", .0.display())]
    Damaged(PathBuf),
    /// The restore.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// See the head of this file.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
    bytes: u64,
}

/// A snapshot in a cache. It stays there while this lives.
#[derive(Debug)]
pub struct Kept {
    /// Its folder.
    pub folder: PathBuf,
    _lock: Opened,
}

/// What a cache holds of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The snapshot.
    pub id: String,
    /// Its bytes.
    pub bytes: u64,
    /// All of it is there.
    pub is_whole: bool,
    /// A process uses it, or restores it.
    pub is_used: bool,
    /// When it was last asked for.
    pub used_at: SystemTime,
}

fn try_lock(file: &Opened, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn open_lock(path: &Path) -> io::Result<Opened> {
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(path)
}

/// A lock file that is held exclusively. Its end unlocks it: closing it would not, where a child that was forked meanwhile has it open, too.
#[derive(Debug)]
struct Exclusive(Opened);

impl Exclusive {
    /// None: somebody else holds it.
    fn try_of(file: Opened) -> io::Result<Option<Self>> {
        Ok(try_lock(&file, FlockOperation::NonBlockingLockExclusive)?.then_some(Self(file)))
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        // Its file may be on a system that is gone; then there is nothing to unlock.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Whether an open file is still the one of that name: whoever made room may have removed it.
fn is_still(file: &Opened, path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(there) => Ok(there.ino() == file.metadata()?.ino()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Cache {
    /// Opens a cache, or makes it. It must be this user's own: what it holds is believed.
    pub fn open(folder: &Path, bytes: u64) -> Result<Self, CacheError> {
        let failed = |why: String| CacheError::Folder { folder: folder.to_owned(), why };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| failed(error.to_string()))?;
        let meta = fs::symlink_metadata(folder).map_err(|error| failed(error.to_string()))?;
        if !meta.is_dir() {
            return Err(failed("it is no folder".into()));
        }
        if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
            return Err(failed("others may write to it; name a folder that only this user writes to".into()));
        }
        Ok(Self { folder: folder.to_owned(), bytes })
    }

    fn lock_path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.lock"))
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> CacheError {
        let folder = self.folder.clone();
        move |error| CacheError::Folder { folder, why: error.to_string() }
    }

    /// Holds a snapshot: it is restored where it is not there yet. Processes that ask at once wait for the one that restores it. With
    /// `check`, every byte of what is there is verified again, and restored where it is damaged.
    pub async fn hold(
        &self,
        store: &Store,
        commit: &Commit,
        check: bool,
        progress: &Arc<Progress>,
    ) -> Result<Kept, CacheError> {
        let folder = self.folder.join(&commit.id);
        let mut is_checked = !check;
        loop {
            let lock = open_lock(&self.lock_path(&commit.id)).map_err(self.failed())?;
            if folder.is_dir() {
                if let Some(lock) = self.share(lock, &commit.id, &folder).map_err(self.failed())? {
                    if is_checked {
                        return Ok(Kept { folder, _lock: lock });
                    }
                    is_checked = self.check(store, commit, &folder, lock, progress).await?;
                    continue;
                }
            } else if let Some(lock) = self.exclude(lock, &commit.id).map_err(self.failed())?
                && !folder.is_dir()
            {
                self.restore(store, commit, lock, progress).await?;
                // Every byte was just verified.
                is_checked = true;
                continue;
            }
            tokio::time::sleep(Duration::from_millis(caps::LOCK_POLL_MS)).await;
        }
    }

    fn share(&self, lock: Opened, id: &str, folder: &Path) -> io::Result<Option<Opened>> {
        let got = try_lock(&lock, FlockOperation::NonBlockingLockShared)?;
        if !got || !is_still(&lock, &self.lock_path(id))? || !folder.is_dir() {
            return Ok(None);
        }
        // What was asked for last goes last.
        lock.set_modified(SystemTime::now())?;
        Ok(Some(lock))
    }

    fn exclude(&self, lock: Opened, id: &str) -> io::Result<Option<Exclusive>> {
        let Some(lock) = Exclusive::try_of(lock)? else { return Ok(None) };
        Ok(is_still(&lock.0, &self.lock_path(id))?.then_some(lock))
    }

    async fn restore(
        &self,
        store: &Store,
        commit: &Commit,
        mut lock: Exclusive,
        progress: &Arc<Progress>,
    ) -> Result<(), CacheError> {
        // What the commit says of its bytes is believed once its files come to that.
        let files = store.files(commit).await.map_err(RestoreError::from)?;
        let (cache, id, needed) = (self.clone(), commit.id.clone(), commit.totals.bytes);
        let made = tokio::task::spawn_blocking(move || {
            cache.make_room(&id, needed, &mut lock.0)?;
            Ok::<_, CacheError>(lock)
        });
        let lock = made.await.map_err(|error| self.failed()(io::Error::other(error)))??;
        let folder = self.folder.join(&commit.id);
        let left = partial(&folder, &commit.id);
        // What a check or a process that was killed left has read-only files.
        blocking(move || if left.is_dir() { chmod_all(&left, 0o600) } else { Ok(()) }).await.map_err(self.failed())?;
        restore_files(store, commit, files, &folder, progress).await?;
        // Nobody writes to a file by mistake that others have mapped.
        blocking(move || chmod_all(&folder, 0o400)).await.map_err(self.failed())?;
        drop(lock);
        Ok(())
    }

    /// Removes what was used longest ago until a snapshot of so many bytes fits, and writes down that it takes them.
    fn make_room(&self, id: &str, needed: u64, lock: &mut Opened) -> Result<(), CacheError> {
        let (folder, bound) = (self.folder.clone(), self.bytes);
        if needed > bound {
            return Err(CacheError::TooLarge { folder, needed, bound });
        }
        let whole = open_lock(&self.folder.join("lock")).map_err(self.failed())?;
        flock(&whole, FlockOperation::LockExclusive).map_err(|error| self.failed()(error.into()))?;
        let _whole = Exclusive(whole);
        let mut others: Vec<Entry> = self.ls()?.into_iter().filter(|entry| entry.id != id).collect();
        others.sort_by_key(|entry| entry.used_at);
        let mut used: u64 = others.iter().map(|entry| entry.bytes).sum();
        let mut count = others.len();
        for entry in others {
            if used.saturating_add(needed) <= bound && count < caps::CACHED_MAX {
                break;
            }
            if self.remove(&entry.id)? {
                used -= entry.bytes;
                count -= 1;
            }
        }
        if used.saturating_add(needed) > bound || count >= caps::CACHED_MAX {
            return Err(CacheError::Full { folder, needed, bound, used });
        }
        lock.set_len(0).and_then(|()| lock.write_all(needed.to_string().as_bytes())).map_err(self.failed())
    }

    /// Removes a snapshot from the cache; false where it is in use.
    pub fn remove(&self, id: &str) -> Result<bool, CacheError> {
        let path = self.lock_path(id);
        let lock = open_lock(&path).map_err(self.failed())?;
        let Some(_lock) = self.exclude(lock, id).map_err(self.failed())? else { return Ok(false) };
        let folder = self.folder.join(id);
        let gone = remove_folder(&folder).and_then(|()| remove_folder(&partial(&folder, id)));
        gone.and_then(|()| fs::remove_file(&path)).map_err(self.failed())?;
        Ok(true)
    }

    /// What there is.
    pub fn ls(&self) -> Result<Vec<Entry>, CacheError> {
        let read = || -> io::Result<Vec<Entry>> {
            let mut all = Vec::new();
            for entry in fs::read_dir(&self.folder)? {
                let name = entry?.file_name();
                let id = name.to_str().and_then(|name| name.strip_suffix(".lock")).filter(|id| is_id(id));
                if let Some(id) = id {
                    all.extend(self.entry(id)?);
                }
            }
            Ok(all)
        };
        read().map_err(self.failed())
    }

    fn entry(&self, id: &str) -> io::Result<Option<Entry>> {
        let opened = OpenOptions::new().read(true).open(self.lock_path(id));
        let mut lock = match opened {
            // It went meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let mut bytes = String::new();
        (&mut lock).take(32).read_to_string(&mut bytes)?;
        let used_at = lock.metadata()?.modified()?;
        let is_used = Exclusive::try_of(lock)?.is_none();
        let (bytes, is_whole) = (bytes.trim().parse().unwrap_or(0), self.folder.join(id).is_dir());
        Ok(Some(Entry { id: id.to_owned(), bytes, is_whole, is_used, used_at }))
    }

    /// Verifies what is there; false where something was damaged, and has been taken away.
    async fn check(
        &self,
        store: &Store,
        commit: &Commit,
        folder: &Path,
        lock: Opened,
        progress: &Arc<Progress>,
    ) -> Result<bool, CacheError> {
        let files = store.files(commit).await.map_err(RestoreError::from)?;
        progress.total.store(commit.totals.bytes, std::sync::atomic::Ordering::Relaxed);
        let mut damaged = Vec::new();
        for file in &files {
            let path = folder.join(&file.path);
            match is_whole(&path, file, progress).await.map_err(written(&path)) {
                Ok(true) => {}
                Ok(false) => damaged.push(&file.path),
                Err(error) => return Err(error.into()),
            }
        }
        let Some(first) = damaged.first() else { return Ok(true) };
        let Some(_lock) = self.exclude(lock, &commit.id).map_err(self.failed())? else {
            return Err(CacheError::Damaged(folder.join(first)));
        };
        if !folder.is_dir() {
            // Another process was faster.
            return Ok(false);
        }
        // First it is no snapshot any more: whatever ends this, nobody takes what is left for whole. A restore goes on with it, and
        // reads what is gone.
        let left = partial(folder, &commit.id);
        remove_folder(&left).and_then(|()| fs::rename(folder, &left)).map_err(self.failed())?;
        damaged.iter().try_for_each(|path| remove_file(&left.join(path))).map_err(self.failed())?;
        progress.done.store(0, std::sync::atomic::Ordering::Relaxed);
        Ok(false)
    }
}

async fn is_whole(path: &Path, file: &File, progress: &Arc<Progress>) -> io::Result<bool> {
    let opened = match Opened::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        other => Arc::new(other?),
    };
    if opened.metadata()?.len() != file.bytes {
        return Ok(false);
    }
    for (start, extent) in parts(file) {
        if !has(Arc::clone(&opened), start, extent).await? {
            return Ok(false);
        }
        Progress::add(&progress.found, extent.bytes);
        Progress::add(&progress.done, extent.bytes);
    }
    Ok(true)
}

fn chmod(path: &Path, mode: u32) -> io::Result<()> {
    let runs = fs::symlink_metadata(path)?.mode() & 0o100;
    fs::set_permissions(path, Permissions::from_mode(mode | runs))
}

fn chmod_all(folder: &Path, mode: u32) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => chmod_all(&entry.path(), mode)?,
            false => chmod(&entry.path(), mode)?,
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
mod tests {
    use super::{Exclusive, open_lock};

    /// A child that is forked has its parent's open files: so does a copy of the descriptor.
    #[test]
    fn a_child_that_was_forked_keeps_no_lock() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("lock");
        let lock = open_lock(&path).unwrap();
        let of_child = lock.try_clone().unwrap();
        let held = Exclusive::try_of(lock).unwrap();
        assert!(held.is_some() && Exclusive::try_of(open_lock(&path).unwrap()).unwrap().is_none());
        drop(held);
        assert!(Exclusive::try_of(open_lock(&path).unwrap()).unwrap().is_some());
        drop(of_child);
    }
}
