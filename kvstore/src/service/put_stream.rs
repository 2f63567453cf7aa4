//! The stream of a put: its messages and bytes, on their way from the connection's buffers into slots.
//!
//! A block's bytes are copied once and checksummed on the way. A complete block is committed when the next one starts or the
//! call ends, because only then it is known whether it is the last block of its request. A call never waits for another writer
//! while it has an uncommitted block, so two calls can't wait for each other.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use kvstore_proto::data_stream::{Part, PartDecoder, StreamError};
use kvstore_proto::v1::put_request::Part as Wire;
use kvstore_proto::v1::{Level as WireLevel, PutBlock, PutOpen, PutRequest, PutResponse, PutResult};
use kvstore_tiers::SequenceHash;
use kvstore_tiers::host::{NamespaceId, RegisteredLayout};
use kvstore_tiers::stack::{Level, Wish};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;

use crate::daemon::Daemon;
use crate::verbs::put::{self, Into, Target};
use crate::{caps, clock, wire};

/// Stores the blocks that `body` brings.
pub async fn put(
    daemon: &Arc<Daemon>,
    namespace: NamespaceId,
    body: Body,
    deadline: Instant,
) -> Result<PutResponse, Status> {
    let _entered = daemon.data_calls.enter(namespace).ok_or_else(|| put::too_many_calls(daemon))?;
    let mut call = PutCall {
        daemon,
        namespace,
        deadline,
        target: None,
        more_follows: false,
        current: None,
        last: None,
        results: Vec::new(),
        hashes: Vec::new(),
        local: Vec::new(),
        durable: Vec::new(),
        or_lower: false,
    };
    tokio::time::timeout_at(deadline, async {
        call.run(body).await?;
        call.until_local().await;
        call.until_durable().await
    })
    .await
    .map_err(|_| late())??;
    Ok(PutResponse { results: call.results })
}

fn late() -> Status {
    Status::deadline_exceeded("the call's deadline passed; the blocks that were complete by then are stored")
}

fn stream_error(error: StreamError) -> Status {
    match error {
        StreamError::Compressed => Status::unimplemented(error.to_string()),
        _ => Status::invalid_argument(error.to_string()),
    }
}

/// The block whose bytes are coming.
struct Current {
    hash: SequenceHash,
    parent: Option<SequenceHash>,
    expected: u64,
    received: u64,
    crc32: Option<u32>,
    into: Into,
}

struct PutCall<'a> {
    daemon: &'a Arc<Daemon>,
    namespace: NamespaceId,
    deadline: Instant,
    target: Option<Target>,
    more_follows: bool,
    current: Option<Current>,
    /// The last block that is there now.
    last: Option<SequenceHash>,
    results: Vec<PutResult>,
    /// The names of the results' blocks, where DURABLE was asked for.
    hashes: Vec<SequenceHash>,
    /// Results that wait to become LOCAL.
    local: Vec<(usize, oneshot::Receiver<bool>)>,
    /// Results that wait to become DURABLE.
    durable: Vec<(usize, oneshot::Receiver<bool>)>,
    /// A lower level will do, where DURABLE is not to be had now.
    or_lower: bool,
}

impl PutCall<'_> {
    async fn run(&mut self, mut body: Body) -> Result<(), Status> {
        let mut decoder = PartDecoder::new();
        while let Some(frame) = body.frame().await {
            let Ok(bytes) = frame?.into_data() else { continue };
            decoder.push(bytes);
            while let Some(part) = decoder.next_part::<PutRequest>().map_err(stream_error)? {
                match part {
                    Part::Data(bytes) => self.data(&bytes)?,
                    Part::Message(message) => self.message(message).await?,
                }
            }
        }
        decoder.finish().map_err(stream_error)?;
        let tail = self.target.is_some() && !self.more_follows;
        self.finish_block(tail)?;
        if self.results.is_empty() {
            return Err(wire::invalid("block", "the call has no block: send at least one"));
        }
        if let (Some(target), Some(last)) = (&self.target, self.last) {
            self.daemon.host.refresh_chain(&target.layout, target.group, last);
        }
        Ok(())
    }

    async fn message(&mut self, message: PutRequest) -> Result<(), Status> {
        match message.part {
            Some(Wire::Open(open)) => self.open(&open),
            Some(Wire::Block(block)) => {
                self.finish_block(false)?;
                self.begin_block(&block).await
            }
            Some(Wire::Data(bytes)) => self.data(&bytes),
            None => Err(wire::invalid("part", "a message must have open, block or data")),
        }
    }

    fn open(&mut self, open: &PutOpen) -> Result<(), Status> {
        if self.target.is_some() {
            return Err(wire::invalid("open", "must be the first message, and must come only once"));
        }
        let level = wire::level("open.level", open.level)?;
        let wish = Wish { namespace: self.namespace, level, upload: open.upload };
        put::check_tiers(self.daemon, &wish)?;
        let refused = self.daemon.object.as_ref().and_then(|object| object.refuses_durable());
        if let Some(why) = refused.filter(|_| level == Level::Durable && !open.or_lower) {
            return Err(not_durable(&why));
        }
        let layout = wire::known_layout(self.daemon, self.namespace, &open.layout_digest)?;
        let (group, _) = wire::known_group(&layout, open.group)?;
        self.more_follows = open.more_follows;
        self.or_lower = open.or_lower;
        self.target = Some(Target { layout, group, wish });
        Ok(())
    }

    async fn begin_block(&mut self, block: &PutBlock) -> Result<(), Status> {
        let target = self.target.as_ref().ok_or_else(|| wire::invalid("block", "must come after open"))?;
        if self.results.len() >= caps::BLOCKS_PER_PUT_MAX {
            let problem = format!("one call can store at most {} blocks", caps::BLOCKS_PER_PUT_MAX);
            return Err(wire::invalid("block", problem));
        }
        let hash = wire::hash("block.sequence_hash", &block.sequence_hash)?;
        let parent = match block.parent_hash.as_ref() {
            [] => None,
            bytes => Some(wire::hash("block.parent_hash", bytes)?),
        };
        let length = put::checked_length(target, block.length)?;
        let request = put::fill_request(target, hash, parent, length, self.deadline);
        let has_room = self.daemon.stack.until_room(&target.wish).await;
        let into = if has_room { put::begin(self.daemon, &request).await? } else { put::busy(self.daemon) };
        self.current = Some(Current { hash, parent, expected: block.length, received: 0, crc32: block.crc32, into });
        Ok(())
    }

    fn data(&mut self, bytes: &Bytes) -> Result<(), Status> {
        let at = self.results.len();
        let current = self.current.as_mut().ok_or_else(|| wire::invalid("data", "must come after block"))?;
        current.received += bytes.len() as u64;
        if current.received > current.expected {
            let problem =
                format!("block {at} ({}) announced {} bytes but brought more", current.hash, current.expected);
            return Err(wire::invalid("data", problem));
        }
        if let Into::Slot(fill) = &mut current.into {
            fill.append(bytes, clock::now()).map_err(|error| wire::invalid("data", error))?;
        }
        Ok(())
    }

    /// The block that was coming is complete, or the stream is wrong.
    fn finish_block(&mut self, tail: bool) -> Result<(), Status> {
        let Some(current) = self.current.take() else { return Ok(()) };
        let (at, hash) = (self.results.len(), current.hash);
        if current.received != current.expected {
            let problem =
                format!("block {at} ({hash}) announced {} bytes but brought {}", current.expected, current.received);
            return Err(wire::invalid("data", problem));
        }
        let Some(target) = &self.target else { return Ok(()) };
        let finished = match current.into {
            Into::Past(status) => put::present(self.daemon, target, hash, current.parent, status),
            Into::Slot(fill) => {
                let crc32 = fill.crc32();
                if let Some(expected) = current.crc32.filter(|expected| *expected != crc32) {
                    let problem = format!(
                        "block {at} ({hash}) was not stored: its bytes have the checksum {crc32:08x}, but it announced {expected:08x}"
                    );
                    return Err(wire::invalid("block.crc32", problem));
                }
                put::publish(self.daemon, target, *fill, hash, current.parent, tail)
            }
        };
        if finished.level.is_some() {
            self.last = Some(hash);
        }
        if let Some(local) = finished.copies.local {
            self.local.push((self.results.len(), local));
        }
        if let Some(durable) = finished.copies.durable {
            self.durable.push((self.results.len(), durable));
        }
        if target.wish.level == Level::Durable {
            self.hashes.push(hash);
        }
        let level = wire::level_message(finished.level);
        self.results.push(PutResult { status: finished.status.into(), level: level.into() });
        Ok(())
    }
}

impl PutCall<'_> {
    /// Waits for the blocks that are to be LOCAL. One that cannot be stays MEMORY, and its result says so.
    async fn until_local(&mut self) {
        for (at, local) in std::mem::take(&mut self.local) {
            if local.await == Ok(true)
                && let Some(result) = self.results.get_mut(at)
            {
                result.level = WireLevel::Local.into();
            }
        }
    }

    /// Waits for the blocks that are to be DURABLE. Those that cannot be now are LOCAL, or MEMORY, and are uploaded later; the
    /// call fails, unless a lower level will do.
    async fn until_durable(&mut self) -> Result<(), Status> {
        let Some(target) = self.target.as_ref().filter(|target| target.wish.level == Level::Durable) else {
            return Ok(());
        };
        let Some(object) = &self.daemon.object else { return Ok(()) };
        object.flush();
        for (at, durable) in std::mem::take(&mut self.durable) {
            if durable.await == Ok(true)
                && let Some(result) = self.results.get_mut(at)
            {
                result.level = WireLevel::Durable.into();
            }
        }
        let stored = |result: &&PutResult| result.level() != WireLevel::Unspecified;
        let lacking = self.results.iter().filter(stored).filter(|result| result.level() != WireLevel::Durable).count();
        if lacking == 0 {
            return Ok(());
        }
        if !self.or_lower {
            let why = object.status().reason;
            let why = if why.is_empty() { "the object store did not take them".to_owned() } else { why };
            return Err(not_durable(&format!("{lacking} of {} blocks: {why}", self.results.len())));
        }
        self.lower(&Arc::clone(&target.layout), target.group).await;
        Ok(())
    }

    /// What is not DURABLE is LOCAL, where it is on disk.
    async fn lower(&mut self, layout: &Arc<RegisteredLayout>, group: u16) {
        let Some(nvme) = self.daemon.nvme.clone() else { return };
        for synced in nvme.sync() {
            if synced.await != Ok(true) {
                return;
            }
        }
        for (result, hash) in self.results.iter_mut().zip(&self.hashes) {
            if result.level() == WireLevel::Memory && nvme.is_safe(layout, group, &[*hash]) == [true] {
                result.level = WireLevel::Local.into();
            }
        }
    }
}

/// The answer where DURABLE cannot be had now.
fn not_durable(why: &str) -> Status {
    Status::unavailable(format!(
        "the blocks are not DURABLE: {why}. The daemon uploads the stored blocks once the store answers. To accept less, ask for the level LOCAL, or set or_lower in the request"
    ))
}
