//! Copying past the cache: with non-temporal stores the destination is not read first, which saves a third of the traffic of a
//! copy that is larger than the cache.

/// Copies `from` to `to`, which is as long, past the cache where the processor can. Done, and in order with later stores, when
/// it returns.
///
/// # Panics
/// Where the lengths differ.
pub fn stream_copy(from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len(), "a copy's source and destination");
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // The destination's lines, whole.
        let head = to.as_ptr().align_offset(64).min(to.len());
        let lines = (to.len() - head) / 64 * 64;
        let (to_head, to_rest) = to.split_at_mut(head);
        let (from_head, from_rest) = from.split_at(head);
        let (to_lines, to_tail) = to_rest.split_at_mut(lines);
        let (from_lines, from_tail) = from_rest.split_at(lines);
        to_head.copy_from_slice(from_head);
        // SAFETY: AVX2 was detected; both have the same whole number of lines, and the destination starts at one.
        unsafe { stream_lines(from_lines, to_lines) };
        return to_tail.copy_from_slice(from_tail);
    }
    to.copy_from_slice(from);
}

/// # Safety
/// AVX2 is there; `from` and `to` have equal lengths, multiples of 64; `to` starts on a line.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn stream_lines(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{__m256i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn every_alignment_and_length_comes_out_whole() {
        let source: Vec<u8> = (0..5000u32).map(|i| ((i * 7) >> 2) as u8).collect();
        for (from, to, len) in [(0, 0, 4096), (1, 3, 4000), (63, 1, 129), (5, 64, 63), (0, 7, 0), (9, 0, 64)] {
            let mut target = vec![0u8; 5000];
            stream_copy(&source[from..from + len], &mut target[to..to + len]);
            assert_eq!(target[to..to + len], source[from..from + len]);
            assert!(target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0));
        }
    }
}
