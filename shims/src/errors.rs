//! Exceptions: one for each thing that a caller may want to do about it, as in the Rust client.

use kvstore_client::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyConnectionError, PyException, PyTimeoutError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    kvstore,
    KvStoreError,
    PyException,
    "Something is wrong. Misses and blocks on their way are values, not this."
);
create_exception!(kvstore, Busy, KvStoreError, "A bound is reached: try again later, or with less.");
create_exception!(
    kvstore,
    DataLoss,
    KvStoreError,
    "Pinned data cannot be read from any tier any more, or bytes came that were not stored."
);
create_exception!(
    kvstore,
    Unavailable,
    KvStoreError,
    "No daemon answers, or it drains: try again later. Also a ConnectionError."
);
create_exception!(kvstore, DeadlineExceeded, KvStoreError, "The call's time is over. Also a TimeoutError.");
create_exception!(
    kvstore,
    Invalid,
    KvStoreError,
    "The request is wrong; the message names what, and what would be valid. Also a ValueError."
);
create_exception!(kvstore, NotFound, KvStoreError, "The layout or ticket is unknown to the daemon.");
create_exception!(kvstore, Unsupported, KvStoreError, "The daemon, or the plane, has no such thing.");

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
