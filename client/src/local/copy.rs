//! Copying blocks out of slabs. Large batches go past the cache with non-temporal stores, where the processor has them: the
//! destination is not read first, which saves a third of the traffic; and are spread over threads, where one does not use
//! up the memory.

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
        if streaming && stream(self.from, self.to) {
            return;
        }
        self.to.copy_from_slice(self.from);
    }
}

/// Copies past the cache; false where the processor cannot.
#[cfg(target_arch = "x86_64")]
fn stream(from: &[u8], to: &mut [u8]) -> bool {
    if from.len() != to.len() || !std::arch::is_x86_feature_detected!("avx2") {
        return false;
    }
    // The destination's lines, whole.
    let head = to.as_ptr().align_offset(64).min(to.len());
    let lines = (to.len() - head) / 64;
    let (to_head, to_rest) = to.split_at_mut(head);
    let (from_head, from_rest) = from.split_at(head);
    let (to_lines, to_tail) = to_rest.split_at_mut(lines * 64);
    let (from_lines, from_tail) = from_rest.split_at(lines * 64);
    to_head.copy_from_slice(from_head);
    // SAFETY: AVX2 was detected; both have the same whole number of lines, and the destination starts at one.
    unsafe { stream_lines(from_lines, to_lines) };
    to_tail.copy_from_slice(from_tail);
    true
}

#[cfg(not(target_arch = "x86_64"))]
fn stream(_from: &[u8], _to: &mut [u8]) -> bool {
    false
}

/// # Safety
/// AVX2 is there; `from` and `to` have equal lengths, multiples of 64; `to` starts on a line.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn stream_lines(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{
        __m256i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256,
    };
    for (from, to) in from.chunks_exact(64).zip(to.chunks_exact_mut(64)) {
        let (from, to) = (from.as_ptr().cast::<__m256i>(), to.as_mut_ptr().cast::<__m256i>());
        // A prefetch of any address reads nothing and cannot fault.
        _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(1024));
        // SAFETY: a line of 64 bytes is there.
        let low = unsafe { _mm256_loadu_si256(from) };
        // SAFETY: its second half.
        let high = unsafe { _mm256_loadu_si256(from.wrapping_add(1)) };
        // SAFETY: a line of 64 bytes is there, and starts at a multiple of 64.
        unsafe { _mm256_stream_si256(to, low) };
        // SAFETY: its second half.
        unsafe { _mm256_stream_si256(to.wrapping_add(1), high) };
    }
    // Others see these stores in order with those that follow.
    _mm_sfence();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alignment_and_length_comes_out_whole() {
        let source: Vec<u8> = (0..5000u32).map(|i| (i * 7 >> 2) as u8).collect();
        for (from, to, len) in [(0, 0, 4096), (1, 3, 4000), (63, 1, 129), (5, 64, 63), (0, 7, 0), (9, 0, 64)] {
            let mut target = vec![0u8; 5000];
            let _ = stream(&source[from..from + len], &mut target[to..to + len]);
            if cfg!(target_arch = "x86_64") && std::arch::is_x86_feature_detected!("avx2") {
                assert_eq!(target[to..to + len], source[from..from + len]);
                assert!(target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0));
            }
        }
    }

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
