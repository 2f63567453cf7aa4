//! A slab: one memfd of equal slots with their directory, mapped writable here and by nobody else.
//!
//! Owns the memfd and its mapping; both live until the last `Arc` goes, so that whoever holds bytes keeps
//! them mapped. All slots are faulted in at creation: filling one never waits for the kernel.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvstore_plane::{SlabGeometry, SlabHeader, SlotEntry};
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Whether slabs ask for huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePages {
    /// hugetlbfs pages where the system has free ones, else transparent huge pages where it allows them,
    /// else ordinary pages.
    #[default]
    Auto,
    /// Ordinary pages.
    Off,
}

/// A slab could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} a slab of {bytes} bytes: {source}")]
pub struct SlabError {
    /// Which step failed.
    pub step: &'static str,
    /// How large the slab was to be.
    pub bytes: u64,
    /// What the system said.
    pub source: std::io::Error,
}

/// One memfd of equal slots.
pub struct Slab {
    fd: OwnedFd,
    base: NonNull<u8>,
    header: SlabHeader,
    /// Where the slab's bytes are counted while they exist.
    accounted: Arc<AtomicU64>,
}

// SAFETY: the mapping is plain shared memory that lives as long as the Slab. Its directory is atomics;
// its slots are reached through SlotFill and SlotBytes alone, whose makers promise exclusion.
unsafe impl Send for Slab {}
// SAFETY: as above; no method of &Slab writes without atomics.
unsafe impl Sync for Slab {}

impl Slab {
    /// Makes, maps, faults in and seals a slab. Takes milliseconds: call it where blocking is allowed.
    /// Its bytes are in `accounted` already, and are taken out when it is unmapped or could not be made: so
    /// that at no moment they count twice, or not at all.
    pub fn create(header: SlabHeader, huge: HugePages, accounted: Arc<AtomicU64>) -> Result<Self, SlabError> {
        let bytes = header.geometry.slab_bytes;
        let failed =
            |step: &'static str| move |errno: rustix::io::Errno| SlabError { step, bytes, source: errno.into() };
        let (fd, base) = match huge {
            HugePages::Auto if bytes.is_multiple_of(2 << 20) => {
                map(bytes, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).or_else(|_| map(bytes, MemfdFlags::empty()))
            }
            _ => map(bytes, MemfdFlags::empty()),
        }
        .map_err(|errno| {
            accounted.fetch_sub(bytes, Ordering::AcqRel);
            failed("map")(errno)
        })?;
        let slab = Self { fd, base, header, accounted };
        slab.populate(huge).map_err(failed("fault in"))?;
        slab.write_header();
        // A memfd is mode 0777 by default, and a read-only descriptor can be reopened through /proc.
        rustix::fs::fchmod(&slab.fd, Mode::RUSR | Mode::WUSR).map_err(failed("restrict"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&slab.fd, seals).map_err(failed("seal"))?;
        Ok(slab)
    }

    /// What the first page says.
    pub fn header(&self) -> &SlabHeader {
        &self.header
    }

    /// Where things lie in the slab.
    pub fn geometry(&self) -> &SlabGeometry {
        &self.header.geometry
    }

    /// The slot directory.
    pub fn directory(&self) -> &[SlotEntry] {
        let range = self.header.geometry.directory();
        // SAFETY: the directory lies inside the mapping (SlabGeometry puts it before the slots).
        let first = unsafe { self.base.add(range.start as usize) };
        // SAFETY: it is 64-byte aligned (page + 64 n), create() wrote every entry before anyone could ask,
        // and SlotEntry is atomics alone, so shared references stay valid while entries change.
        unsafe { std::slice::from_raw_parts(first.as_ptr().cast(), self.header.geometry.slot_count as usize) }
    }

    /// Where the bytes of `slot` start; `None` beyond the last slot.
    pub(crate) fn slot_start(&self, slot: u32) -> Option<NonNull<u8>> {
        let range = self.header.geometry.slot(slot)?;
        // SAFETY: SlabGeometry::slot gives ranges inside the slab, all of which is mapped.
        Some(unsafe { self.base.add(range.start as usize) })
    }

    /// The whole mapping, for registration with the kernel.
    pub(crate) fn mapping(&self) -> (NonNull<u8>, usize) {
        (self.base, self.header.geometry.slab_bytes as usize)
    }

    fn populate(&self, huge: HugePages) -> rustix::io::Result<()> {
        let len = self.header.geometry.slab_bytes as usize;
        if huge == HugePages::Auto {
            // Best effort: many systems forbid transparent huge pages for shared memory.
            // SAFETY: advice on our own mapping that changes no contents.
            let _ = unsafe { rustix::mm::madvise(self.base.as_ptr().cast::<c_void>(), len, Advice::LinuxHugepage) };
        }
        // SAFETY: faults in our own mapping; contents stay zero.
        match unsafe { rustix::mm::madvise(self.base.as_ptr().cast::<c_void>(), len, Advice::LinuxPopulateWrite) } {
            // Kernels before 5.14 do not know the advice: slots are then faulted in as they are first filled.
            Err(rustix::io::Errno::INVAL) => Ok(()),
            other => other,
        }
    }

    fn write_header(&self) {
        let page = self.header.encode();
        // SAFETY: the first page is mapped, and nobody else knows of the slab yet.
        unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), self.base.as_ptr(), page.len()) };
        let range = self.header.geometry.directory();
        for slot in 0..self.header.geometry.slot_count as usize {
            let at = range.start as usize + slot * size_of::<SlotEntry>();
            // SAFETY: inside the mapped directory.
            let entry = unsafe { self.base.add(at) };
            // SAFETY: aligned to 64, and nobody else knows of the slab yet.
            unsafe { entry.cast::<SlotEntry>().write(SlotEntry::free()) };
        }
    }
}

impl AsFd for Slab {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let bytes = self.header.geometry.slab_bytes;
        // SAFETY: our own mapping, unmapped once; every reference into it holds an Arc of this slab.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), bytes as usize) };
        self.accounted.fetch_sub(bytes, Ordering::AcqRel);
    }
}

fn map(bytes: u64, flags: MemfdFlags) -> rustix::io::Result<(OwnedFd, NonNull<u8>)> {
    let fd = rustix::fs::memfd_create("kvstore-slab", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | flags)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice; it aliases nothing of ours.
    let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes as usize, protection, MapFlags::SHARED, &fd, 0) }?;
    let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
    Ok((fd, base))
}
