//! Time as an argument: that of the bucket, on which leases in a store rest as well.

pub use kvstore_bucket::BootTime;
