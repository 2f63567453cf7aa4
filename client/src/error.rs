//! What can go wrong, one variant for each thing a caller may want to do about it.

use tonic::{Code, Status};

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The address is not one.
    #[error("{0:?} is not an address; use unix:/path/to/socket or http://host:port")]
    Address(String),
    /// No daemon answers there, it drains, or it cannot keep now what an OK would promise. Try again later.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// All calls together reach a bound. Try again later.
    #[error("busy: {0}")]
    Busy(String),
    /// The request is wrong.
    #[error("invalid: {0}")]
    Invalid(String),
    /// The layout or ticket is unknown to the daemon: it restarted, perhaps. Register the layout again.
    #[error("not found: {0}")]
    NotFound(String),
    /// The daemon can never do this as it is configured: it has no tier for the level, or may never pin so much.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The call's time is over.
    #[error("deadline exceeded: {0}")]
    Deadline(String),
    /// Bytes came that are not those that were stored.
    #[error("data loss: {0}")]
    DataLoss(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::Unavailable => Self::Unavailable(message),
            Code::ResourceExhausted => Self::Busy(message),
            Code::InvalidArgument => Self::Invalid(message),
            Code::NotFound => Self::NotFound(message),
            Code::FailedPrecondition | Code::Unimplemented => Self::Unsupported(message),
            Code::DeadlineExceeded | Code::Cancelled => Self::Deadline(message),
            Code::DataLoss => Self::DataLoss(message),
            code => Self::Other(format!("{code}: {message}")),
        }
    }
}

impl From<hyper::Error> for Error {
    fn from(error: hyper::Error) -> Self {
        use std::error::Error as _;
        let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
        Self::Unavailable(format!("the connection broke: {error}{cause}"))
    }
}
