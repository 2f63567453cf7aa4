//! Sessions beside a model of them: random verbs of several writers, whose requests are refused, lost, late or the last ones that they make;
//! and collections. No owner's acknowledged append is ever lost, no token is out of order, and no epoch has two owners.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod actors;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use actors::{Door, Fate, Verb, head, ids, name};
use futures::future::join_all;
use kvstore_checkpoint::sessions::{Acknowledged, End, SessionError, Step, Store, Writer, collect};
use object_store::memory::InMemory;
use proptest::prelude::*;

const WRITERS: usize = 3;
const PROMPT: [u32; 2] = [1, 2];

/// What happens to one request of a verb, if it makes so many.
#[derive(Clone, Copy, Debug)]
struct Fault {
    request: u64,
    fate: Fate,
    /// Nothing after it is done.
    is_last: bool,
}

#[derive(Clone, Debug)]
enum Operation {
    Open {
        writer: usize,
    },
    /// Commits under way at once.
    Commit {
        writer: usize,
        commits: usize,
        of: u8,
        fault: Option<Fault>,
    },
    End {
        writer: usize,
        session: usize,
        ends: End,
        fault: Option<Fault>,
    },
    Claim {
        writer: usize,
        session: usize,
        fault: Option<Fault>,
    },
    /// Another log, which gets back what nobody else claimed; the old one is ended or left.
    Again {
        writer: usize,
        ends: bool,
    },
    Arrive {
        writer: usize,
    },
    Tidy {
        writer: usize,
    },
    Collect {
        requests: Option<u64>,
    },
    Inspect {
        session: usize,
    },
}

fn fault() -> impl Strategy<Value = Option<Fault>> {
    let fate = prop_oneof![
        2 => Just(Fate::Refused),
        2 => Just(Fate::Killed),
        3 => Just(Fate::Late),
        1 => Just(Fate::Lost),
    ];
    prop::option::weighted(0.35, (0_u64..16, fate, any::<bool>()))
        .prop_map(|fault| fault.map(|(request, fate, is_last)| Fault { request, fate, is_last }))
}

fn operation() -> impl Strategy<Value = Operation> {
    let writer = || 0..WRITERS;
    let session = || 0..6_usize;
    let ends = prop_oneof![Just(End::Closed), Just(End::Moved), Just(End::Moved)];
    prop_oneof![
        2 => writer().prop_map(|writer| Operation::Open { writer }),
        8 => (writer(), 1..5_usize, any::<u8>(), fault())
            .prop_map(|(writer, commits, of, fault)| Operation::Commit { writer, commits, of, fault }),
        2 => (writer(), session(), ends, fault())
            .prop_map(|(writer, session, ends, fault)| Operation::End { writer, session, ends, fault }),
        6 => (writer(), session(), fault())
            .prop_map(|(writer, session, fault)| Operation::Claim { writer, session, fault }),
        2 => (writer(), any::<bool>()).prop_map(|(writer, ends)| Operation::Again { writer, ends }),
        2 => writer().prop_map(|writer| Operation::Arrive { writer }),
        1 => writer().prop_map(|writer| Operation::Tidy { writer }),
        2 => prop::option::weighted(0.4, 10..80_u64).prop_map(|requests| Operation::Collect { requests }),
        2 => session().prop_map(|session| Operation::Inspect { session }),
    ]
}

/// What has to be true of a session.
#[derive(Default)]
struct Model {
    /// What each epoch that is known gave to its log, acknowledged or not.
    issued: BTreeMap<u64, Vec<u32>>,
    /// The longest that was acknowledged.
    acknowledged: Vec<u32>,
    /// Who had an append acknowledged in an epoch.
    owners: BTreeMap<u64, String>,
    /// Epochs whose owner has begun it, or found it begun.
    begun: BTreeSet<u64>,
    /// That was acknowledged, or found.
    is_begun: bool,
    may_be_closed: bool,
    is_closed: bool,
}

impl Model {
    /// What was found of it, in a log of an epoch before `epoch`.
    fn found(&self, found: &[u32], epoch: u64) {
        assert!(found.starts_with(&self.acknowledged), "{found:?} has lost {:?}", self.acknowledged);
        let issued = self.issued.range(..epoch).next_back().map(|(_, issued)| issued.as_slice()).unwrap_or_default();
        assert!(issued.starts_with(found), "{found:?} is no beginning of {issued:?}");
    }

    fn acknowledge(&mut self, by: &str, acknowledged: &Acknowledged) {
        let Acknowledged { epoch, tokens, .. } = *acknowledged;
        let owner = self.owners.entry(epoch).or_insert_with(|| by.to_owned());
        assert_eq!(owner, by, "two owners in epoch {epoch}");
        let list = self.issued[&epoch][..tokens as usize - PROMPT.len()].to_vec();
        for (later, issued) in self.issued.range(epoch + 1..) {
            assert!(issued.starts_with(&list), "epoch {later} has {issued:?}, and {list:?} was acknowledged");
        }
        if list.len() > self.acknowledged.len() {
            assert!(list.starts_with(&self.acknowledged));
            self.acknowledged = list;
        }
        self.is_begun = true;
    }
}

struct Actor {
    door: Arc<Door>,
    store: Store,
    writer: Writer,
}

struct World {
    memory: Arc<InMemory>,
    actors: Vec<Actor>,
    models: Vec<Model>,
    token: u32,
}

impl World {
    async fn new() -> Self {
        let memory = Arc::new(InMemory::new());
        let mut actors = Vec::new();
        for _ in 0..WRITERS {
            actors.push(Self::actor(&memory).await);
        }
        Self { memory, actors, models: Vec::new(), token: 100 }
    }

    async fn actor(memory: &Arc<InMemory>) -> Actor {
        let door = Door::new(memory);
        let store = door.store();
        let writer = Writer::begin(&store, "model").await.unwrap();
        Actor { door, store, writer }
    }

    fn meet(&self, writer: usize, fault: Option<Fault>) {
        self.actors[writer].door.rule(move |number, verb, _| match fault {
            Some(fault) if number == fault.request && (fault.fate != Fate::Late || verb == Verb::Put) => fault.fate,
            Some(fault) if number > fault.request && fault.is_last => Fate::Refused,
            _ => Fate::Done,
        });
    }

    fn mend(&self, writer: usize) {
        self.actors[writer].door.rule(|_, _, _| Fate::Done);
    }

    async fn run(&mut self, operation: Operation) {
        match operation {
            Operation::Open { writer } => self.open(writer).await,
            Operation::Commit { writer, commits, of, fault } => self.commit(writer, commits, of, fault).await,
            Operation::End { writer, session, ends, fault } => self.end(writer, session, ends, fault).await,
            Operation::Claim { writer, session, fault } => self.claim(writer, session, fault).await,
            Operation::Again { writer, ends } => self.again(writer, ends).await,
            Operation::Arrive { writer } => drop(self.actors[writer].door.arrive().await),
            Operation::Tidy { writer } => self.actors[writer].writer.tidy().await.unwrap(),
            Operation::Collect { requests } => self.collect(requests).await,
            Operation::Inspect { session } => self.inspect(session).await,
        }
    }

    async fn open(&mut self, writer: usize) {
        let session = self.models.len();
        match self.actors[writer].writer.open(&name(&session.to_string())).await {
            Ok(epoch) => {
                let model = Model { issued: [(epoch, Vec::new())].into(), ..Model::default() };
                self.models.push(model);
            }
            Err(SessionError::Broken(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// The next step of a session that a writer owns.
    fn step(&mut self, session: usize, epoch: u64) -> Step {
        let model = &mut self.models[session];
        let issued = model.issued.get_mut(&epoch).unwrap();
        let start = (PROMPT.len() + issued.len()) as u64;
        let new: Vec<u32> = (0..self.token % 3).map(|more| self.token * 10 + more).collect();
        self.token += 1;
        issued.extend(&new);
        let (name, append) = (name(&session.to_string()), ids(start, &new));
        match model.begun.insert(epoch) {
            true => Step::begin(name, head(&PROMPT), Some(append)),
            false => Step::append(name, append),
        }
    }

    async fn commit(&mut self, writer: usize, commits: usize, of: u8, fault: Option<Fault>) {
        let owned = self.actors[writer].writer.sessions();
        if self.actors[writer].writer.broken().is_some() {
            return;
        }
        self.meet(writer, fault);
        let mut all = Vec::new();
        for _ in 0..commits {
            let mut steps = Vec::new();
            for (at, (owned, epoch)) in owned.iter().enumerate() {
                if of >> (at % 8) & 1 == 1 {
                    let session = owned.id().parse().unwrap();
                    steps.push(self.step(session, *epoch));
                }
            }
            all.push(steps);
        }
        let this = self.actors[writer].writer.clone();
        let answers = join_all(all.into_iter().map(|steps| this.commit(steps))).await;
        self.mend(writer);
        let mut is_over = false;
        for answer in answers {
            match answer {
                Ok(answers) => {
                    assert!(!is_over || answers.is_empty(), "acknowledged behind one that was not");
                    for answer in answers {
                        let acknowledged = answer.unwrap();
                        let session: usize = acknowledged.name.id().parse().unwrap();
                        self.models[session].acknowledge(this.log(), &acknowledged);
                    }
                }
                Err(SessionError::Broken(_)) => is_over = true,
                Err(error) => panic!("{error}"),
            }
        }
    }

    async fn end(&mut self, writer: usize, session: usize, ends: End, fault: Option<Fault>) {
        let this = self.actors[writer].writer.clone();
        let owned = this.sessions().into_iter().find(|(name, _)| name.id() == session.to_string());
        let Some((name, epoch)) = owned else { return };
        if this.broken().is_some() {
            return;
        }
        let mut step = self.step(session, epoch);
        step.ends = Some(ends);
        self.meet(writer, fault);
        let answer = this.commit(vec![step]).await;
        self.mend(writer);
        let model = &mut self.models[session];
        model.may_be_closed |= ends == End::Closed;
        match answer {
            Ok(answers) => {
                model.acknowledge(this.log(), answers[0].as_ref().unwrap());
                model.is_closed |= ends == End::Closed;
            }
            Err(SessionError::Broken(_)) => {}
            Err(error) => panic!("{name}: {error}"),
        }
    }

    async fn claim(&mut self, writer: usize, session: usize, fault: Option<Fault>) {
        if session >= self.models.len() {
            return;
        }
        self.meet(writer, fault);
        let this = self.actors[writer].writer.clone();
        let claimed = this.claim(&name(&session.to_string())).await;
        self.mend(writer);
        self.claimed(session, claimed, fault.is_some());
    }

    fn claimed(
        &mut self,
        session: usize,
        claimed: Result<kvstore_checkpoint::sessions::Claimed, SessionError>,
        may_fail: bool,
    ) {
        let model = &mut self.models[session];
        match claimed {
            Ok(claimed) => {
                assert!(!model.is_closed, "it was closed");
                let found = claimed.session.as_ref().map(|session| session.generated.0.clone());
                assert!(found.is_some() || !model.is_begun);
                if found.is_some() {
                    model.is_begun = true;
                    model.begun.insert(claimed.epoch);
                }
                let found = found.unwrap_or_default();
                model.found(&found, claimed.epoch);
                assert!(model.issued.insert(claimed.epoch, found).is_none(), "epoch {} came twice", claimed.epoch);
            }
            Err(SessionError::Owned(_) | SessionError::Broken(_)) => {}
            Err(SessionError::Closed(_) | SessionError::NoSuch(_)) if model.may_be_closed => {}
            Err(SessionError::Request { .. }) if may_fail => {}
            Err(error) => panic!("session {session}: {error}"),
        }
    }

    async fn again(&mut self, writer: usize, ends: bool) {
        let old = self.actors[writer].writer.clone();
        if ends {
            let _ = old.end().await;
        }
        let new = Writer::begin(&self.actors[writer].store, "model").await.unwrap();
        for (name, epoch) in old.sessions() {
            let session = name.id().parse().unwrap();
            match new.reclaim(&name, epoch).await {
                Err(SessionError::Taken { epoch: taken, .. }) => assert!(taken > epoch),
                reclaimed => self.claimed(session, reclaimed, false),
            }
        }
        self.actors[writer].writer = new;
    }

    async fn collect(&mut self, requests: Option<u64>) {
        let door = Door::new(&self.memory);
        if let Some(most) = requests {
            door.rule(move |number, _, _| if number < most { Fate::Done } else { Fate::Refused });
        }
        match collect(&door.store(), false).await {
            Ok(collected) => assert_eq!(collected.unreadable, Vec::<String>::new()),
            Err(SessionError::Request { .. }) if requests.is_some() => {}
            Err(error) => panic!("{error}"),
        }
        // One that was killed holds its lease for some minutes.
        let lease = object_store::path::Path::from("sessions/v1/collector");
        for (location, _) in actors::objects(&self.memory, lease.as_ref()).await {
            object_store::ObjectStoreExt::delete(&*self.memory, &location).await.unwrap();
        }
    }

    async fn inspect(&self, session: usize) {
        let Some(model) = self.models.get(session) else { return };
        match Door::new(&self.memory).store().inspect(&name(&session.to_string())).await {
            Ok(inspected) => {
                let is_closed = inspected.ends == Some(End::Closed);
                assert!(is_closed || !model.is_closed);
                assert!(!is_closed || model.may_be_closed);
                let found = inspected.session.map(|session| session.generated.0);
                if !is_closed {
                    model.found(&found.unwrap_or_default(), u64::MAX);
                }
            }
            Err(SessionError::NoSuch(_)) => assert!(model.may_be_closed),
            Err(error) => panic!("{error}"),
        }
    }

    /// Everybody is gone, all that was late arrives, and one claims all there is.
    async fn finish(mut self) {
        for actor in &self.actors {
            actor.door.arrive().await;
        }
        self.collect(None).await;
        self.actors[0] = Self::actor(&self.memory).await;
        for session in 0..self.models.len() {
            self.inspect(session).await;
            self.claim(0, session, None).await;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_acknowledged_is_lost(operations in prop::collection::vec(operation(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new().await;
            for operation in operations {
                world.run(operation).await;
            }
            world.finish().await;
        });
    }
}
