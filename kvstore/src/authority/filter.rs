//! Which bytes of a stream are changed: sees all of them, and reads or writes none.
//!
//! It keeps no copy of HPACK's dynamic table. So it does not look at an authority whose name is an entry of that table: only at one whose
//! name is spelled out, or is the entry of the static table, as every known client sends it. h2 refuses the other one as before.

/// Bytes of the preface of HTTP/2.
const PREFACE_BYTES: usize = 24;
pub(super) const FRAME_HEAD_BYTES: usize = 9;
pub(super) const HEADERS: u8 = 1;
pub(super) const CONTINUATION: u8 = 9;
pub(super) const PADDED: u8 = 0x8;
pub(super) const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;
/// The name as it is, and as it is with Huffman's code.
pub(super) const NAME: &[u8] = b":authority";
pub(super) const NAME_CODED: &[u8] = &NAME_CODE;
const NAME_CODE: [u8; 8] = [0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// Its place in HPACK's static table.
const NAME_INDEX: usize = 1;
/// A code that is not complete has begun in one of this many last bytes.
pub(super) const HELD_BYTES_MAX: usize = 4;

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

/// See the heads of this file and of its folder.
pub(super) struct Filter(State);

impl Filter {
    /// At the beginning of a connection.
    pub(super) fn new() -> Self {
        Self(State { at: At::Skip(PREFACE_BYTES), field: Field::Start })
    }

    /// Goes over the next bytes. How many of the last it has to see again, with what follows them; `is_last`: none.
    pub(super) fn pass(&mut self, bytes: &mut [u8], is_last: bool) -> usize {
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
