//! A hash of some hashes of tokens, four side by side: the inner loop of XXH3, of which a look-up takes a step for each four blocks of a prompt.
//!
//! Most processors of the last ten years have four lanes for that (AVX2); without them it takes twice the time.

#![cfg_attr(
    target_arch = "x86_64",
    allow(unsafe_code, reason = "what a processor may not have is called after it was asked")
)]

/// Hashes that are taken at once; there are a multiple of them.
pub const LANES: usize = 4;

type Lanes = [u64; LANES];

/// Odd numbers without a pattern: the digits of pi.
const KEYS: Lanes = [0x243F_6A88_85A3_08D3, 0x1319_8A2E_0370_7345, 0xA409_3822_299F_31D1, 0x082E_FA98_EC4E_6C89];
/// What the keys grow by with each step, so that no two hashes may change places.
const STEPS: Lanes = [0x4528_21E6_38D0_1377, 0xBE54_66CF_34E9_0C6D, 0xC0AC_29B7_C97C_50DD, 0x3F84_D5B5_B547_0917];
const SPREAD: Lanes = [0x9216_D5D9_8979_FB1B, 0xD131_0BA6_98DF_B5AD, 0x2FFD_72DB_D01A_DFB7, 0xB8E1_AFED_6A26_7E97];

/// The hash of all of them.
#[inline(always)]
pub fn hash(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what that asks for.
        return unsafe { hash_wide(words) };
    }
    hash_lanes(words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn hash_wide(words: &[u64]) -> u64 {
    hash_lanes(words)
}

#[inline(always)]
fn hash_lanes(words: &[u64]) -> u64 {
    let (mut all, mut keys) = ([words.len() as u64; LANES], KEYS);
    for words in words.as_chunks::<LANES>().0 {
        let [a, b, c, d] = *words;
        // What a product may lose of a word is added to its neighbour.
        for (all, word) in all.iter_mut().zip([b, a, d, c]) {
            *all = all.wrapping_add(word);
        }
        for ((all, word), key) in all.iter_mut().zip(words).zip(keys) {
            let mixed = word ^ key;
            *all = all.wrapping_add((mixed & 0xFFFF_FFFF) * (mixed >> 32));
        }
        for (key, step) in keys.iter_mut().zip(STEPS) {
            *key = key.wrapping_add(step);
        }
    }
    let folded = all.into_iter().zip(SPREAD).map(|(all, spread)| {
        let product = u128::from(all ^ all >> 37) * u128::from(spread);
        product as u64 ^ (product >> 64) as u64
    });
    folded.fold(0, |all, one| all.rotate_left(17) ^ one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_lanes_say_the_same_and_every_word_counts_where_it_is() {
        let words: Vec<u64> = (0..96u64).map(|at| at.wrapping_mul(0xD6E8_FEB8_6659_FD93)).collect();
        let mut seen = std::collections::HashSet::new();
        for len in (0..=96).step_by(12) {
            assert_eq!(hash(&words[..len]), hash_lanes(&words[..len]));
            assert!(seen.insert(hash(&words[..len])));
        }
        for at in 0..96 {
            for other in at + 1..96 {
                let mut swapped = words.clone();
                swapped.swap(at, other);
                assert!(seen.insert(hash(&swapped)), "{at} and {other}");
            }
            for bit in 0..64 {
                let mut changed = words.clone();
                changed[at] ^= 1 << bit;
                assert!(seen.insert(hash(&changed)), "bit {bit} of {at}");
            }
        }
    }
}
