//! The router: which worker has how much of a prompt's prefix, in which tier.
//!
//! A library first. [`index::PrefixIndex`] is pure: it does no I/O, reads no clock, and knows neither engines nor the wire.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a failure in a test is a failed test"))]

pub mod caps;
pub mod config;
pub mod cost;
pub mod discovery;
pub mod events;
pub mod fleet;
pub mod hashing;
pub mod place;
pub mod serve;

/// Which holders have how much of a chain of blocks.
#[doc(inline)]
pub use kvstore_index as index;
#[doc(inline)]
pub use kvstore_index::names;
