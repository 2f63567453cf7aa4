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
    Fenced,
    KvStoreError,
    "Somebody else has the session now, or has sealed this writer's log. What was acknowledged is with them; nothing more is taken from here."
);
create_exception!(
    kvstore,
    Unsupported,
    KvStoreError,
    "The daemon can never do this as it is configured, or the plane does not support it."
);

/// What a call failed with.
#[derive(Debug)]
pub enum Fault {
    /// An error that the client has, too.
    Error(Error),
    /// A writer of sessions was sealed, or a session is somebody else's.
    Fenced(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// What a call failed with, as Python sees it.
pub fn raise(fault: impl Into<Fault>) -> PyErr {
    match fault.into() {
        Fault::Error(error) => raise_error(&error),
        Fault::Fenced(message) => PyErr::new::<Fenced, _>(message),
    }
}

fn raise_error(error: &Error) -> PyErr {
    let message = error.to_string();
    Python::attach(|py| {
        // Those that Python has a word for are that, too.
        let named = |name: &str| -> PyResult<PyErr> {
            let class = py.import("kvstore")?.getattr(name)?;
            Ok(PyErr::from_value(class.call1((message.as_str(),))?))
        };
        let (name, plain): (&str, fn(String) -> PyErr) = match error {
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
        of_store(&error)
    }

    pub fn of_store(error: &StoreError) -> Error {
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

/// Errors of sessions.
pub mod sessions {
    use kvstore_checkpoint::sessions::{Broken, SessionError};
    use kvstore_client::Error;

    use super::Fault;

    pub fn session(error: &SessionError) -> Fault {
        let message = error.to_string();
        match error {
            SessionError::Store(error) => super::snapshots::of_store(error).into(),
            SessionError::Broken(error) => broken(error),
            SessionError::Taken { .. } => Fault::Fenced(message),
            SessionError::Request { .. } => Error::Unavailable(message).into(),
            SessionError::Damaged { .. } | SessionError::Lost { .. } => Error::DataLoss(message).into(),
            SessionError::Closed(_) | SessionError::NoSuch(_) => Error::NotFound(message).into(),
            SessionError::Exists(_) | SessionError::Owned(_) => Error::Invalid(message).into(),
            SessionError::TooMany { .. } => Error::Unsupported(message).into(),
            SessionError::Gone => Error::Unavailable(message).into(),
            SessionError::Busy { .. }
            | SessionError::Collecting(_)
            | SessionError::LeaseLost
            | SessionError::Contended(_) => Error::Busy(message).into(),
        }
    }

    fn broken(error: &Broken) -> Fault {
        let message = error.to_string();
        match error {
            Broken::Sealed { .. } => Fault::Fenced(message),
            Broken::Failed { .. } => Error::Unavailable(message).into(),
            Broken::Full(_) => Error::Busy(message).into(),
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
    module.add("Fenced", py.get_type::<Fenced>())?;
    module.add("NotFound", py.get_type::<NotFound>())?;
    module.add("Unsupported", py.get_type::<Unsupported>())
}
