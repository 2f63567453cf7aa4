//! Who owns a session, as the store has it.

use futures::{StreamExt, TryStreamExt};
use kvstore_bucket::Trouble;

use super::error::SessionError;
use super::log::number_of;
use super::name::Name;
use super::owner::{Standing, follow};
use super::store::Store;
use crate::caps;

/// The epochs that lie there.
pub(super) struct Epochs {
    /// Of the last one that follows from the first; none where none does.
    pub(super) standing: Option<Standing>,
    /// The others.
    pub(super) stray: Vec<u64>,
}

/// The highest epoch of a session; none where it was never opened, or has been collected.
pub(super) async fn standing(store: &Store, name: &Name) -> Result<Option<Standing>, SessionError> {
    Ok(epochs(store, name).await?.standing)
}

/// The same, and what else lies there.
pub(super) async fn epochs(store: &Store, name: &Name) -> Result<Epochs, SessionError> {
    let first = look(store, name).await?;
    if first.stray.is_empty() {
        return Ok(first);
    }
    // A listing may show what was created while it was made, and not what was created before that. What the first one showed was there before
    // the second one began, and so was all that it follows.
    let mut second = look(store, name).await?;
    second.stray.retain(|epoch| first.stray.contains(epoch));
    Ok(second)
}

async fn look(store: &Store, name: &Name) -> Result<Epochs, SessionError> {
    let most = caps::EPOCHS_MAX as usize * 2;
    let listed = store.bucket.list(&store.epochs(name), most, store.deadline()).await;
    let listed = listed.map_err(SessionError::request(format!("the epochs of the session {name} were listed")))?;
    if listed.len() == most {
        return Err(SessionError::TooMany { what: "epochs of one session", most: caps::EPOCHS_MAX });
    }
    let mut numbers: Vec<u64> = listed.iter().filter_map(number_of).collect();
    numbers.sort_unstable();
    let each = numbers
        .iter()
        .copied()
        .map(|epoch| async move { Ok::<_, SessionError>((epoch, read(store, name, epoch).await?)) });
    let all: Vec<(u64, Option<bytes::Bytes>)> =
        futures::stream::iter(each).buffered(caps::SESSION_READS_AT_ONCE).try_collect().await?;
    // One that went since it was listed is being collected: nothing follows it.
    let there: Vec<(u64, bytes::Bytes)> = all.into_iter().map_while(|(epoch, body)| Some((epoch, body?))).collect();
    let standing =
        follow(name, &there).map_err(SessionError::damaged(format!("the ownership of the session {name}")))?;
    let highest = standing.as_ref().map_or(0, |standing| standing.owner.epoch);
    Ok(Epochs { standing, stray: numbers.into_iter().filter(|number| *number > highest).collect() })
}

/// An epoch as it is stored; none where it is not there.
pub(super) async fn read(store: &Store, name: &Name, epoch: u64) -> Result<Option<bytes::Bytes>, SessionError> {
    match store.bucket.read_all(&store.epoch(name, epoch), caps::OWNER_BYTES_MAX, store.deadline()).await {
        Ok((body, _)) => Ok(Some(body)),
        Err(Trouble::NotFound) => Ok(None),
        Err(cause) => {
            Err(SessionError::Request { what: format!("epoch {epoch} of the session {name} was read"), cause })
        }
    }
}
