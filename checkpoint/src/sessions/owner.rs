//! Who owns a session from an epoch on: one create-only object for each epoch. Pure.
//!
//! Each names the one before it by its digest, down to the first. So what lies there without them (a create that was delayed until all
//! else had been collected) is known to mean nothing.

use serde::{Deserialize, Serialize};

use super::entry::{FORMAT, Place, check_format, decode, encode};
use super::name::Name;
use super::state::refused;
use crate::caps;
use crate::digest::Digest;
use crate::manifest::{Bounded, Refused, is_id};

const DIGEST_BYTES: usize = 32;

/// The log that a session is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its id.
    pub log: String,
    /// The session's slot in it.
    pub slot: u32,
    /// What its writer calls itself, for people.
    pub writer: String,
}

/// Where the session's state is as long as the holder's log has none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The epoch that wrote it.
    pub epoch: u64,
    /// The log of that epoch, which was sealed, or out of which the session had moved.
    pub log: String,
    /// The session's slot there.
    pub slot: u32,
    /// Its newest record.
    pub place: Place,
}

/// See the head of this file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// 1.
    pub format: u32,
    /// What a reader must know of to read it right; it refuses what it does not know.
    #[serde(default, skip_serializing_if = "Bounded::is_empty")]
    pub critical: Bounded<String, { caps::FACTS_MAX }>,
    /// The session.
    pub name: Name,
    /// From 1 on.
    pub epoch: u64,
    /// The digest of the epoch before it; none for the first.
    pub before: Option<Digest>,
    /// Who owns it. `None`: nobody will any more; it was closed.
    pub holder: Option<Holder>,
    /// What it begins with; none for a session that is new.
    pub from: Option<Origin>,
}

impl Owner {
    /// The epoch after `before`, or the first.
    pub(super) fn next(name: &Name, before: Option<&Standing>, holder: Option<Holder>, from: Option<Origin>) -> Self {
        Self {
            format: FORMAT,
            critical: Bounded::default(),
            name: name.clone(),
            epoch: before.map_or(1, |before| before.owner.epoch + 1),
            before: before.map(|before| before.digest),
            holder,
            from,
        }
    }

    /// As it is stored: CBOR and its BLAKE3-256.
    pub fn encode(&self) -> Result<Vec<u8>, Refused> {
        let mut out = encode(self)?;
        let digest = Digest::of(&out);
        out.extend_from_slice(&digest.0);
        Ok(out)
    }

    /// Of what is stored for this session and epoch, checked.
    pub fn decode(stored: &[u8], name: &Name, epoch: u64) -> Result<Self, Refused> {
        let split = stored.len().checked_sub(DIGEST_BYTES).and_then(|at| stored.split_at_checked(at));
        let Some((cbor, digest)) = split else { return refused("it is too short") };
        if Digest::of(cbor).0 != digest {
            return refused("it is not what was written");
        }
        let owner: Self = decode(cbor)?;
        check_format(owner.format, &owner.critical.0)?;
        if owner.name != *name || owner.epoch != epoch || epoch == 0 {
            return refused(format!(
                "it is epoch {} of {}, and lies where epoch {epoch} of {name} does",
                owner.epoch, owner.name
            ));
        }
        if owner.before.is_some() != (epoch > 1) || (owner.from.is_some() && epoch == 1) {
            return refused("the first epoch follows none, and each other one does");
        }
        let logs = owner.holder.iter().map(|holder| &holder.log).chain(owner.from.iter().map(|from| &from.log));
        if logs.into_iter().any(|log| !is_id(log)) {
            return refused("it names a log that is none");
        }
        if owner.from.as_ref().is_some_and(|from| from.place.2 > caps::SESSION_BYTES_MAX || from.epoch >= epoch) {
            return refused("it begins with a record that cannot be");
        }
        match owner.holder.as_ref().is_some_and(|holder| holder.writer.len() > caps::TEXT_BYTES_MAX) {
            true => refused("its writer's name is too long"),
            false => Ok(owner),
        }
    }
}

/// The highest epoch of a session, and the digest of its object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) owner: Owner,
    pub(super) digest: Digest,
}

/// The last of these epochs that follows from the first, without a gap: what is behind it means nothing. They are sorted.
pub(super) fn follow(name: &Name, stored: &[(u64, impl AsRef<[u8]>)]) -> Result<Option<Standing>, Refused> {
    let mut last: Option<Standing> = None;
    for ((epoch, bytes), due) in stored.iter().zip(1..) {
        // Nobody follows one that was closed.
        if *epoch != due || last.as_ref().is_some_and(|last| last.owner.holder.is_none()) {
            break;
        }
        let owner = Owner::decode(bytes.as_ref(), name, *epoch)?;
        if owner.before != last.as_ref().map(|last| last.digest) {
            break;
        }
        last = Some(Standing { owner, digest: Digest::of(bytes.as_ref()) });
    }
    Ok(last)
}
