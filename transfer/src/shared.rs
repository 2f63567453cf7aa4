//! Memory that the daemon made and shares: key tables, pages of attachments, staging. Each region is one memfd that nobody
//! can shrink, grow or seal anew; whether others may write to it is decided when it is made.

use std::ffi::{CStr, c_void};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_plane::TableMemory;
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Who writes to a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writers {
    /// This process alone.
    Daemon,
    /// Whoever is given the descriptor, too: nothing in it is to be believed.
    Anyone,
}

/// One region: zero at first, 8-byte words.
pub struct SharedMemory {
    fd: OwnedFd,
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: plain shared memory that lives as long as this value, reached through atomics alone.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes and maps a region. Its memory is taken as it is touched.
    pub fn create(name: &CStr, bytes: u64, writers: Writers) -> std::io::Result<Self> {
        let bytes = bytes.next_multiple_of(4096);
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; it aliases nothing of ours.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes as usize, protection, MapFlags::SHARED, &fd, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        let region = Self { fd, base, words: bytes as usize / 8 };
        // A memfd is mode 0777 by default, and a read-only descriptor can be reopened through /proc.
        rustix::fs::fchmod(&region.fd, Mode::RUSR | Mode::WUSR)?;
        let mut seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        if writers == Writers::Daemon {
            seals |= SealFlags::FUTURE_WRITE;
        }
        rustix::fs::fcntl_add_seals(&region.fd, seals)?;
        Ok(region)
    }

    /// Takes all of its memory now, so that no later access waits for the kernel.
    pub fn populate(&self) -> std::io::Result<()> {
        // SAFETY: faults in our own mapping; contents stay as they are.
        match unsafe {
            rustix::mm::madvise(self.base.as_ptr().cast::<c_void>(), self.words * 8, Advice::LinuxPopulateWrite)
        } {
            // Kernels before 5.14.
            Err(rustix::io::Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }

    /// How large it is.
    pub fn byte_len(&self) -> u64 {
        self.words as u64 * 8
    }

    /// All of it.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped and aligned for as long as self lives; AtomicU64 may be changed by anyone at any time.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }

    /// Copies `to.len()` bytes from `offset` on, a multiple of 8, while others may write there: what is copied is what they
    /// had there at some moment, word by word. False where they are not all inside.
    pub fn copy_racy(&self, offset: u64, to: &mut [u8]) -> bool {
        let end = offset.checked_add(to.len() as u64).filter(|end| *end <= self.byte_len());
        if end.is_none() || !offset.is_multiple_of(8) {
            return false;
        }
        let words = self.words().get(offset as usize / 8..).unwrap_or_default();
        let (whole, rest) = to.as_chunks_mut::<8>();
        // A line at a time: the loads of a line do not wait for each other.
        let (lines, tail) = whole.as_chunks_mut::<8>();
        for (to, from) in lines.iter_mut().zip(words.as_chunks::<8>().0) {
            let line: [u64; 8] =
                std::array::from_fn(|word| from.get(word).map_or(0, |word| word.load(Ordering::Relaxed)));
            to.iter_mut().zip(line).for_each(|(to, word)| *to = word.to_ne_bytes());
        }
        for (to, from) in tail.iter_mut().zip(words.get(lines.len() * 8..).unwrap_or_default()) {
            *to = from.load(Ordering::Relaxed).to_ne_bytes();
        }
        if let Some(last) = words.get(whole.len()).filter(|_| !rest.is_empty()) {
            let last = last.load(Ordering::Relaxed).to_ne_bytes();
            rest.iter_mut().zip(last).for_each(|(to, from)| *to = from);
        }
        true
    }
}

impl TableMemory for SharedMemory {
    fn words(&self) -> &[AtomicU64] {
        Self::words(self)
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once; every reference into it borrows self.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.words * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_shrinks_grows_or_writes_what_is_the_daemons() {
        let region = SharedMemory::create(c"kvstore-test", 8192, Writers::Daemon).unwrap();
        assert!(rustix::fs::ftruncate(region.as_fd(), 0).is_err());
        assert!(rustix::fs::ftruncate(region.as_fd(), 1 << 20).is_err());
        assert!(rustix::io::write(region.as_fd(), b"x").is_err());
        let staging = SharedMemory::create(c"kvstore-test", 8192, Writers::Anyone).unwrap();
        assert!(rustix::fs::ftruncate(staging.as_fd(), 0).is_err());
        assert!(rustix::io::write(staging.as_fd(), b"x").is_ok());
    }

    #[test]
    fn a_racy_copy_stays_inside() {
        let region = SharedMemory::create(c"kvstore-test", 4096, Writers::Anyone).unwrap();
        region.words()[1].store(u64::from_ne_bytes(*b"abcdefgh"), Ordering::Relaxed);
        let mut to = [0; 5];
        assert!(region.copy_racy(8, &mut to));
        assert_eq!(&to, b"abcde");
        for offset in [4, 4096 - 4, 4096, 1 << 40, u64::MAX, u64::MAX - 7] {
            assert!(!region.copy_racy(offset, &mut to), "{offset}");
        }
        assert!(region.copy_racy(4096 - 8, &mut to));
    }
}
