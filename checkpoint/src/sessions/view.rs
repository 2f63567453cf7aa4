//! What there is of sessions, for people and for whoever places them: nothing is sealed or claimed by looking.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt};

use super::entry::{End, Sealer};
use super::error::SessionError;
use super::log::Log;
use super::name::{Name, is_part};
use super::owner::{Holder, Origin};
use super::read;
use super::standing::standing;
use super::state::Session;
use super::store::Store;
use crate::caps;

/// A session, and who owns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What it is called.
    pub name: Name,
    /// Since this epoch its owner owns it.
    pub epoch: u64,
    /// The owner; none where it was closed.
    pub holder: Option<Holder>,
}

/// A session, and what is durable of it just now.
#[derive(Clone, Debug, PartialEq)]
pub struct Inspected {
    /// Who owns it.
    pub listed: Listed,
    /// How it ended there, if it has.
    pub ends: Option<End>,
    /// Who sealed the owner's log, if anybody has.
    pub sealed_by: Option<Sealer>,
    /// What is durable. `None`: it was opened, and has not begun.
    pub session: Option<Session>,
}

impl Store {
    /// All sessions of a namespace, or of all of them, by name.
    pub async fn list(&self, namespace: Option<&str>) -> Result<Vec<Listed>, SessionError> {
        let names = self.names(namespace).await?;
        let each =
            names.into_iter().map(|name| async move { Ok::<_, SessionError>((standing(self, &name).await?, name)) });
        let found: Vec<_> = futures::stream::iter(each).buffered(caps::SESSION_READS_AT_ONCE).try_collect().await?;
        let listed = found.into_iter().filter_map(|(standing, name)| {
            let owner = standing?.owner;
            Some(Listed { name, epoch: owner.epoch, holder: owner.holder })
        });
        Ok(listed.collect())
    }

    /// Names below which something lies.
    pub(super) async fn names(&self, namespace: Option<&str>) -> Result<BTreeSet<Name>, SessionError> {
        if let Some(namespace) = namespace.filter(|namespace| !is_part(namespace)) {
            Name::new(namespace, "any").map_err(SessionError::damaged("the namespace"))?;
        }
        let most = caps::SESSION_OBJECTS_MAX;
        let listed = self.bucket.list(&self.sessions(namespace), most, self.deadline()).await;
        let listed = listed.map_err(SessionError::request("sessions were listed"))?;
        if listed.len() == most {
            return Err(SessionError::TooMany { what: "epochs of sessions", most: most as u64 });
        }
        let name = |parts: Vec<String>| match parts.as_slice() {
            [_, namespace, id, _] => Name::new(namespace, id).ok(),
            _ => None,
        };
        Ok(listed.iter().filter_map(|meta| name(self.below(&meta.location))).collect())
    }

    /// One session, as far as it is durable; its owner may go on meanwhile.
    pub async fn inspect(&self, name: &Name) -> Result<Inspected, SessionError> {
        for _ in 0..caps::CLAIMS_MAX {
            let Some(before) = standing(self, name).await? else { return Err(SessionError::NoSuch(name.clone())) };
            let epoch = before.owner.epoch;
            let listed = Listed { name: name.clone(), epoch, holder: before.owner.holder.clone() };
            let found = self.durable(name, &before.owner).await;
            // What was read is what it is, if nobody claimed it meanwhile.
            if standing(self, name).await?.as_ref() != Some(&before) {
                continue;
            }
            let (ends, sealed_by, session) = found?;
            return Ok(Inspected { listed, ends, sealed_by, session });
        }
        Err(SessionError::Contended(name.clone()))
    }

    async fn durable(
        &self,
        name: &Name,
        owner: &super::owner::Owner,
    ) -> Result<(Option<End>, Option<Sealer>, Option<Session>), SessionError> {
        let Some(holder) = &owner.holder else { return Ok((Some(End::Closed), None, None)) };
        let log = Log::look(self, &holder.log).await?;
        log.check_holder(owner)?;
        let sealed_by = log.seal.as_ref().map(|(_, by)| by.clone());
        let found = read::newest(self, &log, holder.slot).await?;
        let ends = found.and_then(|(_, ends)| ends);
        let here =
            found.map(|(place, _)| Origin { epoch: owner.epoch, log: holder.log.clone(), slot: holder.slot, place });
        let session = match here.or_else(|| owner.from.clone()) {
            Some(origin) => Some(read::session(self, name, origin).await?.session),
            None => None,
        };
        Ok((ends, sealed_by, session))
    }
}
