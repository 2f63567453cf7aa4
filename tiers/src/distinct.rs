//! How many different names there were, to half a percent, in 64 KiB.
//!
//! HyperLogLog (Flajolet, Fusy, Gandouet, Meunier, 2007): of the hashes that fall into one of 65,536 places, the one with the most leading
//! zeros tells about how many they were. The count is that of O. Ertl ("New cardinality estimation algorithms for HyperLogLog sketches",
//! 2017, algorithm 6), which has no bias where few came. Pure.

/// Bits of a hash that say which place it falls into.
const PLACE_BITS: u32 = 16;
const PLACES: usize = 1 << PLACE_BITS;
/// Ranks: of a hash of zeros, too.
const RANKS: usize = 64 - PLACE_BITS as usize + 2;

/// See the head of this file. Takes no memory before the first name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Distinct(Vec<u8>);

impl Distinct {
    /// One more name, by its hash.
    pub(crate) fn add(&mut self, hash: u64) {
        if self.0.is_empty() {
            self.0 = vec![0; PLACES];
        }
        let rank = (hash << PLACE_BITS | 1 << (PLACE_BITS - 1)).leading_zeros() as u8 + 1;
        if let Some(most) = self.0.get_mut((hash >> (64 - PLACE_BITS)) as usize) {
            *most = rank.max(*most);
        }
    }

    /// How many different ones there were, about.
    pub(crate) fn count(&self) -> f64 {
        if self.0.is_empty() {
            return 0.0;
        }
        let mut of_rank = [0.0f64; RANKS];
        for rank in &self.0 {
            if let Some(count) = of_rank.get_mut(usize::from(*rank)) {
                *count += 1.0;
            }
        }
        let places = PLACES as f64;
        let [none, ranks @ .., last] = of_rank;
        let full = places * tau(1.0 - last / places);
        let sum = ranks.iter().rev().fold(full, |sum, count| (sum + count) * 0.5) + places * sigma(none / places);
        places * places / (2.0 * std::f64::consts::LN_2 * sum)
    }
}

/// See the paper: what the empty places add.
fn sigma(mut x: f64) -> f64 {
    if x >= 1.0 {
        return f64::INFINITY;
    }
    let (mut y, mut sum) = (1.0, x);
    loop {
        x *= x;
        let before = sum;
        sum += x * y;
        y += y;
        if sum == before {
            return sum;
        }
    }
}

/// What the full ones add.
fn tau(mut x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return 0.0;
    }
    let (mut y, mut sum) = (1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        y *= 0.5;
        let before = sum;
        sum -= (1.0 - x) * (1.0 - x) * y;
        if sum == before {
            return sum / 3.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_right_to_two_percent() {
        for names in [1u64, 10, 1000, 30_000, 50_000, 1_000_000] {
            let mut distinct = Distinct::default();
            for name in (0..names).chain(0..names / 2) {
                // The finaliser of SplitMix64.
                let mut x = name.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                distinct.add(x ^ (x >> 31));
            }
            let off = distinct.count() / names as f64 - 1.0;
            assert!(off.abs() < 0.02, "{names}: {}", distinct.count());
        }
        assert_eq!(Distinct::default().count(), 0.0);
    }
}
