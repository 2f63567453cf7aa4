//! Exceptions: one for each thing that a caller may want to do about it, as in the Rust client.

use kvstore_client::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyConnectionError, PyException, PyTimeoutError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    kvstore,
    KvStoreError,
    PyException,
    "A call failed. A miss, or a block that is on its way, is a value and does not raise."
);
create_exception!(kvstore, Busy, KvStoreError, "All calls together reach a bound. Try again later.");
create_exception!(
    kvstore,
    DataLoss,
    KvStoreError,
    "A pinned block can no longer be read from any tier, or the bytes that came are not the bytes that were stored."
);
create_exception!(
    kvstore,
    Unavailable,
    KvStoreError,
    "No daemon answers, or the daemon drains. Try again later. Also a ConnectionError."
);
create_exception!(
    kvstore,
    DeadlineExceeded,
    KvStoreError,
    "The call did not end by its deadline. Also a TimeoutError."
);
create_exception!(
    kvstore,
    Invalid,
    KvStoreError,
    "The request is wrong. The message names what is wrong, and what would be valid. Also a ValueError."
);
create_exception!(kvstore, NotFound, KvStoreError, "The daemon does not know the layout or ticket.");
create_exception!(
    kvstore,
    Unsupported,
    KvStoreError,
    "The daemon can never do this as it is configured, or the plane does not support it."
);

/// The client's error, as Python sees it.
pub fn raise(error: Error) -> PyErr {
    let message = error.to_string();
    Python::attach(|py| {
        // Those that Python has a word for are that, too.
        let named = |name: &str| -> PyResult<PyErr> {
            let class = py.import("kvstore")?.getattr(name)?;
            Ok(PyErr::from_value(class.call1((message.as_str(),))?))
        };
        let (name, plain): (&str, fn(String) -> PyErr) = match &error {
            Error::Unavailable(_) => ("Unavailable", PyErr::new::<PyConnectionError, _>),
            Error::Deadline(_) => ("DeadlineExceeded", PyErr::new::<PyTimeoutError, _>),
            Error::Invalid(_) | Error::Address(_) => ("Invalid", PyErr::new::<PyValueError, _>),
            Error::Busy(_) => ("Busy", PyErr::new::<Busy, _>),
            Error::DataLoss(_) => ("DataLoss", PyErr::new::<DataLoss, _>),
            Error::NotFound(_) => ("NotFound", PyErr::new::<NotFound, _>),
            Error::Unsupported(_) => ("Unsupported", PyErr::new::<Unsupported, _>),
            Error::Other(_) => ("Error", PyErr::new::<KvStoreError, _>),
        };
        named(name).unwrap_or_else(|_| plain(message.clone()))
    })
}

/// Errors of snapshots, as those of the client: one for each thing that a caller may want to do about it.
pub mod snapshots {
    use kvstore_checkpoint::cache::CacheError;
    use kvstore_checkpoint::collect::CollectError;
    use kvstore_checkpoint::remove::RemoveError;
    use kvstore_checkpoint::restore::RestoreError;
    use kvstore_checkpoint::save::SaveError;
    use kvstore_checkpoint::store::StoreError;
    use kvstore_client::Error;

    pub fn store(error: StoreError) -> Error {
        let message = error.to_string();
        match error {
            StoreError::Open(_) | StoreError::Name(_) | StoreError::Ambiguous(_) => Error::Invalid(message),
            StoreError::NoSuch(_) => Error::NotFound(message),
            StoreError::Request { .. } | StoreError::MayAppear { .. } | StoreError::Stopped(_) => {
                Error::Unavailable(message)
            }
            StoreError::Chunk { .. }
            | StoreError::Digest(_)
            | StoreError::Manifest { .. }
            | StoreError::Lost { .. } => Error::DataLoss(message),
            StoreError::Collecting(_) => Error::Busy(message),
            StoreError::Unable(_) | StoreError::TooMany { .. } | StoreError::NoTime => Error::Unsupported(message),
        }
    }

    pub fn restore(error: RestoreError) -> Error {
        let message = error.to_string();
        match error {
            RestoreError::Store(error) => store(error),
            RestoreError::Fact { name, found, asked } => {
                let found = found.map_or("not known".to_owned(), |found| format!("{found:?}"));
                Error::Invalid(format!(
                    "the snapshot's {name} is {found}, and {asked:?} is asked for; allow=[{name:?}] takes it nevertheless"
                ))
            }
            RestoreError::Exists(_) | RestoreError::TooManyFiles(_) => Error::Invalid(message),
            RestoreError::Write { .. } => Error::Other(message),
        }
    }

    pub fn save(error: SaveError) -> Error {
        let message = error.to_string();
        match error {
            SaveError::Store(error) => store(error),
            SaveError::Odd { .. } | SaveError::Read { .. } => Error::Invalid(message),
            SaveError::Changed(_) | SaveError::TooLong => Error::Busy(message),
        }
    }

    pub fn remove(error: RemoveError) -> Error {
        match error {
            RemoveError::Store(error) => store(error),
            named @ RemoveError::Named { .. } => Error::Invalid(named.to_string()),
        }
    }

    pub fn collect(error: CollectError) -> Error {
        let message = error.to_string();
        match error {
            CollectError::Store(error) => store(error),
            CollectError::Held(_) | CollectError::Saving(_) | CollectError::LeaseLost => Error::Busy(message),
            CollectError::TooManyChunks(_) => Error::Unsupported(message),
        }
    }

    pub fn cache(error: CacheError) -> Error {
        let message = error.to_string();
        match error {
            CacheError::Restore(error) => restore(error),
            CacheError::Full { .. } => Error::Busy(message),
            CacheError::Folder { .. } | CacheError::TooLarge { .. } => Error::Invalid(message),
            CacheError::Damaged(_) => Error::DataLoss(message),
        }
    }
}

/// Adds the exceptions to the module.
pub fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("Error", py.get_type::<KvStoreError>())?;
    module.add("Busy", py.get_type::<Busy>())?;
    module.add("DataLoss", py.get_type::<DataLoss>())?;
    module.add("Unavailable", py.get_type::<Unavailable>())?;
    module.add("DeadlineExceeded", py.get_type::<DeadlineExceeded>())?;
    module.add("Invalid", py.get_type::<Invalid>())?;
    module.add("NotFound", py.get_type::<NotFound>())?;
    module.add("Unsupported", py.get_type::<Unsupported>())
}
