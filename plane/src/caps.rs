//! The bounds of the shared-memory formats, each with its reason.

/// Lease words of a client: blocks that it can read at once. 8 GiB of blocks of 1 MiB; 64 KiB, of which only the
/// words in use take memory, and only they are scanned.
pub const LEASES_PER_CLIENT: usize = 8192;
/// Touches that wait for the daemon: prefixes of 4096 blocks between two of its looks.
pub const TOUCH_WORDS: usize = 4096;
/// Words of each of the two command rings: 128 KiB, records of up to 32 KiB.
pub const RING_WORDS: usize = 16_384;
/// Blocks of one STAGE command at most: half of a record.
pub const BLOCKS_PER_STAGE_MAX: usize = 128;
/// Hashes of one PROMOTE command at most: half of a record.
pub const HASHES_PER_PROMOTE_MAX: usize = 256;
/// Bytes of one COPY at most: what the daemon does in one go while other clients wait, some 100 us.
pub const PIECE_BYTES_MAX: usize = 1 << 20;
/// Bytes of a datagram of the attachment's socket at most.
pub const DATAGRAM_BYTES_MAX: usize = 4096;
/// Descriptors of one datagram at most.
pub const DESCRIPTORS_MAX: usize = 4;
