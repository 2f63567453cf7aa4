//! The framing of `BlockData`'s streams, without copies: gRPC length prefixes and the protobuf `data`
//! field around bytes that stay where they are.
//!
//! A stream is a run of gRPC messages (a flag byte, a 32-bit big-endian length, a protobuf message). Both
//! directions carry block bytes in field 3 of a oneof, so that one decoder serves both: it hands out a data
//! message's bytes as they arrive, and buffers every other message whole. What it takes is any valid
//! protobuf encoding; what it avoids copying is the one that every encoder writes.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, decode_varint, encode_key, encode_varint, encoded_len_varint};

/// Bytes of one gRPC message at most: the bound on `data`, and room for its tag.
pub const MESSAGE_BYTES_MAX: usize = DATA_BYTES_MAX + 64;
/// Bytes of one `data` field at most: large enough that framing costs nothing, small enough to buffer.
pub const DATA_BYTES_MAX: usize = 4 << 20;
/// Bytes before a gRPC message.
const PREFIX_BYTES: usize = 5;
/// The field that carries block bytes in PutRequest and GetResponse.
const DATA_FIELD: u32 = 3;
/// Its tag on the wire.
const DATA_TAG: u8 = (DATA_FIELD << 3) as u8 | WireType::LengthDelimited as u8;

/// What a stream brought next.
#[derive(Debug, PartialEq)]
pub enum Part<M> {
    /// A whole message.
    Message(M),
    /// Some bytes of a `data` message; others of the same message may follow.
    Data(Bytes),
}

/// Why a stream makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StreamError {
    /// Compression was never offered.
    #[error("compressed messages are not supported")]
    Compressed,
    /// Over the bound.
    #[error("a message has {0} bytes; at most {MESSAGE_BYTES_MAX} are allowed")]
    TooLarge(usize),
    /// Not the expected protobuf message.
    #[error("the message is malformed: {0}")]
    Malformed(String),
    /// The stream ended within a message.
    #[error("the stream ended within a message")]
    Truncated,
}

/// A whole message with its gRPC prefix.
pub fn message(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + len);
    put_prefix(&mut out, len);
    out.put(message.encode_to_vec().as_slice());
    out.freeze()
}

/// What goes before `data_bytes` bytes to make them a `data` message; 1 to [`DATA_BYTES_MAX`] bytes.
pub fn data_head(data_bytes: usize) -> Bytes {
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + 11);
    put_prefix(&mut out, 1 + encoded_len_varint(data_bytes as u64) + data_bytes);
    encode_key(DATA_FIELD, WireType::LengthDelimited, &mut out);
    encode_varint(data_bytes as u64, &mut out);
    out.freeze()
}

fn put_prefix(out: &mut BytesMut, len: usize) {
    out.put_u8(0);
    out.put_u32(len as u32);
}

enum State {
    /// Between messages.
    Prefix,
    /// Before a message of this many bytes, whose first bytes tell what it is.
    Start(usize),
    /// Within a message of this many bytes, of which `buffer` has the first.
    Whole(usize),
    /// Within a `data` message with this many bytes to come.
    Data(usize),
}

/// Takes a stream apart. Holds at most one incomplete message and what was pushed last.
pub struct PartDecoder {
    state: State,
    input: VecDeque<Bytes>,
    available: usize,
    buffer: BytesMut,
}

impl Default for PartDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl PartDecoder {
    /// At the start of a stream.
    pub fn new() -> Self {
        Self { state: State::Prefix, input: VecDeque::new(), available: 0, buffer: BytesMut::new() }
    }

    /// The next bytes of the stream.
    pub fn push(&mut self, bytes: Bytes) {
        self.available += bytes.len();
        if !bytes.is_empty() {
            self.input.push_back(bytes);
        }
    }

    /// Nothing more comes: an error when that is in the middle of a message.
    pub fn finish(&self) -> Result<(), StreamError> {
        let between = matches!(self.state, State::Prefix) && self.available == 0;
        if between { Ok(()) } else { Err(StreamError::Truncated) }
    }

    /// The next part, if enough bytes are there.
    pub fn next_part<M: Message + Default>(&mut self) -> Result<Option<Part<M>>, StreamError> {
        loop {
            match self.state {
                State::Prefix => {
                    let Some(prefix) = self.take_exactly(PREFIX_BYTES) else { return Ok(None) };
                    self.state = Self::start(prefix)?;
                }
                State::Start(0) => {
                    self.state = State::Prefix;
                    return decode(Bytes::new()).map(Some);
                }
                State::Start(len) => match self.data_bytes(len)? {
                    Some(state) => self.state = state,
                    None => return Ok(None),
                },
                State::Whole(len) => {
                    let Some(message) = self.take_exactly(len) else { return Ok(None) };
                    self.state = State::Prefix;
                    return decode(message).map(Some);
                }
                State::Data(0) => self.state = State::Prefix,
                State::Data(left) => {
                    let Some(bytes) = self.take_some(left) else { return Ok(None) };
                    self.state = State::Data(left - bytes.len());
                    return Ok(Some(Part::Data(bytes)));
                }
            }
        }
    }

    fn start(mut prefix: Bytes) -> Result<State, StreamError> {
        if prefix.get_u8() != 0 {
            return Err(StreamError::Compressed);
        }
        let len = prefix.get_u32() as usize;
        if len > MESSAGE_BYTES_MAX { Err(StreamError::TooLarge(len)) } else { Ok(State::Start(len)) }
    }

    /// Whether the message of `len` bytes that starts here is one `data` field and nothing else; `None`
    /// while too little of it is there to tell.
    fn data_bytes(&mut self, len: usize) -> Result<Option<State>, StreamError> {
        let head: Vec<u8> = self.input.iter().flatten().copied().take(11.min(len)).collect();
        let Some((tag, mut rest)) = head.split_first() else { return Ok(None) };
        if *tag != DATA_TAG {
            return Ok(Some(State::Whole(len)));
        }
        let varint_ends = rest.iter().any(|byte| byte & 0x80 == 0);
        if !varint_ends && head.len() < 11.min(len) {
            return Ok(None);
        }
        let before = rest.len();
        let Ok(bytes) = decode_varint(&mut rest) else {
            return Err(StreamError::Malformed("the field data has a wrong length".into()));
        };
        let head_bytes = 1 + before - rest.len();
        if bytes != (len - head_bytes) as u64 {
            return Ok(Some(State::Whole(len)));
        }
        self.take_exactly(head_bytes);
        Ok(Some(State::Data(bytes as usize)))
    }

    /// Exactly `len` bytes, without a copy where they came in one piece.
    fn take_exactly(&mut self, len: usize) -> Option<Bytes> {
        if self.available < len {
            return None;
        }
        let first = self.take_some(len).unwrap_or_default();
        if first.len() == len {
            return Some(first);
        }
        self.buffer.clear();
        self.buffer.reserve(len);
        self.buffer.extend_from_slice(&first);
        while self.buffer.len() < len {
            let more = self.take_some(len - self.buffer.len())?;
            self.buffer.extend_from_slice(&more);
        }
        Some(self.buffer.split().freeze())
    }

    /// Up to `max` bytes, as they came.
    fn take_some(&mut self, max: usize) -> Option<Bytes> {
        let front = self.input.front_mut()?;
        let bytes = if front.len() > max { front.split_to(max) } else { self.input.pop_front()? };
        self.available -= bytes.len();
        Some(bytes)
    }
}

fn decode<M: Message + Default>(bytes: Bytes) -> Result<Part<M>, StreamError> {
    M::decode(bytes).map(Part::Message).map_err(|error| StreamError::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{PutBlock, PutOpen, PutRequest, put_request};

    fn stream() -> (Vec<u8>, Vec<PutRequest>) {
        let open = PutOpen { layout_digest: Bytes::from_static(&[7; 32]), group: 1, ..PutOpen::default() };
        let block = PutBlock { sequence_hash: Bytes::from_static(&[1, 2]), length: 300, ..PutBlock::default() };
        let data = Bytes::from(vec![9; 300]);
        let parts = [put_request::Part::Open(open), put_request::Part::Block(block), put_request::Part::Data(data)];
        let requests: Vec<_> = parts.into_iter().map(|part| PutRequest { part: Some(part) }).collect();
        (requests.iter().flat_map(message).collect(), requests)
    }

    fn drain(decoder: &mut PartDecoder, messages: &mut Vec<PutRequest>, data: &mut Vec<u8>) {
        while let Some(part) = decoder.next_part::<PutRequest>().unwrap() {
            match part {
                Part::Message(message) => messages.push(message),
                Part::Data(bytes) => data.extend_from_slice(&bytes),
            }
        }
    }

    /// However the stream is cut into pieces, the same parts come out.
    #[test]
    fn any_cut_gives_the_same_parts() {
        let (bytes, requests) = stream();
        for piece in 1..bytes.len() {
            let (mut decoder, mut messages, mut data) = (PartDecoder::new(), Vec::new(), Vec::new());
            for chunk in bytes.chunks(piece) {
                decoder.push(Bytes::copy_from_slice(chunk));
                drain(&mut decoder, &mut messages, &mut data);
            }
            assert_eq!(messages, requests[..2], "pieces of {piece}");
            assert_eq!(data, vec![9; 300]);
            assert_eq!(decoder.finish(), Ok(()));
        }
    }

    #[test]
    fn a_data_head_makes_bytes_a_data_message() {
        for len in [1usize, 127, 128, 70_000] {
            let data = Bytes::from(vec![5; len]);
            let whole = message(&PutRequest { part: Some(put_request::Part::Data(data.clone())) });
            assert_eq!(whole, [data_head(len), data].concat());
        }
    }

    /// A `data` field behind an unknown field is valid protobuf, if nobody writes it: it is buffered.
    #[test]
    fn unusual_encodings_are_understood() {
        let mut body = vec![0x78, 1, DATA_TAG, 3];
        body.extend_from_slice(b"abc");
        let mut decoder = PartDecoder::new();
        decoder.push(Bytes::from([&[0, 0, 0, 0, body.len() as u8][..], &body].concat()));
        let expected = PutRequest { part: Some(put_request::Part::Data(Bytes::from_static(b"abc"))) };
        assert_eq!(decoder.next_part::<PutRequest>(), Ok(Some(Part::Message(expected))));
    }

    #[test]
    fn nonsense_is_refused() {
        let refused = |bytes: &[u8]| {
            let mut decoder = PartDecoder::new();
            decoder.push(Bytes::copy_from_slice(bytes));
            decoder.next_part::<PutRequest>().unwrap_err()
        };
        assert_eq!(refused(&[1, 0, 0, 0, 0]), StreamError::Compressed);
        assert_eq!(refused(&[0, 0xFF, 0, 0, 0]), StreamError::TooLarge(0xFF00_0000));
        assert!(matches!(refused(&[0, 0, 0, 0, 2, 0xFF, 0xFF]), StreamError::Malformed(_)));
        let endless_varint = [&[0, 0, 0, 0, 20, DATA_TAG][..], &[0xFF; 19]].concat();
        assert!(matches!(refused(&endless_varint), StreamError::Malformed(_)));
        let mut decoder = PartDecoder::new();
        decoder.push(Bytes::from_static(&[0, 0, 0]));
        assert_eq!(decoder.next_part::<PutRequest>(), Ok(None));
        assert_eq!(decoder.finish(), Err(StreamError::Truncated));
    }
}
