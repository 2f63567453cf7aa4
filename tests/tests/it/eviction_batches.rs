//! Blocks leave in batches where clients read without asking. A batch of one prefix takes its end, and what a reader names keeps all
//! that is before it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use kvstore_plane::{HeapTable, SequenceHash, SlotEntry, SlotKey, SlotRef};
use kvstore_tests::random::Random;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::slots::{
    Evicted, FillTicket, FlightSource, Incoming, Priority, Publish, Readers, Reserve, SlabMemory, Slots, Urgency,
};
use kvstore_tiers::{BlockKind, BootTime, PoolId, caps};

const SLOTS: usize = 1024;

pub(crate) struct Directory(Vec<SlotEntry>);

impl SlabMemory for Directory {
    fn directory(&self) -> &[SlotEntry] {
        &self.0
    }
}

#[derive(Default)]
pub(crate) struct Named(Mutex<Vec<SlotRef>>);

impl Readers for Named {
    fn is_empty(&self) -> bool {
        false
    }

    fn named(&self, each: &mut dyn FnMut(SlotRef)) {
        self.0.lock().unwrap().iter().for_each(|slot| each(*slot));
    }
}

/// A pool of blocks in a forest: of each its parent.
pub(crate) struct Forest {
    pub(crate) slots: Slots<Directory>,
    pub(crate) pool: PoolId,
    parents: HashMap<u64, Option<u64>>,
    named: Arc<Named>,
    in_flight: HashSet<u64>,
}

pub(crate) fn hash(id: u64) -> SequenceHash {
    SequenceHash::new(&id.to_le_bytes()).unwrap()
}

pub(crate) fn key(id: u64) -> SlotKey {
    SlotKey { layout: 0, group: 0, hash: hash(id) }
}

impl Forest {
    pub(crate) fn new(policy: PolicyKind) -> Self {
        let named = Arc::new(Named::default());
        let readers = Arc::clone(&named) as Arc<dyn Readers>;
        let mut slots = Slots::new(7, policy, Box::new(HeapTable::new(2 * SLOTS)), readers);
        let pool = slots.pool(4096, SLOTS as u32);
        let directory = Directory((0..SLOTS).map(|_| SlotEntry::free()).collect());
        assert!(slots.add_slab(pool, directory).is_some());
        Self { slots, pool, parents: HashMap::new(), named, in_flight: HashSet::new() }
    }

    pub(crate) fn incoming(&self, id: u64, parent: Option<u64>) -> Incoming {
        Incoming { key: key(id), kind: BlockKind::Attention, parent: parent.map(hash), pool: self.pool }
    }

    /// `None` where no slot is free.
    fn reserve(&mut self, id: u64, parent: Option<u64>, now: u64) -> Option<FillTicket> {
        self.slots.set_now(BootTime(now));
        let urgency =
            Urgency { source: FlightSource::Writer, priority: Priority::Demand, deadline: BootTime(now + 1000) };
        match self.slots.reserve(&self.incoming(id, parent), urgency, BootTime(now)) {
            Reserve::Reserved(ticket) => Some(ticket),
            _ => None,
        }
    }

    fn publish(&mut self, ticket: FillTicket, id: u64, parent: Option<u64>) {
        assert_eq!(self.slots.publish(ticket, 1000, id as u32, false), Publish::Published);
        self.parents.insert(id, parent);
    }

    /// False where no slot is free.
    pub(crate) fn store(&mut self, id: u64, parent: Option<u64>, now: u64) -> bool {
        let ticket = self.reserve(id, parent, now);
        ticket.map(|ticket| self.publish(ticket, id, parent)).is_some()
    }

    fn evict(&mut self) -> Vec<u64> {
        self.evict_some(caps::EVICT_BATCH)
    }

    fn evict_some(&mut self, most: usize) -> Vec<u64> {
        let evicted = self.slots.evict_some(self.pool, None, most);
        let ids: Vec<u64> = evicted.iter().map(|Evicted { key, .. }| Self::id_of(key)).collect();
        ids.iter().for_each(|id| _ = self.parents.remove(id));
        for (id, parent) in &self.parents {
            let is_there = |parent| self.parents.contains_key(&parent) || self.in_flight.contains(&parent);
            assert!(parent.is_none_or(is_there), "{id} outlived {parent:?}");
        }
        ids
    }

    fn id_of(key: &SlotKey) -> u64 {
        u64::from_le_bytes(key.hash.to_vec().try_into().unwrap())
    }
}

#[test]
fn a_batch_takes_the_end_of_one_prefix() {
    for policy in PolicyKind::ALL {
        let mut forest = Forest::new(policy);
        (0..1000).for_each(|id| assert!(forest.store(id, id.checked_sub(1), id)));
        let batch = forest.evict();
        assert!(batch.len() > 1, "one look at the readers serves one block: {}", policy.name());
        let expected: Vec<u64> = (0..1000).rev().take(batch.len()).collect();
        assert_eq!(batch, expected, "{}", policy.name());
    }
}

/// Two shards of three left in one batch, and each named the third one: its slot was free twice, and two blocks got it.
#[test]
fn a_block_that_is_named_twice_leaves_once() {
    for policy in PolicyKind::ALL {
        let mut forest = Forest::new(policy);
        (0..10).for_each(|id| assert!(forest.store(id, None, id)));
        let evicted = forest.slots.evict_keys([key(3), key(4), key(3)].into_iter());
        assert_eq!(evicted.len(), 2);
        assert_eq!(forest.slots.pool_occupancy(forest.pool).2, 8);
        (10..10 + SLOTS as u64 - 8).for_each(|id| assert!(forest.store(id, None, id), "a slot is lost"));
        assert!(!forest.store(5000, None, 5000), "more blocks than slots");
        let there = (0..3).chain(5..10 + SLOTS as u64 - 8).all(|id| forest.slots.find_slot(&key(id)).is_some());
        assert!(there, "a block gave its slot to another");
    }
}

/// A block is dropped, and stored again: what is behind it can be read again, and is no longer the first to leave.
#[test]
fn a_beginning_that_comes_back_heals_its_chain() {
    for policy in PolicyKind::ALL {
        let mut forest = Forest::new(policy);
        (0..100).for_each(|id| assert!(forest.store(id, id.checked_sub(1), id)));
        (1000..1100).for_each(|id| assert!(forest.store(id, (id > 1000).then(|| id - 1), id)));
        forest.slots.quarantine(&key(40));
        assert!(forest.store(40, Some(39), 2000));
        let slots: Vec<SlotRef> = (0..100).map(|id| forest.slots.find_slot(&key(id)).unwrap()).collect();
        forest.slots.set_now(BootTime(3000));
        forest.slots.touch(&slots);
        assert!(forest.evict().iter().all(|id| *id >= 1000), "{}: the chain that was read last", policy.name());
    }
}

#[test]
fn what_a_reader_names_keeps_what_is_before_it() {
    for policy in PolicyKind::ALL {
        let mut forest = Forest::new(policy);
        (0..1000).for_each(|id| assert!(forest.store(id, id.checked_sub(1), id)));
        let (slot, _) = forest.slots.lease(&key(997)).unwrap();
        forest.slots.release(slot);
        forest.named.0.lock().unwrap().push(slot);
        assert_eq!(forest.evict(), [999, 998]);
        assert_eq!(forest.evict(), Vec::<u64>::new(), "all else is before what is read");
        forest.named.0.lock().unwrap().clear();
        assert!(forest.slots.look_again());
        assert_eq!(forest.evict().first(), Some(&997));
    }
}

/// Chains that branch at random, readers that come and go.
#[test]
fn no_block_outlives_its_parent_whatever_is_read() {
    for (policy, seed) in PolicyKind::ALL.into_iter().flat_map(|policy| (0..8).map(move |seed| (policy, seed))) {
        let mut random = Random(seed);
        let mut forest = Forest::new(policy);
        let mut last: Option<u64> = None;
        let mut evictions = 0;
        for id in 0..12_000u64 {
            last = match random.below(200) {
                0 => None,
                1..4 => {
                    let mut known: Vec<u64> = forest.parents.keys().copied().collect();
                    known.sort_unstable();
                    random.pick(&known).map(|at| known[at])
                }
                _ => last.filter(|last| forest.parents.contains_key(last)),
            };
            if random.below(50) == 0 {
                let slots = (0..20).map(|_| SlotRef { slab: 0, slot: random.below(SLOTS as u64) as u32 }).collect();
                *forest.named.0.lock().unwrap() = slots;
                forest.slots.look_again();
            }
            while !forest.store(id, last, id * 10) {
                if forest.evict().is_empty() {
                    forest.named.0.lock().unwrap().clear();
                    forest.slots.look_again();
                } else {
                    evictions += 1;
                }
                last = last.filter(|last| forest.parents.contains_key(last));
            }
            last = Some(id);
        }
        assert!(evictions > 1000, "{evictions}");
    }
}

/// Blocks of one prefix are filled side by side. One that was published before its parent counted as the child of what was before
/// both, and outlived its parent.
#[test]
fn a_block_that_is_published_before_its_parent_leaves_before_it() {
    let orders: [[u64; 4]; 5] = [[4, 3, 2, 1], [2, 1, 4, 3], [3, 1, 2, 4], [4, 1, 3, 2], [2, 4, 1, 3]];
    for (policy, order) in PolicyKind::ALL.into_iter().flat_map(|policy| orders.map(|order| (policy, order))) {
        // Behind a block that is there, and where the first of all is the last to come.
        for begun in [true, false] {
            let mut forest = Forest::new(policy);
            assert!(!begun || forest.store(0, None, 0));
            let parent = |id: u64| if id == 1 && !begun { None } else { Some(id - 1) };
            let tickets: Vec<_> = (1..=4).map(|id| forest.reserve(id, parent(id), id).unwrap()).collect();
            order.iter().for_each(|id| forest.publish(tickets[*id as usize - 1], *id, parent(*id)));
            let left: Vec<u64> = (0..4).flat_map(|_| forest.evict_some(1)).collect();
            assert_eq!(left, [4, 3, 2, 1], "{}, published {order:?}, {begun}", policy.name());
        }
    }
}

/// The same with chains that branch, others that come meanwhile, and fills that come to nothing.
#[test]
fn no_block_outlives_its_parent_whenever_it_is_published() {
    for (policy, seed) in PolicyKind::ALL.into_iter().flat_map(|policy| (0..8).map(move |seed| (policy, seed))) {
        let mut random = Random(seed);
        let mut forest = Forest::new(policy);
        let mut flying: Vec<(FillTicket, u64, Option<u64>)> = Vec::new();
        let (mut last, mut evicted) = (None, 0);
        for id in 0..8_000u64 {
            last = match random.below(100) {
                0..3 => None,
                3..9 => {
                    let mut known: Vec<u64> = forest.parents.keys().copied().collect();
                    known.sort_unstable();
                    random.pick(&known).map(|at| known[at])
                }
                _ => last.filter(|last| forest.parents.contains_key(last) || forest.in_flight.contains(last)),
            };
            let ticket = loop {
                if let Some(ticket) = forest.reserve(id, last, id * 10) {
                    break ticket;
                }
                let left = forest.evict_some(1 + random.below(4) as usize);
                assert!(!left.is_empty());
                evicted += left.len();
                last = last.filter(|last| forest.parents.contains_key(last) || forest.in_flight.contains(last));
            };
            forest.in_flight.insert(id);
            flying.push((ticket, id, last));
            last = Some(id);
            while flying.len() > random.below(24) as usize {
                let (ticket, id, parent) = flying.swap_remove(random.below(flying.len() as u64) as usize);
                forest.in_flight.remove(&id);
                // What it hangs on may have left meanwhile.
                let is_there = |parent: &u64| forest.parents.contains_key(parent) || forest.in_flight.contains(parent);
                let parent = parent.filter(is_there);
                forest.publish(ticket, id, parent);
                if random.below(8) == 0
                    && let Some(slot) = forest.slots.find_slot(&key(id))
                {
                    forest.slots.touch(&[slot]);
                }
            }
        }
        assert!(evicted > 1000, "{evicted}");
    }
}
