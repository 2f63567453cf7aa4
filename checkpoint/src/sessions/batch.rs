//! Appends of many callers as few commits: what waits when an entry may be written goes with it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::error::{Broken, Refusal, SessionError};
use super::live::{Acknowledged, Step};
use super::writer::Writer;
use crate::caps;

type Answer = Result<Result<Acknowledged, Refusal>, Arc<SessionError>>;

struct Waiting {
    step: Step,
    answer: oneshot::Sender<Answer>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
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
        {
            let mut queue = self.queue.lock();
            if queue.waiting.len() >= caps::STEPS_WAITING_MAX {
                let most = caps::STEPS_WAITING_MAX as u64;
                return Err(Arc::new(SessionError::TooMany { what: "steps that wait for a commit", most }));
            }
            queue.waiting.push_back(Waiting { step, answer });
            if !std::mem::replace(&mut queue.is_served, true) {
                tokio::spawn(self.clone().serve());
            }
        }
        let gone = |_| Err(Arc::new(Broken::Full(self.writer.log().to_owned()).into()));
        answered.await.unwrap_or_else(gone)
    }

    async fn serve(self) {
        loop {
            let turn = self.writer.turn().await;
            let waiting = self.take();
            if waiting.is_empty() {
                return;
            }
            let (steps, answers): (Vec<Step>, Vec<_>) =
                waiting.into_iter().map(|waiting| (waiting.step, waiting.answer)).unzip();
            match turn.and_then(|turn| self.writer.start(turn, steps)) {
                Ok(done) => drop(tokio::spawn(async move { tell(answers, done.await) })),
                Err(error) => tell(answers, Err(error)),
            }
        }
    }

    /// What goes with one commit: of each session the first step.
    fn take(&self) -> Vec<Waiting> {
        let mut queue = self.queue.lock();
        let (mut taken, mut left, mut seen) = (Vec::new(), VecDeque::new(), HashSet::new());
        while let Some(waiting) = queue.waiting.pop_front() {
            match seen.insert(waiting.step.name.clone()) {
                true => taken.push(waiting),
                false => left.push_back(waiting),
            }
        }
        queue.waiting = left;
        queue.is_served = !taken.is_empty();
        taken
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
