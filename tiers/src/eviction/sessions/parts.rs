//! Parts: what belongs to one request, and comes by itself. A prompt is read in windows; a block is published before the one before it.

#![expect(clippy::indexing_slicing, reason = "records are grown with the runs that they are of")]

use super::super::classes::{LEFT_BEHIND, ORPHAN};
use super::super::session::{Session, Tail};
use super::super::{BlockIndex, NewBlock, Origin, Touch};
use super::{Pending, Record, Sessions, What};

impl Sessions {
    /// A request read, or found stored, the chain up to `at`, or the next part of it.
    pub(super) fn begin_or_read_on(&mut self, at: u32, touch: Touch) {
        let (read, now_ms) = (touch != Touch::Refresh, self.lifetimes.now_ms());
        let before = match touch {
            Touch::HitFrom { first, .. } => self.chains.parent_of(first.0),
            Touch::Refresh => self.chains.run_of(at).and_then(|run| self.chains.before_run(run)),
            Touch::Hit | Touch::HitBefore(_) => return self.begin(at, true),
        };
        match before.filter(|before| self.windows.take(BlockIndex(*before), now_ms)) {
            Some(before) => self.read_on(at, before, read),
            None => self.begin(at, read),
        }
        self.windows.note(BlockIndex(at), now_ms);
    }

    /// A request that got to `before` a moment ago goes on behind it, up to `at`.
    fn read_on(&mut self, at: u32, before: u32, read: bool) {
        let (Some(part), Some(run)) = (self.chains.run_of(before), self.chains.run_of(at)) else { return };
        if part == run {
            return self.resume(run, before);
        }
        let record = self.records[run as usize];
        let below = self.end_depth(run) - self.chains.depth_of(at);
        // Nothing is its own but what it read so far: as it seemed, a new session that begins as another did.
        let is_new = self.end_depth(part) < self.records[part as usize].own_from;
        let takes = if is_new {
            !Self::goes_on(&self.chains, &record, at, below).0
        } else {
            record.session.life.class == LEFT_BEHIND
        };
        if takes && self.chains.end_of(part) == before && self.chains.before_run(run) == Some(before) {
            self.resume(part, before);
            return self.take_along(part, run, at, is_new);
        }
        let told = match self.pending.take_if(|pending| pending.run == part) {
            Some(Pending { told, .. }) => told,
            None => {
                self.settle();
                self.sampled_up_to(before)
            }
        };
        self.reach(at, read, told, Some(part).filter(|_| is_new));
        // Where it has too many blocks to be taken along.
        if self.chains.run_of(before) == Some(part) {
            self.link(part);
        }
    }

    /// The request whose run it is was under way a moment ago, up to `before`, and goes on.
    fn resume(&mut self, run: u32, before: u32) {
        if self.is_pending(run) {
            return;
        }
        self.settle();
        let told = self.sampled_up_to(before);
        self.pending = Some(Pending { run, what: What::SameTurn, told });
        self.cells.unlink(run);
        self.chains.use_now(run);
    }

    /// A session that is under way takes the blocks of `from` up to `at`, which it seemed to leave behind, or which another has.
    fn take_along(&mut self, run: u32, from: u32, at: u32, is_new: bool) {
        let is_whole = self.chains.append(at, run);
        if is_new {
            let own_from = self.chains.depth_of(at) + 1;
            let record = &mut self.records[run as usize];
            (record.own_from, record.reach) = (own_from, own_from);
            if is_whole {
                self.end_run(from);
            }
        } else if is_whole {
            // It did without nothing.
            let next_key = self.records[from as usize].next_key;
            let record = &mut self.records[run as usize];
            record.next_key = record.next_key.or(next_key);
            match self.pending.as_mut().map(|pending| &mut pending.what) {
                Some(What::GoesOn(read)) => *read = if next_key.is_none() { Some(true) } else { None },
                Some(What::SameTurn) if record.session.tail == Tail::Lost => record.session.tail = Tail::Read,
                _ => {}
            }
            self.close_run(from);
        }
        self.chains.use_now(run);
    }

    /// A block comes so many blocks ahead of what is there of its chain: until those come, it and what follows it are a run that nobody
    /// reads.
    pub(super) fn insert_ahead(&mut self, at: u32, new: &NewBlock, missing: u32) {
        let run = self.chains.insert(at, new, None, missing);
        let session = Session::new(self.lifetimes.start(0));
        self.set_record(run, Record { session, ..Record::default() });
        self.chains.use_now(run);
        self.sample(at, new.key_hash);
        if new.origin == Origin::Absent {
            self.orphan(run);
        }
        self.link(run);
    }

    /// `follower` came ahead of `at`, which is before it: what came ahead is part of the request that brings this.
    pub(super) fn follow(&mut self, at: u32, follower: u32) {
        let (Some(run), Some(own)) = (self.chains.link(at, follower), self.chains.run_of(at)) else { return };
        if self.chains.is_ahead(at) {
            self.chains.prepend(at, run);
            self.drop_absorbed(Some(own));
            return self.link(run);
        }
        if self.is_pending(own) && self.chains.end_of(own) == at {
            let Record { next_key, reach, .. } = self.records[run as usize];
            self.chains.append(self.chains.end_of(run), own);
            let record = &mut self.records[own as usize];
            (record.next_key, record.reach) = (next_key, record.reach.max(reach));
            self.close_run(run);
            self.chains.use_now(own);
        } else {
            self.link(run);
        }
    }

    /// A run never was one: nothing is learnt from it.
    pub(super) fn close_run(&mut self, run: u32) {
        let mut session = self.records[run as usize].session;
        self.cells.unlink(run);
        self.chains.free_run(run);
        if session.life.class != ORPHAN {
            self.lifetimes.close(session.life);
        }
        session.close_tail(&mut self.lifetimes);
    }
}
