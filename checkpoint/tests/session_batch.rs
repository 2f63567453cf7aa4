//! Many callers before one writer: nobody is refused for what others brought, and nobody waits for who has gone.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failure here is a failed test")]

#[allow(dead_code, reason = "other tests use the rest")]
mod actors;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use actors::{Door, head, ids, name};
use futures::future::join_all;
use futures::task::noop_waker_ref;
use kvstore_checkpoint::sessions::{Append, Batch, Broken, Data, NewPiece, SessionError, Step, Writer};
use object_store::memory::InMemory;

fn large(id: &str, data: &bytes::Bytes) -> Step {
    let piece = NewPiece { group: 0, rank: 0, start: 0, tokens: 1, data: Data::Inline(data.clone()) };
    Step::append(name(id), Append { pieces: vec![piece], ..ids(1, &[]) })
}

async fn opened(writer: &Writer, names: &[String]) {
    for id in names {
        writer.open(&name(id)).await.unwrap();
    }
    let steps = names.iter().map(|id| Step::begin(name(id), head(&[1]), None)).collect();
    assert!(writer.commit(steps).await.unwrap().iter().all(Result::is_ok));
}

/// A group took all that waited, and the last ones of it were told that their steps were too large, though each was small.
#[tokio::test]
async fn a_group_that_is_full_leaves_the_rest_to_the_next() {
    let memory = Arc::new(InMemory::new());
    let writer = Writer::begin(&Door::new(&memory).store(), "writer").await.unwrap();
    let names: Vec<String> = (0..12).map(|at| format!("s{at}")).collect();
    opened(&writer, &names).await;
    let batch = Batch::new(writer);
    let data = bytes::Bytes::from(vec![5; 8 << 20]);
    let answers = join_all(names.iter().map(|id| batch.step(large(id, &data)))).await;
    let numbers: Vec<u64> = answers.into_iter().map(|answer| answer.unwrap().unwrap().number).collect();
    assert_eq!(numbers, [[2; 7].as_slice(), &[3; 5]].concat());
}

/// The queue was bounded by its steps, each of which may have eight megabytes.
#[tokio::test]
async fn what_waits_is_bounded_in_bytes() {
    let memory = Arc::new(InMemory::new());
    let door = Door::new(&memory);
    let writer = Writer::begin(&door.store(), "writer").await.unwrap();
    opened(&writer, &["a".to_owned()]).await;
    door.hold();
    let batch = Batch::new(writer);
    let small = (0..9).map(|_| batch.step(Step::append(name("a"), ids(1, &[]))));
    let mut small: Vec<_> = small.map(Box::pin).collect();
    let poll = |step: &mut (dyn Future<Output = _> + Unpin)| {
        std::pin::Pin::new(step).poll(&mut Context::from_waker(noop_waker_ref()))
    };
    small.iter_mut().for_each(|step| assert!(poll(step).is_pending()));
    while door.waiting() < 8 {
        tokio::task::yield_now().await;
    }
    let data = bytes::Bytes::from(vec![5; 8 << 20]);
    let mut more: Vec<_> = (0..40).map(|_| Box::pin(batch.step(large("b", &data)))).collect();
    let (mut waits, mut busy) = (0, 0);
    for step in &mut more {
        match poll(step) {
            Poll::Pending => waits += 1,
            Poll::Ready(Err(error)) => {
                assert!(matches!(&*error, SessionError::Busy { .. }), "{error}");
                busy += 1;
            }
            Poll::Ready(Ok(done)) => panic!("{done:?}"),
        }
    }
    assert_eq!((waits, busy), (31, 9), "256 MiB, with what a step takes beside its pieces");
    door.free();
}

/// The runtime that commits shut down. Who waited was told that the log was full, later callers waited for ever.
#[test]
fn whoever_waits_is_told_that_the_runtime_has_ended() {
    let commits = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let waits = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let memory = Arc::new(InMemory::new());
    let door = Door::new(&memory);
    let store = door.store();
    let writer = commits.block_on(async {
        let writer = Writer::begin(&store, "writer").await.unwrap();
        opened(&writer, &["a".to_owned()]).await;
        writer
    });
    let batch = Batch::new(writer);
    door.hold();
    let mut steps: Vec<_> = (0..10).map(|_| Box::pin(batch.step(Step::append(name("a"), ids(1, &[]))))).collect();
    {
        let _entered = commits.enter();
        for step in &mut steps {
            assert!(step.as_mut().poll(&mut Context::from_waker(noop_waker_ref())).is_pending());
        }
    }
    while door.waiting() < 8 {
        std::thread::yield_now();
    }
    commits.shutdown_timeout(std::time::Duration::from_secs(60));
    for step in steps {
        let error = waits.block_on(step).unwrap_err();
        assert!(matches!(&*error, SessionError::Gone), "{error}");
    }
    let next = pin!(batch.step(Step::append(name("a"), ids(1, &[]))));
    let error = waits.block_on(next).unwrap_err();
    assert!(matches!(&*error, SessionError::Broken(Broken::Failed { .. })), "{error}");
}
