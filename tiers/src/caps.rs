//! The bounds of this crate, each with its reason.

pub use kvstore_bucket::caps::OBJECT_TRIES_MAX;

use std::time::Duration;

/// Bytes of one block at most: the directory holds lengths in 32 bits, and a block is copied in one piece.
pub const BLOCK_BYTES_MAX: u64 = 1 << 30;
/// Layouts of one namespace at most. A layout is a model, a weights version and a rank: a node serves tens.
pub const LAYOUTS_MAX: usize = 1024;
/// Slot sizes of one namespace at most: each has a pool, whose eviction policy learns in 100 KiB of its own.
pub const POOLS_MAX: usize = 256;
/// Namespaces at most; each is configured by hand.
pub const NAMESPACES_MAX: usize = 64;
/// Layer groups of a layout at most: hybrid models have two to four.
pub const GROUPS_MAX: usize = 64;
/// Shards of a tensor-parallel group at most.
pub const SHARDS_MAX: u32 = 1024;
/// Changes of residency that are kept for followers that were away: 24 bytes each, three MiB; a second of a busy node.
pub const CHANGES_KEPT: usize = 1 << 17;
/// Entries of a volume that are looked at under one lock, for a snapshot: some ten microseconds.
pub const NAMES_PER_LOCK: u32 = 4096;
/// Entries of a segment that are looked at, and dropped, under one lock: some hundred microseconds where all go.
pub const ENTRIES_PER_LOCK: usize = 1024;
/// Slabs of one namespace at most: the key table has 20 bits for them.
pub const SLABS_MAX: usize = 1 << 20;
/// Bytes of a slab, where the Host tier is large: large enough that its faults and its file descriptor
/// cost nothing per block, small enough to move between layouts.
pub const SLAB_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a slab, where the Host tier is small.
pub const SLAB_BYTES_MIN: u64 = 4 << 20;
/// Slabs into which a Host tier is cut, where that gives a size between the two above: a layout's share
/// is then right to about 3%.
pub const SLABS_PER_TIER: u64 = 32;
/// The least Host tier: one small slab.
pub const HOST_BYTES_MIN: u64 = SLAB_BYTES_MIN;
/// Blocks being filled at once, of one namespace.
pub const FILLS_MAX: usize = 4096;
/// Blocks behind one that is being filled which are told to the policy once that one is there: a conversation has few branches. Others
/// count as children of what is before both.
pub const EARLY_FOLLOWERS_MAX: usize = 8;
/// Blocks being filled, or parked while leased, for which room is set aside at the start.
pub const FILLS_USUAL: usize = 256;
/// A writer that brought nothing for this long may be replaced by one that waits.
pub const FILL_STALL_MS: u64 = 1000;
/// Blocks that leave together where clients read without asking: one look at their lease pages serves all.
pub const EVICT_BATCH: usize = 32;
/// ... and at most one part in this many of a pool, and one.
pub const EVICT_PARTS: usize = 128;
/// Clients of the local plane at once, over all namespaces: engine workers of a node, and their children. Each has four
/// descriptors here, one for each slab on its way to it, and up to 360 KiB of pages, of which it mostly uses little.
pub const ATTACHMENTS_MAX: usize = 1024;
/// At most this part of the Host tier is staging memory, in percent.
pub const STAGING_PERCENT_MAX: u64 = 12;
/// Staging memory of one client: two pieces of 64 KiB at least ...
pub const STAGING_BYTES_MIN: u64 = 128 << 10;
/// ... and no more than a client can have on its way at once.
pub const STAGING_BYTES_MAX: u64 = 64 << 20;
/// Blocks before one that is to leave memory, in its prefix, that are written to the tiers below with it: they leave next.
pub const WRITE_BACK_RUN: usize = 16;
/// ... while fewer than one part in this many of a pool waits for that, or is leased.
pub const PARKED_PARTS: usize = 8;
/// Blocks that wait to be written below before they leave memory: a few runs. Each is leased until it is queued.
pub const LEAVING_MAX: usize = 256;
/// Pins and tickets at once, of one namespace.
pub const HOLDS_MAX: usize = 65_536;
/// Blocks that all pins and tickets of one namespace name, each as often as it is named: 24 MiB of places.
pub const HELD_KEYS_MAX: usize = 1 << 20;
/// At most this part of the Host tier may be pinned or held by tickets, in percent: the rest must be able
/// to turn over.
pub const HELD_PERCENT_MAX: u64 = 50;
/// The longest life of a pin: a day. Longer needs are renewed.
pub const PIN_TTL_MS_MAX: u64 = 24 * 3600 * 1000;
/// The longest life of a look-up ticket: enough for a scheduling step, too short to hoard by.
pub const TICKET_TTL_MS_MAX: u64 = 30_000;
/// Keys that are looked at under the lock in one go: about 50 us.
pub const KEYS_PER_LOCK: usize = 1024;
/// Blocks that are pinned, unpinned, evicted or leased under the lock in one go: each costs a few cache misses, and all of them some
/// hundred microseconds at most.
pub const CHANGES_PER_LOCK: u32 = 512;
/// After so many of them it is looked whether somebody waits for the lock who needs it for a moment, such as a put: some
/// tenths of a microsecond.
pub const CHANGES_PER_LOOK: u32 = 2;
/// Volumes of the Nvme tier at most: disks of a node. Each costs four threads.
pub const NVME_PATHS_MAX: usize = 16;
/// The least volume: its index, and eight small segments.
pub const NVME_BYTES_MIN: u64 = 64 << 20;
/// Segments into which a volume is cut, where that gives a size between the two below: reclaim then frees less
/// than a percent at a time, and what a restart leaves half full is little.
pub const NVME_SEGMENTS_PER_VOLUME: u64 = 128;
/// Bytes of a segment on a small volume.
pub const NVME_SEGMENT_BYTES_MIN: u64 = 4 << 20;
/// Bytes of a segment on a large one. No block larger than this goes to disk.
pub const NVME_SEGMENT_BYTES_MAX: u64 = 256 << 20;
/// Segments that a volume's bound must allow: one is written, one is for pinned blocks, one holds what was written before, and one
/// is free for what moves.
pub const NVME_SEGMENTS_MIN: usize = 4;
/// Segments beyond a bound that was lowered from which on blocks that were read go as well: to move them would hold up writes for as
/// long as that takes.
pub const NVME_BEYOND_MOVES_MAX: usize = 16;
/// Blocks whose deletion is remembered while a lost index is being built again: 32 MiB on disk and in memory.
pub const NVME_BURIED_MAX: usize = 1 << 19;
/// Deletions that one batch to an index has: about a millisecond under the volume's lock.
pub const NVME_DELETIONS_PER_BATCH: usize = 8192;
/// One part in this many of a volume is the index's, unless configured.
pub const NVME_INDEX_PARTS: u64 = 64;
/// ... and at least this much: two write buffers with their log, and levels that can be merged.
pub const NVME_INDEX_BYTES_MIN: u64 = 16 << 20;
/// Bytes of the index's reservation for each block: 53 of key and value with RocksDB's own, three times over,
/// because a merge writes a level anew before it drops the old one, and rounded up.
pub const NVME_INDEX_BYTES_PER_BLOCK: u64 = 192;
/// Batches whose numbers the index keeps: a power of two, four times as many as it takes before its write buffer goes to a table.
pub const NVME_INDEX_RING: u64 = 4096;
/// The reserve of an index for a full file system, in write buffers: tables of two, and the log of one.
pub const NVME_INDEX_RESERVE_BUFFERS: u64 = 3;
/// Memory for the blocks of RocksDB's files. It is read at the start and in merges only.
pub const NVME_INDEX_CACHE_BYTES: usize = 8 << 20;
/// Files that RocksDB keeps open for one volume.
pub const NVME_INDEX_FILES_MAX: i32 = 64;
/// At most this part of a segment moves on when it is emptied, in percent: bounds write amplification.
pub const NVME_REINSERT_PERCENT: u64 = 15;
/// Blocks that wait to be written at most, whatever their size: some 400 bytes each beside the block.
pub const NVME_DIRTY_BLOCKS_MAX: u64 = 65_536;
/// Unused blocks of a namespace with a ttl are looked for each time one part in this many of it is over.
pub const TTL_PARTS: u64 = 8;
/// The longest ttl: what is not asked for in a year goes by space, if not before.
pub const TTL_MS_MAX: u64 = 366 * 24 * 3600 * 1000;
/// The shortest: look-ups and sweeps count seconds.
pub const TTL_MS_MIN: u64 = 10_000;
/// Transfers that fail in a row before a volume counts as gone.
pub const NVME_ERRORS_IN_A_ROW_MAX: u32 = 16;
/// Bytes of a pack in the object store that a writer aims at: a request costs as much time as some 3 MB of transfer (30 ms at
/// 90 MB/s a stream), so that at 8 MiB a quarter of a read is waiting, and a GB costs 128 write requests.
pub const OBJECT_PACK_BYTES: u64 = 8 << 20;
/// Blocks of a pack at most: its footer is read in one go, 64 KiB.
pub const OBJECT_PACK_BLOCKS_MAX: usize = 1024;
/// Blocks of the bucket of which it is known at once where they are: some 90 bytes each.
pub const OBJECT_DIRECTORY_BLOCKS_MAX: usize = 1 << 19;
/// Names for which it is remembered that no pack begins with them.
pub const OBJECT_ABSENT_MAX: usize = 1 << 16;
/// ... and for how long: another node may have stored them since.
pub const OBJECT_ABSENT_MS: u64 = 5_000;
/// Requests to the store at once, by what waits for them: transfers of a node's link, and not so many that a store throttles.
pub const OBJECT_READS_MAX: usize = 64;
/// ... of those, the ones that prefetches may have.
pub const OBJECT_PREFETCH_READS_MAX: usize = 32;
/// Packs that are written at once.
pub const OBJECT_WRITES_MAX: usize = 8;
/// Listings and footers that one search has under way.
pub const OBJECT_SEARCHES_MAX: usize = 16;
/// ... and those of all deletions together, which look for each block of their chains: thousands within a call's deadline.
pub const OBJECT_SEARCHES_EVERYWHERE_MAX: usize = 64;
/// Listings of one search, by one deadline: what is beyond is found by the next one, and a deletion goes on with it.
pub const OBJECT_LISTINGS_PER_SEARCH_MAX: usize = 1024;
/// Packs that begin with one block and are looked at: branches of a prompt, and rewrites. The newest first.
pub const OBJECT_BRANCHES_MAX: usize = 64;
/// Bytes of one ranged read: a pack's worth. Several streams are faster than one.
pub const OBJECT_READ_BYTES_MAX: u64 = 8 << 20;
/// A request that brings nothing for this long is made anew.
pub const OBJECT_STALL_MS: u64 = 5_000;
/// Packs that are being put together at once: chains that are being stored.
pub const OBJECT_OPEN_PACKS_MAX: usize = 1024;
/// A pack is written when it is full, or this old.
pub const OBJECT_LINGER_MS: u64 = 1_000;
/// Blocks that wait to be uploaded: their record is some 250 bytes of memory each.
pub const OBJECT_BACKLOG_BLOCKS_MAX: usize = 1 << 18;
/// Bytes of a frame's header: a page, for all that this build writes.
pub const OBJECT_HEAD_BYTES_MAX: usize = 64 << 10;
/// An object lives at least this long after it was written, whatever a collector wants.
pub const OBJECT_GRACE_MS: i64 = 3600 * 1000;
/// Slabs that one fill may have made before its block: others may take the first ones' slots.
pub const SLABS_PER_FILL_MAX: usize = 8;
/// How often a promotion that waits for room, or for another's flight, looks again.
pub const PROMOTE_POLL: Duration = Duration::from_millis(5);
/// Promotions that one call has under way: what a disk does at once, so that its blocks come in order and a call leases no
/// more of the memory than it is about to send.
pub const PROMOTIONS_PER_CALL: usize = 32;
/// ... and at most, where blocks are small and come from far.
pub const PROMOTIONS_PER_CALL_MAX: usize = 4096;
/// Bytes of blocks that a call brings from the bucket ahead of the one that is sent: eight streams of a pack each.
pub const OBJECT_WINDOW_BYTES: u64 = 64 << 20;
/// How long a call waits for dirty blocks to be written, or uploaded, before it is answered Busy.
pub const ROOM_BELOW_WITHIN: Duration = Duration::from_secs(5);
/// ... and how often it looks again meanwhile, whatever is told.
pub const ROOM_BELOW_POLL: Duration = Duration::from_millis(50);
/// Packs that a collector says it deletes, and then deletes together: a second or a few, for which a pin of their blocks waits, and
/// 40 KB that name them.
pub const OBJECT_COLLECT_BATCH: usize = 256;
/// Pins in the bucket, of all nodes, that a collector heeds: some 100 bytes of memory each. Where there are more, it deletes nothing.
pub const OBJECT_REFERENCES_MAX: usize = 1 << 18;
/// Blocks that these name, each as often as it is named: 128 MiB.
pub const OBJECT_REFERRED_BLOCKS_MAX: usize = 1 << 22;
/// Packs that are read at once to prove them before an acknowledgement rests on them: a piece of each is in memory.
pub const OBJECT_PROOFS_MAX: usize = 8;
/// Pins that are being told to the bucket at once, or ended there: each keeps up to 65,536 names, some MiB, for as long as the store
/// takes, also when its caller has gone.
pub const OBJECT_REFERRING_MAX: usize = 32;
/// Blocks that one pin has on their way to disk at once: a few syncs for a long prompt.
pub const PIN_WRITES_MAX: usize = 1024;
/// A block of a pin that the disk refuses is offered again so many times: a write of it that begins or ends just now is in the way of
/// another.
pub const PIN_WRITE_ATTEMPTS: u32 = 10;
/// ... this much later, then twice as much each time: a second in all, also for a thread that a busy machine does not run.
pub const PIN_WRITE_POLL: Duration = Duration::from_millis(1);
/// Times that a delete looks again for copies that were made meanwhile: each time they can only come from what the time before missed.
pub const DELETE_ROUNDS_MAX: usize = 16;
/// Times that a hold looks again, where blocks leave between the look and the hold.
pub const HOLD_ATTEMPTS: usize = 3;
/// Bytes of packs that are in memory to be proven, or were read back: 8 MiB for each pack that is proven or written, or one frame,
/// where that is larger.
pub const OBJECT_CHECKED_BYTES_MAX: u64 = (OBJECT_PROOFS_MAX + OBJECT_WRITES_MAX) as u64 * OBJECT_READ_BYTES_MAX;
/// Bytes of packs that are in memory to be written again, because some of their blocks are deleted: two full ones, each of them twice
/// while a damaged one is read once more, or one frame, where that is larger.
pub const OBJECT_REWRITTEN_BYTES_MAX: u64 = 8 * OBJECT_PACK_BYTES;
/// An upload log that could not be written is written anew after twice this long, then after twice as long each time ...
pub const OBJECT_LOG_BACKOFF_MS: u64 = 100;
/// ... up to this. Deletions are refused meanwhile, and a restart would forget what came since.
pub const OBJECT_LOG_BACKOFF_MS_MAX: u64 = 10_000;
