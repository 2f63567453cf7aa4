//! The bounds of the client, each with its reason.

use kvstore_plane::caps::{HASHES_PER_PROMOTE_MAX, LEASES_PER_CLIENT};

/// Blocks that one step of a read leases and copies: the rest of the lease page is for others of this process.
pub(crate) const BLOCKS_PER_STEP: usize = 256;
/// Blocks of one window that a caller leases, and all that a get leases for its caller: half of the lease page, so that a prompt
/// of any length leaves the other half to others of this process.
pub(crate) const LEASES_PER_WINDOW_MAX: usize = LEASES_PER_CLIENT / 2;
/// Blocks that one PROMOTE asks for at least: what the disks do at once, twice ...
pub(crate) const BLOCKS_PER_PROMOTE_MIN: usize = 64;
/// ... and more of small ones, so that the way to the daemon costs little beside them, up to this many bytes.
pub(crate) const PROMOTE_BYTES: u64 = 16 << 20;
/// Blocks of one hint: records that take two thirds of the ring, so that other commands have room.
pub(crate) const BLOCKS_PER_HINT_MAX: usize = 8 * HASHES_PER_PROMOTE_MAX;
/// Blocks of all LOCAL puts of this process that wait for the disk: each has a task of the daemon's, which has 256 for one client, and
/// answers MEMORY where it has none left.
pub(crate) const UNSYNCED_MAX: usize = 96;
/// Misses of one get over the local plane, each a command: the rest is read over gRPC, whose answer brings all of them.
pub(crate) const MISSES_MAX: usize = 16;
/// Bytes of borrowed blocks that one call over gRPC copies: a prompt of any length takes no more memory than this beside it.
pub(crate) const PUT_WINDOW_BYTES: usize = 64 << 20;
/// Bytes of one description's message: half of what a daemon takes.
pub(crate) const DESCRIBE_BYTES: usize = 2 << 20;
/// A client that maps blocks once more keeps a descriptor of each slab: up to this part of those that the process may have ...
pub(crate) const FILES_KEPT_PARTS: u64 = 4;
/// ... and no more than this: slabs of 64 MiB for 256 GiB.
pub(crate) const FILES_KEPT_MAX: u64 = 4096;
