//! Prewarms under way: calls that want the same snapshot in the same place share one. `verbs/prewarm.rs` does their work.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kvstore_tiers::host::{LeasedBlock, NamespaceId, RegisteredLayout};
use kvstore_tiers::{SequenceHash, Tier};
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::Status;

use crate::caps;

/// What is brought where.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// Whose blocks the chunks are.
    pub namespace: NamespaceId,
    /// The snapshot's id.
    pub id: String,
    /// Where they are brought.
    pub tier: Tier,
    /// They stay there until all have come, to be pinned then.
    pub is_kept: bool,
}

/// How far it is, in bytes.
#[derive(Default)]
pub struct Counts {
    /// In all.
    pub total: AtomicU64,
    /// There.
    pub done: AtomicU64,
    /// Of those, found there.
    pub found: AtomicU64,
    /// That came from the store.
    pub read: AtomicU64,
}

/// All chunks are there, and stay as long as this lives.
pub struct Warm {
    /// The chunks, by layout.
    pub runs: Vec<(Arc<RegisteredLayout>, Vec<SequenceHash>)>,
    /// Those in memory, where they are to be pinned.
    pub leased: Vec<LeasedBlock>,
    /// What they take of the memory that prewarms may hold.
    pub _share: Option<Share>,
}

/// How a prewarm ended.
pub type Ended = Result<Arc<Warm>, Status>;

/// One that is under way.
pub struct Flight {
    /// How far it is.
    pub counts: Counts,
    ended: watch::Sender<Option<Ended>>,
}

impl Flight {
    /// Waits for its end.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        let gone = || Err(Status::unavailable("the daemon stops: prewarm the snapshot again"));
        match ended.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().unwrap_or_else(gone),
            Err(_) => gone(),
        }
    }
}

/// See the head of this file.
#[derive(Default)]
pub struct Prewarms {
    flights: Mutex<HashMap<Key, Arc<Flight>>>,
    /// Bytes of memory that they hold, or may come to hold.
    held: Mutex<u64>,
}

/// A part of the memory that prewarms may hold. Given back when dropped.
pub struct Share {
    prewarms: Arc<Prewarms>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        *self.prewarms.held.lock() -= self.bytes;
    }
}

/// The right to do a prewarm's work. Dropped, it is over.
pub struct Turn {
    prewarms: Arc<Prewarms>,
    key: Key,
    /// Whoever waits for it.
    pub flight: Arc<Flight>,
}

impl Turn {
    /// It is over. Who comes from now on begins a new one.
    pub fn end(self, ended: Ended) {
        self.flight.ended.send_replace(Some(ended));
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.prewarms.flights.lock().remove(&self.key);
        self.flight.ended.send_if_modified(|ended| {
            let is_cut_off = ended.is_none();
            if is_cut_off {
                *ended = Some(Err(Status::unavailable("the prewarm was cut off: prewarm the snapshot again")));
            }
            is_cut_off
        });
    }
}

impl Prewarms {
    /// A share of the `most` bytes that all of them may hold. What one holds while it waits for the rest, another cannot have: so none begins
    /// that might wait for another.
    pub fn share(self: &Arc<Self>, bytes: u64, most: u64) -> Result<Share, Status> {
        let mut held = self.held.lock();
        if *held + bytes > most {
            return Err(Status::resource_exhausted(
                "other snapshots that are being prewarmed take the memory that may be pinned: try again when they have come",
            ));
        }
        *held += bytes;
        Ok(Share { prewarms: Arc::clone(self), bytes })
    }

    /// The prewarm of this; with a turn, where the caller is the first to want it.
    pub fn join(self: &Arc<Self>, key: &Key) -> Result<(Arc<Flight>, Option<Turn>), Status> {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(key) {
            return Ok((Arc::clone(flight), None));
        }
        if flights.len() >= caps::PREWARMS_MAX {
            return Err(Status::resource_exhausted(format!(
                "{} snapshots are being prewarmed, which is the maximum: try again when one of them has come",
                caps::PREWARMS_MAX
            )));
        }
        let flight = Arc::new(Flight { counts: Counts::default(), ended: watch::Sender::new(None) });
        flights.insert(key.clone(), Arc::clone(&flight));
        drop(flights);
        let turn = Turn { prewarms: Arc::clone(self), key: key.clone(), flight: Arc::clone(&flight) };
        Ok((flight, Some(turn)))
    }
}
