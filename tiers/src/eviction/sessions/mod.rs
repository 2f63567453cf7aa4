//! The default policy: keeps what earns the most hits per block and time, as learnt from the pool's own past (see
//! [`super::lifetimes`]), and goes by LRU where that earns more (see [`super::guard`]). What sets it apart from LRU:
//!
//! - **Sessions.** A request that goes on where another ended is that session's. What is worth something is a session: its next
//!   request needs all of it, or little. Its blocks leave from its end.
//! - **Classes.** Sessions are told apart by their turns and, from the third on, by the mean gap between them; what they left behind,
//!   and a first request's last block, have classes of their own.
//! - **Ghosts.** A session that returns after its blocks were evicted goes on where it left off, and teaches how long sessions of its
//!   class really wait: without them a small pool never sees a long pause.
//! - **Admission.** New blocks take nothing from sessions that are worth more than the request's own, and nothing from their own.
//!
//! The few constants were chosen with two traces and halves of them in view: `docs/design/eviction.md`.

#![expect(
    clippy::indexing_slicing,
    reason = "records are grown with the runs that they are of; samples with the blocks that they are of"
)]

mod parts;

use super::cells::{self, Cells};
use super::chains::{Chains, NONE};
use super::classes::{self, LEFT_BEHIND, ORPHAN, SHARED, TAIL_LOST, TAIL_UNKNOWN};
use super::ghosts::Ghosts;
use super::guard::Guard;
use super::lifetimes::{Lifetime, Lifetimes};
use super::session::{Session, Tail};
use super::windows::{WINDOW_MS, Windows};
use super::{ANCESTORS_MAX, BlockIndex, Claim, EvictionKind, EvictionPolicy, NewBlock, Origin, Place, Removal, Touch};

/// One ghost for each so many blocks that fit: 20 bytes each.
const BLOCKS_PER_GHOST: usize = 4;

/// A session is looked for among the ghosts by this many blocks of a run at most.
const GHOST_LOOKS: u32 = 512;

/// What was read within so long gives no room to what is brought ahead of need: turns of agents follow each other within seconds.
const HOT_MS: u64 = 10_000;

/// What is known of a run.
#[derive(Clone, Copy, Default)]
struct Record {
    session: Session,
    /// How deep the first block is that was the session's own when it began.
    own_from: u32,
    /// How deep the last block was that it had.
    reach: u32,
    /// The block after the run's end, where that is not in the pool any more, or found no room.
    next_key: Option<u64>,
}

/// The request that is under way: its run is no candidate until the next begins.
#[derive(Clone, Copy)]
struct Pending {
    run: u32,
    what: What,
    /// Blocks of it that the guard looks at and was told of.
    told: u32,
}

#[derive(Clone, Copy)]
enum What {
    /// The session goes on; whether its last block was read, where that is known.
    GoesOn(Option<bool>),
    /// As it seems: what comes behind the run's end tells.
    SeemsToGoOn,
    /// A session that was not in the pool: a new one, or one that is remembered under a block.
    New(Option<(u64, Session)>),
    /// Nothing was read: the turn goes on.
    SameTurn,
}

/// Hashes of the blocks in the pool that the guard looks at.
#[derive(Default)]
struct Sampled {
    hashes: Vec<u64>,
    free: Vec<u32>,
}

impl Sampled {
    fn add(&mut self, key_hash: u64) -> u32 {
        if let Some(at) = self.free.pop() {
            self.hashes[at as usize] = key_hash;
            return at;
        }
        self.hashes.push(key_hash);
        self.hashes.len() as u32 - 1
    }
}

/// The learning policy; see the head of this file.
pub struct Sessions {
    chains: Chains,
    /// By run.
    records: Vec<Record>,
    pending: Option<Pending>,
    lifetimes: Lifetimes,
    ghosts: Ghosts,
    cells: Cells,
    capacity: usize,
    one_in: u64,
    /// A guard's model has none, and learns nothing itself: see [`Self::learn_from`].
    guard: Option<Box<Guard>>,
    sampled: Sampled,
    windows: Windows,
}

impl Sessions {
    /// A policy for a pool of about `capacity_blocks`.
    pub fn new(capacity_blocks: usize) -> Self {
        Self::of_sample(capacity_blocks, 1, 1)
    }

    /// A small model of such a policy: a sample of the blocks of a larger pool, and every access to them. It has room for
    /// `capacity_blocks`, one in `blocks_in` of the larger one's, and blocks of one in `sessions_in` of its sessions; and learns as
    /// the larger one would.
    pub fn of_sample(capacity_blocks: usize, blocks_in: u64, sessions_in: u64) -> Self {
        let mut policy = Self::build(capacity_blocks, (blocks_in / sessions_in.max(1)).max(1), sessions_in as u32);
        policy.guard = Some(Box::new(Guard::new(capacity_blocks)));
        policy
    }

    /// For a guard, which tells it what was learnt.
    pub(super) fn model(capacity_blocks: usize, one_in: u64) -> Self {
        Self::build(capacity_blocks, one_in, 1)
    }

    fn build(capacity_blocks: usize, one_in: u64, each: u32) -> Self {
        let mut policy = Self {
            chains: Chains::new(),
            records: Vec::new(),
            pending: None,
            lifetimes: Lifetimes::new(each),
            ghosts: Ghosts::default(),
            cells: Cells::new(),
            capacity: 0,
            one_in: one_in.max(1),
            guard: None,
            sampled: Sampled::default(),
            windows: Windows::default(),
        };
        policy.set_capacity(capacity_blocks);
        policy
    }

    /// What another learnt counts from now on.
    pub(super) fn learn_from(&mut self, lifetimes: &Lifetimes) {
        self.lifetimes.copy_index(lifetimes);
        self.cells.spoil();
    }

    fn set_record(&mut self, run: u32, record: Record) {
        if self.records.len() <= run as usize {
            super::grow(&mut self.records, run as usize + 1, Record::default());
            self.cells.ensure(run);
        }
        self.records[run as usize] = record;
    }

    fn is_pending(&self, run: u32) -> bool {
        self.pending.is_some_and(|pending| pending.run == run)
    }

    fn end_depth(&self, run: u32) -> u32 {
        self.chains.depth_of(self.chains.end_of(run))
    }

    /// The class of a run's last block, and when its lifetime began.
    fn end_life(&self, run: u32) -> Lifetime {
        let record = &self.records[run as usize];
        match record.session.tail_life() {
            Some(life) if record.next_key.is_none() && self.chains.is_tail(self.chains.end_of(run)) => life,
            _ => record.session.life,
        }
    }

    /// Lists a run that may shrink.
    fn link(&mut self, run: u32) {
        if !self.is_pending(run) && self.chains.may_shrink(run) {
            self.chains.list(run);
            self.cells.link(run, self.end_life(run), &self.lifetimes);
        }
    }

    /// The session is not in the pool any more: it is remembered by `key_hash`, or forgotten.
    fn leave(&mut self, session: Session, key_hash: Option<u64>) {
        let remembered = key_hash.filter(|_| classes::is_remembered(session.life.class));
        let forgotten = match remembered {
            Some(key_hash) => self.ghosts.insert(key_hash, session),
            None => Some(session),
        };
        if let Some(session) = forgotten {
            session.forget(&mut self.lifetimes);
        }
    }

    /// A remembered session is back.
    fn return_of(&mut self, mut ghost: Session) -> Session {
        let gap_ms = self.lifetimes.age(ghost.life);
        self.lifetimes.end_by_hit(ghost.life);
        ghost.close_tail(&mut self.lifetimes);
        ghost.after(gap_ms)
    }

    /// The runs that a request took along whole are no more. `part` is what it read before, as a request of its own.
    fn drop_absorbed(&mut self, part: Option<u32>) {
        while let Some(run) = self.chains.take_absorbed() {
            if part == Some(run) {
                self.close_run(run);
            } else {
                self.end_run(run);
            }
        }
    }

    /// Another session takes a run's blocks.
    fn end_run(&mut self, run: u32) {
        let Record { mut session, next_key, .. } = self.records[run as usize];
        self.cells.unlink(run);
        self.chains.free_run(run);
        if matches!(session.life.class, SHARED | LEFT_BEHIND) {
            self.lifetimes.end_by_hit(session.life);
            session.close_tail(&mut self.lifetimes);
        } else {
            self.leave(session, next_key);
        }
    }

    /// A request reads, or stores behind, the chain up to `at`.
    fn begin(&mut self, at: u32, read: bool) {
        if !read && self.pending.is_some_and(|pending| self.chains.end_of(pending.run) == at) {
            return;
        }
        self.settle();
        let told = if read { 0 } else { self.sampled_up_to(at) };
        self.reach(at, read, told, None);
    }

    /// Blocks up to `at` that the guard looks at.
    fn sampled_up_to(&self, at: u32) -> u32 {
        if self.guard.is_some() { self.chains.sampled(at).count() as u32 } else { 0 }
    }

    /// Whether a request that gets to `at` goes on with the session whose run has that, and `below` blocks behind it; and whether it only
    /// seems so.
    fn goes_on(chains: &Chains, record: &Record, at: u32, below: u32) -> (bool, bool) {
        let (depth, own) = (chains.depth_of(at), record.reach.saturating_sub(record.own_from) + 1);
        let goes_on = depth >= record.own_from && record.reach.saturating_sub(depth) <= own / 2;
        let seems = !goes_on && below == 0 && record.next_key.is_some();
        (record.session.life.class < LEFT_BEHIND && (goes_on || seems), seems)
    }

    /// The same as [`Self::begin`], once whatever was under way is over. The guard was told of so many blocks. `part`: see
    /// [`Self::drop_absorbed`].
    fn reach(&mut self, at: u32, read: bool, told: u32, part: Option<u32>) {
        let mut seems = false;
        let records = &self.records;
        let reached = self.chains.reach(at, |chains, run, below| {
            let goes_on;
            (goes_on, seems) = Self::goes_on(chains, &records[run as usize], at, below);
            goes_on
        });
        let run = reached.run;
        if let Some(below) = reached.below {
            self.leave_behind(run, below);
        }
        if reached.branched {
            let own_from = self.chains.depth_of(at) + 1;
            let session = Session::new(self.lifetimes.start(0));
            self.set_record(run, Record { session, own_from, reach: own_from, next_key: None });
        }
        self.cells.unlink(run);
        let what = match (reached.branched, read) {
            (true, _) => What::New(None),
            (_, false) => What::SameTurn,
            _ if seems => What::SeemsToGoOn,
            _ if self.records[run as usize].next_key.is_some() => What::GoesOn(None),
            _ => What::GoesOn(Some(reached.below.is_none())),
        };
        self.pending = Some(Pending { run, what, told });
        self.drop_absorbed(part);
        self.chains.use_now(run);
    }

    /// A session goes on without what is in the run `below`.
    fn leave_behind(&mut self, run: u32, below: u32) {
        let record = &mut self.records[run as usize];
        record.next_key = None;
        let life = Lifetime { class: LEFT_BEHIND, ..record.session.life };
        let session = Session { life, tail_class: 0, ..record.session };
        self.lifetimes.open(life);
        self.cells.unlink(run);
        self.set_record(below, Record { session, ..Record::default() });
        self.link(below);
    }

    /// The request that was under way is over.
    fn settle(&mut self) {
        self.tell_guard();
        let Some(Pending { run, what, .. }) = self.pending.take() else { return };
        let record = self.records[run as usize];
        let (mut session, mut next_key) = (record.session, record.next_key);
        let gap_ms = self.lifetimes.age(session.life);
        match what {
            What::GoesOn(read) => {
                self.lifetimes.end_by_hit(session.life);
                match (session.tail_life(), read) {
                    (Some(life), Some(true)) => self.lifetimes.end_by_hit(life),
                    (Some(life), Some(false)) => self.lifetimes.end_never(life),
                    (Some(life), None) => self.lifetimes.close(life),
                    (None, _) => {}
                }
                session.tail = match read {
                    Some(true) => Tail::Read,
                    Some(false) => Tail::Lost,
                    None => session.tail,
                };
                session = session.after(gap_ms);
            }
            What::SeemsToGoOn => {
                self.lifetimes.end_by_hit(session.life);
                session.close_tail(&mut self.lifetimes);
                session = session.after(gap_ms);
            }
            What::New(found) => {
                self.lifetimes.close(session.life);
                if let Some(ghost) = found.and_then(|(key_hash, _)| self.ghosts.take(key_hash)) {
                    session = self.return_of(ghost);
                }
            }
            What::SameTurn => {
                self.lifetimes.close(session.life);
                session.close_tail(&mut self.lifetimes);
            }
        }
        session.life = self.lifetimes.start(session.class());
        session.tail_class = 0;
        if next_key.is_some() && self.end_depth(run) < record.own_from {
            // All that was its own found no room.
            self.leave(session, next_key.take());
            session.life = self.lifetimes.start(SHARED);
        } else if next_key.is_none() && self.chains.is_tail(self.chains.end_of(run)) && session.tail != Tail::Read {
            session.tail_class = if session.tail == Tail::Lost { TAIL_LOST } else { TAIL_UNKNOWN };
            self.lifetimes.open(Lifetime { class: session.tail_class, ..session.life });
        }
        let reach = if next_key.is_none() { self.end_depth(run) } else { record.reach };
        self.records[run as usize] = Record { session, next_key, reach, ..record };
        self.cells.unlink(run);
        self.link(run);
    }

    /// A block comes behind the end of the run that is pending.
    fn extend(&mut self, run: u32, key_hash: u64) {
        let Some(pending) = &mut self.pending else { return };
        let record = &mut self.records[run as usize];
        match &mut pending.what {
            // What found no room a moment ago, or left.
            What::SameTurn
                if record.next_key == Some(key_hash) && self.lifetimes.age(record.session.life) < WINDOW_MS =>
            {
                record.next_key = None;
            }
            What::SeemsToGoOn | What::SameTurn if record.next_key == Some(key_hash) => {
                record.next_key = None;
                pending.what = What::GoesOn(None);
            }
            What::SeemsToGoOn | What::SameTurn if record.next_key.is_some() => {
                // Somebody else begins as that session did.
                pending.what = What::New(self.ghosts.find(key_hash).map(|ghost| (key_hash, ghost)));
                let (left, left_key) = (record.session, record.next_key);
                let own_from = self.end_depth(run) + 1;
                let session = Session::new(self.lifetimes.start(0));
                self.records[run as usize] = Record { session, own_from, reach: own_from, next_key: None };
                self.leave(left, left_key);
            }
            What::GoesOn(read @ None) if record.next_key.is_some() => {
                let next = self.chains.depth_of(self.chains.end_of(run)) + 1;
                *read = (record.reach == next).then_some(record.next_key == Some(key_hash));
                record.next_key = None;
            }
            What::New(found @ None) if self.chains.len_of(run) < GHOST_LOOKS => {
                *found = self.ghosts.find(key_hash).map(|ghost| (key_hash, ghost));
            }
            _ => {}
        }
    }

    /// What the blocks of a request's session would be worth.
    fn own_worth(&self, incoming: &NewBlock) -> f32 {
        let after = |session: Session| session.after(self.lifetimes.age(session.life));
        let of_ghost = || self.ghosts.find(incoming.key_hash).map(after);
        if incoming.kind != EvictionKind::Attention {
            let uses = of_ghost().map_or(1, |session| session.turns);
            return cells::worth(&self.lifetimes, usize::from(classes::of_block(incoming.kind.ordinal(), uses)), 0);
        }
        let run = match incoming.origin {
            Origin::After(parent) => self.chains.run_of(parent.0),
            _ => None,
        };
        let session = match (run, self.pending.filter(|pending| Some(pending.run) == run).map(|pending| pending.what)) {
            (Some(run), Some(What::GoesOn(_) | What::SeemsToGoOn)) => Some(after(self.records[run as usize].session)),
            (_, Some(What::New(Some((_, ghost))))) => Some(after(ghost)),
            (None, _) | (_, Some(What::New(None))) => of_ghost(),
            (Some(run), _) => Some(self.records[run as usize].session),
        };
        cells::worth(&self.lifetimes, session.map_or(0, |session| usize::from(session.class())), 0)
    }

    /// A request's blocks find no room, from this one on: its session is remembered all the same.
    fn refuse(&mut self, incoming: &NewBlock, own: u32) {
        if let Some(guard) = &mut self.guard {
            guard.refuse(incoming.key_hash);
        }
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.run == own) {
            if let What::New(found @ None) = &mut pending.what {
                *found = self.ghosts.find(incoming.key_hash).map(|ghost| (incoming.key_hash, ghost));
            }
            self.records[own as usize].next_key = Some(incoming.key_hash);
            return;
        }
        let session = match self.ghosts.find(incoming.key_hash) {
            _ if incoming.origin != Origin::Root => return,
            Some(ghost) if ghost.life.began_tick == self.lifetimes.now_tick() => return,
            Some(ghost) => {
                self.ghosts.take(incoming.key_hash);
                self.return_of(ghost)
            }
            None => Session::new(Lifetime::default()),
        };
        let session = Session { life: self.lifetimes.start(session.class()), ..session };
        self.leave(session, Some(incoming.key_hash));
    }

    /// Tells the guard of the request that was under way, or of one that found no room at all.
    fn tell_guard(&mut self) {
        let Self { guard, chains, sampled, lifetimes, pending, .. } = self;
        let Some(guard) = guard else { return };
        let end = pending.map(|pending| chains.end_of(pending.run));
        let told = pending.map_or(0, |pending| pending.told);
        let blocks = end.into_iter().flat_map(|end| chains.sampled(end)).map(|sample| sampled.hashes[sample as usize]);
        let ends = end.is_some_and(|end| chains.is_tail(end));
        guard.request(blocks, told as usize, ends, lifetimes);
        lifetimes.set_stay(guard.stay_ms());
    }

    fn sample(&mut self, at: u32, key_hash: u64) {
        if self.guard.as_ref().is_some_and(|guard| guard.has(key_hash)) {
            let sample = self.sampled.add(key_hash);
            self.chains.set_sample(at, sample);
        }
    }

    fn goes_by_worth(&self) -> bool {
        self.guard.as_ref().is_none_or(|guard| guard.earns())
    }

    fn least(&mut self) -> Option<(u32, f32)> {
        let Self { chains, cells, lifetimes, capacity, .. } = self;
        cells.least(lifetimes, *capacity, |run| chains.may_shrink(run))
    }

    /// What a run's end is worth now.
    fn worth_of(&self, run: u32) -> f32 {
        let life = self.end_life(run);
        cells::worth(&self.lifetimes, usize::from(life.class), self.lifetimes.age(life))
    }

    /// What is brought ahead of need takes nothing that is hotter, by the learnt order or by what was read just now. That somebody asked for it is not yet a turn of its session.
    fn gives_to_wanted(&self, run: u32, incoming: &NewBlock, by_worth: bool) -> bool {
        let ghost = || self.ghosts.find(incoming.key_hash);
        let own = match incoming.origin {
            Origin::After(parent) => self.chains.run_of(parent.0).map(|own| match self.pending {
                Some(Pending { run, what: What::New(Some((_, ghost))), .. }) if run == own => ghost,
                _ => self.records[own as usize].session,
            }),
            _ => None,
        };
        let own = own.or_else(ghost).unwrap_or_else(|| Session::new(Lifetime::default()));
        let is_hot = self.chains.was_read(self.chains.end_of(run)) && self.lifetimes.age(self.end_life(run)) < HOT_MS;
        let own_worth = || cells::worth(&self.lifetimes, usize::from(own.class()), 0);
        !is_hot && (!by_worth || self.worth_of(run) <= own_worth())
    }

    /// A run that shrinks for what comes.
    fn who_gives(&mut self, incoming: Option<&NewBlock>, own: Option<u32>) -> Option<u32> {
        let own = own.unwrap_or(NONE);
        let by_worth = self.goes_by_worth();
        let Some(incoming) = incoming else {
            return if by_worth { self.least().map(|(run, _)| run) } else { self.chains.oldest(NONE) };
        };
        // What a request brings never displaces what it brought before.
        let run = match by_worth {
            true => self.least().map(|(run, _)| run).filter(|run| *run != own),
            false => self.chains.oldest(own),
        };
        let fits = |run: &u32| match incoming.claim {
            Claim::Stored => !by_worth || self.worth_of(*run) < self.own_worth(incoming),
            Claim::Wanted => self.gives_to_wanted(*run, incoming, by_worth),
            Claim::Insists => true,
        };
        let insists = incoming.claim == Claim::Insists;
        run.filter(fits).or_else(|| if insists { self.chains.oldest(own) } else { None })
    }

    /// A block that stands for itself becomes a run of its own.
    fn insert_alone(&mut self, at: u32, new: &NewBlock) {
        let uses = match self.ghosts.take(new.key_hash) {
            Some(ghost) => self.return_of(ghost).turns,
            None => 1,
        };
        let run = self.chains.insert(at, new, None, 0);
        let life = self.lifetimes.start(classes::of_block(new.kind.ordinal(), uses));
        let session = Session { turns: uses, ..Session::new(life) };
        self.set_record(run, Record { session, ..Record::default() });
        self.chains.use_now(run);
        self.link(run);
    }

    /// A block that stands for itself was used.
    fn touch_alone(&mut self, run: u32, touch: Touch) {
        let mut session = self.records[run as usize].session;
        if touch != Touch::Refresh {
            self.lifetimes.end_by_hit(session.life);
            session.turns = session.turns.saturating_add(1);
        } else {
            self.lifetimes.close(session.life);
        }
        let kind = self.chains.kind_of(self.chains.end_of(run));
        session.life = self.lifetimes.start(classes::of_block(kind, session.turns));
        self.records[run as usize].session = session;
        self.cells.unlink(run);
        self.chains.use_now(run);
        self.link(run);
    }

    /// A chain begins with a block that nothing in the pool precedes.
    fn insert_first(&mut self, at: u32, new: &NewBlock) {
        self.settle();
        let run = self.chains.insert(at, new, None, 0);
        let session = Session::new(self.lifetimes.start(0));
        self.set_record(run, Record { session, ..Record::default() });
        self.chains.use_now(run);
        let found = self.ghosts.find(new.key_hash).map(|ghost| (new.key_hash, ghost));
        self.pending = Some(Pending { run, what: What::New(found), told: 0 });
        self.sample(at, new.key_hash);
        if new.origin != Origin::Root {
            self.orphan(run);
        }
    }

    /// A run without a beginning goes first.
    fn orphan(&mut self, run: u32) {
        if self.is_pending(run) {
            self.settle();
        }
        let session = self.records[run as usize].session;
        if session.life.class != ORPHAN {
            session.forget(&mut self.lifetimes);
            let life = Lifetime { class: ORPHAN, ..session.life };
            self.records[run as usize].session = Session { life, tail_class: 0, ..session };
            self.cells.unlink(run);
            self.chains.put_last(run);
            self.link(run);
        }
    }

    /// A run has its beginning again: what it will do is not known.
    fn heal(&mut self, run: u32) {
        if self.is_pending(run) {
            self.settle();
        }
        if self.records[run as usize].session.life.class == ORPHAN && !self.chains.has_no_beginning(run) {
            self.records[run as usize].session = Session::new(self.lifetimes.start(0));
        }
        self.cells.unlink(run);
        self.chains.list(run);
        self.link(run);
    }

    /// Marks the runs whose beginning was dropped.
    fn find_orphans(&mut self) {
        for run in self.chains.run_places() {
            if self.chains.has_no_beginning(run) {
                self.orphan(run);
            }
        }
    }

    /// A run's last block, which was so deep, was evicted.
    fn shrink(&mut self, run: u32, depth: u32, key_hash: u64) {
        let record = &mut self.records[run as usize];
        let mut session = record.session;
        if depth <= record.own_from && session.life.class < LEFT_BEHIND {
            // All that was its own is gone; what it had in common with others is left.
            let life = Lifetime { class: SHARED, ..session.life };
            record.session = Session { life, tail_class: 0, ..session };
            record.next_key = None;
            self.lifetimes.open(life);
            self.leave(session, Some(key_hash));
        } else if record.next_key.replace(key_hash).is_some() && self.cells.has(run) && self.chains.may_shrink(run) {
            // It is where it was. In a batch it may have been taken out while its end was held.
            return;
        } else {
            session.close_tail(&mut self.lifetimes);
        }
        self.cells.unlink(run);
        self.link(run);
    }
}

impl EvictionPolicy for Sessions {
    fn at(&mut self, now_ms: u64) {
        if self.lifetimes.advance(now_ms) {
            self.cells.merge(&mut self.lifetimes);
        }
        if let Some(guard) = &mut self.guard
            && self.lifetimes.relearn_if_due()
        {
            self.cells.spoil();
            guard.relearnt(&self.lifetimes);
        }
    }

    fn insert(&mut self, block: BlockIndex, new: NewBlock) {
        let at = block.0;
        if !new.kind.needs_prefix() {
            return self.insert_alone(at, &new);
        }
        match new.origin {
            Origin::After(parent) if self.chains.is_there(parent.0) => {
                self.begin(parent.0, false);
                if let Some(Pending { run, .. }) = self.pending {
                    self.extend(run, new.key_hash);
                    self.chains.insert(at, &new, Some(run), 0);
                    self.sample(at, new.key_hash);
                }
            }
            _ => self.insert_first(at, &new),
        }
    }

    fn insert_at(&mut self, block: BlockIndex, new: NewBlock, place: Place<'_>) {
        if place.missing == 0 || !new.kind.needs_prefix() {
            self.insert(block, new);
        } else {
            self.insert_ahead(block.0, &new, place.missing);
        }
        place.followers.iter().for_each(|follower| self.follow(block.0, follower.0));
    }

    fn touch(&mut self, block: BlockIndex, touch: Touch) {
        let mut at = block.0;
        let Some(run) = self.chains.run_of(at) else { return };
        if touch != Touch::Refresh {
            self.chains.set_read(at);
        }
        if self.chains.needs_prefix(at) {
            let after = touch.after();
            if let Some(run) = after.and_then(|after| self.chains.adopt(at, after.0)) {
                self.heal(run);
            }
            if after.is_none_or(|after| self.chains.parent_of(after.0) != Some(at)) {
                self.begin_or_read_on(at, touch);
            }
            return;
        }
        self.touch_alone(run, touch);
        let ancestors = if touch == Touch::Refresh { ANCESTORS_MAX } else { 0 };
        for _ in 0..ancestors {
            let Some(parent) = self.chains.parent_of(at) else { break };
            let Some(run) = self.chains.run_of(parent) else { break };
            self.touch_alone(run, touch);
            at = parent;
        }
    }

    fn remove(&mut self, block: BlockIndex, removal: Removal) {
        let at = block.0;
        if !self.chains.is_there(at) {
            return;
        }
        let depth = self.chains.depth_of(at);
        let Some(left) = self.chains.remove(at) else { return };
        if let Some(sample) = left.sample {
            self.sampled.free.push(sample);
        }
        let key_hash = match removal {
            Removal::Evicted { key_hash } => {
                self.cells.count_eviction();
                Some(key_hash)
            }
            Removal::Dropped => None,
        };
        if let Some(orphan) = left.orphan.filter(|orphan| *orphan != left.run) {
            let session = Session { tail_class: 0, ..self.records[left.run as usize].session };
            self.lifetimes.open(session.life);
            self.set_record(orphan, Record { session, ..Record::default() });
        }
        if left.run_is_gone {
            self.pending.take_if(|pending| pending.run == left.run);
            self.cells.unlink(left.run);
            let Record { session, own_from, next_key, .. } = self.records[left.run as usize];
            let key_hash = if depth < own_from { next_key } else { key_hash };
            self.leave(session, key_hash);
            self.chains.free_run(left.run);
        } else if let Some(key_hash) = key_hash.filter(|_| left.orphan.is_none()) {
            self.shrink(left.run, depth, key_hash);
        } else {
            self.cells.unlink(left.run);
            self.link(left.run);
        }
        left.orphan.into_iter().for_each(|run| self.orphan(run));
        left.parents_run.into_iter().for_each(|run| self.link(run));
    }

    fn hold(&mut self, block: BlockIndex, held: bool) {
        let Some(run) = self.chains.hold(block.0, held) else { return };
        if !held {
            self.link(run);
        }
    }

    fn victim(&mut self, incoming: Option<&NewBlock>) -> Option<BlockIndex> {
        if let Some(incoming) = incoming {
            self.ghosts.prefetch(incoming.key_hash);
        }
        if self.chains.take_lost_beginnings() {
            self.find_orphans();
        }
        let own = self.chains.own_run(incoming);
        let is_under_way = matches!(own, Ok(Some(own)) if self.is_pending(own));
        if own.is_ok() && !is_under_way {
            self.settle();
        }
        let run = own.ok().and_then(|own| self.who_gives(incoming, own))?;
        Some(BlockIndex(self.chains.end_of(run)))
    }

    fn refused(&mut self, incoming: &NewBlock) {
        let own = self.chains.own_run(Some(incoming)).ok().flatten();
        self.refuse(incoming, own.unwrap_or(NONE));
    }

    fn before_victim(&self, block: BlockIndex) -> Option<BlockIndex> {
        self.chains.before_victim(block)
    }

    fn parent(&self, block: BlockIndex) -> Option<BlockIndex> {
        self.chains.parent(block)
    }

    fn set_capacity(&mut self, blocks: usize) {
        if self.capacity == blocks && !self.records.is_empty() {
            return;
        }
        self.capacity = blocks;
        let Self { ghosts, lifetimes, guard, .. } = self;
        ghosts.resize(blocks * self.one_in as usize / BLOCKS_PER_GHOST, |session| session.forget(lifetimes));
        if let Some(guard) = guard {
            guard.set_capacity(blocks);
        }
    }
}
