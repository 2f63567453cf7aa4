//! What a session is, and how it goes on: the record as it is stored, and what must be true of it. Pure.
//!
//! A [`Session`] is all of it; a [`Delta`] is what one append or several in a row add. `Option`s of a delta say "as before" where they are
//! `None`. What is read may come from anybody, and is checked before anything is done with it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bytes::{Ids, Opaque};
use super::cover::Cover;
use super::name::Name;
use crate::caps;
use crate::digest::Digest;
use crate::manifest::{Bounded, Refused};

pub(super) fn refused<T>(why: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(why.into()))
}

/// How the KV of a session is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Groups of layers; 0: no KV is kept.
    pub groups: u16,
    /// Ranks that hold parts of each group.
    pub ranks: u16,
}

/// What stays the same for a session's life.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// What must be equal where it goes on: the model, its layout, versions.
    pub facts: BTreeMap<String, String>,
    /// Ids of the prompt.
    pub prompt: Ids,
    /// Parameters of sampling, as the engine calls them.
    pub sampling: BTreeMap<String, String>,
    /// The sampler's seed.
    pub seed: Option<u64>,
    /// The LoRA, in a name that says which bytes it has.
    pub lora: Option<String>,
    /// How its KV is cut.
    pub shape: Shape,
}

impl Head {
    /// Bytes of it in a record, at most.
    pub(super) fn stored_bytes(&self) -> u64 {
        let texts = self.facts.iter().chain(&self.sampling).map(|(name, value)| name.len() + value.len() + 10);
        let lora = self.lora.as_ref().map_or(0, String::len);
        (4 * self.prompt.0.len() + lora + texts.sum::<usize>()) as u64
    }
}

/// What changes with each token, beside the ids. In a delta, `None` is "as before". What is `None` is left out where it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sampler {
    /// How often the generator of random numbers was asked, or where it stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counter: Option<u64>,
    /// Tokens that may still be generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<u64>,
    /// Tokens with a count for penalties, by their ids; where they do not follow from the ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub penalties: Option<Bounded<(u32, u32), { caps::PENALTIES_MAX }>>,
    /// Text that is held back, since a stop string may begin in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_tail: Option<String>,
    /// What the detokeniser has not yet made text of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detokeniser: Option<Opaque>,
    /// The grammar's state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grammar: Option<Opaque>,
    /// What else the engine keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<Opaque>,
}

impl Sampler {
    fn is_as_before(&self) -> bool {
        *self == Self::default()
    }

    /// What it is after `newer`.
    fn merge(&mut self, newer: &Self) {
        fn take<T: Clone>(old: &mut Option<T>, new: &Option<T>) {
            if new.is_some() {
                old.clone_from(new);
            }
        }
        take(&mut self.counter, &newer.counter);
        take(&mut self.budget, &newer.budget);
        take(&mut self.penalties, &newer.penalties);
        take(&mut self.stop_tail, &newer.stop_tail);
        take(&mut self.detokeniser, &newer.detokeniser);
        take(&mut self.grammar, &newer.grammar);
        take(&mut self.engine, &newer.engine);
    }

    /// Bytes of it in a record, at most.
    pub(super) fn stored_bytes(&self) -> u64 {
        let opaque =
            [&self.detokeniser, &self.grammar, &self.engine].into_iter().flatten().map(|opaque| opaque.0.len());
        let texts = self.stop_tail.iter().map(String::len);
        let penalties = self.penalties.iter().map(|penalties| 11 * penalties.0.len());
        200 + opaque.chain(texts).chain(penalties).sum::<usize>() as u64
    }

    fn check(&self) -> Result<(), Refused> {
        let penalties = self.penalties.iter().flat_map(|all| all.0.windows(2));
        if penalties.into_iter().any(|pair| matches!(pair, [one, other] if one.0 >= other.0)) {
            return refused("its penalties are not in the order of their tokens, or one is there twice");
        }
        if self.stop_tail.as_ref().is_some_and(|tail| tail.len() > caps::TEXT_BYTES_MAX) {
            return refused(format!("its stop string's tail has more than {} bytes", caps::TEXT_BYTES_MAX));
        }
        for (opaque, what) in
            [(&self.detokeniser, "detokeniser's"), (&self.grammar, "grammar's"), (&self.engine, "engine's")]
        {
            if opaque.as_ref().is_some_and(|opaque| opaque.0.len() > caps::OPAQUE_BYTES_MAX) {
                return refused(format!("its {what} state has more than {} bytes", caps::OPAQUE_BYTES_MAX));
            }
        }
        Ok(())
    }
}

type BlockName = Opaque<{ caps::BLOCK_NAME_BYTES_MAX }>;
type BlockForm = (u32, u16, u16, BlockName, Option<BlockName>);
/// Bytes of a piece in a record, at most.
pub(super) const PIECE_STORED_BYTES: usize = 88;
type PieceForm = (u16, u16, u64, u32, u64, Digest, Option<(u64, u64)>);

/// A block of KV that is durable, by its name. Stored as a list of its fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BlockForm", into = "BlockForm")]
pub struct Block {
    /// Its place among those of its group and rank: it holds tokens from `index * block_tokens` on.
    pub index: u32,
    /// Its group of layers.
    pub group: u16,
    /// Its rank.
    pub rank: u16,
    /// Its name: the sequence hash.
    pub name: BlockName,
    /// The name of the block before it; none for the first.
    pub parent: Option<BlockName>,
}

impl Block {
    /// Bytes of it in a record, at most.
    pub(super) fn stored_bytes(&self) -> u64 {
        (16 + self.name.0.len() + self.parent.as_ref().map_or(0, |parent| parent.0.len())) as u64
    }
}

impl From<BlockForm> for Block {
    fn from((index, group, rank, name, parent): BlockForm) -> Self {
        Self { index, group, rank, name, parent }
    }
}

impl From<Block> for BlockForm {
    fn from(block: Block) -> Self {
        (block.index, block.group, block.rank, block.name, block.parent)
    }
}

/// The KV of some tokens that no block holds yet. Stored as a list of its fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PieceForm", into = "PieceForm")]
pub struct Piece {
    /// Its group of layers.
    pub group: u16,
    /// Its rank.
    pub rank: u16,
    /// Its first token.
    pub start: u64,
    /// Its tokens.
    pub tokens: u32,
    /// Its bytes.
    pub bytes: u64,
    /// Their digest.
    pub digest: Digest,
    /// The number of the entry, and its first byte there. `None`: it is a chunk, which whoever appended it keeps elsewhere.
    pub held: Option<(u64, u64)>,
}

impl From<PieceForm> for Piece {
    fn from((group, rank, start, tokens, bytes, digest, held): PieceForm) -> Self {
        Self { group, rank, start, tokens, bytes, digest, held }
    }
}

impl From<Piece> for PieceForm {
    fn from(piece: Piece) -> Self {
        let Piece { group, rank, start, tokens, bytes, digest, held } = piece;
        (group, rank, start, tokens, bytes, digest, held)
    }
}

/// What one append or several in a row add. What is empty is left out where it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Tokens of the session before it, its prompt included.
    pub start: u64,
    /// The ids that are new.
    pub ids: Ids,
    /// Generated tokens that the client has.
    pub delivered: u64,
    /// Tokens, those of the prompt included, whose KV is durable.
    pub valid_tokens: u64,
    /// What else changed.
    #[serde(default, skip_serializing_if = "Sampler::is_as_before")]
    pub sampler: Sampler,
    /// Blocks that are new.
    #[serde(default, skip_serializing_if = "Bounded::is_empty")]
    pub blocks: Bounded<Block, { caps::BLOCKS_MAX }>,
    /// Pieces that are new.
    #[serde(default, skip_serializing_if = "Bounded::is_empty")]
    pub pieces: Bounded<Piece, { caps::DELTA_PIECES_MAX }>,
}

impl Delta {
    /// Takes what follows it into it. Pieces that are not needed any more are left out.
    pub(super) fn follow(&mut self, newer: &Self, cover: &Cover) {
        self.ids.0.extend_from_slice(&newer.ids.0);
        (self.delivered, self.valid_tokens) = (newer.delivered, newer.valid_tokens);
        self.sampler.merge(&newer.sampler);
        self.blocks.0.extend_from_slice(&newer.blocks.0);
        self.pieces.0.extend_from_slice(&newer.pieces.0);
        keep_needed(&mut self.pieces.0, cover);
    }
}

/// The lowest of the pieces of each shard that replaced others. Where what a delta adds is joined with what follows it, such a piece may not be
/// needed any more, as blocks hold its tokens by then; what it replaced must not come back for it, though.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cuts(BTreeMap<(u16, u16), Piece>);

impl Cuts {
    /// Of pieces that come where `cover` is.
    pub(super) fn of(pieces: &[Piece], cover: &Cover) -> Self {
        let mut cuts = Self::default();
        pieces.iter().filter(|piece| cover.replaces(piece)).for_each(|piece| cuts.add(piece));
        cuts
    }

    fn add(&mut self, piece: &Piece) {
        let lowest = self.0.entry((piece.group, piece.rank)).or_insert_with(|| piece.clone());
        if piece.start <= lowest.start {
            lowest.clone_from(piece);
        }
    }

    /// Takes what follows them into them.
    pub(super) fn follow(&mut self, newer: &Self) {
        newer.0.values().for_each(|piece| self.add(piece));
    }

    /// These pieces, behind those that replace what none of them does.
    pub(super) fn before(&self, pieces: Vec<Piece>) -> Vec<Piece> {
        let mut first: BTreeMap<(u16, u16), u64> = BTreeMap::new();
        for piece in &pieces {
            let lowest = first.entry((piece.group, piece.rank)).or_insert(piece.start);
            *lowest = piece.start.min(*lowest);
        }
        let is_missing =
            |(shard, cut): &(&(u16, u16), &Piece)| first.get(*shard).is_none_or(|start| *start > cut.start);
        let cuts = self.0.iter().filter(is_missing).map(|(_, cut)| cut.clone());
        cuts.chain(pieces).collect()
    }
}

/// Leaves the newest of the pieces that are needed, in the order in which they came.
fn keep_needed(pieces: &mut Vec<Piece>, cover: &Cover) {
    let mut seen = std::collections::HashSet::new();
    let mut kept: Vec<Piece> = std::mem::take(pieces).into_iter().rev().filter(|piece| cover.needs(piece)).collect();
    kept.retain(|piece| seen.insert((piece.group, piece.rank, piece.start)));
    kept.reverse();
    *pieces = kept;
}

/// A session, all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// What it is called.
    pub name: Name,
    /// The epoch of the owner that wrote this.
    pub epoch: u64,
    /// What stays the same.
    pub head: Head,
    /// Ids that were generated.
    pub generated: Ids,
    /// How many of them the client has.
    pub delivered: u64,
    /// Tokens, those of the prompt included, whose KV is durable.
    pub valid_tokens: u64,
    /// The sampler.
    pub sampler: Sampler,
    /// Its blocks, as they came.
    pub blocks: Bounded<Block, { caps::BLOCKS_MAX }>,
    /// Its pieces, as they came.
    pub pieces: Bounded<Piece, { caps::PIECES_MAX }>,
}

impl Session {
    /// One that begins.
    pub(super) fn new(name: Name, epoch: u64, head: Head) -> Self {
        Self {
            name,
            epoch,
            head,
            generated: Ids::default(),
            delivered: 0,
            valid_tokens: 0,
            sampler: Sampler::default(),
            blocks: Bounded::default(),
            pieces: Bounded::default(),
        }
    }

    /// Bytes of it in a record, at most.
    pub(super) fn stored_bytes(&self) -> u64 {
        let blocks = self.blocks.0.iter().map(Block::stored_bytes).sum::<u64>();
        let rest = 1024 + 4 * self.generated.0.len() + PIECE_STORED_BYTES * self.pieces.0.len();
        self.head.stored_bytes() + self.sampler.stored_bytes() + blocks + rest as u64
    }

    /// Its tokens, those of the prompt included.
    pub fn tokens(&self) -> u64 {
        (self.head.prompt.0.len() + self.generated.0.len()) as u64
    }

    /// Tokens whose KV its blocks and pieces hold; none, where they are not what they may be.
    pub(super) fn covered(&self) -> u64 {
        let (mut cover, tokens) = (Cover::new(self.head.shape), self.tokens());
        let blocks = self.blocks.0.iter().try_for_each(|block| cover.add_block(block, tokens));
        let pieces = self.pieces.0.iter().try_for_each(|piece| cover.add_piece(piece, tokens));
        if blocks.and(pieces).is_ok() { cover.tokens() } else { 0 }
    }

    /// Where it stands, which is checked on the way.
    pub(super) fn progress(&self) -> Result<Progress, Refused> {
        self.name.check()?;
        check_head(&self.head)?;
        let mut progress = Progress::new(&self.head);
        let all = Delta {
            start: progress.tokens,
            ids: Ids::default(),
            delivered: self.delivered,
            valid_tokens: self.valid_tokens,
            sampler: self.sampler.clone(),
            blocks: self.blocks.clone(),
            pieces: Bounded(self.pieces.0.clone()),
        };
        progress.step(&all, self.generated.0.len() as u64)?;
        Ok(progress)
    }

    /// Goes on with a delta that has been checked.
    pub(super) fn apply(&mut self, delta: &Delta, cover: &Cover) {
        self.generated.0.extend_from_slice(&delta.ids.0);
        (self.delivered, self.valid_tokens) = (delta.delivered, delta.valid_tokens);
        self.sampler.merge(&delta.sampler);
        self.blocks.0.extend_from_slice(&delta.blocks.0);
        self.pieces.0.extend_from_slice(&delta.pieces.0);
        keep_needed(&mut self.pieces.0, cover);
    }
}

fn check_head(head: &Head) -> Result<(), Refused> {
    let Shape { block_tokens, groups, ranks } = head.shape;
    if usize::from(groups) * usize::from(ranks) > caps::SHARDS_MAX {
        return refused(format!("it has {groups} groups and {ranks} ranks; the most are {} in all", caps::SHARDS_MAX));
    }
    if block_tokens == 0 && groups > 0 {
        return refused("its blocks have no tokens");
    }
    for (texts, what) in [(&head.facts, "facts"), (&head.sampling, "sampling parameters")] {
        if texts.len() > caps::FACTS_MAX {
            return refused(format!("it has {} {what}; the most are {}", texts.len(), caps::FACTS_MAX));
        }
        if texts.iter().flat_map(|(name, value)| [name, value]).any(|text| text.len() > caps::TEXT_BYTES_MAX) {
            return refused(format!("one of its {what} has more than {} bytes", caps::TEXT_BYTES_MAX));
        }
    }
    match &head.lora {
        Some(lora) if lora.len() > caps::TEXT_BYTES_MAX => refused("its LoRA's name is too long"),
        _ => Ok(()),
    }
}

/// Where a session stands: what the next append is checked against. Holds no ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    prompt: u64,
    pub(super) tokens: u64,
    delivered: u64,
    pub(super) valid_tokens: u64,
    blocks: usize,
    /// Bytes of its head, ids and blocks in a full record, at most.
    bytes: u64,
    pub(super) cover: Cover,
}

impl Progress {
    fn new(head: &Head) -> Self {
        let prompt = head.prompt.0.len() as u64;
        let cover = Cover::new(head.shape);
        Self { prompt, tokens: prompt, delivered: 0, valid_tokens: 0, blocks: 0, bytes: head.stored_bytes(), cover }
    }

    /// A delta that adds nothing.
    pub(super) fn nothing(&self) -> Delta {
        let (start, delivered, valid_tokens) = (self.tokens, self.delivered, self.valid_tokens);
        Delta { start, delivered, valid_tokens, ..Delta::default() }
    }

    /// Goes on by a delta, or refuses it; then nothing may be made of what is left of this.
    pub(super) fn step(&mut self, delta: &Delta, new: u64) -> Result<(), Refused> {
        if delta.start != self.tokens {
            let how = if delta.start < self.tokens { "overlaps them" } else { "leaves a gap" };
            return refused(format!("the session has {} tokens; what begins at {} {how}", self.tokens, delta.start));
        }
        let tokens = self.tokens.saturating_add(new);
        if tokens > caps::TOKENS_MAX as u64 {
            return refused(format!("it would have {tokens} tokens; the most are {}", caps::TOKENS_MAX));
        }
        if delta.delivered > tokens - self.prompt || delta.delivered < self.delivered {
            return refused(format!(
                "the client is said to have {} generated tokens; it had {}, and there are {}",
                delta.delivered,
                self.delivered,
                tokens - self.prompt
            ));
        }
        delta.sampler.check()?;
        self.blocks += delta.blocks.0.len();
        if self.blocks > caps::BLOCKS_MAX {
            return refused(format!("it has more than {} blocks", caps::BLOCKS_MAX));
        }
        self.bytes += 4 * new + delta.blocks.0.iter().map(Block::stored_bytes).sum::<u64>();
        if self.bytes > caps::SESSION_STATE_BYTES_MAX {
            return refused(format!("its ids and blocks have more than {} bytes", caps::SESSION_STATE_BYTES_MAX));
        }
        for block in &delta.blocks.0 {
            self.cover.add_block(block, tokens)?;
        }
        for piece in &delta.pieces.0 {
            if piece.bytes == 0 || piece.bytes > caps::PIECE_BYTES_MAX as u64 {
                return refused(format!(
                    "a piece of {} bytes; it must have 1 to {}",
                    piece.bytes,
                    caps::PIECE_BYTES_MAX
                ));
            }
            self.cover.add_piece(piece, tokens)?;
        }
        self.check_pieces()?;
        let covered = self.cover.tokens();
        if delta.valid_tokens > covered {
            return refused(format!(
                "KV of {} tokens is said to be durable; blocks and pieces hold that of {covered}",
                delta.valid_tokens
            ));
        }
        (self.tokens, self.delivered, self.valid_tokens) = (tokens, delta.delivered, delta.valid_tokens);
        Ok(())
    }

    /// Whatever a record joins, and whoever claims the session, must be able to hold them.
    fn check_pieces(&self) -> Result<(), Refused> {
        match self.cover.pieces() > caps::PIECES_MAX {
            true => refused(format!("more than {} pieces: name blocks instead", caps::PIECES_MAX)),
            false => Ok(()),
        }
    }

    /// Goes on by what somebody appends.
    pub(super) fn append(&mut self, delta: &Delta) -> Result<(), Refused> {
        self.step(delta, delta.ids.0.len() as u64)?;
        delta.pieces.0.iter().try_for_each(|piece| self.cover.check_new(piece))
    }
}
