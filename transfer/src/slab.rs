//! A slab: one memfd of equal slots with their directory, mapped writable here and by nobody else.
//!
//! Owns the memfd and its mapping; both live until the last `Arc` goes, so that whoever holds bytes keeps
//! them mapped. All its pages are there before it is a slab: filling a slot never waits for the kernel. Memory can be made ready before
//! it is known what slab it will be.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvstore_plane::{HUGE_PAGES_FROM_BYTES, SlabGeometry, SlabHeader, SlotEntry};
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes of a huge page.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Bytes that are collapsed into huge pages in one go.
const COLLAPSED_BYTES: usize = 16 << 20;
/// What somebody waits for goes on with ordinary pages where that takes longer, since memory is in small pieces: they take 10 ms.
const COLLAPSED_WITHIN: Duration = Duration::from_millis(20);
/// Pages that are made in one go: a tenth of a millisecond's. The kernel keeps the process's map of its memory meanwhile, which other
/// threads may want to change.
const POPULATE_BYTES: usize = 256 << 10;
/// Bytes of an ordinary page.
const PAGE_BYTES: usize = 4096;

/// Whether slabs ask for huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePages {
    /// hugetlbfs pages where the system has free ones, else transparent huge pages where it has memory in such pieces,
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

/// Memory for a slab: a memfd that is mapped, whose pages are there, and that is no slab yet.
#[derive(Debug)]
pub struct SlabMemory {
    fd: OwnedFd,
    base: NonNull<u8>,
    bytes: u64,
    /// Where its bytes are counted while they exist.
    accounted: Arc<AtomicU64>,
}

// SAFETY: a mapping that lives as long as this value, reached through the methods of whoever owns it.
unsafe impl Send for SlabMemory {}
// SAFETY: as above; no method of &SlabMemory writes into the mapping.
unsafe impl Sync for SlabMemory {}

impl SlabMemory {
    /// Maps `bytes` bytes, and has the kernel give them their pages. Takes milliseconds: call it where blocking is allowed.
    /// Its bytes are in `accounted` already, and are taken out when it is unmapped or could not be made: so
    /// that at no moment they count twice, or not at all.
    pub fn create(bytes: u64, huge: HugePages, accounted: Arc<AtomicU64>) -> Result<Self, SlabError> {
        Self::create_within(bytes, huge, accounted, Duration::MAX)
    }

    /// The same, without huge pages beyond the first that take longer than `part` for each [`COLLAPSED_BYTES`].
    fn create_within(
        bytes: u64,
        huge: HugePages,
        accounted: Arc<AtomicU64>,
        part: Duration,
    ) -> Result<Self, SlabError> {
        let mapped = |flags| {
            let (fd, base) = map(bytes, flags)?;
            rustix::io::Result::Ok(Self { fd, base, bytes, accounted: Arc::clone(&accounted) })
        };
        if huge == HugePages::Auto
            && bytes >= HUGE_PAGES_FROM_BYTES
            && bytes.is_multiple_of(HUGE_PAGE_BYTES)
            && let Ok(mut memory) = mapped(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
        {
            if memory.populate().is_ok() {
                return Ok(memory);
            }
            // Promised, and refused all the same, as where a control group has no share of it. What follows counts instead.
            memory.accounted = Arc::default();
        }
        let memory = mapped(MemfdFlags::empty()).map_err(|errno| {
            accounted.fetch_sub(bytes, Ordering::SeqCst);
            failed("map", bytes)(errno)
        })?;
        if huge == HugePages::Auto {
            memory.collapse(part);
        }
        memory.populate().map_err(failed("fault in", bytes))?;
        Ok(memory)
    }

    /// How large it is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Counts its bytes in another place from now on.
    pub fn count_in(&mut self, accounted: &Arc<AtomicU64>) {
        accounted.fetch_add(self.bytes, Ordering::SeqCst);
        self.accounted.fetch_sub(self.bytes, Ordering::SeqCst);
        self.accounted = Arc::clone(accounted);
    }

    /// Asks for huge pages, before any other page is there. Best effort: what it does not get is made of ordinary pages.
    fn collapse(&self, within: Duration) {
        let bytes = self.bytes as usize;
        // SAFETY: advice on our own mapping that changes no contents.
        let _ = unsafe { rustix::mm::madvise(self.base.as_ptr().cast::<c_void>(), bytes, Advice::LinuxHugepage) };
        // Most systems give shared memory no huge pages at its first touch, whatever the advice: `shmem_enabled` is "never". They do
        // give them where a huge page's place has an ordinary page already and is then collapsed.
        for from in (0..bytes).step_by(COLLAPSED_BYTES) {
            let begun = Instant::now();
            let end = bytes.min(from + COLLAPSED_BYTES);
            // Not by a write: where the system has no memory to give, that would end the process.
            let touched =
                (from..end).step_by(HUGE_PAGE_BYTES as usize).try_for_each(|at| self.fault_in(at, PAGE_BYTES));
            if touched.is_err() {
                break;
            }
            // SAFETY: `from` is inside the mapping.
            let part = unsafe { self.base.add(from) };
            // SAFETY: our own mapping, up to `end`; the advice moves pages, and changes no contents.
            let refused = unsafe { libc::madvise(part.as_ptr().cast(), end - from, libc::MADV_COLLAPSE) } != 0;
            if refused || begun.elapsed() > within {
                break;
            }
        }
    }

    fn populate(&self) -> rustix::io::Result<()> {
        let bytes = self.bytes as usize;
        match (0..bytes).step_by(POPULATE_BYTES).try_for_each(|at| self.fault_in(at, POPULATE_BYTES.min(bytes - at))) {
            // Kernels before 5.14 do not know the advice: slots are then faulted in as they are first filled.
            Err(rustix::io::Errno::INVAL) => Ok(()),
            other => other,
        }
    }

    /// Has the kernel give pages to `bytes` bytes from `at` on, which are inside.
    fn fault_in(&self, at: usize, bytes: usize) -> rustix::io::Result<()> {
        // SAFETY: `at` is inside the mapping.
        let from = unsafe { self.base.add(at) };
        // SAFETY: faults in our own mapping; contents stay as they are.
        unsafe { rustix::mm::madvise(from.as_ptr().cast::<c_void>(), bytes, Advice::LinuxPopulateWrite) }
    }

    /// Gives back what is beyond `bytes`.
    fn shrink(&mut self, bytes: u64) -> rustix::io::Result<()> {
        let rest = self.bytes.saturating_sub(bytes);
        if rest == 0 {
            return Ok(());
        }
        rustix::fs::ftruncate(&self.fd, bytes)?;
        // SAFETY: `bytes` is less than self.bytes.
        let from = unsafe { self.base.add(bytes as usize) };
        // SAFETY: the end of our own mapping, which nobody uses: it is no slab yet.
        unsafe { rustix::mm::munmap(from.as_ptr().cast(), rest as usize) }?;
        self.bytes = bytes;
        self.accounted.fetch_sub(rest, Ordering::AcqRel);
        Ok(())
    }
}

impl Drop for SlabMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once; every reference into it holds an Arc of the slab that owns this.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes as usize) };
        self.accounted.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// One memfd of equal slots.
pub struct Slab {
    memory: SlabMemory,
    header: SlabHeader,
}

// The mapping's directory is atomics; its slots are reached through SlotFill and SlotBytes alone, whose makers promise exclusion.
// That, and what SlabMemory says of itself, makes a Slab Send and Sync.

impl Slab {
    /// Makes a slab, as [`SlabMemory::create`] says. Somebody waits for it: it has huge pages where they are soon to be had.
    pub fn create(header: SlabHeader, huge: HugePages, accounted: Arc<AtomicU64>) -> Result<Self, SlabError> {
        let bytes = header.geometry.slab_bytes;
        Self::new(SlabMemory::create_within(bytes, huge, accounted, COLLAPSED_WITHIN)?, header)
    }

    /// Makes `memory` a slab, and seals it. Gives back what the slab does not need of it. Takes
    /// microseconds, or a few milliseconds where that is much.
    pub fn new(mut memory: SlabMemory, header: SlabHeader) -> Result<Self, SlabError> {
        let bytes = header.geometry.slab_bytes;
        if memory.bytes < bytes {
            return Err(failed("fit", bytes)(rustix::io::Errno::INVAL));
        }
        memory.shrink(bytes).map_err(failed("shrink", bytes))?;
        let slab = Self { memory, header };
        slab.write_header();
        let fd = &slab.memory.fd;
        // A memfd is mode 0777 by default, and a read-only descriptor can be reopened through /proc.
        rustix::fs::fchmod(fd, Mode::RUSR | Mode::WUSR).map_err(failed("restrict", bytes))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(fd, seals).map_err(failed("seal", bytes))?;
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
        let first = unsafe { self.memory.base.add(range.start as usize) };
        // SAFETY: it is 64-byte aligned (page + 64 n), new() wrote every entry before anyone could ask,
        // and SlotEntry is atomics alone, so shared references stay valid while entries change.
        unsafe { std::slice::from_raw_parts(first.as_ptr().cast(), self.header.geometry.slot_count as usize) }
    }

    /// Where the bytes of `slot` start; `None` beyond the last slot.
    pub(crate) fn slot_start(&self, slot: u32) -> Option<NonNull<u8>> {
        let range = self.header.geometry.slot(slot)?;
        // SAFETY: SlabGeometry::slot gives ranges inside the slab, all of which is mapped.
        Some(unsafe { self.memory.base.add(range.start as usize) })
    }

    /// The whole mapping, for registration with the kernel.
    pub(crate) fn mapping(&self) -> (NonNull<u8>, usize) {
        (self.memory.base, self.header.geometry.slab_bytes as usize)
    }

    fn write_header(&self) {
        let page = self.header.encode();
        // SAFETY: the first page is mapped, and nobody else knows of the slab yet.
        unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), self.memory.base.as_ptr(), page.len()) };
        let range = self.header.geometry.directory();
        for slot in 0..self.header.geometry.slot_count as usize {
            let at = range.start as usize + slot * size_of::<SlotEntry>();
            // SAFETY: inside the mapped directory.
            let entry = unsafe { self.memory.base.add(at) };
            // SAFETY: aligned to 64, and nobody else knows of the slab yet.
            unsafe { entry.cast::<SlotEntry>().write(SlotEntry::free()) };
        }
    }
}

impl AsFd for Slab {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.fd.as_fd()
    }
}

fn failed(step: &'static str, bytes: u64) -> impl Fn(rustix::io::Errno) -> SlabError {
    move |errno| SlabError { step, bytes, source: errno.into() }
}

/// A memfd, and where it is mapped.
fn map(bytes: u64, flags: MemfdFlags) -> rustix::io::Result<(OwnedFd, NonNull<u8>)> {
    let fd = rustix::fs::memfd_create("kvstore-slab", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | flags)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let at = aligned_address(bytes as usize);
    // SAFETY: a fresh mapping, at the address of our wish or of the kernel's choice; it aliases nothing of ours.
    let base = unsafe { rustix::mm::mmap(at, bytes as usize, protection, MapFlags::SHARED, &fd, 0) }?;
    let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
    Ok((fd, base))
}

/// Where so many bytes could go just now, on the boundary of a huge page: a mapping elsewhere could have none. Null, which leaves it
/// to the kernel, where there is no such place.
fn aligned_address(bytes: usize) -> *mut c_void {
    let room = bytes + HUGE_PAGE_BYTES as usize;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping that nothing is ever read from or written to; it aliases nothing of ours.
    let Ok(found) = (unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), flags) })
    else {
        return std::ptr::null_mut();
    };
    // SAFETY: the mapping of the line above, unmapped once.
    let _ = unsafe { rustix::mm::munmap(found, room) };
    found.map_addr(|address| address.next_multiple_of(HUGE_PAGE_BYTES as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(slot_bytes: u64, bytes: u64) -> SlabHeader {
        let geometry = SlabGeometry::new(slot_bytes, bytes);
        SlabHeader { epoch: 1, slab: 0, namespace_digest: [0; 32], geometry }
    }

    /// Memory that was made for any slab is cut to the slab that it becomes, and counts once at every moment.
    #[test]
    fn memory_becomes_a_slab_of_at_most_its_size() {
        for huge in [HugePages::Auto, HugePages::Off] {
            let (ready, mapped) = (Arc::new(AtomicU64::new(64 << 20)), Arc::new(AtomicU64::new(0)));
            let mut memory = SlabMemory::create(64 << 20, huge, Arc::clone(&ready)).unwrap();
            assert!(memory.base.as_ptr().addr().is_multiple_of(HUGE_PAGE_BYTES as usize));
            memory.count_in(&mapped);
            assert_eq!((ready.load(Ordering::Acquire), mapped.load(Ordering::Acquire)), (0, 64 << 20));
            // Two slots of 24 MiB leave 14 MiB.
            let header = header(24 << 20, 64 << 20);
            let slab = Slab::new(memory, header).unwrap();
            assert_eq!(mapped.load(Ordering::Acquire), header.geometry.slab_bytes);
            assert_eq!(rustix::fs::fstat(slab.as_fd()).unwrap().st_size as u64, header.geometry.slab_bytes);
            assert!(slab.slot_start(1).is_some() && slab.slot_start(2).is_none());
            drop(slab);
            assert_eq!(mapped.load(Ordering::Acquire), 0);
        }
    }

    #[test]
    fn memory_that_is_too_small_is_refused() {
        let accounted = Arc::new(AtomicU64::new(2 << 20));
        let memory = SlabMemory::create(2 << 20, HugePages::Off, Arc::clone(&accounted)).unwrap();
        assert!(Slab::new(memory, header(4096, 4 << 20)).is_err());
        assert_eq!(accounted.load(Ordering::Acquire), 0);
    }
}
