//! Slabs registered with a ring: the kernel then no longer walks their pages for each transfer.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use io_uring::IoUring;

use super::IoMemory;
use crate::slab::Slab;

/// Slabs that can be registered: the kernel's bound on buffers of a ring.
const SLABS_MAX: usize = 16_384;
/// How often slabs that are gone are looked for.
pub(super) const PURGE_EVERY: Duration = Duration::from_millis(100);

/// Slabs that the kernel knows.
pub(super) struct Buffers {
    places: Vec<Option<(Weak<Slab>, usize)>>,
    used: usize,
    supported: bool,
    purged: Instant,
}

impl Buffers {
    pub fn new(ring: &IoUring) -> Self {
        let supported = ring.submitter().register_buffers_sparse(SLABS_MAX as u32).is_ok();
        Self { places: Vec::new(), used: 0, supported, purged: Instant::now() }
    }

    /// No slab is known.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// The number under which the kernel knows the memory's slab; registers it the first time.
    pub fn index_of(&mut self, ring: &IoUring, memory: &IoMemory) -> Option<u16> {
        let slab = memory.slab().filter(|_| self.supported)?;
        let known = |place: &Option<(Weak<Slab>, usize)>| {
            place.as_ref().is_some_and(|(_, address)| *address == Arc::as_ptr(slab) as usize)
        };
        // A slab's address is not used again while its Weak is here, so that equal addresses are one slab.
        if let Some(at) = self.places.iter().position(known) {
            return Some(at as u16);
        }
        let at = self.places.iter().position(Option::is_none).unwrap_or(self.places.len());
        if at >= SLABS_MAX {
            return None;
        }
        let (base, bytes) = slab.mapping();
        let buffer = libc_iovec(base.as_ptr().cast(), bytes);
        // SAFETY: the mapping lives as long as the slab; purge() unregisters it once the slab has gone, and
        // until then the kernel's pins keep the pages, so that no transfer can go anywhere else.
        let registered = unsafe { ring.submitter().register_buffers_update(at as u32, &[buffer], None) };
        if let Err(error) = registered {
            tracing::warn!(%error, "slabs cannot be registered with io_uring, perhaps because of the limit on locked memory; transfers cost more CPU");
            self.supported = false;
            return None;
        }
        let place = Some((Arc::downgrade(slab), Arc::as_ptr(slab) as usize));
        match self.places.get_mut(at) {
            Some(free) => *free = place,
            None => self.places.push(place),
        }
        self.used += 1;
        Some(at as u16)
    }

    /// Forgets slabs that nobody keeps: only then is their memory free.
    pub fn purge(&mut self, ring: &IoUring) {
        if self.used == 0 || self.purged.elapsed() < PURGE_EVERY {
            return;
        }
        self.purged = Instant::now();
        for (at, place) in self.places.iter_mut().enumerate() {
            if place.as_ref().is_some_and(|(slab, _)| slab.strong_count() == 0) {
                let nothing = libc_iovec(std::ptr::null_mut(), 0);
                // SAFETY: takes a registration back; no transfer uses it, for each keeps its slab.
                let _ = unsafe { ring.submitter().register_buffers_update(at as u32, &[nothing], None) };
                *place = None;
                self.used -= 1;
            }
        }
    }
}

fn libc_iovec(iov_base: *mut std::ffi::c_void, iov_len: usize) -> libc::iovec {
    libc::iovec { iov_base, iov_len }
}
