//! The file of a volume: opened past the page cache where the file system can, made longer in whole
//! segments, and given back in holes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, Mode, OFlags};

/// One open file.
#[derive(Debug)]
pub struct VolumeFile {
    file: File,
    path: PathBuf,
    direct: bool,
}

impl VolumeFile {
    /// Opens `path`, or makes it, mode 0600. Symbolic links are not followed.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        let (fd, direct) = match rustix::fs::open(path, flags | OFlags::DIRECT, mode) {
            Ok(fd) => (fd, true),
            Err(rustix::io::Errno::INVAL) => {
                tracing::warn!(path = %path.display(), "the file system has no direct I/O, so blocks go through the page cache");
                (rustix::fs::open(path, flags, mode)?, false)
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Self { file: File::from(fd), path: path.to_owned(), direct })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether transfers go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Takes disk space for `bytes` from `offset`, so that writing there cannot run out of it.
    pub fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, bytes) {
            // A file system without it: the file grows, and a write may find no space.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                if self.bytes()? < offset + bytes {
                    self.file.set_len(offset + bytes)?;
                }
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// Bytes that the file system has left.
    pub fn room(&self) -> io::Result<u64> {
        let system = rustix::fs::fstatvfs(&self.file)?;
        Ok(system.f_bavail.saturating_mul(system.f_frsize))
    }

    /// Gives the disk space of `bytes` from `offset` back; they read as zero then.
    pub fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, bytes)?)
    }

    /// Cuts the file off: what lay behind is gone.
    pub fn cut(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    /// Bytes of disk that the file takes.
    pub fn allocated(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.file.metadata()?.blocks() * 512)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }
}

impl AsFd for VolumeFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
