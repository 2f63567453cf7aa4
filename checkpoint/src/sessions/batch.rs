//! Appends of many callers as few commits: what waits when an entry may be written goes with it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::error::{Refusal, SessionError};
use super::live::{Acknowledged, BODY_BYTES_MAX, Step};
use super::writer::Writer;
use crate::caps;

type Answer = Result<Result<Acknowledged, Refusal>, Arc<SessionError>>;

struct Waiting {
    step: Step,
    bytes: u64,
    answer: oneshot::Sender<Answer>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// Theirs.
    bytes: u64,
    /// A task takes from it.
    is_served: bool,
}

/// See the head of this file. Clones are the same.
#[derive(Clone)]
pub struct Batch {
    writer: Writer,
    queue: Arc<Mutex<Queue>>,
}

impl Batch {
    /// In front of a writer.
    pub fn new(writer: Writer) -> Self {
        Self { writer, queue: Arc::default() }
    }

    /// Makes one step, with those of other callers. Steps of one session are made in the order in which they were given, in a commit each.
    /// Dropped, the step may be made or not.
    pub async fn step(&self, step: Step) -> Result<Result<Acknowledged, Refusal>, Arc<SessionError>> {
        let (answer, answered) = oneshot::channel();
        let bytes = step.stored_bytes();
        {
            let mut queue = self.queue.lock();
            if queue.waiting.len() >= caps::STEPS_WAITING_MAX {
                let most = caps::STEPS_WAITING_MAX as u64;
                return Err(Arc::new(SessionError::Busy { what: "steps", most }));
            }
            if !queue.waiting.is_empty() && queue.bytes + bytes > caps::STEPS_WAITING_BYTES_MAX {
                let most = caps::STEPS_WAITING_BYTES_MAX;
                return Err(Arc::new(SessionError::Busy { what: "bytes of steps", most }));
            }
            queue.bytes += bytes;
            queue.waiting.push_back(Waiting { step, bytes, answer });
            if !std::mem::replace(&mut queue.is_served, true) {
                tokio::spawn(Serving { batch: self.clone(), is_over: false }.serve());
            }
        }
        answered.await.unwrap_or_else(|_| Err(Arc::new(SessionError::Gone)))
    }

    /// What goes with one commit: of each session the first step, as many as fit.
    fn take(&self) -> Vec<Waiting> {
        let mut queue = self.queue.lock();
        let live = self.writer.0.live.lock();
        let (mut taken, mut left, mut seen) = (Vec::<Waiting>::new(), VecDeque::new(), HashSet::new());
        let mut room = BODY_BYTES_MAX;
        while let Some(waiting) = queue.waiting.pop_front() {
            if seen.contains(&waiting.step.name) {
                left.push_back(waiting);
                continue;
            }
            let weighs = live.weighs(&waiting.step);
            if weighs > room && !taken.is_empty() {
                // It and all behind it go with the next.
                left.push_back(waiting);
                break;
            }
            room = room.saturating_sub(weighs);
            queue.bytes -= waiting.bytes;
            seen.insert(waiting.step.name.clone());
            taken.push(waiting);
        }
        left.append(&mut queue.waiting);
        queue.waiting = left;
        queue.is_served = !taken.is_empty();
        taken
    }
}

/// The task that takes from a queue. Where it does not come to an end, as its runtime shuts down or something panics, whoever waits is told so,
/// and the next step begins another one.
struct Serving {
    batch: Batch,
    is_over: bool,
}

impl Drop for Serving {
    fn drop(&mut self) {
        if !self.is_over {
            *self.batch.queue.lock() = Queue::default();
        }
    }
}

impl Serving {
    async fn serve(mut self) {
        let writer = self.batch.writer.clone();
        loop {
            let turn = writer.turn().await;
            let waiting = self.batch.take();
            if waiting.is_empty() {
                self.is_over = true;
                return;
            }
            let (steps, answers): (Vec<Step>, Vec<_>) =
                waiting.into_iter().map(|waiting| (waiting.step, waiting.answer)).unzip();
            match turn.and_then(|turn| writer.start(turn, steps)) {
                Ok(done) => drop(tokio::spawn(async move { tell(answers, done.await) })),
                Err(error) => tell(answers, Err(error)),
            }
        }
    }
}

fn tell(answers: Vec<oneshot::Sender<Answer>>, done: Result<Vec<Result<Acknowledged, Refusal>>, SessionError>) {
    match done {
        // Who does not wait any more is not told.
        Ok(done) => answers.into_iter().zip(done).for_each(|(answer, done)| drop(answer.send(Ok(done)))),
        Err(error) => {
            let error = Arc::new(error);
            answers.into_iter().for_each(|answer| drop(answer.send(Err(Arc::clone(&error)))));
        }
    }
}
