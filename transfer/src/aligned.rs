//! Memory on a page boundary, as direct I/O asks for.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::frame::FRAME_ALIGN;

/// Zeroed bytes that start on a boundary of [`FRAME_ALIGN`]; their number is a multiple of it.
pub struct AlignedBytes {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory that this value owns alone.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; &AlignedBytes only reads.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `bytes`, rounded up to whole pages; at least one.
    pub fn zeroed(bytes: usize) -> Self {
        let bytes = bytes.max(1).next_multiple_of(FRAME_ALIGN);
        let Ok(layout) = Layout::from_size_align(bytes, FRAME_ALIGN) else {
            handle_alloc_error(Layout::new::<u8>());
        };
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, layout }
    }

    /// A copy of `parts`, one behind the other, in whole pages.
    pub fn of(parts: &[&[u8]]) -> Self {
        let mut all = Self::zeroed(parts.iter().map(|part| part.len()).sum());
        let mut rest: &mut [u8] = &mut all;
        for part in parts {
            let (to, after) = rest.split_at_mut(part.len());
            to.copy_from_slice(part);
            rest = after;
        }
        all
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the layout's bytes are allocated, initialised (zeroed), and live as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and &mut self makes the reference the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and no longer referenced.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
