//! Names of blocks, as the router computes them from tokens: the sequence hash of a block is the hash of its parent's and of its own
//! tokens' hash, so that it names the whole prefix. XXH3-64 over 16 bytes, little-endian, as Dynamo's router has it.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The seed of both hashes.
const SEED: u64 = 1337;

/// The hash of a block's own tokens, whatever stands before it. `seed`: tells apart what tokens alone do not (the model, an adapter, a
/// tenant's salt); 0 without.
pub fn tokens_hash(tokens: &[u32], seed: u64) -> u64 {
    let mut bytes = Vec::with_capacity(tokens.len() * 4);
    tokens.iter().for_each(|token| bytes.extend_from_slice(&token.to_le_bytes()));
    xxh3_64_with_seed(&bytes, SEED.wrapping_add(seed))
}

/// What tells the blocks of an adapter's requests apart; 0 without one. As Dynamo's router has it, together with [`tokens_hash`].
pub fn adapter_seed(adapter: Option<&str>) -> u64 {
    adapter.map_or(0, |name| xxhash_rust::xxh3::xxh3_64(name.as_bytes()))
}

/// The name of the block after `parent`; the first block of a chain is named by its tokens alone.
#[inline(always)]
pub fn next_name(parent: Option<u64>, tokens_hash: u64) -> u64 {
    match parent {
        Some(parent) => name_behind(parent, tokens_hash),
        None => tokens_hash,
    }
}

/// What XXH3 (its specification, the case of 9 to 16 bytes) mixes into the two halves of its input: two words of its secret each, and the seed.
pub(crate) const FLIPS: [u64; 2] = [0x6782_737B_EA42_3EF2, 0xAF56_BC3B_0996_4D01];

/// XXH3-64 of two words, of which a chain's look-up takes one for each block.
#[inline(always)]
pub(crate) fn name_behind(parent: u64, tokens_hash: u64) -> u64 {
    let [flip_low, flip_high] = FLIPS;
    let (low, high) = (parent ^ flip_low, tokens_hash ^ flip_high);
    let product = u128::from(low) * u128::from(high);
    let folded = product as u64 ^ (product >> 64) as u64;
    let mixed = low.swap_bytes().wrapping_add(high).wrapping_add(folded).wrapping_add(16);
    let mixed = (mixed ^ mixed >> 37).wrapping_mul(0x1656_6791_9E37_79F9);
    mixed ^ mixed >> 32
}

/// The names of a chain, into `names`.
pub fn chain_names(tokens_hashes: &[u64], names: &mut Vec<u64>) {
    names.clear();
    let mut parent = None;
    for hash in tokens_hashes {
        let name = next_name(parent, *hash);
        names.push(name);
        parent = Some(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Dynamo 1.6 computes for tokens 1 to 32 in blocks of 16, without and with an adapter.
    #[test]
    fn names_are_those_of_dynamo() {
        let tokens: Vec<u32> = (1..=32).collect();
        for (adapter, last) in [(None, 12_466_389_667_045_779_788), (Some("lora-a"), 9_189_390_670_180_411_066)] {
            let seed = adapter_seed(adapter);
            let hashes: Vec<u64> = tokens.chunks(16).map(|tokens| tokens_hash(tokens, seed)).collect();
            let mut names = Vec::new();
            chain_names(&hashes, &mut names);
            assert_eq!(names[1], last);
        }
    }

    proptest::proptest! {
        #[test]
        fn a_name_is_xxh3_of_both(parent: u64, tokens_hash: u64) {
            let bytes: Vec<u8> = [parent, tokens_hash].iter().flat_map(|word| word.to_le_bytes()).collect();
            proptest::prop_assert_eq!(next_name(Some(parent), tokens_hash), xxh3_64_with_seed(&bytes, SEED));
        }
    }

    #[test]
    fn a_name_names_the_whole_prefix() {
        let mut names = Vec::new();
        chain_names(&[1, 2, 3], &mut names);
        assert_eq!(names.first(), Some(&1));
        let mut others = Vec::new();
        chain_names(&[9, 2, 3], &mut others);
        assert!(names.iter().zip(&others).all(|(a, b)| a != b));
        assert_ne!(tokens_hash(&[1, 2], 0), tokens_hash(&[2, 1], 0));
        assert_ne!(tokens_hash(&[1, 2], 0), tokens_hash(&[1, 2], 7));
    }
}
