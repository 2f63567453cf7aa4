//! The authority of requests that come over a Unix socket. gRPC's C core (and with it Python, Ruby, PHP and others) sends the
//! socket's path as `:authority`, as `%2Frun%2Fkvstore.sock`. h2 refuses that, and the call fails before it reaches a service. Over
//! a Unix socket the authority says nothing: it names no host. So whatever no authority may have in it becomes a dash here, in
//! front of h2.
//!
//! Only header blocks are looked at; the payload of other frames is skipped over. A character is replaced by one that is encoded in
//! as many bits, so that no length changes: neither that of a frame, nor that of an entry of HPACK's dynamic table, with which both
//! sides must agree. A character for which there is none stays, and h2 refuses it. (Formats: RFC 9113, sections 4.1 and 6.2;
//! RFC 7541, sections 5 and 6 and appendix B.)

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes of the preface of HTTP/2.
const PREFACE_BYTES: usize = 24;
const FRAME_HEAD_BYTES: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;
/// The name as it is, and as it is with Huffman's code.
const NAME: &[u8] = b":authority";
const NAME_CODED: &[u8] = &NAME_CODE;
const NAME_CODE: [u8; 8] = [0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// Its place in HPACK's static table.
const NAME_INDEX: usize = 1;
/// A code that is not complete has begun in one of this many last bytes.
const HELD_BYTES_MAX: usize = 4;

/// Where the stream is.
#[derive(Clone, Copy)]
enum At {
    /// In so many bytes that are of no interest: the preface, or a frame's payload.
    Skip(usize),
    /// In a frame's head, of which this has come.
    Head([u8; FRAME_HEAD_BYTES], usize),
    /// Before the length of a HEADERS frame's padding, with so many bytes to come, and those of a priority among them.
    Padding { left: usize, priority: usize },
    /// In the bytes of a priority, before a fragment.
    Priority { left: usize, fragment: usize, padding: usize },
    /// In a fragment of a header block, and bytes of padding behind it.
    Fragment { left: usize, padding: usize },
}

/// Where a header block is.
#[derive(Clone, Copy)]
enum Field {
    /// At the beginning of a field.
    Start,
    /// In a number that goes on.
    Number { value: usize, shift: u32, of: Of },
    /// Before a text's length.
    Length { is_name: bool, is_authority: bool },
    /// In a text.
    Text(Text),
}

/// What a number says.
#[derive(Clone, Copy)]
enum Of {
    /// Nothing that matters here.
    Nothing,
    /// The index of a name, or 0 where the name follows.
    Name,
    /// A text's length.
    Text { is_name: bool, is_authority: bool, coded: bool },
}

#[derive(Clone, Copy)]
struct Text {
    left: usize,
    is_name: bool,
    /// Of a value: its name is the authority's. Of a name: what came so far is.
    is_authority: bool,
    coded: bool,
    /// Bytes that came.
    at: usize,
    /// The bits of a code that is not complete, and how many.
    code: u32,
    bits: u32,
    /// Its bits lie in two frames: it stays as it is.
    is_cut: bool,
}

/// A code begins in a byte, and is not complete at its end.
#[derive(Clone, Copy)]
struct Begun {
    /// The first bits of the code before it, where they lie in earlier bytes and were replaced.
    replaced: Option<u32>,
}

#[derive(Clone, Copy)]
struct State {
    at: At,
    field: Field,
}

/// See the head of this file.
struct Filter(State);

impl Filter {
    fn new() -> Self {
        Self(State { at: At::Skip(PREFACE_BYTES), field: Field::Start })
    }

    /// Goes over the next bytes. How many of the last it has to see again, with what follows them; `is_last`: none.
    fn pass(&mut self, bytes: &mut [u8], is_last: bool) -> usize {
        let mut place = 0;
        // Where the code began that is not complete, and the state before that byte.
        let mut begun = None;
        while let Some(byte) = bytes.get(place).copied() {
            let mut before = self.0;
            match &mut self.0.at {
                At::Skip(left) => {
                    let skipped = (*left).min(bytes.len() - place);
                    *left -= skipped;
                    place += skipped;
                    self.0.at = if *left == 0 { At::Head([0; FRAME_HEAD_BYTES], 0) } else { self.0.at };
                    continue;
                }
                At::Head(head, came) => {
                    if let Some(place) = head.get_mut(*came) {
                        *place = byte;
                    }
                    *came += 1;
                    if *came == FRAME_HEAD_BYTES {
                        let head = *head;
                        self.begin_frame(head);
                    }
                }
                At::Padding { left, priority } => {
                    self.0.at = Self::before_fragment(*left - 1, *priority, usize::from(byte));
                }
                At::Priority { left, fragment, padding } => {
                    *left -= 1;
                    if *left == 0 {
                        self.0.at = At::Fragment { left: *fragment, padding: *padding };
                    }
                }
                At::Fragment { left, padding } => {
                    *left -= 1;
                    let ends = *left == 0;
                    if ends {
                        self.0.at = At::Skip(*padding);
                    }
                    if let Some(Begun { replaced }) = self.in_block(bytes, place) {
                        if let (Field::Text(text), Some(code)) = (&mut before.field, replaced) {
                            text.code = code;
                        }
                        begun = Some((place, before));
                    }
                    if let Field::Text(text) = &mut self.0.field {
                        text.is_cut |= ends && text.bits > 0;
                    }
                }
            }
            place += 1;
            if let At::Skip(0) = self.0.at {
                self.0.at = At::Head([0; FRAME_HEAD_BYTES], 0);
            }
        }
        match (self.0.field, begun) {
            (Field::Text(Text { bits: 1.., is_cut: false, .. }), Some((place, before)))
                if !is_last && bytes.len() - place <= HELD_BYTES_MAX =>
            {
                self.0 = before;
                bytes.len() - place
            }
            _ => 0,
        }
    }

    fn begin_frame(&mut self, head: [u8; FRAME_HEAD_BYTES]) {
        let [a, b, c, kind, flags, ..] = head;
        let left = u32::from_be_bytes([0, a, b, c]) as usize;
        let priority = if flags & PRIORITY != 0 { PRIORITY_BYTES } else { 0 };
        if kind == HEADERS {
            self.0.field = Field::Start;
        }
        self.0.at = match kind {
            HEADERS if flags & PADDED != 0 && left > 0 => At::Padding { left, priority },
            HEADERS => Self::before_fragment(left, priority, 0),
            CONTINUATION if left > 0 => At::Fragment { left, padding: 0 },
            _ => At::Skip(left),
        };
    }

    /// In the `left` bytes of a payload that has a priority and padding. Nonsense is skipped: h2 refuses it.
    fn before_fragment(left: usize, priority: usize, padding: usize) -> At {
        match left.checked_sub(priority + padding) {
            None | Some(0) => At::Skip(left),
            Some(fragment) if priority > 0 => At::Priority { left: priority, fragment, padding },
            Some(fragment) => At::Fragment { left: fragment, padding },
        }
    }

    /// The next byte of a header block.
    fn in_block(&mut self, bytes: &mut [u8], place: usize) -> Option<Begun> {
        let byte = *bytes.get(place)?;
        match self.0.field {
            Field::Start => self.begin_field(byte),
            Field::Length { is_name, is_authority } => {
                self.number(byte, 7, Of::Text { is_name, is_authority, coded: byte & 0x80 != 0 });
            }
            Field::Number { value, shift, of } => {
                let value = value.saturating_add(usize::from(byte & 0x7f).checked_shl(shift).unwrap_or(usize::MAX));
                self.0.field = Field::Number { value, shift: shift.saturating_add(7), of };
                if byte & 0x80 == 0 {
                    self.end_number(value, of);
                }
            }
            Field::Text(mut text) => {
                text.left = text.left.saturating_sub(1);
                let begins = text.take(bytes, place);
                text.at += 1;
                self.0.field = if text.left > 0 { Field::Text(text) } else { text.next() };
                return begins;
            }
        }
        None
    }

    fn begin_field(&mut self, byte: u8) {
        match byte {
            0x80.. => self.number(byte, 7, Of::Nothing),
            0x40.. => self.number(byte, 6, Of::Name),
            0x20.. => self.number(byte, 5, Of::Nothing),
            _ => self.number(byte, 4, Of::Name),
        }
    }

    /// A number begins in the last `bits` of a byte.
    fn number(&mut self, byte: u8, bits: u32, of: Of) {
        let most = (1usize << bits) - 1;
        match usize::from(byte) & most {
            value if value == most => self.0.field = Field::Number { value, shift: 0, of },
            value => self.end_number(value, of),
        }
    }

    fn end_number(&mut self, value: usize, of: Of) {
        self.0.field = match of {
            Of::Nothing => Field::Start,
            Of::Name => Field::Length { is_name: value == 0, is_authority: value == NAME_INDEX },
            Of::Text { is_name, is_authority, coded } => {
                let text = Text { left: value, is_name, is_authority, coded, at: 0, code: 0, bits: 0, is_cut: false };
                if value > 0 { Field::Text(text) } else { text.next() }
            }
        };
    }
}

impl Text {
    /// What comes behind it.
    fn next(self) -> Field {
        let name = if self.coded { NAME_CODED } else { NAME };
        match self.is_name {
            true => Field::Length { is_name: false, is_authority: self.is_authority && self.at == name.len() },
            false => Field::Start,
        }
    }

    /// One of its bytes.
    fn take(&mut self, bytes: &mut [u8], place: usize) -> Option<Begun> {
        let byte = bytes.get_mut(place)?;
        match (self.is_name, self.coded) {
            (true, coded) => {
                let name = if coded { NAME_CODED } else { NAME };
                self.is_authority = name.get(self.at) == Some(byte) && (self.at == 0 || self.is_authority);
            }
            (false, true) if self.is_authority => return self.take_coded(bytes, place),
            (false, false) if self.is_authority && !byte.is_ascii_alphanumeric() && !b".-_".contains(byte) => {
                *byte = b'-';
            }
            (false, _) => {}
        }
        None
    }

    fn take_coded(&mut self, bytes: &mut [u8], place: usize) -> Option<Begun> {
        let (mut begins, mut replaced) = (false, None);
        for bit in 0..8 {
            let byte = *bytes.get(place)?;
            begins |= self.bits == 0;
            self.code = self.code << 1 | u32::from(byte >> (7 - bit) & 1);
            self.bits += 1;
            if let Some(instead) = replacement(self.code, self.bits).filter(|_| !self.is_cut) {
                put_code(bytes, place * 8 + bit, instead, self.bits);
                replaced = Some(instead >> (bit + 1)).filter(|_| self.bits as usize > bit + 1).or(replaced);
            }
            if is_whole(self.code, self.bits) {
                (self.code, self.bits, self.is_cut, begins) = (0, 0, false, false);
            }
        }
        begins.then_some(Begun { replaced })
    }
}

/// Writes a code whose last bit is the one with this number. What is not in `bytes` any more is left alone: it was whole before.
fn put_code(bytes: &mut [u8], last: usize, code: u32, bits: u32) {
    for back in 0..bits as usize {
        let Some(at) = last.checked_sub(back) else { return };
        if let Some(byte) = bytes.get_mut(at / 8) {
            let mask = 0x80 >> (at % 8);
            *byte = if code >> back & 1 == 1 { *byte | mask } else { *byte & !mask };
        }
    }
}

/// Huffman's codes by their lengths: the first, and how many there are. Longer ones are of no characters that a URI may have.
const CODES: [(u32, u32, u32); 10] = [
    (5, 0x0, 10),
    (6, 0x14, 26),
    (7, 0x5c, 32),
    (8, 0xf8, 6),
    (10, 0x3f8, 5),
    (11, 0x7fa, 3),
    (12, 0xffa, 2),
    (13, 0x1ff8, 6),
    (14, 0x3ffc, 2),
    (15, 0x7ffc, 3),
];

fn is_whole(code: u32, bits: u32) -> bool {
    CODES.iter().any(|(length, first, count)| *length == bits && (*first..first + count).contains(&code))
}

/// A character that no authority may have, or that is not worth the doubt, has another of the same length instead.
fn replacement(code: u32, bits: u32) -> Option<u32> {
    match (bits, code) {
        // Space, %, / and =: a dash.
        (6, 0x14 | 0x15 | 0x18 | 0x20) => Some(0x16),
        // The colon: B.
        (7, 0x5c) => Some(0x5d),
        // &, *, the comma and the semicolon: X.
        (8, 0xf8..=0xfb) => Some(0xfc),
        // The quote and ?: an exclamation mark.
        (10, 0x3f9 | 0x3fc) => Some(0x3f8),
        // |: an apostrophe.
        (11, 0x7fc) => Some(0x7fa),
        // NUL, @, [ and ]: a dollar.
        (13, 0x1ff8 | 0x1ffa | 0x1ffb | 0x1ffc) => Some(0x1ff9),
        _ => None,
    }
}

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
