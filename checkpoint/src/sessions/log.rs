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
use super::store::{Created, Store};
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

    /// Seals it, where it is not. Commits that came meanwhile are among the last then. `by`: who does it.
    pub(super) async fn seal(&mut self, store: &Store, by: &Sealer) -> Result<(), SessionError> {
        let mut width = 1;
        while self.seal.is_none() {
            // A writer that goes on is stopped by one ahead of it, whose number it must reach before this one request is done. Then the first
            // hole is filled, by that writer or by a seal: the lowest seal counts.
            let (top, log) = (self.end() + width - 1, &*self);
            let stop = log.put_seal(store, top, by).await?;
            let numbers = self.end()..top;
            let each = numbers
                .map(|number| async move { Ok::<_, SessionError>((number, log.put_seal(store, number, by).await?)) });
            let tries: Vec<(u64, Option<Bytes>)> =
                futures::stream::iter(each).buffered(caps::SESSION_READS_AT_ONCE).try_collect().await?;
            for (number, there) in tries.into_iter().chain([(top, stop)]) {
                if self.seal.is_some() {
                    break;
                }
                match there {
                    None => self.seal = Some((number, by.clone())),
                    Some(body) => {
                        let bytes = body.len() as u64;
                        let entry = Entry::decode(&body, bytes, &self.id, number);
                        let entry = entry.map_err(SessionError::damaged(what(&self.id, number)))?;
                        self.sizes.push(bytes);
                        self.take(entry);
                    }
                }
            }
            width = (width * 4).min(2 * caps::PIPELINED_MAX);
        }
        Ok(())
    }

    /// Creates a seal, or says what is there.
    async fn put_seal(&self, store: &Store, number: u64, by: &Sealer) -> Result<Option<Bytes>, SessionError> {
        let failed = |cause| SessionError::Damaged { what: what(&self.id, number), cause };
        let body = Entry::new(&self.id, number, Kind::Seal, Some(by.clone())).finish(Vec::new()).map_err(failed)?;
        let body = Bytes::from(body);
        let created = store.create(&store.entry(&self.id, number), &body, caps::ENTRY_BYTES_MAX).await;
        match created.map_err(SessionError::request(format!("the log {} was sealed", self.id)))? {
            Created::New => Ok(None),
            Created::There(there) if there == body => Ok(None),
            Created::There(there) => Ok(Some(there)),
        }
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
