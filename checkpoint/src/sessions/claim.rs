//! Opening and claiming sessions: how one comes to be owned by a writer.
//!
//! 1. Read the session's epochs: the highest, n, names the log that it is in.
//! 2. Unless the session ended or moved there: seal that log. What its old owner appends from then on is refused.
//! 3. Read the session's state there; or, where there is none, where epoch n says that it began.
//! 4. Create epoch n + 1, which names the own log, and where the state is. One of all who try wins.
//! 5. Look whether epoch n is still what was read: a create that arrives after all had been collected means nothing.
//!
//! The first record in the own log is written by the session's first step. Until it is there, the old log's stays.

use bytes::Bytes;
use kvstore_bucket::Trouble;

use super::entry::End;
use super::error::SessionError;
use super::live::Beginning;
use super::log::{Log, has_entry};
use super::name::Name;
use super::owner::{Holder, Origin, Owner, Standing};
use super::read::{self, Read};
use super::standing::{self, standing};
use super::state::Session;
use super::store::{Created, Store};
use super::writer::Writer;
use crate::caps;
use crate::digest::Digest;

/// A session that was claimed.
#[derive(Clone, Debug, PartialEq)]
pub struct Claimed {
    /// Since this epoch it is the claimant's.
    pub epoch: u64,
    /// As it was when its old owner was sealed. `None`: it was opened, and nothing of it was ever acknowledged; its first step begins it.
    pub session: Option<Session>,
    /// The bytes of its pieces, in their order; none of those that are chunks.
    pub pieces: Vec<Option<Bytes>>,
}

/// A name that is being claimed, and its slot; free again where the claim comes to nothing, or is dropped.
struct Claiming<'a> {
    writer: &'a Writer,
    name: &'a Name,
    slot: u32,
}

impl Drop for Claiming<'_> {
    fn drop(&mut self) {
        self.writer.0.live.lock().give_up(self.name);
    }
}

impl Claiming<'_> {
    fn holder(&self) -> Holder {
        let me = &self.writer.0.me;
        Holder { log: me.log.clone(), slot: self.slot, writer: me.writer.clone() }
    }

    fn own(self, standing: Standing, beginning: Beginning) {
        self.writer.0.live.lock().own(self.name, self.slot, standing, beginning);
    }
}

fn taken(name: &Name, owner: Owner) -> SessionError {
    match owner.holder {
        Some(Holder { log, writer, .. }) => SessionError::Taken { name: name.clone(), epoch: owner.epoch, writer, log },
        None => SessionError::Closed(name.clone()),
    }
}

impl Writer {
    fn claiming<'a>(&'a self, name: &'a Name) -> Result<Claiming<'a>, SessionError> {
        self.check()?;
        let mut live = self.0.live.lock();
        if !live.has_room() {
            return Err(SessionError::TooMany {
                what: "sessions of one writer, or of its closed ones that are not tidied up",
                most: caps::SESSIONS_HELD_MAX as u64,
            });
        }
        let slot = live.claim(name).ok_or_else(|| SessionError::Owned(name.clone()))?;
        drop(live);
        Ok(Claiming { writer: self, name, slot })
    }

    /// Opens a session that there has never been. Its first step begins it; until that is acknowledged, nothing of it is durable. The answer is
    /// its epoch. Dropped, or after an error of a request, it may be open, with nothing in it: [`Self::claim`] takes it.
    pub async fn open(&self, name: &Name) -> Result<u64, SessionError> {
        let claiming = self.claiming(name)?;
        let (store, looks) = (&self.0.store, standing::epochs(&self.0.store, name));
        let ((), there) = futures::future::try_join(self.check_begun(), looks).await?;
        if let Some(there) = there.standing {
            return Err(match &there.owner.holder {
                Some(holder) if there.owner.epoch > 1 || has_entry(store, &holder.log, 0).await?.is_some() => {
                    SessionError::Exists(name.clone())
                }
                // Of one whose log has no beginning, the first epoch came late.
                _ => SessionError::Closed(name.clone()),
            });
        }
        if !there.stray.is_empty() {
            // It was closed, and is being collected.
            return Err(SessionError::Closed(name.clone()));
        }
        let owner = Owner::next(name, None, Some(claiming.holder()), None);
        match self.0.store.create_owner(owner).await? {
            Ok(standing) => claiming.own(standing, Beginning::Fresh),
            Err(other) if other.holder.is_some() => return Err(SessionError::Exists(name.clone())),
            Err(_) => return Err(SessionError::Closed(name.clone())),
        }
        Ok(1)
    }

    /// Takes a session from whoever owns it, which is sealed, unless it gave the session away. Another claimant may be faster: then the error says
    /// who. Dropped, or after an error of a request, this writer may own it: claiming it again finds out.
    pub async fn claim(&self, name: &Name) -> Result<Claimed, SessionError> {
        self.claim_since(name, None).await
    }

    /// The same, where nobody owns it since a higher epoch: how a writer that was sealed gets back what nobody else claimed.
    pub async fn reclaim(&self, name: &Name, epoch: u64) -> Result<Claimed, SessionError> {
        self.claim_since(name, Some(epoch)).await
    }

    async fn claim_since(&self, name: &Name, since: Option<u64>) -> Result<Claimed, SessionError> {
        let claiming = self.claiming(name)?;
        let store = &self.0.store;
        for _ in 0..caps::CLAIMS_MAX {
            let Some(standing) = standing(store, name).await? else { return Err(SessionError::NoSuch(name.clone())) };
            if standing.owner.holder.is_none() || since.is_some_and(|since| !self.is_since(&standing.owner, since)) {
                return Err(taken(name, standing.owner));
            }
            if standing.owner.epoch >= caps::EPOCHS_MAX {
                return Err(SessionError::TooMany { what: "epochs of one session", most: caps::EPOCHS_MAX });
            }
            let state = match self.state(name, &standing).await {
                // Others claimed it meanwhile, and what it was in has been collected.
                Err(error) if error.is_gone() && self.has_moved_on(name, &standing).await? => continue,
                state => state?,
            };
            let pieces = match &state {
                Some(read) => match read::pieces(store, read).await {
                    Err(error) if error.is_gone() && self.has_moved_on(name, &standing).await? => continue,
                    pieces => pieces?,
                },
                None => Vec::new(),
            };
            // Otherwise an earlier try of this writer arrived meanwhile: it goes on from that.
            if let Some((standing, claimed)) = self.take(&claiming, standing, state, pieces).await? {
                let beginning = match &claimed.session {
                    Some(session) => Beginning::Claimed(Box::new(session.clone()), claimed.pieces.clone()),
                    None => Beginning::Fresh,
                };
                claiming.own(standing, beginning);
                return Ok(claimed);
            }
        }
        Err(SessionError::Contended(name.clone()))
    }

    fn is_mine(&self, owner: &Owner) -> bool {
        owner.holder.as_ref().is_some_and(|holder| holder.log == self.0.me.log)
    }

    /// Whether nobody else owns it since a higher epoch than this one.
    fn is_since(&self, owner: &Owner, since: u64) -> bool {
        owner.epoch == since || (owner.epoch == since + 1 && self.is_mine(owner))
    }

    async fn has_moved_on(&self, name: &Name, seen: &Standing) -> Result<bool, SessionError> {
        Ok(standing(&self.0.store, name).await?.as_ref() != Some(seen))
    }

    /// What the session is, in a log that nobody writes it in any more.
    async fn state(&self, name: &Name, standing: &Standing) -> Result<Option<Read>, SessionError> {
        let (store, owner) = (&self.0.store, &standing.owner);
        let Some(holder) = &owner.holder else { return Err(SessionError::Closed(name.clone())) };
        let found = if holder.log == self.0.me.log {
            self.own_state(name, holder.slot).await?
        } else {
            let mut log = Log::look(store, &holder.log).await?;
            log.check_holder(owner)?;
            let mut found = read::newest(store, &log, holder.slot).await?;
            if found.is_none_or(|(_, ends)| ends.is_none()) {
                let end = log.end();
                log.seal(store, &self.0.me).await?;
                // What it wrote meanwhile may be more than is read of a log's end.
                found = read::newest_since(store, &log, holder.slot, end).await?.or(found);
            }
            found
        };
        match found {
            Some((_, Some(End::Closed))) => Err(SessionError::Closed(name.clone())),
            Some((place, _)) => {
                let (log, slot) = (holder.log.clone(), holder.slot);
                read::session(store, name, Origin { epoch: owner.epoch, log, slot, place }).await.map(Some)
            }
            None => match &owner.from {
                Some(from) => read::session(store, name, from.clone()).await.map(Some),
                None => Ok(None),
            },
        }
    }

    /// The same of the own log: the session moved out of it, or a claim was dropped before anything was written for it.
    async fn own_state(
        &self,
        name: &Name,
        slot: u32,
    ) -> Result<Option<(super::entry::Place, Option<End>)>, SessionError> {
        let ended = {
            let live = self.0.live.lock();
            if live.is_over(slot) {
                return Err(SessionError::Closed(name.clone()));
            }
            live.ended.iter().find(|ended| ended.slot == slot).cloned()
        };
        let Some(ended) = ended else { return Ok(None) };
        self.flush().await?;
        Ok(Some((ended.place, Some(ended.ends))))
    }

    /// Creates the next epoch: it, and what was claimed by it. None, where an earlier try of this writer has created it.
    async fn take(
        &self,
        claiming: &Claiming<'_>,
        before: Standing,
        state: Option<Read>,
        pieces: Vec<Option<Bytes>>,
    ) -> Result<Option<(Standing, Claimed)>, SessionError> {
        let (store, name) = (&self.0.store, claiming.name);
        let from = state.as_ref().map(|read| read.origin.clone());
        let owner = Owner::next(name, Some(&before), Some(claiming.holder()), from);
        let epoch = owner.epoch;
        let standing = match store.create_owner(owner).await? {
            Ok(standing) => standing,
            Err(other) if self.is_mine(&other) => return Ok(None),
            Err(other) => return Err(taken(name, other)),
        };
        let there = standing::read(store, name, before.owner.epoch).await?;
        if there.map(|body| Digest::of(&body)) != Some(before.digest) {
            // Nobody takes it for anything; so where this fails, it stays.
            let _ = store.bucket.delete(&store.epoch(name, epoch), store.deadline()).await;
            return Err(SessionError::NoSuch(name.clone()));
        }
        let session = state.map(|read| read.session);
        Ok(Some((standing, Claimed { epoch, session, pieces })))
    }
}

impl Store {
    /// Creates an epoch: it as it stands, or what is there instead.
    async fn create_owner(&self, owner: Owner) -> Result<Result<Standing, Owner>, SessionError> {
        let (name, epoch) = (owner.name.clone(), owner.epoch);
        let what = || format!("epoch {epoch} of the session {name}");
        let body = Bytes::from(owner.encode().map_err(SessionError::damaged(what()))?);
        let failed = |cause: Trouble| SessionError::Request { what: format!("{} was written", what()), cause };
        match self.create(&self.epoch(&name, epoch), &body, caps::OWNER_BYTES_MAX).await.map_err(failed)? {
            Created::There(there) if there != body => {
                Owner::decode(&there, &name, epoch).map(Err).map_err(SessionError::damaged(what()))
            }
            _ => Ok(Ok(Standing { owner, digest: Digest::of(&body) })),
        }
    }
}
