//! What goes wrong, and what is refused.

use kvstore_bucket::Trouble;

use super::entry::Sealer;
use super::name::Name;
use crate::manifest::Refused;
use crate::store::StoreError;

/// Why one step of a commit was not made; the others are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The writer does not own it.
    #[error("this writer does not own the session {0}; claim it")]
    NotOwned(Name),
    /// It owns it already.
    #[error("this writer owns the session {0} already")]
    Owned(Name),
    /// It begins only once, and needs a beginning.
    #[error("the session {0} was opened, and has yet to begin; the first step gives its prompt")]
    NotBegun(Name),
    /// It begins only once.
    #[error("the session {0} has begun; its prompt stays as it is")]
    Begun(Name),
    /// It is there twice.
    #[error("a commit has one step of a session; another one of {0} goes with the next")]
    Twice(Name),
    /// What it says cannot be.
    #[error("the session {name}: {why}")]
    Invalid {
        /// Which.
        name: Name,
        /// Why.
        why: Refused,
    },
    /// It does not fit beside those that were before it. Alone, it would.
    #[error("this step does not fit into its commit, which has {0} bytes at most; give it to the next")]
    TooLarge(u64),
    /// It fits into no commit.
    #[error("this step has {bytes} bytes or more, and a commit {most} at most; give less in one step")]
    NeverFits {
        /// Bytes of it that were counted.
        bytes: u64,
        /// Of a commit.
        most: u64,
    },
}

/// Why a writer's log has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// It was sealed.
    #[error("the log {log} was sealed at {number} by {} (log {}): begin another, and claim its sessions", by.writer, by.log)]
    Sealed {
        /// Which.
        log: String,
        /// Where.
        number: u64,
        /// By whom.
        by: Sealer,
    },
    /// Of one of its entries it is not known whether it is there.
    #[error(
        "the log {log} cannot be gone on with, since its entry {number} failed: {why}; begin another, and claim its sessions"
    )]
    Failed {
        /// Which.
        log: String,
        /// The entry.
        number: u64,
        /// Why.
        why: String,
    },
    /// It has as many entries as a log may.
    #[error("the log {0} is full: begin another, and move its sessions")]
    Full(String),
}

/// Why something of sessions was not done.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The store, before anything was asked of sessions.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A request.
    #[error("{what}: {cause}")]
    Request {
        /// What it was for.
        what: String,
        /// Why it failed.
        cause: Trouble,
    },
    /// What is stored is not what was written, or cannot be read by this build.
    #[error("{what} cannot be used: {cause}")]
    Damaged {
        /// Which object, or part of one.
        what: String,
        /// Why.
        cause: Refused,
    },
    /// What the highest epoch names is not there.
    #[error("the session {name} is lost: {what} is not there any more")]
    Lost {
        /// Which.
        name: Name,
        /// What it needs.
        what: String,
    },
    /// The writer's log.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// Another owns it.
    #[error("the session {name} is owned by {writer} (log {log}) since epoch {epoch}")]
    Taken {
        /// Which.
        name: Name,
        /// The owner's.
        epoch: u64,
        /// What the owner calls itself.
        writer: String,
        /// Its log.
        log: String,
    },
    /// It is over.
    #[error("the session {0} was closed")]
    Closed(Name),
    /// There is none.
    #[error("there is no session {0}")]
    NoSuch(Name),
    /// There is one.
    #[error("the session {0} exists; claim it")]
    Exists(Name),
    /// The writer owns it, or is claiming it just now.
    #[error("this writer owns the session {0} already, or claims it just now")]
    Owned(Name),
    /// There is too much of it.
    #[error("there are more than {most} {what}, which is more than this build holds")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        most: u64,
    },
    /// More waits than is held; it passes.
    #[error("{most} {what} wait for a commit already; try again")]
    Busy {
        /// Of what.
        what: &'static str,
        /// How many, at most.
        most: u64,
    },
    /// Whoever was to commit a step has gone.
    #[error(
        "it is not known what became of this step: the runtime or the task that commits has ended; claim the session with another writer"
    )]
    Gone,
    /// A collection.
    #[error("another collector holds the lease for up to {0} more s; try again after that")]
    Collecting(u64),
    /// The collector's lease.
    #[error("the collector's lease ended before the collection did; the next collection takes the rest")]
    LeaseLost,
    /// It changes hands all the time.
    #[error("the session {0} was claimed by others each time that this claim tried")]
    Contended(Name),
}

impl SessionError {
    /// Whether an object is not there that was named elsewhere: it may have been collected meanwhile.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::NoSuch(_) | Self::Request { cause: Trouble::NotFound, .. })
    }

    pub(super) fn request(what: impl Into<String>) -> impl FnOnce(Trouble) -> Self {
        move |cause| Self::Request { what: what.into(), cause }
    }

    pub(super) fn damaged(what: impl Into<String>) -> impl FnOnce(Refused) -> Self {
        move |cause| Self::Damaged { what: what.into(), cause }
    }
}
