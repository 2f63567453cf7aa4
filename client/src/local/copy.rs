//! Copying blocks out of slabs. Large batches go past the cache with non-temporal stores, where the processor has them: the
//! destination is not read first, which saves a third of the traffic; and are spread over threads, where one does not use
//! up the memory.

use kvstore_plane::stream_copy;

/// From this many bytes on, a batch is copied with stores that go past the cache: more than a core's own cache.
const STREAM_FROM_BYTES: usize = 1 << 20;
/// A thread more for each so many bytes: starting one costs some 20 us, what a core copies of 256 KiB.
const BYTES_PER_THREAD: usize = 8 << 20;
/// Threads at most: memory is used up by then.
const THREADS_MAX: usize = 4;

/// One block's copy.
pub(crate) struct Copy<'a> {
    /// From.
    pub(crate) from: &'a [u8],
    /// To, as long.
    pub(crate) to: &'a mut [u8],
}

/// Does all of them.
pub(crate) fn copy_all(copies: &mut [Copy<'_>]) {
    let bytes: usize = copies.iter().map(|copy| copy.from.len()).sum();
    let streaming = bytes >= STREAM_FROM_BYTES;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = (bytes / BYTES_PER_THREAD).clamp(1, THREADS_MAX.min(cores)).min(copies.len().max(1));
    if threads == 1 {
        return copies.iter_mut().for_each(|copy| copy.run(streaming));
    }
    let per_thread = copies.len().div_ceil(threads);
    std::thread::scope(|scope| {
        let mut parts = copies.chunks_mut(per_thread);
        let own = parts.next();
        for part in parts {
            scope.spawn(move || part.iter_mut().for_each(|copy| copy.run(streaming)));
        }
        own.into_iter().flatten().for_each(|copy| copy.run(streaming));
    });
}

impl Copy<'_> {
    fn run(&mut self, streaming: bool) {
        debug_assert_eq!(self.from.len(), self.to.len());
        if streaming {
            stream_copy(self.from, self.to);
        } else {
            self.to.copy_from_slice(self.from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_copied_whole_by_however_many_threads() {
        let source: Vec<u8> = (0..24 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut target = vec![0u8; source.len()];
        let mut copies: Vec<Copy<'_>> =
            source.chunks(1 << 20).zip(target.chunks_mut(1 << 20)).map(|(from, to)| Copy { from, to }).collect();
        copy_all(&mut copies);
        assert!(target == source);
    }
}
