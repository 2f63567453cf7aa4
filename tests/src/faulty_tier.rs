//! A tier below memory that is a map, and that fails as it is told.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvstore_plane::SlotKey;
use kvstore_tiers::Run;
use kvstore_tiers::SequenceHash;
use kvstore_tiers::below::{Arrived, Ask, Below, Known, NotRead, Read, ReadUrgency, Room, WhyNotRead, Write, Written};
use kvstore_tiers::host::HostTier;
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
    full: AtomicBool,
    freed: Notify,
    /// Reads that wait, where they are to.
    held: Mutex<Option<Vec<Read>>>,
}

impl FaultyTier {
    /// An empty one, without faults.
    pub fn new(host: &Arc<HostTier>) -> Arc<Self> {
        Arc::new(Self {
            host: Arc::clone(host),
            blocks: Mutex::default(),
            faults: Mutex::default(),
            batches: Mutex::default(),
            full: AtomicBool::new(false),
            freed: Notify::new(),
            held: Mutex::default(),
        })
    }

    /// The next reads fail so, in this order.
    pub fn fail(&self, faults: impl IntoIterator<Item = ReadFault>) {
        self.faults.lock().extend(faults);
    }

    /// Reads wait from now on, until [`Self::let_go`].
    pub fn hold(&self) {
        self.held.lock().get_or_insert_default();
    }

    /// Reads that wait are answered, and later ones at once.
    pub fn let_go(&self) {
        let held = self.held.lock().take();
        held.into_iter().flatten().for_each(|read| self.answer(read));
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
    fn presence(&self, run: &Run<'_>, _ask: Ask) -> Known {
        let blocks = self.blocks.lock();
        run.blocks().map(|block| blocks.contains_key(&block.key())).collect::<Vec<_>>().into()
    }

    fn read(self: Arc<Self>, reads: Vec<Read>, _urgency: ReadUrgency) {
        self.batches.lock().push(reads.len());
        for read in reads {
            match &mut *self.held.lock() {
                Some(held) => held.push(read),
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
}
