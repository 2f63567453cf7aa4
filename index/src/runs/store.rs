//! What holders store.

use std::ops::Range;

use super::map::{Look, Vacant, half};
use super::parts::{CHUNK, Chunk, HashChunk, Place, RUN_MAX, Run, Span};
use super::{Runs, Writer};
use crate::WRITE;
use crate::caps::{AHEAD, HASHES_COMPARED};
use crate::holders::HolderId;
use crate::mix::mixed;
use crate::names::next_name;
use crate::sync::{AtomicU32, Ordering};

/// The blocks of an event.
pub(super) trait Blocks {
    /// Engines' hashes come with them.
    const HASHED: bool;
    fn len(&self) -> usize;
    /// The name of one that stands behind the block `before`.
    fn name(&self, at: usize, before: Option<u64>) -> Option<u64>;
    /// The engine's hash of one.
    fn hash(&self, at: usize) -> u64;
}

/// Blocks whose names are known.
struct Named<'a>(&'a [u64]);

impl Blocks for Named<'_> {
    const HASHED: bool = false;

    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn name(&self, at: usize, _before: Option<u64>) -> Option<u64> {
        self.0.get(at).copied()
    }

    fn hash(&self, _at: usize) -> u64 {
        0
    }
}

/// Blocks of an engine: of each its hash, mixed with the domain, and that of its tokens.
pub(super) struct Hashed<'a> {
    pub domain: u64,
    pub blocks: &'a [(u64, u64)],
}

impl Blocks for Hashed<'_> {
    const HASHED: bool = true;

    fn len(&self) -> usize {
        self.blocks.len()
    }

    #[inline(always)]
    fn name(&self, at: usize, before: Option<u64>) -> Option<u64> {
        self.blocks.get(at).map(|(_, tokens_hash)| next_name(before, *tokens_hash))
    }

    #[inline(always)]
    fn hash(&self, at: usize) -> u64 {
        self.blocks.get(at).map_or(0, |(hash, _)| super::opaque::key(self.domain, *hash))
    }
}

/// Names of the next blocks of an event.
pub(super) struct Ahead {
    names: [u64; AHEAD],
    /// Up to which block, and the name of the one before that.
    end: usize,
    before: Option<u64>,
    /// Up to which block hashes are on their way.
    hashed: usize,
    /// All blocks are known by hashes of the event's domain: what is behind a new block is nowhere, if its hash is not.
    are_hashes_enough: bool,
}

/// Where an event is.
struct Put {
    tag: u16,
    /// The block before, where it is anywhere, and its name.
    last: Option<Place>,
    before: Option<u64>,
    /// This event brought it: nothing stands behind it.
    is_last_new: bool,
    /// What is yet to be said of the run that the block before is in.
    run: u32,
    from: u32,
    to: u32,
}

impl Runs {
    pub fn store(&self, holder: HolderId, parent: Option<u64>, names: &[u64]) {
        let mut writer = self.writer.lock();
        let Some(tag) = writer.holders.tag(holder) else { return };
        if !names.is_empty() {
            self.name_all(&mut writer);
        }
        let blocks = Named(names);
        if let Some(parent) = parent {
            self.names.prefetch(half(mixed(parent)));
        }
        let ahead = self.begin_ahead(&writer, &blocks);
        let behind = parent.and_then(|parent| self.locate(parent));
        self.put(&mut writer, tag, behind, ahead, &blocks);
        self.sweep(&mut writer);
    }

    /// Puts an event's blocks behind a block.
    pub(super) fn put<B: Blocks>(
        &self,
        writer: &mut Writer,
        tag: u16,
        behind: Option<Place>,
        ahead: Ahead,
        blocks: &B,
    ) {
        let before = behind.and_then(|place| self.chunks.get(place.chunk)?.name(place.at));
        let mut put = Put { tag, last: behind, before, is_last_new: false, run: 0, from: 0, to: 0 };
        if let Some(name) = blocks.name(0, before).filter(|_| ahead.are_hashes_enough) {
            self.names.prefetch(half(mixed(name)));
        }
        let (mut ahead, mut at, mut ready) = (ahead, 0, 0);
        while at < blocks.len() {
            if let Some(next) = put.last.filter(|_| !put.is_last_new).and_then(|last| self.after(last)) {
                let same = self.same(next, at, put.before, blocks);
                if same > 0 {
                    let last = Place { chunk: next.chunk, at: next.at + same - 1 };
                    self.take_in(writer, &mut put, next, same);
                    put.before = self.chunks.get(last.chunk).and_then(|chunk| chunk.name(last.at));
                    put.last = Some(last);
                    put.is_last_new = false;
                    at += same as usize;
                    continue;
                }
            }
            if at >= ready {
                self.make_ready(writer, &mut put);
                ready = at + AHEAD;
            }
            let more = self.put_on(writer, &mut put, &mut ahead, at..ready.min(blocks.len()), blocks);
            if more > 0 {
                at += more;
                continue;
            }
            let name = self.bring(&mut ahead, at, put.before, blocks);
            let is_nowhere = ahead.are_hashes_enough && put.is_last_new;
            let place = self.put_one(writer, put.last, is_nowhere, name, B::HASHED.then(|| blocks.hash(at)));
            match place {
                Some((place, _)) => self.take_in(writer, &mut put, place, 1),
                None => writer.refused += 1,
            }
            // What comes behind a block that was refused stands behind no other.
            put.last = place.map(|(place, _)| place);
            put.is_last_new = place.is_some_and(|(_, is_new)| is_new);
            put.before = Some(name);
            at += 1;
        }
        self.say(writer, &mut put);
    }

    /// What says where the first blocks of an event are is on its way from memory, as far as it is known without the block before them.
    #[inline(always)]
    pub(super) fn begin_ahead<B: Blocks>(&self, writer: &Writer, blocks: &B) -> Ahead {
        let are_hashes_enough = B::HASHED && !writer.names_all && !writer.has_domains;
        let mut ahead = Ahead { names: [0; AHEAD], end: 0, before: None, hashed: usize::MAX, are_hashes_enough };
        match &self.hashes {
            Some(hashes) if B::HASHED => {
                ahead.hashed = blocks.len().min(AHEAD);
                (0..ahead.hashed).for_each(|at| hashes.prefetch(half(blocks.hash(at))));
            }
            _ => _ = self.bring(&mut ahead, 0, None, blocks),
        }
        ahead
    }

    /// The name of an event's block. What says where those behind it are is on its way from memory then.
    #[inline(always)]
    fn bring<B: Blocks>(&self, ahead: &mut Ahead, at: usize, before: Option<u64>, blocks: &B) -> u64 {
        if at >= ahead.end {
            (ahead.end, ahead.before) = (at, before);
        }
        while ahead.end < at + AHEAD {
            let Some(name) = blocks.name(ahead.end, ahead.before) else { break };
            if !ahead.are_hashes_enough {
                self.names.prefetch(half(mixed(name)));
            }
            if let Some(hashes) = self.hashes.as_ref().filter(|_| ahead.end >= ahead.hashed) {
                hashes.prefetch(half(blocks.hash(ahead.end)));
            }
            if let Some(to) = ahead.names.get_mut(ahead.end % AHEAD) {
                *to = name;
            }
            (ahead.end, ahead.before) = (ahead.end + 1, Some(name));
        }
        ahead.names.get(at % AHEAD).copied().unwrap_or_default()
    }

    /// Puts blocks that are nowhere behind the last one of a run, while they go on and its chunk has room: how many. What all of them have in
    /// common is said once.
    #[inline(always)]
    fn put_on<B: Blocks>(
        &self,
        writer: &mut Writer,
        put: &mut Put,
        ahead: &mut Ahead,
        part: Range<usize>,
        blocks: &B,
    ) -> usize {
        let Some(first) = put.last.and_then(|last| self.end_behind(last)) else { return 0 };
        let Some(chunk) = self.chunks.get(first.chunk) else { return 0 };
        let number = chunk.run.load(Ordering::Relaxed);
        let Some(run) = self.runs.get(number) else { return 0 };
        let hashes = chunk.hashes.load(Ordering::Relaxed);
        let known = self.hash_chunks.get(hashes).filter(|_| B::HASHED && hashes != 0).zip(self.hashes.as_ref());
        if B::HASHED && (known.is_none() || writer.names_all) {
            return 0;
        }
        let (mut at, mut before) = (first.at, put.before);
        for block in part {
            let Some(to) = chunk.names.get(at as usize) else { break };
            let name = self.bring(ahead, block, before, blocks);
            let is_nowhere = ahead.are_hashes_enough && (at > first.at || put.is_last_new);
            if is_nowhere && at == first.at {
                // The first name of the next chunk is all that the map of names gets.
                self.bring_name(ahead, block + (CHUNK - at) as usize);
            }
            let vacant = match is_nowhere {
                true => None,
                false => match self.look(name) {
                    Look::Vacant(vacant) => vacant,
                    Look::There(_) => break,
                },
            };
            let (place, is_full) = (Place { chunk: first.chunk, at }, &mut writer.is_full);
            let is_in = match known {
                None => {
                    to.store(name, WRITE);
                    self.names.fill(vacant, half(mixed(name)), place.word(), &self.budget, is_full)
                }
                Some((known, map)) => {
                    let hash = blocks.hash(block);
                    let Look::Vacant(vacant) = self.look_hash(map, hash) else { break };
                    to.store(name, WRITE);
                    let word = Place { chunk: hashes, at }.word();
                    let is_in = map.fill(vacant, half(hash), word, &self.budget, is_full);
                    known.set(at, if is_in { hash } else { 0 });
                    is_in
                }
            };
            if !is_in {
                break;
            }
            (at, before) = (at + 1, Some(name));
        }
        if at > first.at {
            let new = ((1u16 << at) - 1) & !((1 << first.at) - 1);
            if !B::HASHED {
                chunk.named.store(chunk.named.load(Ordering::Relaxed) | new, Ordering::Relaxed);
            }
            chunk.live.store(chunk.live.load(Ordering::Relaxed) | new, WRITE);
            run.len.store(chunk.base() + at, WRITE);
            writer.blocks += u64::from(at - first.at);
            self.take_in(writer, put, first, at - first.at);
            (put.last, put.before) = (Some(Place { chunk: first.chunk, at: at - 1 }), before);
            put.is_last_new = true;
        }
        (at - first.at) as usize
    }

    /// What says where a block is by its name is on its way from memory, if the name is known.
    #[inline(always)]
    fn bring_name(&self, ahead: &Ahead, at: usize) {
        if let Some(name) = ahead.names.get(at % AHEAD).filter(|_| at < ahead.end) {
            self.names.prefetch(half(mixed(*name)));
        }
    }

    /// Of the blocks that stand in a chunk from a place on, how many are those of the event.
    #[inline(always)]
    fn same<B: Blocks>(&self, place: Place, at: usize, before: Option<u64>, blocks: &B) -> u32 {
        let Some(chunk) = self.chunks.get(place.chunk) else { return 0 };
        let hashes = if B::HASHED {
            let Some(hashes) = self.hashes_with(chunk, place.at, blocks.hash(at)) else { return 0 };
            Some(hashes)
        } else {
            None
        };
        let (mut same, mut before) = (0, before);
        let most = chunk.live_from(place.at).min((blocks.len() - at) as u32);
        while same < most {
            let (in_chunk, in_event) = (place.at + same, at + same as usize);
            let name = chunk.name(in_chunk);
            let is_hash = hashes.is_none_or(|hashes| hashes.hash(in_chunk) == blocks.hash(in_event));
            if !is_hash || name != blocks.name(in_event, before) {
                break;
            }
            before = name;
            same += 1;
        }
        same
    }

    /// The hash chunk of a chunk that has this hash at a place, if it is among the first.
    #[inline(always)]
    pub(super) fn hashes_with(&self, chunk: &Chunk, at: u32, hash: u64) -> Option<&HashChunk> {
        let mut number = chunk.hashes.load(Ordering::Relaxed);
        for _ in 0..HASHES_COMPARED {
            let hashes = self.hash_chunks.get(number).filter(|_| number != 0)?;
            if hashes.hash(at) == hash {
                return Some(hashes);
            }
            number = hashes.next.load(Ordering::Relaxed);
        }
        None
    }

    /// The holder has these blocks of a run: said at once, where they follow what is yet to be said.
    #[inline(always)]
    fn take_in(&self, writer: &mut Writer, put: &mut Put, place: Place, blocks: u32) {
        let Some(chunk) = self.chunks.get(place.chunk) else { return };
        let (run, from) = (chunk.run.load(Ordering::Relaxed), chunk.base() + place.at);
        if put.run != run || put.to != from {
            self.say(writer, put);
            (put.run, put.from) = (run, from);
        }
        put.to = from + blocks;
    }

    /// Says what is yet to be said.
    pub(super) fn say_span(&self, writer: &mut Writer, number: u32, span: Span) {
        let Some(run) = self.runs.get(number) else { return };
        match self.cover(run, span) {
            Some(added) => writer.pairs += u64::from(added),
            None => {
                writer.refused += u64::from(span.to - span.from);
                self.bury(writer, number, span.from, span.to);
            }
        }
    }

    fn say(&self, writer: &mut Writer, put: &mut Put) {
        if put.run != 0 {
            self.say_span(writer, put.run, Span { tag: put.tag, from: put.from, to: put.to });
            put.run = 0;
        }
    }

    /// There is room for the next names of an event, or as much as there can be.
    fn make_ready(&self, writer: &mut Writer, put: &mut Put) {
        if !self.is_short(writer) {
            return;
        }
        self.say(writer, put);
        let version = |place: Option<Place>| {
            let number = self.chunks.get(place?.chunk)?.run.load(Ordering::Relaxed);
            Some((number, self.runs.get(number)?.version.load(Ordering::Relaxed)))
        };
        let before = version(put.last);
        self.make_room(writer);
        if version(put.last) != before {
            put.last = None;
            put.is_last_new = false;
        }
    }

    /// Where a block is that comes behind another, which is put there if it is nowhere, and whether it is new. `None`: there is no room, or its hash
    /// is another's. `is_nowhere`: it is new if its hash is.
    #[inline(always)]
    fn put_one(
        &self,
        writer: &mut Writer,
        last: Option<Place>,
        is_nowhere: bool,
        name: u64,
        hash: Option<u64>,
    ) -> Option<(Place, bool)> {
        let is = |place: &Place| self.chunks.get(place.chunk).is_some_and(|chunk| chunk.is(place.at, name));
        let hash = match (hash, &self.hashes) {
            (Some(hash), Some(map)) => match self.look_hash(map, hash) {
                Look::There(word) => return self.hashed(word).filter(is).map(|place| (place, false)),
                Look::Vacant(vacant) => Some((hash, vacant)),
            },
            _ => None,
        };
        let (known, vacant) = match is_nowhere {
            true => (None, None),
            false => match self.look(name) {
                Look::There(word) => (Some(Place::of(word)), None),
                Look::Vacant(vacant) => (last.and_then(|last| self.after(last)).filter(is), vacant),
            },
        };
        match (known, &hash) {
            (None, _) => self.append(writer, last, (name, vacant), hash).map(|place| (place, true)),
            (Some(place), None) => Some((place, false)),
            (Some(place), Some((hash, _))) => self.learn(writer, place, *hash).then_some((place, false)),
        }
    }

    #[inline(always)]
    fn append(
        &self,
        writer: &mut Writer,
        last: Option<Place>,
        name: (u64, Option<Vacant<'_>>),
        hash: Option<(u64, Option<Vacant<'_>>)>,
    ) -> Option<Place> {
        let place = match last.and_then(|last| self.end_behind(last)) {
            Some(place) => place,
            None => self.begin(writer, last, hash.is_some())?,
        };
        let chunk = self.chunks.get(place.chunk)?;
        let run = chunk.run.load(Ordering::Relaxed);
        let (name, vacant) = name;
        chunk.names.get(place.at as usize)?.store(name, WRITE);
        let half_name = half(mixed(name));
        let is_named = writer.names_all || place.at == 0;
        let mut is_in =
            !is_named || self.names.fill(vacant, half_name, place.word(), &self.budget, &mut writer.is_full);
        if let (true, Some((hash, vacant)), Some(hashes)) = (is_in, hash, &self.hashes) {
            let number = chunk.hashes.load(Ordering::Relaxed);
            let known = self.hash_chunks.get(number).filter(|_| number != 0);
            let word = Place { chunk: number, at: place.at }.word();
            is_in = known.is_some() && hashes.fill(vacant, half(hash), word, &self.budget, &mut writer.is_full);
            match known.filter(|_| is_in) {
                Some(known) => known.set(place.at, hash),
                None if is_named => self.names.remove(half_name, place.word()),
                None => {}
            }
        }
        if !is_in {
            self.trim(run);
            return None;
        }
        chunk.named.store(chunk.named.load(Ordering::Relaxed) | u16::from(is_named) << place.at, Ordering::Relaxed);
        chunk.live.store(chunk.live.load(Ordering::Relaxed) | 1 << place.at, WRITE);
        self.runs.get(run)?.len.store(chunk.base() + place.at + 1, WRITE);
        writer.blocks += 1;
        Some(place)
    }

    /// The place behind a block that is its run's last, if its chunk has room.
    #[inline(always)]
    fn end_behind(&self, last: Place) -> Option<Place> {
        let chunk = self.chunks.get(last.chunk)?;
        let run = self.runs.get(chunk.run.load(Ordering::Relaxed))?;
        let is_last = last.at + 1 < CHUNK && run.len() == chunk.base() + last.at + 1;
        is_last.then_some(Place { chunk: last.chunk, at: last.at + 1 })
    }

    /// A new chunk: behind a block that is its run's last, or of a new run.
    fn begin(&self, writer: &mut Writer, last: Option<Place>, hashed: bool) -> Option<Place> {
        let end = last.and_then(|last| {
            let chunk = self.chunks.get(last.chunk)?;
            let number = chunk.run.load(Ordering::Relaxed);
            let run = self.runs.get(number)?;
            let is_last = run.len() == chunk.base() + last.at + 1 && run.len() < RUN_MAX;
            is_last.then_some((number, last.chunk, run.len()))
        });
        let number = self.chunks.take(&self.budget)?;
        let chunk = self.chunks.get(number)?;
        let hashes = if hashed { self.begin_hashes(number) } else { Some(0) };
        let run = match end {
            Some((run, ..)) => Some(run),
            None => hashes.and_then(|_| self.begin_run(writer)),
        };
        let (Some(hashes), Some(run)) = (hashes, run) else {
            if let Some(hashes) = hashes.filter(|hashes| *hashes != 0) {
                self.hash_chunks.give_back(hashes);
            }
            self.chunks.give_back(number);
            return None;
        };
        let (before, base) = end.map_or((0, 0), |(_, last, len)| (last, len));
        let store = |to: &AtomicU32, value| to.store(value, WRITE);
        store(&chunk.base, base);
        store(&chunk.next, 0);
        store(&chunk.before, before);
        chunk.live.store(0, WRITE);
        chunk.named.store(0, Ordering::Relaxed);
        chunk.fact.store(0, Ordering::Relaxed);
        store(&chunk.hashes, hashes);
        store(&chunk.run, run);
        let of = self.runs.get(run)?;
        match self.chunks.get(before).filter(|_| before != 0) {
            Some(before) => before.next.store(number, WRITE),
            None => self.say_branch(last, Place { chunk: number, at: 0 }),
        }
        of.last.store(number, Ordering::Relaxed);
        Some(Place { chunk: number, at: 0 })
    }

    /// Behind a block there is one that is not its run's next.
    fn say_branch(&self, behind: Option<Place>, place: Place) {
        let Some(behind) = behind else { return };
        let Some(chunk) = self.chunks.get(behind.chunk) else { return };
        if let Some(run) = self.runs.get(chunk.run.load(Ordering::Relaxed)) {
            run.branch.store(chunk.base() + behind.at + 1, Ordering::Relaxed);
            run.child.store(place.word(), Ordering::Relaxed);
        }
    }

    fn begin_run(&self, writer: &mut Writer) -> Option<u32> {
        let made = self.sweeps();
        let number = self.runs.take(&self.budget)?;
        writer.holders.units_made(self.sweeps() - made);
        let run = self.runs.get(number)?;
        run.change(|| {
            let Run { len, last, table, looked, whole_from, branch, child, spans, .. } = run;
            [len, last, table, looked, whole_from, branch, child]
                .iter()
                .for_each(|word| word.store(0, Ordering::Relaxed));
            spans.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        });
        Some(number)
    }

    /// A hash chunk for a chunk; the chunk does not know it yet.
    pub(super) fn begin_hashes(&self, chunk: u32) -> Option<u32> {
        let number = self.hash_chunks.take(&self.budget)?;
        let hashes = self.hash_chunks.get(number)?;
        hashes.chunk.store(chunk, Ordering::Relaxed);
        hashes.next.store(0, Ordering::Relaxed);
        hashes.hashes.iter().for_each(|hash| hash.store(0, Ordering::Relaxed));
        Some(number)
    }
}
