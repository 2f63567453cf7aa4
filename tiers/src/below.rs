//! A tier below memory, as the stack sees it: a place that takes copies of blocks and gives them back.
//!
//! Such a tier only moves bytes. What moves, when, why and from where is the stack's ([`crate::stack`]). It checks what it
//! reads: identity and checksums, before it says that a block arrived. Nothing in it waits on the caller's thread.

use std::sync::Arc;

use futures::future::BoxFuture;
use kvstore_plane::SequenceHash;
use tokio::sync::futures::Notified;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::block::{Block, OwnedRun, Run};
use crate::clock::BootTime;
use crate::host::{BlockFill, FilledBlock, HoldId, HoldKind, LeasedBlock};
use crate::slots::{Delete, Priority};

/// See the head of this file. `tests/tests/it/tier_conformance.rs` is the suite that every tier passes.
pub trait Below: Send + Sync {
    /// Which blocks it has, as far as it knows. A tier that does not answer has none.
    fn presence(&self, run: &Run<'_>, ask: Ask) -> Known;

    /// Reads blocks into the slots that are reserved for them; neighbours may travel together. Each read is told its end once, on
    /// any thread. Until then the tier has the slot, whoever waits.
    fn read(self: Arc<Self>, reads: Vec<Read>, urgency: ReadUrgency);

    /// Takes a copy of a block that is readable in memory. A block that it has already is not written again.
    fn write(self: Arc<Self>, write: Write) -> Written;

    /// Whether more may be written now. Where it is `wanted` and there is none, what the tier is still gathering is written at once.
    fn room(&self, wanted: bool) -> Room<'_>;

    /// Promises to keep blocks: those that it has by now, or that come while it holds them; a shared tier only those that are somewhere.
    /// All of them or, where that is refused, none. The promise holds when this returns, and across a crash once [`Holding`] has ended well.
    fn hold(self: Arc<Self>, hold: Hold) -> Result<Holding, NotHeld>;

    /// Ends a hold before its time; false where there is none of this name and kind (any more). One that is still being made ends once
    /// it is made.
    fn release(self: Arc<Self>, id: HoldId, kind: HoldKind) -> bool;

    /// Deletes blocks, but for those that a hold keeps; what became of each. What is on its way there is deleted, too. A tier that knows
    /// what it has finds none of them once this returns. No crash brings one back once the future has ended well. Where the future is
    /// dropped, some may be deleted.
    fn delete(self: Arc<Self>, run: OwnedRun) -> BoxFuture<'static, Result<Vec<Delete>, NotDeleted>>;
}

/// Why the presence of blocks is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ask {
    /// To know.
    Look,
    /// A request wants them: they count as used now.
    Want(BootTime),
    /// A request read them in memory: their copies are worth keeping.
    Read,
    /// What is on its way there counts, too.
    Coming,
    /// Only what a hold keeps counts, be it there or not.
    Held,
    /// Somebody waits for them: reads that are under way become urgent, where the tier can do that.
    Hurry,
    /// What is not known is looked for: see [`Known::searching`].
    Search(BootTime),
}

/// What a tier knows of some blocks.
#[derive(Default)]
pub struct Known {
    /// For each, whether the tier has it.
    pub there: Vec<bool>,
    /// A search for the others, where one is under way.
    pub searching: Option<Searching>,
}

impl From<Vec<bool>> for Known {
    fn from(there: Vec<bool>) -> Self {
        Self { there, searching: None }
    }
}

/// A search that is under way; resolves when it ends, however it ends.
pub struct Searching(watch::Receiver<()>);

impl Searching {
    /// One that ends when the sender is dropped.
    pub fn new(running: watch::Receiver<()>) -> Self {
        Self(running)
    }

    /// Waits for the end.
    pub async fn ended(mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

/// How urgent some reads are.
#[derive(Clone, Copy, Debug)]
pub struct ReadUrgency {
    /// The lane that they deserve.
    pub priority: Priority,
    /// When nobody waits any more.
    pub deadline: Instant,
}

/// A block that is to be read.
pub struct Read {
    /// Which.
    pub block: Block,
    /// Where its bytes go.
    pub fill: BlockFill,
    /// Told the end.
    pub done: ReadDone,
}

/// See [`Read`].
pub type ReadDone = Box<dyn FnOnce(Result<Arrived, NotRead>) + Send>;

/// A block whose bytes are in its slot, whole and checked.
pub struct Arrived {
    /// To be published.
    pub filled: FilledBlock,
    /// The checksums of its sections, where the tier took them.
    pub sums: Vec<u32>,
    /// The block before it, as its frame says.
    pub parent: Option<SequenceHash>,
}

/// A block that could not be read.
pub struct NotRead {
    /// Its slot, free to be filled from elsewhere. `None` where that is lost with what failed.
    pub fill: Option<BlockFill>,
    /// Why.
    pub why: WhyNotRead,
}

/// See [`NotRead`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WhyNotRead {
    /// It is not there, or no longer.
    Absent,
    /// It is damaged there, and is not found there any more.
    Damaged,
    /// The tier has as many transfers as it may: ask again.
    Busy,
    /// The tier failed, or did not answer in time.
    Failed,
}

/// A block that is to be copied to a tier.
pub struct Write {
    /// Which.
    pub block: Block,
    /// The block before it.
    pub parent: Option<SequenceHash>,
    /// The checksums of its sections, where they were taken; else the tier takes them.
    pub sums: Vec<u32>,
    /// Its bytes, where the caller has leased them: a tier that needs them for longer keeps the lease.
    pub leased: Option<LeasedBlock>,
    /// Somebody waits until it is safe there.
    pub awaited: bool,
    /// Whoever brings it has waited for room: it is taken a little beyond the bound.
    pub has_waited: bool,
}

/// What came of a write.
pub enum Written {
    /// It is on its way, or there already. Where it is awaited, the channel tells true once it is safe there (LOCAL, or DURABLE),
    /// false where it is not for now.
    Coming(Option<oneshot::Receiver<bool>>),
    /// The tier does not take it: too much waits, it takes no writes, or the block is too large.
    Refused,
}

/// Room for writes, at one moment.
pub struct Room<'a> {
    /// There is some.
    pub is_there: bool,
    /// The tier works: it makes sense to wait.
    pub answers: bool,
    /// Resolves when there may be more.
    pub freed: Notified<'a>,
}

/// Blocks that are to be held.
pub struct Hold {
    /// Names it, in every tier by the same name.
    pub id: HoldId,
    /// A pin outlives the daemon, where the tier's bytes do. A ticket does not.
    pub kind: HoldKind,
    /// Which.
    pub runs: Vec<OwnedRun>,
    /// Until then.
    pub expires: BootTime,
    /// Now, by the same clock.
    pub now: BootTime,
}

/// What of a hold has yet to happen before it is safe from a crash; `None` where that is nothing. Whoever drops it releases the hold.
pub type Holding = Option<BoxFuture<'static, Result<(), NotHeld>>>;

/// Why blocks are not held.
#[derive(Debug, thiserror::Error)]
pub enum NotHeld {
    /// More would be held than may be. Another time it may be less.
    #[error("{0}")]
    TooMuch(String),
    /// These blocks alone are more than may be held: to wait does not help.
    #[error("{0}")]
    TooLarge(String),
    /// The tier cannot promise it now.
    #[error("{0}")]
    Failed(String),
}

/// Why an answer cannot be that blocks are deleted: what to do is said, too.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotDeleted(pub String);
