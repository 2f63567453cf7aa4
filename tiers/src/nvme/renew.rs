//! A new index in the place of a damaged one. It is built beside that one, as `index.part`, with what could still be read of it: a pin
//! is nowhere else. Complete and synced, it is called `index.new`, which is the moment that counts; only then does the old one go. A
//! daemon that ends before leaves the old index as it was; one that ends after leaves its successor to finish.
//!
//! The mark is set last: until then it says that changes are missing, which is no more than that the scan has to be made.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use kvstore_rocksdb::WriteOptions;

use super::batch::IndexBatch;
use super::index::{Index, IndexError, Writing};
use super::mark::Mark;
use super::ring::{Ring, place_of};

/// The number of the batch with which a new index begins.
const FIRST: u64 = 1;

impl Index {
    /// Puts a new index in the place of what is there, where that is asked for, or was begun by an earlier daemon.
    pub(super) fn renew(&self, writing: &mut Writing) -> Result<(), IndexError> {
        let [part, new] = self.paths_beside();
        if !new.try_exists().map_err(in_file(&new))? {
            remove_folder(&part).map_err(in_file(&part))?;
            let Some(kept) = &writing.anew else { return Ok(()) };
            if let Err(error) = self.build(&part, kept.copy()) {
                // It may have what the file system lacks.
                let _ = remove_folder(&part);
                return Err(error);
            }
            rename(&part, &new).map_err(in_file(&new))?;
        }
        remove_folder(&self.path).map_err(in_file(&self.path))?;
        rename(&new, &self.path).map_err(in_file(&self.path))?;
        let path = self.mark_path();
        Mark::create(&path).and_then(|mark| mark.set_synced(FIRST)).map_err(in_file(&path))?;
        (writing.ring, writing.anew) = (Ring::opened(FIRST), None);
        Ok(())
    }

    /// Refuses where a new index is there that has yet to take the place of the old one.
    pub(super) fn check_not_renewing(&self) -> Result<(), IndexError> {
        let [_, new] = self.paths_beside();
        match new.try_exists().map_err(in_file(&new))? {
            true => Err(IndexError::Closed),
            false => Ok(()),
        }
    }

    fn paths_beside(&self) -> [PathBuf; 2] {
        ["index.part", "index.new"].map(|name| self.path.with_file_name(name))
    }

    fn build(&self, path: &Path, mut kept: IndexBatch) -> Result<(), IndexError> {
        let db = self.open_db(path)?;
        kept.put_version();
        kept.put_link(place_of(FIRST), FIRST);
        let mut options = WriteOptions::default();
        options.set_sync(true);
        db.write_opt(kept.into_inner(), &options).map_err(|error| self.error(error))
    }
}

fn in_file(path: &Path) -> impl Fn(io::Error) -> IndexError {
    let path = path.to_owned();
    move |cause| IndexError::File { path: path.clone(), cause }
}

fn remove_folder(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        // What is no folder was not made here: it is put aside.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => rename(path, &path.with_extension("aside")),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Renames a folder, safe from a loss of power.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    to.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
