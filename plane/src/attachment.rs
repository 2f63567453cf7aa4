//! An attachment: the memory that one client and the daemon share, and the datagrams by which it begins and changes.
//!
//! Two regions. The client's page, which both may write: the daemon believes nothing in it. The daemon's page, which
//! the client can only read.
//!
//! ```text
//! client's page                               daemon's page
//! 0       lease words in use                  0       records written to the completion ring
//! 64      touches written                     64      records read from the submission ring
//! 128     words written to submissions        128     1 while the daemon sleeps: kick it
//! 192     words read from completions         4096    completion ring
//! 256     1 while the client sleeps
//! 4096    lease words
//! ...     touches, submission ring
//! ```

use crate::bytes::{Reader, Writer};
use crate::caps;
use crate::lease::LeaseWords;
use crate::ring::RingView;
use crate::sync::AtomicU64;
use crate::touch::TouchRing;

/// The version of the local plane that this build speaks; the only one.
pub const PLANE_VERSION: u16 = 1;

/// What one side can do beside reading, as bits of a u64. Both say what they can; what both can is used, and unknown bits are
/// passed over: a later daemon offers more under the same version.
pub mod capabilities {
    /// Stage, Copy, Abandon: puts through staging memory.
    pub const PUT: u64 = 1;
    /// Promote, Release, Hint: blocks of lower tiers.
    pub const PROMOTE: u64 = 2;
    /// Call: the verbs of `kvstore.v1.Blocks`.
    pub const CALL: u64 = 4;
    /// All that this build can.
    pub const ALL: u64 = PUT | PROMOTE | CALL;
}

/// The first bytes of every datagram.
const MAGIC: [u8; 6] = *b"KVPLAN";

const HEAD_WORDS: usize = 512;
const LINE_WORDS: usize = 8;

/// Bytes of the client's page.
pub const CLIENT_PAGE_BYTES: usize = (HEAD_WORDS + caps::LEASES_PER_CLIENT + caps::TOUCH_WORDS + caps::RING_WORDS) * 8;
/// Bytes of the daemon's page.
pub const DAEMON_PAGE_BYTES: usize = (HEAD_WORDS + caps::RING_WORDS) * 8;

/// Both regions of an attachment, as both sides see them.
#[derive(Clone, Copy)]
pub struct AttachmentView<'a> {
    client: &'a [AtomicU64],
    daemon: &'a [AtomicU64],
}

impl<'a> AttachmentView<'a> {
    /// `None` unless the regions have the sizes that this version says.
    pub fn new(client: &'a [AtomicU64], daemon: &'a [AtomicU64]) -> Option<Self> {
        let right = client.len() * 8 == CLIENT_PAGE_BYTES && daemon.len() * 8 == DAEMON_PAGE_BYTES;
        right.then_some(Self { client, daemon })
    }

    #[expect(clippy::indexing_slicing, reason = "new() checked the sizes; lines are numbered by constants")]
    fn client_line(&self, line: usize) -> &'a AtomicU64 {
        &self.client[line * LINE_WORDS]
    }

    #[expect(clippy::indexing_slicing, reason = "new() checked the sizes; lines are numbered by constants")]
    fn daemon_line(&self, line: usize) -> &'a AtomicU64 {
        &self.daemon[line * LINE_WORDS]
    }

    fn client_words(&self, first: usize, count: usize) -> &'a [AtomicU64] {
        self.client.get(HEAD_WORDS + first..HEAD_WORDS + first + count).unwrap_or_default()
    }

    /// What the client reads.
    pub fn leases(&self) -> LeaseWords<'a> {
        LeaseWords::new(self.client_line(0), self.client_words(0, caps::LEASES_PER_CLIENT))
    }

    /// What it read lately.
    pub fn touches(&self) -> TouchRing<'a> {
        TouchRing::new(self.client_line(1), self.client_words(caps::LEASES_PER_CLIENT, caps::TOUCH_WORDS))
    }

    /// Commands, from the client to the daemon.
    pub fn submissions(&self) -> RingView<'a> {
        let words = self.client_words(caps::LEASES_PER_CLIENT + caps::TOUCH_WORDS, caps::RING_WORDS);
        RingView { words, written: self.client_line(2), read: self.daemon_line(1) }
    }

    /// Completions, from the daemon to the client.
    pub fn completions(&self) -> RingView<'a> {
        let words = self.daemon.get(HEAD_WORDS..HEAD_WORDS + caps::RING_WORDS).unwrap_or_default();
        RingView { words, written: self.daemon_line(0), read: self.client_line(3) }
    }

    /// 1 while the daemon sleeps: who submits then must kick it.
    pub fn daemon_sleeps(&self) -> &'a AtomicU64 {
        self.daemon_line(2)
    }

    /// 1 while the client sleeps: who completes then must wake it.
    pub fn client_sleeps(&self) -> &'a AtomicU64 {
        self.client_line(4)
    }
}

/// What a client says, as datagrams on the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromClient {
    /// The first: the versions that it speaks.
    Hello {
        /// The lowest.
        version_min: u16,
        /// The highest.
        version_max: u16,
        /// See [`capabilities`].
        capabilities: u64,
    },
    /// It wants staging memory.
    WantsStaging,
    /// It unmapped a slab that had left.
    Unmapped {
        /// The slab's serial number.
        serial: u64,
    },
    /// It reads nothing any more, and never will through this attachment.
    Goodbye,
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromDaemon {
    /// The answer to a Hello. Descriptors: client's page, daemon's page, key table, eventfd that wakes the daemon.
    Welcome(Welcome),
    /// No attachment, and why.
    Refused(String),
    /// A slab came; its descriptor is with it.
    SlabCame {
        /// Its number in slot references.
        slab: u32,
        /// Told apart by this where a number is used again.
        serial: u64,
    },
    /// A slab left: unmap it once nothing of it is read any more, and say so.
    SlabLeft {
        /// Its number in slot references.
        slab: u32,
        /// Which slab of that number.
        serial: u64,
    },
    /// Staging memory; its descriptor is with it. Without one, there is no room for any now.
    Staging {
        /// How large.
        bytes: u64,
    },
    /// Completions wait.
    Wake,
    /// The daemon ends soon: attach to its successor.
    Draining,
}

/// What an attachment is told at its beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that is spoken from now on.
    pub version: u16,
    /// The daemon's life: layout numbers of another mean nothing.
    pub epoch: u64,
    /// BLAKE3 of the namespace's name: every slab's header has it.
    pub namespace_digest: [u8; 32],
    /// By which the key table files its keys.
    pub table_seed: u64,
    /// Bytes of the key table.
    pub table_bytes: u64,
    /// What the daemon can: see [`capabilities`].
    pub capabilities: u64,
}

/// A datagram that is none of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadDatagram(&'static str);

fn start(kind: u16) -> Writer {
    let mut writer = Writer::default();
    writer.put(MAGIC).u16(kind);
    writer
}

fn open(bytes: &[u8]) -> Result<(u16, Reader<'_>), BadDatagram> {
    let mut reader = Reader(bytes);
    if reader.take() != Some(MAGIC) {
        return Err(BadDatagram("the datagram does not belong to kvstore's local plane"));
    }
    Ok((reader.u16().ok_or(SHORT)?, reader))
}

const SHORT: BadDatagram = BadDatagram("the datagram is shorter than its kind requires");

impl FromClient {
    /// As a datagram.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello { version_min, version_max, capabilities } => {
                let mut writer = start(1);
                writer.u16(*version_min).u16(*version_max).u64(*capabilities);
                writer.0
            }
            Self::WantsStaging => start(2).0,
            Self::Unmapped { serial } => {
                let mut writer = start(3);
                writer.u64(*serial);
                writer.0
            }
            Self::Goodbye => start(4).0,
        }
    }

    /// From a datagram.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadDatagram> {
        let (kind, mut reader) = open(bytes)?;
        let mut fields = || {
            Some(match kind {
                1 => {
                    Self::Hello { version_min: reader.u16()?, version_max: reader.u16()?, capabilities: reader.u64()? }
                }
                2 => Self::WantsStaging,
                3 => Self::Unmapped { serial: reader.u64()? },
                4 => Self::Goodbye,
                _ => return None,
            })
        };
        fields().ok_or(if (1..=4).contains(&kind) { SHORT } else { BadDatagram("the datagram's kind is unknown") })
    }
}

impl FromDaemon {
    /// As a datagram.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = start(match self {
            Self::Welcome(_) => 1,
            Self::Refused(_) => 2,
            Self::SlabCame { .. } => 3,
            Self::SlabLeft { .. } => 4,
            Self::Staging { .. } => 5,
            Self::Wake => 6,
            Self::Draining => 7,
        });
        match self {
            Self::Welcome(welcome) => {
                writer.u16(welcome.version).u64(welcome.epoch).put(welcome.namespace_digest);
                writer.u64(welcome.table_seed).u64(welcome.table_bytes).u64(welcome.capabilities);
            }
            Self::Refused(reason) => writer.0.extend(reason.bytes().take(caps::DATAGRAM_BYTES_MAX / 2)),
            Self::SlabCame { slab, serial } | Self::SlabLeft { slab, serial } => {
                writer.u32(*slab).u64(*serial);
            }
            Self::Staging { bytes } => {
                writer.u64(*bytes);
            }
            Self::Wake | Self::Draining => {}
        }
        writer.0
    }

    /// From a datagram.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadDatagram> {
        let (kind, mut reader) = open(bytes)?;
        let mut fields = || {
            Some(match kind {
                1 => Self::Welcome(Welcome {
                    version: reader.u16()?,
                    epoch: reader.u64()?,
                    namespace_digest: reader.take()?,
                    table_seed: reader.u64()?,
                    table_bytes: reader.u64()?,
                    capabilities: reader.u64()?,
                }),
                2 => Self::Refused(String::from_utf8_lossy(reader.rest()).into_owned()),
                3 => Self::SlabCame { slab: reader.u32()?, serial: reader.u64()? },
                4 => Self::SlabLeft { slab: reader.u32()?, serial: reader.u64()? },
                5 => Self::Staging { bytes: reader.u64()? },
                6 => Self::Wake,
                7 => Self::Draining,
                _ => return None,
            })
        };
        fields().ok_or(if (1..=7).contains(&kind) { SHORT } else { BadDatagram("the datagram's kind is unknown") })
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn datagrams_survive_a_round_trip() {
        let welcome =
            Welcome { version: 1, epoch: 2, namespace_digest: [3; 32], table_seed: 4, table_bytes: 5, capabilities: 6 };
        for datagram in [
            FromDaemon::Welcome(welcome),
            FromDaemon::Refused("no room".into()),
            FromDaemon::SlabCame { slab: 1, serial: 2 },
            FromDaemon::SlabLeft { slab: 3, serial: 4 },
            FromDaemon::Staging { bytes: 5 },
            FromDaemon::Wake,
            FromDaemon::Draining,
        ] {
            let bytes = datagram.encode();
            assert_eq!(FromDaemon::decode(&bytes), Ok(datagram));
            assert!((0..8).all(|cut| FromDaemon::decode(&bytes[..cut]).is_err()));
        }
        for datagram in [
            FromClient::Hello { version_min: 1, version_max: 3, capabilities: 7 },
            FromClient::WantsStaging,
            FromClient::Unmapped { serial: 9 },
            FromClient::Goodbye,
        ] {
            assert_eq!(FromClient::decode(&datagram.encode()), Ok(datagram));
        }
        assert!(FromClient::decode(b"GET / HTTP/1.1").is_err());
    }
}
