//! Put: blocks go out as a stream, without a copy of their bytes.

use bytes::{Bytes, BytesMut};
use futures::stream;
use http::Request;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use kvstore_proto::data_stream::{self, Part, PartDecoder};
use kvstore_proto::v1;
use kvstore_proto::v1::put_request::Part as Wire;
use tonic::Status;
use tonic::body::Body;
use tower::Service;

use crate::caps::PUT_WINDOW_BYTES;
use crate::{Client, Error, GroupRef};

/// Bytes of one `data` message.
const DATA_BYTES: usize = 1 << 20;

/// A block to store.
#[derive(Clone, Debug)]
pub struct PutBlock {
    /// Names the block and its whole prefix: 1 to 32 bytes.
    pub hash: Bytes,
    /// The hash of the block before it; `None` for the first of a prefix.
    pub parent: Option<Bytes>,
    /// Its bytes.
    pub bytes: Bytes,
}

impl PutBlock {
    /// The first block of a prefix.
    pub fn new(hash: impl Into<Bytes>, bytes: impl Into<Bytes>) -> Self {
        Self { hash: hash.into(), parent: None, bytes: bytes.into() }
    }

    /// The block after `parent`.
    pub fn after(parent: impl Into<Bytes>, hash: impl Into<Bytes>, bytes: impl Into<Bytes>) -> Self {
        Self { hash: hash.into(), parent: Some(parent.into()), bytes: bytes.into() }
    }
}

/// A block to store, from wherever its bytes are: an engine keeps each layer's in a place of its own.
#[derive(Clone, Copy, Debug)]
pub struct PutSlice<'a> {
    /// Names the block and its whole prefix: 1 to 32 bytes.
    pub hash: &'a [u8],
    /// The hash of the block before it; `None` for the first of a prefix.
    pub parent: Option<&'a [u8]>,
    /// Its bytes, in order: in one part (`std::slice::from_ref`) or in several.
    pub parts: &'a [&'a [u8]],
}

/// How a put is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct PutOptions {
    /// The level wanted; unspecified means MEMORY.
    pub level: v1::Level,
    /// For DURABLE: where the object store does not take the blocks now, a lower level will do; each result says which.
    pub or_lower: bool,
    /// The blocks go to the object store in the background, whatever the daemon's configuration says of the namespace: of a
    /// session that is to outlive the node. Nothing waits for that.
    pub upload: bool,
    /// More blocks of the same request follow in another put.
    pub more_follows: bool,
    /// Leave out the checksum, over gRPC: for bytes that the caller cannot vouch for anyway. (Over the local plane there is no
    /// wire to guard: the daemon takes the checksum of what it stored.)
    pub without_checksum: bool,
}

impl Client {
    /// Stores blocks; the outcome of each, in order.
    pub async fn put(&self, group: &GroupRef, blocks: Vec<PutBlock>) -> Result<Vec<v1::PutResult>, Error> {
        self.put_with(group, blocks, PutOptions::default()).await
    }

    /// The same, with options.
    pub async fn put_with(
        &self,
        group: &GroupRef,
        blocks: Vec<PutBlock>,
        options: PutOptions,
    ) -> Result<Vec<v1::PutResult>, Error> {
        let deadline_ms = self.deadline_ms();
        // The wait for an object store is much longer than any copy: those puts go over gRPC alone.
        if options.level != v1::Level::Durable
            && let Some(local) = self.local_group(group).await?
            && let Some(results) = self.within(local.put(&blocks, options, deadline_ms)).await?
        {
            return Ok(results);
        }
        match self.put_over_grpc(group, blocks.clone(), options).await {
            Err(Error::NotFound(why)) => {
                if !self.register_again(&group.layout_digest).await? {
                    return Err(Error::NotFound(why));
                }
                self.put_over_grpc(group, blocks, options).await
            }
            results => results,
        }
    }

    /// Stores blocks from borrowed memory; the outcome of each, in order. Over the local plane nothing is copied but into the
    /// daemon's memory; over gRPC each block is copied once more, since the connection keeps what it sends: 64 MiB at a time.
    pub async fn put_from(
        &self,
        group: &GroupRef,
        blocks: &[PutSlice<'_>],
        options: PutOptions,
    ) -> Result<Vec<v1::PutResult>, Error> {
        let deadline_ms = self.deadline_ms();
        self.within(async {
            if options.level != v1::Level::Durable
                && let Some(local) = self.local_group(group).await?
                && let Some(results) = local.put_from(blocks, options, deadline_ms).await?
            {
                return Ok(results);
            }
            let owned = |block: &PutSlice<'_>| PutBlock {
                hash: Bytes::copy_from_slice(block.hash),
                parent: block.parent.map(Bytes::copy_from_slice),
                bytes: block.parts.concat().into(),
            };
            let (mut results, mut rest) = (Vec::with_capacity(blocks.len()), blocks);
            loop {
                let (now, later) = rest.split_at(window(rest));
                let more_follows = options.more_follows || !later.is_empty();
                let options = PutOptions { more_follows, ..options };
                results.extend(self.put_with(group, now.iter().map(owned).collect(), options).await?);
                rest = later;
                if rest.is_empty() {
                    return Ok(results);
                }
            }
        })
        .await
    }

    async fn put_over_grpc(
        &self,
        group: &GroupRef,
        blocks: Vec<PutBlock>,
        options: PutOptions,
    ) -> Result<Vec<v1::PutResult>, Error> {
        let open = v1::PutOpen {
            layout_digest: group.layout_digest.clone(),
            group: group.group,
            level: options.level.into(),
            more_follows: options.more_follows,
            or_lower: options.or_lower,
            upload: options.upload,
        };
        let open = data_stream::message(&v1::PutRequest { part: Some(Wire::Open(open)) });
        let frames = blocks.into_iter().flat_map(move |block| block_frames(block, options));
        let frames = std::iter::once(open).chain(frames).map(|bytes| Ok::<_, Status>(Frame::data(bytes)));
        let body = Body::new(StreamBody::new(stream::iter(frames)));
        self.within(async {
            let response = self.stream("/kvstore.v1.BlockData/Put", body).await?;
            Ok(one_message::<v1::PutResponse>(response).await?.results)
        })
        .await
    }

    /// Sends a request whose body is a stream of gRPC messages; an answer that is an error is one here.
    pub(crate) async fn stream(&self, path: &str, body: Body) -> Result<http::Response<hyper::body::Incoming>, Error> {
        let mut connection = self.connection().await?;
        let request = Request::post(format!("http://kvstore{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-timeout", self.grpc_timeout())
            .body(body)
            .map_err(|error| Error::Other(error.to_string()))?;
        std::future::poll_fn(|cx| connection.poll_ready(cx)).await?;
        let response = connection.call(request).await?;
        match Status::from_header_map(response.headers()) {
            Some(status) if status.code() != tonic::Code::Ok => Err(status.into()),
            _ if !response.status().is_success() => {
                Err(Error::Other(format!("the daemon answered with HTTP {}", response.status())))
            }
            _ => Ok(response),
        }
    }
}

/// Leading blocks that are copied for one call: at least one, unless there is none.
fn window(blocks: &[PutSlice<'_>]) -> usize {
    let mut bytes = 0;
    let fits = |block: &&PutSlice<'_>| {
        bytes += block.parts.iter().map(|part| part.len()).sum::<usize>();
        bytes <= PUT_WINDOW_BYTES
    };
    blocks.iter().take_while(fits).count().max(1).min(blocks.len())
}

/// A block's frames: its announcement together with the head of its first bytes, then bytes and heads.
fn block_frames(block: PutBlock, options: PutOptions) -> Vec<Bytes> {
    let announcement = v1::PutBlock {
        sequence_hash: block.hash,
        parent_hash: block.parent.unwrap_or_default(),
        length: block.bytes.len() as u64,
        crc32: (!options.without_checksum).then(|| crc32fast::hash(&block.bytes)),
    };
    let mut head = BytesMut::from(data_stream::message(&v1::PutRequest { part: Some(Wire::Block(announcement)) }));
    let mut frames = Vec::with_capacity(2 + 2 * block.bytes.len() / DATA_BYTES);
    let mut rest = block.bytes;
    while !rest.is_empty() {
        let data = rest.split_to(rest.len().min(DATA_BYTES));
        head.extend_from_slice(&data_stream::data_head(data.len()));
        frames.push(std::mem::take(&mut head).freeze());
        frames.push(data);
    }
    if !head.is_empty() {
        frames.push(head.freeze());
    }
    frames
}

/// The only message of a unary response, once its trailers say OK.
async fn one_message<M: prost::Message + Default>(response: http::Response<hyper::body::Incoming>) -> Result<M, Error> {
    let mut body = response.into_body();
    let mut decoder = PartDecoder::new();
    let mut message = None;
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(bytes) => decoder.push(bytes),
            Err(frame) => check_trailers(frame.trailers_ref())?,
        }
        while let Some(part) = decoder.next_part::<M>().map_err(|error| Error::Other(error.to_string()))? {
            if let Part::Message(whole) = part {
                message = Some(whole);
            }
        }
    }
    message.ok_or_else(|| Error::Unavailable("the daemon's answer was cut off".into()))
}

pub(crate) fn check_trailers(trailers: Option<&http::HeaderMap>) -> Result<(), Error> {
    match trailers.and_then(Status::from_header_map) {
        Some(status) if status.code() != tonic::Code::Ok => Err(status.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A put from borrowed memory copied the whole prompt before it sent the first block: gigabytes beside the engine's own.
    #[test]
    fn what_one_call_copies_is_bounded() {
        let mib = vec![0u8; 1 << 20];
        let parts = [&*mib; 30];
        let block = PutSlice { hash: b"x", parent: None, parts: &parts };
        assert_eq!([0, 1, 2].map(|blocks| window(&vec![block; blocks])), [0, 1, 2]);
        assert_eq!(window(&[block; 100]), 2, "60 MiB");
        let large = [&*mib; 100];
        assert_eq!(window(&[PutSlice { parts: &large, ..block }; 3]), 1, "one goes, however large it is");
    }
}
