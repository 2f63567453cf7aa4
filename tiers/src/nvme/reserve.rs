//! The reserve of an index: disk space that is taken while there is some and given up where the index needs it on a full file
//! system. RocksDB wants to write a table before it opens a log, and a deletion is a write too: without a reserve, a full disk
//! would take neither.

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// See the head of this file.
pub(super) struct Reserve {
    path: PathBuf,
    bytes: u64,
    /// It was given up, and not taken again since.
    is_given_up: AtomicBool,
}

impl Reserve {
    /// Of `bytes`, in the file `path`. One that was given up before a restart still is: its file is empty.
    pub fn new(path: PathBuf, bytes: u64) -> Self {
        let is_empty = std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() == 0);
        Self { path, bytes, is_given_up: AtomicBool::new(is_empty) }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of disk that it has.
    pub fn disk_bytes(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Takes its disk space, where it has it not. On a file system that cannot reserve any, there is no reserve.
    pub fn take(&self) -> io::Result<()> {
        if self.disk_bytes() >= self.bytes {
            return Ok(());
        }
        let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(&self.path)?;
        let before = file.metadata()?.len();
        let taken = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, self.bytes);
        let can_be = !matches!(taken, Err(Errno::OPNOTSUPP | Errno::NOSYS));
        if taken.is_ok() || !can_be {
            self.is_given_up.store(false, Ordering::Release);
        }
        if taken.is_err() {
            // A part of it would be of no use. An empty file says that it was given up.
            match before > 0 || self.is_given_up() {
                true => file.set_len(before)?,
                false => std::fs::remove_file(&self.path)?,
            }
        }
        if can_be { taken.map_err(io::Error::from) } else { Ok(()) }
    }

    /// Gives its disk space up; false where it had none.
    pub fn give_up(&self) -> bool {
        let had = self.disk_bytes() > 0;
        let given = had && File::options().write(true).open(&self.path).and_then(|file| file.set_len(0)).is_ok();
        self.is_given_up.fetch_or(given, Ordering::AcqRel);
        given
    }

    /// True from then on until it is taken again.
    pub fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_taken_and_given_up() {
        let path = std::env::temp_dir().join(format!("kvstore-reserve-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let reserve = Reserve::new(path.clone(), 1 << 20);
        assert!(!reserve.give_up(), "nothing was taken yet");
        reserve.take().unwrap();
        if !path.exists() {
            println!("skipped: a file system without fallocate");
            return;
        }
        assert!(reserve.disk_bytes() >= 1 << 20 && !reserve.is_given_up());
        assert!(reserve.give_up() && reserve.disk_bytes() == 0 && !reserve.give_up());
        let reserve = Reserve::new(path.clone(), 1 << 20);
        assert!(reserve.is_given_up(), "a restart forgot that the index lives on it");
        reserve.take().unwrap();
        assert!(!reserve.is_given_up() && !Reserve::new(path.clone(), 1 << 20).is_given_up());
        // More than any file system has.
        assert!(Reserve::new(path.clone(), 1 << 60).take().is_err());
        assert!(reserve.disk_bytes() >= 1 << 20, "what was there is there");
        std::fs::remove_file(&path).unwrap();
    }

    /// One that could never be taken was not given up: the next start does not wait for room for it.
    #[test]
    fn what_was_never_taken_is_not_given_up() {
        let path = std::env::temp_dir().join(format!("kvstore-no-reserve-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let _ = Reserve::new(path.clone(), 1 << 60).take();
        assert!(!path.exists() && !Reserve::new(path, 1 << 60).is_given_up());
    }
}
