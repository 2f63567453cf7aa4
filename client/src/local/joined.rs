//! Leased blocks as one piece of memory: mapped one behind the other, privately, and not copied.
//!
//! The view is this process's own: a write gets a page of its own, which neither the daemon nor another process sees. Pages that nobody
//! wrote to are the daemon's, which the leases keep as they are. A child of a fork does not have the view: the leases are its parent's.

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::fork::forks;
use super::read::LeasedBlock;

/// See the head of this file.
pub struct JoinedBlocks {
    base: NonNull<u8>,
    bytes: usize,
    /// What was reserved: whole pages.
    reserved: usize,
    forks: u64,
    /// After all else: the pages are theirs.
    _leases: Vec<Arc<LeasedBlock>>,
}

// SAFETY: memory of this value alone; whoever writes to it has it to themselves (`start`), or says how they share it.
unsafe impl Send for JoinedBlocks {}
// SAFETY: as above; a shared reference gives a pointer, and no access.
unsafe impl Sync for JoinedBlocks {}

/// An address that nothing else has, until it is given back.
struct Reserved {
    base: NonNull<u8>,
    bytes: usize,
}

impl Reserved {
    fn new(bytes: usize) -> Option<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at the kernel's choice; it aliases nothing of ours.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), flags) };
        Some(Self { base: NonNull::new(base.ok()?.cast())?, bytes })
    }

    /// Maps a part of a file at `at`, which with `bytes` is inside.
    fn fill(&self, at: usize, bytes: usize, file: BorrowedFd<'_>, offset: u64) -> Option<()> {
        let inside = at.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        // SAFETY: inside what is reserved, by the check.
        let to = unsafe { self.base.as_ptr().add(at) };
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: replaces pages of our own reservation alone, of which nobody has a reference yet.
        let mapped = inside.then(|| unsafe { rustix::mm::mmap(to.cast(), bytes, protection, flags, file, offset) });
        mapped?.ok().map(|_| ())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once: `into_parts` forgets self.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

impl JoinedBlocks {
    /// Maps blocks one behind the other. Gives them back where that cannot be done: a block in the middle is no multiple of pages, the
    /// client does not keep the daemon's descriptors ([`crate::Client::connect_to_map`]), or the system refuses.
    pub fn new(blocks: Vec<Arc<LeasedBlock>>) -> Result<Self, Vec<Arc<LeasedBlock>>> {
        match Self::map(&blocks) {
            Some((reserved, bytes)) => {
                let (base, room) = (reserved.base, reserved.bytes);
                std::mem::forget(reserved);
                Ok(Self { base, bytes, reserved: room, forks: forks(), _leases: blocks })
            }
            None => Err(blocks),
        }
    }

    fn map(blocks: &[Arc<LeasedBlock>]) -> Option<(Reserved, usize)> {
        let page = rustix::param::page_size();
        let bytes = blocks.iter().map(|block| block.len()).sum::<usize>();
        let reserved = Reserved::new(bytes.checked_next_multiple_of(page).filter(|bytes| *bytes > 0)?)?;
        let mut at = 0_usize;
        for block in blocks {
            if !at.is_multiple_of(page) {
                return None;
            }
            let (file, offset) = block.place()?;
            reserved.fill(at, block.len().next_multiple_of(page), file, offset)?;
            at += block.len();
        }
        // SAFETY: advice on our own mapping that changes no contents.
        let advised = unsafe {
            rustix::mm::madvise(reserved.base.as_ptr().cast::<c_void>(), reserved.bytes, Advice::LinuxDontFork)
        };
        advised.ok()?;
        Some((reserved, bytes))
    }

    /// Where it begins. Readable and writable while this lives.
    ///
    /// # Panics
    /// In a child of the process that mapped it: the memory is the parent's.
    pub fn start(&self) -> NonNull<u8> {
        assert!(self.forks == forks(), "blocks that were mapped before a fork cannot be used in the child");
        self.base
    }

    /// Bytes of all blocks.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// True without any.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

impl Drop for JoinedBlocks {
    fn drop(&mut self) {
        if self.forks == forks() {
            // SAFETY: our own mapping, unmapped once; whatever points into it borrows or shares self.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.reserved) };
        }
    }
}
