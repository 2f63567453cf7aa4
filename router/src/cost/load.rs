//! What each worker is doing for this router: exactly, from what it was given and what it answered.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Names a request of this router.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// One worker's load.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct WorkerLoad {
    /// Tokens that are yet to be computed, of requests without a first token.
    pub prefill_tokens: u64,
    /// Requests without a first token.
    pub prefilling: u64,
    /// Requests with one, that go on.
    pub decoding: u64,
    /// Tokens in its memory for requests under way: prompts and answers.
    pub held_tokens: u64,
}

impl WorkerLoad {
    /// Requests under way.
    pub fn requests(&self) -> u64 {
        self.prefilling + self.decoding
    }
}

struct Active<W> {
    worker: W,
    computes: u64,
    /// Computed ahead of it, when it was sent.
    ahead: u64,
    decoding: u64,
    held: u64,
    sent: Duration,
    first: Option<Duration>,
    expires: Duration,
}

/// What is known of a request that has its first token, or ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended<W> {
    /// Whose it was.
    pub worker: W,
    /// Tokens that were computed for it and ahead of it.
    pub work: u64,
    /// Others that were decoded when it was sent.
    pub decoding: u64,
    /// From sending it until now.
    pub took: Duration,
}

/// See the head of this file. Requests of which nothing is heard end by themselves at their time.
pub struct Load<W> {
    workers: HashMap<W, WorkerLoad>,
    active: HashMap<RequestId, Active<W>>,
    expiries: BTreeSet<(Duration, RequestId)>,
    next: u64,
}

impl<W> Default for Load<W> {
    fn default() -> Self {
        Self { workers: HashMap::new(), active: HashMap::new(), expiries: BTreeSet::new(), next: 0 }
    }
}

impl<W: Copy + Eq + Hash> Load<W> {
    /// A worker's load.
    pub fn of(&self, worker: W) -> WorkerLoad {
        self.workers.get(&worker).copied().unwrap_or_default()
    }

    /// Requests under way, of all workers.
    pub fn requests(&self) -> usize {
        self.active.len()
    }

    /// A request goes to `worker`, which computes `computes` tokens of its prompt of `prompt`. It is forgotten at `expires`, if nothing
    /// is heard of it until then.
    pub fn add(&mut self, worker: W, prompt: u64, computes: u64, now: Duration, expires: Duration) -> RequestId {
        self.next += 1;
        let id = RequestId(self.next);
        let load = self.workers.entry(worker).or_default();
        let (ahead, decoding) = (load.prefill_tokens, load.decoding);
        load.prefill_tokens += computes;
        load.prefilling += 1;
        load.held_tokens += prompt;
        self.expiries.insert((expires, id));
        let active = Active { worker, computes, ahead, decoding, held: prompt, sent: now, first: None, expires };
        self.active.insert(id, active);
        id
    }

    /// The first token came. `None` where it had come before, or the request is not known any more.
    pub fn first_token(&mut self, id: RequestId, now: Duration) -> Option<Ended<W>> {
        let active = self.active.get_mut(&id).filter(|active| active.first.is_none())?;
        active.first = Some(now);
        let load = self.workers.entry(active.worker).or_default();
        load.prefill_tokens -= active.computes;
        load.prefilling -= 1;
        load.decoding += 1;
        Some(Ended {
            worker: active.worker,
            work: active.ahead + active.computes,
            decoding: active.decoding,
            took: now.saturating_sub(active.sent),
        })
    }

    /// Tokens of the answer came.
    pub fn tokens(&mut self, id: RequestId, tokens: u64, expires: Duration) {
        if let Some(active) = self.active.get_mut(&id) {
            active.held += tokens;
            self.workers.entry(active.worker).or_default().held_tokens += tokens;
            self.expiries.remove(&(active.expires, id));
            active.expires = expires;
            self.expiries.insert((expires, id));
        }
    }

    /// The request is over, however it ended. Its worker, where it was known.
    pub fn free(&mut self, id: RequestId) -> Option<W> {
        let active = self.active.remove(&id)?;
        self.expiries.remove(&(active.expires, id));
        if let Some(load) = self.workers.get_mut(&active.worker) {
            match active.first {
                Some(_) => load.decoding -= 1,
                None => {
                    load.prefilling -= 1;
                    load.prefill_tokens -= active.computes;
                }
            }
            load.held_tokens -= active.held;
            if load.requests() == 0 {
                self.workers.remove(&active.worker);
            }
        }
        Some(active.worker)
    }

    /// Forgets requests whose time is over; how many those were.
    pub fn expire(&mut self, now: Duration) -> usize {
        let mut expired = 0;
        while let Some((at, id)) = self.expiries.first().copied().filter(|(at, _)| *at <= now) {
            self.expiries.remove(&(at, id));
            self.free(id);
            expired += 1;
        }
        expired
    }

    /// The worker is gone: so is what it had. How many requests those were.
    pub fn remove_worker(&mut self, worker: W) -> usize {
        let ids: Vec<RequestId> =
            self.active.iter().filter(|(_, active)| active.worker == worker).map(|(id, _)| *id).collect();
        ids.iter().for_each(|id| _ = self.free(*id));
        ids.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn each_request_leaves_what_it_brought() {
        let mut load = Load::default();
        let first = load.add('a', 1000, 400, at(0), at(100_000));
        let second = load.add('a', 2000, 2000, at(10), at(100_000));
        assert_eq!(load.of('a'), WorkerLoad { prefill_tokens: 2400, prefilling: 2, decoding: 0, held_tokens: 3000 });
        assert_eq!(load.first_token(first, at(50)), Some(Ended { worker: 'a', work: 400, decoding: 0, took: at(50) }));
        assert_eq!(load.first_token(first, at(60)), None);
        load.tokens(first, 7, at(100_000));
        assert_eq!(load.of('a'), WorkerLoad { prefill_tokens: 2000, prefilling: 1, decoding: 1, held_tokens: 3007 });
        assert_eq!(
            load.first_token(second, at(90)),
            Some(Ended { worker: 'a', work: 2400, decoding: 0, took: at(80) })
        );
        assert_eq!((load.free(first), load.free(first), load.free(second)), (Some('a'), None, Some('a')));
        assert_eq!((load.of('a'), load.requests()), (WorkerLoad::default(), 0));
    }

    #[test]
    fn what_nothing_is_heard_of_ends() {
        let mut load = Load::default();
        let silent = load.add('a', 10, 10, at(0), at(100));
        let lively = load.add('a', 10, 10, at(0), at(100));
        load.tokens(lively, 1, at(300));
        assert_eq!((load.expire(at(99)), load.expire(at(100)), load.expire(at(299))), (0, 1, 0));
        assert_eq!((load.first_token(silent, at(200)), load.of('a').requests()), (None, 1));
        load.add('b', 10, 10, at(0), at(100_000));
        assert_eq!((load.remove_worker('a'), load.remove_worker('a'), load.requests()), (1, 0, 1));
        assert_eq!(load.expire(at(400)), 0);
    }

    /// Against sums made anew, over many random steps: nothing is left behind, nothing goes below zero.
    #[test]
    fn the_sums_are_those_of_what_is_active() {
        let mut load = Load::default();
        let mut ids: Vec<(RequestId, u64, u64, bool)> = Vec::new();
        let mut random = 7u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        for step in 0..20_000u64 {
            let pick = next(ids.len().max(1) as u64) as usize;
            match next(4) {
                0 => {
                    let (prompt, computes) = (100 + next(1000), next(100));
                    let id = load.add(step % 3, prompt, computes, at(step), at(1_000_000));
                    ids.push((id, prompt, computes, false));
                }
                1 if !ids.is_empty() => {
                    let (id, _, _, first) = &mut ids[pick];
                    assert_eq!(load.first_token(*id, at(step)).is_some(), !*first);
                    *first = true;
                }
                2 if !ids.is_empty() => {
                    load.tokens(ids[pick].0, 3, at(1_000_000));
                    ids[pick].1 += 3;
                }
                _ if !ids.is_empty() => assert!(load.free(ids.swap_remove(pick).0).is_some()),
                _ => {}
            }
            let sum = |of: &dyn Fn(&WorkerLoad) -> u64| (0..3).map(|worker| of(&load.of(worker))).sum::<u64>();
            assert_eq!(sum(&|load| load.held_tokens), ids.iter().map(|(_, held, _, _)| held).sum::<u64>());
            let computes = ids.iter().filter(|(_, _, _, first)| !first).map(|(_, _, computes, _)| computes);
            assert_eq!(sum(&|load| load.prefill_tokens), computes.sum::<u64>());
            assert_eq!(sum(&|load| load.requests()), ids.len() as u64);
        }
    }
}
