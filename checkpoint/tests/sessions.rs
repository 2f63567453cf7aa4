//! Lives of sessions: with their writers killed, refused and late, and read back by others.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod actors;

use std::sync::Arc;
use std::time::Duration;

use actors::{Door, Engine, Fate, Verb, head, ids, name, objects};
use futures::StreamExt;
use futures::future::join_all;
use kvstore_checkpoint::sessions::{
    Acknowledged, Batch, Broken, Claimed, Data, End, NewPiece, Refusal, SessionError, Step, Store, Writer, collect,
};
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};

async fn writer(store: &Store, name: &str) -> Writer {
    Writer::begin(store, name).await.unwrap()
}

async fn one(writer: &Writer, step: Step) -> Acknowledged {
    writer.commit(vec![step]).await.unwrap().remove(0).unwrap()
}

/// A session with some tokens of an engine.
async fn begun(writer: &Writer, id: &str, engine: &mut Engine, tokens: u32) {
    writer.open(&name(id)).await.unwrap();
    let prompt = engine.tokens.clone();
    one(writer, Step::begin(name(id), head(&prompt), Some(engine.step(100)))).await;
    for token in 1..tokens {
        let acknowledged = one(writer, Step::append(name(id), engine.step(100 + token))).await;
        assert_eq!(
            (acknowledged.tokens, acknowledged.valid_tokens),
            (engine.tokens.len() as u64, engine.tokens.len() as u64 - 1)
        );
    }
}

#[tokio::test]
async fn a_session_goes_on_elsewhere_after_any_number_of_tokens() {
    for tokens in [1, 2, 3, 4, 7, 8, 9, 31, 32, 33, 100] {
        let memory = Arc::new(InMemory::new());
        let mut engine = Engine::new(&[1, 2, 3, 4, 5, 6], 64);
        let first = writer(&Door::new(&memory).store(), "first").await;
        begun(&first, "a", &mut engine, tokens).await;
        let door = Door::new(&memory);
        let second = writer(&door.store(), "second").await;
        let before = door.count();
        let claimed = second.claim(&name("a")).await.unwrap();
        let requests = door.count() - before;
        engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
        assert_eq!(claimed.epoch, 2);
        // Epochs, a listing, a seal, the last entries, the records, the pieces, an epoch, a look.
        assert!(requests <= 2 + 1 + 1 + 24 + 14 + 8 + 2, "{requests}");
        // It goes on, and goes on again from there.
        for token in 0..5 {
            one(&second, Step::append(name("a"), engine.step(500 + token))).await;
        }
        let third = writer(&Door::new(&memory).store(), "third").await;
        let claimed = third.claim(&name("a")).await.unwrap();
        engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
        assert_eq!(claimed.session.unwrap().epoch, 2);
    }
}

/// The writer is thought to be dead, and lives.
#[tokio::test]
async fn a_zombie_is_refused_and_gets_back_what_nobody_claimed() {
    let memory = Arc::new(InMemory::new());
    let (mut one_engine, mut other) = (Engine::new(&[1], 8), Engine::new(&[2, 3], 8));
    let zombie = writer(&Door::new(&memory).store(), "zombie").await;
    begun(&zombie, "a", &mut one_engine, 5).await;
    begun(&zombie, "b", &mut other, 5).await;
    let store = Door::new(&memory).store();
    let claimant = writer(&store, "claimant").await;
    claimant.claim(&name("a")).await.unwrap();
    let error = zombie.commit(vec![Step::append(name("a"), one_engine.clone().step(9))]).await.unwrap_err();
    assert!(matches!(&error, SessionError::Broken(Broken::Sealed { by, .. }) if by.writer == "claimant"), "{error}");
    assert!(zombie.commit(vec![]).await.is_err() && zombie.claim(&name("c")).await.is_err());
    let again = writer(&Door::new(&memory).store(), "again").await;
    let mut lost = Vec::new();
    for (name, epoch) in zombie.sessions() {
        match again.reclaim(&name, epoch).await {
            Ok(claimed) => other.check(claimed.session.as_ref().unwrap(), &claimed.pieces),
            Err(SessionError::Taken { name, epoch: 2, writer, .. }) if writer == "claimant" => lost.push(name),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(lost, [name("a")]);
    one(&again, Step::append(name("b"), other.step(9))).await;
    one(&claimant, Step::append(name("a"), one_engine.step(9))).await;
}

#[tokio::test]
async fn one_session_moves_and_the_others_stay() {
    let memory = Arc::new(InMemory::new());
    let (mut moving, mut staying) = (Engine::new(&[1], 8), Engine::new(&[2], 8));
    let first = writer(&Door::new(&memory).store(), "first").await;
    begun(&first, "a", &mut moving, 6).await;
    begun(&first, "b", &mut staying, 3).await;
    let last = moving.step(77);
    one(&first, Step::end(name("a"), Some(last), End::Moved)).await;
    // Long after.
    for token in 0..40 {
        one(&first, Step::append(name("b"), staying.step(token))).await;
    }
    let second = writer(&Door::new(&memory).store(), "second").await;
    let claimed = second.claim(&name("a")).await.unwrap();
    moving.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    one(&first, Step::append(name("b"), staying.step(9))).await;
    let refused = first.commit(vec![Step::append(name("a"), moving.clone().step(1))]).await.unwrap().remove(0);
    assert_eq!(refused, Err(Refusal::NotOwned(name("a"))));
    // And back, into the log that it left.
    one(&second, Step::end(name("a"), Some(moving.step(78)), End::Moved)).await;
    let claimed = first.claim(&name("a")).await.unwrap();
    moving.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    one(&first, Step::end(name("a"), Some(moving.step(79)), End::Moved)).await;
    let claimed = first.claim(&name("a")).await.unwrap();
    moving.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    assert!(first.broken().is_none() && second.broken().is_none());
}

#[tokio::test]
async fn a_session_that_closed_is_not_claimed() {
    let memory = Arc::new(InMemory::new());
    let store = Door::new(&memory).store();
    let (mut closing, mut staying) = (Engine::new(&[1], 8), Engine::new(&[2], 8));
    let first = writer(&store, "first").await;
    begun(&first, "a", &mut closing, 3).await;
    begun(&first, "b", &mut staying, 3).await;
    one(&first, Step::end(name("a"), None, End::Closed)).await;
    let second = writer(&store, "second").await;
    for far in [0, 60] {
        for token in 0..far {
            one(&first, Step::append(name("b"), staying.step(token))).await;
        }
        let error = second.claim(&name("a")).await.unwrap_err();
        assert!(matches!(error, SessionError::Closed(_)), "{error}");
        assert!(first.broken().is_none(), "nobody is sealed for that");
        assert_eq!(store.inspect(&name("a")).await.unwrap().ends, Some(End::Closed));
    }
    assert!(matches!(first.open(&name("a")).await, Err(SessionError::Exists(_))));
    first.tidy().await.unwrap();
    assert!(matches!(second.claim(&name("a")).await, Err(SessionError::Closed(_))));
    assert!(matches!(first.open(&name("a")).await, Err(SessionError::Closed(_))));
    let listed = store.list(Some("test")).await.unwrap();
    let holders: Vec<bool> = listed.iter().map(|listed| listed.holder.is_some()).collect();
    assert_eq!((listed[0].name.id(), holders), ("a", vec![false, true]));
    assert!(store.list(Some("other")).await.unwrap().is_empty() && store.list(Some("..")).await.is_err());
}

#[tokio::test]
async fn what_does_not_follow_is_refused_and_the_rest_is_made() {
    let memory = Arc::new(InMemory::new());
    let writer = writer(&Door::new(&memory).store(), "writer").await;
    let (mut engine, mut other) = (Engine::new(&[1, 2], 8), Engine::new(&[3], 8));
    begun(&writer, "a", &mut engine, 5).await;
    begun(&writer, "b", &mut other, 5).await;
    let good = engine.clone().step(1);
    let wrong = |change: &dyn Fn(&mut kvstore_checkpoint::sessions::Append)| {
        let mut append = good.clone();
        change(&mut append);
        Step::append(name("a"), append)
    };
    let long = vec![0; 9 << 20];
    let cases: Vec<(Step, &str)> = vec![
        (wrong(&|append| append.start += 1), "leaves a gap"),
        (wrong(&|append| append.start -= 1), "overlaps"),
        (wrong(&|append| append.valid_tokens += 1), "KV of 8 tokens"),
        (wrong(&|append| append.delivered = 99), "the client is said to have 99"),
        (wrong(&|append| append.delivered = 0), "the client is said to have 0"),
        (wrong(&|append| append.pieces.clear()), "KV of 7 tokens"),
        (wrong(&|append| append.pieces[0].group = 2), "group 2, rank 0 is none"),
        (wrong(&|append| append.pieces[0].start += 1), "what is there ends at"),
        (wrong(&|append| append.pieces[0].tokens = 99), "99 tokens"),
        (wrong(&|append| append.pieces[0].data = Data::Inline(long.clone().into())), "a piece of"),
        (wrong(&|append| append.pieces[0].data = Data::Inline(Default::default())), "a piece of 0"),
        (wrong(&|append| append.blocks = vec![actors::block(1, 0), actors::block(2, 0)]), "it ends at token 12"),
        (wrong(&|append| append.blocks = vec![actors::block(0, 0)]), "it comes after block 0"),
        (Step::append(name("c"), good.clone()), "does not own"),
        (Step::begin(name("a"), head(&[1]), None), "has begun"),
    ];
    for (step, says) in cases {
        let next = Step::append(name("b"), other.step(7));
        let answers = writer.commit(vec![step, next.clone(), next]).await.unwrap();
        let refused = answers[0].as_ref().unwrap_err().to_string();
        assert!(refused.contains(says), "{refused:?} does not say {says:?}");
        assert!(answers[1].is_ok());
        assert_eq!(answers[2], Err(Refusal::Twice(name("b"))));
    }
    let piece = |start| NewPiece { group: 0, rank: 0, start, tokens: 1, data: Data::Inline(vec![1].into()) };
    writer.open(&name("n")).await.unwrap();
    assert!(writer.commit(vec![Step::append(name("n"), ids(0, &[1]))]).await.unwrap()[0].is_err());
    let too_many = Step::begin(
        name("n"),
        head(&[1, 2]),
        Some(kvstore_checkpoint::sessions::Append { pieces: vec![piece(1)], ..ids(2, &[]) }),
    );
    assert!(writer.commit(vec![too_many]).await.unwrap()[0].is_err());
    one(&writer, Step::append(name("a"), engine.step(1))).await;
    let second = Writer::begin(&Door::new(&memory).store(), "second").await.unwrap();
    for (id, engine) in [("a", engine), ("b", other)] {
        let claimed = second.claim(&name(id)).await.unwrap();
        engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    }
    assert!(second.claim(&name("n")).await.unwrap().session.is_none(), "opened, and never begun");
    one(&second, Step::begin(name("n"), head(&[1, 2]), None)).await;
}

/// One that nothing was appended to for long is found as soon as others.
#[tokio::test]
async fn idle_sessions_are_found_with_few_requests() {
    let memory = Arc::new(InMemory::new());
    let first = writer(&Door::new(&memory).store(), "first").await;
    let (mut idle, mut busy) = (Engine::new(&[1], 8), Engine::new(&[2], 8));
    begun(&first, "idle", &mut idle, 3).await;
    begun(&first, "busy", &mut busy, 150).await;
    for commits in 0..20 {
        let door = Door::new(&memory);
        let store = door.store();
        let inspected = store.inspect(&name("idle")).await.unwrap();
        assert_eq!(inspected.session.unwrap().generated.0, idle.tokens[1..]);
        assert!(door.count() <= 2 + 1 + 24 + 3 + 2, "{} after {commits}", door.count());
        one(&first, Step::append(name("busy"), busy.step(1))).await;
    }
}

/// Bytes in the store, against ids and KV: a token at a time, in commits of one session and of many.
#[tokio::test]
async fn little_is_written_beside_ids_and_kv() {
    for sessions in [1, 16] {
        let memory = Arc::new(InMemory::new());
        let first = writer(&Door::new(&memory).store(), "first").await;
        let names: Vec<String> = (0..sessions).map(|at| format!("s{at}")).collect();
        let mut engines = vec![Engine::new(&[1, 2, 3], 2048); sessions];
        for (id, engine) in names.iter().zip(&mut engines) {
            begun(&first, id, engine, 1).await;
        }
        for token in 0..200 {
            let steps = names.iter().zip(&mut engines);
            let steps = steps.map(|(id, engine)| Step::append(name(id), engine.step(token))).collect();
            assert!(first.commit(steps).await.unwrap().iter().all(Result::is_ok));
        }
        let written: usize = objects(&memory, "sessions/v1/logs").await.iter().map(|(_, bytes)| bytes.len()).sum();
        // Of the tokens whose KV ends a block, the block itself has it, which lies elsewhere.
        let needed: usize =
            engines.iter().map(|engine| engine.tokens.len() * 4 + engine.tokens.len() * 3 / 4 * 2 * 2048).sum();
        assert!(written * 10 <= needed * 12, "{written} bytes for {needed}, of {sessions} sessions");
    }
}

/// Whatever one bit of one object becomes: what is claimed is what was written, or nothing is.
#[tokio::test]
async fn a_flipped_bit_is_never_a_wrong_token() {
    let memory = Arc::new(InMemory::new());
    let first = writer(&Door::new(&memory).store(), "first").await;
    let mut engine = Engine::new(&[1, 2, 3], 4);
    begun(&first, "a", &mut engine, 7).await;
    let (mut refused, mut right) = (0, 0);
    for (at, (location, bytes)) in objects(&memory, "sessions/v1").await.into_iter().enumerate() {
        for bit in (at % 3..bytes.len() * 8).step_by(11) {
            let fork = Arc::new(InMemory::new());
            for (location, bytes) in objects(&memory, "sessions/v1").await {
                fork.put(&location, bytes.into()).await.unwrap();
            }
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fork.put(&location, flipped.into()).await.unwrap();
            let second = writer(&Door::new(&fork).store(), "second").await;
            match second.claim(&name("a")).await {
                Ok(Claimed { session, pieces, .. }) => {
                    engine.check(session.as_ref().unwrap(), &pieces);
                    right += 1;
                }
                Err(SessionError::Damaged { .. }) => refused += 1,
                Err(error) => panic!("bit {bit} of {location}: {error}"),
            }
        }
    }
    assert!(refused > 100 && right > 0, "{refused} refused, {right} right");
}

/// A life of two sessions; returns what was acknowledged of the first, by its engine.
async fn life(store: &Store) -> (Option<Engine>, Engine) {
    let (mut acknowledged, mut appended) = (None, Engine::new(&[1, 2, 3], 8));
    let Ok(writer) = Writer::begin(store, "writer").await else { return (acknowledged, appended) };
    let mut is_open = writer.open(&name("a")).await.is_ok();
    let is_other = writer.open(&name("b")).await.is_ok();
    let mut other = Engine::new(&[9], 8);
    for token in 0..6 {
        if !is_open {
            break;
        }
        let next = appended.step(100 + token);
        let begins = token == 0;
        let step =
            if begins { Step::begin(name("a"), head(&[1, 2, 3]), Some(next)) } else { Step::append(name("a"), next) };
        let next = other.step(token);
        let second =
            if begins { Step::begin(name("b"), head(&[9]), Some(next)) } else { Step::append(name("b"), next) };
        let steps = if is_other { vec![step, second] } else { vec![step] };
        match writer.commit(steps).await {
            Ok(answers) if answers[0].is_ok() => acknowledged = Some(appended.clone()),
            _ => is_open = false,
        }
    }
    (acknowledged, appended)
}

/// What another one finds is at least what was acknowledged, and a beginning of what was appended.
async fn check_after(memory: &Arc<InMemory>, acknowledged: Option<&Engine>, appended: &Engine, context: &str) {
    let second = writer(&Door::new(memory).store(), "second").await;
    let found = match second.claim(&name("a")).await {
        Ok(Claimed { session, .. }) => session.map(|session| session.generated.0),
        Err(SessionError::NoSuch(_)) => None,
        Err(error) => panic!("{context}: {error}"),
    };
    let (least, most) = (acknowledged.map(|engine| &engine.tokens[3..]), &appended.tokens[3..]);
    match found {
        None => assert!(least.is_none(), "{context}: nothing is there"),
        Some(found) => {
            assert!(found.starts_with(least.unwrap_or_default()), "{context}: {found:?} is less than {least:?}");
            assert!(most.starts_with(&found), "{context}: {found:?} is no beginning of {most:?}");
        }
    }
}

#[tokio::test]
async fn a_writer_may_be_killed_before_and_after_each_of_its_requests() {
    let memory = Arc::new(InMemory::new());
    let door = Door::new(&memory);
    let (all, _) = life(&door.store()).await;
    assert_eq!(all.unwrap().tokens.len(), 9);
    let requests = door.count();
    for fate in [Fate::Refused, Fate::Killed, Fate::Late] {
        for killed in 0..requests {
            let memory = Arc::new(InMemory::new());
            let door = Door::new(&memory);
            door.rule(move |number, verb, _| match number.cmp(&killed) {
                std::cmp::Ordering::Less => Fate::Done,
                std::cmp::Ordering::Equal if fate != Fate::Late || verb == Verb::Put => fate,
                _ => Fate::Refused,
            });
            let (acknowledged, appended) = life(&door.store()).await;
            let context = format!("{fate:?} at request {killed}");
            let before = killed % 2 == 0;
            if before {
                door.arrive().await;
            }
            check_after(&memory, acknowledged.as_ref(), &appended, &context).await;
            if !before {
                // It arrives after others took over: it counts for nothing.
                door.arrive().await;
                let third = writer(&Door::new(&memory).store(), "third").await;
                if let Ok(claimed) = third.claim(&name("a")).await {
                    let found = claimed.session.map(|session| session.generated.0).unwrap_or_default();
                    assert!(appended.tokens[3..].starts_with(&found), "{context}");
                    assert!(found.len() <= acknowledged.map_or(0, |engine| engine.tokens.len() - 3) + 1, "{context}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_lost_answer_of_each_request_changes_nothing() {
    let memory = Arc::new(InMemory::new());
    let door = Door::new(&memory);
    life(&door.store()).await;
    let requests = door.count();
    let each = (0..requests).map(|lost| async move {
        let memory = Arc::new(InMemory::new());
        let door = Door::new(&memory);
        door.rule(move |number, _, _| if number == lost { Fate::Lost } else { Fate::Done });
        let (acknowledged, appended) = life(&door.store()).await;
        let tokens = acknowledged.map(|engine| engine.tokens);
        assert_eq!(tokens.as_ref(), Some(&appended.tokens), "request {lost}");
        // The claimant's, too.
        for lost in 0..20 {
            let door = Door::new(&memory);
            let second = writer(&door.store(), "second").await;
            door.rule(move |number, _, _| if number == lost { Fate::Lost } else { Fate::Done });
            let claimed = second.claim(&name("a")).await.unwrap();
            assert_eq!(claimed.session.unwrap().generated.0, appended.tokens[3..]);
            if lost >= door.count() {
                break;
            }
        }
    });
    join_all(each).await;
}

/// Commits under way at once, of which some are not there when the log is sealed: what is behind the first hole was never acknowledged.
#[tokio::test]
async fn entries_behind_a_hole_count_for_nothing() {
    for hole in 0..6_usize {
        for arrives_before in [false, true] {
            let memory = Arc::new(InMemory::new());
            let door = Door::new(&memory);
            let mut engine = Engine::new(&[1, 2, 3], 8);
            let first = writer(&door.store(), "first").await;
            begun(&first, "a", &mut engine, 2).await;
            let known = engine.tokens.clone();
            door.hold();
            let commits: Vec<_> = (0..6)
                .map(|token| {
                    let (first, step) = (first.clone(), Step::append(name("a"), engine.step(token)));
                    tokio::spawn(async move { first.commit(vec![step]).await })
                })
                .collect();
            while door.waiting() < 6 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // All but one arrive.
            for at in (0..6).rev().filter(|at| *at != hole) {
                door.let_through(at);
                tokio::task::yield_now().await;
            }
            while count(&memory).await < 1 + 3 + 5 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            if arrives_before {
                door.let_through(0);
                while count(&memory).await < 1 + 3 + 6 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            let second = writer(&Door::new(&memory).store(), "second").await;
            let claimed = second.claim(&name("a")).await.unwrap().session.unwrap();
            let there = if arrives_before { 6 } else { hole };
            assert_eq!(claimed.generated.0, engine.tokens[3..known.len() + there]);
            // What waited is let through.
            door.free();
            let answers = join_all(commits).await;
            for (at, answer) in answers.into_iter().enumerate() {
                let is_acknowledged = answer.unwrap().is_ok_and(|answers| answers[0].is_ok());
                assert_eq!(is_acknowledged, at < there, "commit {at} with a hole at {hole}");
            }
            // The next one goes on from there, whatever lies behind the seal.
            let third = writer(&Door::new(&memory).store(), "third").await;
            let again = third.claim(&name("a")).await.unwrap().session.unwrap();
            assert_eq!(again.generated, claimed.generated);
        }
    }
}

async fn count(memory: &InMemory) -> usize {
    memory.list(None).count().await
}

/// A commit whose future is dropped is there or not, and the session's next one follows it either way.
#[tokio::test]
async fn a_dropped_commit_is_not_in_the_way() {
    let memory = Arc::new(InMemory::new());
    let first = writer(&Door::new(&memory).store(), "first").await;
    let mut engine = Engine::new(&[1], 8);
    begun(&first, "a", &mut engine, 2).await;
    for polls in 0..4 {
        let mut commit = Box::pin(first.commit(vec![Step::append(name("a"), engine.step(polls))]));
        // Polled once, its place in the log is fixed.
        for _ in 0..=polls {
            if futures::poll!(&mut commit).is_ready() {
                break;
            }
        }
        drop(commit);
    }
    first.flush().await.unwrap();
    one(&first, Step::append(name("a"), engine.step(9))).await;
    let second = writer(&Door::new(&memory).store(), "second").await;
    let claimed = second.claim(&name("a")).await.unwrap();
    engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    // A claim, dropped after any of its requests, is made again.
    let door = Door::new(&memory);
    let third = writer(&door.store(), "third").await;
    door.hold();
    for requests in 0..12 {
        let name = name("a");
        let mut claim = Box::pin(third.claim(&name));
        for _ in 0..requests {
            if futures::poll!(&mut claim).is_ready() {
                break;
            }
            while door.waiting() > 0 {
                door.let_through(0);
            }
        }
        drop(claim);
        door.hold();
    }
    door.free();
    let claimed = match third.claim(&name("a")).await {
        Err(SessionError::Owned(_)) => None,
        claimed => Some(claimed.unwrap()),
    };
    if let Some(claimed) = claimed {
        engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    }
    one(&third, Step::append(name("a"), engine.step(10))).await;
}

/// A claimant that needs two requests for each number does not run after a writer that needs one.
#[tokio::test]
async fn a_writer_that_goes_on_is_sealed_nevertheless() {
    let memory = Arc::new(InMemory::new());
    let first = writer(&Door::new(&memory).store(), "first").await;
    let mut engine = Engine::new(&[1], 8);
    begun(&first, "a", &mut engine, 2).await;
    let door = Door::new(&memory);
    let second = writer(&door.store(), "second").await;
    door.hold();
    let claim = tokio::spawn(async move { second.claim(&name("a")).await.unwrap() });
    let mut commits = 0;
    let claimed = loop {
        if claim.is_finished() {
            break claim.await.unwrap();
        }
        // Whenever the claimant asks for anything, the writer commits before it.
        if door.waiting() > 0 {
            let commit = first.commit(vec![Step::append(name("a"), engine.clone().step(commits))]).await;
            if commit.is_ok_and(|answers| answers[0].is_ok()) {
                engine.step(commits);
                commits += 1;
            }
            door.let_through(0);
        }
        tokio::task::yield_now().await;
        assert!(commits < 1000, "it is not sealed");
    };
    engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    assert!(matches!(first.broken(), Some(Broken::Sealed { .. })));
}

#[tokio::test]
async fn many_callers_share_commits() {
    let memory = Arc::new(InMemory::new());
    let door = Door::new(&memory);
    let first = writer(&door.store(), "first").await;
    let names: Vec<String> = (0..64).map(|at| format!("s{at}")).collect();
    let mut engines = vec![Engine::new(&[1], 8); names.len()];
    for (id, engine) in names.iter().zip(&mut engines) {
        begun(&first, id, engine, 1).await;
    }
    let (batch, before) = (Batch::new(first.clone()), door.count());
    for token in 0..10 {
        // Two for each, without waiting: in a commit each, in their order.
        let steps = names.iter().zip(&mut engines).flat_map(|(id, engine)| {
            [engine.step(token), engine.step(token + 50)].map(|append| Step::append(name(id), append))
        });
        let answers = join_all(steps.map(|step| batch.step(step))).await;
        assert!(answers.into_iter().all(|answer| answer.unwrap().is_ok()));
    }
    assert!(door.count() - before <= 40, "{} requests for 1280 steps", door.count() - before);
    let second = writer(&Door::new(&memory).store(), "second").await;
    for (id, engine) in names.iter().zip(&engines) {
        let claimed = second.claim(&name(id)).await.unwrap();
        engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    }
    let error = batch.step(Step::append(name("s0"), engines[0].step(1))).await;
    assert!(error.is_err_and(|error| matches!(&*error, SessionError::Broken(Broken::Sealed { .. }))));
}

/// A log goes once nothing needs it, and its writer stays refused. A claim that has written nothing yet still needs the log that it found.
#[tokio::test]
async fn a_log_goes_when_nothing_needs_it_and_its_seal_stays() {
    let memory = Arc::new(InMemory::new());
    let mut engine = Engine::new(&[1, 2, 3], 8);
    let zombie = writer(&Door::new(&memory).store(), "zombie").await;
    begun(&zombie, "a", &mut engine, 9).await;
    let of_zombie = format!("sessions/v1/logs/{}", zombie.log());
    // Two claims in a row that write nothing.
    let second = writer(&Door::new(&memory).store(), "second").await;
    second.claim(&name("a")).await.unwrap();
    let third = writer(&Door::new(&memory).store(), "third").await;
    third.claim(&name("a")).await.unwrap();
    let store = Door::new(&memory).store();
    let collected = collect(&store, false).await.unwrap();
    assert_eq!((collected.sessions, collected.gone_logs), (1, 1), "the second one's, which has nothing");
    assert_eq!(objects(&memory, &of_zombie).await.len(), 1 + 9 + 1);
    let fourth = writer(&Door::new(&memory).store(), "fourth").await;
    let claimed = fourth.claim(&name("a")).await.unwrap();
    engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    one(&fourth, Step::append(name("a"), engine.step(7))).await;
    let before = objects(&memory, "sessions/v1/logs").await;
    let dry = collect(&store, true).await.unwrap();
    assert_eq!(objects(&memory, "sessions/v1/logs").await, before);
    let collected = collect(&store, false).await.unwrap();
    assert_eq!(collected, dry);
    assert_eq!(
        (collected.gone_logs, collected.gone_objects),
        (2, 10 + 1),
        "the first one's entries, and the third one's beginning"
    );
    let left = objects(&memory, &of_zombie).await;
    assert!(left.len() == 1 && left[0].0.as_ref().ends_with("/00000000000000000010"), "its seal: {left:?}");
    for _ in 0..2 {
        assert_eq!(collect(&store, false).await.unwrap().gone_objects, 0);
    }
    let error = zombie.commit(vec![Step::end(name("a"), None, End::Moved)]).await.unwrap_err();
    assert!(matches!(error, SessionError::Broken(Broken::Sealed { .. })), "{error}");
    let fifth = writer(&Door::new(&memory).store(), "fifth").await;
    let claimed = fifth.claim(&name("a")).await.unwrap();
    engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    // It closes, and nothing stays but seals.
    one(&fifth, Step::end(name("a"), None, End::Closed)).await;
    fifth.end().await.unwrap();
    for _ in 0..3 {
        collect(&store, false).await.unwrap();
    }
    assert!(objects(&memory, "sessions/v1/sessions").await.is_empty());
    assert_eq!(objects(&memory, "sessions/v1/logs").await.len(), 4, "one for each writer that was refused");
}

/// As many appends as a log has entries: the last one is the seal's, and what there is is read with few requests.
#[tokio::test]
async fn a_full_log_is_gone_on_with_in_another() {
    let memory = Arc::new(InMemory::new());
    let first = writer(&Door::new(&memory).store(), "first").await;
    first.open(&name("a")).await.unwrap();
    one(&first, Step::begin(name("a"), head(&[]), None)).await;
    let mut tokens = 0;
    let error = loop {
        match first.commit(vec![Step::append(name("a"), ids(u64::from(tokens), &[tokens]))]).await {
            Ok(answers) => assert!(answers[0].is_ok()),
            Err(error) => break error,
        }
        tokens += 1;
        assert_eq!(first.is_due(), tokens + 2 >= 6144);
    };
    assert!(matches!(error, SessionError::Broken(Broken::Full(_))), "{error}");
    assert_eq!(tokens, 8192 - 3, "its beginning, the session's, and the seal");
    let door = Door::new(&memory);
    let second = writer(&door.store(), "second").await;
    let claimed = second.claim(&name("a")).await.unwrap().session.unwrap();
    assert_eq!(claimed.generated.0, (0..tokens).collect::<Vec<u32>>());
    assert!(door.count() <= 2 + 1 + 1 + 24 + 14 + 2, "{}", door.count());
    one(&second, Step::append(name("a"), ids(u64::from(tokens), &[1]))).await;
}

#[tokio::test]
async fn sessions_live_in_a_folder_too() {
    let at = tempfile::tempdir().unwrap();
    let url = kvstore_bucket::ObjectUrl { url: format!("file://{}", at.path().display()), options: Vec::new() };
    let store = Store::open(&url).unwrap();
    let first = writer(&store, "first").await;
    let mut engine = Engine::new(&[1, 2, 3], 8);
    begun(&first, "a", &mut engine, 20).await;
    drop(first);
    let store = Store::open(&url).unwrap();
    let second = writer(&store, "second").await;
    let claimed = second.claim(&name("a")).await.unwrap();
    engine.check(claimed.session.as_ref().unwrap(), &claimed.pieces);
    one(&second, Step::end(name("a"), Some(engine.step(1)), End::Closed)).await;
    second.end().await.unwrap();
    for _ in 0..3 {
        collect(&store, false).await.unwrap();
    }
    assert!(store.list(None).await.unwrap().is_empty());
}

/// A writer with all its entries under way commits eight times while a claimant makes one request. Each round of seals reached sixteen entries ahead
/// and read each of their bodies: it was never sealed, as far as its log went. What it wrote meanwhile is found, wherever it lies.
#[tokio::test]
async fn a_writer_that_goes_on_with_a_full_pipeline_is_sealed_nevertheless() {
    for closes_at in [None, Some(2), Some(26), Some(28), Some(29), Some(30), Some(31)] {
        let memory = Arc::new(InMemory::new());
        let first = writer(&Door::new(&memory).store(), "first").await;
        for id in ["a", "b"] {
            first.open(&name(id)).await.unwrap();
            one(&first, Step::begin(name(id), head(&[]), None)).await;
        }
        let door = Door::new(&memory);
        let second = writer(&door.store(), "second").await;
        door.rule(|_, _, _| Fate::Done);
        door.hold();
        let claim = tokio::spawn(async move { second.claim(&name("a")).await });
        let (mut tokens, mut is_closed) = (0, false);
        while !claim.is_finished() {
            if door.waiting() > 0 {
                if closes_at.is_some_and(|at| at == door.count()) {
                    let closed = first.commit(vec![Step::end(name("a"), None, End::Closed)]).await;
                    is_closed |= closed.is_ok_and(|answers| answers[0].is_ok());
                }
                for _ in 0..8 {
                    let append = ids(u64::from(tokens), &[tokens]);
                    let id = if closes_at.is_some() { "b" } else { "a" };
                    match first.commit(vec![Step::append(name(id), append)]).await {
                        Ok(answers) if answers[0].is_ok() => tokens += 1,
                        _ => break,
                    }
                }
                door.let_through(0);
            }
            tokio::task::yield_now().await;
            assert!(tokens < 1000, "it is not sealed");
        }
        let claimed = claim.await.unwrap();
        if closes_at.is_some() {
            assert_eq!(is_closed, matches!(claimed, Err(SessionError::Closed(_))), "{closes_at:?}: {claimed:?}");
            continue;
        }
        assert!(door.count() < 150, "{} requests", door.count());
        let found = claimed.unwrap().session.unwrap();
        assert_eq!(found.generated.0, (0..tokens).collect::<Vec<u32>>());
        assert!(matches!(first.broken(), Some(Broken::Sealed { .. })));
        let third = writer(&Door::new(&memory).store(), "third").await;
        assert_eq!(third.claim(&name("a")).await.unwrap().session.unwrap().generated, found.generated);
    }
}

/// A log with many sessions that closed long ago was read as a whole for each of them.
#[tokio::test]
async fn a_collection_reads_a_log_once() {
    const SESSIONS: u64 = 40;
    const ENTRIES: u64 = 100;
    let memory = Arc::new(InMemory::new());
    let store = Door::new(&memory).store();
    let first = writer(&store, "first").await;
    let names: Vec<_> = (0..SESSIONS).map(|at| name(&format!("s{at}"))).collect();
    for name in &names {
        first.open(name).await.unwrap();
    }
    first.open(&name("on")).await.unwrap();
    let begin = names.iter().map(|name| Step::begin(name.clone(), head(&[1]), None)).collect();
    assert!(first.commit(begin).await.unwrap().iter().all(Result::is_ok));
    let end = names.iter().map(|name| Step::end(name.clone(), None, End::Closed)).collect();
    assert!(first.commit(end).await.unwrap().iter().all(Result::is_ok));
    one(&first, Step::begin(name("on"), head(&[1]), None)).await;
    for _ in 0..ENTRIES {
        one(&first, Step::append(name("on"), ids(1, &[]))).await;
    }
    let door = Door::new(&memory);
    let collected = collect(&door.store(), false).await.unwrap();
    assert_eq!((collected.closed_sessions, collected.sessions), (SESSIONS, 1));
    // For each session a listing, an epoch, and another one that says that it closed.
    assert!(door.count() <= 3 * SESSIONS + 2 * ENTRIES, "{} requests", door.count());
}
