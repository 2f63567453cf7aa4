//! Slabs registered with a ring: the kernel then no longer walks their pages for each transfer.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use io_uring::IoUring;

use super::IoMemory;
use crate::slab::Slab;

/// Slabs that can be registered: the kernel's bound on buffers of a ring.
const SLABS_MAX: usize = 16_384;
/// How often slabs that are gone are looked for.
pub(super) const PURGE_EVERY: Duration = Duration::from_millis(100);

/// Slabs that the kernel knows, and those that it refused.
pub(super) struct Buffers {
    /// By address. It is not used again while the Weak is here, so that equal addresses are one slab.
    places: HashMap<usize, Place>,
    /// Numbers that no slab has any more.
    free: Vec<u16>,
    /// Numbers in use, and free ones.
    numbers: usize,
    supported: bool,
    warned: bool,
    purged: Instant,
}

struct Place {
    slab: Weak<Slab>,
    /// None where the kernel refused it: its transfers go unregistered, and other slabs are none the worse.
    number: Option<u16>,
}

impl Buffers {
    pub fn new(ring: &IoUring) -> Self {
        let supported = ring.submitter().register_buffers_sparse(SLABS_MAX as u32).is_ok();
        let (places, free) = (HashMap::new(), Vec::new());
        Self { places, free, numbers: 0, supported, warned: false, purged: Instant::now() }
    }

    /// No slab is known.
    pub fn is_empty(&self) -> bool {
        self.numbers == self.free.len()
    }

    /// The number under which the kernel knows the memory's slab; registers it the first time.
    pub fn index_of(&mut self, ring: &IoUring, memory: &IoMemory) -> Option<u16> {
        let slab = memory.slab().filter(|_| self.supported)?;
        let address = Arc::as_ptr(slab) as usize;
        if let Some(place) = self.places.get(&address) {
            return place.number;
        }
        let number = self.free.last().copied().unwrap_or(self.numbers as u16);
        if usize::from(number) >= SLABS_MAX {
            return None;
        }
        let (base, bytes) = slab.mapping();
        let buffer = libc_iovec(base.as_ptr().cast(), bytes);
        // SAFETY: the mapping lives as long as the slab; purge() unregisters it once the slab has gone, and
        // until then the kernel's pins keep the pages, so that no transfer can go anywhere else.
        let registered = unsafe { ring.submitter().register_buffers_update(u32::from(number), &[buffer], None) };
        let number = match registered {
            Ok(_) if self.free.pop().is_some() => Some(number),
            Ok(_) => {
                self.numbers += 1;
                Some(number)
            }
            Err(error) => {
                self.warn(bytes, &error);
                None
            }
        };
        self.places.insert(address, Place { slab: Arc::downgrade(slab), number });
        number
    }

    fn warn(&mut self, bytes: usize, error: &std::io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            let advice = match error.raw_os_error() {
                Some(libc::ENOMEM) => "raise the limit on locked memory (ulimit -l)",
                _ => "the kernel takes no memory of this kind",
            };
            tracing::warn!(%error, bytes, "a slab cannot be registered with io_uring, so its transfers cost more CPU: {advice}");
        }
    }

    /// Forgets slabs that nobody keeps: only then is their memory free.
    pub fn purge(&mut self, ring: &IoUring) {
        if self.places.is_empty() || self.purged.elapsed() < PURGE_EVERY {
            return;
        }
        self.purged = Instant::now();
        let free = &mut self.free;
        self.places.retain(|_, place| {
            if place.slab.strong_count() > 0 {
                return true;
            }
            if let Some(number) = place.number {
                let nothing = libc_iovec(std::ptr::null_mut(), 0);
                // SAFETY: takes a registration back; no transfer uses it, for each keeps its slab.
                let _ = unsafe { ring.submitter().register_buffers_update(u32::from(number), &[nothing], None) };
                free.push(number);
            }
            false
        });
    }
}

fn libc_iovec(iov_base: *mut std::ffi::c_void, iov_len: usize) -> libc::iovec {
    libc::iovec { iov_base, iov_len }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use kvstore_plane::{SlabGeometry, SlabHeader};

    use super::*;
    use crate::{HugePages, SlotFill};

    fn memory(slab_bytes: u64) -> (Arc<Slab>, IoMemory) {
        let geometry = SlabGeometry::new(4096, slab_bytes);
        let header = SlabHeader { epoch: 1, slab: 0, namespace_digest: [0; 32], geometry };
        let accounted = Arc::new(AtomicU64::new(geometry.slab_bytes));
        let slab = Arc::new(Slab::create(header, HugePages::Auto, accounted).unwrap());
        // SAFETY: nobody else knows of the slab.
        let fill = unsafe { SlotFill::new(Arc::clone(&slab), 0, 4096) };
        (slab, IoMemory::Fill(fill.unwrap()))
    }

    /// The first slab that the kernel refused turned registration off for all, for as long as the daemon ran.
    #[test]
    fn a_slab_that_is_refused_is_the_only_one() {
        let ring = match IoUring::new(8) {
            Ok(ring) => ring,
            Err(error) => return eprintln!("io_uring is not tested: {error}"),
        };
        let mut buffers = Buffers::new(&ring);
        let (_small, small) = memory(4 << 20);
        let first = buffers.index_of(&ring, &small);
        assert!(first.is_some() || !buffers.supported);
        // The kernel takes 1 GiB at most.
        let (large_slab, large) = memory((1 << 30) + (2 << 20));
        assert_eq!(buffers.index_of(&ring, &large), None);
        let (other_slab, other) = memory(4 << 20);
        let second = buffers.index_of(&ring, &other);
        assert_eq!(second.is_some(), first.is_some());
        assert_eq!(buffers.index_of(&ring, &small), first, "it is known already");
        // Numbers of slabs that are gone are used again.
        drop((large, large_slab, other, other_slab));
        std::thread::sleep(PURGE_EVERY);
        buffers.purge(&ring);
        assert_eq!(buffers.places.len(), usize::from(buffers.supported));
        let (_third_slab, third) = memory(4 << 20);
        assert_eq!(buffers.index_of(&ring, &third), second);
    }
}
