//! Decode sessions: what a live sequence is made of, so that its bytes outlive worker, daemon and node, with only the bucket in common.
//!
//! A **session** is one live sequence under a name ([`Name`]): its ids, its sampler's state, the names of its blocks, and the KV of tokens
//! that no block holds yet. A **writer** has a log, and commits to it in groups, for many sessions at once. A log is **sealed** by the object
//! at its next free number; then its writer is refused, whatever it still has under way. A session is **owned** by the log that its highest
//! epoch names. Both are create-only objects, so one of two claimants wins, and no clock decides. `docs/design/session.md` has the formats,
//! what is assumed of the store, and why it is so.
//!
//! Owns what is true of sessions. Runs no engine, keeps no blocks and knows neither gRPC nor the command line. `state`, `cover`, `entry`,
//! `owner` and `live` are pure.

mod batch;
mod bytes;
mod claim;
mod collect;
mod cover;
mod entry;
mod error;
mod live;
mod log;
mod name;
mod owner;
mod read;
mod standing;
mod state;
mod store;
mod view;
mod writer;

pub use batch::Batch;
pub use bytes::{Ids, Opaque};
pub use claim::Claimed;
pub use collect::{Collected, collect};
pub use entry::{End, Entry, Kind, Place, Pointer, Record, Row, Sealer};
pub use error::{Broken, Refusal, SessionError};
pub use live::{Acknowledged, Append, Data, NewPiece, Step};
pub use name::Name;
pub use owner::{Holder, Origin, Owner};
pub use state::{Block, Delta, Head, Piece, Sampler, Session, Shape};
pub use store::Store;
pub use view::{Inspected, Listed};
pub use writer::Writer;
