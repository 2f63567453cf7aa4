//! What a writer knows of its sessions, and the entries that it makes of steps. Pure.
//!
//! A session's first record in a log is full. Of the records after it, the n-th adds what the last 2^k appends added, where 2^k is the largest
//! power of two that divides n, and names the records before those: reading a session takes its newest record and at most as many others as n
//! has binary digits that are 1. Pieces are written once; records name where they lie.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::bytes::Ids;
use super::entry::{End, Entry, FORMAT, Kind, Place, Pointer, Record, Row};
use super::error::Refusal;
use super::name::Name;
use super::owner::Standing;
use super::state::{Block, Cuts, Delta, Head, PIECE_STORED_BYTES, Piece, Progress, Sampler, Session};
use crate::caps;
use crate::digest::Digest;
use crate::manifest::{Bounded, Refused};

/// The KV of some tokens that no block holds yet: see [`Piece`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPiece {
    /// Its group of layers.
    pub group: u16,
    /// Its rank.
    pub rank: u16,
    /// Its first token. What is there from this token on is replaced.
    pub start: u64,
    /// Its tokens.
    pub tokens: u32,
    /// Its bytes.
    pub data: Data,
}

/// The bytes of a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// They go into the log.
    Inline(Bytes),
    /// They lie elsewhere, where whoever appends keeps them as long as the session needs them. Nothing here does.
    Chunk {
        /// How many.
        bytes: u64,
        /// Their digest.
        digest: Digest,
    },
}

/// What is added to a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Append {
    /// Tokens that the session has, its prompt included: an append that leaves a gap or overlaps is refused.
    pub start: u64,
    /// New ids.
    pub ids: Vec<u32>,
    /// Generated tokens that the client has.
    pub delivered: u64,
    /// Tokens whose KV is durable: blocks that are, and pieces of this append and earlier ones.
    pub valid_tokens: u64,
    /// What changed of the sampler; `None` is "as before".
    pub sampler: Sampler,
    /// Blocks that have become durable.
    pub blocks: Vec<Block>,
    /// The KV of tokens behind the last block.
    pub pieces: Vec<NewPiece>,
}

/// What becomes of one session by a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which.
    pub name: Name,
    /// Given once: by the first step of a session that is new.
    pub head: Option<Head>,
    /// What is added; `None`: nothing.
    pub append: Option<Append>,
    /// Whether it ends here.
    pub ends: Option<End>,
}

impl Step {
    /// The first step of a session that was opened.
    pub fn begin(name: Name, head: Head, append: Option<Append>) -> Self {
        Self { name, head: Some(head), append, ends: None }
    }

    /// The next one.
    pub fn append(name: Name, append: Append) -> Self {
        Self { name, head: None, append: Some(append), ends: None }
    }

    /// The last one.
    pub fn end(name: Name, append: Option<Append>, ends: End) -> Self {
        Self { name, head: None, append, ends: Some(ends) }
    }
}

impl Append {
    fn stored_bytes(&self) -> u64 {
        let data = self.pieces.iter().map(|piece| match &piece.data {
            Data::Inline(data) => data.len() as u64,
            Data::Chunk { .. } => 0,
        });
        let blocks = self.blocks.iter().map(Block::stored_bytes).sum::<u64>();
        let rest = 4 * self.ids.len() + PIECE_STORED_BYTES * self.pieces.len();
        data.sum::<u64>() + blocks + self.sampler.stored_bytes() + rest as u64
    }
}

impl Step {
    /// Bytes that it brings to a commit, at most; those that its session has are not counted.
    pub(super) fn stored_bytes(&self) -> u64 {
        let head = self.head.as_ref().map_or(0, Head::stored_bytes);
        1024 + head + self.append.as_ref().map_or(0, Append::stored_bytes)
    }
}

/// A step that is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    /// The session.
    pub name: Name,
    /// Its epoch.
    pub epoch: u64,
    /// The entry of the log.
    pub number: u64,
    /// Its tokens, those of the prompt included, whose ids are durable.
    pub tokens: u64,
    /// Those whose KV is.
    pub valid_tokens: u64,
}

/// What a session's first record here is made of.
#[derive(Debug)]
pub(super) enum Beginning {
    /// It is new.
    Fresh,
    /// It was claimed; with the bytes of its pieces.
    Claimed(Box<Session>, Vec<Option<Bytes>>),
}

/// What a record added.
#[derive(Debug)]
struct Node {
    /// By how many appends: a power of two.
    covers: u64,
    delta: Delta,
    cuts: Cuts,
    place: Place,
}

#[derive(Debug)]
struct Running {
    progress: Progress,
    full: Place,
    newest: Place,
    nodes: Vec<Node>,
    /// The last entry that says where its newest record is.
    mentioned: u64,
}

#[derive(Debug)]
enum Stage {
    Begins(Beginning),
    Runs(Running),
}

#[derive(Debug)]
struct Held {
    slot: u32,
    standing: Standing,
    stage: Stage,
}

/// A session that ended here.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) name: Name,
    pub(super) slot: u32,
    pub(super) standing: Standing,
    pub(super) ends: End,
    /// Its last record.
    pub(super) place: Place,
    mentioned: u64,
}

/// What steps came to: an entry, unless all were refused.
pub(super) struct Built {
    pub(super) entry: Option<(u64, Bytes)>,
    pub(super) answers: Vec<Result<Acknowledged, Refusal>>,
}

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Live {
    log: String,
    next: u64,
    next_slot: u32,
    claiming: HashSet<Name>,
    held: HashMap<Name, Held>,
    pub(super) ended: Vec<Ended>,
    /// Slots of sessions that were closed here, and are known to be: four bytes each, as long as the log is written.
    over: HashSet<u32>,
}

/// An entry that is being made.
#[derive(Default)]
struct Body {
    bytes: Vec<u8>,
    rows: Vec<Row>,
    /// Where the step's bytes begin that is being made.
    from: usize,
}

/// Bytes of an entry without its index.
pub(super) const BODY_BYTES_MAX: u64 = caps::ENTRY_BYTES_MAX - 2 * caps::INDEX_BYTES_MAX;

impl Body {
    /// Refused where the step would fit into no entry.
    fn push(&mut self, bytes: &[u8]) -> Result<u64, Refusal> {
        let at = self.bytes.len();
        let of_step = (at - self.from + bytes.len()) as u64;
        if of_step > BODY_BYTES_MAX {
            return Err(Refusal::NeverFits { bytes: of_step, most: BODY_BYTES_MAX });
        }
        self.bytes.extend_from_slice(bytes);
        Ok(at as u64)
    }

    /// Whether the step, which is whole, fits into this entry.
    fn check(&self) -> Result<(), Refusal> {
        if self.bytes.len() as u64 > BODY_BYTES_MAX { Err(Refusal::TooLarge(BODY_BYTES_MAX)) } else { Ok(()) }
    }

    /// The same of a piece of a session that was claimed, with room for its record and for steps of others.
    fn piece_of_claimed(&mut self, bytes: &[u8]) -> Result<u64, Refusal> {
        match (self.bytes.len() + bytes.len()) as u64 > caps::CLAIMED_BYTES_MAX {
            true => Err(Refusal::TooLarge(caps::CLAIMED_BYTES_MAX)),
            false => self.push(bytes),
        }
    }

    fn piece(&mut self, number: u64, new: NewPiece) -> Result<Piece, Refusal> {
        let NewPiece { group, rank, start, tokens, data } = new;
        let (bytes, digest, held) = match data {
            Data::Inline(data) => (data.len() as u64, Digest::of(&data), Some((number, self.push(&data)?))),
            Data::Chunk { bytes, digest } => (bytes, digest, None),
        };
        Ok(Piece { group, rank, start, tokens, bytes, digest, held })
    }
}

impl Live {
    pub(super) fn new(log: String) -> Self {
        let (claiming, held, over) = (HashSet::new(), HashMap::new(), HashSet::new());
        Self { log, next: 1, next_slot: 0, claiming, held, ended: Vec::new(), over }
    }

    /// The number of the next entry.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// A slot for a session that is being claimed; none where it is owned, or being claimed already. A slot is never given twice.
    pub(super) fn claim(&mut self, name: &Name) -> Option<u32> {
        if self.held.contains_key(name) || !self.claiming.insert(name.clone()) {
            return None;
        }
        self.next_slot += 1;
        Some(self.next_slot)
    }

    /// Whether another one fits.
    pub(super) fn has_room(&self) -> bool {
        let moved = self.ended.iter().filter(|ended| ended.ends == End::Moved).count();
        let closed = self.ended.len() - moved;
        self.held.len() + self.claiming.len() + moved < caps::SESSIONS_HELD_MAX && closed < caps::SESSIONS_HELD_MAX
    }

    pub(super) fn give_up(&mut self, name: &Name) {
        self.claiming.remove(name);
    }

    /// A session that was closed here, and that the store says so of.
    pub(super) fn forget(&mut self, slot: u32) {
        self.ended.retain(|ended| ended.slot != slot);
        self.over.insert(slot);
    }

    /// Whether a slot is that of one that was forgotten.
    pub(super) fn is_over(&self, slot: u32) -> bool {
        self.over.contains(&slot)
    }

    /// It is owned from now on.
    pub(super) fn own(&mut self, name: &Name, slot: u32, standing: Standing, beginning: Beginning) {
        self.claiming.remove(name);
        self.held.insert(name.clone(), Held { slot, standing, stage: Stage::Begins(beginning) });
    }

    /// The sessions that it owns, and the epochs since when.
    pub(super) fn sessions(&self) -> Vec<(Name, u64)> {
        let mut all: Vec<_> = self.held.iter().map(|(name, held)| (name.clone(), held.standing.owner.epoch)).collect();
        all.sort();
        all
    }

    /// Bytes that a step takes of an entry, at most: what it brings, and what its record repeats.
    pub(super) fn weighs(&self, step: &Step) -> u64 {
        let repeats = match self.held.get(&step.name).map(|held| &held.stage) {
            Some(Stage::Begins(Beginning::Claimed(session, data))) => {
                session.stored_bytes() + data.iter().flatten().map(|data| data.len() as u64).sum::<u64>()
            }
            Some(Stage::Runs(running)) => running.nodes.iter().map(|node| node.place.2).sum(),
            Some(Stage::Begins(Beginning::Fresh)) | None => 0,
        };
        repeats + step.stored_bytes()
    }

    /// Makes an entry of steps.
    pub(super) fn build(&mut self, steps: Vec<Step>) -> Built {
        let number = self.next;
        let (mut body, mut answers, mut seen) = (Body::default(), Vec::with_capacity(steps.len()), HashSet::new());
        for step in steps {
            let name = step.name.clone();
            body.from = body.bytes.len();
            let is_new = seen.insert(name.clone());
            let answer = if is_new { self.step(number, step, &mut body) } else { Err(Refusal::Twice(name)) };
            if answer.is_err() {
                body.bytes.truncate(body.from);
            }
            answers.push(answer);
        }
        if body.rows.is_empty() {
            return Built { entry: None, answers };
        }
        let mut entry = Entry::new(&self.log, number, Kind::Commit, None);
        (entry.rows, entry.pointers) = (Bounded(body.rows), Bounded(self.pointers(number)));
        // Rows, pointers and bytes are bounded before, so this does not fail; if it did, nothing would have been promised.
        let Ok(stored) = entry.finish(body.bytes) else {
            let refused =
                |answer: Result<Acknowledged, Refusal>| answer.and(Err(Refusal::TooLarge(caps::ENTRY_BYTES_MAX)));
            return Built { entry: None, answers: answers.into_iter().map(refused).collect() };
        };
        self.next += 1;
        Built { entry: Some((number, stored.into())), answers }
    }

    /// Of each session that was last mentioned long ago, where its newest record is.
    fn pointers(&mut self, number: u64) -> Vec<Pointer> {
        let is_due = |mentioned: u64| mentioned + caps::MENTIONED_EVERY <= number;
        let mut pointers = Vec::new();
        for held in self.held.values_mut() {
            if let Stage::Runs(running) = &mut held.stage
                && is_due(running.mentioned)
            {
                running.mentioned = number;
                pointers.push(Pointer(held.slot, None, running.newest));
            }
        }
        for ended in self.ended.iter_mut().filter(|ended| ended.ends == End::Moved && is_due(ended.mentioned)) {
            ended.mentioned = number;
            pointers.push(Pointer(ended.slot, Some(ended.ends), ended.place));
        }
        pointers.sort_unstable_by_key(|pointer| pointer.0);
        pointers
    }

    fn step(&mut self, number: u64, step: Step, body: &mut Body) -> Result<Acknowledged, Refusal> {
        let Step { name, head, append, ends } = step;
        let held = self.held.get_mut(&name).ok_or_else(|| Refusal::NotOwned(name.clone()))?;
        let (slot, epoch) = (held.slot, held.standing.owner.epoch);
        let at = At { log: &self.log, number, slot, epoch, name: &name, ends };
        let running = match (&mut held.stage, head) {
            (Stage::Begins(Beginning::Fresh), None) => return Err(Refusal::NotBegun(name)),
            (Stage::Begins(Beginning::Claimed(..)) | Stage::Runs(_), Some(_)) => return Err(Refusal::Begun(name)),
            (Stage::Begins(beginning), head) => {
                let running = at.first(beginning, head, append, body)?;
                held.stage = Stage::Runs(running);
                let Stage::Runs(running) = &mut held.stage else { return Err(Refusal::NotOwned(name)) };
                running
            }
            (Stage::Runs(running), None) => {
                at.next(running, append, body)?;
                running
            }
        };
        body.rows.push(Row(slot, ends, running.newest.1, running.newest.2));
        let (tokens, valid_tokens) = (running.progress.tokens, running.progress.valid_tokens);
        let acknowledged = Acknowledged { name: name.clone(), epoch, number, tokens, valid_tokens };
        if let Some(ends) = ends {
            let (place, standing) = (running.newest, held.standing.clone());
            self.held.remove(&name);
            self.ended.push(Ended { name, slot, standing, ends, place, mentioned: number });
        }
        Ok(acknowledged)
    }
}

/// A step of a session, and the record that comes of it.
struct At<'a> {
    log: &'a str,
    number: u64,
    slot: u32,
    epoch: u64,
    name: &'a Name,
    ends: Option<End>,
}

impl At<'_> {
    fn invalid(&self) -> impl FnOnce(Refused) -> Refusal {
        let name = self.name.clone();
        move |why| Refusal::Invalid { name, why }
    }

    /// What an append adds; its pieces are written. Nothing, where there is none.
    fn delta(&self, progress: &Progress, append: Option<Append>, body: &mut Body) -> Result<Delta, Refusal> {
        let Some(append) = append else { return Ok(progress.nothing()) };
        let Append { start, ids, delivered, valid_tokens, sampler, blocks, pieces } = append;
        if pieces.len() > caps::PIECES_MAX {
            return Err(self.invalid()(Refused(format!("more than {} pieces", caps::PIECES_MAX))));
        }
        let pieces: Result<Vec<Piece>, Refusal> =
            pieces.into_iter().map(|piece| body.piece(self.number, piece)).collect();
        let (blocks, pieces) = (Bounded(blocks), Bounded(pieces?));
        Ok(Delta { start, ids: Ids(ids), delivered, valid_tokens, sampler, blocks, pieces })
    }

    /// A session's first record here: all of it.
    fn first(
        &self,
        beginning: &Beginning,
        head: Option<Head>,
        append: Option<Append>,
        body: &mut Body,
    ) -> Result<Running, Refusal> {
        let mut session = match beginning {
            Beginning::Fresh => Session::new(self.name.clone(), self.epoch, head.unwrap_or_default()),
            Beginning::Claimed(claimed, data) => {
                let mut session = Session { epoch: self.epoch, ..(**claimed).clone() };
                self.keep_what_fits(&mut session, data, body);
                session
            }
        };
        let mut progress = session.progress().map_err(self.invalid())?;
        let delta = self.delta(&progress, append, body)?;
        progress.append(&delta).map_err(self.invalid())?;
        session.apply(&delta, &progress.cover);
        let place = self.write(Vec::new(), Some(session), None, body)?;
        Ok(Running { progress, full: place, newest: place, nodes: Vec::new(), mentioned: self.number })
    }

    /// Writes the pieces of a session that was claimed. Those that do not fit into the entry are left out, from the first one on, and
    /// `valid_tokens` falls to what the others hold: whoever claimed the session has their bytes, and appends them again.
    fn keep_what_fits(&self, session: &mut Session, data: &[Option<Bytes>], body: &mut Body) {
        let mut kept = 0;
        for (piece, data) in session.pieces.0.iter_mut().zip(data) {
            piece.held = match data.as_ref().map(|data| body.piece_of_claimed(data)) {
                Some(Ok(at)) => Some((self.number, at)),
                Some(Err(_)) => break,
                None => None,
            };
            kept += 1;
        }
        if kept < session.pieces.0.len() {
            session.pieces.0.truncate(kept);
            session.valid_tokens = session.valid_tokens.min(session.covered());
        }
    }

    /// One of the following ones.
    fn next(&self, running: &mut Running, append: Option<Append>, body: &mut Body) -> Result<(), Refusal> {
        let delta = self.delta(&running.progress, append, body)?;
        let newest = Cuts::of(&delta.pieces.0, &running.progress.cover);
        let mut progress = running.progress.clone();
        progress.append(&delta).map_err(self.invalid())?;
        let (mut covers, mut kept) = (1, running.nodes.len());
        while kept > 0 && running.nodes.get(kept - 1).is_some_and(|node| node.covers == covers) {
            (covers, kept) = (covers * 2, kept - 1);
        }
        let (before, joined) = running.nodes.split_at(kept);
        let mut joined = joined.iter().map(|node| (&node.delta, &node.cuts)).chain([(&delta, &newest)]);
        let (mut delta, mut cuts) =
            joined.next().map(|(delta, cuts)| (delta.clone(), cuts.clone())).unwrap_or_default();
        for (newer, newer_cuts) in joined {
            delta.follow(newer, &progress.cover);
            cuts.follow(newer_cuts);
        }
        let mut stored = delta.clone();
        if covers > 1 {
            stored.pieces.0 = cuts.before(stored.pieces.0);
        }
        let path = [running.full].into_iter().chain(before.iter().map(|node| node.place)).collect();
        let place = self.write(path, None, Some(stored), body)?;
        running.nodes.truncate(kept);
        running.nodes.push(Node { covers, delta, cuts, place });
        (running.progress, running.newest, running.mentioned) = (progress, place, self.number);
        Ok(())
    }

    fn write(
        &self,
        path: Vec<Place>,
        full: Option<Session>,
        delta: Option<Delta>,
        body: &mut Body,
    ) -> Result<Place, Refusal> {
        let (critical, path) = (Bounded::default(), Bounded(path));
        let record = Record { format: FORMAT, critical, epoch: self.epoch, ends: self.ends, path, full, delta };
        let stored = record.encode(self.log, self.number, self.slot).map_err(self.invalid())?;
        let place = Place(self.number, body.push(&stored)?, stored.len() as u64);
        body.check()?;
        Ok(place)
    }
}
