//! Get: blocks come in as a stream, checked against their checksums.

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use kvstore_proto::data_stream::{self, Part, PartDecoder};
use kvstore_proto::v1;
use kvstore_proto::v1::get_response::Part as Wire;
use tonic::body::Body;

use crate::local::{LocalRead, sequence_hashes};
use crate::put::check_trailers;
use crate::{Client, Error, GroupRef};

/// How a get is done.
#[derive(Clone, Debug, Default)]
pub struct GetOptions {
    /// Only these layers of each block.
    pub layers: Option<std::ops::Range<u32>>,
    /// Only these heads.
    pub heads: Option<std::ops::Range<u32>>,
    /// A look-up's ticket.
    pub ticket: Bytes,
    /// Stop at the first block that is not there.
    pub leading_run: bool,
}

/// What became of one asked block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GetOutcome {
    /// Its bytes.
    Hit(Bytes),
    /// On its way: ask again soon.
    InFlight,
    /// Not there.
    Miss,
    /// Pinned, and not to be read from any tier any more.
    DataLoss,
}

impl GetOutcome {
    /// The bytes of a hit.
    pub fn bytes(&self) -> Option<&Bytes> {
        match self {
            Self::Hit(bytes) => Some(bytes),
            _ => None,
        }
    }
}

/// Where a get's bytes go.
trait Sink {
    /// Block `index` comes with `length` bytes. False: the sink has no room for it.
    fn hit(&mut self, index: usize, length: usize) -> bool;
    fn data(&mut self, bytes: &[u8]);
    fn other(&mut self, index: usize, status: v1::GetStatus);
}

impl Client {
    /// Reads whole blocks; the outcome of each, in order.
    pub async fn get(&self, group: &GroupRef, hashes: &[Bytes]) -> Result<Vec<GetOutcome>, Error> {
        self.get_with(group, hashes, GetOptions::default()).await
    }

    /// The same, with options. With `leading_run`, there are fewer outcomes than hashes when one is no hit.
    pub async fn get_with(
        &self,
        group: &GroupRef,
        hashes: &[Bytes],
        options: GetOptions,
    ) -> Result<Vec<GetOutcome>, Error> {
        self.within(async {
            let whole = options.layers.is_none() && options.heads.is_none();
            let mut read = Vec::new();
            if whole
                && !hashes.is_empty()
                && let Some(local) = self.local_group(group).await?
            {
                let ticket = ticket_number(&options.ticket)?;
                match local.get(sequence_hashes(hashes)?, &options, ticket, self.deadline_ms()).await? {
                    LocalRead::Done(outcomes) => return Ok(outcomes),
                    LocalRead::Partly(outcomes) => read = outcomes,
                }
            }
            let first = read.len();
            let mut sink = Collect { outcomes: read, filling: None };
            self.run_get(group, (hashes, first), options, &mut sink).await?;
            sink.finish();
            Ok(sink.outcomes)
        })
        .await
    }

    /// Reads whole blocks into `buffers`, one a hash, each as long as a block. How many leading blocks
    /// were read: those after the first that is not there are left alone.
    pub async fn get_into(
        &self,
        group: &GroupRef,
        hashes: &[Bytes],
        buffers: &mut [&mut [u8]],
    ) -> Result<usize, Error> {
        if buffers.len() != hashes.len() {
            return Err(Error::Invalid(format!(
                "{} buffers were given for {} hashes; give one for each hash",
                buffers.len(),
                hashes.len()
            )));
        }
        self.within(async {
            let mut first = 0;
            if let Some(local) = self.local_group(group).await? {
                match local.get_into(sequence_hashes(hashes)?, buffers, self.deadline_ms()).await? {
                    LocalRead::Done(blocks) => return Ok(blocks),
                    LocalRead::Partly(blocks) => first = blocks,
                }
            }
            let options = GetOptions { leading_run: true, ..GetOptions::default() };
            let mut sink = CopyInto { buffers, blocks: first, filled: 0, lost: None };
            self.run_get(group, (hashes, first), options, &mut sink).await?;
            match sink.lost {
                Some(at) => Err(crate::local::data_loss(at)),
                None => Ok(sink.blocks),
            }
        })
        .await
    }

    /// Reads the blocks from `first` on over gRPC.
    async fn run_get(
        &self,
        group: &GroupRef,
        (hashes, first): (&[Bytes], usize),
        options: GetOptions,
        sink: &mut impl Sink,
    ) -> Result<(), Error> {
        let wire_range = |range: std::ops::Range<u32>| v1::Range { start: range.start, end: range.end };
        let request = v1::GetRequest {
            layout_digest: group.layout_digest.clone(),
            group: group.group,
            sequence_hashes: hashes.get(first..).unwrap_or_default().to_vec(),
            layers: options.layers.map(wire_range),
            heads: options.heads.map(wire_range),
            ticket: options.ticket,
            leading_run: options.leading_run,
        };
        let message = data_stream::message(&request);
        let start = || self.stream("/kvstore.v1.BlockData/Get", Body::new(http_body_util::Full::new(message.clone())));
        let response = match start().await {
            Err(Error::NotFound(why)) => {
                if !self.register_again(&group.layout_digest).await? {
                    return Err(Error::NotFound(why));
                }
                start().await?
            }
            response => response?,
        };
        receive(response.into_body(), first, sink).await
    }
}

/// A ticket's number; 0 for none.
fn ticket_number(ticket: &[u8]) -> Result<u128, Error> {
    match ticket {
        [] => Ok(0),
        bytes => bytes
            .try_into()
            .map(u128::from_le_bytes)
            .map_err(|_| Error::Invalid(format!("ticket: a ticket has 16 bytes, not {}", bytes.len()))),
    }
}

/// The block whose bytes are coming.
struct Coming {
    index: usize,
    left: usize,
    expected: Option<u32>,
    crc32: crc32fast::Hasher,
}

impl Coming {
    fn take(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<(), Error> {
        let left = self.left.checked_sub(bytes.len());
        self.left =
            left.ok_or_else(|| Error::DataLoss(format!("block {} came with more bytes than announced", self.index)))?;
        if self.expected.is_some() {
            self.crc32.update(bytes);
        }
        sink.data(bytes);
        if self.left == 0 {
            self.check()?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Error> {
        let found = self.crc32.clone().finalize();
        match self.expected {
            Some(expected) if expected != found => Err(Error::DataLoss(format!(
                "block {} came with checksum {found:08x} instead of {expected:08x}",
                self.index
            ))),
            _ => Ok(()),
        }
    }
}

async fn receive(mut body: Incoming, first: usize, sink: &mut impl Sink) -> Result<(), Error> {
    let mut decoder = PartDecoder::new();
    let mut coming: Option<Coming> = None;
    let mut ended = false;
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(bytes) => decoder.push(bytes),
            Err(frame) => {
                check_trailers(frame.trailers_ref())?;
                ended = true;
            }
        }
        while let Some(part) =
            decoder.next_part::<v1::GetResponse>().map_err(|error| Error::Other(error.to_string()))?
        {
            match part {
                Part::Data(bytes) => take(&mut coming, &bytes, sink)?,
                Part::Message(v1::GetResponse { part: Some(Wire::Data(bytes)) }) => take(&mut coming, &bytes, sink)?,
                Part::Message(v1::GetResponse { part: Some(Wire::Block(block)) }) => {
                    no_bytes_missing(coming.as_ref())?;
                    coming = announce(&block, first, sink)?;
                }
                Part::Message(_) => return Err(Error::Other("the daemon sent an empty message".into())),
            }
        }
    }
    if !ended || decoder.finish().is_err() {
        return Err(Error::Unavailable("the daemon's answer was cut off".into()));
    }
    no_bytes_missing(coming.as_ref())
}

fn take(coming: &mut Option<Coming>, bytes: &[u8], sink: &mut impl Sink) -> Result<(), Error> {
    let coming = coming.as_mut().ok_or_else(|| Error::Other("the daemon sent bytes that belong to no block".into()))?;
    coming.take(bytes, sink)
}

fn no_bytes_missing(coming: Option<&Coming>) -> Result<(), Error> {
    match coming {
        Some(coming) if coming.left > 0 => {
            Err(Error::DataLoss(format!("block {} came with {} bytes fewer than announced", coming.index, coming.left)))
        }
        _ => Ok(()),
    }
}

fn announce(block: &v1::GetBlock, first: usize, sink: &mut impl Sink) -> Result<Option<Coming>, Error> {
    let index = first + block.index as usize;
    if block.status() != v1::GetStatus::Hit {
        sink.other(index, block.status());
        return Ok(None);
    }
    let left = block.length as usize;
    if !sink.hit(index, left) {
        return Err(Error::Invalid(format!("block {index} has {left} bytes, and its buffer has another size")));
    }
    Ok(Some(Coming { index, left, expected: block.crc32, crc32: crc32fast::Hasher::new() }))
}

/// Collects outcomes.
struct Collect {
    outcomes: Vec<GetOutcome>,
    filling: Option<Vec<u8>>,
}

/// Room that is set aside for a block before its bytes come, at most: a length is a claim until then.
const RESERVE_BYTES_MAX: usize = 64 << 20;

impl Collect {
    fn finish(&mut self) {
        if let Some(bytes) = self.filling.take() {
            self.outcomes.push(GetOutcome::Hit(bytes.into()));
        }
    }
}

impl Sink for Collect {
    fn hit(&mut self, _: usize, length: usize) -> bool {
        self.finish();
        self.filling = Some(Vec::with_capacity(length.min(RESERVE_BYTES_MAX)));
        true
    }

    fn data(&mut self, bytes: &[u8]) {
        if let Some(filling) = &mut self.filling {
            filling.extend_from_slice(bytes);
        }
    }

    fn other(&mut self, _: usize, status: v1::GetStatus) {
        self.finish();
        self.outcomes.push(match status {
            v1::GetStatus::InFlight => GetOutcome::InFlight,
            v1::GetStatus::DataLoss => GetOutcome::DataLoss,
            _ => GetOutcome::Miss,
        });
    }
}

/// Copies into the caller's buffers.
struct CopyInto<'a, 'b> {
    buffers: &'a mut [&'b mut [u8]],
    /// Blocks that were hits so far.
    blocks: usize,
    /// Bytes of the last of them that came.
    filled: usize,
    /// A pinned block that cannot be read any more.
    lost: Option<usize>,
}

impl Sink for CopyInto<'_, '_> {
    fn hit(&mut self, index: usize, length: usize) -> bool {
        self.blocks = index + 1;
        self.filled = 0;
        self.buffers.get(index).is_some_and(|buffer| buffer.len() == length)
    }

    fn data(&mut self, bytes: &[u8]) {
        let end = self.filled + bytes.len();
        let buffer = self.blocks.checked_sub(1).and_then(|at| self.buffers.get_mut(at));
        if let Some(place) = buffer.and_then(|buffer| buffer.get_mut(self.filled..end)) {
            place.copy_from_slice(bytes);
        }
        self.filled = end;
    }

    fn other(&mut self, index: usize, status: v1::GetStatus) {
        if status == v1::GetStatus::DataLoss {
            self.lost = Some(index);
        }
    }
}
