//! A bucket: an object store as a place with create-only writes, leases with epochs, and a clock of its own.
//!
//! Owns requests and how often they are made, what a store is proven to do, the store's time, and leases. Handles no blocks, packs
//! or tiers: those stand on it, and only its messages name what they lose without an ability of the store. Decides nothing by the wall clock of this machine, which may be wrong and may jump.

mod body;
mod boot;
pub mod caps;
mod clock;
mod folder;
mod lease;
mod open;
mod probe;
mod requests;
mod swap;

pub use body::Body;
pub use boot::BootTime;
pub use clock::StoreClock;
pub use folder::{ALIGNMENT, remove_staged};
pub use lease::{Lease, LeaseError, LeaseTerm, Standing, standing};
pub use open::{ObjectUrl, OpenStoreError, Opened};
pub use probe::{Abilities, measure, probe};
pub use requests::{Bucket, RequestCounts, Tries, Trouble};
