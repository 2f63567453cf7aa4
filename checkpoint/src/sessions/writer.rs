//! A writer: a log of its own, and commits to it in groups.
//!
//! Commits are put by tasks, several at once, in the order of their numbers. One is acknowledged when it and all before it are there. A call that
//! is dropped leaves its task: the commit is there or not, and nobody was told that it is. A writer ends with its first entry that cannot be
//! written, or of which that is not known: its sessions go on with another one, which reads what there is.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use kvstore_bucket::Trouble;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::entry::{End, Entry, Kind, Sealer};
use super::error::{Broken, Refusal, SessionError};
use super::live::{Acknowledged, Live, Step};
use super::log::{has_entry, what};
use super::name::Name;
use super::owner::Owner;
use super::store::{Created, Store};
use crate::caps;
use crate::store::new_id;

/// How far a log is.
#[derive(Clone, Debug, Default)]
struct Front {
    /// All entries before this one are there.
    next: u64,
    /// The first entry that is not to be had, and why.
    broken: Option<(u64, Broken)>,
}

impl Front {
    /// What there is to say of an entry, if anything yet.
    fn verdict(&self, number: u64) -> Option<Result<(), Broken>> {
        if self.next > number {
            return Some(Ok(()));
        }
        self.broken.as_ref().filter(|(from, _)| *from <= number).map(|(_, why)| Err(why.clone()))
    }
}

pub(super) struct Inner {
    pub(super) store: Store,
    pub(super) me: Sealer,
    pub(super) live: Mutex<Live>,
    landed: Mutex<BTreeSet<u64>>,
    front: watch::Sender<Front>,
    window: Arc<Semaphore>,
}

/// See the head of this file. Clones are the same writer.
#[derive(Clone)]
pub struct Writer(pub(super) Arc<Inner>);

/// The right to have one more entry under way.
pub(super) struct Turn {
    _permit: OwnedSemaphorePermit,
}

impl Writer {
    /// Begins a log, on a store that is proven to do what sessions rest on. `writer`: what others are told of who owns a session; for people.
    pub async fn begin(store: &Store, writer: &str) -> Result<Self, SessionError> {
        let log = new_id()?;
        store.prove_once(&log).await?;
        let writer = writer.chars().take(caps::TEXT_BYTES_MAX / 4).collect();
        let me = Sealer { log: log.clone(), writer };
        let first = Entry::new(&log, 0, Kind::Begin, Some(me.clone())).finish(Vec::new());
        let body = Bytes::from(first.map_err(SessionError::damaged(what(&log, 0)))?);
        let created = store.create(&store.entry(&log, 0), &body, caps::ENTRY_BYTES_MAX).await;
        match created.map_err(SessionError::request("a log was begun"))? {
            Created::New => {}
            Created::There(there) if there == body => {}
            Created::There(_) => return Err(Broken::Failed { log, number: 0, why: "it exists".into() }.into()),
        }
        let inner = Inner {
            store: store.clone(),
            me,
            live: Mutex::new(Live::new(log)),
            landed: Mutex::default(),
            front: watch::Sender::new(Front { next: 1, broken: None }),
            window: Arc::new(Semaphore::new(caps::PIPELINED_MAX as usize)),
        };
        Ok(Self(Arc::new(inner)))
    }

    /// The log's id.
    pub fn log(&self) -> &str {
        &self.0.me.log
    }

    /// The sessions that it owns, and since which epoch. Where the log has ended, another writer reclaims them.
    pub fn sessions(&self) -> Vec<(Name, u64)> {
        self.0.live.lock().sessions()
    }

    /// Why the log has ended, if it has.
    pub fn broken(&self) -> Option<Broken> {
        let front = self.0.front.borrow();
        front.broken.as_ref().map(|(_, why)| why.clone())
    }

    /// Whether it is time to begin another log, and to move the sessions there: three quarters of the entries that a log may have are written.
    pub fn is_due(&self) -> bool {
        self.0.live.lock().next() >= caps::LOG_ENTRIES_MAX / 4 * 3
    }

    pub(super) fn check(&self) -> Result<(), SessionError> {
        self.broken().map_or(Ok(()), |why| Err(why.into()))
    }

    /// Finds out whether the log has been sealed by another and collected; its next entry would find that, too. A session that is opened by it then
    /// would not be there.
    pub(super) async fn check_begun(&self) -> Result<(), SessionError> {
        let log = self.log().to_owned();
        if has_entry(&self.0.store, &log, 0).await?.is_some() {
            return Ok(());
        }
        let why = Broken::Failed { log, number: 0, why: "it was sealed by another, and has been collected".into() };
        let next = self.0.live.lock().next();
        self.0.breaks(next, why.clone());
        Err(why.into())
    }

    /// Writes a group of steps, for each session one at most. The answers come in their order once all that was answered `Ok` is durable. A step
    /// that is refused leaves its session as it is, and the others are made. An error says that nothing is known of any.
    ///
    /// Dropped, the steps may be made or not; [`Self::flush`] waits until that is over.
    pub async fn commit(&self, steps: Vec<Step>) -> Result<Vec<Result<Acknowledged, Refusal>>, SessionError> {
        let turn = self.turn().await?;
        self.start(turn, steps)?.await
    }

    /// Waits until another entry may be under way.
    pub(super) async fn turn(&self) -> Result<Turn, SessionError> {
        self.check()?;
        let permit = Arc::clone(&self.0.window).acquire_owned().await;
        self.check()?;
        permit.map(|permit| Turn { _permit: permit }).map_err(|_| Broken::Full(self.log().to_owned()).into())
    }

    /// Starts a commit: when this returns, its place in the log is fixed.
    pub(super) fn start(
        &self,
        turn: Turn,
        steps: Vec<Step>,
    ) -> Result<impl Future<Output = Result<Vec<Result<Acknowledged, Refusal>>, SessionError>> + use<>, SessionError>
    {
        let mut live = self.0.live.lock();
        self.check()?;
        // The last one is the seal's.
        if live.next() + 1 >= caps::LOG_ENTRIES_MAX {
            return Err(Broken::Full(self.log().to_owned()).into());
        }
        let built = live.build(steps);
        drop(live);
        let number = built.entry.as_ref().map(|(number, _)| *number);
        if let Some((number, body)) = built.entry {
            tokio::spawn(Underway { inner: Arc::clone(&self.0), number, is_told: false }.put(turn, body));
        }
        let inner = Arc::clone(&self.0);
        Ok(async move {
            if let Some(number) = number {
                inner.wait(number).await?;
            }
            Ok(built.answers)
        })
    }

    /// Waits until nothing is under way any more.
    pub async fn flush(&self) -> Result<(), SessionError> {
        let last = self.0.live.lock().next() - 1;
        self.0.wait(last).await.map_err(SessionError::from)
    }

    /// Says of sessions that were closed that they are, where it is found without reading the log. To be called now and then: as many that closed are
    /// remembered as a writer may hold, and then none is opened or claimed.
    pub async fn tidy(&self) -> Result<(), SessionError> {
        let next = self.0.front.borrow().next;
        let is_due = |ended: &super::live::Ended| ended.ends == End::Closed && ended.place.0 < next;
        let due: Vec<_> = self.0.live.lock().ended.iter().filter(|ended| is_due(ended)).cloned().collect();
        for ended in due {
            close(&self.0.store, &ended.name, &ended.standing).await?;
            self.0.live.lock().forget(ended.slot);
        }
        Ok(())
    }

    /// Ends the log, by a seal of its own: nobody needs to. Its sessions are claimed by others, or by this process's next writer.
    pub async fn end(&self) -> Result<(), SessionError> {
        let all = self.0.window.acquire_many(caps::PIPELINED_MAX as u32).await;
        self.check()?;
        self.tidy().await?;
        let number = self.0.live.lock().next();
        let (log, by) = (self.log().to_owned(), self.0.me.clone());
        self.0.breaks(number, Broken::Sealed { log: log.clone(), number, by: by.clone() });
        drop(all);
        let seal = Entry::new(&log, number, Kind::Seal, Some(by)).finish(Vec::new());
        let body = Bytes::from(seal.map_err(SessionError::damaged(what(&log, number)))?);
        let created = self.0.store.create(&self.0.store.entry(&log, number), &body, caps::ENTRY_BYTES_MAX).await;
        created.map(drop).map_err(SessionError::request(format!("the log {log} was ended")))
    }
}

/// Creates the epoch that says that a session was closed. Where there is one already, somebody else did, or it means nothing.
pub(super) async fn close(store: &Store, name: &Name, standing: &super::owner::Standing) -> Result<(), SessionError> {
    let owner = Owner::next(name, Some(standing), None, None);
    let body = owner.encode().map_err(SessionError::damaged(format!("the end of the session {name}")))?;
    let at = store.epoch(name, owner.epoch);
    let created = store.create(&at, &body.into(), caps::OWNER_BYTES_MAX).await;
    created.map(drop).map_err(SessionError::request(format!("the session {name} was closed")))
}

/// An entry that is being put. Where its task does not come to an end, as the runtime shuts down, nothing is known of it.
struct Underway {
    inner: Arc<Inner>,
    number: u64,
    is_told: bool,
}

impl Drop for Underway {
    fn drop(&mut self) {
        if !self.is_told {
            let (log, number) = (self.inner.me.log.clone(), self.number);
            self.inner.breaks(number, Broken::Failed { log, number, why: "the task that wrote it has ended".into() });
        }
    }
}

impl Underway {
    /// Puts it, and keeps its turn until it is acknowledged: so no more than those are behind a hole.
    async fn put(mut self, turn: Turn, body: Bytes) {
        let (inner, number) = (Arc::clone(&self.inner), self.number);
        let created = inner.store.create(&inner.store.entry(&inner.me.log, number), &body, caps::ENTRY_BYTES_MAX).await;
        match inner.outcome(number, &body, created) {
            Ok(()) => inner.lands(number),
            Err(why) => inner.breaks(number, why),
        }
        self.is_told = true;
        let _ = inner.wait(number).await;
        drop(turn);
    }
}

impl Inner {
    fn outcome(&self, number: u64, body: &Bytes, created: Result<Created, Trouble>) -> Result<(), Broken> {
        let log = self.me.log.clone();
        let failed = |why: String| Broken::Failed { log: log.clone(), number, why };
        match created {
            Ok(Created::New) => Ok(()),
            // An own try whose answer was lost.
            Ok(Created::There(there)) if there == body => Ok(()),
            Ok(Created::There(there)) => match Entry::decode(&there, there.len() as u64, &log, number) {
                Ok(Entry { kind: Kind::Seal, by: Some(by), .. }) => Err(Broken::Sealed { log, number, by }),
                Ok(_) => Err(failed("another commit is there, which this writer did not write".into())),
                Err(why) => Err(failed(format!("what is there cannot be read: {why}"))),
            },
            Err(trouble) => Err(failed(trouble.to_string())),
        }
    }

    fn lands(&self, number: u64) {
        let mut landed = self.landed.lock();
        landed.insert(number);
        self.front.send_modify(|front| {
            while landed.remove(&front.next) {
                front.next += 1;
            }
        });
    }

    fn breaks(&self, number: u64, why: Broken) {
        self.front.send_modify(|front| {
            if front.broken.as_ref().is_none_or(|(from, _)| number < *from) {
                front.broken = Some((number, why));
            }
        });
    }

    async fn wait(&self, number: u64) -> Result<(), Broken> {
        let mut front = self.front.subscribe();
        let seen = front.wait_for(|front| front.verdict(number).is_some()).await;
        // This holds the sender: it does not end.
        seen.map_or(Ok(()), |front| front.verdict(number).unwrap_or(Ok(())))
    }
}
