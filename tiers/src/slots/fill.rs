//! Filling: one flight a block, which others join or take over.

use kvstore_plane::{SlotKey, SlotRef, SlotState};

use super::{Fill, FillTicket, FlightSource, Incoming, Publish, Reserve, SlabMemory, Slots, Urgency};
use crate::caps;
use crate::clock::BootTime;
use crate::eviction::Place;

impl<S: SlabMemory> Slots<S> {
    /// Reserves a slot for a block that its caller will bring.
    pub fn reserve(&mut self, incoming: &Incoming, urgency: Urgency, now: BootTime) -> Reserve {
        match self.find(&incoming.key).map(|(slot, entry)| (slot, entry.state())) {
            Some((_, SlotState::Resident)) => return Reserve::Resident,
            Some((slot, _)) => {
                if !self.join(slot, urgency, now) {
                    return Reserve::InFlight;
                }
                self.supersede(slot);
                self.counts.taken_over += 1;
            }
            None => {}
        }
        if self.fills.len() >= caps::FILLS_MAX {
            return Reserve::Busy;
        }
        let Some(slot) = self.take_free(incoming.pool) else { return Reserve::NoSlot };
        let reserved = self.change(slot, |entry| entry.reserve(&incoming.key, incoming.kind.number()));
        let Some(generation) = reserved else { return Reserve::NoSlot };
        if self.file(slot, &incoming.key).is_err() {
            self.free(slot);
            return Reserve::Busy;
        }
        let (head, behind) = self.head_of(incoming);
        let fill = Fill { generation, incoming: *incoming, head, behind, urgency, progress: now, superseded: false };
        self.fills.insert(slot, fill);
        Reserve::Reserved(FillTicket { slot, generation })
    }

    /// Adds a waiter to a flight. True when the waiter, a writer, may replace the one that fills: that one
    /// stalled.
    pub(super) fn join(&mut self, slot: SlotRef, urgency: Urgency, now: BootTime) -> bool {
        let Some(fill) = self.fills.get_mut(&slot) else { return false };
        fill.urgency.priority = fill.urgency.priority.max(urgency.priority);
        fill.urgency.deadline = fill.urgency.deadline.max(urgency.deadline);
        urgency.source == FlightSource::Writer && now.ms_since(fill.progress) >= caps::FILL_STALL_MS
    }

    /// The urgency that a flight has by now.
    pub fn flight(&self, key: &SlotKey) -> Option<Urgency> {
        let (slot, _) = self.find(key)?;
        self.fills.get(&slot).map(|fill| fill.urgency)
    }

    /// The slot of a live flight is no longer found by its key, and its ticket publishes nothing.
    pub(super) fn supersede(&mut self, slot: SlotRef) {
        if let Some(fill) = self.fills.get_mut(&slot) {
            fill.superseded = true;
            let key = fill.incoming.key;
            self.unfile(slot, &key);
            self.change(slot, |entry| entry.withdraw(SlotState::Doomed));
        }
    }

    /// The bearer of `ticket` brought something just now.
    pub fn progress(&mut self, ticket: &FillTicket, now: BootTime) {
        if let Some(fill) = self.fill_of(ticket) {
            fill.progress = now;
        }
    }

    /// The key that `ticket` was given for.
    pub fn key_of(&mut self, ticket: &FillTicket) -> Option<SlotKey> {
        self.fill_of(ticket).map(|fill| fill.incoming.key)
    }

    pub(super) fn fill_of(&mut self, ticket: &FillTicket) -> Option<&mut Fill> {
        self.fills.get_mut(&ticket.slot).filter(|fill| fill.generation == ticket.generation)
    }

    /// The slot is filled: makes the block readable. The ticket is spent either way. `tail`: it is the last
    /// block of its request.
    pub fn publish(&mut self, ticket: FillTicket, length: u32, crc32: u32, tail: bool) -> Publish {
        if self.fill_of(&ticket).is_none_or(|fill| fill.superseded) {
            self.abort(ticket);
            return Publish::Superseded;
        }
        let Some(fill) = self.fills.remove(&ticket.slot) else { return Publish::Superseded };
        let incoming = fill.incoming;
        self.change(ticket.slot, |entry| entry.publish(length, crc32));
        self.tell_policy(ticket.slot, &incoming, tail);
        self.counts.published += 1;
        self.tell_watcher(&incoming.key, true);
        Publish::Published
    }

    fn tell_policy(&mut self, slot: SlotRef, incoming: &Incoming, tail: bool) {
        let Some((pool, block)) = self.place(slot) else { return };
        let (origin, mut missing) = self.place_of(incoming);
        let new = self.new_block(incoming, origin, tail);
        if missing > 0 && !self.note_early(slot, incoming) {
            // The policy hears nothing of what is before it: to it, there is nothing between.
            missing = 0;
        }
        let followers = self.take_early(&incoming.key, pool);
        let Some(pool) = self.pool_now(pool) else { return };
        if missing == 0 && followers.is_empty() {
            pool.policy.insert(block, new);
        } else {
            pool.policy.insert_at(block, new, Place { missing, followers: &followers });
        }
        self.mark_used(slot);
    }

    /// The bearer of `ticket` gives up, or was superseded: frees its slot.
    pub fn abort(&mut self, ticket: FillTicket) {
        if self.fill_of(&ticket).is_none() {
            return;
        }
        if let Some(fill) = self.fills.remove(&ticket.slot) {
            if !fill.superseded {
                self.unfile(ticket.slot, &fill.incoming.key);
            }
            self.counts.aborted += 1;
            self.free(ticket.slot);
        }
    }
}
