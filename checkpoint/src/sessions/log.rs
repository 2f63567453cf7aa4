//! A log as others than its writer see it: where it ends, and how it is sealed.
//!
//! What counts of a log are its entries from 0 on, without a hole, up to the first seal or the first hole. Whoever wants to seal it creates a
//! seal at that hole: where a commit is there by now, the hole was further on. A writer has at most [`caps::PIPELINED_MAX`] entries under way,
//! so of the last ones before a hole, one is a seal, or the log has none.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kvstore_bucket::Trouble;
use object_store::ObjectMeta;

use super::entry::{Entry, Kind, Sealer};
use super::error::SessionError;
use super::owner::Owner;
use super::store::Store;
use crate::caps;
use crate::manifest::Refused;

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) id: String,
    /// Bytes of each entry, from 0 on, those behind a seal included.
    pub(super) sizes: Vec<u64>,
    /// The first seal, and who made it.
    pub(super) seal: Option<(u64, Sealer)>,
    /// The last commits before the end.
    pub(super) last: BTreeMap<u64, Entry>,
}

/// Entries of the whole log: more cannot be in its folder, but for seals.
const OBJECTS_MAX: usize = caps::LOG_ENTRIES_MAX as usize * 2;

/// The number of an entry, by the name of its object.
pub(super) fn number_of(meta: &ObjectMeta) -> Option<u64> {
    meta.location.filename()?.parse().ok()
}

impl Log {
    /// The log with these objects, whose first hole ends it.
    pub(super) fn of(id: &str, mut objects: Vec<(u64, u64)>) -> Self {
        objects.sort_unstable();
        let sizes = objects.into_iter().zip(0..).take_while(|((number, _), due)| number == due);
        Self {
            id: id.to_owned(),
            sizes: sizes.map(|((_, bytes), _)| bytes).collect(),
            seal: None,
            last: BTreeMap::new(),
        }
    }

    /// The first number that counts for nothing, or is the seal's.
    pub(super) fn end(&self) -> u64 {
        self.seal.as_ref().map_or(self.sizes.len() as u64, |(number, _)| *number)
    }

    /// Of the log of a session's owner: a first epoch whose holder's log has no beginning means nothing. It was created late, when the session had
    /// been closed and both had been collected: as long as a first epoch is the last one, its log is needed.
    pub(super) fn check_holder(&self, owner: &Owner) -> Result<(), SessionError> {
        match owner.epoch == 1 && self.end() == 0 {
            true => Err(SessionError::NoSuch(owner.name.clone())),
            false => Ok(()),
        }
    }

    /// Looks at a log.
    pub(super) async fn look(store: &Store, id: &str) -> Result<Self, SessionError> {
        let listed = store.bucket.list(&store.log(id), OBJECTS_MAX, store.deadline()).await;
        let listed = listed.map_err(SessionError::request(format!("the log {id} was listed")))?;
        if listed.len() == OBJECTS_MAX {
            return Err(SessionError::TooMany { what: "entries in one log", most: OBJECTS_MAX as u64 });
        }
        let objects = listed.iter().filter_map(|meta| Some((number_of(meta)?, meta.size))).collect();
        let mut log = Self::of(id, objects);
        log.read_last(store).await?;
        Ok(log)
    }

    /// Reads the last entries, until those are there that mention each session, and no seal can be before them.
    pub(super) async fn read_last(&mut self, store: &Store) -> Result<(), SessionError> {
        let mut from = self.sizes.len() as u64;
        let mut reach = caps::MENTIONED_EVERY + caps::PIPELINED_MAX;
        while from > 0 {
            let until = self.end().saturating_sub(reach);
            if until >= from {
                break;
            }
            for entry in self.entries(store, until, from).await? {
                self.take(entry);
            }
            // Below a seal.
            (from, reach) = (until, caps::MENTIONED_EVERY);
        }
        Ok(())
    }

    fn take(&mut self, entry: Entry) {
        let number = entry.number;
        match entry.kind {
            Kind::Seal => {
                if let Some(by) = entry.by.filter(|_| number < self.end()) {
                    self.last.retain(|other, _| *other < number);
                    self.seal = Some((number, by));
                }
            }
            Kind::Commit if number < self.end() => {
                self.last.insert(number, entry);
            }
            Kind::Commit | Kind::Begin => {}
        }
    }

    /// Indexes of entries, the last one first.
    pub(super) async fn entries(&self, store: &Store, from: u64, to: u64) -> Result<Vec<Entry>, SessionError> {
        let sizes = self.sizes.get(from as usize..to as usize).unwrap_or_default();
        let each = (from..to).rev().zip(sizes.iter().rev().copied());
        let each = each.map(|(number, bytes)| read_entry(store, &self.id, number, bytes));
        futures::stream::iter(each).buffered(caps::INDEXES_AT_ONCE).try_collect().await
    }

    /// Seals it, where it is not. Commits that came meanwhile are among the last then, as far as they are. `by`: who does it.
    ///
    /// A writer that goes on fills the end before a seal comes there, each time. It is stopped by a seal so far ahead that it is not there yet, whose
    /// number it must reach; then the log is listed again, and the first hole is filled, by that writer or by a seal: the lowest seal counts.
    pub(super) async fn seal(&mut self, store: &Store, by: &Sealer) -> Result<(), SessionError> {
        if self.seal.is_some() || self.seal_end(store, by).await? {
            return Ok(());
        }
        let mut ahead = caps::SEAL_AHEAD;
        for _ in 0..caps::SEALS_MAX {
            let number = self.end() + ahead;
            // What is there by now is passed.
            if !self.put_seal(store, number, by).await? {
                ahead *= 2;
                continue;
            }
            for _ in 0..=ahead {
                *self = Self::look(store, &self.id).await?;
                if self.seal.is_some() || self.seal_end(store, by).await? {
                    return Ok(());
                }
            }
        }
        let what = format!("the log {} was sealed", self.id);
        Err(SessionError::Request { what, cause: Trouble::Exists })
    }

    /// Seals it at its end, unless something is there by now, which is taken.
    async fn seal_end(&mut self, store: &Store, by: &Sealer) -> Result<bool, SessionError> {
        let number = self.end();
        if self.put_seal(store, number, by).await? {
            self.seal = Some((number, by.clone()));
            return Ok(true);
        }
        if let Some(bytes) = has_entry(store, &self.id, number).await? {
            let entry = read_entry(store, &self.id, number, bytes).await?;
            self.sizes.push(bytes);
            self.take(entry);
        }
        Ok(self.seal.is_some())
    }

    /// Creates a seal, unless something is there.
    async fn put_seal(&self, store: &Store, number: u64, by: &Sealer) -> Result<bool, SessionError> {
        let failed = |cause| SessionError::Damaged { what: what(&self.id, number), cause };
        let body = Entry::new(&self.id, number, Kind::Seal, Some(by.clone())).finish(Vec::new()).map_err(failed)?;
        let created = store.create_unless(&store.entry(&self.id, number), &Bytes::from(body)).await;
        created.map_err(SessionError::request(format!("the log {} was sealed", self.id)))
    }
}

/// Bytes of an entry, if it is there.
pub(super) async fn has_entry(store: &Store, log: &str, number: u64) -> Result<Option<u64>, SessionError> {
    match store.bucket.head(&store.entry(log, number), store.deadline()).await {
        Ok(meta) => Ok(Some(meta.size)),
        Err(Trouble::NotFound) => Ok(None),
        Err(cause) => Err(SessionError::Request { what: format!("{} was looked at", what(log, number)), cause }),
    }
}

pub(super) fn what(log: &str, number: u64) -> String {
    format!("entry {number} of the log {log}")
}

/// An entry's index, of an object of so many bytes.
pub(super) async fn read_entry(store: &Store, log: &str, number: u64, bytes: u64) -> Result<Entry, SessionError> {
    let damaged = || SessionError::damaged(what(log, number));
    // What has no bytes cannot be asked for a range.
    Entry::needs(&[]).or_else(|why| if bytes > 0 { Ok(0) } else { Err(why) }).map_err(damaged())?;
    let mut wanted = bytes.min(caps::INDEX_READ_BYTES);
    loop {
        let read = store.bucket.read(&store.entry(log, number), bytes - wanted..bytes, store.deadline()).await;
        let end = match read {
            Ok((end, _)) => end,
            Err(cause @ Trouble::Cut { .. }) => return Err(damaged()(Refused(cause.to_string()))),
            Err(cause) => return Err(SessionError::Request { what: format!("{} was read", what(log, number)), cause }),
        };
        let needs = Entry::needs(&end).map_err(damaged())?;
        if needs <= wanted || wanted == bytes {
            return Entry::decode(&end, bytes, log, number).map_err(damaged());
        }
        wanted = needs.min(bytes);
    }
}
