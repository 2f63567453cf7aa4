//! ZMTP 3.0, as much as publishing and following KV events takes: the NULL mechanism, PUB and SUB, ROUTER and DEALER. (Source: RFC 23/ZMTP,
//! rfc.zeromq.org.)
//!
//! A library would do, were it bounded: what is on the market sets aside what a peer's frame claims to be long, and queues what a slow peer does
//! not take. Here a frame has a greatest length, and nothing is queued.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of a greeting.
pub const GREETING_BYTES: usize = 64;
/// Bytes of a command at most: what peers say of themselves.
const COMMAND_BYTES_MAX: usize = 4096;
/// Bytes of a frame that is passed over, at most.
const SKIPPED_BYTES_MAX: u64 = 1 << 30;
/// Frames of one message at most: an envelope, a topic, a number, a payload, and room.
const FRAMES_MAX: usize = 16;

/// A peer that does not speak it, or went away.
#[derive(Debug, thiserror::Error)]
pub enum ZmtpError {
    /// The connection.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// What it said.
    #[error("the peer does not speak ZMTP 3 as expected: {0}")]
    Protocol(String),
}

fn wrong(what: impl Into<String>) -> ZmtpError {
    ZmtpError::Protocol(what.into())
}

/// The greeting of this side.
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0u8; GREETING_BYTES];
    let parts: [(usize, &[u8]); 4] = [(0, &[0xFF]), (9, &[0x7F]), (10, &[3, 0]), (12, b"NULL")];
    for (at, part) in parts {
        bytes.iter_mut().skip(at).zip(part).for_each(|(to, from)| *to = *from);
    }
    bytes
}

fn check_greeting(bytes: &[u8; GREETING_BYTES]) -> Result<(), ZmtpError> {
    let [0xFF, _, _, _, _, _, _, _, _, 0x7F, major, _minor, mechanism @ ..] = bytes else {
        return Err(wrong("its greeting is not valid"));
    };
    if *major < 3 {
        return Err(wrong(format!("it speaks version {major}")));
    }
    let mechanism: Vec<u8> = mechanism.iter().take(20).copied().take_while(|byte| *byte != 0).collect();
    match mechanism.as_slice() {
        b"NULL" => Ok(()),
        other => Err(wrong(format!("it asks for the mechanism {}", String::from_utf8_lossy(other)))),
    }
}

fn ready(socket_type: &str) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in [("Socket-Type", socket_type), ("Identity", "")] {
        body.push(name.len() as u8);
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&(value.len() as u32).to_be_bytes());
        body.extend_from_slice(value.as_bytes());
    }
    body
}

/// The peer's type, as its READY says.
fn socket_type(mut body: &[u8]) -> Option<String> {
    while let Some((length, rest)) = body.split_first() {
        let (name, rest) = rest.split_at_checked(usize::from(*length))?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return String::from_utf8(value.to_vec()).ok();
        }
        body = rest;
    }
    None
}

struct Frame {
    more: bool,
    command: bool,
    body: Bytes,
}

/// What stands at the front of a buffer.
enum Front {
    Frame(Frame),
    /// A frame that is longer than it may be: so many bytes follow, and another frame of the message if `more`.
    Long {
        bytes: u64,
        more: bool,
    },
}

/// A frame from the front of `buffer`; `None` until it is there.
fn take_frame(buffer: &mut BytesMut, bytes_max: usize, skips: bool) -> Result<Option<Front>, ZmtpError> {
    let (flags, header, length) = match buffer.as_ref() {
        [flags, rest @ ..] if flags & 2 == 2 => match rest.first_chunk::<8>() {
            Some(length) => (*flags, 9, u64::from_be_bytes(*length)),
            None => return Ok(None),
        },
        [flags, length, ..] => (*flags, 2, u64::from(*length)),
        _ => return Ok(None),
    };
    if flags & !7 != 0 {
        return Err(wrong(format!("it sent a frame with the flags {flags:#x}")));
    }
    let command = flags & 4 == 4;
    let most = if command { COMMAND_BYTES_MAX } else { bytes_max };
    if length > most as u64 {
        if command || !skips || length > SKIPPED_BYTES_MAX {
            return Err(wrong(format!("it sent a frame of {length} bytes; at most {most} are allowed")));
        }
        buffer.advance(header);
        return Ok(Some(Front::Long { bytes: length, more: flags & 1 == 1 }));
    }
    if buffer.len() < header + length as usize {
        return Ok(None);
    }
    buffer.advance(header);
    let body = buffer.split_to(length as usize).freeze();
    Ok(Some(Front::Frame(Frame { more: flags & 1 == 1, command, body })))
}

fn put_frame(out: &mut BytesMut, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(length) => out.put_slice(&[flags, length]),
        Err(_) => {
            out.put_u8(flags | 2);
            out.put_u64(body.len() as u64);
        }
    }
    out.put_slice(body);
}

/// A message, as it goes over the wire.
pub fn encode(frames: &[&[u8]]) -> Bytes {
    let mut out = BytesMut::with_capacity(frames.iter().map(|frame| frame.len() + 9).sum());
    for (at, frame) in frames.iter().enumerate() {
        put_frame(&mut out, u8::from(at + 1 < frames.len()), frame);
    }
    out.freeze()
}

/// A connection after its handshake.
pub struct Connection<S> {
    stream: S,
    buffer: BytesMut,
    message_bytes_max: usize,
    frames: Vec<Bytes>,
    /// Bytes of a frame that is too long, which are yet to be passed over; and whether another one follows it.
    skipped: Option<(u64, bool)>,
    skips: bool,
    peer: String,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Greets a peer as a socket of `socket_type`. Messages of more than `message_bytes_max` bytes end the connection,
    /// unless [`Self::passing_over_long`] says otherwise.
    pub async fn handshake(mut stream: S, socket_type: &str, message_bytes_max: usize) -> Result<Self, ZmtpError> {
        stream.write_all(&greeting()).await?;
        let mut theirs = [0; GREETING_BYTES];
        stream.read_exact(&mut theirs).await?;
        check_greeting(&theirs)?;
        let mut out = BytesMut::new();
        let mut body = vec![5];
        body.extend_from_slice(b"READY");
        body.extend(ready(socket_type));
        put_frame(&mut out, 4, &body);
        stream.write_all(&out).await?;
        let (buffer, frames, peer) = (BytesMut::new(), Vec::new(), String::new());
        let mut connection = Self { stream, buffer, message_bytes_max, frames, skipped: None, skips: false, peer };
        let frame = connection.frame().await?.ok_or_else(|| wrong("it closed the connection"))?;
        match frame.body.as_ref() {
            [5, b'R', b'E', b'A', b'D', b'Y', metadata @ ..] if frame.command => {
                connection.peer =
                    self::socket_type(metadata).ok_or_else(|| wrong("its READY command names no socket type"))?;
                Ok(connection)
            }
            [5, b'E', b'R', b'R', b'O', b'R', why @ ..] if frame.command => Err(wrong(String::from_utf8_lossy(why))),
            _ => Err(wrong("it sent no READY command")),
        }
    }

    /// The peer's type: "SUB", say.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    async fn frame(&mut self) -> Result<Option<Frame>, ZmtpError> {
        loop {
            if let Some((left, more)) = &mut self.skipped {
                let here = (*left).min(self.buffer.len() as u64);
                self.buffer.advance(here as usize);
                *left -= here;
                if *left == 0 {
                    let more = *more;
                    self.skipped = None;
                    return Ok(Some(Frame { more, command: false, body: Bytes::new() }));
                }
            } else {
                match take_frame(&mut self.buffer, self.message_bytes_max, self.skips)? {
                    Some(Front::Frame(frame)) => return Ok(Some(frame)),
                    Some(Front::Long { bytes, more }) => {
                        self.skipped = Some((bytes, more));
                        continue;
                    }
                    None => {}
                }
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// In a message that is too long, the frame that makes it so comes empty, and the connection goes on. For a peer that is trusted not to
    /// send without end: frames of more than a gibibyte end the connection.
    pub fn passing_over_long(mut self) -> Self {
        self.skips = true;
        self
    }

    /// The next message; `None` when the peer hung up. Dropping the future loses nothing.
    pub async fn receive(&mut self) -> Result<Option<Vec<Bytes>>, ZmtpError> {
        loop {
            let Some(frame) = self.frame().await? else { return Ok(None) };
            if frame.command {
                if let Some(answer) = answer_to(&frame.body) {
                    self.stream.write_all(&answer).await?;
                }
                continue;
            }
            let before: usize = self.frames.iter().map(Bytes::len).sum();
            let fits = before + frame.body.len() <= self.message_bytes_max;
            if self.frames.len() >= FRAMES_MAX || !fits && !self.skips {
                return Err(wrong(format!("it sent a message of more than {} bytes", self.message_bytes_max)));
            }
            self.frames.push(if fits { frame.body } else { Bytes::new() });
            if !frame.more {
                return Ok(Some(std::mem::take(&mut self.frames)));
            }
        }
    }

    /// Sends a message.
    pub async fn send(&mut self, frames: &[&[u8]]) -> Result<(), ZmtpError> {
        self.send_encoded(&encode(frames)).await
    }

    /// Sends messages that [`encode`] made.
    pub async fn send_encoded(&mut self, messages: &[u8]) -> Result<(), ZmtpError> {
        Ok(self.stream.write_all(messages).await?)
    }
}

/// A PONG for a PING: its context, without its time to live.
fn answer_to(command: &[u8]) -> Option<Bytes> {
    let [4, b'P', b'I', b'N', b'G', _, _, context @ ..] = command else { return None };
    let mut body = vec![4];
    body.extend_from_slice(b"PONG");
    body.extend(context.iter().take(16));
    let mut out = BytesMut::new();
    put_frame(&mut out, 4, &body);
    Some(out.freeze())
}

/// Where a socket is, as ZeroMQ names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `tcp://host:port`; `*` as the host of a listener is all addresses.
    Tcp(String, u16),
    /// `ipc:///path`.
    Ipc(std::path::PathBuf),
}

impl std::str::FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || format!("{text:?} is not an endpoint; use tcp://host:port or ipc:///path");
        if let Some(path) = text.strip_prefix("ipc://") {
            return if path.starts_with('/') { Ok(Self::Ipc(path.into())) } else { Err(problem()) };
        }
        let (host, port) = text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':')).ok_or_else(problem)?;
        let host = if host == "*" { "0.0.0.0" } else { host.trim_matches(['[', ']']) };
        match port.parse() {
            Ok(port) if !host.is_empty() => Ok(Self::Tcp(host.into(), port)),
            _ => Err(problem()),
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp://{host}:{port}"),
            Self::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

impl Endpoint {
    /// The endpoint of another data-parallel rank: ports follow one another, paths end in the rank. (Source: vLLM's publisher.)
    pub fn of_rank(&self, rank: u16) -> Self {
        match self {
            Self::Tcp(host, port) => Self::Tcp(host.clone(), port.wrapping_add(rank)),
            Self::Ipc(path) if rank == 0 => Self::Ipc(path.clone()),
            Self::Ipc(path) => {
                let mut path = path.as_os_str().to_owned();
                path.push(format!("_dp{rank}"));
                Self::Ipc(path.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_ends_understand_each_other() {
        let (a, b) = tokio::io::duplex(1 << 16);
        let (a, b) = tokio::join!(Connection::handshake(a, "DEALER", 1000), Connection::handshake(b, "ROUTER", 1000));
        let (mut a, mut b) = (a.unwrap(), b.unwrap());
        assert_eq!((a.peer(), b.peer()), ("ROUTER", "DEALER"));
        let long = vec![7u8; 600];
        a.send(&[b"", b"12345678", &long]).await.unwrap();
        a.send(&[b"x"]).await.unwrap();
        assert_eq!(
            b.receive().await.unwrap().unwrap(),
            [Bytes::new(), Bytes::from_static(b"12345678"), Bytes::from(long)]
        );
        assert_eq!(b.receive().await.unwrap().unwrap(), [Bytes::from_static(b"x")]);
        let mut ping = BytesMut::new();
        put_frame(&mut ping, 4, b"\x04PING\x00\x01context");
        a.send_encoded(&ping).await.unwrap();
        drop(a.send(&[b"y"]).await);
        assert_eq!(b.receive().await.unwrap().unwrap(), [Bytes::from_static(b"y")]);
        let pong = a.frame().await.unwrap().unwrap();
        assert_eq!((pong.command, pong.body.as_ref()), (true, b"\x04PONGcontext".as_slice()));
        drop(a);
        assert_eq!(b.receive().await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_is_too_long_or_no_zmtp_ends_the_connection() {
        for (sent, says) in [
            (encode(&[&[0; 1001]]), "a frame of 1001 bytes"),
            (encode(&[&[0; 900], &[0; 900]]), "more than 1000"),
            (encode(&[b"".as_slice(); 20]), "more than 1000"),
            (Bytes::from_static(&[2, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]), "a frame of"),
            (Bytes::from_static(&[0x80, 1, 1]), "flags 0x80"),
        ] {
            let (a, b) = tokio::io::duplex(1 << 16);
            let (a, b) = tokio::join!(Connection::handshake(a, "PUB", 1000), Connection::handshake(b, "SUB", 1000));
            a.unwrap().send_encoded(&sent).await.unwrap();
            let error = b.unwrap().receive().await.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        for greeting in [b"GET / HTTP/1.1\r\n".repeat(8), [[0xFFu8; 64], [0; 64]].concat()] {
            let (mut a, b) = tokio::io::duplex(1 << 16);
            a.write_all(&greeting).await.unwrap();
            assert!(Connection::handshake(b, "PUB", 1000).await.is_err());
        }
    }

    #[tokio::test]
    async fn what_is_too_long_costs_itself_alone_where_that_is_wanted() {
        let (a, b) = tokio::io::duplex(1 << 10);
        let (a, b) = tokio::join!(Connection::handshake(a, "PUB", 1000), Connection::handshake(b, "SUB", 1000));
        let (mut a, mut b) = (a.unwrap(), b.unwrap().passing_over_long());
        let long = vec![7u8; 100_000];
        let sent = async {
            a.send(&[b"t", b"1", &long]).await.unwrap();
            a.send(&[b"t", b"2", b"short"]).await.unwrap();
            a.send(&[&[0; 600], &[0; 600], b"3"]).await.unwrap();
            a.send_encoded(&[2, 0, 0, 0, 0, 0x41, 0, 0, 0]).await.unwrap();
        };
        let received = async {
            assert_eq!(b.receive().await.unwrap().unwrap(), [&b"t"[..], b"1", b""]);
            assert_eq!(b.receive().await.unwrap().unwrap(), [&b"t"[..], b"2", b"short"]);
            assert_eq!(b.receive().await.unwrap().unwrap(), [&[0; 600][..], b"", b"3"]);
            assert!(b.receive().await.unwrap_err().to_string().contains("a frame of 1090519040 bytes"));
        };
        tokio::join!(sent, received);
        assert!(b.buffer.capacity() < 10_000, "nothing of it is kept");
    }

    /// Bytes of any kind behind a sound handshake, or in its place: messages, an error or the end, and never much memory.
    #[tokio::test]
    async fn any_bytes_end_somewhere() {
        let mut random = 5u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let sound = encode(&[b"topic", b"12345678", &[7; 300]]);
        for round in 0..3000 {
            let mut bytes = sound.repeat(3);
            for _ in 0..=next(6) {
                let at = next(bytes.len() as u64) as usize;
                bytes[at] = next(256) as u8;
            }
            let (mut a, b) = tokio::io::duplex(1 << 16);
            if round % 3 > 0 {
                a.write_all(&greeting()).await.unwrap();
                a.write_all(b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB").await.unwrap();
            }
            a.write_all(&bytes).await.unwrap();
            a.shutdown().await.unwrap();
            let Ok(mut connection) = Connection::handshake(b, "SUB", 1000).await else {
                assert!(round % 3 == 0, "a sound greeting");
                continue;
            };
            let mut messages = 0;
            while let Ok(Some(frames)) = connection.receive().await {
                assert!(frames.iter().map(Bytes::len).sum::<usize>() <= 1000);
                messages += 1;
            }
            assert!(messages < 2000);
        }
    }

    #[test]
    fn endpoints_are_read() {
        let read = |text: &str| text.parse::<Endpoint>();
        assert_eq!(read("tcp://*:5557"), Ok(Endpoint::Tcp("0.0.0.0".into(), 5557)));
        assert_eq!(read("tcp://[::1]:1").unwrap().to_string(), "tcp://[::1]:1");
        assert_eq!(read("tcp://host:5557").unwrap().of_rank(2), Endpoint::Tcp("host".into(), 5559));
        assert_eq!(read("ipc:///tmp/a").unwrap().of_rank(1).to_string(), "ipc:///tmp/a_dp1");
        for bad in ["tcp://host", "tcp://:1", "tcp://host:x", "ipc://relative", "http://host:1"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
