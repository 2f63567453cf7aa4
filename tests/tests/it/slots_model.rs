//! Slots against a map: a million random steps, and after each the two agree on what is readable.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use kvstore_plane::{HeapTable, SequenceHash, SlotEntry, SlotKey, SlotRef};
use kvstore_tests::random::Random;
use kvstore_tiers::eviction::PolicyKind;
use kvstore_tiers::slots::{
    Delete, FillTicket, FlightSource, Incoming, Pinned, Presence, Priority, Publish, Readers, Reserve, SlabMemory,
    Slots, Urgency,
};
use kvstore_tiers::{BlockKind, BootTime, PoolId};

struct Directory(Vec<SlotEntry>);

impl SlabMemory for Directory {
    fn directory(&self) -> &[SlotEntry] {
        &self.0
    }
}

/// The slots that clients name in their lease pages.
#[derive(Default)]
struct Named(Mutex<Vec<SlotRef>>);

impl Readers for Named {
    fn is_empty(&self) -> bool {
        false
    }

    fn named(&self, each: &mut dyn FnMut(SlotRef)) {
        self.0.lock().unwrap().iter().for_each(|slot| each(*slot));
    }
}

const SLOTS: usize = 24;
const KEYS: u64 = 120;

/// What the map knows of a readable block.
#[derive(Clone, Copy, Default, Debug)]
struct Block {
    crc32: u32,
    pins: u32,
    leases: u32,
    demoting: u32,
    copies: u8,
    readers: u32,
}

struct Model {
    slots: Slots<Directory>,
    pool: PoolId,
    blocks: HashMap<SlotKey, Block>,
    fills: Vec<(SlotKey, FillTicket, u32, bool)>,
    leases: Vec<(SlotKey, SlotRef, u32, bool)>,
    demotes: Vec<(SlotKey, SlotRef, bool)>,
    pins: Vec<(SlotKey, Pinned, bool)>,
    /// Readers that asked nobody.
    reads: Vec<(SlotKey, SlotRef, bool)>,
    named: Arc<Named>,
    now: u64,
    stamp: u32,
    slabs: usize,
}

fn key(id: u64) -> SlotKey {
    SlotKey { layout: (id % 3) as u32, group: 0, hash: SequenceHash::new(&id.to_le_bytes()).unwrap() }
}

fn urgency(source: FlightSource, now: u64) -> Urgency {
    Urgency { source, priority: Priority::Demand, deadline: BootTime(now + 1000) }
}

impl Model {
    fn new(policy: PolicyKind) -> Self {
        let named = Arc::new(Named::default());
        let readers = Arc::clone(&named) as Arc<dyn Readers>;
        let mut slots = Slots::new(7, policy, Box::new(HeapTable::new(1000)), readers);
        let pool = slots.pool(4096, SLOTS as u32);
        Self {
            slots,
            pool,
            blocks: HashMap::new(),
            fills: Vec::new(),
            leases: Vec::new(),
            demotes: Vec::new(),
            pins: Vec::new(),
            reads: Vec::new(),
            named,
            now: 0,
            stamp: 0,
            slabs: 0,
        }
    }

    fn live_fill(&self, key: &SlotKey) -> Option<usize> {
        self.fills.iter().position(|(filled, _, _, live)| filled == key && *live)
    }

    fn step(&mut self, random: &mut Random) {
        self.now += random.below(40);
        match random.below(100) {
            0..30 => self.reserve(random),
            30..52 => self.end_fill(random),
            52..58 => self.lease(random),
            58..62 => self.read(random),
            62..68 => self.release(random),
            68..72 => self.end_read(random),
            72..76 => self.pin(random),
            76..81 => self.unpin(random),
            81..84 => self.delete(random),
            84..89 => self.evict(),
            89..92 => self.demote(random),
            92..95 => self.end_demote(random),
            95..97 => self.touch(random),
            97 => self.quarantine(random),
            98 => self.add_slab(),
            _ => self.withdraw(random),
        }
        self.check(random);
    }

    fn add_slab(&mut self) {
        if self.slabs < 4 {
            let directory = Directory((0..SLOTS).map(|_| SlotEntry::free()).collect());
            assert!(self.slots.add_slab(self.pool, directory).is_some());
            self.slabs += 1;
        }
    }

    fn reserve(&mut self, random: &mut Random) {
        let id = random.below(KEYS);
        let key = key(id);
        let parent = id.checked_sub(3).map(|parent| SequenceHash::new(&parent.to_le_bytes()).unwrap());
        let kind = if random.below(5) == 0 { BlockKind::RecurrentState } else { BlockKind::Attention };
        let incoming = Incoming { key, kind, parent, pool: self.pool };
        let source = if random.below(3) == 0 { FlightSource::Promotion } else { FlightSource::Writer };
        match self.slots.reserve(&incoming, urgency(source, self.now), BootTime(self.now)) {
            Reserve::Resident => assert!(self.blocks.contains_key(&key)),
            Reserve::InFlight => {
                assert!(self.live_fill(&key).is_some());
                assert!(self.slots.flight(&key).unwrap().deadline >= BootTime(self.now + 1000), "waits are added");
            }
            Reserve::Reserved(ticket) => {
                assert!(!self.blocks.contains_key(&key));
                if let Some(old) = self.live_fill(&key) {
                    assert_eq!(source, FlightSource::Writer, "only a writer takes over");
                    self.fills[old].3 = false;
                }
                let distinct = self.fills.iter().all(|(_, other, _, _)| other.slot != ticket.slot);
                assert!(distinct, "two fills have one slot");
                assert!(self.leases.iter().all(|(_, slot, _, _)| *slot != ticket.slot), "a leased slot was given away");
                assert!(
                    self.reads.iter().all(|(_, slot, _)| *slot != ticket.slot),
                    "a slot was given away while it was read"
                );
                self.stamp += 1;
                self.fills.push((key, ticket, self.stamp, true));
            }
            Reserve::NoSlot => {
                if let Some(old) = self.live_fill(&key) {
                    // The stalled writer was fenced off before it was seen that no slot is free.
                    self.fills[old].3 = false;
                }
            }
            Reserve::Busy => panic!("so few fills are not too many"),
        }
    }

    fn end_fill(&mut self, random: &mut Random) {
        let Some(at) = random.pick(&self.fills) else { return };
        if random.below(4) == 0 {
            let now = BootTime(self.now);
            self.slots.progress(&self.fills[at].1, now);
            return;
        }
        let (key, ticket, stamp, live) = self.fills.swap_remove(at);
        if random.below(5) == 0 {
            self.slots.abort(ticket);
            return;
        }
        let published = self.slots.publish(ticket, 1000, stamp, random.below(4) == 0);
        assert_eq!(published == Publish::Published, live, "a superseded writer publishes nothing");
        if live {
            self.blocks.insert(key, Block { crc32: stamp, ..Block::default() });
        }
    }

    fn lease(&mut self, random: &mut Random) {
        let key = key(random.below(KEYS));
        let leased = self.slots.lease(&key);
        assert_eq!(leased.is_some(), self.blocks.contains_key(&key));
        if let Some((slot, record)) = leased {
            let block = self.blocks.get_mut(&key).unwrap();
            assert_eq!((record.crc32, record.key), (block.crc32, key));
            block.leases += 1;
            self.leases.push((key, slot, record.crc32, true));
        }
    }

    fn release(&mut self, random: &mut Random) {
        let Some(at) = random.pick(&self.leases) else { return };
        let (key, slot, crc32, live) = self.leases.swap_remove(at);
        self.slots.release(slot);
        if live && let Some(block) = self.blocks.get_mut(&key) {
            assert_eq!(block.crc32, crc32);
            block.leases -= 1;
        }
    }

    /// A reader that maps the slab: names the slot, then finds it readable.
    fn read(&mut self, random: &mut Random) {
        let key = key(random.below(KEYS));
        let Some((slot, _)) = self.slots.lease(&key) else { return };
        self.slots.release(slot);
        self.blocks.get_mut(&key).unwrap().readers += 1;
        self.reads.push((key, slot, true));
        self.named.0.lock().unwrap().push(slot);
    }

    fn end_read(&mut self, random: &mut Random) {
        if random.below(3) == 0 {
            self.slots.look_again();
        }
        let Some(at) = random.pick(&self.reads) else { return };
        let (key, slot, live) = self.reads.swap_remove(at);
        let mut named = self.named.0.lock().unwrap();
        let at = named.iter().position(|other| *other == slot).unwrap();
        named.swap_remove(at);
        if live && let Some(block) = self.blocks.get_mut(&key) {
            block.readers -= 1;
        }
    }

    fn pin(&mut self, random: &mut Random) {
        let key = key(random.below(KEYS));
        let pinned = self.slots.pin(&key);
        assert_eq!(pinned.is_some(), self.blocks.contains_key(&key));
        if let Some(pinned) = pinned {
            self.blocks.get_mut(&key).unwrap().pins += 1;
            self.pins.push((key, pinned, true));
        }
    }

    fn unpin(&mut self, random: &mut Random) {
        let Some(at) = random.pick(&self.pins) else { return };
        let (key, pinned, live) = self.pins.swap_remove(at);
        self.slots.unpin(&pinned);
        // What was pinned may be gone, as damaged, and another there by its key: that one's pins are its own.
        if live && let Some(block) = self.blocks.get_mut(&key) {
            block.pins -= 1;
        }
    }

    /// The block is no longer readable; whoever reads it may go on.
    fn forget(&mut self, key: &SlotKey) {
        self.blocks.remove(key);
        self.pins.iter_mut().filter(|pin| pin.0 == *key).for_each(|pin| pin.2 = false);
        self.leases.iter_mut().filter(|lease| lease.0 == *key).for_each(|lease| lease.3 = false);
        self.demotes.iter_mut().filter(|demote| demote.0 == *key).for_each(|demote| demote.2 = false);
        self.reads.iter_mut().filter(|read| read.0 == *key).for_each(|read| read.2 = false);
    }

    fn delete(&mut self, random: &mut Random) {
        let key = key(random.below(KEYS));
        let expected = match (self.blocks.get(&key), self.live_fill(&key)) {
            (Some(block), _) if block.pins > 0 => Delete::Pinned,
            (Some(_), _) | (None, Some(_)) => Delete::Deleted,
            (None, None) => Delete::Absent,
        };
        assert_eq!(self.slots.delete(&key), expected);
        if expected == Delete::Deleted {
            if let Some(fill) = self.live_fill(&key) {
                self.fills[fill].3 = false;
            }
            self.forget(&key);
        }
    }

    fn quarantine(&mut self, random: &mut Random) {
        let key = key(random.below(KEYS));
        self.slots.quarantine(&key);
        self.forget(&key);
    }

    fn evict(&mut self) {
        let mut evicted = self.slots.evict(self.pool, None);
        if evicted.is_empty() && self.slots.look_again() {
            evicted = self.slots.evict(self.pool, None);
        }
        if evicted.is_empty() {
            // A parent whose children are kept stays with them.
            let kept = |block: &&Block| block.pins + block.leases + block.demoting + block.readers > 0;
            let kept_ones = self.blocks.values().filter(kept).count();
            assert!(kept_ones > 0 || self.blocks.is_empty(), "nothing was kept, and nothing was evicted");
        }
        for evicted in evicted {
            assert_eq!(self.blocks[&evicted.key].copies, evicted.copies);
            self.assert_unkept(&evicted.key);
            self.forget(&evicted.key);
        }
    }

    fn assert_unkept(&self, key: &SlotKey) {
        let block = self.blocks[key];
        assert_eq!((block.pins, block.leases, block.demoting, block.readers), (0, 0, 0, 0), "something kept it");
    }

    fn demote(&mut self, random: &mut Random) {
        let key = key(random.below(KEYS));
        let begun = self.slots.begin_demote(&key);
        let possible = self.blocks.get(&key).is_some_and(|block| block.demoting == 0);
        assert_eq!(begun.is_some(), possible);
        if let Some((slot, _)) = begun {
            self.blocks.get_mut(&key).unwrap().demoting = 1;
            self.demotes.push((key, slot, true));
        }
    }

    fn end_demote(&mut self, random: &mut Random) {
        let Some(at) = random.pick(&self.demotes) else { return };
        let (key, slot, live) = self.demotes.swap_remove(at);
        let copies = random.below(4) as u8;
        self.slots.end_demote(slot, copies);
        if live && let Some(block) = self.blocks.get_mut(&key) {
            block.demoting = 0;
            block.copies |= copies;
        }
    }

    fn touch(&mut self, random: &mut Random) {
        let key = key(random.below(KEYS));
        self.slots.refresh(&key);
        let read: Vec<SlotRef> = self.leases.iter().filter(|lease| lease.3).map(|lease| lease.1).take(3).collect();
        self.slots.touch(&read);
    }

    fn withdraw(&mut self, random: &mut Random) {
        let numbers = self.slots.slab_numbers(self.pool);
        let Some(at) = random.pick(&numbers) else { return };
        let before: Vec<SlotKey> = self.slots.keys_of_slab(numbers[at]);
        let withdrawn = self.slots.withdraw_slab(numbers[at]);
        self.slabs -= usize::from(withdrawn.is_some());
        for key in before {
            if self.slots.presence(&key) != Presence::Resident {
                self.assert_unkept(&key);
                self.forget(&key);
            }
        }
    }

    /// One key in full after each step; everything now and then.
    fn check(&mut self, random: &mut Random) {
        let (from, to) = if random.below(500) == 0 { (0, KEYS) } else { (random.below(KEYS), KEYS) };
        for id in (from..to).take(if from == 0 { KEYS as usize } else { 1 }) {
            let key = key(id);
            let expected = match (self.blocks.contains_key(&key), self.live_fill(&key).is_some()) {
                (true, _) => Presence::Resident,
                (false, true) => Presence::InFlight,
                (false, false) => Presence::Absent,
            };
            assert_eq!(self.slots.presence(&key), expected);
            assert_eq!(self.slots.copies(&key), self.blocks.get(&key).map_or(0, |block| block.copies));
        }
        if from == 0 {
            self.slots.look_again();
            assert_eq!(self.slots.len(), self.blocks.len() + self.fills.iter().filter(|fill| fill.3).count());
            let pinned = self.blocks.values().filter(|block| block.pins > 0).count() as u64 * 1000;
            assert_eq!(self.slots.pinned_bytes(), pinned);
            let gone = self.leases.iter().filter(|lease| !lease.3).map(|lease| lease.1);
            let gone = gone.chain(self.demotes.iter().filter(|demote| !demote.2).map(|demote| demote.1));
            let gone = gone.chain(self.reads.iter().filter(|read| !read.2).map(|read| read.1));
            let doomed = gone.collect::<std::collections::HashSet<_>>().len();
            let (_, slots, used) = self.slots.pool_occupancy(self.pool);
            assert_eq!(used, self.blocks.len() + self.fills.len() + doomed, "a slot leaked");
            assert_eq!(slots, self.slabs * SLOTS);
        }
    }
}

fn run(policy: PolicyKind, seed: u64, steps: u64) {
    let mut random = Random(seed);
    let mut model = Model::new(policy);
    model.add_slab();
    for _ in 0..steps {
        model.step(&mut random);
    }
    // Everything ends: every slot is free again.
    for (_, ticket, _, _) in std::mem::take(&mut model.fills) {
        model.slots.abort(ticket);
    }
    for (_, slot, _, _) in std::mem::take(&mut model.leases) {
        model.slots.release(slot);
    }
    for (_, slot, _) in std::mem::take(&mut model.demotes) {
        model.slots.end_demote(slot, 0);
    }
    model.reads.clear();
    model.named.0.lock().unwrap().clear();
    for (_, pinned, _) in std::mem::take(&mut model.pins) {
        model.slots.unpin(&pinned);
    }
    assert_eq!(model.slots.pinned_bytes(), 0);
    for id in 0..KEYS {
        assert_ne!(model.slots.delete(&key(id)), Delete::Pinned, "a pin is left that nobody has");
    }
    model.slots.look_again();
    assert_eq!(model.slots.pool_occupancy(model.pool).2, 0);
    assert!(model.slots.is_empty());
}

#[test]
fn a_million_steps_agree_with_a_map_under_the_default_policy() {
    (0..20).for_each(|seed| run(PolicyKind::Sessions, seed, 50_000));
}

#[test]
fn a_million_steps_agree_with_a_map_under_lru() {
    (100..120).for_each(|seed| run(PolicyKind::Lru, seed, 50_000));
}
