//! Which workers had which conversations: the chain of messages.
//!
//! A conversation that goes on is placed where its beginning was, although nobody here can render it. The table has sets of slots, as a
//! processor's cache has: what is new takes the place of the oldest of its set, so that the memory is bounded, and nothing is ever moved.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::caps;

/// Slots of a set, 16 bytes each: four lines of a processor's cache.
const WAYS: usize = 16;

/// A name, and who had it (the upper half) when (the lower).
type Slot = [u64; 2];

#[derive(Default)]
struct Table {
    /// Empty until something is stored.
    slots: Vec<Slot>,
    clock: u32,
    /// Since when a worker's word counts.
    since: HashMap<u32, u32>,
}

/// See the head of this file. Threads can share it.
#[derive(Default)]
pub struct Conversations {
    table: Mutex<Table>,
}

impl Conversations {
    /// What a message takes, for each worker that had it.
    pub const BYTES_A_MESSAGE: usize = size_of::<Slot>();

    /// A worker has these beginnings of a conversation now.
    pub fn store(&self, names: impl Iterator<Item = u64>, worker: usize) {
        let Ok(worker) = u32::try_from(worker) else { return };
        let mut table = self.table.lock();
        if table.slots.is_empty() {
            table.slots = vec![[0; 2]; caps::CONVERSATIONS_SLOTS];
        }
        table.clock = table.clock.wrapping_add(1);
        let clock = table.clock;
        names.for_each(|name| table.put(name, worker, clock));
    }

    /// How many messages, from the first on, each of `workers` had, in the same order; 0 for none.
    pub fn find(&self, names: &[u64], workers: &[usize]) -> Vec<usize> {
        let mut found = vec![0; workers.len()];
        let table = self.table.lock();
        let mut missing = if table.slots.is_empty() { 0 } else { workers.len() };
        // The longest first: a name covers all that comes before it.
        for (at, name) in names.iter().enumerate().rev() {
            if missing == 0 {
                break;
            }
            for worker in table.workers_of(*name) {
                let place = workers.iter().position(|asked| *asked == worker as usize);
                if let Some(messages) = place.and_then(|place| found.get_mut(place)).filter(|messages| **messages == 0)
                {
                    *messages = at + 1;
                    missing -= 1;
                }
            }
        }
        found
    }

    /// A worker may have nothing any more of what it had: it is another process, say.
    pub fn forget(&self, worker: usize) {
        let mut table = self.table.lock();
        let clock = table.clock.wrapping_add(1);
        table.clock = clock;
        if let Ok(worker) = u32::try_from(worker) {
            // What is left of workers that are gone goes with time: numbers are not used twice.
            if table.since.len() >= caps::WORKERS_MAX {
                table.since.clear();
                table.slots = Vec::new();
            }
            table.since.insert(worker, clock);
        }
    }
}

impl Table {
    fn set_of(&self, name: u64) -> std::ops::Range<usize> {
        // Multiplied: names are hashes, and sets a power of two or not.
        let sets = self.slots.len() / WAYS;
        let set = ((u128::from(name) * sets as u128) >> 64) as usize;
        set * WAYS..(set + 1) * WAYS
    }

    fn put(&mut self, name: u64, worker: u32, clock: u32) {
        let age = |slot: &Slot| if slot[0] == 0 { u32::MAX } else { clock.wrapping_sub(slot[1] as u32) };
        let set = self.set_of(name);
        let Some(slots) = self.slots.get_mut(set) else { return };
        let is_same = |slot: &Slot| slot[0] == name && (slot[1] >> 32) as u32 == worker;
        let at = slots.iter().position(is_same);
        let at = at.or_else(|| slots.iter().enumerate().max_by_key(|(_, slot)| age(slot)).map(|(at, _)| at));
        if let Some(slot) = at.and_then(|at| slots.get_mut(at)) {
            *slot = [name, u64::from(worker) << 32 | u64::from(clock)];
        }
    }

    fn workers_of(&self, name: u64) -> impl Iterator<Item = u32> {
        let slots = self.slots.get(self.set_of(name)).unwrap_or_default();
        slots.iter().filter(move |slot| slot[0] == name).filter_map(|slot| {
            let (worker, when) = ((slot[1] >> 32) as u32, slot[1] as u32);
            let age = self.clock.wrapping_sub(when);
            let counts = self.since.get(&worker).is_none_or(|since| age < self.clock.wrapping_sub(*since));
            counts.then_some(worker)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_beginning_that_a_worker_had_is_found() {
        let conversations = Conversations::default();
        assert_eq!(conversations.find(&[11, 12], &[1]), [0]);
        let name = |at: u64| at.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let names: Vec<u64> = (1..=6).map(name).collect();
        conversations.store(names[..4].iter().copied(), 1);
        conversations.store(names[..2].iter().copied(), 2);
        assert_eq!(conversations.find(&names, &[2, 1, 3]), [2, 4, 0]);
        let branch = [names[0], names[1], name(99)];
        assert_eq!(conversations.find(&branch, &[1, 2]), [2, 2]);
        // Another process answers at its address.
        conversations.forget(1);
        assert_eq!(conversations.find(&names, &[1, 2]), [0, 2]);
        conversations.store(names[..3].iter().copied(), 1);
        assert_eq!(conversations.find(&names, &[1, 2]), [3, 2]);
    }

    #[test]
    fn what_is_old_makes_room_and_what_is_used_stays() {
        let conversations = Conversations::default();
        let name = |at: u64| (at + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let used: Vec<u64> = (0..100).map(name).collect();
        for round in 0..4u64 {
            let from = 1000 + round * caps::CONVERSATIONS_SLOTS as u64 / 2;
            for at in from..from + caps::CONVERSATIONS_SLOTS as u64 / 2 {
                conversations.store(std::iter::once(name(at)), 1);
            }
            conversations.store(used.iter().copied(), 2);
        }
        assert_eq!(conversations.find(&used, &[2]), [100]);
        assert_eq!(conversations.find(&[name(1000)], &[1]), [0], "the first of all");
        assert_eq!(conversations.table.lock().slots.len(), caps::CONVERSATIONS_SLOTS);
    }
}
