//! Copying blocks out of slabs. Large batches go past the cache with non-temporal stores, where the processor has them: the
//! destination is not read first, which saves a third of the traffic; and are spread over threads, where one does not use
//! up the memory.

use kvstore_plane::stream_copy;

/// From this many bytes on, a batch is copied with stores that go past the cache: more than a core's own cache.
const STREAM_FROM_BYTES: usize = 1 << 20;
/// A thread more for each so many bytes: starting one costs some 20 us, what a core copies of 256 KiB.
const BYTES_PER_THREAD: usize = 2 << 20;
/// Threads share out pieces of this size.
const PIECE_BYTES: usize = 1 << 20;
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
    if bytes < 2 * BYTES_PER_THREAD || cores() == 1 {
        return copies.iter_mut().for_each(|copy| copy.run(streaming));
    }
    let threads = (bytes / BYTES_PER_THREAD).min(THREADS_MAX).min(cores());
    let mut pieces: Vec<Copy<'_>> = copies
        .iter_mut()
        .flat_map(|copy| copy.from.chunks(PIECE_BYTES).zip(copy.to.chunks_mut(PIECE_BYTES)))
        .map(|(from, to)| Copy { from, to })
        .collect();
    let per_thread = pieces.len().div_ceil(threads);
    std::thread::scope(|scope| {
        let mut parts = pieces.chunks_mut(per_thread);
        let own = parts.next();
        for part in parts {
            scope.spawn(move || part.iter_mut().for_each(|copy| copy.run(streaming)));
        }
        own.into_iter().flatten().for_each(|copy| copy.run(streaming));
    });
}

/// Cores of this process. Asked once: the answer takes the system 50 us, as it looks through control groups.
fn cores() -> usize {
    static CORES: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
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
        let source: Vec<u8> =
            (0..(24 << 20) + 12_345).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut target = vec![0u8; source.len()];
        let mut copies: Vec<Copy<'_>> =
            source.chunks(5 << 20).zip(target.chunks_mut(5 << 20)).map(|(from, to)| Copy { from, to }).collect();
        copy_all(&mut copies);
        assert!(target == source);
    }
}
