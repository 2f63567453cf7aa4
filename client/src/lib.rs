//! The one client of kvstore: through shared memory where the daemon is on this node, over gRPC for the rest and elsewhere.
//!
//! ```no_run
//! # async fn example(layout: kvstore_client::v1::Layout) -> Result<(), kvstore_client::Error> {
//! use kvstore_client::{Client, PutBlock};
//!
//! let client = Client::connect("unix:/tmp/kvstore-0/default.sock").await?;
//! let layout = client.register_layout(layout).await?;
//! let block = PutBlock::new(b"hash of the prefix".as_slice(), vec![0; layout.block_bytes[0] as usize]);
//! client.put(&layout.group(0), vec![block]).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Misses and blocks on their way are values; an [`Error`] means that something is wrong. Every call ends
//! by its deadline ([`Client::with_deadline`]) and can be cancelled by dropping its future: what a cancelled
//! put had completed stays, the rest is not there. Bytes that come back are checked against the checksum
//! under which they were stored.
//!
//! A call takes the 65,536 blocks of a prompt of a million tokens: where that is more than the client should hold at a time, it
//! works in windows. [`Error::Busy`] means that the same call can succeed later; what can never succeed is
//! [`Error::Invalid`], and names the bound.

mod admin;
mod caps;
mod chunks;
mod connection;
mod error;
mod get;
mod local;
mod put;
mod snapshots;
mod verbs;
mod watch;

pub use chunks::Chunks;
pub use connection::{Client, Plane};
pub use error::Error;
pub use get::{GetOptions, GetOutcome};
/// What leased blocks are copied out with where they are many: past the cache.
#[doc(inline)]
pub use kvstore_plane::stream_copy;
/// What a watch names blocks by, and how far a prefix can be used.
#[doc(inline)]
pub use kvstore_plane::{GroupRun, event_name, usable_prefix, window_blocks};
pub use kvstore_proto::v1;
pub use local::{JoinedBlocks, LeaseWindows, LeasedBlock, Leases};
pub use put::{PutBlock, PutOptions, PutSlice};
pub use verbs::{GroupRef, RegisteredLayout};
pub use watch::{Watch, WatchEvent};
