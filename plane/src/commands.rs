//! Commands and completions, as records of the rings. A command's completions carry its tag; those of a STAGE's blocks
//! the tags from the command's on, one a block.

use crate::bytes::{Reader, Writer};
use crate::caps;
use crate::key::SequenceHash;

/// A record that is none of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the command is malformed: {0}")]
pub struct BadCommand(pub &'static str);

const SHORT: BadCommand = BadCommand("it is shorter than its kind requires");

/// A block that a client will bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageBlock {
    /// Its name.
    pub hash: SequenceHash,
    /// The block before it.
    pub parent: Option<SequenceHash>,
    /// Its bytes.
    pub length: u32,
    /// The last of its request.
    pub tail: bool,
}

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Reserve slots for blocks whose bytes will come.
    Stage {
        /// The daemon's number for the layout.
        layout: u32,
        /// The layer group.
        group: u16,
        /// Answer only once the block is on disk, data and index synced.
        local: bool,
        /// They go to the object store in the background, whatever the daemon's configuration says.
        upload: bool,
        /// Nobody waits after this long.
        deadline_ms: u32,
        /// The blocks.
        blocks: Vec<StageBlock>,
    },
    /// The next bytes of the block that was staged under this tag lie in staging memory.
    Copy {
        /// Where.
        offset: u64,
        /// How many: whole lines of 64 bytes, but for the last piece.
        bytes: u32,
        /// No more follow: publish the block.
        last: bool,
        /// With the last: CRC-32 that all bytes should have.
        crc32: Option<u32>,
    },
    /// The block that was staged under this tag will not come.
    Abandon,
    /// Bring blocks into memory, and keep them there until [`Self::Release`], for a second at most.
    Promote {
        /// The daemon's number for the layout.
        layout: u32,
        /// The layer group.
        group: u16,
        /// Nobody waits after this long.
        deadline_ms: u32,
        /// A look-up's ticket, which must be alive; 0 for none.
        ticket: u128,
        /// The blocks, in prefix order.
        hashes: Vec<SequenceHash>,
    },
    /// What was promoted under this tag is read.
    Release,
    /// These blocks will be read soon: bring them when nothing else is to be done. No completion.
    Hint {
        /// The daemon's number for the layout.
        layout: u32,
        /// The layer group.
        group: u16,
        /// The blocks, in prefix order.
        hashes: Vec<SequenceHash>,
    },
    /// A call of `kvstore.v1.Blocks`.
    Call {
        /// Which.
        verb: u16,
        /// It ends after this long.
        deadline_ms: u32,
        /// The request's message.
        request: Vec<u8>,
    },
}

/// The calls that [`Command::Call`] carries.
pub mod verbs {
    /// RegisterLayout.
    pub const REGISTER_LAYOUT: u16 = 1;
    /// Lookup.
    pub const LOOKUP: u16 = 2;
    /// ReleaseTicket.
    pub const RELEASE_TICKET: u16 = 3;
    /// Prefetch.
    pub const PREFETCH: u16 = 4;
    /// CancelPrefetch.
    pub const CANCEL_PREFETCH: u16 = 5;
    /// Pin.
    pub const PIN: u16 = 6;
    /// Unpin.
    pub const UNPIN: u16 = 7;
    /// Delete.
    pub const DELETE: u16 = 8;
}

fn put_hash(writer: &mut Writer, hash: &SequenceHash) {
    for word in hash.words() {
        writer.u64(word);
    }
    writer.u64(hash.byte_len() as u64);
}

/// 40 bytes: the padded hash and its length, 0 for none.
fn take_hash(reader: &mut Reader<'_>) -> Result<Option<SequenceHash>, BadCommand> {
    let mut words = [0u64; 4];
    for word in &mut words {
        *word = reader.u64().ok_or(SHORT)?;
    }
    let mut padded = [0u8; 32];
    for (to, word) in padded.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    match reader.u64().ok_or(SHORT)? {
        0 => Ok(None),
        len => {
            let hash = padded.get(..len as usize).and_then(|bytes| SequenceHash::new(bytes).ok());
            hash.map(Some).ok_or(BadCommand("a hash has 1 to 32 bytes"))
        }
    }
}

fn put_hashes(writer: &mut Writer, hashes: &[SequenceHash]) {
    writer.u64(hashes.len() as u64);
    hashes.iter().for_each(|hash| put_hash(writer, hash));
}

fn take_hashes(reader: &mut Reader<'_>) -> Result<Vec<SequenceHash>, BadCommand> {
    let count = reader.u64().ok_or(SHORT)?;
    if count == 0 || count > caps::HASHES_PER_PROMOTE_MAX as u64 {
        return Err(BadCommand("it names no hash, or too many"));
    }
    (0..count).map(|_| take_hash(reader)?.ok_or(BadCommand("a hash has 1 to 32 bytes"))).collect()
}

impl Command {
    /// Its kind and payload.
    pub fn encode(&self) -> (u16, Vec<u8>) {
        let mut writer = Writer::default();
        let kind = match self {
            Self::Stage { layout, group, local, upload, deadline_ms, blocks } => {
                let flags = u16::from(*local) | u16::from(*upload) << 1;
                writer.u32(*layout).u16(*group).u16(flags).u32(*deadline_ms).u32(blocks.len() as u32);
                for block in blocks {
                    put_hash(&mut writer, &block.hash);
                    match &block.parent {
                        Some(parent) => put_hash(&mut writer, parent),
                        None => _ = writer.put([0; 40]),
                    }
                    writer.u32(block.length).u32(u32::from(block.tail));
                }
                1
            }
            Self::Copy { offset, bytes, last, crc32 } => {
                let flags = u32::from(*last) | u32::from(crc32.is_some()) << 1;
                writer.u64(*offset).u32(*bytes).u32(flags).u64(u64::from(crc32.unwrap_or(0)));
                2
            }
            Self::Abandon => 3,
            Self::Promote { layout, group, deadline_ms, ticket, hashes } => {
                writer.u32(*layout).u16(*group).u16(0).u32(*deadline_ms).u32(0).put(ticket.to_le_bytes());
                put_hashes(&mut writer, hashes);
                4
            }
            Self::Release => 5,
            Self::Hint { layout, group, hashes } => {
                writer.u32(*layout).u16(*group).u16(0);
                put_hashes(&mut writer, hashes);
                6
            }
            Self::Call { verb, deadline_ms, request } => {
                writer.u16(*verb).u16(0).u32(*deadline_ms).0.extend_from_slice(request);
                7
            }
        };
        (kind, writer.0)
    }

    /// From a record.
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Self, BadCommand> {
        let mut reader = Reader(payload);
        let reader = &mut reader;
        Ok(match kind {
            1 => {
                let (layout, group) = (reader.u32().ok_or(SHORT)?, reader.u16().ok_or(SHORT)?);
                let flags = reader.u16().ok_or(SHORT)?;
                let (deadline_ms, count) = (reader.u32().ok_or(SHORT)?, reader.u32().ok_or(SHORT)?);
                if count == 0 || count > caps::BLOCKS_PER_STAGE_MAX as u32 {
                    return Err(BadCommand("it names no block, or too many"));
                }
                let block = |_| -> Result<StageBlock, BadCommand> {
                    let hash = take_hash(reader)?.ok_or(BadCommand("a hash has 1 to 32 bytes"))?;
                    let parent = take_hash(reader)?;
                    let length = reader.u32().ok_or(SHORT)?;
                    Ok(StageBlock { hash, parent, length, tail: reader.u32().ok_or(SHORT)? & 1 == 1 })
                };
                let blocks = (0..count).map(block).collect::<Result<_, _>>()?;
                let (local, upload) = (flags & 1 == 1, flags & 2 == 2);
                Self::Stage { layout, group, local, upload, deadline_ms, blocks }
            }
            2 => {
                let (offset, bytes) = (reader.u64().ok_or(SHORT)?, reader.u32().ok_or(SHORT)?);
                let flags = reader.u32().ok_or(SHORT)?;
                let crc32 = reader.u64().ok_or(SHORT)? as u32;
                Self::Copy { offset, bytes, last: flags & 1 == 1, crc32: (flags & 2 == 2).then_some(crc32) }
            }
            3 => Self::Abandon,
            4 => {
                let (layout, group) = (reader.u32().ok_or(SHORT)?, reader.u16().ok_or(SHORT)?);
                reader.u16().ok_or(SHORT)?;
                let deadline_ms = reader.u32().ok_or(SHORT)?;
                reader.u32().ok_or(SHORT)?;
                let ticket = reader.take().map(u128::from_le_bytes).ok_or(SHORT)?;
                Self::Promote { layout, group, deadline_ms, ticket, hashes: take_hashes(reader)? }
            }
            5 => Self::Release,
            6 => {
                let (layout, group) = (reader.u32().ok_or(SHORT)?, reader.u16().ok_or(SHORT)?);
                reader.u16().ok_or(SHORT)?;
                Self::Hint { layout, group, hashes: take_hashes(reader)? }
            }
            7 => {
                let verb = reader.u16().ok_or(SHORT)?;
                reader.u16().ok_or(SHORT)?;
                Self::Call { verb, deadline_ms: reader.u32().ok_or(SHORT)?, request: reader.rest().to_vec() }
            }
            _ => return Err(BadCommand("its kind is unknown")),
        })
    }
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completion {
    /// A staged block has a slot: its bytes are wanted.
    Staged,
    /// A staged block is decided: `PutStatus` and `Level` of `kvstore.v1`.
    Stored {
        /// The status.
        status: u32,
        /// The level.
        level: u32,
    },
    /// A piece of a staged block was read: its place in the staging memory is the client's again.
    Copied,
    /// Promotion ended: how many leading blocks are in memory, and `GetStatus` of the next.
    Promoted {
        /// Leading blocks.
        ready: u32,
        /// Why no more.
        next: u32,
    },
    /// A call's response.
    Response(Vec<u8>),
    /// A gRPC status code other than OK, and why.
    Failed {
        /// The code.
        code: u32,
        /// The reason.
        message: String,
    },
}

impl Completion {
    /// Its kind and payload.
    pub fn encode(&self) -> (u16, Vec<u8>) {
        let mut writer = Writer::default();
        let kind = match self {
            Self::Staged => 1,
            Self::Stored { status, level } => {
                writer.u32(*status).u32(*level);
                2
            }
            Self::Copied => 3,
            Self::Promoted { ready, next } => {
                writer.u32(*ready).u32(*next);
                4
            }
            Self::Response(message) => {
                writer.0.extend_from_slice(message);
                5
            }
            Self::Failed { code, message } => {
                writer.u32(*code).0.extend_from_slice(message.as_bytes());
                6
            }
        };
        (kind, writer.0)
    }

    /// From a record.
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Self, BadCommand> {
        let mut reader = Reader(payload);
        Ok(match kind {
            1 => Self::Staged,
            2 => Self::Stored { status: reader.u32().ok_or(SHORT)?, level: reader.u32().ok_or(SHORT)? },
            3 => Self::Copied,
            4 => Self::Promoted { ready: reader.u32().ok_or(SHORT)?, next: reader.u32().ok_or(SHORT)? },
            5 => Self::Response(payload.to_vec()),
            6 => {
                let code = reader.u32().ok_or(SHORT)?;
                Self::Failed { code, message: String::from_utf8_lossy(reader.rest()).into_owned() }
            }
            _ => return Err(BadCommand("its kind is unknown")),
        })
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash() -> impl Strategy<Value = SequenceHash> {
        prop::collection::vec(any::<u8>(), 1..=32).prop_map(|bytes| SequenceHash::new(&bytes).unwrap())
    }

    fn block() -> impl Strategy<Value = StageBlock> {
        (hash(), prop::option::of(hash()), any::<u32>(), any::<bool>())
            .prop_map(|(hash, parent, length, tail)| StageBlock { hash, parent, length, tail })
    }

    fn command() -> impl Strategy<Value = Command> {
        let hashes = || prop::collection::vec(hash(), 1..20);
        prop_oneof![
            (any::<u32>(), any::<u16>(), any::<(bool, bool)>(), any::<u32>(), prop::collection::vec(block(), 1..20))
                .prop_map(|(layout, group, (local, upload), deadline_ms, blocks)| Command::Stage {
                    layout,
                    group,
                    local,
                    upload,
                    deadline_ms,
                    blocks
                }),
            (any::<u64>(), any::<u32>(), any::<bool>(), prop::option::of(any::<u32>()))
                .prop_map(|(offset, bytes, last, crc32)| Command::Copy { offset, bytes, last, crc32 }),
            Just(Command::Abandon),
            Just(Command::Release),
            (any::<u32>(), any::<u16>(), any::<u32>(), any::<u128>(), hashes()).prop_map(
                |(layout, group, deadline_ms, ticket, hashes)| Command::Promote {
                    layout,
                    group,
                    deadline_ms,
                    ticket,
                    hashes
                }
            ),
            (any::<u32>(), any::<u16>(), hashes()).prop_map(|(layout, group, hashes)| Command::Hint {
                layout,
                group,
                hashes
            }),
            (any::<u16>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..100))
                .prop_map(|(verb, deadline_ms, request)| Command::Call { verb, deadline_ms, request }),
        ]
    }

    proptest! {
        #[test]
        fn commands_survive_a_round_trip_and_no_cut(command in command(), cut in 0usize..1000) {
            let (kind, payload) = command.encode();
            prop_assert_eq!(Command::decode(kind, &payload), Ok(command.clone()));
            if cut < payload.len() && !matches!(command, Command::Call { .. }) {
                prop_assert!(Command::decode(kind, &payload[..cut]).is_err());
            }
        }

        #[test]
        fn any_bytes_are_a_command_or_an_error(kind in 0u16..10, payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Command::decode(kind, &payload);
            let _ = Completion::decode(kind, &payload);
        }
    }

    #[test]
    fn the_largest_commands_fit_a_record() {
        let words: Vec<_> = (0..caps::RING_WORDS).map(|_| crate::sync::AtomicU64::new(0)).collect();
        let (written, read) = (crate::sync::AtomicU64::new(0), crate::sync::AtomicU64::new(0));
        let ring = crate::RingView { words: &words, written: &written, read: &read };
        let hash = SequenceHash::new(&[1; 32]).unwrap();
        let block = StageBlock { hash, parent: Some(hash), length: 1, tail: false };
        let stage = Command::Stage {
            layout: 0,
            group: 0,
            local: false,
            upload: true,
            deadline_ms: 0,
            blocks: vec![block; caps::BLOCKS_PER_STAGE_MAX],
        };
        let hashes = vec![hash; caps::HASHES_PER_PROMOTE_MAX];
        let promote = Command::Promote { layout: 0, group: 0, deadline_ms: 0, ticket: 0, hashes };
        for command in [stage, promote] {
            assert!(command.encode().1.len() <= ring.payload_bytes_max());
        }
    }

    #[test]
    fn completions_survive_a_round_trip() {
        for completion in [
            Completion::Staged,
            Completion::Stored { status: 1, level: 2 },
            Completion::Copied,
            Completion::Promoted { ready: 3, next: 4 },
            Completion::Response(vec![1, 2, 3]),
            Completion::Failed { code: 5, message: "why".into() },
        ] {
            let (kind, payload) = completion.encode();
            assert_eq!(Completion::decode(kind, &payload), Ok(completion));
        }
    }
}
