//! Memory for units: some side by side in a page of 2 MiB, where the system has such. Names lie anywhere; with pages of 4 KiB a processor
//! waits as long to learn where a line is as for the line.

#![cfg_attr(all(target_os = "linux", not(shuttle)), allow(unsafe_code, reason = "memory is mapped, and given back"))]

pub use imp::Slab;

/// A huge page.
pub const HUGE_BYTES: usize = 2 << 20;

#[cfg(all(target_os = "linux", not(shuttle)))]
mod imp {
    use std::alloc::{Layout, handle_alloc_error};
    use std::ffi::c_void;
    use std::ptr::{NonNull, null_mut};

    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
    use zerocopy::FromZeros;

    use super::HUGE_BYTES;

    /// Some `T`, all zero at first: memory is taken as they are touched, and given back with the slab.
    pub struct Slab<T> {
        map: NonNull<c_void>,
        map_bytes: usize,
        first: NonNull<T>,
        len: usize,
    }

    // SAFETY: it owns its mapping, and gives out references to `T` alone.
    unsafe impl<T: Send> Send for Slab<T> {}
    // SAFETY: as above; nothing else in it ever changes.
    unsafe impl<T: Sync> Sync for Slab<T> {}

    impl<T: FromZeros> Slab<T> {
        /// `len` of them. As with any allocation, the process ends where there is no memory.
        pub fn new(len: usize) -> Self {
            const { assert!(align_of::<T>() <= HUGE_BYTES && size_of::<T>() > 0 && !std::mem::needs_drop::<T>()) }
            // As much more as it takes to begin where a huge page can; what is not touched costs nothing.
            let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_next_multiple_of(HUGE_BYTES));
            let Some(map_bytes) = bytes.and_then(|bytes| bytes.checked_add(HUGE_BYTES)) else {
                handle_alloc_error(Layout::new::<T>())
            };
            let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            // SAFETY: a new mapping, wherever the kernel puts it: nobody else's memory changes.
            let map = unsafe { mmap_anonymous(null_mut(), map_bytes, protection, flags) };
            let Some(map) = map.ok().and_then(NonNull::new) else { handle_alloc_error(Layout::new::<T>()) };
            let skipped = map.cast::<u8>().align_offset(HUGE_BYTES);
            // SAFETY: less than HUGE_BYTES is skipped, and so much more than `len` of them take is mapped.
            let first = unsafe { map.cast::<u8>().add(skipped) };
            // A slab that leaves most of a huge page empty would take all of it.
            let is_huge = len * size_of::<T>() + size_of::<T>() > HUGE_BYTES;
            let advice = if is_huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
            // SAFETY: of these pages, which are this mapping's, only the size changes. A hint: where the kernel does not take it, pages stay small.
            _ = unsafe { madvise(map.as_ptr(), map_bytes, advice) };
            Self { map, map_bytes, first: first.cast(), len }
        }
    }

    impl<T> std::ops::Deref for Slab<T> {
        type Target = [T];

        #[inline(always)]
        fn deref(&self) -> &[T] {
            // SAFETY: `len` of `T` are mapped from `first`, aligned, for as long as `self` is; zeros are a `T` (`FromZeros`), and what was
            // written since was written as `T`.
            unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
        }
    }

    impl<T> Drop for Slab<T> {
        fn drop(&mut self) {
            // SAFETY: the whole mapping, which nobody refers to any more; `T` needs no drop.
            _ = unsafe { munmap(self.map.as_ptr(), self.map_bytes) };
        }
    }
}

#[cfg(any(not(target_os = "linux"), shuttle))]
mod imp {
    /// Some `T`, each as it is by default.
    pub struct Slab<T>(Box<[T]>);

    impl<T: Default> Slab<T> {
        pub fn new(len: usize) -> Self {
            Self((0..len).map(|_| T::default()).collect())
        }
    }

    impl<T> std::ops::Deref for Slab<T> {
        type Target = [T];

        fn deref(&self) -> &[T] {
            &self.0
        }
    }
}
