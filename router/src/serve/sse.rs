//! Server-sent events, as engines stream answers: `data:` lines, an empty line after each.

use bytes::{Buf, Bytes, BytesMut};

use crate::caps;

/// Takes bytes as they come, and gives whole events.
#[derive(Default)]
pub struct Events {
    buffer: BytesMut,
    /// Bytes that were looked through without finding an end.
    seen: usize,
}

/// An event longer than any engine's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the worker's answer has an event of more than {} bytes", caps::ANSWER_EVENT_BYTES_MAX)]
pub struct TooLong;

impl Events {
    /// More of the stream.
    pub fn push(&mut self, bytes: &Bytes) -> Result<(), TooLong> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() > caps::ANSWER_EVENT_BYTES_MAX { Err(TooLong) } else { Ok(()) }
    }

    /// The data of the next whole event; comments and other fields are passed over.
    pub fn next_data(&mut self) -> Option<String> {
        loop {
            let (end, gap) = self.end()?;
            let event = self.buffer.split_to(end);
            self.buffer.advance(gap);
            self.seen = 0;
            let text = String::from_utf8_lossy(&event);
            let lines = text.lines().filter_map(|line| line.strip_prefix("data:"));
            let data: Vec<&str> = lines.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
            if !data.is_empty() {
                return Some(data.join("\n"));
            }
        }
    }

    /// Where the first event ends, and how long what stands between it and the next is.
    fn end(&mut self) -> Option<(usize, usize)> {
        let from = self.seen.saturating_sub(3);
        let bytes = self.buffer.as_ref();
        for at in from..bytes.len() {
            let rest = bytes.get(at..).unwrap_or_default();
            for gap in [b"\n\n".as_slice(), b"\r\n\r\n", b"\r\r"] {
                if rest.starts_with(gap) {
                    return Some((at, gap.len()));
                }
            }
        }
        self.seen = bytes.len();
        None
    }
}

/// An event of this data.
pub fn event(data: &str) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_whole_however_they_are_cut() {
        let stream =
            b"data: {\"a\": 1}\n\n: a comment\n\ndata: one\r\ndata:two\r\n\r\nevent: x\ndata: [DONE]\n\ndata: cut off";
        for size in 1..stream.len() {
            let mut events = Events::default();
            let mut all = Vec::new();
            for piece in stream.chunks(size) {
                events.push(&Bytes::copy_from_slice(piece)).unwrap();
                while let Some(data) = events.next_data() {
                    all.push(data);
                }
            }
            assert_eq!(all, ["{\"a\": 1}", "one\ntwo", "[DONE]"], "in pieces of {size}");
        }
        let mut events = Events::default();
        let long = Bytes::from(vec![b'x'; caps::ANSWER_EVENT_BYTES_MAX + 1]);
        assert_eq!(events.push(&long), Err(TooLong));
    }
}
