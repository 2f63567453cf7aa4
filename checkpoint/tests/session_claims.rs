//! Claims beside each other, beside their session's owner, and beside a collection, in every order of their requests that a few changes of
//! turn make.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod actors;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use actors::{Door, Engine, head, name, objects};
use futures::FutureExt;
use kvstore_checkpoint::sessions::{End, SessionError, Step, Writer, collect};
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use object_store::path::Path;

type Objects = Vec<(Path, Vec<u8>)>;

/// What is in the store before anybody is let go.
async fn copy(objects: &Objects) -> Arc<InMemory> {
    let memory = Arc::new(InMemory::new());
    for (location, bytes) in objects {
        memory.put(location, bytes.clone().into()).await.unwrap();
    }
    memory
}

/// Tasks run until each waits at its door or has ended.
async fn settle() {
    for _ in 0..40 {
        tokio::task::yield_now().await;
    }
}

/// One who acts, behind a door.
struct Actor<T> {
    door: Arc<Door>,
    task: tokio::task::JoinHandle<T>,
}

/// Lets actors go on, one at a time. After as many steps as `turns` says, it is the turn of another one: the one so many further.
async fn play<T>(actors: &[Actor<T>], first: usize, turns: &[(usize, usize)]) -> usize {
    let (mut at, mut steps) = (first, 0);
    loop {
        settle().await;
        let can_go = |at: usize| !actors[at].task.is_finished() && actors[at].door.waiting() > 0;
        if let Some((_, further)) = turns.iter().find(|(step, _)| *step == steps) {
            at = (at + further) % actors.len();
        }
        let Some(next) = (0..actors.len()).map(|further| (at + further) % actors.len()).find(|at| can_go(*at)) else {
            assert!(actors.iter().all(|actor| actor.task.is_finished()), "somebody waits for nobody");
            return steps;
        };
        at = next;
        while actors[at].door.waiting() > 0 {
            actors[at].door.let_through(0);
        }
        steps += 1;
    }
}

/// All ways to change turns at most `changes` times within so many steps.
fn schedules(steps: usize, changes: usize, actors: usize) -> Vec<Vec<(usize, usize)>> {
    let mut all = vec![Vec::new()];
    let mut last: Vec<Vec<(usize, usize)>> = vec![Vec::new()];
    for _ in 0..changes {
        let mut next = Vec::new();
        for begun in &last {
            let from = begun.last().map_or(0, |(step, _)| step + 1);
            for step in from..steps {
                for further in 1..actors {
                    next.push(begun.iter().copied().chain([(step, further)]).collect());
                }
            }
        }
        all.extend(next.iter().cloned());
        last = next;
    }
    all
}

type Ended = Result<(u64, Vec<u32>, bool), SessionError>;

/// Claims, and appends where it won: its epoch, what it found, and whether the append was acknowledged.
async fn claims(writer: Writer, mut engine: Engine, since: Option<u64>, token: u32) -> Ended {
    let name = name("a");
    let claimed = match since {
        Some(since) => writer.reclaim(&name, since).await?,
        None => writer.claim(&name).await?,
    };
    let found = claimed.session.unwrap().generated.0;
    engine.tokens.truncate(engine.prompt);
    engine.tokens.extend(&found);
    let append = Step::append(name, engine.step(token));
    let is_acknowledged = writer.commit(vec![append]).await.is_ok_and(|answers| answers[0].is_ok());
    Ok((claimed.epoch, found, is_acknowledged))
}

async fn begun() -> (Objects, Engine) {
    let memory = Arc::new(InMemory::new());
    let first = Writer::begin(&Door::new(&memory).store(), "first").await.unwrap();
    let mut engine = Engine::new(&[1, 2, 3], 4);
    first.open(&name("a")).await.unwrap();
    let begin = Step::begin(name("a"), head(&[1, 2, 3]), Some(engine.step(10)));
    for step in [begin, Step::append(name("a"), engine.step(11)), Step::append(name("a"), engine.step(12))] {
        first.commit(vec![step]).await.unwrap().remove(0).unwrap();
    }
    (objects(&memory, "sessions").await, engine)
}

async fn actor<T, F>(memory: &Arc<InMemory>, called: &str, acts: impl FnOnce(Writer) -> F) -> Actor<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let door = Door::new(memory);
    let writer = Writer::begin(&door.store(), called).await.unwrap();
    door.hold();
    Actor { task: tokio::spawn(acts(writer)), door }
}

#[tokio::test]
async fn of_two_claimants_of_an_epoch_one_wins_in_every_order() {
    let (objects, engine) = begun().await;
    let mut steps = 0;
    let mut run = async |first: usize, turns: &[(usize, usize)]| {
        let memory = copy(&objects).await;
        let mut actors = Vec::new();
        for called in ["x", "y"] {
            let engine = engine.clone();
            actors.push(actor(&memory, called, |writer| claims(writer, engine, Some(1), 50)).await);
        }
        steps = play(&actors, first, turns).await;
        let (mut won, mut lost) = (Vec::new(), Vec::new());
        for (actor, called) in actors.into_iter().zip(["x", "y"]) {
            match actor.task.await.unwrap() {
                Ok(ended) => won.push((called, ended)),
                Err(SessionError::Taken { epoch: 2, writer, .. }) => lost.push(writer),
                Err(error) => panic!("{turns:?}: {error}"),
            }
        }
        assert_eq!((won.len(), lost.len()), (1, 1), "{turns:?}");
        assert_eq!(lost[0], won[0].0, "the loser is told who owns it");
        assert_eq!(won[0].1, (2, vec![10, 11, 12], true));
        steps
    };
    let most = run(0, &[]).await;
    assert!(most >= 12, "{most}");
    // Where they hinder each other, there are more.
    let most = most + 8;
    for turns in schedules(most, 3, 2) {
        run(0, &turns).await;
    }
    for turns in schedules(most, 2, 2) {
        run(1, &turns).await;
    }
}

/// Two claimants that take it from each other, and the owner that goes on meanwhile. Whoever comes last has all that was acknowledged.
#[tokio::test]
async fn what_was_acknowledged_is_there_in_every_order() {
    let run = async |first: usize, turns: &[(usize, usize)]| {
        let memory = Arc::new(InMemory::new());
        let engine = Engine::new(&[1, 2, 3], 4);
        let owner = Writer::begin(&Door::new(&memory).store(), "owner").await.unwrap();
        owner.open(&name("a")).await.unwrap();
        let mut begins = engine.clone();
        let begin = Step::begin(name("a"), head(&[1, 2, 3]), Some(begins.step(10)));
        owner.commit(vec![begin]).await.unwrap().remove(0).unwrap();
        let mut actors: Vec<Actor<Ended>> = Vec::new();
        for (called, token) in [("x", 50), ("y", 60)] {
            let engine = engine.clone();
            actors.push(actor(&memory, called, |writer| claims(writer, engine, None, token)).await);
        }
        // The owner's own door cannot be taken from it: it gets another writer's, with the session moved there before.
        let door = Door::new(&memory);
        let owning = Writer::begin(&door.store(), "owning").await.unwrap();
        owner.commit(vec![Step::end(name("a"), None, End::Moved)]).await.unwrap().remove(0).unwrap();
        owning.claim(&name("a")).await.unwrap();
        owning.commit(vec![Step::append(name("a"), begins.step(11))]).await.unwrap().remove(0).unwrap();
        door.hold();
        let appends: Pin<Box<dyn Future<Output = Ended> + Send>> = Box::pin(async move {
            let mut acknowledged = vec![10, 11];
            for token in 12..16 {
                let step = Step::append(name("a"), begins.step(token));
                match owning.commit(vec![step]).await {
                    Ok(answers) if answers[0].is_ok() => acknowledged.push(token),
                    _ => break,
                }
            }
            Ok((2, acknowledged, false))
        });
        actors.push(Actor { door, task: tokio::spawn(appends) });
        let steps = play(&actors, first, turns).await;
        let mut ended = Vec::new();
        for actor in actors {
            match actor.task.await.unwrap() {
                Ok(found) => ended.push(found),
                Err(SessionError::Taken { .. }) => {}
                Err(error) => panic!("{turns:?}: {error}"),
            }
        }
        let last = Writer::begin(&Door::new(&memory).store(), "last").await.unwrap();
        let found = last.claim(&name("a")).await.unwrap().session.unwrap().generated.0;
        let mut epochs = Vec::new();
        for (epoch, mut seen, is_acknowledged) in ended {
            epochs.push(epoch);
            assert!(found.starts_with(&seen), "{turns:?}: {found:?} has lost {seen:?}");
            if is_acknowledged {
                let next = found[seen.len()];
                assert!([50, 60].contains(&next), "{turns:?}: {found:?} behind {seen:?}");
                seen.push(next);
            }
        }
        epochs.sort_unstable();
        epochs.dedup();
        assert!(epochs.len() >= 2, "somebody claimed it");
        steps
    };
    let most = run(0, &[]).await;
    for first in 0..3 {
        for turns in schedules(most, if first == 0 { 2 } else { 1 }, 3) {
            run(first, &turns).await;
        }
    }
}

/// A claimant that fell asleep before its last request: others claimed the session meanwhile, closed it, and all of it was collected. The number is
/// free again.
#[tokio::test]
async fn a_claim_that_comes_after_all_was_collected_means_nothing() {
    let (objects, _) = begun().await;
    let memory = copy(&objects).await;
    let door = Door::new(&memory);
    let slow = Writer::begin(&door.store(), "slow").await.unwrap();
    door.hold();
    let epoch = |at: &Path| at.as_ref().contains("/sessions/test/a/");
    let asleep = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = Arc::clone(&asleep);
    door.rule(move |_, verb, at| {
        if verb == actors::Verb::Put && epoch(at) {
            seen.store(true, std::sync::atomic::Ordering::SeqCst);
            return actors::Fate::Late;
        }
        actors::Fate::Done
    });
    let claim = tokio::spawn(async move { slow.claim(&name("a")).await });
    while !claim.is_finished() {
        while door.waiting() > 0 {
            door.let_through(0);
        }
        tokio::task::yield_now().await;
    }
    assert!(asleep.load(std::sync::atomic::Ordering::SeqCst) && claim.await.unwrap().is_err());
    let again = Door::new(&memory);
    let slower = Writer::begin(&again.store(), "slower").await.unwrap();
    again.hold();
    let claim = tokio::spawn(async move { slower.claim(&name("a")).await });
    // Its epoch, the log, the seal, the session: all but the create.
    for _ in 0..7 {
        settle().await;
        while again.waiting() > 0 {
            again.let_through(0);
        }
    }
    settle().await;
    assert_eq!(again.waiting(), 1);
    let store = Door::new(&memory).store();
    let closes = Writer::begin(&store, "closes").await.unwrap();
    closes.claim(&name("a")).await.unwrap();
    closes.commit(vec![Step::end(name("a"), None, End::Closed)]).await.unwrap().remove(0).unwrap();
    for _ in 0..2 {
        collect(&store, false).await.unwrap();
    }
    assert!(actors::objects(&memory, "sessions/v1/sessions").await.is_empty());
    // One arrives that nobody waits for any more, and one that somebody does.
    again.free();
    let error = claim.await.unwrap().unwrap_err();
    assert!(matches!(error, SessionError::NoSuch(_)), "{error}");
    assert!(actors::objects(&memory, "sessions/v1/sessions").await.is_empty());
    door.arrive().await;
    assert!(matches!(closes.claim(&name("a")).await, Err(SessionError::NoSuch(_))));
    assert_eq!(store.list(None).await.unwrap(), []);
    collect(&store, false).await.unwrap();
    assert!(actors::objects(&memory, "sessions/v1/sessions").await.is_empty());
}

/// A collection beside a claim of what goes on, and of what was closed. What goes on stays whole; what was closed stays closed.
#[tokio::test]
async fn a_collection_takes_nothing_from_a_claim_in_any_order() {
    let (objects, mut engine) = begun().await;
    let memory = copy(&objects).await;
    // Epoch 2 in another log, with more; the first log is of no use any more, and one session is closed.
    let second = Writer::begin(&Door::new(&memory).store(), "second").await.unwrap();
    second.claim(&name("a")).await.unwrap();
    second.commit(vec![Step::append(name("a"), engine.step(13))]).await.unwrap().remove(0).unwrap();
    second.open(&name("c")).await.unwrap();
    let begin = Step::begin(name("c"), head(&[1]), None);
    second.commit(vec![begin]).await.unwrap().remove(0).unwrap();
    second.commit(vec![Step::end(name("c"), None, End::Closed)]).await.unwrap().remove(0).unwrap();
    second.tidy().await.unwrap();
    let objects = actors::objects(&memory, "sessions").await;
    let run = async |first: usize, turns: &[(usize, usize)]| {
        let memory = copy(&objects).await;
        let (engine, door) = (engine.clone(), Door::new(&memory));
        let claiming = actor(&memory, "x", |writer| async move {
            let closed = writer.claim(&name("c")).await;
            assert!(matches!(closed, Err(SessionError::Closed(_) | SessionError::NoSuch(_))), "{closed:?}");
            claims(writer, engine, None, 50).await
        });
        let claiming = claiming.await;
        let store = door.store();
        door.hold();
        let collecting = tokio::spawn(async move {
            let collected = collect(&store, false).await?;
            assert_eq!(collected.unreadable, Vec::<String>::new());
            Ok((0, Vec::new(), false))
        });
        let actors = [claiming, Actor { door, task: collecting }];
        let steps = play(&actors, first, turns).await;
        let [claiming, collecting] = actors;
        collecting.task.await.unwrap().unwrap();
        assert_eq!(claiming.task.await.unwrap().unwrap(), (3, vec![10, 11, 12, 13], true), "{turns:?}");
        let store = Door::new(&memory).store();
        collect(&store, false).await.unwrap();
        let found = store.inspect(&name("a")).await.unwrap();
        assert_eq!(found.session.unwrap().generated.0, [10, 11, 12, 13, 50]);
        assert!(matches!(store.inspect(&name("c")).await, Err(SessionError::NoSuch(_))));
        // Of the first two logs, only the seals are left: by them, their writers are refused. The third one goes on.
        let left = actors::objects(&memory, "sessions/v1/logs").await;
        assert_eq!(left.len(), 2 + 2, "{turns:?}: {left:?}");
        steps
    };
    let most = run(0, &[]).await.max(run(1, &[]).await);
    for first in 0..2 {
        for turns in schedules(most, 2, 2) {
            run(first, &turns).await;
        }
    }
}

/// A claim's create was lost, and the claim made again. The first create arrived just before the second one, which was told that this very writer
/// had been faster: nobody went on with the session.
#[tokio::test]
async fn a_claim_does_not_lose_to_an_earlier_try_of_its_own() {
    let (objects, engine) = begun().await;
    for since in [None, Some(1)] {
        let memory = copy(&objects).await;
        let door = Door::new(&memory);
        let slow = Writer::begin(&door.store(), "slow").await.unwrap();
        let is_create = |verb, at: &Path| verb == actors::Verb::Put && at.as_ref().contains("/sessions/test/a/");
        door.rule(move |_, verb, at| if is_create(verb, at) { actors::Fate::Late } else { actors::Fate::Done });
        assert!(slow.claim(&name("a")).await.is_err());
        let late = Arc::clone(&door);
        door.rule(move |_, verb, at| {
            if is_create(verb, at) {
                late.arrive().now_or_never().unwrap();
            }
            actors::Fate::Done
        });
        assert_eq!(claims(slow, engine.clone(), since, 50).await.unwrap(), (3, vec![10, 11, 12], true));
    }
}

/// An opening's create was lost, and made again. The session moved on, was closed, and was collected with the log that it began in; then the first
/// create arrived. The session was there again, as one that had never begun.
#[tokio::test]
async fn an_opening_that_comes_after_all_was_collected_means_nothing() {
    let memory = Arc::new(InMemory::new());
    let door = Door::new(&memory);
    let store = Door::new(&memory).store();
    let opens = Writer::begin(&door.store(), "opens").await.unwrap();
    door.rule(|_, verb, _| if verb == actors::Verb::Put { actors::Fate::Late } else { actors::Fate::Done });
    assert!(opens.open(&name("a")).await.is_err());
    door.rule(|_, _, _| actors::Fate::Done);
    opens.open(&name("a")).await.unwrap();
    opens.commit(vec![Step::begin(name("a"), head(&[1]), None)]).await.unwrap().remove(0).unwrap();
    let closes = Writer::begin(&store, "closes").await.unwrap();
    closes.claim(&name("a")).await.unwrap();
    closes.commit(vec![Step::end(name("a"), None, End::Closed)]).await.unwrap().remove(0).unwrap();
    for _ in 0..2 {
        collect(&store, false).await.unwrap();
    }
    assert!(actors::objects(&memory, "sessions/v1/sessions").await.is_empty());
    assert_eq!(door.arrive().await, 1);
    assert!(matches!(closes.open(&name("a")).await, Err(SessionError::Closed(_))));
    // Its first writer was sealed, and does not know it yet: nothing of what it opens would be there.
    assert!(matches!(opens.open(&name("b")).await, Err(SessionError::Broken(_))));
    for _ in 0..2 {
        let claimed = closes.claim(&name("a")).await;
        assert!(matches!(claimed, Err(SessionError::NoSuch(_))), "{claimed:?}");
        assert!(matches!(store.inspect(&name("a")).await, Err(SessionError::NoSuch(_))));
        collect(&store, false).await.unwrap();
        assert!(actors::objects(&memory, "sessions/v1/sessions").await.is_empty());
    }
}

/// The same, where the log goes on: its writer knows which of its sessions were closed.
#[tokio::test]
async fn an_opening_that_comes_after_its_own_writer_closed_the_session_means_nothing() {
    let memory = Arc::new(InMemory::new());
    let store = Door::new(&memory).store();
    let writer = Writer::begin(&store, "writer").await.unwrap();
    writer.open(&name("a")).await.unwrap();
    let opened = actors::objects(&memory, "sessions/v1/sessions").await;
    writer.commit(vec![Step::begin(name("a"), head(&[1]), None)]).await.unwrap().remove(0).unwrap();
    writer.commit(vec![Step::end(name("a"), None, End::Closed)]).await.unwrap().remove(0).unwrap();
    writer.tidy().await.unwrap();
    collect(&store, false).await.unwrap();
    for (location, bytes) in opened {
        memory.put(&location, bytes.into()).await.unwrap();
    }
    for claims in [&writer, &Writer::begin(&store, "other").await.unwrap()] {
        assert!(matches!(claims.claim(&name("a")).await, Err(SessionError::Closed(_))));
    }
    for _ in 0..2 {
        collect(&store, false).await.unwrap();
    }
    assert!(actors::objects(&memory, "sessions/v1/sessions").await.is_empty());
}
