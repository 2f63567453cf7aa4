//! A tier below memory that is a map, and that fails as it is told.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;
use kvstore_plane::SlotKey;
use kvstore_tiers::below::{
    Arrived, Ask, Below, Hold, Holding, Known, NotDeleted, NotHeld, NotRead, Read, ReadUrgency, Room, WhyNotRead,
    Write, Written,
};
use kvstore_tiers::host::{HoldId, HoldKind, HostTier};
use kvstore_tiers::slots::Delete;
use kvstore_tiers::{BlockRef, OwnedRun, Run, SequenceHash};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

/// What a read comes to instead of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFault {
    /// It is told so, and its slot comes back.
    Told(WhyNotRead),
    /// It is told so, and its slot does not come back.
    Lost(WhyNotRead),
    /// It is told nothing.
    Silent,
}

/// A block's bytes, and the block before it.
type Stored = (Vec<u8>, Option<SequenceHash>);

/// See the head of this file.
pub struct FaultyTier {
    host: Arc<HostTier>,
    blocks: Mutex<HashMap<SlotKey, Stored>>,
    faults: Mutex<VecDeque<ReadFault>>,
    /// How many blocks came with each call of `read`.
    batches: Mutex<Vec<usize>>,
    holds: Mutex<HashMap<(HoldId, HoldKind), Vec<SlotKey>>>,
    full: AtomicBool,
    freed: Notify,
    at_delete: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Reads that wait, where they are to.
    stalled: Mutex<Option<Vec<Read>>>,
}

impl FaultyTier {
    /// An empty one, without faults.
    pub fn new(host: &Arc<HostTier>) -> Arc<Self> {
        Arc::new(Self {
            host: Arc::clone(host),
            blocks: Mutex::default(),
            faults: Mutex::default(),
            batches: Mutex::default(),
            holds: Mutex::default(),
            full: AtomicBool::new(false),
            freed: Notify::new(),
            at_delete: Mutex::default(),
            stalled: Mutex::default(),
        })
    }

    /// The next reads fail so, in this order.
    pub fn fail(&self, faults: impl IntoIterator<Item = ReadFault>) {
        self.faults.lock().extend(faults);
    }

    /// Reads wait from now on, until [`Self::let_go`].
    pub fn stall(&self) {
        self.stalled.lock().get_or_insert_default();
    }

    /// Reads that wait are answered, and later ones at once.
    pub fn let_go(&self) {
        let stalled = self.stalled.lock().take();
        stalled.into_iter().flatten().for_each(|read| self.answer(read));
    }

    /// This happens once, while the next deletion is made safe.
    pub fn at_delete(&self, meanwhile: impl FnOnce() + Send + 'static) {
        *self.at_delete.lock() = Some(Box::new(meanwhile));
    }

    /// Whether it has room.
    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Release);
        self.freed.notify_waiters();
    }

    /// How many blocks came with each call of `read`.
    pub fn batches(&self) -> Vec<usize> {
        self.batches.lock().clone()
    }

    fn is_held(&self, key: &SlotKey) -> bool {
        self.holds.lock().values().flatten().any(|held| held == key)
    }

    /// Blocks that it has.
    pub fn len(&self) -> usize {
        self.blocks.lock().len()
    }

    /// True where it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn answer(&self, Read { block, mut fill, done }: Read) {
        let key = block.as_ref().key();
        match self.faults.lock().pop_front() {
            Some(ReadFault::Silent) => return,
            Some(ReadFault::Told(why)) => {
                if why == WhyNotRead::Damaged {
                    self.blocks.lock().remove(&key);
                }
                return done(Err(NotRead { fill: Some(fill), why }));
            }
            Some(ReadFault::Lost(why)) => return done(Err(NotRead { fill: None, why })),
            None => {}
        }
        let found = self.blocks.lock().get(&key).cloned();
        done(match found {
            None => Err(NotRead { fill: Some(fill), why: WhyNotRead::Absent }),
            Some((bytes, parent)) => {
                fill.append_promoted(&bytes).unwrap();
                let sums = fill.section_sums();
                Ok(Arrived { filled: fill.filled().unwrap(), sums, parent })
            }
        });
    }
}

impl Below for FaultyTier {
    fn presence(&self, run: &Run<'_>, ask: Ask) -> Known {
        if matches!(ask, Ask::Held) {
            return run.blocks().map(|block| self.is_held(&block.key())).collect::<Vec<_>>().into();
        }
        let blocks = self.blocks.lock();
        run.blocks().map(|block| blocks.contains_key(&block.key())).collect::<Vec<_>>().into()
    }

    fn read(self: Arc<Self>, reads: Vec<Read>, _urgency: ReadUrgency) {
        self.batches.lock().push(reads.len());
        for read in reads {
            match &mut *self.stalled.lock() {
                Some(stalled) => stalled.push(read),
                None => self.answer(read),
            }
        }
    }

    fn write(self: Arc<Self>, write: Write) -> Written {
        let key = write.block.as_ref().key();
        let leased = write.leased.or_else(|| self.host.lease_quietly(write.block.layout.namespace, &key));
        let Some(leased) = leased.filter(|_| !self.full.load(Ordering::Acquire)) else { return Written::Refused };
        self.blocks.lock().entry(key).or_insert_with(|| (leased.to_vec(), write.parent));
        let (told, waiting) = oneshot::channel();
        let _ = told.send(true);
        Written::Coming(write.awaited.then_some(waiting))
    }

    fn room(&self, _wanted: bool) -> Room<'_> {
        let freed = self.freed.notified();
        Room { is_there: !self.full.load(Ordering::Acquire), answers: true, freed }
    }

    fn hold(self: Arc<Self>, hold: Hold) -> Result<Holding, NotHeld> {
        let keys = hold.runs.iter().flat_map(|run| run.as_ref().blocks().map(|block| block.key())).collect();
        self.holds.lock().insert((hold.id, hold.kind), keys);
        Ok(None)
    }

    fn release(self: Arc<Self>, id: HoldId, kind: HoldKind) -> bool {
        self.holds.lock().remove(&(id, kind)).is_some()
    }

    fn delete(self: Arc<Self>, run: OwnedRun) -> BoxFuture<'static, Result<Vec<Delete>, NotDeleted>> {
        let delete = |block: BlockRef<'_>| match self.is_held(&block.key()) {
            true => Delete::Pinned,
            false if self.blocks.lock().remove(&block.key()).is_some() => Delete::Deleted,
            false => Delete::Absent,
        };
        let deleted = run.as_ref().blocks().map(delete).collect();
        let meanwhile = self.at_delete.lock().take();
        let ended = async move {
            meanwhile.into_iter().for_each(|meanwhile| meanwhile());
            Ok(deleted)
        };
        ended.boxed()
    }
}
