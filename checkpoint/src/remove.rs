//! Taking a name away, or a snapshot that has none.

use crate::store::{NameHistory, Store, StoreError};

/// Why nothing was removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// Names mean it.
    #[error("the snapshot {id} is called {names}; remove that first")]
    Named {
        /// Which.
        id: String,
        /// Its names, with commas.
        names: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The names that mean a snapshot.
pub fn names_of(names: &[NameHistory], id: &str) -> Vec<String> {
    names.iter().filter(|history| history.now() == Some(id)).map(|history| history.name.clone()).collect()
}

/// Takes away a name; or a snapshot, by its id, that no name means.
pub async fn remove(store: &Store, asked: &str) -> Result<(), RemoveError> {
    let names = store.names().await?;
    if names.iter().any(|history| history.name == asked && history.now().is_some()) {
        return Ok(store.let_mean(asked, None).await?);
    }
    let id = store.resolve(asked).await?;
    store.snapshot(&id).await?;
    let named = names_of(&names, &id);
    if !named.is_empty() {
        return Err(RemoveError::Named { id, names: named.join(", ") });
    }
    Ok(store.remove(&id).await?)
}
