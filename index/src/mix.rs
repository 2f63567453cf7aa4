//! Names, spread over all bits.

/// Spreads names, which engines may choose badly, over all bits. A bijection, but for one pair
/// of names that become 1, as 0 is none.
#[inline(always)]
pub fn mixed(name: u64) -> u64 {
    let key = (name ^ name >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (key ^ key >> 32).max(1)
}
