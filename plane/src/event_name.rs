//! The names by which events speak of blocks: 64 bits that whoever knows a block's hash works out, and that tell nothing else.
//!
//! A router that missed an event, or met two blocks of one name, sends a request to the wrong place; nothing is ever read by
//! such a name.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// What tells the blocks of one layer group of one layout and namespace from all others: XXH3-64 of the namespace's digest, the
/// layout's digest, and the group (u16, little-endian).
pub fn name_seed(namespace_digest: &[u8; 32], layout_digest: &[u8; 32], group: u16) -> u64 {
    let mut bytes = [0u8; 66];
    let (namespace, rest) = bytes.split_at_mut(32);
    let (layout, number) = rest.split_at_mut(32);
    namespace.copy_from_slice(namespace_digest);
    layout.copy_from_slice(layout_digest);
    number.copy_from_slice(&group.to_le_bytes());
    xxh3_64(&bytes)
}

/// The name of the block with this sequence hash: XXH3-64 of the hash's bytes under the group's seed; 1 instead of 0, which stands
/// for a name that is not known.
pub fn event_name(seed: u64, sequence_hash: &[u8]) -> u64 {
    xxh3_64_with_seed(sequence_hash, seed).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_of_a_key_changes_the_name() {
        let name =
            |namespace, layout, group, hash: &[u8]| event_name(name_seed(&[namespace; 32], &[layout; 32], group), hash);
        let base = name(1, 2, 3, b"hash");
        for other in [name(9, 2, 3, b"hash"), name(1, 9, 3, b"hash"), name(1, 2, 9, b"hash"), name(1, 2, 3, b"hasH")] {
            assert_ne!(base, other);
        }
        // Other languages work it out as well: these stay.
        assert_eq!(name_seed(&[1; 32], &[2; 32], 3), NAME_SEED);
        assert_eq!(base, NAME);
    }

    const NAME_SEED: u64 = 14_873_676_560_403_406_230;
    const NAME: u64 = 7_930_125_718_850_489_223;
}
