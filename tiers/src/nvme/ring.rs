//! The ring of batches' numbers (see `mark.rs`), and when the write buffer has to go to a table for it: a number that the ring
//! writes over must be of a batch that is in a table. Pure.

use crate::caps;

/// See the head of this file.
#[derive(Default)]
pub(super) struct Ring {
    /// The number of the newest batch that was taken.
    newest: u64,
    /// The newest one that was in the write buffer when that was last sent on its way to a table.
    sent: u64,
    /// Up to this one all are in tables.
    in_tables: u64,
}

/// What has to be done before the next batch is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing.
    Nothing,
    /// The write buffer should be sent to a table. Where that is refused, there are more chances.
    Send,
    /// It must be in one: the ring has come round.
    Wait,
}

impl Ring {
    /// Of an index that was just opened: all that it has is in tables.
    pub fn opened(newest: u64) -> Self {
        Self { newest, sent: newest, in_tables: newest }
    }

    /// The number of the newest batch.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// What is due. `is_sending`: a write buffer is still on its way.
    pub fn due(&mut self, is_sending: impl FnOnce() -> bool) -> Due {
        let is_full = self.newest - self.sent >= caps::NVME_INDEX_RING / 4;
        let can_send = (is_full || self.sent > self.in_tables) && !is_sending();
        if can_send {
            self.in_tables = self.sent;
        }
        match self.newest - self.in_tables >= caps::NVME_INDEX_RING {
            true => Due::Wait,
            false if is_full && can_send => Due::Send,
            false => Due::Nothing,
        }
    }

    /// The write buffer is on its way.
    pub fn sent(&mut self) {
        self.sent = self.newest;
    }

    /// All of it is in a table.
    pub fn stored(&mut self) {
        *self = Self::opened(self.newest);
    }

    /// The index took the batch after the newest.
    pub fn taken(&mut self) {
        self.newest += 1;
    }
}

/// The place of a batch's number.
pub(super) fn place_of(number: u64) -> u16 {
    (number % caps::NVME_INDEX_RING) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database that refuses the write buffer at random, and takes its time: what is in no table never outgrows the ring, and a
    /// refusal costs no batch.
    #[test]
    fn what_is_in_no_table_fits_the_ring() {
        let mut seed = 7u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for refusals in [0, 50, 99, 100] {
            let mut ring = Ring::opened(5);
            let (mut buffer, mut sending, mut in_tables, mut waits, mut sends) = (5, None, 5, 0, 0);
            for number in 6..200_000 {
                if random(100) == 0 {
                    in_tables = sending.take().unwrap_or(in_tables);
                }
                match ring.due(|| sending.is_some()) {
                    Due::Nothing => {}
                    Due::Send if random(100) < refusals => {}
                    Due::Send => {
                        assert!(sending.is_none(), "the committer would be held up");
                        (sending, sends) = (Some(buffer), sends + 1);
                        ring.sent();
                    }
                    Due::Wait => {
                        (sending, in_tables, waits) = (None, buffer, waits + 1);
                        ring.stored();
                    }
                }
                assert_eq!(ring.newest() + 1, number);
                ring.taken();
                buffer = number;
                assert!(buffer - in_tables <= caps::NVME_INDEX_RING, "{refusals}%: batch {number}");
            }
            assert_eq!(
                (waits > 0, sends > 0),
                (refusals == 100, refusals < 100),
                "{refusals}%: {waits} waits, {sends} sends"
            );
        }
    }
}
