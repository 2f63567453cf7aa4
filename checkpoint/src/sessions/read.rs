//! Reading a session back from a log: its newest record, and those that it adds to.

use std::collections::HashMap;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kvstore_bucket::Trouble;

use super::entry::{End, Place, Record};
use super::error::SessionError;
use super::log::{Log, what};
use super::name::Name;
use super::owner::Origin;
use super::state::{Piece, Session};
use super::store::Store;
use crate::caps;
use crate::digest::Digest;
use crate::manifest::Refused;

/// A session as it was read.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) session: Session,
    /// Where its newest record is.
    pub(super) origin: Origin,
}

/// Where the newest record of a slot is, as far as the last entries say.
pub(super) fn mentioned(log: &Log, slot: u32, from: u64) -> Option<(Place, Option<End>)> {
    log.last.range(from..).rev().find_map(|(_, entry)| entry.mention(slot))
}

/// The same of the whole log. A session that goes on is always in the last entries; one that has long been closed, or never began, is looked
/// for in all of them.
pub(super) async fn newest(store: &Store, log: &Log, slot: u32) -> Result<Option<(Place, Option<End>)>, SessionError> {
    newest_since(store, log, slot, 0).await
}

/// The same of the entries from this one on.
pub(super) async fn newest_since(
    store: &Store,
    log: &Log,
    slot: u32,
    since: u64,
) -> Result<Option<(Place, Option<End>)>, SessionError> {
    if let Some(found) = mentioned(log, slot, since) {
        return Ok(Some(found));
    }
    let mut to = log.last.keys().next().copied().unwrap_or_else(|| log.end());
    while to > since {
        let from = to.saturating_sub(caps::INDEXES_AT_ONCE as u64).max(since);
        let entries = log.entries(store, from, to).await?;
        if let Some(found) = entries.iter().find_map(|entry| entry.mention(slot)) {
            return Ok(Some(found));
        }
        to = from;
    }
    Ok(None)
}

/// Newest records by their slots.
pub(super) type Newest = HashMap<u32, (Place, Option<End>)>;

/// The newest records of a whole log.
pub(super) async fn all(store: &Store, log: &Log) -> Result<Newest, SessionError> {
    let (mut all, mut to) = (Newest::new(), log.end());
    while to > 0 {
        let from = to.saturating_sub(caps::INDEXES_AT_ONCE as u64);
        for entry in log.entries(store, from, to).await? {
            for (slot, found) in entry.mentions() {
                all.entry(slot).or_insert(found);
            }
        }
        to = from;
    }
    Ok(all)
}

/// The session of which this is the newest record.
pub(super) async fn session(store: &Store, name: &Name, origin: Origin) -> Result<Read, SessionError> {
    let newest = record(store, name, &origin, origin.place).await?;
    let each = newest.path.0.iter().copied().map(|place| record(store, name, &origin, place));
    let before: Vec<Record> = futures::stream::iter(each).buffered(caps::SESSION_READS_AT_ONCE).try_collect().await?;
    let damaged =
        |cause| SessionError::Damaged { what: format!("the session {name} in the log {}", origin.log), cause };
    let session = build(name, before.into_iter().chain([newest])).map_err(damaged)?;
    Ok(Read { session, origin })
}

/// What records come to, the full one first.
fn build(name: &Name, records: impl Iterator<Item = Record>) -> Result<Session, Refused> {
    let mut built: Option<(Session, super::state::Progress)> = None;
    for record in records {
        built = Some(match (built, record.full, record.delta) {
            (None, Some(full), None) => {
                let progress = full.progress()?;
                (full, progress)
            }
            (Some((mut session, mut progress)), None, Some(delta)) if session.epoch == record.epoch => {
                progress.step(&delta, delta.ids.0.len() as u64)?;
                session.apply(&delta, &progress.cover);
                (session, progress)
            }
            _ => return Err(Refused("its records do not follow each other".into())),
        });
    }
    match built {
        Some((session, _)) if session.name == *name => Ok(session),
        _ => Err(Refused("its records are those of another session".into())),
    }
}

async fn record(store: &Store, name: &Name, origin: &Origin, place: Place) -> Result<Record, SessionError> {
    let Place(number, first, bytes) = place;
    let damaged =
        |cause| SessionError::Damaged { what: format!("the session {name} in {}", what(&origin.log, number)), cause };
    if bytes > caps::SESSION_BYTES_MAX {
        return Err(damaged(Refused(format!("a record of {bytes} bytes"))));
    }
    let stored = range(store, name, (&origin.log, number), first, bytes).await?;
    let record = Record::decode(&stored, &origin.log, number, origin.slot).map_err(damaged)?;
    match record.epoch == origin.epoch {
        true => Ok(record),
        false => Err(damaged(Refused(format!("it is of epoch {}, and not of {}", record.epoch, origin.epoch)))),
    }
}

async fn range(
    store: &Store,
    name: &Name,
    (log, number): (&str, u64),
    first: u64,
    bytes: u64,
) -> Result<Bytes, SessionError> {
    let range = first..first.saturating_add(bytes);
    match store.bucket.read(&store.entry(log, number), range, store.deadline()).await {
        Ok((read, _)) => Ok(read),
        Err(Trouble::NotFound | Trouble::Cut { .. }) => {
            Err(SessionError::Lost { name: name.clone(), what: what(log, number) })
        }
        Err(cause) => Err(SessionError::Request { what: format!("the session {name} was read"), cause }),
    }
}

/// The bytes of a session's pieces, in their order; none of those that are chunks.
pub(super) async fn pieces(store: &Store, read: &Read) -> Result<Vec<Option<Bytes>>, SessionError> {
    let (name, log) = (&read.session.name, read.origin.log.as_str());
    let each = read.session.pieces.0.iter().cloned().map(|piece| piece_bytes(store, name, log, piece));
    futures::stream::iter(each).buffered(caps::SESSION_READS_AT_ONCE).try_collect().await
}

async fn piece_bytes(store: &Store, name: &Name, log: &str, piece: Piece) -> Result<Option<Bytes>, SessionError> {
    let Some((number, first)) = piece.held else { return Ok(None) };
    let bytes = range(store, name, (log, number), first, piece.bytes).await?;
    if Digest::of(&bytes) != piece.digest {
        let what = format!("the KV from token {} on of the session {name}, in {}", piece.start, what(log, number));
        return Err(SessionError::Damaged { what, cause: Refused("it is not what was written".into()) });
    }
    Ok(Some(bytes))
}
