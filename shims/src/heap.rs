//! What an allocator keeps of memory that was freed. A save and a restore hold some large buffers for a moment; glibc keeps tens of
//! megabytes of them for allocations to come, which an interpreter of a worker may never make.

/// Gives freed memory back to the system, where the allocator is glibc's. Takes milliseconds: once for a snapshot, and for no block.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: it takes no pointer, locks what it reads, and may be called from every thread.
        unsafe { libc::malloc_trim(0) };
    }
}
