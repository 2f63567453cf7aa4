//! The router's bounds, each with its reason. Those of the index are in `kvstore_index::caps`.

use std::time::Duration;

/// Bytes of one message of events. Engines set no bound: a step has one message, and ten prompts of 140,000 tokens that a connector brings in
/// one step make 7 MB. This is for forty of them; a longer message costs itself alone.
pub const EVENT_BYTES_MAX: usize = 32 << 20;
/// Blocks of one layer group that an engine says it stored more than once: 24 bytes each. Of others, the first removal counts.
pub const COPIES_MAX: usize = 1 << 18;
/// Blocks of one layer group whose names are learnt from the engine's events: some 60 bytes each. Others are not known.
pub const LEARNT_MAX: usize = 1 << 18;
/// Seconds after which the kernel asks whether an engine that says nothing is still there, and between two tries; and tries: 40 s in all.
pub const EVENTS_KEEPALIVE: Duration = Duration::from_secs(10);
/// ...
pub const EVENTS_KEEPALIVE_TRIES: u32 = 3;
/// Events of one message: each takes some 150 bytes here, and two there.
pub const EVENTS_PER_MESSAGE_MAX: usize = 1 << 16;
/// A prefetch that the router asks for ends after this long: by then the engine has asked itself.
pub const PREFETCH_DEADLINE_MS: u32 = 10_000;
/// Text of an answer that is kept while it is not known to end with a whole character. An engine that always sends several tokens at once
/// never says, and long answers are not to be computed a second time.
pub const AGAIN_BYTES_MAX: usize = 16 << 10;
/// A character has at most four bytes, and hardly a token less than one: so many tokens may be part of one.
pub const CHARACTER_TOKENS_MAX: usize = 8;
/// Tokens of a stream are counted at this pace: what they weigh changes slowly.
pub const TOKENS_COUNTED_EVERY: Duration = Duration::from_millis(100);
/// A request of so few bytes is read where it came in: handing it to another thread takes longer.
pub const READ_AT_ONCE_BYTES: usize = 2048;
/// A request of which something is heard is said to live at this pace.
pub const HEARD_EVERY: Duration = Duration::from_secs(1);
/// Sessions of which it is known where they were: 100 bytes each.
pub const SESSIONS_MAX: usize = 100_000;
/// Bytes of a request's body, unless the configuration says otherwise: a conversation with some pictures in it, or an hour of speech.
pub const REQUEST_BYTES_MAX: u64 = 64 << 20;
/// Bytes of the bodies of all requests under way, and of what is kept of their answers (long answers and events, and the tokens of prompts):
/// some thousand conversations of the longest kind.
pub const REQUESTS_BYTES_MAX: usize = 1 << 30;
/// Members of a request's object: engines know some seventy.
pub const REQUEST_MEMBERS_MAX: usize = 1024;
/// A body that sends nothing for so long is given up.
pub const BODY_WITHIN: Duration = Duration::from_secs(30);
/// Bytes of an answer, or of an event of one, that are kept without asking whether there is memory for them.
pub const ANSWER_UNCOUNTED: usize = 64 << 10;
/// A body that is too long is read for so long, so that its client sees why it is refused.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(5);
/// Bytes of an answer that is kept until it is whole, so that another worker can be asked if it breaks off: one of a hundred thousand
/// tokens. Of a longer one, what came is passed on.
pub const ANSWER_KEPT_MAX: usize = 1 << 20;
/// Bytes of an answer that the router reads for itself: a prompt's that was computed ahead, with its token ids.
pub const ANSWER_READ_MAX: usize = 64 << 20;
/// Bytes of one event of an answer that does: the first may bring a whole prompt's token ids.
pub const ANSWER_EVENT_BYTES_MAX: usize = 16 << 20;
/// Workers that a request is tried at, before its first byte and after.
pub const TRIES_MAX: usize = 4;
/// Connections to a worker that wait for the next request.
pub const IDLE_CONNECTIONS_MAX: usize = 64;
/// They wait no longer than this: common servers close them after five seconds.
pub const IDLE_CONNECTION_TIME: Duration = Duration::from_secs(4);
/// A worker takes a connection within this, or is asked no more.
pub const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// A kept connection that was closed meanwhile shows that at once. A worker that hangs up later has begun to work.
pub const STALE_WITHIN: Duration = Duration::from_secs(1);
/// A worker that does not answer so often, one time after the other, is away.
pub const DOUBTS_MAX: u32 = 3;
/// Behind the last line of an answer, its end is waited for no longer than this.
pub const END_WITHIN: Duration = Duration::from_secs(2);
/// An engine that wrote no text for so many tokens has no tokenizer: no character has as many, and no other text is held back from a request
/// that can be gone on with.
pub const HELD_BACK_MAX: usize = 32;
/// How often workers are asked what they serve, and how often at most where a request names what is not known.
pub const MODELS_EVERY: Duration = Duration::from_secs(10);
/// ...
pub const MODELS_EVERY_MIN: Duration = Duration::from_secs(1);
/// Models, with their adapters, that a worker may say that it serves: some hundred bytes each.
pub const MODELS_PER_WORKER_MAX: usize = 4096;
/// Connections of clients; each may need another one to a worker. Fewer, where the process may have fewer descriptors.
pub const CONNECTIONS_MAX: usize = 16_384;
/// A client says what it wants within this, from the start of its connection or the end of its last request on: longer than clients keep
/// idle connections, as common servers have it.
pub const HEADER_WITHIN: Duration = Duration::from_secs(75);
/// A worker, or another replica, that does not answer within this is away.
pub const HEALTH_WITHIN: Duration = Duration::from_secs(2);
/// How often other replicas are asked what they have under way.
pub const PEERS_EVERY: Duration = Duration::from_millis(200);
/// At its end the router waits this long for answers under way.
pub const CLOSE_WITHIN: Duration = Duration::from_secs(30);
/// At its end the router does not wait for connections on which nothing was under way for so long.
pub const QUIET_WITHIN: Duration = Duration::from_secs(5);
/// Workers at once: each has up to some holders in the index.
pub const WORKERS_MAX: usize = 2048;
/// Pictures and the like of one request that are encoded ahead.
pub const ENCODED_PARTS_MAX: usize = 64;
/// Bytes of an answer's beginning that are looked through for its id: it stands among the first hundred, or behind an event's name.
pub const ANSWER_ID_WITHIN: usize = 4 << 10;
/// Messages of conversations of which it is remembered who had them, each once for each worker: 16 bytes, so 32 MiB. Twenty thousand
/// conversations of a hundred messages.
pub const CONVERSATIONS_SLOTS: usize = 1 << 21;
/// Shapes of requests, of all models, whose prompts are compared with an engine's. Others are believed.
pub const SHAPES_MAX: usize = 1024;
/// A shape that was right is compared again after this long: engines are updated, and the day changes.
pub const SHAPE_AGREES_FOR: Duration = Duration::from_secs(3600);
/// One that was not is compared again after this long: it may have been one odd request that was compared, and the shape is others', too.
pub const SHAPE_DIFFERS_FOR: Duration = Duration::from_secs(600);
/// Bytes of a request whose prompt an engine is asked for: some 60,000 tokens, a tenth of a second of its time.
pub const COMPARED_BYTES_MAX: usize = 256 << 10;
/// Engines that are asked for prompts at once: answering requests comes first.
pub const ENGINE_PROMPTS_AT_ONCE: usize = 4;
/// An engine says what it makes of a prompt within this, or is not asked for a while.
pub const ENGINE_PROMPT_WITHIN: Duration = Duration::from_secs(5);
/// ...
pub const ENGINE_PROMPT_AGAIN: Duration = Duration::from_secs(60);
/// Bytes of an engine's answer that says a prompt's tokens: eight for each of half a million.
pub const ENGINE_PROMPT_BYTES_MAX: usize = 4 << 20;
/// Bytes of the blocks' names of conversations that engines told: 40 for each block, so some thousand conversations of 30,000 tokens.
pub const ENGINE_PROMPTS_BYTES: usize = 64 << 20;
