//! Placing requests: which worker gets one, what it is doing meanwhile, and what its answer teaches.
//!
//! Replicas of the router do not talk. Each knows what all caches hold from the same events, and learns each worker's speed from its own
//! requests, in which those of the other replicas show as slowness; with [`Router::set_others`] it also counts what they have under way.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use kvstore_chat::conversation::Beginning;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::caps;
use crate::cost::{
    Cached, Choice, Choose, Load, Overload, RequestId, Speed, TIERS, Terms, TierRate, Why, WorkerLoad, choose,
};
use crate::fleet::{Fleet, Role, Worker};
use crate::hashing::Chain;

/// What placing goes by; may change while it runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlaceOptions {
    /// How to choose.
    pub choose: Choose,
    /// How long a request waits for a worker that may take it, where all are full.
    pub queue_time: Duration,
    /// Requests that wait at once.
    pub queue_max: usize,
    /// A request of which nothing is heard for so long is no load any more.
    pub silence: Duration,
    /// Where there are workers for prompts alone: prompts with fewer tokens to compute go to the worker that answers, whole.
    pub split_tokens_min: u64,
}

impl Default for PlaceOptions {
    fn default() -> Self {
        Self {
            choose: Choose::default(),
            queue_time: Duration::from_secs(10),
            queue_max: 1024,
            silence: Duration::from_secs(600),
            split_tokens_min: 1024,
        }
    }
}

/// What is to be placed.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// The model, as workers name it; empty for any.
    pub model: String,
    /// Tokens of the prompt; a guess where they are not known.
    pub tokens: u64,
    /// How far its tokens are known.
    pub known: Known,
    /// Its blocks, as far as its tokens are known.
    pub chain: Chain,
    /// Why they are not, where they are not.
    pub not_known: Option<Arc<str>>,
    /// The beginnings of its conversation, the shortest first.
    pub messages: Arc<[Beginning]>,
    /// Names a session: a conversation, a user.
    pub session: Option<u64>,
    /// The answer that it goes on with, which one worker keeps.
    pub after: Option<u64>,
    /// Which workers may have it.
    pub role: Role,
}

/// How far the tokens of a prompt are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Known {
    /// To the last one, or as far as any cache may have them.
    Tokens,
    /// Those of the conversation's beginning, of which an engine told them.
    Beginning,
    /// Not at all.
    #[default]
    Nothing,
}

/// By what a request was placed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    /// Its tokens, which the router knows.
    Tokens,
    /// The tokens of its beginning, which an engine told.
    Beginning,
    /// The chain of messages: who had the conversation before.
    Messages,
    /// The load of workers alone.
    Load,
}

impl By {
    /// All, in the order of [`PlaceCounts::by`].
    pub const ALL: [Self; 4] = [Self::Tokens, Self::Beginning, Self::Messages, Self::Load];

    /// For people and for metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Beginning => "beginning",
            Self::Messages => "messages",
            Self::Load => "load",
        }
    }
}

/// Why a request was not placed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refused {
    /// Nobody serves the model.
    #[error("the model {model:?} is not served here; the router serves {known}")]
    UnknownModel {
        /// As asked for.
        model: String,
        /// What is.
        known: String,
    },
    /// Those who do are away.
    #[error("no worker {}answers; try again in a moment", for_model(.0))]
    AllAway(String),
    /// Those who do are full, and so is the queue, or it took too long.
    #[error("{0}")]
    Overload(#[from] Overload),
}

fn for_model(model: &str) -> String {
    if model.is_empty() { String::new() } else { format!("for the model {model:?} ") }
}

/// One candidate.
#[derive(Clone)]
pub struct Candidate {
    /// Who.
    pub worker: Arc<Worker>,
    /// What the request would cost there.
    pub terms: Terms,
    /// What it does now.
    pub load: WorkerLoad,
    /// It was chosen.
    pub chosen: bool,
    /// Messages of the conversation, from the first on, that it had before, where that is what is known.
    pub messages: usize,
}

/// A request at a worker. Dropped, it is over.
pub struct Placed {
    /// Who has it.
    pub worker: Arc<Worker>,
    /// What it is expected to cost.
    pub terms: Terms,
    router: Arc<Router>,
    id: RequestId,
    last_token: Option<Instant>,
    /// Tokens since then that are not counted yet.
    uncounted: u64,
    /// When it was last said that something is heard of it.
    heard: Option<Instant>,
}

/// See the head of this file. Shared by `Arc`.
pub struct Router {
    /// Workers and nodes.
    pub fleet: Arc<Fleet>,
    options: ArcSwap<PlaceOptions>,
    load: Mutex<Load<usize>>,
    speeds: Mutex<HashMap<usize, Speed>>,
    sessions: Mutex<Sessions>,
    answers: Mutex<Sessions>,
    others: ArcSwap<HashMap<String, WorkerLoad>>,
    waiting: AtomicUsize,
    freed: Notify,
    started: Instant,
    seed: u64,
    turns: [AtomicU64; 4],
    /// What happened.
    pub counts: PlaceCounts,
}

/// Counts since the start.
#[derive(Default, Debug)]
pub struct PlaceCounts {
    /// Placed.
    pub placed: AtomicU64,
    /// Where the session was before, though another was expected to be faster.
    pub by_affinity: AtomicU64,
    /// Refused because all were full.
    pub shed: AtomicU64,
    /// Tokens of prompts, and of those what workers had, or could fetch.
    pub tokens: AtomicU64,
    /// ...
    pub cached_tokens: AtomicU64,
    /// Requests that nothing was heard of.
    pub expired: AtomicU64,
    /// By what requests were placed, in the order of [`By::ALL`].
    pub by: [AtomicU64; 4],
}

/// Where sessions were last, or answers are kept; the oldest are forgotten.
#[derive(Default)]
struct Sessions {
    at: HashMap<u64, (usize, u64)>,
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

impl Sessions {
    fn get(&self, session: u64) -> Option<usize> {
        self.at.get(&session).map(|(worker, _)| *worker)
    }

    fn set(&mut self, session: u64, worker: usize) {
        self.clock += 1;
        self.at.insert(session, (worker, self.clock));
        self.order.push_back((session, self.clock));
        while self.at.len() > caps::SESSIONS_MAX || self.order.len() > 2 * caps::SESSIONS_MAX {
            let Some((oldest, clock)) = self.order.pop_front() else { break };
            if self.at.get(&oldest).is_some_and(|(_, used)| *used == clock) {
                self.at.remove(&oldest);
            }
        }
    }
}

impl Router {
    /// Of this fleet.
    pub fn new(fleet: Arc<Fleet>, options: PlaceOptions) -> Arc<Self> {
        Arc::new(Self {
            fleet,
            options: ArcSwap::from_pointee(options),
            load: Mutex::default(),
            speeds: Mutex::default(),
            sessions: Mutex::default(),
            answers: Mutex::default(),
            others: ArcSwap::default(),
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
            started: Instant::now(),
            // Not the process's number: in containers, all replicas have the same.
            seed: RandomState::new().build_hasher().finish(),
            turns: Default::default(),
            counts: PlaceCounts::default(),
        })
    }

    /// What it goes by.
    pub fn options(&self) -> PlaceOptions {
        **self.options.load()
    }

    /// Changes that.
    pub fn set_options(&self, options: PlaceOptions) {
        self.options.store(Arc::new(options));
        self.freed.notify_waiters();
    }

    /// What other replicas of the router have under way, by worker.
    pub fn set_others(&self, others: HashMap<String, WorkerLoad>) {
        self.others.store(Arc::new(others));
    }

    /// What this one has under way, by worker.
    pub fn loads(&self) -> HashMap<String, WorkerLoad> {
        let load = self.load.lock();
        self.fleet.workers().iter().map(|worker| (worker.spec.id.clone(), load.of(worker.number))).collect()
    }

    /// What was learnt of a worker.
    pub fn speed_of(&self, worker: &Worker) -> Speed {
        self.speeds.lock().get(&worker.number).copied().unwrap_or_default()
    }

    /// A worker keeps an answer of this name, for requests that go on with it.
    pub fn keeps_answer(&self, name: u64, worker: &Worker) {
        self.answers.lock().set(name, worker.number);
    }

    /// Whether a worker keeps an answer of this name, as far as is known.
    pub fn is_kept(&self, name: u64) -> bool {
        self.answers.lock().get(name).is_some()
    }

    /// Requests at workers.
    pub fn under_way(&self) -> usize {
        self.load.lock().requests()
    }

    /// Requests that wait for a worker.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// A number from 0 to 1 for each turn; replicas have others. Each turn goes on by the golden ratio: any few turns in a row, or every
    /// second of them, lie evenly, so that equals do take turns. Independent numbers would give six new conversations in a row to one of
    /// two idle workers in 3% of cases.
    fn chance(&self, turn: u64) -> f64 {
        const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
        (self.seed.wrapping_add(turn.wrapping_mul(GOLDEN)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Workers that may have a request, and what it would cost at each.
    pub fn candidates(&self, asked: &Asked, but: &[usize]) -> Result<Vec<Candidate>, Refused> {
        let of_model = self.fleet.serving(&asked.model);
        if of_model.is_empty() {
            let known = match self.fleet.models() {
                none if none.is_empty() => "no models, because it has no workers".into(),
                known => known.join(", "),
            };
            return Err(Refused::UnknownModel { model: asked.model.clone(), known });
        }
        // Some workers are known for their blocks alone.
        let may = |worker: &Arc<Worker>| {
            worker.is_up()
                && !worker.spec.url.is_empty()
                && !but.contains(&worker.number)
                && worker.spec.role == asked.role
        };
        let mut workers: Vec<Arc<Worker>> = of_model.into_iter().filter(may).collect();
        // Nobody else can go on with an answer that one keeps. Where that one is away, another says that it has no such answer.
        let keeps = asked.after.and_then(|name| self.answers.lock().get(name));
        if workers.iter().any(|worker| Some(worker.number) == keeps) {
            workers.retain(|worker| Some(worker.number) == keeps);
        }
        let mut cached = self.fleet.locate(&asked.chain, &workers);
        let messages = self.add_conversations(asked, &workers, &mut cached);
        let found = cached.into_iter().zip(messages).collect();
        let found = one_for_each_engine(&asked.model, workers, found);
        let (load, speeds, others) = (self.load.lock(), self.speeds.lock(), self.others.load());
        // A worker of which nothing is known is thought to be as fast as those of which something is.
        let usual = usual_of(&speeds);
        let candidate = |(worker, (cached, messages)): (Arc<Worker>, (Cached, usize))| {
            let mut busy = load.of(worker.number);
            if let Some(more) = others.get(&worker.spec.id) {
                busy.prefill_tokens += more.prefill_tokens;
                busy.prefilling += more.prefilling;
                busy.decoding += more.decoding;
                busy.held_tokens += more.held_tokens;
            }
            let speed = speeds.get(&worker.number).copied().unwrap_or(usual);
            let rates = worker.node.as_ref().map_or([TierRate::default(); TIERS.len()], |node| node.status().rates);
            let terms = Terms::of(asked.tokens, cached, &busy, &speed, &rates);
            Candidate { worker, terms, load: busy, chosen: false, messages }
        };
        Ok(found.into_iter().map(candidate).collect())
    }

    /// Of workers of which no events tell what they have of the prompt: what they had of the conversation counts. How many messages that
    /// is for each.
    fn add_conversations(&self, asked: &Asked, workers: &[Arc<Worker>], cached: &mut [Cached]) -> Vec<usize> {
        let mut messages = vec![0; workers.len()];
        let is_told = |worker: &Worker| !asked.chain.names.is_empty() && worker.tells_of_blocks();
        if asked.messages.is_empty() || workers.iter().all(|worker| is_told(worker)) {
            return messages;
        }
        let names: Vec<u64> = asked.messages.iter().map(|beginning| beginning.name).collect();
        let numbers: Vec<usize> = workers.iter().map(|worker| worker.number).collect();
        let had = self.fleet.conversations().find(&names, &numbers);
        for (((worker, cached), messages), had) in workers.iter().zip(cached).zip(&mut messages).zip(had) {
            let beginning = had.checked_sub(1).and_then(|at| asked.messages.get(at)).filter(|_| !is_told(worker));
            if let (Some(beginning), Some(whole)) = (beginning, asked.messages.last()) {
                // As many tokens of the prompt's as it has bytes of the conversation's.
                let part = u128::from(asked.tokens) * u128::from(beginning.bytes) / u128::from(whole.bytes.max(1));
                cached.engine_tokens = cached.engine_tokens.max(part as u64);
                *messages = had;
            }
        }
        messages
    }

    /// Chooses among candidates as the next request will be placed, without placing anything.
    pub fn choose(&self, asked: &Asked, candidates: &mut [Candidate]) -> Result<Choice, Refused> {
        self.choose_at(asked, candidates, self.turn_of(asked.role).load(Ordering::Relaxed))
    }

    /// Whose turn it is among equals, for each role.
    fn turn_of(&self, role: Role) -> &AtomicU64 {
        let [both, prefill, decode, encode] = &self.turns;
        match role {
            Role::Both => both,
            Role::Prefill => prefill,
            Role::Decode => decode,
            Role::Encode => encode,
        }
    }

    fn choose_at(&self, asked: &Asked, candidates: &mut [Candidate], turn: u64) -> Result<Choice, Refused> {
        let session = asked.session.and_then(|session| self.sessions.lock().get(session));
        let rows: Vec<(Terms, u64, bool)> = candidates
            .iter()
            .map(|candidate| (candidate.terms, candidate.load.requests(), session == Some(candidate.worker.number)))
            .collect();
        match choose(&self.options().choose, &rows, self.chance(turn)) {
            None => Err(Refused::AllAway(asked.model.clone())),
            Some(Err(overload)) => Err(overload.into()),
            Some(Ok(choice)) => {
                if let Some(candidate) = candidates.get_mut(choice.at) {
                    candidate.chosen = true;
                }
                Ok(choice)
            }
        }
    }

    /// Places a request; where all workers are full, waits for one. `but`: workers that it was at already.
    pub async fn place(self: &Arc<Self>, asked: &Asked, but: &[usize]) -> Result<Placed, Refused> {
        let deadline = tokio::time::Instant::now() + self.options().queue_time;
        let mut queued: Option<Queued<'_>> = None;
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let overload = match self.place_now(asked, but) {
                Err(Refused::Overload(overload)) => overload,
                placed => return placed,
            };
            if queued.is_none() {
                queued = Queued::enter(&self.waiting, self.options().queue_max);
            }
            let waited = match &queued {
                Some(_) => tokio::time::timeout_at(deadline, freed).await.is_ok(),
                None => false,
            };
            if !waited {
                self.counts.shed.fetch_add(1, Ordering::Relaxed);
                return Err(overload.into());
            }
        }
    }

    fn place_now(self: &Arc<Self>, asked: &Asked, but: &[usize]) -> Result<Placed, Refused> {
        let mut candidates = self.candidates(asked, but)?;
        let turn = self.turn_of(asked.role).fetch_add(1, Ordering::Relaxed);
        let choice = self.choose_at(asked, &mut candidates, turn)?;
        let Some(chosen) = candidates.into_iter().nth(choice.at) else {
            return Err(Refused::AllAway(asked.model.clone()));
        };
        let now = self.now();
        let (terms, number) = (chosen.terms, chosen.worker.number);
        let id = self.load.lock().add(number, asked.tokens, terms.tokens_to_compute, now, now + self.options().silence);
        if let Some(session) = asked.session {
            self.sessions.lock().set(session, number);
        }
        let by = by_what(asked, std::slice::from_ref(&chosen));
        if let Some(count) = By::ALL.iter().position(|known| *known == by).and_then(|at| self.counts.by.get(at)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.fleet.conversations().store(asked.messages.iter().map(|beginning| beginning.name), number);
        self.counts.placed.fetch_add(1, Ordering::Relaxed);
        let stayed = choice.why == Why::Session { costlier: true };
        self.counts.by_affinity.fetch_add(u64::from(stayed), Ordering::Relaxed);
        self.counts.tokens.fetch_add(asked.tokens, Ordering::Relaxed);
        let cached = terms.cached.tokens();
        self.counts.cached_tokens.fetch_add(cached, Ordering::Relaxed);
        Ok(Placed {
            worker: chosen.worker,
            terms,
            router: Arc::clone(self),
            id,
            last_token: None,
            uncounted: 0,
            heard: None,
        })
    }

    /// Background work: forgets requests of which nothing is heard. Call it about once a second.
    pub fn tick(&self) {
        let expired = self.load.lock().expire(self.now());
        if expired > 0 {
            tracing::warn!(expired, "the router no longer counts requests that it has heard nothing of");
            self.counts.expired.fetch_add(expired as u64, Ordering::Relaxed);
        }
        let workers = self.fleet.workers();
        // Another process may come back in its place.
        workers.iter().filter(|worker| !worker.is_up()).for_each(|away| self.fleet.conversations().forget(away.number));
        let known: Vec<usize> = workers.iter().map(|worker| worker.number).collect();
        self.speeds.lock().retain(|number, _| known.contains(number));
        self.freed.notify_waiters();
    }
}

/// By what a request with these candidates is placed.
pub fn by_what(asked: &Asked, candidates: &[Candidate]) -> By {
    match asked.known {
        Known::Tokens => By::Tokens,
        Known::Beginning => By::Beginning,
        Known::Nothing if candidates.iter().any(|candidate| candidate.messages > 0) => By::Messages,
        Known::Nothing => By::Load,
    }
}

/// Of the workers at one URL, the one that knows of the longest prefix: they are one engine's names, or its ranks. In the order of names.
fn one_for_each_engine(
    model: &str,
    workers: Vec<Arc<Worker>>,
    found: Vec<(Cached, usize)>,
) -> Vec<(Arc<Worker>, (Cached, usize))> {
    let mut best: BTreeMap<usize, (Arc<Worker>, (Cached, usize))> = BTreeMap::new();
    let rank = |worker: &Worker, (cached, _): &(Cached, usize)| {
        (cached.tokens(), cached.engine_tokens, worker.spec.model == model)
    };
    for (worker, found) in workers.into_iter().zip(found) {
        match best.get(&worker.number) {
            Some((known, of)) if rank(known, of) >= rank(&worker, &found) => {}
            _ => _ = best.insert(worker.number, (worker, found)),
        }
    }
    let mut all: Vec<_> = best.into_values().collect();
    all.sort_by(|(a, _), (b, _)| a.spec.id.cmp(&b.spec.id));
    all
}

fn usual_of(speeds: &HashMap<usize, Speed>) -> Speed {
    let middle = |of: fn(&Speed) -> f64| {
        let mut all: Vec<f64> = speeds.values().filter(|speed| speed.learnt() > 0).map(of).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    };
    match (middle(Speed::idle_seconds), middle(Speed::tokens_per_second)) {
        (Some(idle), Some(rate)) => Speed::usual(idle, rate),
        _ => Speed::default(),
    }
}

/// A place in the queue.
struct Queued<'a>(&'a AtomicUsize);

impl<'a> Queued<'a> {
    fn enter(waiting: &'a AtomicUsize, most: usize) -> Option<Self> {
        let more = |count: usize| (count < most).then_some(count + 1);
        waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok().map(|_| Self(waiting))
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Placed {
    /// Tokens of the answer came; the first of them says how fast the worker computes. Those after it are counted some at a time.
    pub fn tokens(&mut self, count: u64) {
        let now = Instant::now();
        let Some(before) = self.last_token else {
            self.last_token = Some(now);
            return self.first_token();
        };
        self.uncounted += count;
        let since = now.duration_since(before);
        if since < caps::TOKENS_COUNTED_EVERY {
            return;
        }
        self.last_token = Some(now);
        let count = std::mem::take(&mut self.uncounted);
        let expires = self.router.now() + self.router.options().silence;
        self.router.load.lock().tokens(self.id, count, expires);
        if let Some(speed) = self.router.speeds.lock().get_mut(&self.worker.number) {
            speed.learn_token(since / u32::try_from(count.max(1)).unwrap_or(u32::MAX));
        }
    }

    /// Something came, if only that it lives: it is load for as long as that goes on.
    pub fn heard(&mut self, now: Instant) {
        if self.heard.is_none_or(|before| now.duration_since(before) >= caps::HEARD_EVERY) {
            self.heard = Some(now);
            let expires = self.router.now() + self.router.options().silence;
            self.router.load.lock().tokens(self.id, 0, expires);
        }
    }

    fn first_token(&self) {
        let ended = self.router.load.lock().first_token(self.id, self.router.now());
        if let Some(ended) = ended {
            // What was fetched is not the engine's time.
            let took = ended.took.saturating_sub(Duration::from_secs_f64(self.terms.fetch_seconds.max(0.0)));
            let mut speeds = self.router.speeds.lock();
            let usual = usual_of(&speeds);
            speeds.entry(ended.worker).or_insert(usual).learn_prefill(ended.work, ended.decoding, took);
        }
        self.router.freed.notify_waiters();
    }
}

impl Placed {
    /// Nothing shows when the first token of an answer that comes in one piece was there: it is taken for computed by now.
    pub fn assume_prefilled(&self) {
        self.router.load.lock().first_token(self.id, self.router.now());
        self.router.freed.notify_waiters();
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.router.load.lock().free(self.id);
        self.router.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use kvstore_proto::hashes::Sha256Cbor;
    use serde_json::{Value, json};

    use super::*;
    use crate::events::vllm::{Batch, Event, Stored};
    use crate::fleet::{Evidence, FleetOptions, WorkerSpec};
    use crate::hashing::Hashing;

    fn spec(id: &str, role: Role) -> WorkerSpec {
        WorkerSpec { role, block_tokens: 16, ..WorkerSpec::new(id, &format!("http://{id}:1"), "m") }
    }

    fn router(options: PlaceOptions, ids: &[&str]) -> Arc<Router> {
        let fleet = Fleet::new(Hashing::Sha256Cbor(Sha256Cbor::default()), FleetOptions::default());
        fleet.set_workers(&ids.iter().map(|id| spec(id, Role::Both)).collect::<Vec<_>>());
        Router::new(fleet, options)
    }

    fn asked(router: &Router, tokens: &[u32]) -> Asked {
        let chain = router.fleet.hashing().chain(tokens, 16, None, None).unwrap();
        Asked { model: "m".into(), tokens: tokens.len() as u64, known: Known::Tokens, chain, ..Asked::default() }
    }

    fn holds(router: &Router, id: &str, chain: &Chain) {
        let stored = Stored { hashes: chain.names.clone(), block_tokens: 16, ..Stored::default() };
        let batch = Batch { events: vec![Event::Stored(stored)], ..Batch::default() };
        router.fleet.worker(id).unwrap().view.apply(&batch, 0);
    }

    /// Two idle workers, and conversations one after the other that nobody had: by independent draws, one worker gets six in a row in 3%
    /// of cases.
    #[test]
    fn equals_take_turns() {
        for _ in 0..50 {
            let router = router(PlaceOptions::default(), &["a", "b"]);
            for every in [1, 2, 3] {
                let turns: Vec<u64> = (0..120).map(|turn| (router.chance(turn * every) * 2.0) as u64).collect();
                assert!(turns.windows(6).all(|six| six.contains(&0) && six.contains(&1)), "every {every}: {turns:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_request_goes_where_its_prefix_is_until_that_is_busy() {
        let router = router(PlaceOptions::default(), &["a", "b", "c"]);
        let tokens: Vec<u32> = (0..1600).collect();
        let asked = asked(&router, &tokens);
        holds(&router, "b", &asked.chain);
        let placed = router.place(&asked, &[]).await.unwrap();
        assert_eq!((placed.worker.spec.id.as_str(), placed.terms.cached.engine_tokens), ("b", 1600));
        // Long prompts that nobody has, one after the other: they spread, and b has the fewest tokens ahead.
        let other = self::asked(&router, &(5000..15_000).collect::<Vec<u32>>());
        let spread = [router.place(&other, &[]).await.unwrap(), router.place(&other, &[]).await.unwrap()];
        let mut ids: Vec<&str> = spread.iter().map(|placed| placed.worker.spec.id.as_str()).collect();
        ids.sort_unstable();
        assert_eq!(ids.len(), 2);
        assert_ne!(ids[0], ids[1]);
        // Where b is busy for longer than the prefix saves, another gets it.
        let busy: Vec<Placed> = vec![router.place(&other, &[placed.worker.number]).await.unwrap()];
        let loads = router.loads();
        assert_eq!(loads.values().map(WorkerLoad::requests).sum::<u64>(), 4);
        drop((placed, spread, busy));
        assert!(router.loads().values().all(|load| *load == WorkerLoad::default()));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_full_queues_then_sheds() {
        let choose = Choose { requests_max: 1, ..Choose::default() };
        let options =
            PlaceOptions { choose, queue_time: Duration::from_millis(200), queue_max: 1, ..PlaceOptions::default() };
        let router = router(options, &["a"]);
        let asked = asked(&router, &[1; 64]);
        let first = router.place(&asked, &[]).await.unwrap();
        let (waiting, shed) = tokio::join!(router.place(&asked, &[]), async {
            tokio::task::yield_now().await;
            router.place(&asked, &[]).await.err()
        });
        assert!(matches!(shed, Some(Refused::Overload(_))), "the queue has room for one: {shed:?}");
        assert!(matches!(waiting.err(), Some(Refused::Overload(_))), "nobody made room in time");
        let (waiting, ()) = tokio::join!(router.place(&asked, &[]), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(first);
        });
        assert_eq!(waiting.unwrap().worker.spec.id, "a");
        assert_eq!((router.waiting(), router.counts.shed.load(Ordering::Relaxed)), (0, 2));
    }

    #[tokio::test]
    async fn who_is_unknown_away_or_of_another_role_is_not_asked() {
        let router = router(PlaceOptions::default(), &["a", "b"]);
        router.fleet.add_worker(spec("p", Role::Prefill));
        let asked = asked(&router, &[1; 64]);
        let unknown = Asked { model: "x".into(), ..asked.clone() };
        let error = router.place(&unknown, &[]).await.err().unwrap();
        assert_eq!(error.to_string(), "the model \"x\" is not served here; the router serves m");
        router.fleet.worker("a").unwrap().failed(Evidence::Gone, "refused");
        for _ in 0..5 {
            assert_eq!(router.place(&asked, &[]).await.unwrap().worker.spec.id, "b");
        }
        router.fleet.worker("b").unwrap().failed(Evidence::Gone, "refused");
        assert_eq!(router.place(&asked, &[]).await.err(), Some(Refused::AllAway("m".into())));
        let prefill = Asked { role: Role::Prefill, ..asked };
        assert_eq!(router.place(&prefill, &[]).await.unwrap().worker.spec.id, "p");
    }

    /// Nobody can render its prompts: pictures, say. A conversation that goes on is placed where its beginning was.
    #[tokio::test]
    async fn a_conversation_goes_on_where_it_was() {
        let router = router(PlaceOptions::default(), &["a", "b", "c", "d"]);
        let said = |count: u64, of: u64| -> Asked {
            let messages: Vec<Beginning> = (1..=count)
                .map(|at| Beginning { name: (of << 32 | at).wrapping_mul(0x9E37_79B9), bytes: at * 4000 })
                .collect();
            Asked { model: "m".into(), tokens: count * 1000, messages: messages.into(), ..Asked::default() }
        };
        let mut at = HashMap::new();
        for of in 1..=40 {
            let placed = router.place(&said(1, of), &[]).await.unwrap();
            assert_eq!(placed.terms.cached.engine_tokens, 0);
            at.insert(of, placed.worker.spec.id.clone());
        }
        for turn in 2..6 {
            for of in 1..=40 {
                let placed = router.place(&said(2 * turn, of), &[]).await.unwrap();
                assert_eq!(placed.worker.spec.id, at[&of], "turn {turn} of {of}");
                assert_eq!(placed.terms.cached.engine_tokens, if turn == 2 { 1000 } else { 2000 * (turn - 1) });
            }
        }
        let by = router.counts.by.each_ref().map(|count| count.load(Ordering::Relaxed));
        assert_eq!(by, [0, 0, 160, 40], "tokens, beginning, messages, load");
        // What its events say of a worker is more than what it had once.
        let holder = router.fleet.worker(&at[&1]).unwrap();
        holds(&router, &at[&1], &asked(&router, &[1; 64]).chain);
        let known = Asked { known: Known::Tokens, chain: asked(&router, &[9; 64]).chain, ..said(20, 1) };
        let candidates = router.candidates(&known, &[]).unwrap();
        assert!(candidates.iter().all(|candidate| candidate.messages == 0));
        let unknown = router.candidates(&said(20, 1), &[]).unwrap();
        assert_eq!(unknown.iter().map(|candidate| candidate.messages).max(), Some(10));
        // Another process comes back in its place.
        holder.failed(Evidence::Gone, "refused");
        router.tick();
        holder.succeeded();
        assert!(router.candidates(&said(20, 1), &[]).unwrap().iter().all(|candidate| candidate.messages == 0));
    }

    #[tokio::test]
    async fn sessions_stay_and_are_bounded() {
        let router = router(PlaceOptions::default(), &["a", "b", "c", "d"]);
        let asked = Asked { session: Some(7), ..asked(&router, &[1; 64]) };
        let first = router.place(&asked, &[]).await.unwrap().worker.spec.id.clone();
        for _ in 0..20 {
            assert_eq!(router.place(&asked, &[]).await.unwrap().worker.spec.id, first);
        }
        let mut sessions = Sessions::default();
        for session in 0..3 * caps::SESSIONS_MAX as u64 {
            sessions.set(session, 1);
            sessions.set(0, 2);
        }
        assert!(sessions.at.len() <= caps::SESSIONS_MAX && sessions.order.len() <= 2 * caps::SESSIONS_MAX);
        assert_eq!(sessions.get(0), Some(2), "the one that was used all the time");
    }

    #[tokio::test]
    async fn other_replicas_requests_count() {
        let router = router(PlaceOptions::default(), &["a", "b"]);
        let asked = asked(&router, &[1; 64]);
        let busy = WorkerLoad { prefill_tokens: 50_000, prefilling: 3, ..WorkerLoad::default() };
        router.set_others([("a".to_owned(), busy)].into());
        for _ in 0..5 {
            assert_eq!(router.place(&asked, &[]).await.unwrap().worker.spec.id, "b");
        }
    }

    #[tokio::test]
    async fn what_is_explained_is_what_happens_and_equals_take_turns() {
        let router = router(PlaceOptions::default(), &["a", "b", "c"]);
        let asked = asked(&router, &[1; 64]);
        let mut served: HashMap<String, u32> = HashMap::new();
        for turn in 0..300 {
            let mut candidates = router.candidates(&asked, &[]).unwrap();
            let choice = router.choose(&asked, &mut candidates).unwrap();
            assert_eq!(choice.equals, 3, "nothing tells them apart");
            let chosen = candidates.iter().find(|candidate| candidate.chosen).unwrap().worker.spec.id.clone();
            // A request that is looked at twice takes no turn.
            let again = router.choose(&asked, &mut router.candidates(&asked, &[]).unwrap()).unwrap();
            assert_eq!(again, choice);
            assert_eq!(router.place(&asked, &[]).await.unwrap().worker.spec.id, chosen, "turn {turn}");
            *served.entry(chosen).or_default() += 1;
        }
        assert!(served.values().all(|count| (60..140).contains(count)), "{served:?}");
        // One that is busy is none of them.
        let busy = router.place(&asked, &[]).await.unwrap();
        let choice = router.choose(&asked, &mut router.candidates(&asked, &[]).unwrap()).unwrap();
        assert_eq!(choice.equals, 2);
        drop(busy);
    }

    #[tokio::test]
    async fn an_engine_is_one_under_however_many_names_it_is_listed() {
        let router = router(PlaceOptions::default(), &["a", "b"]);
        for id in ["a", "b"] {
            let adapter = WorkerSpec::new(&format!("{id}2"), &format!("http://{id}:1/"), "m-lora");
            router.fleet.add_worker(WorkerSpec { block_tokens: 16, ..adapter });
        }
        let busy = router.place(&asked(&router, &[1; 640]), &[]).await.unwrap();
        let adapter = Asked { model: "m-lora".into(), ..asked(&router, &[2; 64]) };
        let loads = router.loads();
        let twin = format!("{}2", busy.worker.spec.id);
        assert_eq!(loads[&twin], loads[&busy.worker.spec.id]);
        for _ in 0..10 {
            let placed = router.place(&adapter, &[]).await.unwrap();
            assert!(placed.worker.spec.id.ends_with('2') && placed.worker.spec.id != twin, "{}", placed.worker.spec.id);
        }
        // It was tried under its other name.
        let but = [busy.worker.number];
        assert_ne!(router.place(&adapter, &but).await.unwrap().worker.spec.id, twin);
    }

    /// One quick answer, and all requests went to that worker: of the others it was believed that they took ten times as long.
    #[tokio::test]
    async fn who_was_never_asked_is_thought_to_be_as_good_as_the_others() {
        let router = router(PlaceOptions::default(), &["a", "b"]);
        let asked = asked(&router, &[1, 2]);
        let mut first = router.place(&asked, &[]).await.unwrap();
        let known = first.worker.spec.id.clone();
        first.tokens(1);
        drop(first);
        let mut busy = Vec::new();
        for _ in 0..20 {
            busy.push(router.place(&asked, &[]).await.unwrap());
        }
        let there = busy.iter().filter(|placed| placed.worker.spec.id == known).count();
        assert_eq!(there, 10, "they spread");
    }

    /// Ranks that are registered for themselves are one engine; a prefix may be known of any of them.
    #[tokio::test]
    async fn the_ranks_of_an_engine_count_together() {
        let router = router(PlaceOptions::default(), &["a", "b"]);
        router
            .fleet
            .add_worker(WorkerSpec { first_rank: 1, ..WorkerSpec { id: "b@1".into(), ..spec("b", Role::Both) } });
        let asked = asked(&router, &(0..640).collect::<Vec<u32>>());
        holds(&router, "b@1", &asked.chain);
        let candidates = router.candidates(&asked, &[]).unwrap();
        let ids: Vec<&str> = candidates.iter().map(|candidate| candidate.worker.spec.id.as_str()).collect();
        assert_eq!((ids, candidates[1].terms.cached.engine_tokens), (vec!["a", "b@1"], 640));
        assert_eq!(router.fleet.serving("m").len(), 3, "each says what it knows");
    }

    #[tokio::test]
    async fn adapters_go_to_who_has_them_and_else_to_their_base_models_workers() {
        let router = router(PlaceOptions::default(), &["a", "b"]);
        let adapter = Asked { model: "lora".into(), tokens: 10, ..Asked::default() };
        assert!(matches!(router.place(&adapter, &[]).await.err(), Some(Refused::UnknownModel { .. })));
        for base in [None, Some("m".to_owned())] {
            router.fleet.set_adapters([("lora".to_owned(), base)].into());
            assert_eq!(router.candidates(&adapter, &[]).unwrap().len(), 2);
        }
        router.fleet.set_adapters([("lora".to_owned(), Some("other".to_owned()))].into());
        assert!(router.candidates(&adapter, &[]).is_err(), "nobody serves its base model");
        assert!(router.fleet.is_adapter("lora") && !router.fleet.is_adapter("m"));
        // Loaded while it runs: the engine says so.
        router.fleet.set_adapters(Default::default());
        let served = |entry: Value| crate::fleet::read_served(json!({"data": [entry]}).to_string().as_bytes()).unwrap();
        router.fleet.worker("b").unwrap().set_served(served(json!({"id": "lora", "parent": "m"})));
        assert!(router.fleet.is_adapter("lora"));
        for _ in 0..5 {
            assert_eq!(router.place(&adapter, &[]).await.unwrap().worker.spec.id, "b");
        }
        assert_eq!(router.fleet.models(), ["lora", "m"]);
        let any = router.candidates(&Asked::default(), &[]).unwrap();
        assert_eq!(any.len(), 2, "whatever they serve");
    }
}
