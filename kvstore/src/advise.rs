//! Advice on sizes.

/// One block in so many is sampled.
pub const ONE_IN: u64 = 32;
