//! The daemon's bounds, each with its reason. Those of placement are in `kvstore_tiers::caps`.

use std::time::Duration;

/// Hashes of one look-up, pin, prefetch or delete: a prompt of a million tokens in blocks of 16.
pub const HASHES_PER_LOOKUP_MAX: usize = 65_536;
/// Blocks of one get: the same prompt; its hashes are one message.
pub const BLOCKS_PER_GET_MAX: usize = HASHES_PER_LOOKUP_MAX;
/// Blocks of a get that are looked for below memory together.
pub const BLOCKS_PER_GET_WINDOW: usize = 4096;
/// Blocks that a get leases at a time ...
pub const LEASED_AHEAD_BLOCKS: u64 = 16;
/// ... and their bytes, unless one has more: all calls that nobody reads keep little of the memory.
pub const LEASED_AHEAD_BYTES: u64 = 1 << 20;
/// Blocks of one put: the same prompt; bounds the reply.
pub const BLOCKS_PER_PUT_MAX: usize = HASHES_PER_LOOKUP_MAX;
/// Bytes of a control message: 65,536 hashes of 32 bytes with their tags, and room.
pub const CONTROL_MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Where nobody said how much memory the daemon may have, it makes one part in so many of it ready ahead of need: a user who works on
/// the same machine does not notice it ...
pub const READY_PARTS: u64 = 16;
/// ... and no more than this: what comes in while the thread that makes more wakes up, many times over.
pub const READY_BYTES_AUTO_MAX: u64 = 1 << 30;
/// One part in so many of the machine's memory is left to others by what is made ready: it is not worth a page of theirs.
pub const MEMORY_LEFT_PARTS: u64 = 16;
/// Connections of one listener: engines of a node have a few each. Times the connection's window below,
/// it bounds what unread streams can keep: 1 GiB, were every peer hostile.
pub const CONNECTIONS_MAX: usize = 256;
/// A peer of a gRPC listener has this long to send the preface of HTTP/2, which every client sends at once.
pub const PREFACE_WITHIN: Duration = Duration::from_secs(5);
/// Bytes of that preface.
pub const PREFACE_BYTES: usize = 24;
/// Connections of the HTTP listener: a few scrapers and probes.
pub const HTTP_CONNECTIONS_MAX: usize = 64;
/// A peer of the HTTP listener has this long to ask for something ...
pub const HTTP_ASKS_WITHIN: Duration = Duration::from_secs(5);
/// ... and then for the next thing: scrapers come every minute or so.
pub const HTTP_ASKS_AGAIN_WITHIN: Duration = Duration::from_secs(150);
/// Places of a way in, however few descriptors there are: an operator must get in.
pub const PLACES_MIN: usize = 4;
/// Descriptors of the process but for those below: the runtime, listeners, logs, epolls, and requests to the object store, of which
/// some dozen are under way at once.
pub const OWN_DESCRIPTORS: usize = 192;
/// Descriptors of one volume: its file, locks, its ring, and an index with its log and [`NVME_INDEX_FILES_MAX`] tables; twice that
/// where an index is built anew beside the old one.
///
/// [`NVME_INDEX_FILES_MAX`]: kvstore_tiers::caps::NVME_INDEX_FILES_MAX
pub const DESCRIPTORS_PER_VOLUME: usize = 2 * (kvstore_tiers::caps::NVME_INDEX_FILES_MAX as usize + 16);
/// Descriptors of one client of the local plane: its socket, process, eventfd, two pages and staging memory.
pub const DESCRIPTORS_PER_LOCAL_PEER: usize = 6;
/// A TCP peer of the publisher that says nothing for this long is asked whether it lives ...
pub const PUBLISHER_KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// ... again after this long ...
pub const PUBLISHER_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// ... and so many times, before its place is free: half a minute, as on the other listeners.
pub const PUBLISHER_KEEPALIVE_PROBES: u32 = 3;
/// Calls at once on one connection.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 256;
/// Put and get calls at once, of all connections: each may keep a fill or leases.
pub const DATA_CALLS_MAX: usize = 1024;
/// Blocks that gets may bring ahead from below, and that the local plane may promote, at once: a multiple of the largest promotion, so
/// that a few slow readers do not stop everyone; the rest of the tier can always turn over.
pub const LEASED_BLOCKS_MAX: usize = 4 * BLOCKS_PER_GET_WINDOW;
/// A get takes this part of what is left of these, so that any number of slow readers leaves some ...
pub const LEASABLE_PARTS: usize = 8;
/// ... and this many are the local plane's alone: 32 of the smallest promotions.
pub const LEASED_BLOCKS_RESERVED: usize = 32 * kvstore_tiers::caps::PROMOTIONS_PER_CALL;
/// A promotion takes this part of what is left at most: it ends by itself, and others may begin meanwhile.
pub const PROMOTABLE_PARTS: usize = 2;
/// What a peer may send on one stream before it is read: hides the latency of a wake-up, bounds memory.
pub const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// The same for all streams of a connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Bytes of an HTTP/2 frame: measured, larger ones only cost the allocator.
pub const FRAME_BYTES: u32 = 256 << 10;
/// Bytes of a call's headers.
pub const HEADER_BYTES_MAX: u32 = 16 << 10;
/// A connection that says nothing for this long is asked whether it lives ...
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// ... and closed when it does not answer for this long: a dead peer's leases end within 30 s.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(15);
/// After a failed accept (no file descriptors left, say) the next is tried this much later.
pub const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// The longest a call may ask for.
pub const DEADLINE_MAX: Duration = Duration::from_secs(600);
/// Routers that follow one daemon at once: each has a task, and a message of the size below on its way.
pub const WATCHES_MAX: usize = 64;
/// A router that takes no message for this long is sent away; it watches again when it can.
pub const WATCH_STALL: Duration = Duration::from_secs(30);
/// The same for whoever has blocks verified or garbage collected: one at a time may.
pub const REPORT_STALL: Duration = Duration::from_secs(30);
/// Names of one message to a router: 64 KiB, some hundred microseconds of its time.
pub const WATCH_NAMES_PER_MESSAGE: usize = 8192;
/// Changes of one message.
pub const WATCH_CHANGES_PER_MESSAGE: usize = 8192;
/// Changes are gathered this long before they are sent: a request's blocks come together, and a router's index is this much late.
pub const WATCH_GATHER: Duration = Duration::from_millis(2);
/// How often a router is told how fast the tiers are read.
pub const WATCH_RATES_EVERY: Duration = Duration::from_secs(1);
/// Messages of the publisher that are kept for replays: as many as vLLM keeps ...
pub const PUBLISHED_KEPT: usize = 10_000;
/// ... and their bytes at most.
pub const PUBLISHED_BYTES_KEPT: usize = 64 << 20;
/// Events of one message: some 20 KiB where blocks have 16 tokens.
pub const EVENTS_PER_MESSAGE_MAX: usize = 128;
/// Routers that are connected to each of the publisher's sockets.
pub const PUBLISHER_PEERS_MAX: usize = 64;
/// Topics of one of them.
pub const PUBLISHER_TOPICS_MAX: usize = 64;
/// Bytes of what they send: a topic, or a number.
pub const PUBLISHER_REQUEST_BYTES_MAX: usize = 4096;
/// One that takes nothing for this long is cut off, and comes back to a replay.
pub const PUBLISHER_STALL: Duration = Duration::from_secs(10);
/// Descriptions that wait for the publisher: calls, each of which describes at most [`HASHES_PER_LOOKUP_MAX`] blocks ...
pub const DESCRIPTIONS_WAITING_MAX: usize = 256;
/// ... and their bytes: a few of the largest, of a prompt of a million tokens each.
pub const DESCRIPTIONS_WAITING_BYTES_MAX: usize = 64 << 20;
/// Bytes that are copied to measure how fast memory is: more than caches have.
pub const COPY_MEASURED_BYTES: usize = 32 << 20;
/// How often a put that waits for another writer looks again.
pub const JOIN_POLL: Duration = Duration::from_millis(20);
/// How often a put that waits for a slab looks again ...
pub const ROOM_POLL: Duration = Duration::from_millis(1);
/// ... and how many times: a second. A slab takes milliseconds to make; a reader that is stopped may never unmap one.
pub const ROOM_WAITS_MAX: usize = 1000;
/// A look-up waits at most so long for the bucket to be searched, whatever it asks for.
pub const SEARCH_WAIT_MAX: Duration = Duration::from_secs(5);
/// At its end the daemon goes on uploading this long; the rest is done after its next start.
pub const UPLOADS_CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// Prefetches at once, ended ones included until they are forgotten.
pub const PREFETCHES_MAX: usize = 4096;
/// Hashes of all of them together: 40 MiB.
pub const PREFETCH_HASHES_MAX: usize = 1 << 20;
/// How long an ended prefetch can still be watched.
pub const PREFETCH_KEPT: Duration = Duration::from_secs(60);
/// Background work of the tiers happens this often ...
pub const TICK: Duration = Duration::from_millis(100);
/// ... and this often while nothing happens: pins and namespaces' times end by the second ...
pub const TICK_QUIET: Duration = Duration::from_secs(1);
/// ... once this many ticks had nothing to do: two seconds, in which uploads that were put off have begun.
pub const TICKS_UNTIL_QUIET: u32 = 20;
/// Verifications at once: each reads all memory.
pub const VERIFICATIONS_MAX: usize = 1;
/// Collections of the bucket's garbage at once: each lists all of it.
pub const COLLECTIONS_MAX: usize = 1;
/// Blocks that a verification reads before it lets others run.
pub const VERIFY_BATCH: usize = 64;
/// Bytes that a volume takes at most where none are configured: hours of a busy GPU's KV, and no laptop's whole
/// disk.
pub const NVME_BYTES_AUTO_MAX: u64 = 64 << 30;
/// Lines of a trace of a replay at most, and blocks of one of its requests.
pub const TRACE_REQUESTS_MAX: usize = 10_000_000;
/// See [`TRACE_REQUESTS_MAX`]: what one look-up takes.
pub const TRACE_BLOCKS_PER_REQUEST_MAX: usize = HASHES_PER_LOOKUP_MAX;
/// Blocks that a replay gets or puts in one call: small ones would be so many that their buffers cost more than they hold.
pub const REPLAY_BATCH_BLOCKS: usize = 4096;
/// Connections to the local plane at once, those included that have yet to say what they want: as many as there may be
/// attachments, and some.
pub const LOCAL_PEERS_MAX: usize = kvstore_tiers::caps::ATTACHMENTS_MAX + 64;
/// A connection to the local plane has this long to say Hello.
pub const LOCAL_HELLO_WITHIN: Duration = Duration::from_secs(5);
/// While clients are active, their sockets and processes are looked at this often.
pub const LOCAL_SOCKET_POLL: Duration = Duration::from_micros(20);
/// The local plane looks for what is overdue this often.
pub const LOCAL_TIDY: Duration = Duration::from_millis(500);
/// ... and this often while a client has no room for what it is to be told.
pub const LOCAL_BLOCKED_POLL: Duration = Duration::from_millis(5);
/// Datagrams of one client that are read before others have their turn.
pub const LOCAL_DATAGRAMS_PER_TURN: usize = 16;
/// Commands of one client that are done before others have their turn.
pub const LOCAL_COMMANDS_PER_TURN: usize = 16;
/// Commands of one client for which tasks work.
pub const LOCAL_TASKS_PER_CLIENT_MAX: usize = 256;
/// Blocks that one client has staged and not brought yet: each has a slot.
pub const STAGES_PER_CLIENT_MAX: usize = 128;
/// Pieces of one block that wait for its slot: as many as the largest staging memory has.
pub const PIECES_PENDING_MAX: usize = 256;
/// Blocks that were promoted for a client stay at least this long, for it to lease them.
pub const PROMOTED_KEPT: Duration = Duration::from_secs(1);
/// A hinted block that has not come by then is not waited for.
pub const HINT_TIME: Duration = Duration::from_secs(10);
/// The longest that the local plane looks for commands without sleeping: one core's time, shared by all.
pub const LOCAL_SPIN_MAX: Duration = Duration::from_millis(10);
/// Where the configuration says what may go from the bucket, it goes this often: objects age by days, listings cost money.
pub const COLLECT_EVERY: Duration = Duration::from_secs(3600);
/// Accesses that a sample keeps: 16 bytes each, and what holds them; the last hours of a busy node.
pub const ACCESSES_KEPT_MAX: usize = 1 << 20;
/// Snapshots that are prewarmed at once: one of them takes all that the disk and the network give.
pub const PREWARMS_MAX: usize = 4;
/// Chunks of one of them under way: what a restore has.
pub const PREWARM_CHUNKS_AT_ONCE: usize = kvstore_checkpoint::caps::CHUNKS_AT_ONCE;
/// The longest that a prewarm may take: a terabyte from a slow bucket.
pub const PREWARM_MS_MAX: u64 = 3600 * 1000;
/// A prewarm of the configuration that failed is tried again after this long ...
pub const PREWARM_RETRY: Duration = Duration::from_secs(1);
/// ... and twice as long each time, up to this.
pub const PREWARM_RETRY_MAX: Duration = Duration::from_secs(60);
/// Verifications of snapshots at once: each reads a whole snapshot from the store.
pub const SNAPSHOT_VERIFICATIONS_MAX: usize = 1;
/// A chunk that the disk refuses is offered again so many times, some seconds in all: writes that begin or end are in the way of others.
pub const PREWARM_REFUSALS_MAX: u32 = 100;
