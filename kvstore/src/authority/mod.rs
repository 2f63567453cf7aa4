//! The authority of requests that come over a Unix socket. gRPC's C core (and with it Python, Ruby, PHP and others) sends the
//! socket's path as `:authority`, as `%2Frun%2Fkvstore.sock`. h2 refuses that, and the call fails before it reaches a service. Over
//! a Unix socket the authority says nothing: it names no host. So whatever no authority may have in it becomes something harmless
//! here, in front of h2: a dash, where it comes as it is; where it comes with Huffman's code, a character whose code is as long. Space,
//! `%`, `/` and `=` have the dash; `:` has a B, `&`, `*`, `,` and `;` an X, `"` and `?` an exclamation mark, `|` an apostrophe, and `@`,
//! `[` and `]` a dollar.
//!
//! Only header blocks are looked at; the payload of other frames is skipped over. A character is replaced by one that is encoded in
//! as many bits, so that no length changes: neither that of a frame, nor that of an entry of HPACK's dynamic table, with which both
//! sides must agree. A character for which there is none stays, and h2 refuses it. (Formats: RFC 9113, sections 4.1 and 6.2;
//! RFC 7541, sections 5 and 6 and appendix B.)

mod filter;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use filter::{Filter, HELD_BYTES_MAX};

/// A stream whose reader sees no authority that h2 refuses.
pub struct AnyAuthority<IO> {
    io: IO,
    filter: Filter,
    /// The last bytes that came, where the filter has to see them again.
    held: ([u8; HELD_BYTES_MAX], usize),
}

impl<IO> AnyAuthority<IO> {
    /// The same stream.
    pub fn new(io: IO) -> Self {
        Self { io, filter: Filter::new(), held: ([0; HELD_BYTES_MAX], 0) }
    }

    /// What is read from.
    pub fn inner(&self) -> &IO {
        &self.io
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for AnyAuthority<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        loop {
            let (held, count) = this.held;
            let held = held.get(..count).unwrap_or_default();
            if !held.is_empty() && buf.remaining() > held.len() {
                buf.put_slice(held);
            } else if !held.is_empty() {
                // There is no room for more: they are handed out as they are.
                let (now, later) = held.split_at(buf.remaining());
                buf.put_slice(now);
                this.keep(later);
                this.filter.pass(buf.filled_mut().get_mut(before..).unwrap_or_default(), true);
                return Poll::Ready(Ok(()));
            }
            let start = buf.filled().len();
            match Pin::new(&mut this.io).poll_read(cx, buf) {
                Poll::Ready(Ok(())) => {}
                other => {
                    buf.set_filled(before);
                    return other;
                }
            }
            let is_end = buf.filled().len() == start;
            let came = buf.filled_mut().get_mut(before..).unwrap_or_default();
            let again = this.filter.pass(came, is_end);
            let end = came.len() - again;
            let later = came.get(end..).map(<[u8]>::to_vec).unwrap_or_default();
            this.keep(&later);
            buf.set_filled(before + end);
            if end > 0 || is_end {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<IO> AnyAuthority<IO> {
    fn keep(&mut self, later: &[u8]) {
        let (held, count) = &mut self.held;
        *count = later.len();
        held.iter_mut().zip(later).for_each(|(to, from)| *to = *from);
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::filter::{CONTINUATION, FRAME_HEAD_BYTES, HEADERS, NAME, NAME_CODED, PADDED, PRIORITY};
    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn text(bytes: &[u8]) -> Vec<u8> {
        [&[bytes.len() as u8], bytes].concat()
    }

    /// What a reader sees of `bytes` that come in pieces of so many.
    fn seen(bytes: &[u8], piece: usize) -> Vec<u8> {
        use tokio::io::AsyncReadExt;
        let stream = Pieces(bytes.chunks(piece).map(<[u8]>::to_vec).collect());
        let mut out = Vec::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(AnyAuthority::new(stream).read_to_end(&mut out)).unwrap();
        out
    }

    /// Each read gives one piece.
    struct Pieces(std::collections::VecDeque<Vec<u8>>);

    impl AsyncRead for Pieces {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            if let Some(mut piece) = self.0.pop_front() {
                let later = piece.split_off(piece.len().min(buf.remaining()));
                buf.put_slice(&piece);
                if !later.is_empty() {
                    self.0.push_front(later);
                }
            }
            Poll::Ready(Ok(()))
        }
    }

    /// As gRPC's C core sends it: the name as a text, nothing with Huffman's code. Then as others do.
    #[test]
    fn a_path_becomes_an_authority_however_it_comes() {
        let path = b"%2Frun%2Fkvstore.sock";
        let coded = code("a%2Fx:/b");
        let want = code("a-2FxB-b");
        let plain = [&[0x40][..], &text(NAME), &text(path), &[0x82]].concat();
        let plain_want = [&[0x40][..], &text(NAME), &text(b"-2Frun-2Fkvstore.sock"), &[0x82]].concat();
        let by_index = |value: &[u8]| [&[0x82, 0x41, 0x80 | value.len() as u8][..], value, &[0x86]].concat();
        let coded_name = |value: &[u8]| {
            [&[0x10, 0x80 | NAME_CODED.len() as u8][..], NAME_CODED, &[0x80 | value.len() as u8], value].concat()
        };
        let other = [&[0x40][..], &text(b":authorities"), &text(path), &[0x04], &text(path)].concat();
        let cases = [
            (plain, plain_want),
            (by_index(&coded), by_index(&want)),
            (coded_name(&coded), coded_name(&want)),
            (other.clone(), other),
        ];
        for (block, wanted) in &cases {
            for (flags, lead, tail) in
                [(4, vec![], vec![]), (4 | PADDED | PRIORITY, vec![3, 1, 2, 3, 4, 5], vec![0; 3])]
            {
                let stream = |block: &[u8]| {
                    let payload = [&lead[..], block, &tail].concat();
                    let data = frame(0, 0, path);
                    [
                        PREFACE,
                        &frame(4, 0, b""),
                        &frame(HEADERS, flags, &payload),
                        &data,
                        &frame(HEADERS, flags, &payload),
                    ]
                    .concat()
                };
                for piece in 1..80 {
                    assert_eq!(seen(&stream(block), piece), stream(wanted), "in pieces of {piece}");
                }
            }
            // In two frames.
            for cut in 1..block.len() {
                let stream = |block: &[u8]| {
                    [PREFACE, &frame(HEADERS, 0, &block[..cut]), &frame(CONTINUATION, 4, &block[cut..])].concat()
                };
                let (seen, wanted) = (seen(&stream(block), 1000), stream(wanted));
                let second = PREFACE.len() + FRAME_HEAD_BYTES + cut;
                assert_eq!(seen[..PREFACE.len() + FRAME_HEAD_BYTES], wanted[..PREFACE.len() + FRAME_HEAD_BYTES]);
                assert_eq!(seen[second..second + FRAME_HEAD_BYTES], wanted[second..second + FRAME_HEAD_BYTES]);
                // But for a code that lies in both.
                let differ = seen.iter().zip(&wanted).filter(|(seen, wanted)| seen != wanted).count();
                assert!(differ <= 2, "cut after {cut} bytes");
            }
        }
    }

    fn code(text: &str) -> Vec<u8> {
        let of = |c: char| match c {
            'a' => "00011",
            '%' => "010101",
            '2' => "00010",
            'F' => "1100001",
            'x' => "1111001",
            ':' => "1011100",
            '/' => "011000",
            'b' => "100011",
            '-' => "010110",
            'B' => "1011101",
            _ => unreachable!(),
        };
        let mut bits: String = text.chars().map(of).collect();
        while !bits.len().is_multiple_of(8) {
            bits.push('1');
        }
        bits.as_bytes()
            .chunks(8)
            .map(|byte| u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 2).unwrap())
            .collect()
    }
}
