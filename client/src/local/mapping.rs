//! Mappings of what the daemon passed: never inherited by a child, unmapped once.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use kvstore_plane::{SlabHeader, SlotEntry};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use tokio::sync::OwnedSemaphorePermit;

use super::fork::forks;
use crate::Error;

/// Bytes of a huge page.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Shared memory, mapped.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    /// A child has no such memory: see [`forks`].
    forks: u64,
}

// SAFETY: plain shared memory that lives as long as this value; users go through atomics, or through leases.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// How a region is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// Where so many bytes could go just now, so that the daemon's huge pages are huge here, too. Null, which leaves it to the kernel,
/// where there is no such place.
fn aligned_address(bytes: usize) -> *mut c_void {
    let (room, flags) = (bytes + HUGE_PAGE_BYTES, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a fresh mapping that nothing is ever read from or written to; it aliases nothing of ours.
    let found = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), flags) };
    let Ok(found) = found else { return std::ptr::null_mut() };
    // SAFETY: the mapping of the line above, unmapped once.
    let _ = unsafe { rustix::mm::munmap(found, room) };
    found.map_addr(|address| address.next_multiple_of(HUGE_PAGE_BYTES))
}

impl Mapping {
    /// Maps the first `bytes` bytes of `fd`, which must have them.
    pub(crate) fn new(fd: &OwnedFd, bytes: u64, access: Access) -> Result<Self, Error> {
        let failed = |error: rustix::io::Errno| Error::Unavailable(format!("cannot map the daemon's memory: {error}"));
        let size = rustix::fs::fstat(fd).map_err(failed)?.st_size;
        if bytes == 0 || size < 0 || (size as u64) < bytes {
            return Err(Error::Unavailable(format!("the daemon passed {size} bytes of memory, but announced {bytes}")));
        }
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        let bytes = bytes as usize;
        let at = if bytes >= HUGE_PAGE_BYTES { aligned_address(bytes) } else { std::ptr::null_mut() };
        // SAFETY: a fresh mapping, at the address of our wish or of the kernel's choice; it aliases nothing of ours.
        let base = unsafe { rustix::mm::mmap(at, bytes, protection, MapFlags::SHARED, fd, 0) };
        let base = NonNull::new(base.map_err(failed)?.cast()).ok_or_else(|| failed(rustix::io::Errno::NOMEM))?;
        let mapping = Self { base, bytes, forks: forks() };
        // SAFETY: advice on our own mapping that changes no contents.
        unsafe { rustix::mm::madvise(base.as_ptr().cast::<c_void>(), bytes, Advice::LinuxDontFork) }.map_err(failed)?;
        Ok(mapping)
    }

    /// Maps the pages now, so that no access waits for the kernel. Best effort.
    pub(crate) fn populate(&self, access: Access) {
        let advice = match access {
            Access::Read => Advice::LinuxPopulateRead,
            Access::Write => Advice::LinuxPopulateWrite,
        };
        // SAFETY: faults in our own mapping; contents stay as they are.
        let _ = unsafe { rustix::mm::madvise(self.base.as_ptr().cast::<c_void>(), self.bytes, advice) };
    }

    /// All of it, as words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped and page-aligned for as long as self lives; others may change it at any time, as atomics may be.
        // The compiler is never told of a write here where the mapping is read-only.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.bytes / 8) }
    }

    /// Where `offset` is; `None` unless `bytes` bytes from there on are inside.
    pub(crate) fn at(&self, offset: u64, bytes: u64) -> Option<NonNull<u8>> {
        let end = offset.checked_add(bytes)?;
        // SAFETY: inside the mapping, by the check.
        (end <= self.bytes as u64).then(|| unsafe { self.base.add(offset as usize) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.forks == forks() {
            // SAFETY: our own mapping, unmapped once; whatever points into it borrows or shares self. In a child the
            // addresses may be somebody else's, and are left alone.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
        }
    }
}

// SAFETY: a mapping, and a pointer into it to atomics.
unsafe impl Send for MappedSlab {}
// SAFETY: as above.
unsafe impl Sync for MappedSlab {}

/// One slab, mapped for reading.
pub(crate) struct MappedSlab {
    mapping: Mapping,
    header: SlabHeader,
    /// The slot directory, which the mapping holds.
    entries: NonNull<SlotEntry>,
    /// Told apart by this where a number is used again.
    pub(crate) serial: u64,
    /// Its file, where the client maps blocks once more.
    file: Option<(OwnedFd, OwnedSemaphorePermit)>,
}

impl MappedSlab {
    /// Maps a slab, and believes its header only where it is the announced one's.
    pub(crate) fn new(fd: &OwnedFd, serial: u64, epoch: u64, namespace_digest: &[u8; 32]) -> Result<Self, Error> {
        let wrong = |problem: String| Error::Unavailable(format!("a slab of the daemon cannot be used: {problem}"));
        let first = Mapping::new(fd, kvstore_plane::HEADER_BYTES as u64, Access::Read)?;
        let page: Vec<u8> = first
            .words()
            .iter()
            .flat_map(|word| word.load(std::sync::atomic::Ordering::Relaxed).to_ne_bytes())
            .collect();
        let header = SlabHeader::decode(&page).map_err(|error| wrong(error.to_string()))?;
        if header.epoch != epoch || header.namespace_digest != *namespace_digest || u64::from(header.slab) != serial {
            return Err(wrong("it belongs to another run of the daemon, or to another namespace".into()));
        }
        let mapping = Mapping::new(fd, header.geometry.slab_bytes, Access::Read)?;
        let range = header.geometry.directory();
        let entries =
            mapping.at(range.start, range.end - range.start).ok_or_else(|| wrong("it is too short".into()))?;
        let entries = entries.cast();
        Ok(Self { mapping, header, entries, serial, file: None })
    }

    /// Keeps the file, of so many as may be kept.
    pub(crate) fn keep(&mut self, file: OwnedFd, permit: OwnedSemaphorePermit) {
        self.file = Some((file, permit));
    }

    /// Where a byte of it lies in its file, which is kept.
    pub(crate) fn place(&self, byte: NonNull<u8>) -> Option<(BorrowedFd<'_>, u64)> {
        let offset = (byte.as_ptr() as usize).checked_sub(self.mapping.base.as_ptr() as usize)?;
        let (file, _) = self.file.as_ref().filter(|_| offset < self.mapping.bytes)?;
        Some((file.as_fd(), offset as u64))
    }

    /// The slot directory.
    pub(crate) fn directory(&self) -> &[SlotEntry] {
        // SAFETY: slot_count entries are inside the mapping (new), 64-byte aligned (page + 64 n), and atomics alone.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.header.geometry.slot_count as usize) }
    }

    /// Where the first `length` bytes of a slot are; `None` where a slot has not that many.
    pub(crate) fn slot(&self, slot: u32, length: u32) -> Option<NonNull<u8>> {
        let geometry = &self.header.geometry;
        if slot >= geometry.slot_count || u64::from(length) > geometry.slot_bytes {
            return None;
        }
        self.mapping.at(geometry.slots_offset + u64::from(slot) * geometry.slot_bytes, u64::from(length))
    }
}
