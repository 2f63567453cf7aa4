//! Collecting: epochs of sessions that were closed, and logs that no session needs.
//!
//! One collector at a time, by a lease; it needs to exclude nobody else. In this order:
//!
//! 1. List the logs. Only one that was sealed by now may go.
//! 2. Read who owns each session. A session that goes on needs the log that its state is in: its owner's, where that has a record of it before
//!    its first hole, which no seal can take back; otherwise the log that its epoch began with. One that closed gets an epoch that says so, which
//!    nobody can follow; one that had it already goes, that epoch last.
//! 3. Delete what no session needs of the logs of the first step. Whoever claimed a session meanwhile found it in a log that was needed when
//!    it was read, or lost it to an epoch that is there.
//!
//! The seal by which a writer was refused stays: without it, the writer could go on where it stopped. Clocks say only when to look at a log that
//! nobody sealed.

use std::collections::{BTreeMap, HashSet};

use futures::{StreamExt, TryStreamExt};
use kvstore_bucket::{Lease, LeaseError, LeaseTerm, Trouble};
use object_store::path::Path;

use super::entry::{End, Kind, Place, Sealer};
use super::error::SessionError;
use super::log::{Log, has_entry, number_of, read_entry};
use super::name::Name;
use super::owner::Owner;
use super::read;
use super::standing::{Epochs, epochs};
use super::store::Store;
use super::writer::close;
use crate::caps;
use crate::store::{StoreError, new_id};

/// A collector that was killed keeps others waiting for so long; what it sent in its last moment has a minute to arrive.
const TERM: LeaseTerm = LeaseTerm { ms: 5 * 60 * 1000, margin_ms: 60 * 1000 };

/// What a collection came to; of a dry run, what it would have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Sessions that go on.
    pub sessions: u64,
    /// Those that closed, and are marked so now.
    pub closed_sessions: u64,
    /// Those that went.
    pub gone_sessions: u64,
    /// Logs that stay.
    pub logs: u64,
    /// Those that went.
    pub gone_logs: u64,
    /// Logs that nobody wrote to, and that are sealed now.
    pub sealed_logs: u64,
    /// Objects that went.
    pub gone_objects: u64,
    /// Their bytes, of logs.
    pub gone_bytes: u64,
    /// Sessions and logs that could not be read: they stay, and everything that they may need.
    pub unreadable: Vec<String>,
}

/// What the first step found of a log.
struct Found {
    log: Log,
    /// All of its numbers, and their bytes.
    objects: Vec<(u64, u64)>,
    /// When the last of it was written, by the store's clock.
    written_ms: i64,
    /// Its first entry is there; if not, a collection broke off, or was to keep its seals.
    is_begun: bool,
    /// Of all its entries, once they have been read for one of its sessions: many that it has may have ended long ago.
    newest: Option<read::Newest>,
}

impl Found {
    /// The newest record of a slot.
    async fn newest(&mut self, store: &Store, slot: u32) -> Result<Option<(Place, Option<End>)>, SessionError> {
        if let Some(found) = read::mentioned(&self.log, slot, 0) {
            return Ok(Some(found));
        }
        let all = match &mut self.newest {
            Some(all) => all,
            None => self.newest.insert(read::all(store, &self.log).await?),
        };
        Ok(all.get(&slot).copied())
    }
}

struct Collector<'a> {
    store: &'a Store,
    me: Sealer,
    is_dry: bool,
    collected: Collected,
    lease: &'a mut Lease,
    /// Something could not be read: nothing of logs may go.
    is_blind: bool,
}

/// Collects garbage. `is_dry`: nothing is written but the lease and what proofs need, and nothing goes; what would
/// is counted.
pub async fn collect(store: &Store, is_dry: bool) -> Result<Collected, SessionError> {
    let holder = new_id()?;
    store.prove(&holder).await?;
    let taken = Lease::take(&store.bucket, &store.collector(), &holder, TERM, store.deadline()).await;
    let mut lease = taken.map_err(of_lease)?;
    let me = Sealer { log: holder, writer: "collector".into() };
    let mut collector =
        Collector { store, me, is_dry, collected: Collected::default(), lease: &mut lease, is_blind: false };
    let done = collector.run().await.map(|()| collector.collected);
    lease.end(&store.bucket, store.deadline()).await;
    done
}

fn of_lease(error: LeaseError) -> SessionError {
    match error {
        LeaseError::Held(left_ms) => SessionError::Collecting(left_ms / 1000 + 1),
        LeaseError::Lost => SessionError::LeaseLost,
        LeaseError::NoTime => StoreError::NoTime.into(),
        LeaseError::Store(cause) => SessionError::Request { what: "the collector's lease was asked for".into(), cause },
    }
}

impl Collector<'_> {
    async fn run(&mut self) -> Result<(), SessionError> {
        let mut logs = self.logs().await?;
        let needed = self.needed(&mut logs).await?;
        for found in logs.values() {
            if needed.contains(&found.log.id) || self.is_blind {
                self.collected.logs += 1;
            } else {
                self.log(found).await?;
            }
            self.renew().await?;
        }
        Ok(())
    }

    async fn renew(&mut self) -> Result<(), SessionError> {
        let store = self.store;
        self.lease.renew_if_due(&store.bucket, store.deadline()).await.map_err(of_lease)
    }

    /// All logs.
    async fn logs(&mut self) -> Result<BTreeMap<String, Found>, SessionError> {
        let (mut all, mut objects): (BTreeMap<String, Vec<_>>, usize) = (BTreeMap::new(), 0);
        let mut listed = self.store.bucket.stream(&self.store.logs());
        let failed = || SessionError::request("logs were listed");
        while let Some(meta) = listed.try_next().await.map_err(failed())? {
            objects += 1;
            if objects > caps::LOG_OBJECTS_MAX {
                return Err(SessionError::TooMany { what: "entries of logs", most: caps::LOG_OBJECTS_MAX as u64 });
            }
            let parts = self.store.below(&meta.location);
            if let ([_, log, _], Some(number)) = (parts.as_slice(), number_of(&meta)) {
                let object = (number, meta.size, meta.last_modified.timestamp_millis());
                all.entry(log.clone()).or_default().push(object);
            }
        }
        let mut found = BTreeMap::new();
        for (id, objects) in all {
            let written_ms = objects.iter().map(|object| object.2).max().unwrap_or(i64::MAX);
            let objects: Vec<(u64, u64)> = objects.into_iter().map(|(number, bytes, _)| (number, bytes)).collect();
            let mut log = Log::of(&id, objects.clone());
            if let Err(error) = log.read_last(self.store).await {
                self.unreadable(error)?;
                continue;
            }
            // A listing may leave out what was created while it was made.
            let is_begun = !log.sizes.is_empty() || has_entry(self.store, &id, 0).await?.is_some();
            found.insert(id, Found { log, objects, written_ms, is_begun, newest: None });
            self.renew().await?;
        }
        Ok(found)
    }

    /// What cannot be read stays, and so does everything that it may name; what does not answer ends the collection.
    fn unreadable(&mut self, error: SessionError) -> Result<(), SessionError> {
        if !error.is_gone() && !matches!(error, SessionError::Damaged { .. }) {
            return Err(error);
        }
        self.collected.unreadable.push(error.to_string());
        Ok(())
    }

    /// Logs that some session needs.
    async fn needed(&mut self, logs: &mut BTreeMap<String, Found>) -> Result<HashSet<String>, SessionError> {
        let mut needed = HashSet::new();
        for name in self.store.names(None).await? {
            let found = match epochs(self.store, &name).await {
                Ok(found) => self.session(&name, found, logs).await,
                Err(error) => Err(error),
            };
            match found {
                Ok(log) => needed.extend(log),
                Err(error) => {
                    self.unreadable(error)?;
                    self.is_blind = true;
                }
            }
            self.renew().await?;
        }
        Ok(needed)
    }

    /// The log that a session needs, if it goes on.
    async fn session(
        &mut self,
        name: &Name,
        found: Epochs,
        logs: &mut BTreeMap<String, Found>,
    ) -> Result<Option<String>, SessionError> {
        let Epochs { standing, stray } = found;
        let Some(standing) = standing else {
            // What is left of a session that went, or of a claim that came too late.
            self.delete_epochs(name, stray).await?;
            return Ok(None);
        };
        let Owner { epoch, holder, from, .. } = &standing.owner;
        let Some(holder) = holder else {
            self.collected.gone_sessions += 1;
            self.delete_epochs(name, (1..=*epoch).chain(stray).collect()).await?;
            return Ok(None);
        };
        if *epoch == 1
            && logs.get(&holder.log).is_none_or(|found| !found.is_begun)
            && has_entry(self.store, &holder.log, 0).await?.is_none()
        {
            // Its opening came too late: the session had been closed, and its log has been collected.
            self.delete_epochs(name, std::iter::once(1).chain(stray).collect()).await?;
            return Ok(None);
        }
        // A claim that came too late, of one that had this name before.
        self.delete_epochs(name, stray).await?;
        let there = match logs.get_mut(&holder.log) {
            Some(found) => found.newest(self.store, holder.slot).await?,
            None => None,
        };
        match (there, from) {
            (Some((_, Some(End::Closed))), _) => {
                self.collected.closed_sessions += 1;
                if !self.is_dry {
                    close(self.store, name, &standing).await?;
                }
                // It goes with the next collection; until then, what it names stays.
                Ok(Some(holder.log.clone()))
            }
            (Some(_), _) | (None, None) => {
                self.collected.sessions += 1;
                Ok(Some(holder.log.clone()))
            }
            (None, Some(from)) => {
                self.collected.sessions += 1;
                Ok(Some(from.log.clone()))
            }
        }
    }

    /// Deletes epochs, one after the other: the last one says until the end that the others are over.
    async fn delete_epochs(&mut self, name: &Name, epochs: Vec<u64>) -> Result<(), SessionError> {
        for epoch in epochs {
            self.delete(self.store.epoch(name, epoch), 0).await?;
        }
        Ok(())
    }

    async fn delete(&mut self, location: Path, bytes: u64) -> Result<(), SessionError> {
        self.collected.gone_objects += 1;
        self.collected.gone_bytes += bytes;
        if self.is_dry {
            return Ok(());
        }
        self.renew().await?;
        let (store, lease) = (self.store, &*self.lease);
        let deleted = store.bucket.delete_while(&location, store.deadline(), || lease.holds(store.bucket.now())).await;
        match deleted {
            Err(Trouble::Fenced) => Err(SessionError::LeaseLost),
            deleted => deleted.map_err(SessionError::request(format!("{location} was deleted"))),
        }
    }

    /// A log that no session needs.
    async fn log(&mut self, found: &Found) -> Result<(), SessionError> {
        let store = self.store;
        if found.is_begun && found.log.seal.is_none() {
            self.collected.logs += 1;
            let now_ms = store.bucket.clock.earliest_ms(store.bucket.now()).ok_or(StoreError::NoTime)?;
            if now_ms.saturating_sub(found.written_ms) > caps::LOG_IDLE_MS as i64 {
                self.collected.sealed_logs += 1;
                if !self.is_dry {
                    Log::look(store, &found.log.id).await?.seal(store, &self.me).await?;
                }
            }
            return Ok(());
        }
        let kept = match self.kept(found).await {
            Ok(kept) => kept,
            Err(error) => {
                self.collected.logs += 1;
                return self.unreadable(error);
            }
        };
        let gone: Vec<(u64, u64)> =
            found.objects.iter().filter(|(number, _)| !kept.contains(number)).copied().collect();
        if !gone.is_empty() {
            self.collected.gone_logs += 1;
        }
        for (number, bytes) in gone {
            self.delete(store.entry(&found.log.id, number), bytes).await?;
        }
        Ok(())
    }

    /// Seals of a log by others than its writer. Of one whose first entries are there, they are at its end or behind it.
    async fn kept(&self, found: &Found) -> Result<HashSet<u64>, SessionError> {
        let id = &found.log.id;
        let from = found.log.seal.as_ref().map_or(0, |(number, _)| *number);
        let mut behind = found.objects.clone();
        behind.retain(|(number, _)| *number >= from);
        let each = behind.into_iter().map(|(number, bytes)| read_entry(self.store, id, number, bytes));
        let mut entries = futures::stream::iter(each).buffer_unordered(caps::INDEXES_AT_ONCE);
        let mut kept = HashSet::new();
        while let Some(entry) = entries.try_next().await? {
            if entry.kind == Kind::Seal && entry.by.is_some_and(|by| by.log != *id) {
                kept.insert(entry.number);
            }
        }
        Ok(kept)
    }
}
